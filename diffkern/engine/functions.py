"""Functions of torch as nodes of a graph: their names, and what they tell."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .words import words

SEEN = words(
    "shape dtype device layout ndim requires_grad is_leaf size dim stride numel nelement element_size itemsize",
    "nbytes is_contiguous is_floating_point is_complex is_signed is_cuda is_cpu is_mps is_meta is_sparse",
    "is_sparse_csr is_quantized is_nested is_mkldnn is_xpu is_xla is_ipu is_vulkan is_hpu is_maia is_mtia",
    "is_inference is_conj is_neg get_device storage_offset _version grad grad_fn __len__ __hash__ type dense_dim",
    "sparse_dim is_same_size is_tensor result_type can_cast _log_api_usage_once names has_names __format_shape__",
)
"""Functions that tell no number of a tensor."""

SHAPED_BY_NUMBERS = words(
    "nonzero argwhere unique unique_consecutive masked_select bincount histc one_hot repeat_interleave",
)
"""Functions whose result has a shape that the numbers decide."""

FUNCTION_OF = {
    "__add__": "add", "__radd__": "add", "__mul__": "mul", "__rmul__": "mul", "__sub__": "sub", "__truediv__": "div",
    "true_divide": "div", "truediv": "div", "multiply": "mul", "subtract": "sub", "divide": "div", "concat": "cat",
    "concatenate": "cat", "__matmul__": "matmul", "__getitem__": "getitem", "__pow__": "pow", "__neg__": "neg",
}  # fmt: skip


def name_of(function: Any) -> str:
    """``add`` for ``torch.add``, ``Tensor.__add__``, ``operator.add`` and the method; ``shape`` for its getter."""
    if isinstance(function, Written):
        return "written"
    name = getattr(function, "__name__", type(function).__name__).removesuffix(".default")
    if name == "__get__":
        return function.__self__.__name__
    return FUNCTION_OF.get(name, name)


@dataclasses.dataclass(frozen=True)
class Written:
    """A function that writes to one of its tensors, as one that returns what is written, in memory of its own."""

    function: Callable[..., Any]
    position: int  # of that tensor among all tensors of the arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        leaves[places[self.position]] = copied = leaves[places[self.position]].clone()
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        self.function(*args, **kwargs)
        return copied

    @property
    def __name__(self) -> str:
        return "written"


def item_of(results: Sequence[Any], index: int) -> Any:
    """One of the results of a function that has several."""
    return results[index]
