"""The task of a normalizing flow: -log2 p(x) / D, whose density is exact."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import images, parallel
from ..data import Batch, Dataset, Items
from ..flows.files import build, check_flow
from ..flows.flow import Flow, bits_of, log_normal
from ..likelihood.draws import dequantized
from .batches import Batches
from .config import Config
from .draws import Draws
from .task import Given, Task
from .times import Uniform

DIFFUSION = {
    *("network", "schedule", "prediction", "objective", "times", "times_mean", "times_std"),
    *("label_dropout", "bf16"),
}
"""The settings of a :class:`Config` that a flow has not."""


class MaximumLikelihood(Task):
    """Bits a dimension.

    Images of a :class:`diffkern.data.Dataset` are dequantized with new noise each time that they are seen. Items of
    other datasets are continuous. Layers that start from data take their mean and scale from the first step's batch.
    """

    model: Flow
    clock, times = 1, Uniform()  # a flow has one time

    def __init__(
        self,
        model: Flow,
        config: Config,
        device: torch.device,
        dataset: Dataset | Items,
        validation: Dataset | Items | None,
    ):
        if validation is not None and _levels(validation) != _levels(dataset):
            expected, got = type(dataset).__name__, type(validation).__name__
            raise ValueError(f"validation: expected a {expected}, as data are, got {got}")
        self.model, self.levels = model, _levels(dataset)

    @staticmethod
    def settled(config: Config, model: Flow) -> Config:
        for field in fields(Config):
            expected, got = getattr(Config(), field.name), getattr(config, field.name)
            if field.name in DIFFUSION and got != expected:
                raise ValueError(f"{field.name}: expected {expected} for a flow, got {got}")
        return config

    @staticmethod
    def fitting(name: str, data: Dataset | Items, model: Flow) -> Dataset | Items:
        if data.shape != model.shape:
            raise ValueError(f"{name}: expected samples of shape {model.shape}, got {data.shape}")
        return data

    @staticmethod
    def check(description: dict[str, Any], tensors: int) -> None:
        check_flow(description, tensors)

    @staticmethod
    def planned(description: dict[str, Any], tensors: dict[str, Tensor], path: Path, into: Any) -> Flow:
        if into is not None:
            raise ValueError(f"into: expected None for a flow, which its file describes, got {type(into).__name__}")
        return build(description, tensors, path, prefix="network.")

    @staticmethod
    def built(
        description: dict[str, Any], tensors: dict[str, Tensor], path: Path, into: Any, device: torch.device
    ) -> Flow:
        return build(description, tensors, path, prefix="network.").to(device)

    @property
    def network(self) -> Flow:
        return self.model

    def _with(self, network: Flow) -> Flow:
        return network

    def initialize(self, batches: Batches) -> None:
        self.model.initialize(parallel.joined_rows(self._values(batches.at((0, 0)))))

    def given(self, batch: Batch, draws: Draws) -> Given:
        return Given(batch.x_0, None, draws, {})

    def losses(self, network: Any, batch: Given) -> Tensor:
        z, log_det = network(self._values(batch))
        return bits_of(log_normal(z) + log_det, self.model.shape, self.levels)

    def _values(self, batch: Given) -> Tensor:
        """x [N, ...] of a batch, dequantized, as the flow takes it."""
        like = next(self.model.parameters())
        return dequantized(batch.x_0, batch.draws.seeds, self.levels).to(like)

    @property
    def draws_images(self) -> bool:
        return len(self.model.shape) == 3 and self.model.shape[0] in (1, 3)

    def grid(self, data: Dataset | Items, n: int, steps: int):
        return images.grid(self.model.sample(n), columns=10)


def _levels(data: Dataset | Items) -> int | None:
    """How many values a dimension has: None of continuous data."""
    return 256 if isinstance(data, Dataset) else None
