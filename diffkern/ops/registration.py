"""How an op of csrc/bindings/ is registered with torch, called, and kept from what its kernel cannot do."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C  # noqa: F401  registers the ops
from .transforms import by_torch, is_dual, mark_written, named

native = torch.ops.diffkern

# --- registering -------------------------------------------------------------------------------------------------


class Library(torch.library.Library):
    """Where gradients are registered: its ops refuse tensors with a tangent, which a kernel would drop in silence."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        names = _argument_names(op_name)

        def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            if forward_ad._current_level >= 0:
                for name, tensor in _tensors(names, args):
                    if is_dual(tensor):
                        raise RuntimeError(
                            f"{name}: expected no tangent, for the kernel of {op_name} has no forward-mode derivative "
                            f"(jvp), which the differentiable functions of diffkern.ops have, got a dual tensor"
                        )
            return fn(keyset, *args)

        super().impl(op_name, kernel, dispatch_key, **options)

    def without_gradient(self, op_name: str) -> None:
        """For an op that has none: it refuses tensors that require one, too."""
        names, op = _argument_names(op_name), getattr(torch.ops.diffkern, op_name).default
        written = [i for i, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]

        def below(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            if torch.is_grad_enabled():
                for name, tensor in _tensors(names, args):
                    if tensor.requires_grad:
                        raise RuntimeError(
                            f"{name}: expected no gradient through {op_name}, got a tensor that requires grad"
                        )
            with torch._C._AutoDispatchBelowAutograd():
                result = op.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            mark_written(*(args[i] for i in written if i < len(args)))
            return result

        self.impl(op_name, below, "Autograd", with_keyset=True)


def _argument_names(op_name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.diffkern, op_name).default._schema.arguments]


def _tensors(names: list[str], args: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    lists = {name: value for name, value in zip(names, args, strict=False) if isinstance(value, (Tensor, list))}
    return ((name, tensor) for name, tensor in named(lists) if isinstance(tensor, Tensor))


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


def run(op: Callable, *args: Any) -> Any:
    """Call an op for which ``by_torch`` said no; without a gradient, past its kernel for autograd."""
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)
    except RuntimeError as error:
        if str(error).endswith("got float64"):
            raise RuntimeError(f"{error}, which diffkern.torch_ops() takes") from None
        raise


def refuse_gradient(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Refuse what would silently cut a gradient."""
    if torch.is_grad_enabled():
        for name, tensor in named(tensors):
            if tensor.requires_grad:
                raise RuntimeError(f"{name}: expected no gradient through {op}, got a tensor that requires grad")


def by_torch_in_place(op: str, **tensors: Tensor | Sequence[Tensor] | None) -> bool:
    """Must a composite run, for an op that writes in place? Refuse all that differentiates or transforms it."""
    if not by_torch(*tensors.values()):
        return False
    for name, tensor in named(tensors):
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or is_dual(tensor):
            raise RuntimeError(
                f"{name}: expected a plain tensor, for {op} writes in place and has no forward-mode derivative (jvp) "
                f"and no transforms, as {op.removesuffix('_')} has, got one with a tangent or of torch.func"
            )
    return True
