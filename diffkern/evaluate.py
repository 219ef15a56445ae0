"""How good is a model? The Frechet distance of its samples to real images, and its loss on images it has not seen.

The features are those of a small classifier of Fashion-MNIST, made here: Inception's say little about 28x28 clothes.
Distances are comparable among themselves, and with the distance of real test images, never with published FIDs.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops
from .data import Dataset, epoch_order, words
from .defaults import float32_on
from .files import Blueprint, fill, floating, read, write
from .images import to_uint8
from .model import Model
from .progress import bar as progress_bar
from .sampling import sample
from .schedule import checked_float

CLASSIFIER = Path(__file__).parent / "classifiers" / "fashion-mnist.safetensors"
"""The classifier that ships, so that distances measured anywhere are in the same feature space."""

LOSS_STREAM = 5
"""The Philox stream that draws t for :func:`eps_loss`."""


class Classifier(nn.Module):
    """[N, 1, 32, 32] in [-1, 1] -> logits [N, 10]; ``features`` are the 64 numbers before the last layer."""

    def __init__(self, channels: int = 1, classes: int = 10, width: int = 32, features: int = 64):
        super().__init__()

        def block(c_in: int, c_out: int, kernel: int, stride: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
            return [conv, nn.BatchNorm2d(c_out), nn.ReLU()]

        self.convs = nn.Sequential(
            *block(channels, width, 5, 2),
            *block(width, 2 * width, 3, 1),
            nn.MaxPool2d(2),
            *block(2 * width, 4 * width, 3, 1),
            nn.MaxPool2d(2),
        )  # [N, 4 width, 4, 4]
        self.hidden = nn.Linear(4 * width * 16, features)
        self.out = nn.Linear(features, classes)
        self.to(memory_format=torch.channels_last)

    def features(self, x: Tensor) -> Tensor:
        h = self.convs(x.contiguous(memory_format=torch.channels_last))
        return F.relu(self.hidden(F.dropout(h.flatten(1), 0.3, self.training)))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.features(x))


def train_classifier(
    train: Dataset, *, epochs: int = 10, batch_size: int = 128, lr: float = 4e-3, seed: int = 0, progress: bool = True
) -> Classifier:
    """A :class:`Classifier` of labelled 32x32 images: AdamW, one cycle, bf16 autocast, shifts by up to two pixels."""
    if train.labels is None or train.shape[1:] != (32, 32):
        raise ValueError(f"data: expected labelled 32x32 images, got {train.shape}, labels {train.labels is not None}")
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.manual_seed(seed)
        net = Classifier(train.shape[0], len(train.classes)).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05, fused=True)
        batches = -(-len(train) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * batches, pct_start=0.2)
        with progress_bar(epochs * batches, "classifier", "step", progress) as bar:
            for epoch in range(epochs):
                for index in epoch_order(len(train), epoch, seed).split(batch_size):
                    shift = torch.randint(-2, 3, (2,), dtype=torch.int64, device="cpu")
                    x = train.x_0(index).roll(shift.tolist(), (2, 3))  # the border is black: rolling is shifting
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = F.cross_entropy(net(x).float(), train.labels[index], label_smoothing=0.05)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    bar.update()
    return net.eval().requires_grad_(False)


def save_classifier(net: Classifier, path: str | os.PathLike, accuracy: float) -> None:
    """Write ``net`` and its test accuracy, for :func:`load_classifier`; the weights as float16."""
    write(path, {"classifier": 1, "accuracy": accuracy}, {k: v.half() for k, v in floating(net.state_dict()).items()})


def load_classifier(path: str | os.PathLike = CLASSIFIER) -> tuple[Classifier, float]:
    """A classifier and its test accuracy. Raises ValueError for a file that is none."""
    description, tensors = read(path)
    if type(description.get("classifier")) is not int or description["classifier"] != 1:
        raise ValueError(f"{path}: expected a classifier, got {', '.join(description)}")
    try:
        share = checked_float("accuracy", description.get("accuracy"), "a share", lambda value: 0 <= value <= 1)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    with Blueprint():
        net = Classifier().float()
    fill(net, tensors, path)
    return net.eval().requires_grad_(False), share


@torch.inference_mode()
def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 500) -> Tensor:
    return torch.cat([function(part.float() / 127.5 - 1) for part in x.split(batch_size)])


def features(net: Classifier, images: Tensor) -> Tensor:
    """uint8 images [K, C, 32, 32] -> [K, 64] float64."""
    return _in_batches(net.features, images).double()


def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 images [K, C, 32, 32] that ``net`` gives their label [K]."""
    return (_in_batches(net, images).argmax(1) == labels).double().mean().item()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between the Gaussians of two sets of features [K, D] and [L, D] (Dowson & Landau 1982; Heusel et al. 2017).

    |m_a - m_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64. The roots are of symmetric matrices, by
    eigenvalues with those below 0 (rounding) taken as 0, so that singular covariances are no trouble.
    """
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 2 or len(x) < 2 or x.shape[1] != a.shape[1]:
            raise ValueError(f"{name}: expected features [at least 2, {a.shape[-1]}], got {tuple(x.shape)}")
    a, b = a.double(), b.double()
    cov_a, cov_b = a.T.cov().reshape(a.shape[1], -1), b.T.cov().reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root_a = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, distance.item())


@torch.no_grad()
def eps_loss(
    model: Model, data: Dataset, *, n: int = 1000, buckets: int = 10, seed: int = 0, batch_size: int = 100
) -> list[float]:
    """The loss of Algorithm 1 on the first ``n`` images, for each of ``buckets`` equal parts of 0..T-1.

    t and eps are functions of the seed, the image's number and the bucket: the same for every model.
    """
    if model.prediction != "eps":
        raise ValueError(f"prediction: expected 'eps', got {model.prediction!r}")
    if data.shape != model.shape:
        raise ValueError(f"data: expected images of shape {model.shape}, got {data.shape}")
    T, n = model.schedule.T, min(n, len(data))
    if not 1 <= buckets <= T:
        raise ValueError(f"buckets: expected 1..{T}, got {buckets}")
    device, table = model.device, model.schedule.q_table(model.device)
    known = model.classes is not None and data.labels is not None
    losses = []
    for bucket in range(buckets):
        low, high = bucket * T // buckets, (bucket + 1) * T // buckets
        w = words(np.arange(n), bucket, LOSS_STREAM, seed)
        t = torch.from_numpy((low + (w[:, 2] * np.uint64(high - low) >> np.uint64(32))).astype(np.int64))
        seeds = torch.from_numpy((w[:, 0] | w[:, 1] << np.uint64(32)).view(np.int64))
        total = 0.0
        for index in torch.arange(n, dtype=torch.int64, device="cpu").split(batch_size):
            x_0, labels = data.x_0(index).to(device), data.labels[index].to(device) if known else None
            t_i, seeds_i = t[index].to(device), seeds[index].to(device)
            out = model(ops.q_sample(x_0, t_i, seeds_i, table), t_i, labels)[:, : model.shape[0]]
            total += ops.noise_loss(out.contiguous(), seeds_i, t_i).double().sum().item()
        losses.append(total / n)
    return losses


@dataclass(frozen=True)
class Row:
    """One sampler's samples, seeds 0..n-1 and labels in turn, held against the training set."""

    sampler: str
    steps: int
    n: int
    distance: float  # to the training set
    floor: float  # of as many test images to the training set
    agreement: float | None  # share of the samples that the classifier gives the label asked for
    seconds: float  # an image


