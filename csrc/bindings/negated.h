// Views with the negative bit, such as z.conj().imag: what lies in their memory is -1 times their elements.
//
// torch gives resolved copies of such views to ops that only read. Its fallback for ops that write wants them to return
// what they wrote, which ours do not, so these have a kernel of their own for the dispatch key.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <type_traits>
#include <vector>

#include "checks.h"

namespace diffkern {

inline bool writes(std::string_view parameter) { return parameter.find('!') != parameter.npos; }

template <class Result>
Result call_torch(const char* op, const Tensor& tensor) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(tensor)};
  check(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS, op, ": torch failed");
  return torch::stable::detail::to<Result>(stack[0]);
}

inline Tensor resolved(const Tensor& tensor) { return call_torch<Tensor>("aten::resolve_neg", tensor); }

// aten::is_neg would be called with a resolved copy wherever autograd is left out.
inline bool is_negated(const Tensor& tensor) {
  return resolved(tensor).const_data_ptr() != tensor.const_data_ptr();
}

inline std::optional<Tensor> resolved(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(resolved(*tensor)) : std::nullopt;
}
inline std::vector<Tensor> resolved(std::vector<Tensor> tensors) {
  for (Tensor& tensor : tensors) tensor = resolved(tensor);
  return tensors;
}
template <class T>
const T& resolved(const T& option) {
  return option;
}

// The next parameter of a schema, "Tensor(a!) x" or "Tensor? y=None" say, which is taken off it.
inline std::string_view next_parameter(std::string_view& parameters) {
  parameters.remove_prefix(std::min(parameters.find_first_not_of(", "), parameters.size()));
  const std::string_view parameter = parameters.substr(0, parameters.find(','));
  parameters.remove_prefix(parameter.size());
  return parameter;
}

template <class T>
void check_argument(std::string_view parameter, const T& value, bool may_be_cuda) {
  std::string_view name = parameter.substr(parameter.rfind(' ') + 1);
  name = name.substr(0, name.find('='));
  if constexpr (std::is_same_v<T, std::optional<Tensor>>) {
    if (value) check_argument(parameter, *value, may_be_cuda);
  } else if constexpr (std::is_same_v<T, Tensor>) {
    const bool here = value.device().type() == torch::headeronly::DeviceType::CPU || (may_be_cuda && value.is_cuda());
    check(here, name, ": expected device cpu", may_be_cuda ? " or cuda" : "", ", got another");
    check(!writes(parameter) || !is_negated(value), name,
          ": expected a tensor to write to, got a view with the negative bit");
  }
}

// An op on resolved copies of what it reads. Throws if what it writes is a view with the bit.
template <auto op, bool may_be_cuda>
struct Resolving;  // for ops that return nothing: those that write

template <class... Arguments, void (*op)(Arguments...), bool may_be_cuda>
struct Resolving<op, may_be_cuda> {
  static inline std::string_view parameters;  // as the schema has them, between the parentheses

  static void call(Arguments... arguments) {
    std::string_view rest = parameters;
    (check_argument(next_parameter(rest), arguments, may_be_cuda), ...);
    op(resolved(arguments)...);
  }
};

// Makes it the op's kernel in the library, which is that of the dispatch key.
template <auto op, bool may_be_cuda, class Library>
void resolve_negated(Library& library, const char* name, std::string_view schema) {
  using Kernel = Resolving<op, may_be_cuda>;
  if constexpr (requires { &Kernel::call; }) {
    Kernel::parameters = schema.substr(1, schema.find(") ->") - 1);
    library.impl(name, TORCH_BOX(&Kernel::call));
  }
}

}  // namespace diffkern
