"""Averages of the weights: the exponential one, and those of any width after the fact.

Karras et al. 2024b (Analyzing and improving the training dynamics of diffusion models, section 3 and appendix C): after
t steps, an average with a power function as its profile weighs the weights of step tau in proportion to tau^gamma. Its
relative width is the standard deviation of that profile over t. Two such averages are tracked, and snapshots of them
kept. The profile of any other width is nearly a linear combination of theirs, which least squares finds.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..io.files import compare, read, write
from ..model import Model, build, find
from ..process import checked_float
from .checkpoint import read_checkpoint
from .config import WIDEST

SNAPSHOT = re.compile(r"ema-(\d{7,18})\.safetensors")


def ema_decay(decay: float, step: int) -> float:
    """Return the decay of the EMA after ``step`` steps: low at first, so that the random start is forgotten."""
    return min(decay, (1 + step) / (10 + step))


# --- profiles ---


def exponent(std: float) -> float:
    """The gamma of the profile tau^gamma whose relative width is ``std``, in (0, 12^-1/2].

    std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), a cubic in gamma, whose largest root it is.
    """
    t = std**-2
    return max(root.real for root in np.roots([1, 7, 16 - t, 12 - t]) if abs(root.imag) < 1e-6)


def power_decay(gamma: float, step: int) -> float:
    """Return the decay of the EMA with the profile tau^gamma after ``step`` >= 1 steps: 0 after the first."""
    return (1 - 1 / step) ** (gamma + 1)


def inner_products(ends: Any, gammas: Any, other_ends: Any, other_gammas: Any) -> np.ndarray:
    """The integral of p q for profiles p = (gamma + 1) tau^gamma / end^(gamma + 1) on [0, end], and q likewise.

    Arguments are broadcast; float64.
    """
    a, g, b, h = np.broadcast_arrays(*(np.asarray(x, np.float64) for x in (ends, gammas, other_ends, other_gammas)))
    ratio = np.where(a < b, (a / b) ** h, (b / a) ** g)  # at most 1
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / np.maximum(a, b)


def coefficients(ends: Sequence[int], gammas: Sequence[float], end: int, gamma: float) -> tuple[np.ndarray, float]:
    """How much of each average (its last step and its gamma) makes the one of ``gamma`` at step ``end``: float64 [K],
    and the norm of what its profile then lacks over the profile's own norm.

    The coefficients have the sum 1. The source leaves that to the fit; with few snapshots they would then scale all
    weights: by 1% with 10 snapshots and a width of 0.2.
    """
    ends, gammas = np.asarray(ends, np.float64), np.asarray(gammas, np.float64)
    gram = inner_products(ends[:, None], gammas[:, None], ends, gammas)
    aim, norm = inner_products(ends, gammas, end, gamma), inner_products(end, gamma, end, gamma)
    scale = np.diag(gram) ** -0.5  # unit norms: what follows is better conditioned
    bordered = np.block([[gram * scale * scale[:, None], scale[:, None]], [scale, 0.0]])
    found = np.linalg.lstsq(bordered, np.append(aim * scale, 1.0), rcond=1e-14)[0][:-1] * scale
    lacking = norm - 2 * found @ aim + found @ gram @ found
    return found, float(np.sqrt(max(lacking, 0.0) / norm))


# --- a run's averages ---


class PowerAverages:
    """The averages of the relative widths ``stds`` of the parameters ``trained``, by name."""

    def __init__(self, stds: Sequence[float], trained: Mapping[str, Tensor]):
        self.trained = trained
        self.averages = {std: {name: p.detach().clone() for name, p in trained.items()} for std in stds}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters as they are after ``step`` steps."""
        for std, average in self.averages.items():
            decay = power_decay(exponent(std), step)
            torch._foreach_lerp_(list(average.values()), list(self.trained.values()), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors, by their names in a checkpoint and in a snapshot."""
        return {_key(std, name): tensor for std, average in self.averages.items() for name, tensor in average.items()}

    def write_snapshot(self, folder: Path, step: int) -> None:
        """Write ema-0005000.safetensors.

        Half precision: the coefficients of a width between 0.05 and 0.25 have a norm of at most about 1, so that their
        combination is rounded no worse than one snapshot. A tensor beyond the range of half precision stays float32.
        """
        halves = {key: (tensor, tensor.half()) for key, tensor in self.tensors().items()}
        tensors = {key: half if half.isfinite().all() else tensor for key, (tensor, half) in halves.items()}
        write(folder / f"ema-{step:07d}.safetensors", {"snapshot": {"steps": step}}, tensors)


def _key(std: float, name: str) -> str:
    return f"ema_{std}.{name}"


def snapshots(folder: Path) -> dict[int, Path]:
    """The snapshots in a run's folder, by their step, rising."""
    found = ((SNAPSHOT.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def drop_later_snapshots(folder: Path, step: int) -> None:
    """Remove the snapshots of a run that is resumed at an earlier ``step``, or begun anew."""
    for later, path in snapshots(folder).items():
        if later > step:
            path.unlink()


# --- after the fact ---


@dataclass(frozen=True)
class PostHoc:
    """A model with averaged weights, the relative error of their profile, and how many averages they are made of."""

    model: Model
    error: float
    averages: int


def post_hoc_ema(
    run: str | os.PathLike, std: float, *, device: torch.device | str | None = None, into: Model | None = None
) -> PostHoc:
    """The model of a run with weights averaged over the relative width ``std``, in (0, 0.28], of its steps.

    run   the folder of a run with ``snapshot_every``, or a checkpoint of it: the average ends at that one's step
    into  as for ``diffkern.load``

    The averages of the checkpoint and of all snapshots before it are combined. Frozen parameters and buffers are the
    checkpoint's. Raises ValueError for a width out of range, a run without snapshots, and a damaged file.
    """
    std = checked_float("std", std, f"a number in (0, {WIDEST}]", lambda value: 0 < value <= WIDEST)
    path = find(run)
    description, tensors, config = read_checkpoint(path)
    end = description["training"]["steps"]
    if not (config.snapshot_every and end):
        got = f"one of {end} steps" if config.snapshot_every else "one without (--snapshot-every)"
        raise ValueError(f"{path}: expected a run with snapshots of its averages, got {got}")
    stds, before = config.ema_profiles, {step: at for step, at in snapshots(path.parent).items() if step < end}
    ends, gammas = [*before, end], [exponent(each) for each in stds]
    found, error = coefficients(np.repeat(ends, len(stds)), gammas * len(ends), end, exponent(std))
    averaged = _combined([*before.values(), path], stds, found, tensors)
    model = build(description, {**tensors, **averaged}, path, device=device, into=into)
    model.network.eval().requires_grad_(False)
    return PostHoc(model, error, len(found))


def _combined(
    files: Sequence[Path], stds: Sequence[float], weights: np.ndarray, checkpoint: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The sum of all averages in ``files`` with their ``weights``, under the names of the plain one: float64.

    One file is read at a time; the last is the ``checkpoint``'s.
    """
    trained = {key.removeprefix("exp_avg."): tensor for key, tensor in checkpoint.items() if key.startswith("exp_avg.")}
    expected = {_key(std, name): tensor for std in stds for name, tensor in trained.items()}
    own = {key: checkpoint[key] for key in expected.keys() & checkpoint.keys()}
    sums: dict[str, Tensor] = {}
    for file, of_file in zip(files, weights.reshape(len(files), -1).tolist(), strict=True):
        stored = own if file is files[-1] else read(file)[1]
        compare(expected, stored, file, "the averages of its run")
        for std, weight in zip(stds, of_file, strict=True):
            for name in trained:
                key, term = f"ema.{name}", weight * stored[_key(std, name)].double()
                sums[key] = sums[key].add_(term) if key in sums else term
    return sums
