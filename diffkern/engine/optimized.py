"""``optimize``: a network as it was, that runs by recordings where it infers on a CPU."""

import dataclasses
import functools
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops import transforms
from .capture import NotCaptured
from .compiled import CHANGES, Compiled, compiled, signature

_classes: "weakref.WeakKeyDictionary[type, type]" = weakref.WeakKeyDictionary()


def optimize(network: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """The same network, run by packed weights and fused kernels where it infers on a CPU in float32.

    network  any ``nn.Module``, or a :class:`diffkern.Model` that holds one
    dtype    float32; or bfloat16: images and weights between input and output, products of convolutions and of
             attention. Their sums, softmax, the embeddings and statistics stay float32, and so does the result

    Returns a module of a subclass by the same name with the same attributes: it shares all of them with ``network``, so
    that what is done to one is done to both, ``.to``, ``.train``, ``load_state_dict``, new layers and hooks. Its copies
    and what is loaded from its pickles are optimized too: those need diffkern where they are loaded. Or a ``Model``
    that holds it.

    In float32, ``torch.set_float32_matmul_precision`` says what products may be, as it does for torch. With "highest",
    the default, they are those of floats, or as exact; with "high" or "medium", where the processor has AMX, those of
    sums of two bfloat16 numbers, which have 16 bits.

    The first call for some shapes runs the network once and notes what it computes (``docs/engine.md``). Every call
    looks whether modules, classes, options and weights are what they were: weights by torch's count of what it writes
    to them, and by their numbers, all of them at its first call, then 16 of each. So a few numbers that are changed
    through ``.data`` or NumPy may pass unnoticed until the next ``optimize``.

    Where there is a gradient to record, on another device, in another dtype, under autocast, in a transform or a trace,
    with hooks, or where no graph tells what it computes, the network itself runs; for bfloat16, under autocast. See
    :func:`diffkern.explain`.

    Raises TypeError for what is no module, ValueError for another dtype.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    if dataclasses.is_dataclass(network) and isinstance(getattr(network, "network", None), nn.Module):
        return dataclasses.replace(network, network=optimize(network.network, dtype=dtype))
    if not isinstance(network, nn.Module):
        hint = ": give it the pipeline's unet" if hasattr(network, "unet") else ""
        raise TypeError(f"network: expected a torch.nn.Module or a diffkern Model, got {type(network).__name__}{hint}")
    if is_optimized(network) and dtype_of(network) == dtype:
        return network
    return _twin(unwrapped(network), dtype)


def is_optimized(network: Any) -> bool:
    return isinstance(network, Optimized)


def unwrapped(network: Any) -> Any:
    """The network that ``optimize`` was given; anything else as it is."""
    return network._diffkern.network if is_optimized(network) else network


def dtype_of(network: Any) -> torch.dtype | None:
    """The dtype that ``optimize`` was asked for; None for other networks."""
    return network._diffkern.dtype if is_optimized(network) else None


class Optimized:
    """The base class of all optimized networks."""

    __slots__ = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._diffkern(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _twin, (self._diffkern.network, self._diffkern.dtype)


def _twin(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    kind = type(network)
    if kind not in _classes:
        names = dict(__slots__=("_diffkern",), __module__=kind.__module__, __qualname__=kind.__qualname__)
        names |= dict(__doc__=kind.__doc__, forward=functools.wraps(kind.forward)(Optimized.forward))
        _classes[kind] = type(kind)(kind.__name__, (Optimized, kind), names)
    twin = _classes[kind].__new__(_classes[kind])
    object.__setattr__(twin, "_diffkern", Runner(network, dtype))
    object.__setattr__(twin, "__dict__", network.__dict__)
    return twin


class Runner:
    """The ``forward`` of an optimized network."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.network, self.dtype, self._is_new, self._told = network, dtype, True, False
        self._compiled: Compiled | None = None  # so that it lives as long as this

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plainly(args, kwargs)
        try:
            return self.recorded(args, kwargs)
        except NotCaptured as why:
            reason, own_result = str(why), why.result
        result = self.plainly(args, kwargs) if own_result is None else own_result[0]  # or raises, for wrong inputs
        if reason and not self._told:
            self._told = True
            kind = type(self.network).__name__
            warnings.warn(f"diffkern: {kind} runs as it is, since no recording serves it: {reason}", stacklevel=4)
        return result

    def plainly(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """By the network itself; for bfloat16, under autocast."""
        forward = functools.partial(type(self.network).forward, self.network)
        if self.dtype == torch.float32:
            return forward(*args, **kwargs)
        with torch.autocast("cpu", self.dtype):
            result = forward(*args, **kwargs)
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.float() if leaf.dtype == self.dtype else leaf, result)

    def recorded(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """By a recording. NotCaptured, with the reason if it is one to tell, where there is none."""
        leaves: list[Any] = []
        key = signature((args, kwargs), leaves)
        if why_not_now(leaves):
            raise NotCaptured("")
        network, grad = self.network, torch.is_grad_enabled()
        if grad and next((parameter.requires_grad for parameter in network.parameters()), False):
            raise NotCaptured("")
        one = self._compiled = compiled(network)
        with one.lock, torch.inference_mode(False), torch.no_grad():
            exact, self._is_new = self._is_new, False
            why_not = one.update(network, exact)
            if why_not or (grad and one.learns):
                raise NotCaptured(CHANGES if why_not == CHANGES else "")

            def run(*args: Any, **kwargs: Any) -> Any:
                with torch.set_grad_enabled(grad):
                    return type(network).forward(network, *args, **kwargs)

            case = one.case(key, run, args, kwargs, self.dtype)
            if case.why_not:
                own_result, case.own_result = case.own_result, None
                raise NotCaptured("" if case.why_not in QUIET else case.why_not, own_result)
            try:
                return case.run(leaves)
            except NotCaptured:
                raise NotCaptured("") from None


QUIET = frozenset(("no kernel of ours is of use to it", "it draws random numbers", CHANGES))
"""Reasons that are no news. A first call may set modules up; if they go on changing, that is told."""


def why_not_now(leaves: list[Any]) -> str:
    """Why a call with these inputs is the network's own matter, or ""."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if not transforms.unseen(*tensors):
        return "torch transforms, traces or watches what runs"
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return "an input is not a dense tensor on the CPU"
        if torch.is_grad_enabled() and tensor.requires_grad:
            return "an input requires a gradient"
        if tensor.is_floating_point() and tensor.dtype != torch.float32 and tensor.ndim > 1:
            return f"an input is of {tensor.dtype}"
        if tensor.numel() == 0:
            return "an input is empty"
    return "" if tensors else "no input is a tensor"
