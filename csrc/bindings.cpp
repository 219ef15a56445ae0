// torch's door to the kernels: schemas, checks, views, and the choice of backend.
//
// Tensor ops go through the dispatcher by LibTorch's stable ABI, so that one build serves every later torch, and
// without a CUDA header, so that it builds and loads beside a CPU torch. What is no tensor op goes through pybind11.
// An op reads: check, allocate, fill the params, run.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/kernels.h"
#include "cuda/attention_plan.h"
#include "cuda/plan.h"
#include "math/philox.h"
#include "math/row.h"
#ifdef DIFFKERN_CUDA
#include "cuda/kernels.h"
#define DIFFKERN_CUDA_LAUNCHER(name) cuda::name
#else
#define DIFFKERN_CUDA_LAUNCHER(name) nullptr
#endif

// For tests, the same file is built once more over a runtime that interprets CUDA kernels on the CPU: its ops have a
// library of their own and give CPU tensors to the CUDA launchers.
#ifdef DIFFKERN_EMULATED_CUDA
extern "C" {
void* ptx_runtime_device();
void ptx_memory_add(void* device, uint64_t address, uint64_t bytes, const char* name, int written, int readonly);
void ptx_memory_remove(void* device, uint64_t address);
}
#define DIFFKERN_LIBRARY diffkern_emulated
#else
#define DIFFKERN_LIBRARY diffkern
#endif

namespace diffkern {
namespace {

#ifdef DIFFKERN_EMULATED_CUDA
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// --- checks: `argument: expected this, got that` --------------------------------------------------------------------

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// A macro, so that the message's parts are made only where it is needed: else they would be most of a small call's time.
#define check(holds, ...)                                          \
  do {                                                             \
    if (!(holds)) throw std::runtime_error(text(__VA_ARGS__));     \
  } while (false)

std::string show(const Sizes& sizes) {
  std::string s = "(";
  for (size_t i = 0; i < sizes.size(); ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + (sizes.size() == 1 ? ",)" : ")");
}

const char* show(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Double: return "float64";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another dtype";
  }
}

bool on_cuda(const Tensor& tensor) { return kEmulated || tensor.is_cuda(); }

std::string show_device(const Tensor& tensor) {
  return tensor.is_cuda() ? text("cuda:", tensor.get_device_index()) : "cpu";
}

Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  check(tensor.scalar_type() == expected, name, ": expected ", show(expected), ", got ", show(tensor.scalar_type()));
}

void check_shape(const char* name, const Tensor& tensor, const Sizes& expected) {
  const auto sizes = tensor.sizes();
  check(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name, ": expected shape ", show(expected), ", got ", show(sizes_of(tensor)));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.is_cuda() == like.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
        ": expected device ", show_device(like), ", got ", show_device(tensor));
}

void check_contiguous(const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), name, ": expected a contiguous tensor, got strides ",
        show({tensor.strides().begin(), tensor.strides().end()}));
}

void check_like(const char* name, const Tensor& tensor, const Tensor& like, const Sizes& shape) {
  check_shape(name, tensor, shape);
  check_dtype(name, tensor, like.scalar_type());
  check_device(name, tensor, like);
}

void check_vector(const char* name, const Tensor& tensor, ScalarType dtype, int64_t length, const Tensor& like) {
  check_shape(name, tensor, {length});
  check_dtype(name, tensor, dtype);
  check_device(name, tensor, like);
  check_contiguous(name, tensor);
}

void check_samples(const char* name, const Tensor& tensor) {
  check(tensor.dim() >= 2, name, ": expected [N, ...] with at least 2 dimensions, got shape ", show(sizes_of(tensor)));
}

// Dense in memory as [N, H, W, C].
void check_channels_last(const char* name, const Tensor& tensor) {
  check(tensor.dim() == 4, name, ": expected [N, C, H, W], got shape ", show(sizes_of(tensor)));
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    check(tensor.size(d) == 1 || tensor.stride(d) == stride || tensor.numel() == 0, name,
          ": expected channels_last memory, got strides ", show({tensor.strides().begin(), tensor.strides().end()}));
    stride *= tensor.size(d);
  }
}

void check_image(const char* name, const Tensor& image, const Tensor& like, const Sizes& shape) {
  check_like(name, image, like, shape);
  check_channels_last(name, image);
}

void check_writable(const char* name, const Tensor& tensor) {
  for (int64_t d = 0; d < tensor.dim(); ++d)
    check(tensor.size(d) < 2 || tensor.stride(d) != 0, name, ": expected a tensor to write to, got an expanded one");
}

// --- programs -------------------------------------------------------------------------------------------------------

// What the CPU was told to do while this was being recorded, to be done again on the same memory, which it keeps.
struct Program {
  std::vector<std::function<void()>> launches;
  std::vector<Tensor> tensors;

  void run() const {
    for (const auto& launch : launches) launch();
  }
};
thread_local Program* recording = nullptr;

// --- memory: every pointer that a kernel gets comes from here --------------------------------------------------------

#ifdef DIFFKERN_EMULATED_CUDA
// The interpreter faults an access that lies in no memory it was lent, a read of what nobody wrote, and a write to an
// input. A launch lends it that of its op's tensors, until the next one: so what it counted of them can be read.
class Lent {
 public:
  void make(const Tensor& tensor) { unwritten_.push_back(tensor); }
  void add(const Tensor& tensor, bool readonly) { asked_.emplace_back(tensor, readonly); }
  void open() {
    for (const uint64_t address : open_) ptx_memory_remove(ptx_runtime_device(), address);
    open_.clear();
    for (const auto& [tensor, readonly] : asked_) {
      int64_t elements = tensor.numel() > 0;
      for (int64_t d = 0; d < tensor.dim() && elements > 0; ++d) elements += (tensor.size(d) - 1) * tensor.stride(d);
      if (elements == 0) continue;
      const auto same = [data = tensor.data_ptr()](const Tensor& other) { return other.data_ptr() == data; };
      const bool written = std::none_of(unwritten_.begin(), unwritten_.end(), same);
      open_.push_back(reinterpret_cast<uint64_t>(tensor.data_ptr()));
      const uint64_t bytes = elements * tensor.element_size();
      ptx_memory_add(ptx_runtime_device(), open_.back(), bytes, "a tensor", written, readonly);
    }
    kept_ = std::move(asked_);
    asked_.clear();
    unwritten_.clear();
  }

 private:
  std::vector<Tensor> unwritten_;
  std::vector<std::pair<Tensor, bool>> asked_, kept_;  // kept: no other tensor gets memory that is still lent
  std::vector<uint64_t> open_;
};
thread_local Lent lent;
uint64_t emulated_stream = 0;  // on which ops launch
#endif

