"""Figures of the theory: a module of this package with a function ``figure`` is a figure.

The function takes how much to compute, as ints with defaults, or what to compute, as a str or a tuple of them. It
returns a :class:`Figure`. The first line of the module's docstring is its help. ``diffkern show NAME`` prints the table
and draws the panels.
"""

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from torch import Tensor

from ..samplers import SAMPLERS


@dataclass(frozen=True)
class Panel:
    """The contents of one pair of axes, drawn from the back to the front.

    image   [rows, columns], the first row at the bottom
    extent  left, right, bottom and top of the image
    cmap    matplotlib's colour map of the image
    points  by name: [N, 2]
    lines   by name: x [M] and y [M], or y [M, K] of K lines in one colour
    axes    what ``Axes.set`` of matplotlib takes, as ``xlabel``
    """

    title: str
    image: Tensor | None = None
    extent: tuple[float, float, float, float] | None = None
    cmap: str = "Greys"
    points: Mapping[str, Tensor] = field(default_factory=dict)
    lines: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    axes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """A table of numbers, and panels to draw: ``across`` of them in a row, or all."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str | int | float, ...]]
    panels: Sequence[Panel]
    across: int | None = None

    def column(self, name: str) -> list[Any]:
        """The values of a column, from the top."""
        return [row[self.columns.index(name)] for row in self.rows]

    def table(self) -> str:
        """The table in Markdown."""
        numbers = [not isinstance(value, str) for value in self.rows[0]]
        lines = [self.columns, ["---:" if number else "---" for number in numbers]]
        lines += [[_shown(value) for value in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if math.isnan(value) else f"{value:.4g}"


def figures() -> dict[str, ModuleType]:
    """The figures by name: that of the module, with - for _."""
    names = [found.name for found in iter_modules(__path__)]
    modules = {name.replace("_", "-"): import_module(f".{name}", __name__) for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "figure")}


def sampler_of(text: str) -> tuple[str, dict[str, Any]]:
    """("unipc", {"order": 3}) of "unipc,order=3". Raises TypeError or ValueError where there is no such sampler."""
    name, *given = text.split(",")
    if name not in SAMPLERS:
        raise ValueError(f"samplers: expected names of {', '.join(SAMPLERS)}, got {name!r}")
    options = dict(option.partition("=")[::2] for option in given)
    for option, value in options.items():
        try:
            options[option] = ast.literal_eval(value)
        except (SyntaxError, ValueError):  # a word
            options[option] = value
    SAMPLERS[name].check(options)
    return name, options
