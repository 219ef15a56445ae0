"""Classifiers of noisy images, for guidance: the network with what it was trained on, as one object and one file."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .io import foreign
from .io.description import check_schedule
from .io.files import fill, read, write
from .model import checked_device
from .networks import HalfUNet
from .networks.blueprint import Blueprint
from .process import Process
from .schedule import Schedule

CLASSIFIERS = Path(__file__).parent / "classifiers"
"""The folder of the shipped classifiers."""

FORMAT = 1
KEYS = ("network", "schedule", "shape", "classes")


@dataclass(repr=False)
class NoisyClassifier:
    """log p(y | x_t), up to a constant, for ``Guidance(classifier=...)``.

    network   [N, C, H, W] x_t, [N] t -> logits [N, K]
    schedule  of the noise in x_t
    shape     (C, H, W) of an image
    classes   a name for each label 0..K-1
    """

    network: HalfUNet
    schedule: Schedule
    shape: tuple[int, ...]
    classes: tuple[str, ...]

    def __post_init__(self):
        check_time_steps(self.schedule)
        config = self.network.config
        for name, length in (("shape", 3), ("classes", config["num_classes"])):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != length:
                raise ValueError(f"{name}: expected {length} entries, got {value!r}")
            setattr(self, name, tuple(value))
        if not all(isinstance(name, str) for name in self.classes):
            raise TypeError(f"classes: expected names, got {self.classes}")
        if self.shape[0] != config["in_channels"]:
            raise ValueError(f"shape: expected the network's {config['in_channels']} channels, got {self.shape}")

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x_t, t, labels)


def check_time_steps(schedule: Process) -> None:
    """Raise ValueError for a process without time steps, by which no classifier of noisy images is told the noise."""
    if not schedule.discrete:
        raise ValueError(f"schedule: expected one of time steps, got {schedule}")


def one_cycle(
    optimizer: torch.optim.Optimizer, lr: float, steps: int, rise: float
) -> torch.optim.lr_scheduler.OneCycleLR:
    """One cycle of the learning rate (Smith & Topin 2019): up to ``lr`` in the share ``rise`` of ``steps``, then down.

    torch divides by the number of steps between the first and the end of the rise: none where that is one step.
    """
    if rise * steps == 1:
        rise = 1.5 / steps
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=rise)


def save_noisy_classifier(classifier: NoisyClassifier, path: str | os.PathLike) -> None:
    """Write ``classifier`` for :func:`load_noisy_classifier`; the weights as float16."""
    description = {
        "noisy_classifier": FORMAT,
        "network": classifier.network.config,
        "schedule": classifier.schedule.config(),
        "shape": classifier.shape,
        "classes": classifier.classes,
    }
    write(path, description, {name: tensor.half() for name, tensor in classifier.network.state_dict().items()})


def load_noisy_classifier(name: str | os.PathLike, device: torch.device | str | None = None) -> NoisyClassifier:
    """Load a shipped classifier by its name, a file of :func:`save_noisy_classifier`, or one that openai published.

    Weights are float32 and frozen. Raises FileNotFoundError for a name or path that is not there, ValueError for a file
    that is no classifier of noisy images.
    """
    shipped = CLASSIFIERS / f"{os.fspath(name)}.safetensors"
    path = shipped if isinstance(name, str) and shipped.exists() else Path(name)
    if path.is_file() and foreign.is_foreign(path):
        classifier = NoisyClassifier(**foreign.read_classifier(path))
        classifier.network.to(checked_device(device))
        return classifier
    description, tensors = read(path)
    version = description.get("noisy_classifier")
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"{path}: expected a classifier of noisy images, got {', '.join(description)}")
    try:
        network, schedule, shape, classes = (description.get(key) for key in KEYS)
        check_schedule(schedule)
        if not isinstance(network, dict):
            raise TypeError(f"network: expected an object, got {network!r}")
        with Blueprint():
            network = HalfUNet(**network).float()
        classifier = NoisyClassifier(network, Schedule.from_config(schedule), shape, classes)
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        message, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: {message[:500]}") from None
    fill(network, tensors, path, checked_device(device))
    network.eval().requires_grad_(False)
    return classifier