template <class T>
T* memory(const Tensor& tensor) {
#ifdef DIFFKERN_EMULATED_CUDA
  lent.add(tensor, std::is_const_v<T>);
#endif
  if (recording) recording->tensors.push_back(tensor);
  if constexpr (std::is_const_v<T>)
    return static_cast<T*>(tensor.const_data_ptr());
  else
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// An index for each sample, or one for all.
struct Index {
  const int64_t* data;
  int64_t stride;
};

// Values must lie in [0, limit). Only the CPU's are looked at: a CUDA kernel writes NaN for those outside.
Index index_of(const char* name, const Tensor& tensor, int64_t samples, int64_t limit, const Tensor& like) {
  check_dtype(name, tensor, ScalarType::Long);
  check_device(name, tensor, like);
  const bool one = tensor.dim() == 0 || (tensor.dim() == 1 && tensor.size(0) == 1);
  check(one || (tensor.dim() == 1 && tensor.size(0) == samples), name, ": expected shape () or (", samples,
        ",), got ", show(sizes_of(tensor)));
  const Index index{memory<const int64_t>(tensor), one ? 0 : tensor.stride(0)};
  if (!on_cuda(tensor))
    for (int64_t n = 0; n < (one ? int64_t(1) : samples); ++n) {
      const int64_t value = index.data[n * index.stride];
      check(value >= 0 && value < limit, name, ": expected values in [0, ", limit, "), got ", value);
    }
  return index;
}

// --- views ----------------------------------------------------------------------------------------------------------

DType dtype_of(const char* name, ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: throw std::runtime_error(text(name, ": expected float32, bfloat16 or float16, got ", show(dtype)));
  }
}

View view_of(const char* name, const Tensor& tensor) {
  View view{memory<void>(tensor), dtype_of(name, tensor.scalar_type()), 0, tensor.stride(0), {}, {}};
  for (int64_t d = 1; d < tensor.dim(); ++d) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    const int32_t last = view.dims - 1;
    if (view.dims > 0 && view.strides[last] == size * stride) {
      view.sizes[last] *= size;
      view.strides[last] = stride;
    } else {
      check(view.dims < kMaxDims, name, ": expected at most ", kMaxDims, " separate dimensions a sample, got more");
      view.sizes[view.dims] = size;
      view.strides[view.dims++] = stride;
    }
  }
  if (view.dims == 0) {  // one element a sample
    view.sizes[0] = view.strides[0] = 1;
    view.dims = 1;
  }
  return view;
}

int64_t elements_of(const Tensor& tensor) {  // of one sample
  int64_t elements = 1;
  for (int64_t d = 1; d < tensor.dim(); ++d) elements *= tensor.size(d);
  return elements;
}

Tensor made(const Tensor& tensor) {
#ifdef DIFFKERN_EMULATED_CUDA
  lent.make(tensor);
#endif
  return tensor;
}

Tensor empty_of(const Sizes& sizes, ScalarType dtype, const Tensor& like) {
  return made(torch::stable::empty(sizes, dtype, std::nullopt, like.device()));
}

Tensor empty_as(const Tensor& like) { return made(torch::stable::empty_like(like)); }

Tensor absent(const Tensor& like) { return empty_of({0}, like.scalar_type(), like); }

// --- running --------------------------------------------------------------------------------------------------------

using CurrentStream = AOTITorchError (*)(int32_t device, void** stream);

// torch's current stream, from the CUDA half of torch if the process has loaded it.
void* current_stream(int32_t device) {
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<CurrentStream>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  check(get != nullptr, "a CUDA tensor came, but this torch has no libtorch_cuda.so");
  void* stream = nullptr;
  check(get(device, &stream) == AOTI_TORCH_SUCCESS, "torch gave no current CUDA stream");
  return stream;
}

template <class Params>
using CpuKernel = std::type_identity_t<void (*)(const Params&, int64_t begin, int64_t end)>;
template <class Params>
using CudaLauncher = std::type_identity_t<const char* (*)(const Params&, void* stream)>;

template <class Params>
void run_cpu(const Params& params, CpuKernel<Params> kernel, int64_t items, int64_t grain) {
  const auto launch = [=] {
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  };
  if (recording) recording->launches.push_back(launch);
  launch();
}

template <class Params>
void run_cuda(const Tensor& where, const Params& params, CudaLauncher<Params> launch) {
  check(!recording, "a CUDA tensor came while a program of CPU kernels was being recorded");
  check(launch != nullptr, "a CUDA tensor came, but diffkern was built without CUDA kernels: no nvcc was found");
  const char* error;
#ifdef DIFFKERN_EMULATED_CUDA
  lent.open();
  error = launch(params, reinterpret_cast<void*>(emulated_stream));
#else
  const torch::stable::accelerator::DeviceGuard guard(where.get_device_index());
  error = launch(params, current_stream(where.get_device_index()));
#endif
  check(error == nullptr, "CUDA: ", error ? error : "");
}

constexpr int64_t kChunkGrain = 16;  // chunks a thread must have to be worth waking: about 10 us

// Runs an op whose CPU work items are the chunks of its samples.
template <class Params>
void run_on_chunks(const Tensor& where, const Params& params, CpuKernel<Params> cpu, CudaLauncher<Params> cuda) {
  if (params.samples * params.elements == 0) return;
  if (on_cuda(where)) return run_cuda(where, params, cuda);
  run_cpu(params, cpu, params.samples * chunks(params.elements), kChunkGrain);
}

// --- noise ----------------------------------------------------------------------------------------------------------

Tensor noise(const Tensor& seeds, const Sizes& shape, const Tensor& step, int64_t stream, ScalarType dtype) {
  check(seeds.dim() == 1, "seeds: expected shape (N,), got ", show(sizes_of(seeds)));
  check_vector("seeds", seeds, ScalarType::Long, seeds.size(0), seeds);
  check(stream >= 0 && stream < int64_t(1) << 32, "stream: expected a value in [0, 2^32), got ", stream);
  for (int64_t size : shape) check(size >= 0, "shape: expected no negative size, got ", show(shape));
  const int64_t samples = seeds.size(0);
  const Index t = index_of("step", step, samples, int64_t(1) << 32, seeds);

  Sizes sizes = {samples};
  sizes.insert(sizes.end(), shape.begin(), shape.end());
  dtype_of("dtype", dtype);
  Tensor z = empty_of(sizes, dtype, seeds);
  const NoiseParams params{view_of("z", z), samples,  elements_of(z), memory<const int64_t>(seeds),
                           t.data,          t.stride, uint32_t(stream)};
  run_on_chunks(z, params, cpu::level().kernels.noise, DIFFKERN_CUDA_LAUNCHER(noise));
  return z;
}

