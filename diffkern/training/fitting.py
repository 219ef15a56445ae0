"""The model, data and settings of a run, checked against each other before anything is changed."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import parallel
from ..data import Dataset, Items, as_dataset
from ..flows import Flow
from ..images import FAR
from ..model import Model, checked_device
from ..networks import UNet
from .config import Config, as_json
from .denoising import Denoising
from .maximum_likelihood import MaximumLikelihood
from .task import Task

FIXED = ("schedule", "prediction", "objective", "times", "times_mean", "times_std", "seed", "ema_profiles")
"""The settings that a run keeps from its first step to its last."""


def kind_of(model: Any) -> type[Task]:
    """The task of training ``model``. Raises TypeError for what is neither a model nor a flow."""
    if isinstance(model, Model):
        return Denoising
    if isinstance(model, Flow):
        return MaximumLikelihood
    raise TypeError(f"model: expected a diffkern.Model or a Flow, got {type(model).__name__}")


@dataclass(frozen=True)
class Fitted:
    """A task, data and settings that fit each other; ``config`` says what the model told."""

    task: Task
    dataset: Dataset | Items
    validation: Dataset | Items | None
    config: Config
    device: torch.device


def fitted(model: Any, dataset: Any, config: Config, *, device: Any = None, validation: Any = None) -> Fitted:
    """Check what a run is to be made of, as :class:`Trainer` takes it; nothing is changed.

    Raises TypeError or ValueError for a model, data and config that do not fit each other.
    """
    kind = kind_of(model)
    config = kind.settled(config, model)
    device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
    dataset = kind.fitting("data", as_dataset(dataset), model)
    validation = None if validation is None else kind.fitting("validation", as_dataset(validation), model)
    task = kind(model, config, device, dataset, validation)
    _warn_of_range(task, dataset)
    if config.flip and len(dataset.shape) != 3:
        raise ValueError(f"flip: expected False of what is no image (C, H, W), got True with shape {dataset.shape}")
    parts = parallel.world() * config.accumulate
    if config.batch_size % parts:
        expected = f"a multiple of the {parallel.world()} processes"
        expected += f" times {config.accumulate} parts" if config.accumulate > 1 else ""
        raise ValueError(f"batch_size: expected {expected}, got {config.batch_size}")
    return Fitted(task, dataset, validation, config, device)


def _warn_of_range(task: Task, data: Dataset | Items) -> None:
    """Warn of pictures whose first one is far from [-1, 1]: most likely they are pixels that became floats."""
    latents = isinstance(task.model, Model) and task.model.codec is None and task.model.clip is False
    if isinstance(data, Dataset) or not task.draws_images or latents:
        return
    largest = data.first.x_0.abs().max().item()
    if largest > FAR:
        expected = "floats in [-1, 1], or pixels as uint8 (latents: a model with clip=False)"
        warnings.warn(f"data: expected {expected}, got floats up to {largest:.4g} in item 0", stacklevel=4)


def changed(config: Config, changes: Mapping[str, Any], model: Model | Flow, steps: int, path: Path) -> Config:
    """The settings of the run of ``path``, which has taken ``steps``, with ``changes``.

    Raises ValueError for a change of what a run keeps, and for fewer steps than have been taken.
    """
    kept = {name: getattr(config, name) for name in FIXED}
    unet = isinstance(model, Model) and isinstance(model.network, UNet)
    kept["network"] = model.network.config if unet else config.network
    for name in changes.keys() & kept.keys():
        wanted, stored = changes[name], kept[name]
        if isinstance(wanted, dict) and isinstance(stored, dict):  # it says as much as it wants to
            stored = {key: stored.get(key) for key in wanted}
        if as_json(wanted) != as_json(stored):
            raise ValueError(f"{name}: expected that of {path}, {stored}, got {wanted}")
    new = replace(config, **{**changes, "network": config.network, "schedule": config.schedule})
    if bool(new.snapshot_every) != bool(config.snapshot_every):
        expected = "an int >= 1" if config.snapshot_every else "0"
        raise ValueError(f"snapshot_every: expected {expected}, as {path} has, got {new.snapshot_every}")
    if "steps" in changes and new.steps < steps:
        raise ValueError(f"steps: expected at least the {steps} that {path} has taken, got {new.steps}")
    return new