RUNS = (("ddpm", 1000), ("ddim", 50), ("ddim", 20), ("ddim", 10))


def evaluate(
    model: Model,
    train: Dataset,
    test: Dataset,
    net: Classifier,
    *,
    n: int = 10_000,
    runs: Sequence[tuple[str, int]] = RUNS,
    guidance: float = 1.0,
    batch_size: int = 100,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Iterator[Row]:
    """Sample ``n`` images by each of ``runs`` (sampler, steps) and compare; a row as soon as it is known."""
    if model.shape != train.shape:
        raise ValueError(f"model: expected images of shape {train.shape}, got {model.shape}")
    if not 2 <= n <= len(test):
        raise ValueError(f"n: expected 2..{len(test)} (the floor takes as many test images), got {n}")
    real = features(net, train.images)
    floor = frechet_distance(features(net, test.images[:n]), real)
    labels = None if model.classes is None else torch.arange(n, dtype=torch.int64, device="cpu") % len(model.classes)
    for sampler, steps in runs:
        start = time.perf_counter()
        x = sample(
            model,
            n,
            labels=labels,
            guidance=guidance,
            sampler=sampler,
            steps=steps,
            batch_size=batch_size,
            dtype=dtype,
            progress=progress,
        )
        seconds = (time.perf_counter() - start) / n
        images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()
        agreement = None if labels is None else accuracy(net, images, labels)
        yield Row(sampler, steps, n, frechet_distance(features(net, images), real), floor, agreement, seconds)
