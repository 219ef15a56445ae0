"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for our ops: as many operations as for torch's own.

A convolution counts as a direct one, whichever algorithm runs. Norms and elementwise ops count as nothing, as in torch.
"""

import importlib.abc
import importlib.util
import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

Shape = Sequence[int]


def _convolution(y: Shape, channels: int, taps: int) -> int:
    """Multiplications and additions: 2 for each pixel of y [N, K, H, W], channel of x and tap of the kernel."""
    return 2 * math.prod(y) * channels * taps


def conv3x3(x: Shape, weight: Shape, *args: Any, out_shape: Shape, **kwargs: Any) -> int:
    return _convolution(out_shape, x[1], 9)


def conv3x3_backward(grad_y: Shape, x: Shape, weight: Shape, of_x: bool, of_weight: bool, **kwargs: Any) -> int:
    return (of_x + of_weight) * _convolution(grad_y, x[1], 9)


def conv2d_out(y: Shape, x: Shape, skip: Shape | None, packed: Shape, *args: Any, **kwargs: Any) -> int:
    """The packed weight tells the taps: one matrix is a 1x1 kernel, all others are made of a 3x3 one."""
    matrices = packed[2] if len(packed) > 4 or packed[3] == 32 else packed[0]
    return _convolution(y, x[1] + (skip[1] if skip else 0), 1 if matrices == 1 else 9)


def attention(q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    """Two products of queries by keys by d."""
    return 2 * 2 * math.prod(q) * k[2]


def attention_out(out: Shape, q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    return attention(q, k)


def attention_backward(grad_out: Shape, q: Shape, k: Shape, *args: Any, **kwargs: Any) -> int:
    """Five, one of which makes the scores again."""
    return attention(q, k) // 2 * 5


FORMULAS = (conv3x3, conv3x3_backward, conv2d_out, attention, attention_out, attention_backward)
COUNTER = "torch.utils.flop_counter"


def _add_formulas(counter: ModuleType) -> None:
    for formula in FORMULAS:
        counter.register_flop_formula(getattr(torch.ops.diffkern, formula.__name__))(formula)


class _WithCounter(importlib.abc.MetaPathFinder):
    """Adds the formulas when torch's counter is imported. Importing it here would import triton, which takes long."""

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
    """Adds the formulas to torch's, now or when there are any."""
    if COUNTER in sys.modules:
        _add_formulas(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WithCounter())
