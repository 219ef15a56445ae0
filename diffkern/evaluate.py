"""How good is a model? The Frechet distance of its samples to real images, and its loss on images it has not seen.

The features are those of a small classifier of Fashion-MNIST, made here: Inception's say little about 28x28 clothes.
Distances are comparable among themselves, and with the distance of real test images, never with published FIDs.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import ops, samplers
from .arguments import check_guided, guidance_of
from .classifier import CLASSIFIERS, NoisyClassifier, one_cycle
from .data import Dataset, epoch_order, words
from .guidance import Guidance
from .images import from_pixels, to_uint8
from .io.files import fill, floating, read, write
from .model import Model
from .networks.blueprint import Blueprint
from .networks.defaults import float32_on
from .process import checked_float, checked_int
from .progress import bar as progress_bar
from .sampling import sample

CLASSIFIER = CLASSIFIERS / "fashion-mnist.safetensors"
"""The classifier that ships, so that distances measured anywhere are in the same feature space."""

LARGEST_SIZE = 2**16  # channels or classes of a classifier's file: more are refused

LOSS_STREAM = 5
"""The Philox stream of an image's noise seed, and of its t, in :func:`eps_loss` and :func:`noisy_accuracy`."""


class Classifier(nn.Module):
    """[N, channels, 32, 32] in [-1, 1] -> logits [N, classes]; ``features`` are what the last layer reads, [N, 64]."""

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
        torch.default_generator.manual_seed(seed)
        net = Classifier(train.shape[0], len(train.classes)).train()
        optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=0.05, fused=True)
        batches = -(-len(train) // batch_size)
        schedule = one_cycle(optimizer, lr, epochs * batches, rise=0.2)
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
    sizes = {"channels": net.convs[0].in_channels, "classes": net.out.out_features}
    weights = {key: tensor.half() for key, tensor in floating(net.state_dict()).items()}
    write(path, {"classifier": 1, "accuracy": accuracy, **sizes}, weights)


def load_classifier(path: str | os.PathLike = CLASSIFIER) -> tuple[Classifier, float]:
    """Read a classifier and its test accuracy. A file that tells no channels and classes has 1 and 10.

    Raises ValueError for a file that is none.
    """
    description, tensors = read(path)
    if type(description.get("classifier")) is not int or description["classifier"] != 1:
        raise ValueError(f"{path}: expected a classifier, got {', '.join(description)}")
    try:
        share = checked_float("accuracy", description.get("accuracy"), "a share", lambda value: 0 <= value <= 1)
        channels, classes = _size(description, "channels", 1), _size(description, "classes", 10)
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    with Blueprint():
        net = Classifier(channels, classes).float()
    fill(net, tensors, path)
    return net.eval().requires_grad_(False), share


def _size(description: Mapping[str, Any], name: str, absent: int) -> int:
    size, expected = description.get(name, absent), f"an int in 1..{LARGEST_SIZE}"
    if not 1 <= checked_int(name, size, expected) <= LARGEST_SIZE:
        raise ValueError(f"{name}: expected {expected}, got {size}")
    return size


@torch.inference_mode()
def _in_batches(function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int = 500) -> Tensor:
    return torch.cat([function(from_pixels(part)) for part in x.split(batch_size)])


def features(net: Classifier, images: Tensor) -> Tensor:
    """uint8 images [K, C, 32, 32] -> [K, 64] float64."""
    return _in_batches(net.features, images).double()


def accuracy(net: Classifier, images: Tensor, labels: Tensor) -> float:
    """The share of uint8 images [K, C, 32, 32] that ``net`` gives their label [K]."""
    return (_in_batches(net, images).argmax(1) == labels).double().mean().item()


def check_labelled(name: str, data: Dataset, shape: Sequence[int], classes: Sequence[str]) -> None:
    """Raise ValueError unless ``data`` are images of that shape, with labels of those classes."""
    if data.shape != tuple(shape):
        raise ValueError(f"{name}: expected images of shape {tuple(shape)}, got {data.shape}")
    if data.classes != tuple(classes):
        got = "images without labels" if data.classes is None else data.classes
        raise ValueError(f"{name}: expected the classes {tuple(classes)}, got {got}")


@torch.no_grad()
def noisy_accuracy(
    classifier: NoisyClassifier, data: Dataset, times: Sequence[int], *, n: int = 1000, seed: int = 0
) -> list[float]:
    """The share of the first ``n`` images that ``classifier`` gives their label, noised to each of ``times``.

    The noise is a function of the seed, the image's number and the time step: the same for every classifier.
    Raises ValueError for data of another shape or other classes than the classifier's, and without labels.
    """
    check_labelled("data", data, classifier.shape, classifier.classes)
    n, device = min(n, len(data)), next(classifier.network.parameters()).device
    table = classifier.schedule.q_table(device)
    seeds = _seeds(words(np.arange(n), 0, LOSS_STREAM, seed)).to(device)
    shares = []
    for time_step in times:
        right = 0
        for index in torch.arange(n, dtype=torch.int64, device="cpu").split(100):
            t = torch.full(index.shape, time_step, dtype=torch.int64, device=device)
            logits = classifier(ops.q_sample(data.x_0(index).to(device), t, seeds[index], table), t)
            right += (logits.argmax(1).cpu() == data.labels[index]).sum().item()
        shares.append(right / n)
    return shares


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


def precision_recall(real: Tensor, drawn: Tensor, *, k: int = 3, batch_size: int = 1000) -> tuple[float, float]:
    """Precision and recall of samples, by the k nearest neighbours of their features (Kynkaanniemi et al. 2019, eq. 1).

    real, drawn  features of data and of samples, [K, D] and [L, D]: more than k of each. Both numbers depend on K and L
    k            a set's manifold is the balls around its points that reach to their k-th nearest neighbour in the set

    Precision is the share of ``drawn`` that lies in the manifold of ``real``, recall the share of ``real`` in that of
    ``drawn``. In float64. Raises TypeError or ValueError.
    """
    if checked_int("k", k, "an int >= 1") < 1:
        raise ValueError(f"k: expected an int >= 1, got {k}")
    for name, x in (("real", real), ("drawn", drawn)):
        if x.ndim != 2 or len(x) <= k or x.shape[1] != real.shape[-1]:
            raise ValueError(f"{name}: expected features [more than {k}, {real.shape[-1]}], got {tuple(x.shape)}")
    real, drawn = real.double(), drawn.double()

    def covered(x: Tensor, by: Tensor) -> float:
        def nearest(part: Tensor) -> Tensor:  # the first is the point itself
            return _distances(part, by).kthvalue(k + 1, dim=1).values

        radius = torch.cat([nearest(part) for part in by.split(batch_size)])
        inside = [(_distances(part, by) <= radius).any(1) for part in x.split(batch_size)]
        return torch.cat(inside).double().mean().item()

    return covered(drawn, real), covered(real, drawn)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean, from differences: a point is at 0 from itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@torch.no_grad()
def eps_loss(
    model: Model, data: Dataset, *, n: int = 1000, buckets: int = 10, seed: int = 0, batch_size: int = 100
) -> list[float]:
    """The loss of Algorithm 1 on the first ``n`` images, for each of ``buckets`` equal parts of 0..T-1.

    t and eps are functions of the seed, the image's number and the bucket: the same for every model.
    """
    if model.prediction != "eps":
        raise ValueError(f"prediction: expected 'eps', got {model.prediction!r}")
    if not model.schedule.discrete:
        raise ValueError(f"schedule: expected one of time steps, got {model.schedule}")
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
        seeds = _seeds(w)
        total = 0.0
        for index in torch.arange(n, dtype=torch.int64, device="cpu").split(batch_size):
            x_0, labels = data.x_0(index).to(device), data.labels[index].to(device) if known else None
            t_i, seeds_i = t[index].to(device), seeds[index].to(device)
            out = model(ops.q_sample(x_0, t_i, seeds_i, table), t_i, labels)[:, : model.shape[0]]
            total += ops.noise_loss(out.contiguous(), seeds_i, t_i).double().sum().item()
        losses.append(total / n)
    return losses


def _seeds(w: np.ndarray) -> Tensor:
    """The first two of each sample's Philox words: [N] int64."""
    return torch.from_numpy((w[:, 0] | w[:, 1] << np.uint64(32)).view(np.int64))


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
    guidance: float | Guidance = 1.0,
    batch_size: int = 100,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Iterator[Row]:
    """Sample ``n`` images by each of ``runs`` (sampler, steps) and compare; a row as soon as it is known.

    The call raises the errors of :func:`check`. The iterator does the work.
    """
    runs = tuple(runs)
    check(model, train, test, net, n=n, runs=runs, guidance=guidance)
    options = dict(guidance=guidance, batch_size=batch_size, dtype=dtype, progress=progress)
    return _rows(model, train, test, net, n, runs, options)


def check(
    model: Model,
    train: Dataset,
    test: Dataset,
    net: Classifier | None,
    *,
    n: int,
    runs: Sequence[tuple[str, int]],
    guidance: float | Guidance = 1.0,
) -> None:
    """Check the arguments of :func:`evaluate` before a network runs; ``net`` is None where it is yet to be trained.

    Raises TypeError or ValueError that names the argument.
    """
    if model.shape != train.shape:
        raise ValueError(f"model: expected images of shape {train.shape}, got {model.shape}")
    if test.shape != train.shape:
        raise ValueError(f"test: expected images of shape {train.shape}, got {test.shape}")
    channels = train.shape[0] if net is None else net.convs[0].in_channels
    if train.shape != (channels, 32, 32):
        raise ValueError(f"train: expected images of the classifier's shape {(channels, 32, 32)}, got {train.shape}")
    expected = f"2..{len(test)} (the floor takes as many test images)"
    if not 2 <= checked_int("n", n, expected) <= len(test):
        raise ValueError(f"n: expected {expected}, got {n}")
    check_guided(guidance_of(guidance, model, model.device), labels_in_turn(model, n), model, n)
    for sampler, steps in runs:
        if sampler not in samplers.SAMPLERS:
            raise ValueError(f"runs: expected a sampler among {', '.join(samplers.SAMPLERS)}, got {sampler!r}")
        samplers.SAMPLERS[sampler].trace(model.schedule.grid(steps), model.prediction)


def _rows(
    model: Model,
    train: Dataset,
    test: Dataset,
    net: Classifier,
    n: int,
    runs: Sequence[tuple[str, int]],
    options: dict[str, Any],
) -> Iterator[Row]:
    real = features(net, train.images)
    floor = frechet_distance(features(net, test.images[:n]), real)
    labels = labels_in_turn(model, n)
    for sampler, steps in runs:
        start = time.perf_counter()
        x = sample(model, n, labels=labels, sampler=sampler, steps=steps, **options)
        seconds = (time.perf_counter() - start) / n
        images = torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous()
        agreement = None if labels is None else accuracy(net, images, labels)
        yield Row(sampler, steps, n, frechet_distance(features(net, images), real), floor, agreement, seconds)


# --- quality over network calls ---

CURVES = ("ddim", "dpmpp_2m", "unipc", "heun", "ddpm")
"""The samplers that are compared over network calls, unless others are named."""

LIMIT_STEPS = 1000  # or all time steps; on the shipped model 100 of them leave an rms error of .006, and 400 of .002


def steps_within(model: Model, sampler: str, calls: int) -> int:
    """The most steps that a sampler takes in that many network calls, one at least."""
    made, steps = samplers.SAMPLERS[sampler], max(1, calls // samplers.SAMPLERS[sampler].calls)
    most = model.schedule.T if model.schedule.discrete else calls
    while steps < most and made.trace(model.schedule.grid(steps + 1), model.prediction).calls <= calls:
        steps += 1
    return min(steps, most)


def distances_to_limit(
    model: Model, runs: Sequence[tuple[str, int]], *, n: int = 8, guidance: float = 1.0, **options: Any
) -> list[float | None]:
    """How far the images of ``runs`` (sampler, steps) are from those of the exact ODE: the rms difference of a pixel.

    Images are of the seeds 0..n-1 and labels in turn, unclipped. The ODE is solved by UniPC of order 3 in
    :data:`LIMIT_STEPS` steps from the same x_T. None for a sampler that draws noise: it solves no ODE.

    options  of :func:`diffkern.sample`: batch_size, dtype, progress
    """
    options |= dict(labels=labels_in_turn(model, n), guidance=guidance, clip=False)
    steps = min(LIMIT_STEPS, model.schedule.T) if model.schedule.discrete else LIMIT_STEPS
    limit = sample(model, n, sampler="unipc", order=3, steps=steps, **options).double()
    found = []
    for name, steps in runs:
        program = samplers.SAMPLERS[name].trace(model.schedule.grid(steps), model.prediction)
        if any(row.noise is not None for row in program.rows):
            found.append(None)
            continue
        x = sample(model, n, sampler=name, steps=steps, **options).double()
        found.append((x - limit).square().mean().sqrt().item())
    return found


def labels_in_turn(model: Model, n: int) -> Tensor | None:
    """int64 [n]: 0, 1, 2, ... and from the first class again; None for a model without classes."""
    return None if model.classes is None else torch.arange(n, dtype=torch.int64, device="cpu") % len(model.classes)
