// The shapes that the CUDA launchers choose, shown to Python for tests and for counting.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cuda/plan.h"
#include "module.h"
#include "ops/attention/plan.h"
#include "ops/group_norm_silu/plan.h"

namespace diffkern {
namespace {

struct Launch {
  const char* kernel;
  int64_t grid_x, grid_y;
  int32_t threads, shared_bytes;  // shared_bytes: beside what the kernel declares
};

// Throws unless the product of the sizes, about the elements of a tensor, is small enough that plans fit into 64 bits.
void check_sizes(const char* names, const Sizes& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes)
    check(size > 0 && !__builtin_mul_overflow(elements, size, &elements) && elements <= int64_t(1) << 60, names,
          ": expected values > 0 whose product is at most 2^60, got ", show(sizes));
}

Launch plan_elementwise(int64_t samples, int64_t elements, int64_t element_size) {
  check_sizes("samples, elements", {samples, elements});
  check(element_size == 2 || element_size == 4, "element_size: expected 2 or 4, got ", element_size);
  const int64_t vector = 16 / element_size;
  const cuda::Plan plan = cuda::plan_elementwise(samples, divide_up(elements, vector));
  return {"elementwise", plan.grid_x, plan.grid_y, int32_t(plan.threads), 0};
}

Launch plan_sums(int64_t samples, int64_t elements) {
  check_sizes("samples, elements", {samples, elements});
  const cuda::Plan plan = cuda::plan_sums(samples, elements);
  return {"partial", plan.grid_x, plan.grid_y, int32_t(plan.threads), 0};
}

// Also how the work is cut: (launches, {groups of a set, channels of a set, pixels of a chunk, elements of an access}).
std::pair<std::vector<Launch>, std::array<int32_t, 4>> plan_group_norm_silu(int64_t samples, int64_t channels,
                                                                            int64_t groups, int64_t pixels,
                                                                            int64_t element_size, bool channels_last) {
  check_sizes("samples, channels, pixels", {samples, channels, pixels});
  check(groups > 0 && channels % groups == 0, "groups: expected a divisor of the ", channels, " channels, got ", groups);
  check(channels / groups <= cuda::GroupNormPlan::kMaxWidth, "groups: expected at most ",
        cuda::GroupNormPlan::kMaxWidth, " channels each, got ", channels / groups);
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
  check_sizes("heads, queries, keys, channels", {heads, queries, keys, channels});
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

}  // namespace

void add_plans(pybind11::module_& module) {
  using pybind11::arg;
  pybind11::class_<Launch>(module, "Launch", pybind11::module_local())
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("grid_x", &Launch::grid_x)
      .def_readonly("grid_y", &Launch::grid_y)
      .def_readonly("threads", &Launch::threads)
      .def_readonly("shared_bytes", &Launch::shared_bytes);
  module.def("plan_elementwise", &plan_elementwise, arg("samples"), arg("elements"), arg("element_size"));
  module.def("plan_sums", &plan_sums, arg("samples"), arg("elements"));
  module.def("plan_group_norm_silu", &plan_group_norm_silu, arg("samples"), arg("channels"), arg("groups"), arg("pixels"),
             arg("element_size"), arg("channels_last"));
  module.def("plan_attention", &plan_attention, arg("heads"), arg("queries"), arg("keys"), arg("channels"), arg("dtype"),
             arg("architecture"), arg("backward"));
}

}  // namespace diffkern
