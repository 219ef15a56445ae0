"""The registry of samplers: functions known by name to ``sample``, the command line and the documentation."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..process import Grid
from ..program import Program, Trace

SAMPLERS: dict[str, "Sampler"] = {}
"""Every sampler by its name."""


@dataclass(frozen=True)
class Sampler:
    """A function ``(m, grid, **options) -> m.program(x)`` that is written as its paper's algorithm.

    steps  how many by default; None: all of a schedule's
    calls  of the network in a step
    slots  how many tensors a short table has columns for, however few its steps
    """

    function: Callable[..., Any]
    steps: int | None = 20
    calls: int = 1
    slots: int = 0

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        """The options that it takes, by name."""
        return dict(list(inspect.signature(self.function).parameters.items())[2:])

    def check(self, options: dict[str, Any]) -> None:
        """Raises TypeError for an option that this sampler does not take."""
        for name in options:
            if name not in self.options:
                takes = ", ".join(self.options) or "none"
                raise TypeError(f"{name}: expected an option of sampler {self.name!r} ({takes}), got {options[name]!r}")

    def trace(self, grid: Grid, prediction: str = "x0", *, plus_plus: bool = False, **options: Any) -> Program:
        """The program of this sampler on a grid."""
        self.check(options)
        try:
            program = self.function(Trace(grid, prediction, plus_plus=plus_plus), grid, **options)
        except (ZeroDivisionError, FloatingPointError):
            lost = next((point for point in grid.points if 0 in (point.alpha, point.sigma)), grid.points[0])
            expected = "one that can start at alpha = 0, as 'ddim', 'velocity', 'unipc'"
            if lost.alpha > 0:
                expected = f"one with finite coefficients from alpha = {lost.alpha:.3g} and sigma = {lost.sigma:.3g}"
            raise ValueError(f"sampler: expected {expected}, got {self.name!r}") from None
        if not isinstance(program, Program):
            returned = "nothing" if program is None else f"a {type(program).__name__}"
            raise TypeError(f"sampler: expected {self.name!r} to return m.program(x), got {returned}")
        return program

    def __call__(self, m: Any, grid: Any, *args: Any, **options: Any) -> Any:
        """Run in ``m``; or, of a schedule and its time steps, return the short table of :mod:`.tables`."""
        if isinstance(grid, Grid):
            return self.function(m, grid, *args, **options)
        from .tables import short_table

        return short_table(self, m, grid, *args, **options)

    def __repr__(self) -> str:
        return f"<sampler {self.name}({', '.join(map(str, self.options.values()))})>"


def _place(function: Callable[..., Any]) -> tuple[str, str]:
    """The module and the name of a function's definition, which are the same when it is run again."""
    return function.__module__, function.__qualname__


def sampler(steps: int | None = 20, calls: int = 1, slots: int = 0) -> Callable[[Callable[..., Any]], Sampler]:
    """Make a function a sampler, and known by its name. Raises ValueError for the name of another sampler."""

    def register(function: Callable[..., Any]) -> Sampler:
        made = Sampler(function, steps, calls, slots)
        if made.name in SAMPLERS and _place(SAMPLERS[made.name].function) != _place(function):
            raise ValueError(f"sampler: expected a function whose name no sampler has, got {made.name!r}")
        made.__dict__["__doc__"] = function.__doc__
        SAMPLERS[made.name] = made
        return made

    return register
