"""The model, data and settings of a run, checked against each other before anything is changed."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from .. import parallel
from ..data import Dataset, Items, as_dataset
from ..engine import is_optimized
from ..io.description import check_model, checked_state
from ..io.files import state
from ..model import Model, checked_device
from ..networks import UNet
from ..samplers import LEARNED
from .config import Config, plain
from .noising import Noising
from .objectives import OBJECTIVES, Objective
from .times import TIMES

FIXED = ("schedule", "prediction", "objective", "times", "times_mean", "times_std", "seed", "ema_profiles")
"""The settings that a run keeps from its first step to its last."""


@dataclass(frozen=True)
class Fitted:
    """A model, data and settings that fit each other; ``config`` says what the model told."""

    model: Model
    dataset: Dataset | Items
    validation: Dataset | Items | None
    config: Config
    device: torch.device
    objective: Objective | None = None  # of a flow, which has no t
    noising: Noising | None = None


def fitted(model: Model, dataset: Any, config: Config, *, device: Any = None, validation: Any = None) -> Fitted:
    """Check what a run is to be made of, as :class:`Trainer` takes it; nothing is changed.

    Raises TypeError or ValueError for a model, data and config that do not fit each other.
    """
    if not isinstance(model.network, nn.Module) or is_optimized(model.network):
        name = type(model.network).__name__ + (" that was optimized" if is_optimized(model.network) else "")
        raise TypeError(f"network: expected a torch.nn.Module that can be trained, got {name}")
    config = settled(config, model)
    device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
    dataset = _fitting("data", as_dataset(dataset), model)
    validation = None if validation is None else _fitting("validation", as_dataset(validation), model)
    objective = config.made_objective()
    _check(model, config, objective, dataset)
    learns = model.learned_variance and model.variance not in LEARNED
    variance = "learned" if learns else model.default_variance
    noising = Noising(objective, model.schedule, variance, device)
    _check_description(model, config)
    return Fitted(model, dataset, validation, config, device, objective, noising)


def settled(config: Config, model: Model) -> Config:
    """``config`` with the model's process, and its prediction and objective where it names none."""
    return replace(
        config,
        schedule=model.description()["schedule"],
        prediction=config.prediction or model.prediction,
        objective=config.objective or model.schedule.objective,
    )


def changed(config: Config, changes: Mapping[str, Any], model: Model, steps: int, path: str | os.PathLike) -> Config:
    """The settings of the run of ``path``, which has taken ``steps``, with ``changes``.

    Raises ValueError for a change of what a run keeps, and for fewer steps than have been taken.
    """
    kept = {name: getattr(config, name) for name in FIXED}
    kept["network"] = model.network.config if isinstance(model.network, UNet) else config.network
    for name in changes.keys() & kept.keys():
        wanted, stored = changes[name], kept[name]
        if isinstance(wanted, dict) and isinstance(stored, dict):  # it says as much as it wants to
            stored = {key: stored.get(key) for key in wanted}
        if _as_json(wanted) != _as_json(stored):
            raise ValueError(f"{name}: expected that of {path}, {stored}, got {wanted}")
    new = replace(config, **{**changes, "network": config.network, "schedule": config.schedule})
    if bool(new.snapshot_every) != bool(config.snapshot_every):
        expected = "an int >= 1" if config.snapshot_every else "0"
        raise ValueError(f"snapshot_every: expected {expected}, as {path} has, got {new.snapshot_every}")
    if "steps" in changes and new.steps < steps:
        raise ValueError(f"steps: expected at least the {steps} that {path} has taken, got {new.steps}")
    return new


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(plain(value)))


def _check_description(model: Model, config: Config) -> None:
    """Refuse before the first step what could not be read again after the last."""
    check_model(_as_json(model.description()), len(state(model.network)))
    checked_state(_as_json({"config": asdict(config), "steps": 0, "examples": 0}), Config)


def _check(model: Model, config: Config, objective: Objective, data: Dataset | Items) -> None:
    """Raise ValueError for settings that the model cannot be trained by."""
    if next(model.network.parameters(), None) is None:
        raise ValueError("network: expected one with parameters, got none")
    if model.variance == "full":
        raise ValueError("variance: expected another one (diffkern.covariance has the loss of this one), got 'full'")
    if config.times == "importance" and not model.schedule.discrete:
        raise ValueError(f"times: expected {', '.join(TIMES)} or None without time steps, got 'importance'")
    if model.learned_variance != (objective.vlb != 0):
        whose = "a learned variance" if model.learned_variance else "a fixed variance"
        with_bound = [name for name, make in OBJECTIVES.items() if (make().vlb != 0) == model.learned_variance]
        expected = f"one of {', '.join(with_bound)} with a network of {whose}"
        raise ValueError(f"objective: expected {expected}, got {config.objective!r}")
    if model.prediction != config.prediction:
        raise ValueError(f"prediction: expected {config.prediction!r}, which is trained, got {model.prediction!r}")
    if config.label_dropout and not model.null_class:
        raise ValueError(f"label_dropout: expected 0 for a network without a null class, got {config.label_dropout}")
    if config.flip and len(data.shape) != 3:
        raise ValueError(f"flip: expected False of what is no image (C, H, W), got True with shape {data.shape}")
    check_parts(config)


def check_parts(config: Config) -> None:
    """Raise ValueError for a batch that cannot be shared among processes and parts."""
    parts = parallel.world() * config.accumulate
    if config.batch_size % parts:
        expected = f"a multiple of the {parallel.world()} processes"
        expected += f" times {config.accumulate} parts" if config.accumulate > 1 else ""
        raise ValueError(f"batch_size: expected {expected}, got {config.batch_size}")


def _fitting(name: str, data: Dataset | Items, model: Model) -> Dataset | Items:
    """``data`` with the labels of the model's classes. Raises ValueError for data that the model does not take."""
    kind = "images" if isinstance(data, Dataset) else "items"
    if isinstance(data, Items):
        data = replace(data, conditions=tuple(condition.name for condition in model.conditions))
    if model.codec is None and data.shape != model.shape:
        raise ValueError(f"{name}: expected {kind} of shape {model.shape}, got {data.shape}")
    data = data.in_order_of(model.classes)
    if data.classes != model.classes:
        raise ValueError(f"{name}: expected the classes {model.classes}, got {data.classes}")
    if model.num_classes is not None and not data.labelled:
        expected = f"{kind} with labels of {model.num_classes} classes"
        raise ValueError(f"{name}: expected {expected}, got {kind} without labels")
    if isinstance(model.network, UNet):
        levels = len(model.network.config["channel_mult"])
        if any(size % 2 ** (levels - 1) for size in model.shape[1:]):
            raise ValueError(
                f"size: expected a multiple of {2 ** (levels - 1)} for a network of {levels} levels, "
                f"got images of {model.shape[1]} x {model.shape[2]}"
            )
    return data
