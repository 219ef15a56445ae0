"""Pictures of curves, where matplotlib is installed: the tables that they are drawn from need nothing."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

from ..progress import tell
from .outputs import check_file

Curves = Mapping[str, Sequence[tuple[float, float | None]]]
"""By name: (x, y) of each point; None where there is none."""


def check_plot(path: str | None) -> str | None:
    """The path, if a picture can be drawn there: ValueError or OSError if not; None with a warning without matplotlib.

    Before minutes of work, not after.
    """
    if path is None:
        return None
    check_file("plot", path, ".png")
    if find_spec("matplotlib") is None:
        tell("plot: matplotlib is not installed, the tables are all: pip install matplotlib")
        return None
    return path


def draw(path: str, panels: Mapping[str, Curves], x: str, **scales: str) -> None:
    """Draw a panel for each title, side by side, with the axis ``x``; scales: ``xscale`` and ``yscale``, as "log"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        few = max(map(len, curves.values())) < 20
        for i, (name, points) in enumerate(curves.items()):
            there = [(at, y) for at, y in points if y is not None]
            if there:  # a name has the same color in every panel
                axes.plot(*zip(*there, strict=True), marker="." if few else None, color=f"C{i}", label=name)
        axes.set(title=title, xlabel=x, **scales)
        if few:
            ticks = sorted({at for points in curves.values() for at, _ in points})
            axes.set_xticks(ticks, [f"{at:g}" for at in ticks])
            axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=100)
