// A hash of a network's weights, by which its engine notices that they have changed.

#include <cstring>

#include "bindings/op.h"

namespace diffkern {
namespace {

void mix(uint64_t& chain, uint64_t word) {
  chain = (chain ^ word) * 0x9E3779B97F4A7C15u;
  chain ^= chain >> 32;
}

// The words of a weight in the order in which they lie in memory: all, or 16 of them, evenly spaced. Four chains of
// multiplications, since one would wait for itself.
void mix_words(uint64_t (&chains)[4], const uint32_t* words, int64_t count, bool exact) {
  int64_t i = 0;
  if (!exact && count > 16) {
    for (; i < 16; ++i) mix(chains[i % 4], words[i * (count - 1) / 15]);
    return;
  }
  for (; i + 8 <= count; i += 8)
    for (int chain = 0; chain < 4; ++chain) {
      uint64_t pair;
      std::memcpy(&pair, words + i + 2 * chain, sizeof pair);
      mix(chains[chain], pair);
    }
  for (; i < count; ++i) mix(chains[i % 4], words[i]);
}

bool is_dense(const Tensor& weight) {
  const auto sizes = weight.sizes(), strides = weight.strides();
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return weight.numel() == 0 || last + 1 == weight.numel();
}

// A program looks at weights that may have become others since it was recorded, and leaves out those that it cannot read.
bool is_readable(const Tensor& weight) {
  int64_t first = 0, bytes = 0;
  return weight.device().type() == torch::headeronly::DeviceType::CPU && weight.scalar_type() == ScalarType::Float &&
         is_dense(weight) && aoti_torch_get_storage_offset(weight.get(), &first) == AOTI_TORCH_SUCCESS &&
         aoti_torch_get_storage_size(weight.get(), &bytes) == AOTI_TORCH_SUCCESS &&
         bytes >= (first + weight.numel()) * int64_t(sizeof(float));
}

int64_t hash_of(const std::vector<Tensor>& weights, bool exact) {
  uint64_t chains[4] = {1, 2, 3, 4};
  for (const Tensor& weight : weights)
    if (is_readable(weight))
      mix_words(chains, static_cast<const uint32_t*>(weight.const_data_ptr()), weight.numel(), exact);
  for (int chain = 1; chain < 4; ++chain) mix(chains[0], chains[chain]);
  return int64_t(chains[0]);
}

void fingerprint(const Tensor& hash, const std::vector<Tensor>& weights, bool exact) {
  check_vector("hash", hash, ScalarType::Long, 1, hash);
  for (const Tensor& weight : weights) {
    check_dtype("weights", weight, ScalarType::Float);
    check_device("weights", weight, hash);
    check_memory("weights", weight);
    check(is_dense(weight), "weights: expected dense memory, got strides ",
          show({weight.strides().begin(), weight.strides().end()}));
    check_apart("hash", hash, "weights", weight);
  }
  const auto launch = [=, to = memory<int64_t>("hash", hash)] { *to = hash_of(weights, exact); };
  if (recording) recording->launches.push_back(launch);
  launch();
}

DIFFKERN_CPU_OP(fingerprint, "(Tensor(a!) hash, Tensor[] weights, bool exact) -> ()")

}  // namespace
}  // namespace diffkern
