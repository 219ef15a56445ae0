"""The task of a run: how an example reaches the network, and the network's loss on it."""

import copy
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data import Batch, Dataset, Items
from ..process import Process
from .config import Config
from .draws import Draws
from .times import Importance, Times

if TYPE_CHECKING:
    from PIL import Image

    from .batches import Batches


class Given(NamedTuple):
    """A training batch: examples, labels, random draws and conditions."""

    x_0: Tensor  # [N, ...] float32
    labels: Tensor | None  # [N] int64, -1 where dropped
    draws: Draws
    conditions: dict[str, Tensor]  # [N, ...] by name, null where labels are dropped


class Task(ABC):
    """A model, and the loss by which :class:`diffkern.training.Trainer` trains its network.

    model       what is trained, and in the end what the run is for
    clock       how many time steps there are, or a process of real times
    times       how t is drawn
    importance  of the time steps, if t is drawn by their losses
    """

    model: Any
    clock: int | Process
    times: Times
    importance: Importance | None = None

    # --- before there is one ---

    @staticmethod
    @abstractmethod
    def settled(config: Config, model: Any) -> Config:
        """``config`` with what the model tells. Raises TypeError or ValueError for a model that cannot be trained, and
        for settings that it has not."""

    @staticmethod
    @abstractmethod
    def fitting(name: str, data: Dataset | Items, model: Any) -> Dataset | Items:
        """The data ``name`` as the model takes them. Raises ValueError for data that it does not take."""

    @abstractmethod
    def __init__(
        self,
        model: Any,
        config: Config,
        device: torch.device,
        dataset: Dataset | Items,
        validation: Dataset | Items | None,
    ):
        """Check all of them against each other, and change none. Raises TypeError or ValueError."""

    # --- in a file ---

    @staticmethod
    @abstractmethod
    def check(description: dict[str, Any], tensors: int) -> None:
        """Raise TypeError or ValueError for the description, of that many tensors, of no such model."""

    @staticmethod
    @abstractmethod
    def planned(description: dict[str, Any], tensors: dict[str, Tensor], path: Path, into: Any) -> Any:
        """The model of a checkpoint, before there is memory for its weights."""

    @staticmethod
    @abstractmethod
    def built(
        description: dict[str, Any], tensors: dict[str, Tensor], path: Path, into: Any, device: torch.device
    ) -> nn.Module:
        """The network of a checkpoint, with the weights that are trained."""

    # --- in a run ---

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network of the model."""

    @abstractmethod
    def _with(self, network: nn.Module) -> Any:
        """The model with another network."""

    def of(self, network: nn.Module) -> "Task":
        """This task for the model with ``network``."""
        other = copy.copy(self)
        other.model = self._with(network)
        return other

    def initialize(self, batches: "Batches") -> None:  # noqa: B027
        """Set the parameters that start from data, before the first step."""

    @abstractmethod
    def given(self, batch: Batch, draws: Draws) -> Given:
        """A batch as the network gets it."""

    @abstractmethod
    def losses(self, network: Any, batch: Given) -> Tensor:
        """Each example's loss, [N]."""

    @property
    @abstractmethod
    def draws_images(self) -> bool:
        """Whether :meth:`grid` has pictures to show."""

    @abstractmethod
    def grid(self, data: Dataset | Items, n: int, steps: int) -> "Image.Image":
        """n samples of the model, the same seeds each time."""
