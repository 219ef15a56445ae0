"""A small classifier whose features images are compared by, where no other feature network is at hand.

The one that ships is of Fashion-MNIST: Inception's features say little about 28x28 clothes. Distances are comparable
among themselves, and with that of real images, never with published FIDs.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..classifier import CLASSIFIERS, NoisyClassifier, one_cycle
from ..data import Dataset, epoch_order, words
from ..images import from_pixels
from ..io.files import fill, floating, read, write
from ..networks.blueprint import Blueprint
from ..networks.defaults import float32_on
from ..process import checked_float, checked_int
from ..progress import bar as progress_bar
from .loss import LOSS_STREAM, image_seeds

CLASSIFIER = CLASSIFIERS / "fashion-mnist.safetensors"
"""The classifier that ships, so that distances measured anywhere are in the same feature space."""

LARGEST_SIZE = 2**16  # channels or classes of a classifier's file: more are refused


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
    seeds = image_seeds(words(np.arange(n), 0, LOSS_STREAM, seed)).to(device)
    shares = []
    for time_step in times:
        right = 0
        for index in torch.arange(n, dtype=torch.int64, device="cpu").split(100):
            t = torch.full(index.shape, time_step, dtype=torch.int64, device=device)
            logits = classifier(ops.q_sample(data.x_0(index).to(device), t, seeds[index], table), t)
            right += (logits.argmax(1).cpu() == data.labels[index]).sum().item()
        shares.append(right / n)
    return shares
