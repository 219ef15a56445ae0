// One buffer a thread, for the kernels of every level.

#include "scratch.h"

#include <new>

namespace diffkern::cpu {

namespace {

constexpr std::align_val_t kLine{64};

struct Buffer {
  void* data = nullptr;
  int64_t size = 0;

  ~Buffer() { ::operator delete(data, kLine); }
};

thread_local Buffer buffer;

}  // namespace

void* scratch(int64_t bytes) {
  if (bytes > buffer.size) {
    ::operator delete(buffer.data, kLine);
    buffer.data = nullptr, buffer.size = 0;  // as it stays if there is no memory
    buffer.data = ::operator new(bytes, kLine);
    buffer.size = bytes;
  }
  return buffer.data;
}

}  // namespace diffkern::cpu
