"""When torch's own ops run in place of a kernel.

A kernel computes values and, if it has one, a first derivative backwards. All else that torch does with a function
works on the op's composite: derivatives forwards and of higher order, ``torch.func``, float64.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class _Mode(threading.local):  # and no context variable, whose value torch.compile could not guard
    depth = 0
    capturing = False


_mode = _Mode()


class torch_ops(contextlib.ContextDecorator):
    """Run every op by torch's own ops, in this thread: a context manager or a decorator, that may be nested.

    Within it, networks and ops take float64 tensors and have derivatives of any order: ``create_graph=True``,
    ``torch.autograd.gradcheck``, gradients through :func:`q_sample` and :func:`reverse_step`. Noise still comes from
    its kernel, with the same bits, and is a constant to every derivative. Slower than the kernels, with more memory.
    """

    def __enter__(self) -> None:
        _mode.depth += 1

    def __exit__(self, *exception: object) -> None:
        _mode.depth -= 1


def named(arguments: Iterable[tuple[str, object]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its argument's name, also those of a list."""
    for name, value in arguments:
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor):
                yield name, tensor


def is_dual(tensor: Tensor) -> bool:
    """Does it have a tangent, at the current level of forward-mode AD?"""
    return tensor.is_floating_point() and forward_ad.unpack_dual(tensor).tangent is not None


def by_torch(*args: object) -> bool:
    """Must torch's own ops run: in ``torch_ops``, in a transform of ``torch.func``, or as an argument has a tangent?"""
    if _mode.depth > 0 or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or any(is_dual(tensor) for _, tensor in named(("", value) for value in args))


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """While the engine notes what a network computes, in this thread."""
    before, _mode.capturing = _mode.capturing, True
    try:
        yield
    finally:
        _mode.capturing = before


def recorded() -> bool:
    """Is what runs recorded: compiled, traced, captured, or by a dispatch mode (fake tensors, FLOP counters)?"""
    by_torch = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return _mode.capturing or by_torch


def unseen(*tensors: Tensor) -> bool:
    """May work on these plain tensors be done where torch does not see it?"""
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    plain = all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors)
    return plain and not (_mode.depth > 0 or transformed or recorded())


def readable(tensor: Tensor) -> bool:
    """May its numbers be looked at, without waiting for a device, or ending a graph?"""
    plain = tensor.device.type == "cpu" and type(tensor) in (Tensor, nn.Parameter)
    return plain and not (torch._C._are_functorch_transforms_active() or recorded())
