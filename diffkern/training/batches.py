"""The batches of a run: which items each holds, and what is drawn for them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..data import Batch, Dataset, Items, epoch_order
from ..model import Model
from ..process import Process
from .config import Config
from .draws import Draws, draw
from .reading import Place, Reader
from .times import Importance, Times

HELD_OUT = 2**62
"""The examples from here on, which no run trains on, are those of the held-out data."""


class Given(NamedTuple):
    """A training batch: examples, labels, random draws and conditions."""

    x_0: Tensor  # [N, ...] float32
    labels: Tensor | None  # [N] int64, -1 where dropped
    draws: Draws
    conditions: dict[str, Tensor]  # [N, ...] by name, null where labels are dropped


class Batches:
    """The examples of a run by their numbers: each is a function of its number and the run's seed.

    clock  how many time steps the process has, or a process of real times
    times  how t is drawn
    """

    def __init__(
        self, model: Model, dataset: Dataset | Items, config: Config, clock: int | Process, times: Times | Importance
    ):
        self.model, self.dataset, self.config, self.clock, self.times = model, dataset, config, clock, times
        ahead = config.workers and isinstance(dataset, Items)
        self.reader = Reader(dataset, config.workers, self._asked, self._after) if ahead else None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))

    def index(self, examples: np.ndarray) -> Tensor:
        """Which item is seen as the k-th example: epoch after epoch, each in an order of its own."""
        index = torch.empty(len(examples), dtype=torch.int64, device="cpu")
        epochs, places = np.divmod(examples, len(self.dataset))
        for epoch in np.unique(epochs).tolist():
            if self._order[0] != epoch:
                self._order = (epoch, epoch_order(len(self.dataset), epoch, self.config.seed))
            here = torch.from_numpy(epochs == epoch)
            index[here] = self._order[1][torch.from_numpy(places)[here]]
        return index

    def at(self, place: Place) -> Given:
        """This process's share of a part of a step."""
        batch = self.dataset.batch(*self._asked(place)) if self.reader is None else self.reader.read(place)
        return self._given(batch, self._draws(place), flip=self.config.flip)

    def held_out(self, data: Dataset | Items, times: Times) -> Iterator[Given]:
        """All of ``data``, with the same draws each time, at t drawn by ``times``."""
        for index in torch.arange(len(data), dtype=torch.int64, device="cpu").split(self.config.batch_size):
            draws = draw(HELD_OUT + index.numpy(), self.config.seed, self.clock, 0.0, times)
            yield self._given(data.batch(index, draws.seeds), draws)

    def close(self) -> None:
        """End the processes that read ahead, if there are any."""
        if self.reader is not None:
            self.reader.close()

    def _examples(self, place: Place) -> np.ndarray:
        """The numbers of the examples of this process's share."""
        before, part = place
        parts = self.config.accumulate
        share = self.config.batch_size // (parallel.world() * parts)
        return before + share * (parts * parallel.rank() + part) + np.arange(share)

    def _draws(self, place: Place) -> Draws:
        config = self.config
        return draw(self._examples(place), config.seed, self.clock, config.label_dropout, self.times)

    def _asked(self, place: Place) -> tuple[Tensor, Tensor]:
        """The index and the seeds of the items at a place."""
        return self.index(self._examples(place)), self._draws(place).seeds

    def _after(self, place: Place) -> Place:
        before, part = place
        last = part == self.config.accumulate - 1
        return (before + self.config.batch_size, 0) if last else (before, part + 1)

    def _given(self, batch: Batch, draws: Draws, *, flip: bool = False) -> Given:
        """A batch of items as the network gets it: mirrored, encoded, its labels and conditions dropped."""
        x_0, labels, n = batch.x_0, batch.labels, len(batch.x_0)
        if flip:
            x_0 = _mirrored(x_0, draws.flip)
        if self.model.codec is not None:
            x_0 = self.model.to_latents(x_0).float()
        if tuple(x_0.shape[1:]) != self.model.shape:
            raise ValueError(f"data: expected items of shape {self.model.shape}, got {tuple(x_0.shape[1:])}")
        labels = None if labels is None else labels.masked_fill(draws.null, -1)
        conditions = {}
        for condition in self.model.conditions:
            value = condition.batch(batch.conditions.get(condition.name), n)
            if flip and len(condition.shape) == 3:  # an image beside x_t
                value = _mirrored(value, draws.flip)
            conditions[condition.name] = value
            if condition.null is not None:
                null = draws.null.view(-1, *[1] * (value.ndim - 1))
                conditions[condition.name] = torch.where(null, condition.batch(None, n), value)
        return Given(x_0, labels, draws, conditions)


def _mirrored(x: Tensor, flip: Tensor) -> Tensor:
    """Images [N, C, H, W], mirrored where ``flip`` [N]."""
    return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)
