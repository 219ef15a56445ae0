// The stream of a launcher. An op's params.h declares its launchers: each enqueues CUDA kernels on the stream and returns
// null, or the error's text.

#pragma once

namespace diffkern::cuda {

using Stream = void*;  // a cudaStream_t

}  // namespace diffkern::cuda
