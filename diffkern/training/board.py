"""The numbers and the sample grids of a run for TensorBoard."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

FOLDER = "tensorboard"

NAMES = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "lr": "learning_rate",
    "images_per_second": "images_per_second",
}
"""The columns of log.csv, by the names of their curves."""


class Board:
    """Event files in ``folder``; those of steps after ``step``, which a resumed run takes again, are not shown."""

    def __init__(self, folder: str | os.PathLike, step: int):
        self.writer = _writer()(os.fspath(folder), purge_step=step + 1)

    def add_line(self, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a line of log.csv, by its columns."""
        for name, value in numbers.items():
            self.writer.add_scalar(NAMES[name], value, step)

    def add_grid(self, step: int, image: Any) -> None:
        """A ``PIL.Image`` of samples."""
        self.writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


def check() -> None:
    """Raise ImportError where TensorBoard is not installed."""
    _writer()


def _writer() -> type:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(
            "tensorboard: expected the package tensorboard (pip install diffkern[tensorboard]), got none"
        ) from None
    return SummaryWriter
