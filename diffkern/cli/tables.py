"""The tables of ``diffkern evaluate``."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..data import Dataset
from ..evaluate import HELD_OUT, FeatureNetwork, HeldOutLoss, Row
from ..io.files import write_atomically
from .plot import Curves

COLUMNS = {
    "distance": ("distance", "Frechet distance"),
    "precision": ("neighbours", "precision"),
    "recall": ("neighbours", "recall"),
    "density": ("neighbours", "density"),
    "coverage": ("neighbours", "coverage"),
    "score": ("score", "Inception Score"),
    "detector": ("detector", "detector, 95%"),
    "copying": ("copying", "copying"),
    "agreement": ("agreement", "label agreement"),
}
"""The columns of the table: the name of a number, its measure and its title."""


def print_loss(loss: HeldOutLoss, *, steps: bool) -> None:
    """A row for each unit; ``steps``: t are time steps."""
    parts = [f"{low}..{high - 1}" if steps else f"{low:.3g}..{high:.3g}" for low, high in loss.parts]
    print(f"Held-out loss of {loss.n} images at each part of t, the mean squared error an element\n")
    print("| t | " + " | ".join(parts) + " | mean |")
    print("| --- " + "| ---: " * (len(parts) + 1) + "|")
    for name, values in loss.losses.items():
        shown = (f"{value:#.4g}" for value in (*values, sum(values) / len(values)))
        print(f"| {name} | " + " | ".join(shown) + " |")
    print(flush=True)


def print_protocol(protocol: dict[str, Any]) -> None:
    """Print it in lines; of the samples what all of them share."""
    first, *others = protocol["samples"]
    shared = {name: value for name, value in first.items() if all(other[name] == value for other in others)}
    print("Protocol\n")
    for name, part in ({**protocol, "samples": shared}).items():
        told = "none" if part is None else ", ".join(f"{key} {value}" for key, value in part.items())
        print(f"- {name}: {told}")
    print()


def columns_of(
    measures: Sequence[str], network: FeatureNetwork, held_out: Dataset | None
) -> dict[str, tuple[str, str]]:
    """Return the :data:`COLUMNS` that may have numbers."""
    never = {"agreement"} if not network.classes else set()
    never |= {"copying"} if held_out is None else set()
    return {name: column for name, column in COLUMNS.items() if column[0] in measures and column[0] not in never}


def print_rows(
    rows: Iterator[Row], columns: dict[str, tuple[str, str]], found: dict[str, Any], path: str | None
) -> None:
    """Print each row as soon as it is known, add it to ``found``, and write that as JSON to ``path``."""
    titles = ["samples", "steps", "images", *(title for _, title in columns.values()), "s an image"]
    print("| " + " | ".join(titles) + " |")
    print("| --- " + "| ---: " * (len(titles) - 1) + "|", flush=True)
    floors, drawn = set(), []
    for row in rows:
        cells = [row.name, "" if row.steps is None else row.steps, row.n]
        cells += [_cell(name, row.values) for name in columns]
        cells.append("" if row.seconds is None else f"{row.seconds:.3f}")
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        found["rows"].append(asdict(row))
        if path is not None:
            write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found, indent=1, default=str)))
        if row.name == HELD_OUT:
            floors.add(row.n)
        else:
            drawn.append(row)
    for n in sorted({row.n for row in drawn} - floors):
        there = found["protocol"]["held_out"]
        got = "none (--validation)" if there is None else there["images"]
        print(f"\nNo floor: expected {n} held-out images, as many as samples, got {got}.")
    if "distance" in columns and any(row.n <= row.dimensions for row in drawn):
        D = drawn[0].dimensions
        print(f"\nThe Frechet distance is mostly bias where images are no more than the {D} dimensions of features.")


def _cell(name: str, values: dict[str, float]) -> str:
    if name not in values:
        return ""
    value = values[name]
    if name == "score":
        return f"{value:.2f} +- {values['score_std']:.2f}"
    if name == "detector":
        return f"{value:.1%} ({values['detector_low']:.1%}..{values['detector_high']:.1%})"
    return f"{value:.1%}" if name == "agreement" else f"{value:.3f}"


def print_curves(title: str, curves: Curves, calls: Sequence[int], digits: int) -> None:
    print(f"{title}\n")
    print("| sampler | " + " | ".join(f"{number} calls" for number in calls) + " |")
    print("| --- " + "| ---: " * len(calls) + "|")
    for name, points in curves.items():
        print(f"| {name} | " + " | ".join("" if y is None else f"{y:.{digits}f}" for _, y in points) + " |")
    print(flush=True)
