"""How an op of csrc/ops/ is registered with torch, called, and kept from what its kernel cannot do."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from numbers import Integral, Real
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C  # noqa: F401  registers the ops
from .arguments import check_type
from .transforms import by_torch, is_dual, named

native = torch.ops.diffkern

# --- schemas -----------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """The types of an argument, and of the items of a list. The texts are those of the error."""

    expected: str
    types: type | tuple[type, ...]
    items: tuple[str, type | tuple[type, ...]] | None = None


KINDS = {  # by the type that a schema gives an argument
    "Tensor": Kind("a tensor", Tensor),
    "Optional[Tensor]": Kind("a tensor or None", (Tensor, NoneType)),
    "List[Tensor]": Kind("a list of tensors", (list, tuple), ("tensors", Tensor)),
    "float": Kind("a number", (float, int, Real)),
    "Optional[float]": Kind("a number or None", (float, int, Real, NoneType)),
    "int": Kind("an int", int),
    "Optional[int]": Kind("an int or None", (int, NoneType)),
    "List[int]": Kind("ints", (list, tuple), ("ints", (Integral, torch.SymInt))),
    "bool": Kind("True or False", bool),
    "ScalarType": Kind("a torch.dtype", torch.dtype),
}


def kind_of(argument: torch._C.Argument) -> Kind:
    of = str(argument.real_type)
    if of not in KINDS:
        raise TypeError(f"{argument.name}: expected a schema's type among {', '.join(KINDS)}, got {of}")
    return KINDS[of]


class Op:
    """A registered op as its public function calls it: ``check`` the arguments, in the schema's order, then call it."""

    def __init__(self, name: str) -> None:
        self.name, self.overload = name, getattr(native, name).default
        arguments = self.overload._schema.arguments
        self.names = [argument.name for argument in arguments]
        self.kinds = [kind_of(argument) for argument in arguments]
        self.lists = [i for i, kind in enumerate(self.kinds) if kind.items]
        self.written = [i for i, argument in enumerate(arguments) if argument.is_write]
        self._accepted: set[tuple[type, ...]] = set()  # by earlier calls: these types need no second look

    def named(self, args: Sequence[Any]) -> Iterator[tuple[str, Any]]:
        return zip(self.names, args, strict=False)

    def check(self, args: Sequence[Any]) -> None:
        """Refuse what the dispatcher would refuse without saying what was expected, or would take for another type."""
        if torch.compiler.is_compiling():
            return
        types = tuple(map(type, args))
        if types not in self._accepted:
            for name, kind, value in zip(self.names, self.kinds, args, strict=True):
                if not isinstance(value, kind.types) or (type(value) is bool and kind.types is not bool):
                    raise TypeError(f"{name}: expected {kind.expected}, got {reprlib.repr(value)}")
            self._accepted.add(types)
        for i in self.lists:
            if args[i] and (types := (i, *map(type, args[i]))) not in self._accepted:
                for item in args[i]:
                    check_type(self.names[i], *self.kinds[i].items, item)
                self._accepted.add(types)

    def __call__(self, *args: Any) -> Any:
        """Call an op for which ``by_torch`` said no; without a gradient, past its kernel for autograd."""
        if torch.compiler.is_compiling():
            return self.overload(*args)
        try:
            if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
                return self.overload(*args)
            with torch._C._AutoDispatchBelowAutograd():
                result = self.overload(*args)
        except RuntimeError as error:
            message = str(error)
            if message.endswith("got float64") or (message.endswith(REQUIRES_GRAD) and not self.written):
                raise RuntimeError(message + BY_TORCH) from None
            raise
        self.mark_written(args)
        return result

    def mark_written(self, args: Sequence[Any]) -> None:
        """Tell autograd which were changed in place, so that it refuses to use them for a gradient."""
        for i in self.written:
            if i < len(args) and args[i] is not None:
                torch.autograd.graph.increment_version(args[i])

    def by_torch_in_place(self, args: Sequence[Any]) -> bool:
        """Must a composite run, for an op that writes in place? Refuse all that differentiates or transforms it."""
        if not by_torch(*args):
            return False
        refuse_gradient(self.name, self.named(args))
        for name, tensor in named(self.named(args)):
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or is_dual(tensor):
                raise RuntimeError(
                    f"{name}: expected a plain tensor, for {self.name} writes in place and has no forward-mode "
                    f"derivative (jvp) and no transforms, as {self.name.removesuffix('_')} has, got one with a tangent "
                    f"or of torch.func"
                )
        return True


REQUIRES_GRAD = "got a tensor that requires grad"
BY_TORCH = ", which diffkern.torch_ops() takes"


def refuse_gradient(op: str, arguments: Iterable[tuple[str, Any]], hint: str = "") -> None:
    """Refuse what would silently cut a gradient."""
    if torch.is_grad_enabled():
        for name, tensor in named(arguments):
            if tensor.requires_grad:
                raise RuntimeError(f"{name}: expected no gradient through {op}, {REQUIRES_GRAD}{hint}")


# --- registering -------------------------------------------------------------------------------------------------


class Library(torch.library.Library):
    """The library of the gradients: its ops refuse tensors with a tangent, which a kernel would silently drop."""

    def impl(self, op_name: str, fn: Callable, dispatch_key: str = "", **options: Any) -> None:
        op = Op(op_name)

        def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            if forward_ad._current_level >= 0:
                for name, tensor in named(op.named(args)):
                    if is_dual(tensor):
                        raise RuntimeError(
                            f"{name}: expected no tangent, for the kernel of {op_name} has no forward-mode derivative "
                            f"(jvp), which the differentiable functions of diffkern.ops have, got a dual tensor"
                        )
            return fn(keyset, *args)

        super().impl(op_name, kernel, dispatch_key, **options)

    def without_gradient(self, op_name: str) -> None:
        """For an op that has none: it refuses tensors that require one, too."""
        op = Op(op_name)

        def below(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
            refuse_gradient(op_name, op.named(args))
            with torch._C._AutoDispatchBelowAutograd():
                result = op.overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
            op.mark_written(args)
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
