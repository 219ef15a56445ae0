"""Items read ahead of their use, by processes of their own."""

import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..data import Batch, Items
from .runs import SAVING, STOPPING

AHEAD = 2  # batches that each process has ready

Place = tuple[int, int]
"""The position of a batch in a run: the number of examples before its step, and its part of the step."""


class Reader:
    """The batches of a run's places, in their order, each ready when it is asked for.

    Processes change no bit: what an item draws is a function of its example. A place out of order starts anew.
    """

    def __init__(
        self, items: Items, workers: int, ask: Callable[[Place], tuple[Tensor, Tensor]], after: Callable[[Place], Place]
    ):
        """ask: the index and the seeds of the items of a place; after: the place that follows one."""
        self.items, self.workers, self.ask, self.after = items, workers, ask, after
        self.place: Place | None = None
        self.batches: Iterator[Batch] = iter(())

    def read(self, place: Place) -> Batch:
        """The batch of ``place``."""
        if place != self.place:
            self.batches = iter(self._loader(place))
        batch, self.place = next(self.batches), self.after(place)
        return batch

    def close(self) -> None:
        """End the processes; another :meth:`read` starts new ones."""
        self.place, self.batches = None, iter(())

    def _loader(self, place: Place) -> DataLoader:
        return DataLoader(
            _Asked(self.items),
            sampler=_Places(place, self.ask, self.after),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=AHEAD,
            worker_init_fn=_heed_no_signal,
            generator=torch.Generator("cpu"),  # it draws a number from it, and torch's own stays as it was
        )


class _Places:
    """An endless sampler: ``ask(place)`` for each place, from ``first`` on."""

    def __init__(self, first: Place, ask: Callable[[Place], Any], after: Callable[[Place], Place]):
        self.first, self.ask, self.after = first, ask, after

    def __iter__(self) -> Iterator[Any]:
        place = self.first
        while True:
            yield self.ask(place)
            place = self.after(place)


class _Asked:
    """Items whose index is what :class:`_Places` asks for."""

    def __init__(self, items: Items):
        self.items = items

    def __getitem__(self, asked: tuple[Tensor, Tensor]) -> Batch:
        return self.items.batch(*asked)


def _heed_no_signal(worker: int) -> None:
    """Leave it to the run to end its processes: a signal to the group may not cost it the step at hand."""
    torch.set_num_threads(1)
    for number in (*STOPPING, SAVING):
        signal.signal(number, signal.SIG_IGN)
