"""A run's checkpoint, read with its settings and checked; :meth:`diffkern.training.Trainer.save` writes it."""

import os
from typing import Any

from torch import Tensor, nn

from ..io.description import checked_training
from ..io.files import read
from .config import Config
from .denoising import Denoising
from .maximum_likelihood import MaximumLikelihood
from .runs import Unlogged
from .task import Task


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor], Config]:
    """The description, the tensors and the settings of a checkpoint; ValueError for a file that is none."""
    description, tensors = read(path)
    config = checked_training(description, path, Config)
    try:
        kind_in(description).check(description, len(tensors))
        _check_optional(**{key: description["training"].get(key) for key in ("data", "log", "frozen", "eval")})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    return description, tensors, config


def kind_in(description: dict[str, Any]) -> type[Task]:
    """The task of a checkpoint's run."""
    return MaximumLikelihood if "flow" in description else Denoising


def modes(network: nn.Module) -> dict[str, list[str]]:
    """The names of the parameters that are not trained, if there are some, and of the modules in eval mode."""
    frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
    evaluating = [name for name, module in network.named_modules() if not module.training]
    return ({"frozen": frozen} if frozen else {}) | {"eval": evaluating}


def restore_modes(network: nn.Module, training: dict[str, Any]) -> None:
    """Freeze the parameters, and put the modules into eval mode, that were so in a run. A checkpoint of an earlier
    version does not tell of modules: they stay as they are."""
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in (training.get("frozen") or ()))
    if training.get("eval") is not None:
        for name, module in network.named_modules():
            module.training = name not in training["eval"]


def _check_optional(data: Any, log: Any, frozen: Any, eval: Any) -> None:
    """Check the fields that earlier versions did not write."""
    if not isinstance(data, dict | None) or (data and type(data.get("images")) is not int):
        raise TypeError(f"data: expected an object with a number of images, got {data!r:.80}")
    for name, names in (("frozen", frozen), ("eval", eval)):
        if not isinstance(names, list | None):
            raise TypeError(f"{name}: expected a list of names, got {names!r:.80}")
    Unlogged(**(log or {}))
