"""The settings of a training run."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from ..prediction import PREDICTIONS
from ..process import checked_count, checked_float, checked_int
from ..schedule import Schedule
from .objectives import OBJECTIVES, Objective
from .times import TIMES

LR_SCHEDULES = ("constant", "cosine")
TRAINED = tuple(name for name in PREDICTIONS if name != "mu")  # which is of a step, not of a level of noise
"""The predictions that a network can be trained on."""
WIDEST = 0.28
"""The largest relative width of an average: that of equal weights is 12^-1/2."""
DRAWN = (*TIMES, "importance")
"""The ways to draw t."""


def option(default: Any, text: str, **kwargs) -> Any:
    """A field of :class:`Config`; the command line makes its options from these."""
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": text, **kwargs})
    return field(default=default, metadata={"help": text, **kwargs})


def plain(value: Any) -> Any:
    """``value`` with the numbers of numpy and torch in it, at any depth, as Python's, which JSON can hold."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([plain(item) for item in value])
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else value


def as_json(value: Any) -> Any:
    """``value`` as it is read from a file again."""
    return json.loads(json.dumps(plain(value)))


@dataclass(frozen=True)
class Config:
    """A training run but for its data. ``network`` holds a UNet's arguments, ``schedule`` a process's ``config()``.

    ``prediction`` and ``objective`` are those of the process unless they are given: eps and simple of a schedule.
    Numbers of numpy and torch become Python's. Raises TypeError or ValueError for values with which no run can be made.
    """

    steps: int = option(100_000, "optimizer steps in all")
    batch_size: int = option(64, "images a step, of all processes together")
    accumulate: int = option(1, "parts in which a step takes its images, one after the other: less memory")
    workers: int = option(0, "processes that read a dataset's items ahead; images of a folder are in memory")
    lr: float = option(2e-4, "learning rate of AdamW")
    lr_schedule: str = option("constant", "after the warm-up", choices=LR_SCHEDULES)
    warmup: int = option(500, "steps over which the learning rate rises from 0")
    betas: tuple[float, float] = option((0.9, 0.99), "of AdamW")
    weight_decay: float = option(0.0, "of AdamW")
    grad_clip: float = option(1.0, "largest norm of the gradient (0: no limit)")
    prediction: str | None = option(None, "what the network learns to predict", choices=TRAINED, shown="the process's")
    objective: str | None = option(
        None, "how its error counts at each level of noise", choices=OBJECTIVES, shown="the process's"
    )
    times: str | None = option(None, "how t is drawn", choices=DRAWN, shown="the objective's")
    times_mean: float | None = option(None, "of the normal behind logit_normal or log_normal", shown="0 or -1.2")
    times_std: float | None = option(None, "its standard deviation", shown="1 or 1.2")
    ema: float = option(0.999, "decay of the weights' average; min(ema, (1 + step) / (10 + step)) early on")
    snapshot_every: int = option(
        0, "steps between snapshots of the averages of ema_profiles, ema-0005000.safetensors (0: none)"
    )
    ema_profiles: tuple[float, float] = option(
        (0.05, 0.1), "relative widths of the two averages in a snapshot, from which export --ema makes one of any width"
    )
    label_dropout: float = option(0.1, "share of labels replaced by the null class, for classifier-free guidance")
    flip: bool = option(False, "mirror half of the images")
    bf16: bool = option(False, "autocast to bfloat16")
    seed: int = option(0, "of all that is drawn")
    checkpoint_every: int = option(1000, "steps between checkpoints")
    keep_every: int = option(0, "steps between checkpoints that stay, checkpoint-0005000.safetensors (0: none)")
    validate_every: int = option(1000, "steps between measurements of the loss on held-out data")
    sample_every: int = option(5000, "steps between sample grids (0: none)")
    log_every: int = option(100, "steps between the lines of log.csv")
    tensorboard: bool = option(False, "write the log and the sample grids for TensorBoard, too")
    network: dict = option({}, "arguments of diffkern.unet.UNet")
    schedule: dict = option(Schedule.linear(1000).config(), "config() of a diffkern.Schedule or another process")

    def __post_init__(self):
        positive = ("steps", "batch_size", "accumulate", "checkpoint_every", "validate_every", "log_every")
        counts = ("workers", "warmup", "keep_every", "sample_every", "snapshot_every")
        for name, low in (dict.fromkeys(positive, 1) | dict.fromkeys(counts, 0)).items():
            self._set(name, checked_count(name, getattr(self, name), low))
        self._set("seed", checked_int("seed", self.seed, "an int in [-2^63, 2^64)"))
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed: expected an int in [-2^63, 2^64), got {self.seed}")
        for name, expected, holds in (
            ("lr", "a number > 0", lambda value: value > 0),
            ("weight_decay", "a number >= 0", lambda value: value >= 0),
            ("grad_clip", "a number >= 0", lambda value: value >= 0),
            ("ema", "a number in [0, 1)", lambda value: 0 <= value < 1),
            ("label_dropout", "a probability", lambda value: 0 <= value <= 1),
        ):
            self._set(name, checked_float(name, getattr(self, name), expected, holds))
        self._set_pair("betas", "two numbers in [0, 1)", lambda value: 0 <= value < 1)
        self._set_pair("ema_profiles", f"two numbers in (0, {WIDEST}]", lambda value: 0 < value <= WIDEST)
        if self.ema_profiles[0] == self.ema_profiles[1]:
            raise ValueError(f"ema_profiles: expected two numbers that differ, got {self.ema_profiles}")
        for name in ("flip", "bf16", "tensorboard"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}: expected True or False, got {getattr(self, name)!r}")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule: expected one of {LR_SCHEDULES}, got {self.lr_schedule!r}")
        for name, known in (("prediction", TRAINED), ("objective", tuple(OBJECTIVES)), ("times", DRAWN)):
            if getattr(self, name) not in (None, *known):
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, expected, holds in (
            ("times_mean", "a number", lambda value: True),
            ("times_std", "a number > 0", lambda value: value > 0),
        ):
            if getattr(self, name) is not None:
                if self.times not in ("logit_normal", "log_normal"):
                    raise ValueError(f"{name}: expected None without times of a normal, got {getattr(self, name)!r}")
                self._set(name, checked_float(name, getattr(self, name), expected, holds))
        for name in ("network", "schedule"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name}: expected a dict, got {type(getattr(self, name)).__name__}")
            self._set(name, plain(getattr(self, name)))

    def _set_pair(self, name: str, expected: str, holds: Callable[[float], bool]) -> None:
        values = tuple(getattr(self, name))
        if len(values) != 2:
            raise ValueError(f"{name}: expected {expected}, got {values}")
        self._set(name, tuple(checked_float(name, value, expected, holds) for value in values))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # past ``frozen``

    def made_objective(self) -> Objective:
        """The objective that these settings name; ``prediction`` and ``objective`` must be there."""
        objective = OBJECTIVES[self.objective](prediction=self.prediction)
        if self.times in (None, "importance"):
            return objective
        given = {"mean": self.times_mean, "std": self.times_std}
        times = TIMES[self.times](**{name: value for name, value in given.items() if value is not None})
        return replace(objective, t=times)

    def learning_rate(self, step: int) -> float:
        """Return the rate at the 0-based ``step``: linear warm-up, then constant or half a cosine to 0 at ``steps``."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))) if self.lr_schedule == "cosine" else 1.0
        return self.lr * rise * fall


def config_fields() -> list:
    """The fields of :class:`Config` that are single values: what the command line offers as options."""
    return [f for f in fields(Config) if f.name not in ("network", "schedule")]
