"""Torch's own kernels in a plan: with ``out=`` where they have it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .words import words

_aten = torch.ops.aten

WITH_OUT = {
    name: getattr(torch, name)
    for name in words(
        "add sub mul div neg exp log sqrt rsqrt sigmoid tanh sin cos abs square maximum minimum reciprocal softmax",
        "cat stack matmul bmm baddbmm addmm",
    )
} | {
    name: getattr(_aten, name).out for name in words("silu gelu relu mish elu hardswish leaky_relu softplus avg_pool2d")
}


def into(step: Any, y: Tensor, operands: Sequence[Tensor]) -> Callable[[], Any]:
    """The call that computes a step into ``y``, arguments and kernel chosen."""
    if not hasattr(step, "arguments"):
        return lambda: step(y, *operands)
    args, kwargs = step.arguments(*operands)
    function, name = step.node.target, step.node.name
    special = SPECIAL.get(name)
    if special is not None and step.item is None:
        call = special(y, *args, **kwargs)
        if call is not None:
            return call
    kernel = WITH_OUT.get(name)
    if kernel is not None and step.item is None and y.dtype == torch.float32:
        options = {key: value for key, value in kwargs.items() if WITHOUT_EFFECT.get(key, _UNSET) != value}

        def with_out() -> Any:
            return kernel(*args, **options, out=y)

        if _works(with_out, y):
            return with_out

    def compute() -> None:
        result = function(*args, **kwargs)
        result = result if step.item is None else result[step.item]
        if result.shape != y.shape:
            raise RuntimeError(f"{name}: expected a result of shape {tuple(y.shape)}, got {tuple(result.shape)}")
        y.copy_(result)

    return compute


_UNSET = object()
WITHOUT_EFFECT = {"inplace": False, "dtype": None, "_stacklevel": 3}


def _works(call: Callable[[], Any], y: Tensor) -> bool:
    """Does torch's kernel take these arguments, and leave y's memory where it is?"""
    place = y.data_ptr(), y.shape, y.stride()
    try:
        call()
    except (TypeError, RuntimeError):  # a kernel that is missing, too
        return False
    return (y.data_ptr(), y.shape, y.stride()) == place


def _layer_norm(
    y: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, **_: Any
) -> Callable[[], Any] | None:
    statistics = [torch.empty(0, dtype=torch.float32, device="cpu") for _ in range(2)]
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)

    def call() -> None:
        _aten.native_layer_norm.out(input, shape, weight, bias, eps, out0=y, out1=statistics[0], out2=statistics[1])

    return call if _works(call, y) else None


def _interpolate(
    y: Tensor, input: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any
) -> Callable[[], Any] | None:
    if mode != "nearest" or input.ndim != 4:
        return None
    doubled = [2 * extent for extent in input.shape[2:]]
    if list(y.shape[2:]) != doubled:  # other ratios may round by the factor that was given
        return None
    return lambda: _aten.upsample_nearest2d.out(input, doubled, None, None, out=y)


SPECIAL = {"layer_norm": _layer_norm, "interpolate": _interpolate}
