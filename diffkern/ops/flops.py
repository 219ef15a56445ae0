"""FLOP counts of our ops for ``torch.utils.flop_counter.FlopCounterMode``: the same as for torch's own.

A convolution counts as a direct one, whichever algorithm runs. Norms and elementwise ops count as nothing, as in torch.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]
Formula = Callable[..., int]
COUNTER = "torch.utils.flop_counter"
FORMULAS: dict[str, Formula] = {}


def formula(op: str) -> Callable[[Formula], Formula]:
    """Register how many operations an op counts as. The function gets the arguments, with shapes for tensors."""

    def add(count: Formula) -> Formula:
        FORMULAS[op] = count
        return count

    return add


def convolution(y: Shape, channels: int, taps: int) -> int:
    """Multiplications and additions: 2 for each pixel of y [N, K, H, W], channel of x and tap of the kernel."""
    return 2 * math.prod(y) * channels * taps


def _add_formulas(counter: ModuleType) -> None:
    for op, count in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.diffkern, op))(count)


class _WithCounter(importlib.abc.MetaPathFinder):
    """Add the formulas when torch's counter is imported. Importing it here would import triton, which takes long."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add_formulas(module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Add the formulas to torch's counter, now or when it is imported."""
    if COUNTER in sys.modules:
        _add_formulas(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WithCounter())