// --- q_sample -------------------------------------------------------------------------------------------------------

void run_q_sample(const Tensor& x_0, const Tensor& t, const Tensor& seeds, const Tensor& table, const Tensor& x_t,
                  const Tensor* eps) {
  check_samples("x_0", x_0);
  check(table.dim() == 2 && table.size(1) == 2, "table: expected shape (T, 2), got ", show(sizes_of(table)));
  check_dtype("table", table, ScalarType::Float);
  check_device("table", table, x_0);
  check_contiguous("table", table);
  check_vector("seeds", seeds, ScalarType::Long, x_0.size(0), x_0);
  const Index index = index_of("t", t, x_0.size(0), table.size(0), x_0);

  const QSampleParams params{view_of("x_0", x_0),
                             view_of("x_t", x_t),
                             eps ? view_of("eps", *eps) : View{},
                             x_0.size(0),
                             elements_of(x_0),
                             memory<const int64_t>(seeds),
                             index.data,
                             index.stride,
                             memory<const float>(table),
                             table.size(0)};
  run_on_chunks(x_0, params, cpu::level().kernels.q_sample, DIFFKERN_CUDA_LAUNCHER(q_sample));
}

std::tuple<Tensor, Tensor> q_sample(const Tensor& x_0, const Tensor& t, const Tensor& seeds, const Tensor& table,
                                    bool return_eps) {
  Tensor x_t = empty_as(x_0);
  Tensor eps = return_eps ? empty_as(x_0) : absent(x_0);
  run_q_sample(x_0, t, seeds, table, x_t, return_eps ? &eps : nullptr);
  return {x_t, eps};
}

void q_sample_(const Tensor& x_0, const Tensor& t, const Tensor& seeds, const Tensor& table) {
  check_writable("x_0", x_0);
  run_q_sample(x_0, t, seeds, table, x_0, nullptr);
}

// --- reverse_step ---------------------------------------------------------------------------------------------------

void run_reverse_step(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step, const Tensor& seeds,
                      const std::optional<Tensor>& out_uncond, double guidance, bool clip, bool learned_variance,
                      const std::vector<Tensor>& history, const Tensor& x_next, const Tensor* x0_hat) {
  check_samples("x", x);
  dtype_of("x", x.scalar_type());
  Sizes out_shape = sizes_of(x);
  if (learned_variance) out_shape[1] *= 2;
  check_like("out", out, x, out_shape);
  if (out_uncond) check_like("out_uncond", *out_uncond, x, out_shape);
  for (const Tensor& h : history) check_like("history", h, x, sizes_of(x));
  check(history.size() <= size_t(kMaxHistory), "history: expected at most ", kMaxHistory, " tensors, got ",
        history.size());
  const int64_t columns = kRowColumns + int64_t(history.size());
  check(table.dim() == 2 && table.size(1) == columns, "table: expected shape (steps, ", columns, "), got ",
        show(sizes_of(table)));
  check_dtype("table", table, ScalarType::Float);
  check_device("table", table, x);
  check_contiguous("table", table);
  check_vector("seeds", seeds, ScalarType::Long, x.size(0), x);
  const Index index = index_of("step", step, x.size(0), table.size(0), x);

  ReverseStepParams params{};
  params.x = view_of("x", x);
  params.out = view_of("out", out);
  params.x_next = view_of("x_next", x_next);
  if (out_uncond) params.out_uncond = view_of("out_uncond", *out_uncond);
  if (x0_hat) params.x0_hat = view_of("x0_hat", *x0_hat);
  for (const Tensor& h : history) params.history[params.history_count++] = view_of("history", h);
  params.samples = x.size(0);
  params.elements = elements_of(x);
  params.seeds = memory<const int64_t>(seeds);
  params.table = memory<const float>(table);
  params.rows = table.size(0);
  params.columns = columns;
  params.step = index.data;
  params.step_stride = index.stride;
  params.guidance = float(guidance);
  params.clip = clip;
  params.learned_variance = learned_variance;
  run_on_chunks(x, params, cpu::level().kernels.reverse_step, DIFFKERN_CUDA_LAUNCHER(reverse_step));
}

std::tuple<Tensor, Tensor> reverse_step(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step,
                                        const Tensor& seeds, const std::optional<Tensor>& out_uncond, double guidance,
                                        bool clip, bool learned_variance, const std::vector<Tensor>& history,
                                        bool return_x0) {
  Tensor x_next = empty_as(x);
  Tensor x0_hat = return_x0 ? empty_as(x) : absent(x);
  run_reverse_step(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x_next,
                   return_x0 ? &x0_hat : nullptr);
  return {x_next, x0_hat};
}

void reverse_step_(const Tensor& x, const Tensor& out, const Tensor& table, const Tensor& step, const Tensor& seeds,
                   const std::optional<Tensor>& out_uncond, double guidance, bool clip, bool learned_variance,
                   const std::vector<Tensor>& history, const std::optional<Tensor>& x0_hat) {
  check_writable("x", x);
  if (x0_hat) {
    check_like("x0_hat", *x0_hat, x, sizes_of(x));
    check_writable("x0_hat", *x0_hat);
  }
  run_reverse_step(x, out, table, step, seeds, out_uncond, guidance, clip, learned_variance, history, x,
                   x0_hat ? &*x0_hat : nullptr);
}

// --- noise_loss -----------------------------------------------------------------------------------------------------

NoiseLossParams noise_loss_params(const Tensor& out, const Tensor& seeds, const Tensor& t,
                                  const std::optional<Tensor>& weights) {
  check_samples("out", out);
  check(elements_of(out) > 0, "out: expected at least one element a sample, got shape ", show(sizes_of(out)));
  check_vector("seeds", seeds, ScalarType::Long, out.size(0), out);
  if (weights) check_vector("weights", *weights, ScalarType::Float, out.size(0), out);
  const Index index = index_of("t", t, out.size(0), int64_t(1) << 32, out);
  NoiseLossParams params{};
  params.out = view_of("out", out);
  params.samples = out.size(0);
  params.elements = elements_of(out);
  params.seeds = memory<const int64_t>(seeds);
  params.t = index.data;
  params.t_stride = index.stride;
  params.weights = weights ? memory<const float>(*weights) : nullptr;
  return params;
}

Tensor noise_loss(const Tensor& out, const Tensor& seeds, const Tensor& t, const std::optional<Tensor>& weights) {
  NoiseLossParams params = noise_loss_params(out, seeds, t, weights);
  Tensor loss = empty_of({params.samples}, ScalarType::Float, out);
  Tensor partial = empty_of({params.samples, chunks(params.elements)}, ScalarType::Double, out);
  params.partial = memory<double>(partial);
  params.loss = memory<float>(loss);
  run_on_chunks(out, params, cpu::level().kernels.noise_loss_partial, DIFFKERN_CUDA_LAUNCHER(noise_loss));
  if (!on_cuda(out)) cpu::level().kernels.noise_loss_total(params, 0, params.samples);
  return loss;
}

