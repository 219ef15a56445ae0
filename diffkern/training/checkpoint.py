"""A run's checkpoint, read with its settings and checked; :meth:`diffkern.training.Trainer.save` writes it."""

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..io.description import check_model, checked_training
from ..io.files import read
from .config import Config
from .runs import Unlogged


def read_checkpoint(
    path: str | os.PathLike, check: Callable[[dict[str, Any], int], None] = check_model
) -> tuple[dict[str, Any], dict[str, Tensor], Config]:
    """The description, the tensors and the settings of a checkpoint; ValueError for a file that is none.

    check  raises for a description that is not of what is trained; it gets the number of tensors, too
    """
    description, tensors = read(path)
    config = checked_training(description, path, Config)
    try:
        check(description, len(tensors))
        _check_optional(**{key: description["training"].get(key) for key in ("data", "log", "frozen")})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return description, tensors, config


def _check_optional(data: Any, log: Any, frozen: Any) -> None:
    """What earlier versions did not write."""
    if not isinstance(data, dict | None) or (data and type(data.get("images")) is not int):
        raise TypeError(f"data: expected an object with a number of images, got {data!r:.80}")
    if not isinstance(frozen, list | None):
        raise TypeError(f"frozen: expected a list of names, got {frozen!r:.80}")
    Unlogged(**(log or {}))
