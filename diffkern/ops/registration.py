"""How an op of csrc/ops/ is registered with torch, called, and kept from what its kernel cannot do."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Real
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C  # noqa: F401  registers the ops
from .arguments import check_type
from .transforms import by_torch, is_dual, mark_written, named

native = torch.ops.diffkern

# --- schemas -----------------------------------------------------------------------------------------------------

KINDS = {  # by the type that a schema gives an argument
    "Tensor": ("a tensor", Tensor),
    "Optional[Tensor]": ("a tensor or None", (Tensor, NoneType)),
    "List[Tensor]": ("a list of tensors", (list, tuple)),
    "float": ("a number", (float, int, Real)),
    "bool": ("True or False", bool),
}


class Signature:
    """An op's arguments in order: their names, what each may be, and the places of those that the op writes."""

    def __init__(self, op: torch._ops.OpOverloadPacket) -> None:
        arguments = op.default._schema.arguments
        self.names = [argument.name for argument in arguments]
        self.kinds = [(argument.name, *KINDS.get(str(argument.type), ("anything", object))) for argument in arguments]
        self.written = [i for i, argument in enumerate(arguments) if argument.is_write]

    def named(self, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        return zip(self.names, args, strict=False)


_signatures: dict[torch._ops.OpOverloadPacket, Signature] = {}


def _signature(op: torch._ops.OpOverloadPacket) -> Signature:
    if op not in _signatures:
        _signatures[op] = Signature(op)
    return _signatures[op]


# --- registering -------------------------------------------------------------------------------------------------


class Library(torch.library.Library):
    """Where gradients are registered: its ops refuse tensors with a tangent, which a kernel would drop in silence."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        signature = _signature(getattr(native, op_name))

        def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            if forward_ad._current_level >= 0:
                for name, tensor in named(signature.named(args)):
                    if is_dual(tensor):
                        raise RuntimeError(
                            f"{name}: expected no tangent, for the kernel of {op_name} has no forward-mode derivative "
                            f"(jvp), which the differentiable functions of diffkern.ops have, got a dual tensor"
                        )
            return fn(keyset, *args)

        super().impl(op_name, kernel, dispatch_key, **options)

    def without_gradient(self, op_name: str) -> None:
        """For an op that has none: it refuses tensors that require one, too."""
        op = getattr(native, op_name)
        signature = _signature(op)

        def below(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            refuse_gradient(op_name, signature.named(args))
            with torch._C._AutoDispatchBelowAutograd():
                result = op.default.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            mark_written(args[i] for i in signature.written if i < len(args))
            return result

        self.impl(op_name, below, "Autograd", with_keyset=True)


_library = Library("diffkern", "FRAGMENT")


def fake(op: str, *, differentiable: bool = False) -> Callable[[Callable], Callable]:
    """Register an op's shapes, and that it refuses tangents. ``gradient`` does it for a differentiable one."""
    if not differentiable:
        _library.without_gradient(op)
    return torch.library.register_fake(f"diffkern::{op}")


def gradient(op: str, backward: Callable, save: Callable) -> None:
    """Register an op's first derivative, which has none itself and must not pass for a constant."""

    def once(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"create_graph: expected False, for {op} can be differentiated once, and any number of times in "
                f"diffkern.torch_ops(), got True"
            )
        return backward(ctx, *grads)

    torch.library.register_autograd(f"diffkern::{op}", once, setup_context=save, lib=_library)


def same_device(like: Tensor, **tensors: Tensor | None) -> None:
    """For the fakes: a meta tensor among others would make nothing of everything."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != like.device:
            raise RuntimeError(f"{name}: expected device {like.device}, got {tensor.device}")


# --- calling -----------------------------------------------------------------------------------------------------


def check_arguments(op: torch._ops.OpOverloadPacket, args: Sequence[Any]) -> None:
    """Refuse what the dispatcher would refuse without saying what was expected, or would take for another type."""
    if torch.compiler.is_compiling():
        return
    for (name, expected, kind), value in zip(_signature(op).kinds, args, strict=False):
        if not isinstance(value, kind) or (value.__class__ is bool and kind is not bool and kind is not object):
            raise TypeError(f"{name}: expected {expected}, got {reprlib.repr(value)}")
        elif type(value) is list or type(value) is tuple:
            for item in value:
                check_type(name, "tensors", Tensor, item)


def run(op: torch._ops.OpOverloadPacket, *args: Any) -> Any:
    """Call an op for which ``by_torch`` said no; without a gradient, past its kernel for autograd."""
    if torch.compiler.is_compiling():
        return op(*args)
    written = _signature(op).written
    try:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            result = op(*args)
    except RuntimeError as error:
        message = str(error)
        if message.endswith("got float64") or (message.endswith(REQUIRES_GRAD) and not written):
            raise RuntimeError(message + BY_TORCH) from None
        raise
    if written:
        mark_written(args[i] for i in written)
    return result


REQUIRES_GRAD = "got a tensor that requires grad"
BY_TORCH = ", which diffkern.torch_ops() takes"


def refuse_gradient(op: str, arguments: Iterable[tuple[str, Any]], hint: str = "") -> None:
    """Refuse what would silently cut a gradient."""
    if torch.is_grad_enabled():
        for name, tensor in named(arguments):
            if tensor.requires_grad:
                raise RuntimeError(f"{name}: expected no gradient through {op}, {REQUIRES_GRAD}{hint}")


def by_torch_in_place(op: torch._ops.OpOverloadPacket, args: Sequence[Any]) -> bool:
    """Must a composite run, for an op that writes in place? Refuse all that differentiates or transforms it."""
    if not by_torch(*args):
        return False
    name_of_op, signature = op.default._schema.name.removeprefix("diffkern::"), _signature(op)
    refuse_gradient(name_of_op, signature.named(args))
    for name, tensor in named(signature.named(args)):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or is_dual(tensor):
            raise RuntimeError(
                f"{name}: expected a plain tensor, for {name_of_op} writes in place and has no forward-mode derivative "
                f"(jvp) and no transforms, as {name_of_op.removesuffix('_')} has, got one with a tangent or of "
                f"torch.func"
            )
    return True