Tensor noise_loss_backward(const Tensor& grad_loss, const Tensor& out, const Tensor& seeds, const Tensor& t,
                           const std::optional<Tensor>& weights) {
  NoiseLossParams params = noise_loss_params(out, seeds, t, weights);
  check_vector("grad_loss", grad_loss, ScalarType::Float, out.size(0), out);
  Tensor grad_out = empty_as(out);
  params.grad_loss = memory<const float>(grad_loss);
  params.grad_out = view_of("grad_out", grad_out);
  run_on_chunks(out, params, cpu::level().kernels.noise_loss_backward, DIFFKERN_CUDA_LAUNCHER(noise_loss_backward));
  return grad_out;
}

// --- group_norm_silu ------------------------------------------------------------------------------------------------

using torch::headeronly::MemoryFormat;

// The dense layout that an image is taken in, and its results have: its own, or contiguous.
MemoryFormat layout_of(const Tensor& x) {
  if (x.dim() != 4 || x.is_contiguous()) return MemoryFormat::Contiguous;
  int64_t stride = 1;
  for (int64_t d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != stride) return MemoryFormat::Contiguous;
    stride *= x.size(d);
  }
  return MemoryFormat::ChannelsLast;
}

Tensor as_layout(const Tensor& x, MemoryFormat layout) {
  return x.is_contiguous() && layout == MemoryFormat::Contiguous ? x : torch::stable::contiguous(x, layout);
}

const float* check_coefficients(const char* name, const std::optional<Tensor>& tensor, const Sizes& shape,
                                const Tensor& like) {
  if (!tensor) return nullptr;
  check_shape(name, *tensor, shape);
  check_dtype(name, *tensor, ScalarType::Float);
  check_device(name, *tensor, like);
  check(tensor->is_contiguous(), name, ": expected a contiguous tensor");
  return memory<const float>(*tensor);
}

// x is as_layout already.
GroupNormSiluParams group_norm_silu_params(const Tensor& x, MemoryFormat layout, const Tensor& weight,
                                           const Tensor& bias, int64_t groups, const std::optional<Tensor>& scale_shift,
                                           const std::optional<Tensor>& add, bool silu) {
  check_samples("x", x);
  const int64_t samples = x.size(0), channels = x.size(1);
  check(channels > 0, "x: expected at least one channel, got shape ", show(sizes_of(x)));
  check(groups > 0 && channels % groups == 0, "groups: expected a divisor of the ", channels, " channels, got ",
        groups);
  GroupNormSiluParams params{};
  params.x = memory<const void>(x);
  params.dtype = dtype_of("x", x.scalar_type());
  params.channels_last = layout == MemoryFormat::ChannelsLast;
  params.silu = silu;
  params.samples = samples;
  params.channels = channels;
  params.groups = groups;
  params.pixels = elements_of(x) / channels;
  check(!on_cuda(x) || channels / groups <= cuda::GroupNormPlan::kMaxWidth, "groups: expected at most ",
        cuda::GroupNormPlan::kMaxWidth, " channels each on CUDA, got ", channels / groups);
  params.weight = check_coefficients("weight", weight, {channels}, x);
  params.bias = check_coefficients("bias", bias, {channels}, x);
  params.scale_shift = check_coefficients("scale_shift", scale_shift, {samples, 2 * channels}, x);
  params.add = check_coefficients("add", add, {samples, channels}, x);
  return params;
}

constexpr int64_t kGroupNormGrain = 16384;  // elements a thread must have to be worth waking

void run_group_norm_silu(const Tensor& where, const GroupNormSiluParams& params, CpuKernel<GroupNormSiluParams> cpu,
                         CudaLauncher<GroupNormSiluParams> cuda) {
  if (on_cuda(where)) return run_cuda(where, params, cuda);
  const int64_t elements = params.channels * params.pixels / params.blocks();  // of a work item
  run_cpu(params, cpu, params.samples * params.blocks(), std::max(int64_t(1), kGroupNormGrain / elements));
}

