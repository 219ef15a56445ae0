"""Small calls of the ops, as data: what the doctor and the tests run.

The file of an op yields them from its ``examples``, whose parameters are the sizes, by name. The first example of an op
has no options. The others show each option and each dtype, in sizes that no vector register divides.
"""

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SUMS = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}
"""Tolerances of an op that sums in float32, in an order of its own, and rounds once to the dtype."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One call of a public function of ``diffkern.ops``, of a registered op of ``torch.ops.diffkern``, or of both.

    op              the name of either
    name            what tells it from the op's other examples
    arguments       by name; what is left out has its default. Integers are given as int64 tensors
    images          the arguments that may lie in memory in any way
    differentiable  the arguments that the result has a derivative by; none where the call is not smooth
    tolerance       how far results may be from the reference's or another device's, relative and absolute; 0: same bits
    cpu_only        the kernel of the CPU alone has these options
    """

    op: str
    name: str
    arguments: dict[str, Any]
    images: Sequence[str] = ()
    differentiable: Sequence[str] = ()
    tolerance: float = 0.0
    cpu_only: bool = False

    def registered(self) -> "torch._ops.OpOverload | None":
        """Return the registered op of that name, if there is one."""
        packet = getattr(torch.ops.diffkern, self.op, None)
        return packet and packet.default

    def registered_arguments(self) -> dict[str, Any]:
        """Return the registered op's arguments: what is left out is the public function's default."""
        function = getattr(importlib.import_module(__package__), self.op, None)
        parameters = inspect.signature(function).parameters.values() if inspect.isfunction(function) else ()
        defaults = {parameter.name: parameter.default for parameter in parameters}
        given = {name: getattr(value, "tensor", value) for name, value in self.arguments.items()}  # a packed weight's
        names = [argument.name for argument in self.registered()._schema.arguments]
        return {name: given[name] if name in given else defaults[name] for name in names}


def modules() -> dict[str, ModuleType]:
    """Return the files of the ops, which are those with ``examples``, by their names."""
    path = importlib.import_module(__package__).__path__
    found = {file.name: importlib.import_module(f"{__package__}.{file.name}") for file in pkgutil.iter_modules(path)}
    return {name: module for name, module in found.items() if hasattr(module, "examples")}


def all_examples(**sizes: int) -> list[Example]:
    """Return every op's examples. Each file takes the sizes that it knows."""
    return [example for module in modules().values() for example in examples_of(module, **sizes)]


def examples_of(module: ModuleType, **sizes: int) -> list[Example]:
    known: Callable[..., Any] = module.examples
    return list(known(**{name: sizes[name] for name in inspect.signature(known).parameters if name in sizes}))


# --- for the files of the ops ------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, last: bool = False) -> Tensor:
    """Standard normals; an image with ``last`` is channels_last in memory."""
    z = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu").to(dtype)
    return z.contiguous(memory_format=torch.channels_last) if last else z


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")


def one(value: int) -> Tensor:
    """A step for all samples."""
    return torch.tensor(value, dtype=torch.int64, device="cpu")


def steps(n: int, distance: int = 1) -> Tensor:
    """A step for each sample: 0, distance, 2 distance and so on."""
    return distance * torch.arange(n, dtype=torch.int64, device="cpu")


def seeds(n: int) -> Tensor:
    """Seeds of samples, the second one with all of its bits set."""
    return 1 - 2 * steps(n) + (steps(n) // 2 << 60)


def label(dtype: torch.dtype, *options: str) -> str:
    return ", ".join((str(dtype).removeprefix("torch."), *options))
