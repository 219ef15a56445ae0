"""Training of a flow by maximum likelihood: :class:`Trainer` with another loss, -log2 p(x) / D."""

import contextlib
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import images, parallel
from ..data import Dataset, as_dataset
from ..flows.files import build, check_flow
from ..flows.flow import Flow, bits_of, log_normal
from ..likelihood.draws import dequantized
from ..model import checked_device
from ..progress import bar as progress_bar
from .batches import Batches, Given
from .checkpoint import read_checkpoint, restore_modes
from .config import Config
from .fitting import Fitted, changed, check_parts
from .times import Uniform
from .trainer import Trainer

DIFFUSION = {
    *("network", "schedule", "prediction", "objective", "times", "times_mean", "times_std"),
    *("label_dropout", "bf16"),
}
"""The settings of a :class:`Config` that a flow has not."""

NO_T = 1, Uniform()  # time steps, and how t is drawn: a flow has one


@dataclass(frozen=True)
class FlowModel:
    """A flow in the place of a :class:`diffkern.Model`: what :class:`Trainer` and its parts ask of one."""

    network: Flow
    codec: None = None
    conditions: tuple[()] = ()
    classes: None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.network.shape

    @property
    def device(self) -> torch.device:
        return self.network.device

    def description(self) -> dict[str, Any]:
        return self.network.description()


class FlowTrainer(Trainer):
    """The state of a run: the flow, its average, AdamW's moments, and two counters.

    ``flow`` is the averaged one, and what to sample from. The loss is bits a dimension. Images of a
    :class:`diffkern.data.Dataset` are dequantized with new noise each time that they are seen. Items of other datasets
    are continuous. Files, resumption and processes are those of :class:`Trainer`.

    flow        a ``RealNVP`` or ``Glow``; or any ``Flow``, which ``run`` and ``save`` refuse. It is trained in place.
                The layers that start from data take their mean and scale from the first step's batch
    data        a :class:`diffkern.data.Dataset`; or any map-style dataset, such as points [K, D]
    config      its settings but those in ``DIFFUSION``, which must keep their defaults
    validation  held-out data of the same kind, or None

    Raises TypeError or ValueError for data and settings that do not fit.
    """

    model: FlowModel

    def __init__(
        self,
        flow: Flow,
        data: Any,
        config: Config,
        *,
        device: torch.device | str | None = None,
        validation: Any = None,
    ):
        if not isinstance(flow, Flow):
            raise TypeError(f"flow: expected a Flow, got {type(flow).__name__}")
        run = fitted(FlowModel(flow), data, config, device=device, validation=validation)
        first = Batches(run.model, run.dataset, replace(config, workers=0, accumulate=1), *NO_T).at((0, 0))
        flow.to(run.device).initialize(parallel.joined_rows(_values(first, run.dataset, flow)))
        self._start(run, *NO_T)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        data: Any,
        *,
        device: torch.device | str | None = None,
        validation: Any = None,
        **changes,
    ) -> "FlowTrainer":
        """Continue the run of a checkpoint, as :meth:`Trainer.resume` does."""
        description, tensors, config = read_checkpoint(path, check_flow)
        training = description["training"]
        model = FlowModel(build(description, tensors, Path(path), prefix="network."))
        restore_modes(model.network, training)
        config = changed(config, changes, model, training["steps"], path)
        run = fitted(model, data, config, device=device, validation=validation)
        self = cls.__new__(cls)
        self._start(run, *NO_T)
        self._continue(training, tensors, path)
        return self

    @property
    def flow(self) -> Flow:
        return self.model.network

    def _losses(self, network: Any, batch: Given) -> Tensor:
        """-log2 p(x) / D of each example, [N]."""
        z, log_det = network(_values(batch, self.dataset, self.flow))
        return bits_of(log_normal(z) + log_det, self.flow.shape, _levels(self.dataset))

    def grid(self, n: int = 40):
        """A ``PIL.Image`` of n samples of the averaged flow, the same seeds each time."""
        return images.grid(self.flow.sample(n), columns=10)


def train_flow(flow: Flow, data: Any, config: Config, *, progress: bool = True, **options: Any) -> Flow:
    """Train ``flow`` in place for all of ``config.steps``, and return its average; nothing is written.

    ``flow`` may be of any layers. For the arguments, the options and the errors see :class:`FlowTrainer`.
    """
    trainer = FlowTrainer(flow, data, config, **options)
    bar = progress_bar(config.steps, "flow", "step", progress)
    with contextlib.closing(trainer.batches), bar:
        for step in range(config.steps):
            loss = trainer.step()
            bar.update()
            if (step + 1) % config.log_every == 0:
                bar.report(loss=f"{loss:.4f}")
    return trainer.flow


def fitted(model: FlowModel, data: Any, config: Config, *, device: Any, validation: Any) -> Fitted:
    """Check what a run is made of; nothing is changed. Raises TypeError or ValueError."""
    for field in fields(Config):
        expected, got = getattr(Config(), field.name), getattr(config, field.name)
        if field.name in DIFFUSION and got != expected:
            raise ValueError(f"{field.name}: expected {expected} for a flow, got {got}")
    data, validation = (None if given is None else as_dataset(given) for given in (data, validation))
    for name, given in (("data", data), ("validation", validation)):
        if given is not None and given.shape != model.shape:
            raise ValueError(f"{name}: expected samples of shape {model.shape}, got {given.shape}")
    if validation is not None and _levels(validation) != _levels(data):
        raise ValueError(f"validation: expected a {type(data).__name__}, as data are, got {type(validation).__name__}")
    if config.flip and len(model.shape) != 3:
        raise ValueError(f"flip: expected False of what is no image (C, H, W), got True with shape {model.shape}")
    check_parts(config)
    device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
    return Fitted(model, data, validation, config, device)


def _levels(data: Any) -> int | None:
    """How many values a dimension has: None of continuous data."""
    return 256 if isinstance(data, Dataset) else None


def _values(batch: Given, data: Any, flow: Flow) -> Tensor:
    """x [N, ...] of a batch, dequantized, as the flow takes it."""
    like = next(flow.parameters())
    return dequantized(batch.x_0, batch.draws.seeds, _levels(data)).to(like)