// Room for the sums of the chunks that CUDA joins, so many of them for a chunk; none where one launch does it all.
std::optional<Tensor> empty_partial(const Tensor& x, const GroupNormSiluParams& params, int64_t sums,
                                    ScalarType dtype) {
  if (!on_cuda(x) || x.numel() == 0) return std::nullopt;
  const int64_t chunks = cuda::plan_group_norm(params).chunks;
  return chunks > 1 ? std::optional(empty_of({chunks * sums}, dtype, x)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu(const Tensor& x, const Tensor& weight, const Tensor& bias,
                                                   int64_t groups, double eps, const std::optional<Tensor>& scale_shift,
                                                   const std::optional<Tensor>& add,
                                                   const std::optional<Tensor>& residual, bool silu) {
  const MemoryFormat layout = layout_of(x);
  const Tensor dense = as_layout(x, layout);
  GroupNormSiluParams params = group_norm_silu_params(dense, layout, weight, bias, groups, scale_shift, add, silu);
  if (residual) check_like("residual", *residual, x, sizes_of(x));
  const Tensor added = residual ? as_layout(*residual, layout) : dense;
  Tensor y = empty_as(dense);
  Tensor mean = empty_of({params.samples, groups}, ScalarType::Float, x);
  Tensor rstd = empty_of({params.samples, groups}, ScalarType::Float, x);
  params.eps = float(eps);
  params.residual = residual ? memory<const void>(added) : nullptr;
  params.y = memory<void>(y);
  params.mean = memory<float>(mean);
  params.rstd = memory<float>(rstd);
  const auto partial = empty_partial(x, params, 2 * params.samples * groups, ScalarType::Double);
  if (partial) params.partial_moments = memory<double>(*partial);
  if (x.numel() > 0)
    run_group_norm_silu(x, params, cpu::level().kernels.group_norm_silu, DIFFKERN_CUDA_LAUNCHER(group_norm_silu));
  else
    for (Tensor statistic : {mean, rstd}) torch::stable::zero_(statistic);
  return {y, mean, rstd};
}

// y and x and skip, whose channels follow those of x, are of one dtype and channels_last, on the CPU.
void group_norm_silu_out(const Tensor& y, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& weight,
                         const Tensor& bias, int64_t groups, double eps, const std::optional<Tensor>& scale_shift,
                         bool silu) {
  check_channels_last("y", y);
  const int64_t channels = y.size(1), skip_channels = skip && skip->dim() == 4 ? skip->size(1) : 0;
  check_image("x", x, y, {y.size(0), channels - skip_channels, y.size(2), y.size(3)});
  if (skip) check_image("skip", *skip, y, {y.size(0), skip_channels, y.size(2), y.size(3)});
  GroupNormSiluParams params =
      group_norm_silu_params(y, MemoryFormat::ChannelsLast, weight, bias, groups, scale_shift, std::nullopt, silu);
  params.eps = float(eps);
  params.x = memory<const void>(x);
  params.skip = skip ? memory<const void>(*skip) : nullptr;
  params.skip_channels = skip_channels;
  params.y = memory<void>(y);
  if (y.numel() > 0) run_group_norm_silu(y, params, cpu::level().kernels.group_norm_silu, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_backward(const Tensor& grad_y, const Tensor& x, const Tensor& mean,
                                                            const Tensor& rstd, const Tensor& weight,
                                                            const Tensor& bias, int64_t groups,
                                                            const std::optional<Tensor>& scale_shift,
                                                            const std::optional<Tensor>& add, bool silu) {
  const MemoryFormat layout = layout_of(x);
  const Tensor dense = as_layout(x, layout);
  GroupNormSiluParams params = group_norm_silu_params(dense, layout, weight, bias, groups, scale_shift, add, silu);
  check_like("grad_y", grad_y, x, sizes_of(x));
  const Tensor dense_grad_y = as_layout(grad_y, layout);
  Tensor grad_x = empty_as(dense);
  Tensor grad_offset = empty_of({params.samples, params.channels}, ScalarType::Float, x);
  Tensor grad_slope = empty_of({params.samples, params.channels}, ScalarType::Float, x);
  params.mean = const_cast<float*>(check_coefficients("mean", mean, {params.samples, groups}, x));
  params.rstd = const_cast<float*>(check_coefficients("rstd", rstd, {params.samples, groups}, x));
  params.grad_y = memory<const void>(dense_grad_y);
  params.grad_x = memory<void>(grad_x);
  params.grad_offset = memory<float>(grad_offset);
  params.grad_slope = memory<float>(grad_slope);
  const auto partial = empty_partial(x, params, 2 * params.samples * params.channels, ScalarType::Float);
  if (partial) params.partial_sums = memory<float>(*partial);
  if (x.numel() > 0)
    run_group_norm_silu(x, params, cpu::level().kernels.group_norm_silu_backward,
                        DIFFKERN_CUDA_LAUNCHER(group_norm_silu_backward));
  else
    for (Tensor sum : {grad_offset, grad_slope}) torch::stable::zero_(sum);
  return {grad_x, grad_offset, grad_slope};
}

// --- attention ------------------------------------------------------------------------------------------------------

Tensor as_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);  // which would cost a microsecond to do nothing
}

// What the kernels read and write: float32 on the CPU.
ScalarType heads_dtype(const Tensor& x) { return on_cuda(x) ? x.scalar_type() : ScalarType::Float; }

// Of that dtype, with the channels of a token together: what the kernels read.
Tensor as_heads(const Tensor& x) {
  const Tensor heads = as_dtype(x, heads_dtype(x));
  return heads.stride(3) == 1 ? heads : torch::stable::contiguous(heads);
}

HeadsView heads_view(const Tensor& x) {
  return {memory<void>(x), x.stride(0), x.stride(1), x.stride(2)};
}

// Laid out as [N, tokens, heads, d], as the projections around attention have it.
Tensor empty_heads(const Tensor& like) {
  return torch::stable::transpose(
      empty_of({like.size(0), like.size(2), like.size(1), like.size(3)}, heads_dtype(like), like), 1, 2);
}

// q, k and v are as_heads already.
AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  AttentionParams params{};
  params.q = heads_view(q);
  params.k = heads_view(k);
  params.v = heads_view(v);
  params.dtype = dtype_of("q", q.scalar_type());
  params.samples = q.size(0);
  params.heads = q.size(1);
  params.queries = q.size(2);
  params.keys = k.size(2);
  params.channels = q.size(3);
  params.scale = float(scale.value_or(1 / std::sqrt(double(q.size(3)))));
  return params;
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.dim() == 4, "q: expected [N, heads, tokens, d], got shape ", show(sizes_of(q)));
  check(k.dim() == 4, "k: expected [N, heads, tokens, d], got shape ", show(sizes_of(k)));
  dtype_of("q", q.scalar_type());
  check_like("k", k, q, {q.size(0), q.size(1), k.size(2), q.size(3)});
  check_like("v", v, q, sizes_of(k));
  check(q.size(2) > 0 && q.size(3) > 0, "q: expected at least one token and one channel, got shape ",
        show(sizes_of(q)));
  check(k.size(2) > 0, "k: expected at least one token, got shape ", show(sizes_of(k)));
}

