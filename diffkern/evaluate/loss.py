"""The held-out loss, at each part of t, of any prediction on any process."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..arguments import accelerated, check_weights
from ..data import Dataset, epoch_order, words
from ..model import Model
from ..networks.modes import evaluating
from ..process import SPACINGS, Process, checked_count
from ..progress import bar as progress_bar
from ..runtime import Run
from ..runtime.loop import call
from ..training.noising import Noising
from ..training.objectives import Objective, eps, simple, x0

LOSS_STREAM = 5
"""The Philox stream of an image's noise seed, and of its t, in :func:`held_out_loss` and ``noisy_accuracy``."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The mean squared error an element, on images that the model has not seen.

    parts   (low, high) of t, upwards: the time steps low .. high - 1 of a schedule, else the times from low to high
    losses  by what is compared, a number for each part: "eps", the noise; "x0", the image; and the prediction of the
            model, its network's own output. At one t each is a multiple of the others
    n       images
    """

    parts: tuple[tuple[float, float], ...]
    losses: dict[str, tuple[float, ...]]
    n: int


@torch.no_grad()
def held_out_loss(
    model: Model,
    data: Dataset,
    *,
    n: int = 1000,
    buckets: int = 10,
    seed: int = 0,
    batch_size: int = 100,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> HeldOutLoss:
    """Measure the error of a model on ``n`` images, the first of :func:`in_proportion`, at each of ``buckets`` parts of
    t.

    The parts are equal parts of 0..T-1; of another process those of its own grid, equal in t or as Karras et al. 2022
    space sigma. t, uniform in the part, and eps are functions of the seed, the image's place and the part: the same
    for every model. The network is given the labels of :func:`labels_of`, and of conditions what stands for none.
    Raises TypeError or ValueError.
    """
    process, n = model.schedule, min(checked_count("n", n), len(data))
    if model.codec is None and data.shape != model.shape:
        raise ValueError(f"data: expected images of shape {model.shape}, got {data.shape}")
    parts = _parts(process, checked_count("buckets", buckets))
    device, labels, order = model.device, labels_of(data, model), in_proportion(data.labels, len(data))
    check_weights(model.network, dtype)
    network, dtype = accelerated(model.network, dtype, Run())
    ways = {
        name: Noising(objective, process, "fixed_small", device)
        for name, objective in _objectives(model.prediction).items()
    }
    losses: dict[str, list[float]] = {name: [] for name in ways}
    with progress_bar(buckets * n, "held-out loss", "img", progress) as bar, evaluating(model.network):
        for bucket, (low, high) in enumerate(parts):
            w = words(np.arange(n), bucket, LOSS_STREAM, seed)
            t, seeds = _times(w[:, 2], low, high, process), image_seeds(w)
            totals = dict.fromkeys(ways, 0.0)
            for index in torch.arange(n, dtype=torch.int64, device="cpu").split(batch_size):
                x_0 = data.x_0(order[index]).to(device)
                if model.codec is not None:
                    x_0 = model.to_latents(x_0).float()
                given = {c.name: c.batch(None, len(index)).to(device) for c in model.conditions}
                if labels is not None:
                    given["labels"] = labels[order[index]].to(device)
                at = {name: way.at(t[index]) for name, way in ways.items()}
                first, seeds_i = next(iter(at.values())), seeds[index].to(device)
                x_t = ops.q_sample(x_0, first.step, seeds_i, first.q_table, address=first.address)
                out = call(network, x_t, first.t, given, x_t.shape[1], dtype).contiguous()
                for name, way in ways.items():
                    totals[name] += way.loss(out, x_0, seeds_i, at[name]).double().sum().item()
                bar.update(len(index))
            for name, total in totals.items():
                losses[name].append(total / n)
    return HeldOutLoss(parts, {name: tuple(values) for name, values in losses.items()}, n)


def eps_loss(model: Model, data: Dataset, **options) -> list[float]:
    """The error of eps alone, for each part of t: on a schedule the loss of Algorithm 1 (Ho et al. 2020).

    options  of :func:`held_out_loss`
    """
    return list(held_out_loss(model, data, **options).losses["eps"])


def labels_of(data: Dataset, model: Model) -> Tensor | None:
    """The labels of the data as the model counts them, int64 [K]; None where either has no classes.

    Classes are matched by their names, in any order. Where no name is the same, and there are as many classes, the
    labels count. Other classes are the null class. Raises ValueError where the network has none.
    """
    if data.labels is None or model.classes is None:
        if model.null_class:
            return None
        raise ValueError("data: expected labelled images for a network without a null class, got images without labels")
    places = {name: label for label, name in enumerate(model.classes)}
    if len(data.classes) == len(model.classes) and not places.keys() & set(data.classes):
        return data.labels
    moved = [places.get(name, -1) for name in data.classes]
    if -1 in moved and not model.null_class:
        missing = data.classes[moved.index(-1)]
        raise ValueError(f"data: expected classes of a network without a null class, got {missing!r}")
    return torch.tensor(moved, dtype=torch.int64, device="cpu")[data.labels]


def in_proportion(labels: Tensor | None, length: int, seed: int = 0) -> Tensor:
    """A permutation of 0..length-1, by ``seed``: in each part from its beginning, classes are as frequent as in all.

    Where all classes are of one size they come in turn. int64 [length].
    """
    order = epoch_order(length, 0, seed)
    if labels is None:
        return order
    by_class = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    ends = counts.cumsum(0)
    place = torch.arange(length, dtype=torch.int64, device="cpu") - (ends - counts).repeat_interleave(counts)
    share = (place + 0.5).double() / counts.repeat_interleave(counts)
    return by_class[share.argsort(stable=True)]


def image_seeds(w: np.ndarray) -> Tensor:
    """The first two of each sample's Philox words: [N] int64."""
    return torch.from_numpy((w[:, 0] | w[:, 1] << np.uint64(32)).view(np.int64))


def _objectives(prediction: str) -> dict[str, Objective]:
    """The objectives to compare, by name: the output's error is weighted to be that of eps and of x_0."""

    return {"eps": eps(prediction), "x0": x0(prediction), prediction: simple(prediction)}


def _parts(process: Process, buckets: int) -> tuple[tuple[float, float], ...]:
    if process.discrete:
        if buckets > process.T:
            raise ValueError(f"buckets: expected 1..{process.T}, got {buckets}")
        edges: Sequence[float] = [bucket * process.T // buckets for bucket in range(buckets + 1)]
    else:
        edges = SPACINGS[process.spacing](process, buckets + 1)[::-1].tolist()
    return tuple(zip(edges[:-1], edges[1:], strict=True))


def _times(w: np.ndarray, low: float, high: float, process: Process) -> Tensor:
    """t of each word: a time step of low .. high - 1, int64; or a time within (low, high), float64."""
    if process.discrete:
        return torch.from_numpy((low + (w * np.uint64(high - low) >> np.uint64(32))).astype(np.int64))
    return torch.from_numpy(low + (high - low) * (w + 0.5) * 2.0**-32)
