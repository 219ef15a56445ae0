"""The batches of a run: which items each holds, and what is drawn for them."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import parallel
from ..data import Batch, Dataset, Items, epoch_order
from .config import Config
from .draws import Draws, draw
from .reading import Place, Reader
from .task import Given, Task

HELD_OUT = 2**62
"""The examples from here on, which no run trains on, are those of the held-out data."""


class Batches:
    """The examples of a run by their numbers: each is a function of its number and the run's seed."""

    def __init__(self, task: Task, dataset: Dataset | Items, config: Config):
        self.task, self.dataset, self.config = task, dataset, config
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
        draws = self._draws(place)
        return self.task.given(_mirrored(batch, draws.flip) if self.config.flip else batch, draws)

    def held_out(self, data: Dataset | Items) -> Iterator[Given]:
        """All of ``data``, with the same draws each time."""
        for index in torch.arange(len(data), dtype=torch.int64, device="cpu").split(self.config.batch_size):
            draws = draw(HELD_OUT + index.numpy(), self.config.seed, self.task.clock, 0.0, self.task.times)
            yield self.task.given(data.batch(index, draws.seeds), draws)

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
        config, task = self.config, self.task
        times = task.importance or task.times
        return draw(self._examples(place), config.seed, task.clock, config.label_dropout, times)

    def _asked(self, place: Place) -> tuple[Tensor, Tensor]:
        """The index and the seeds of the items at a place."""
        return self.index(self._examples(place)), self._draws(place).seeds

    def _after(self, place: Place) -> Place:
        before, part = place
        last = part == self.config.accumulate - 1
        return (before + self.config.batch_size, 0) if last else (before, part + 1)


def _mirrored(batch: Batch, flip: Tensor) -> Batch:
    """Images [N, C, H, W], and those among their conditions, mirrored where ``flip`` [N]."""

    def mirrored(x: Tensor) -> Tensor:
        return torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x) if x.ndim == 4 else x

    conditions = {name: mirrored(value) for name, value in batch.conditions.items()}
    return replace(batch, x_0=mirrored(batch.x_0), conditions=conditions)