// Work items a thread must have to be worth waking, of so many products each: about 10 us.
int64_t grain(int64_t products) { return std::max(int64_t(1), 500'000 / products); }

// out, which is as_heads, and lse
Tensor run_attention(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  const Tensor q_heads = as_heads(q), k_heads = as_heads(k), v_heads = as_heads(v);
  Tensor lse = empty_of({q.size(0), q.size(1), q.size(2)}, ScalarType::Float, q);
  AttentionParams params = attention_params(q_heads, k_heads, v_heads, scale);
  params.out = heads_view(out);
  params.lse = memory<float>(lse);
  if (!on_cuda(q))
    run_cpu(params, cpu::level().kernels.attention, params.samples * params.heads * attention_blocks(params.queries),
            grain(2 * kAttentionBlock * params.keys * params.channels));
  else if (q.numel() > 0)
    run_cuda(q, params, DIFFKERN_CUDA_LAUNCHER(attention));
  return lse;
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  check_attention(q, k, v);
  Tensor out = empty_heads(q);
  Tensor lse = run_attention(out, q, k, v, scale);
  return {as_dtype(out, q.scalar_type()), lse};
}

void attention_out(const Tensor& out, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale) {
  check_attention(q, k, v);
  check_like("out", out, q, sizes_of(q));
  check_dtype("q", q, heads_dtype(q));
  for (const auto& [name, tensor] : {std::pair("out", out), {"q", q}, {"k", k}, {"v", v}})  // used where they lie
    check(tensor.stride(3) == 1, name, ": expected the channels of a token together, got a stride of ",
          tensor.stride(3));
  check_writable("out", out);
  run_attention(out, q, k, v, scale);
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      std::optional<double> scale) {
  check_attention(q, k, v);
  check_like("grad_out", grad_out, q, sizes_of(q));
  check_like("out", out, q, sizes_of(q));
  check_shape("lse", lse, {q.size(0), q.size(1), q.size(2)});
  check_dtype("lse", lse, ScalarType::Float);
  check_contiguous("lse", lse);
  const Tensor q_heads = as_heads(q), k_heads = as_heads(k), v_heads = as_heads(v);
  const Tensor out_heads = as_heads(out), grad_out_heads = as_heads(grad_out);
  Tensor grad_q = empty_heads(q), grad_k = empty_heads(k), grad_v = empty_heads(k);
  AttentionParams params = attention_params(q_heads, k_heads, v_heads, scale);
  params.out = heads_view(out_heads);
  params.lse = memory<float>(lse);
  params.grad_out = heads_view(grad_out_heads);
  params.grad_q = heads_view(grad_q);
  params.grad_k = heads_view(grad_k);
  params.grad_v = heads_view(grad_v);
  if (on_cuda(q)) {
    Tensor delta = empty_of(sizes_of(lse), ScalarType::Float, q);
    params.delta = memory<float>(delta);
    if (q.numel() > 0) run_cuda(q, params, DIFFKERN_CUDA_LAUNCHER(attention_backward));
    return {grad_q, grad_k, grad_v};
  }
  const int64_t spans = attention_spans(params.keys), elements = params.queries * params.channels;
  Tensor parts = empty_of({(spans - 1) * q.numel()}, ScalarType::Float, q);
  params.grad_q_parts = memory<float>(parts);
  const auto& kernels = cpu::level().kernels;
  run_cpu(params, kernels.attention_backward, params.samples * params.heads * spans,
          grain(5 * elements * std::min(params.keys, attention_span(params.keys))));
  if (spans > 1) run_cpu(params, kernels.attention_sum_grad_q, chunks(q.numel()), kChunkGrain);
  const ScalarType dtype = q.scalar_type();
  return {as_dtype(grad_q, dtype), as_dtype(grad_k, dtype), as_dtype(grad_v, dtype)};
}

// --- conv2d ---------------------------------------------------------------------------------------------------------

// float32; with a weight of bfloat16 that too.
void check_conv_dtype(const char* name, const Tensor& tensor, const Tensor& packed) {
  const ScalarType dtype = tensor.scalar_type();
  const bool bf16 = packed.scalar_type() == ScalarType::BFloat16;
  check(dtype == ScalarType::Float || (bf16 && dtype == ScalarType::BFloat16), name, ": expected float32",
        bf16 ? " or bfloat16" : "", ", got ", show(dtype));
}

ConvParams conv2d_params(const Tensor& y, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& packed,
                         const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                         const std::optional<Tensor>& residual, int64_t stride, int64_t padding, bool upsample) {
  check_channels_last("x", x);
  check_conv_dtype("x", x, packed);
  check(x.size(1) > 0, "x: expected at least one channel, got shape ", show(sizes_of(x)));
  const int64_t samples = x.size(0), height = x.size(2), width = x.size(3);
  if (skip) check_image("skip", *skip, x, {samples, skip->dim() == 4 ? skip->size(1) : 0, height, width});
  ConvParams params{};
  params.channels[0] = x.size(1);
  params.channels[1] = skip ? skip->size(1) : 0;

  const bool bf16 = packed.scalar_type() == ScalarType::BFloat16;
  check(packed.dim() == (bf16 ? 6 : 4), "packed: expected ",
        bf16 ? "[column blocks, blocks of C, matrices, 16, 32, 2]" : "[matrices, column blocks, C, column block]",
        ", got shape ", show(sizes_of(packed)));
  params.matrices = packed.size(bf16 ? 2 : 0);
  check(params.matrices == 1 || params.matrices == 9 || params.matrices == 16 || params.matrices == 36,
        "packed: expected 1, 9, 16 or 36 matrices, got ", params.matrices);
  const int64_t side = params.matrices == 1 ? 1 : 3;
  check(stride > 0, "stride: expected a value > 0, got ", stride);
  check(!params.winograd() || (stride == 1 && padding == 1), "stride, padding: expected 1 and 1 with ",
        params.matrices, " matrices, got ", stride, " and ", padding);
  check(padding >= 0 && padding < side, "padding: expected a value in [0, ", side, "), got ", padding);
  const auto out_size = [&](int64_t size) { return (size * (upsample ? 2 : 1) + stride - 1) / stride; };
  params.out_height = out_size(height);
  params.out_width = out_size(width);
  params.out_channels = y.dim() == 4 ? y.size(1) : 0;
  const Sizes out_shape = {samples, params.out_channels, params.out_height, params.out_width};
  check_device("y", y, x);
  check_conv_dtype("y", y, packed);
  check_image("y", y, y, out_shape);
  const int64_t column_block = params.winograd() ? kWinogradColumns : params.few_columns() ? 1 : kDirectColumns;
  check_device("packed", packed, x);
  if (bf16)
    check_shape("packed", packed,
                {params.panels(), params.depth_blocks(), params.matrices, kDepthBlock / 2, kPanel, 2});
  else
    check_like("packed", packed, x, {params.matrices, (params.out_channels + column_block - 1) / column_block,
                                     params.depth(), column_block});
  check_contiguous("packed", packed);
  if (bias) check_vector("bias", *bias, ScalarType::Float, params.out_channels, x);
  if (add) {
    check_shape("add", *add, {samples, params.out_channels});
    check_dtype("add", *add, ScalarType::Float);
    check_device("add", *add, x);
    check(add->stride(1) == 1 || add->size(1) < 2 || samples == 0,
          "add: expected the channels of a sample together, got strides ",
          show({add->strides().begin(), add->strides().end()}));
    params.add_stride = add->stride(0);
  }
  if (residual) check_image("residual", *residual, y, out_shape);

  params.x[0] = memory<const void>(x);
  params.x[1] = skip ? memory<const void>(*skip) : nullptr;
  params.x_dtype = dtype_of("x", x.scalar_type());
  params.weight = memory<const void>(packed);
  params.bias = bias ? memory<const float>(*bias) : nullptr;
  params.add = add ? memory<const float>(*add) : nullptr;
  params.residual = residual ? memory<const void>(*residual) : nullptr;
  params.y = memory<void>(y);
  params.y_dtype = dtype_of("y", y.scalar_type());
  params.samples = samples;
  params.height = height;
  params.width = width;
  params.stride = stride;
  params.padding = padding;
  params.upsample = upsample;
  return params;
}

void conv2d_out(const Tensor& y, const Tensor& x, const std::optional<Tensor>& skip, const Tensor& packed,
                const std::optional<Tensor>& bias, const std::optional<Tensor>& add,
                const std::optional<Tensor>& residual, int64_t stride, int64_t padding, bool upsample) {
  const ConvParams params = conv2d_params(y, x, skip, packed, bias, add, residual, stride, padding, upsample);
  if (y.numel() == 0) return;
  if (packed.scalar_type() == ScalarType::BFloat16) {
    const ConvBlocks blocks(params);
    return run_cpu(params, cpu::level().kernels.conv_bf16, blocks.items(),
                   grain(params.matrices * params.depth() * kBlockTiles * kTilePixels * blocks.panels * kPanel));
  }
  if (params.winograd())
    return run_cpu(params, cpu::level().kernels.conv_winograd, params.winograd_items(),
                   grain(params.matrices * params.depth() * params.winograd_tiles() * kWinogradColumns));
  run_cpu(params, cpu::level().kernels.conv_direct, params.direct_items(),
          grain(params.matrices * params.depth() * params.direct_pixels() * kDirectColumns));
}

}  // namespace

// --- registration ---------------------------------------------------------------------------------------------------

STABLE_TORCH_LIBRARY(DIFFKERN_LIBRARY, library) {
  library.def("noise(Tensor seeds, SymInt[] shape, Tensor step, int stream, ScalarType dtype) -> Tensor");
  library.def("q_sample(Tensor x_0, Tensor t, Tensor seeds, Tensor table, bool return_eps) -> (Tensor, Tensor)");
  library.def("q_sample_(Tensor(a!) x_0, Tensor t, Tensor seeds, Tensor table) -> ()");
  library.def(
      "reverse_step(Tensor x, Tensor out, Tensor table, Tensor step, Tensor seeds, Tensor? out_uncond, "
      "float guidance, bool clip, bool learned_variance, Tensor[] history, bool return_x0) -> (Tensor, Tensor)");
  library.def(
      "reverse_step_(Tensor(a!) x, Tensor out, Tensor table, Tensor step, Tensor seeds, Tensor? out_uncond, "
      "float guidance, bool clip, bool learned_variance, Tensor[] history, Tensor(b!)? x0_hat) -> ()");
  library.def("noise_loss(Tensor out, Tensor seeds, Tensor t, Tensor? weights) -> Tensor");
  library.def(
      "group_norm_silu(Tensor x, Tensor weight, Tensor bias, int groups, float eps, Tensor? scale_shift, Tensor? add, "
      "Tensor? residual, bool silu) -> (Tensor, Tensor, Tensor)");
  library.def(
      "group_norm_silu_out(Tensor(a!) y, Tensor x, Tensor? skip, Tensor weight, Tensor bias, int groups, float eps, "
      "Tensor? scale_shift, bool silu) -> ()");
  library.def(
      "group_norm_silu_backward(Tensor grad_y, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
      "int groups, Tensor? scale_shift, Tensor? add, bool silu) -> (Tensor, Tensor, Tensor)");
  library.def("attention(Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor)");
  library.def("attention_out(Tensor(a!) out, Tensor q, Tensor k, Tensor v, float? scale) -> ()");
  library.def(
      "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "conv2d_out(Tensor(a!) y, Tensor x, Tensor? skip, Tensor packed, Tensor? bias, Tensor? add, Tensor? residual, "
      "int stride, int padding, bool upsample) -> ()");
  library.def("noise_loss_backward(Tensor grad_loss, Tensor out, Tensor seeds, Tensor t, Tensor? weights) -> Tensor");
}

// An op looks at its tensors' device itself; other devices find no kernel and raise.
#define DIFFKERN_IMPLEMENT(library)                                  \
  library.impl("noise", TORCH_BOX(&noise));                         \
  library.impl("q_sample", TORCH_BOX(&q_sample));                   \
  library.impl("q_sample_", TORCH_BOX(&q_sample_));                 \
  library.impl("reverse_step", TORCH_BOX(&reverse_step));           \
  library.impl("reverse_step_", TORCH_BOX(&reverse_step_));         \
  library.impl("noise_loss", TORCH_BOX(&noise_loss));               \
  library.impl("noise_loss_backward", TORCH_BOX(&noise_loss_backward)); \
  library.impl("group_norm_silu", TORCH_BOX(&group_norm_silu));         \
  library.impl("group_norm_silu_backward", TORCH_BOX(&group_norm_silu_backward)); \
  library.impl("attention", TORCH_BOX(&attention));                     \
  library.impl("attention_out", TORCH_BOX(&attention_out));             \
  library.impl("attention_backward", TORCH_BOX(&attention_backward));

STABLE_TORCH_LIBRARY_IMPL(DIFFKERN_LIBRARY, CPU, library) {
  DIFFKERN_IMPLEMENT(library)
  library.impl("conv2d_out", TORCH_BOX(&conv2d_out));
  library.impl("group_norm_silu_out", TORCH_BOX(&group_norm_silu_out));
}
STABLE_TORCH_LIBRARY_IMPL(DIFFKERN_LIBRARY, CUDA, library) { DIFFKERN_IMPLEMENT(library) }

// --- what is no tensor op -------------------------------------------------------------------------------------------

uint64_t word_hash(const std::string& function, int64_t first_run, int64_t last_run) {
  check(function == "radius" || function == "angle", "function: expected 'radius' or 'angle', got '", function, "'");
  check(0 <= first_run && first_run <= last_run && last_run <= (int64_t(1) << 32) / kCodesPerHash,
        "runs: expected 0 <= first <= last <= 4096, got ", first_run, " and ", last_run);
  std::vector<uint64_t> hash(last_run);
  const WordHashParams params{function == "angle", hash.data()};
  torch::stable::parallel_for(first_run, last_run, 1, [&](int64_t begin, int64_t end) {
    cpu::level().kernels.word_hash(params, begin, end);
  });
  uint64_t sum = 0;
  for (int64_t run = first_run; run < last_run; ++run) sum += hash[run];
  return sum;
}

// The words of one counter, by the very function that the kernels instantiate.
std::array<uint32_t, 4> philox_words(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const auto words = philox(Words<uint64_t>{counter[0], counter[1], counter[2], counter[3]},
                            round_keys(uint64_t(key[1]) << 32 | key[0]));
  return {uint32_t(words.w0), uint32_t(words.w1), uint32_t(words.w2), uint32_t(words.w3)};
}

// --- launch plans: what the CUDA launchers take, for tests and for counting -------------------------------------------

struct Launch {
  const char* kernel;
  int64_t grid_x, grid_y;
  int32_t threads, shared_bytes;  // shared_bytes: beside what the kernel declares
};

Launch plan_elementwise(int64_t samples, int64_t elements, int64_t element_size) {
  check(samples > 0 && elements > 0, "samples, elements: expected values > 0, got ", samples, " and ", elements);
  check(element_size == 2 || element_size == 4, "element_size: expected 2 or 4, got ", element_size);
  const int64_t vector = 16 / element_size;
  const cuda::Plan plan = cuda::plan_elementwise(samples, (elements + vector - 1) / vector);
  return {"elementwise", plan.grid_x, plan.grid_y, int32_t(plan.threads), 0};
}

Launch plan_noise_loss(int64_t samples, int64_t elements) {
  check(samples > 0 && elements > 0, "samples, elements: expected values > 0, got ", samples, " and ", elements);
  const cuda::Plan plan = cuda::plan_noise_loss(samples, elements);
  return {"partial", plan.grid_x, plan.grid_y, int32_t(plan.threads), 0};
}

// Also how the work is cut: (launches, {groups of a set, channels of a set, pixels of a chunk, elements of an access}).
std::pair<std::vector<Launch>, std::array<int32_t, 4>> plan_group_norm_silu(int64_t samples, int64_t channels,
                                                                            int64_t groups, int64_t pixels,
                                                                            int64_t element_size, bool channels_last) {
  check(samples > 0 && pixels > 0, "samples, pixels: expected values > 0, got ", samples, " and ", pixels);
  check(groups > 0 && channels > 0 && channels % groups == 0, "groups: expected a divisor of the ", channels,
        " channels, got ", groups);
  check(element_size == 2 || element_size == 4, "element_size: expected 2 or 4, got ", element_size);
  GroupNormSiluParams params{};
  params.dtype = element_size == 4 ? DType::f32 : DType::bf16;
  params.channels_last = channels_last;
  params.samples = samples;
  params.channels = channels;
  params.groups = groups;
  params.pixels = pixels;
  const cuda::GroupNormPlan plan = cuda::plan_group_norm(params);
  const char* const kernels[] = {"whole", "sums", "rest"};
  std::vector<Launch> launches;
  for (int i = 0; i < plan.launches(); ++i)
    launches.push_back({kernels[i + plan.launches() - 1], plan.grid_x(), plan.grid_y(samples),
                        cuda::GroupNormPlan::kThreads, plan.shared_bytes});
  return {launches, {plan.set_groups, plan.set_channels, plan.chunk_pixels, plan.vector}};
}

// Each launch and the rows of its blocks, for aligned rows on a card of that compute capability (80: sm_80).
std::vector<std::pair<Launch, int32_t>> plan_attention(int64_t heads, int64_t queries, int64_t keys, int64_t channels,
                                                       const std::string& dtype, int64_t architecture, bool backward) {
  check(heads > 0 && queries > 0 && keys > 0 && channels > 0,
        "heads, queries, keys, channels: expected values > 0, got ", show({heads, queries, keys, channels}));
  check(dtype == "float32" || dtype == "bfloat16" || dtype == "float16",
        "dtype: expected 'float32', 'bfloat16' or 'float16', got '", dtype, "'");
  const DType type = dtype == "float32" ? DType::f32 : dtype == "bfloat16" ? DType::bf16 : DType::f16;
  const bool pieces = cuda::whole_pieces(type, channels);
  const cuda::TensorCores cores = cuda::tensor_cores_for(type, pieces, int(architecture / 10));
  const bool any = cores == cuda::TensorCores::none;
  std::vector<std::pair<Launch, int32_t>> launches;
  const auto add = [&](const char* kernel, const cuda::AttentionPlan& plan) {
    launches.push_back({{kernel, plan.blocks, plan.slices, plan.threads, plan.shared_bytes}, plan.rows});
  };
  if (!backward) {
    add("out", cuda::plan_attention(cores, queries, heads, channels));
    return launches;
  }
  add("delta", cuda::plan_delta(queries, heads, any ? cuda::kAnyDeltaLanes : cuda::kDeltaLanes));
  const cuda::AttentionPlan of_keys = cuda::plan_attention_backward(cores, keys, heads, channels);
  if (any) add("dk", of_keys);
  add(any ? "dv" : "dk, dv", of_keys);
  add("dq", cuda::plan_attention_backward(cores, queries, heads, channels));
  return launches;
}

}  // namespace diffkern

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  using namespace diffkern;
  module.attr("COMPILED_CUDA_ARCHITECTURES") = DIFFKERN_CUDA_ARCHITECTURES;
  module.attr("COMPILER") = __VERSION__;
  module.def("cpu_level", [] {
    if (const char* error = cpu::level().error)
      throw std::invalid_argument(text("DIFFKERN_CPU_LEVEL: ", error, ", got '", std::getenv("DIFFKERN_CPU_LEVEL"), "'"));
    return cpu::level().name;
  });
  pybind11::class_<Program>(module, "Program")
      .def(pybind11::init<>())
      .def("__enter__",
           [](Program& program) {
             check(!recording, "a program is being recorded already");
             recording = &program;
           })
      .def("__exit__", [](Program&, pybind11::args) { recording = nullptr; })
      .def("__len__", [](const Program& program) { return program.launches.size(); })
      .def("run", &Program::run, pybind11::call_guard<pybind11::gil_scoped_release>());
  module.def("philox", &philox_words, pybind11::arg("counter"), pybind11::arg("key"));
  pybind11::class_<Launch>(module, "Launch", pybind11::module_local())
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("grid_x", &Launch::grid_x)
      .def_readonly("grid_y", &Launch::grid_y)
      .def_readonly("threads", &Launch::threads)
      .def_readonly("shared_bytes", &Launch::shared_bytes);
  module.def("plan_elementwise", &plan_elementwise, pybind11::arg("samples"), pybind11::arg("elements"),
             pybind11::arg("element_size"));
#ifdef DIFFKERN_EMULATED_CUDA
  module.def("set_stream", [](uint64_t stream) { emulated_stream = stream; }, pybind11::arg("stream"));
#endif
  module.def("plan_noise_loss", &plan_noise_loss, pybind11::arg("samples"), pybind11::arg("elements"));
  module.def("plan_group_norm_silu", &plan_group_norm_silu, pybind11::arg("samples"), pybind11::arg("channels"),
             pybind11::arg("groups"), pybind11::arg("pixels"), pybind11::arg("element_size"),
             pybind11::arg("channels_last"));
  module.def("plan_attention", &plan_attention, pybind11::arg("heads"), pybind11::arg("queries"), pybind11::arg("keys"),
             pybind11::arg("channels"), pybind11::arg("dtype"), pybind11::arg("architecture"),
             pybind11::arg("backward"));
  module.def("word_hash", &word_hash, pybind11::arg("function"), pybind11::arg("first_run") = 0,
             pybind11::arg("last_run") = (int64_t(1) << 32) / kCodesPerHash,
             pybind11::call_guard<pybind11::gil_scoped_release>());
}
