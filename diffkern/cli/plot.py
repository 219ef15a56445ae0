"""Pictures, where matplotlib is installed: the tables that they are drawn from need nothing."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from ..progress import tell
from ..show import Panel
from .outputs import check_file

Curves = Mapping[str, Sequence[tuple[float, float | None]]]
"""By name: (x, y) of each point; None where there is none."""


def check_plot(path: str | None, name: str = "plot") -> str | None:
    """The path, if a picture can be drawn there: ValueError or OSError if not; None with a warning without matplotlib.

    Before minutes of work, not after.
    """
    if path is None:
        return None
    check_file(name, path, ".png")
    if find_spec("matplotlib") is None:
        tell(f"{name}: matplotlib is not installed, the tables are all: pip install matplotlib")
        return None
    return path


def draw(path: str, panels: Mapping[str, Curves], x: str, **scales: str) -> None:
    """Draw a panel for each title, side by side, with the axis ``x``; scales: ``xscale`` and ``yscale``, as "log"."""
    axes = dict(xlabel=x, **scales)
    draw_panels(path, [Panel(title, lines=_lines(curves), axes=axes) for title, curves in panels.items()])


def _lines(curves: Curves) -> dict[str, tuple[Tensor, Tensor]]:
    there = {name: [point for point in points if point[1] is not None] for name, points in curves.items()}
    tables = {name: torch.tensor(points, dtype=torch.float64, device="cpu") for name, points in there.items()}
    return {name: table.reshape(-1, 2).unbind(1) for name, table in tables.items()}


def draw_panels(path: str, panels: Sequence[Panel], across: int | None = None) -> None:
    """Draw panels in rows of ``across``, or all in one, as a PNG of 128 colours: drawings need no more."""
    from matplotlib.figure import Figure
    from PIL import Image

    across = across or len(panels)
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5 * across, 3.5 * down) if down == 1 else (3 * across, 3 * down), layout="constrained")
    for axes, panel in zip(figure.subplots(down, across, squeeze=False).flat, panels, strict=False):
        _draw(axes, panel)
    drawn = BytesIO()
    figure.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").quantize(128).save(path, optimize=True)


def _draw(axes: Any, panel: Panel) -> None:
    if panel.image is not None:
        axes.imshow(panel.image.numpy(), cmap=panel.cmap, extent=panel.extent, origin="lower", aspect="auto")
    else:
        axes.grid(alpha=0.3)
    for name, points in panel.points.items():
        axes.plot(*points.T.numpy(), ".", markersize=2, alpha=0.5, label=name or None)
    drawn = {name: line for name, line in panel.lines.items() if len(line[0])}
    few = drawn and max(len(x) for x, _ in drawn.values()) < 20
    for number, name in enumerate(panel.lines):  # a name has the same color in every panel, drawn or not
        if name in drawn:
            x, y = drawn[name]
            style = dict(color=f"C{number}", linewidth=0.7 if y.ndim == 2 else None, marker="." if few else None)
            axes.plot(x.numpy(), y.numpy(), **style)[0].set_label(name or None)
    axes.set(title=panel.title, **panel.axes)
    if few:
        ticks = sorted({float(at) for x, _ in drawn.values() for at in x})
        axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
        axes.set_xticks([], minor=True)
    if any((*panel.points, *drawn)):
        axes.legend()
