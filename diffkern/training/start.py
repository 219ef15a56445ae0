"""The model that a run begins with: of random weights, or of those of a model to fine-tune."""

import inspect
import math
from typing import Any

import torch

from ..data import as_dataset
from ..io.files import restore
from ..model import Model, unwrapped
from ..networks import UNet
from ..networks.defaults import float32_on
from ..schedule import from_config
from .config import Config


def new_model(dataset: Any, config: Config, name: str = "model", *, init: Model | None = None) -> Model:
    """The model that ``config`` asks for, with the data's shape and classes, to be trained.

    The data are a :class:`diffkern.data.Dataset`, or any map-style dataset. The model predicts what ``config`` says,
    else what ``init`` does, else what its process is usually trained on. Its network is that of ``init`` in all options
    that ``config.network`` does not name; its process is that of ``config``.
    Its weights are random, or those of ``init``, a model to fine-tune. A class has the embedding of the class of its
    name in ``init``, the null class that of the null class; where no name is the same and there are as many classes,
    each has that of its label. ``groups`` is the largest divisor of 32 that divides ``channels``, unless it is given.
    Raises TypeError or ValueError for options of which no network can be made, or a network that ``init`` does not fit.
    """
    known = inspect.signature(UNet).parameters
    for option in config.network:
        if option not in known:
            raise TypeError(f"network: expected options of a UNet, {', '.join(known)}, got {option!r}")
    dataset = as_dataset(dataset)
    classes, channels = dataset.classes, config.network.get("channels")
    options = {"in_channels": dataset.shape[0], "num_classes": classes and len(classes)}
    if isinstance(channels, int) and channels > 0:
        options["groups"] = math.gcd(32, channels)  # UNet's own 32 where that divides every width
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.default_generator.manual_seed(config.seed)
        network = UNet(**{**options, **({} if init is None else network_of(init)), **config.network})
    process = from_config(config.schedule)
    prediction = config.prediction or (process.prediction if init is None else init.prediction)
    model = Model(network, process, prediction, dataset.shape, classes, name=name)
    if init is not None:
        _copy_weights(model, init)
    return model


def network_of(init: Model) -> dict[str, Any]:
    """The options of a network to fine-tune, but for what data and their classes say."""
    network = unwrapped(init.network)
    if not isinstance(network, UNet):
        raise TypeError(f"init: expected a model of a diffkern.unet.UNet, got one of {type(network).__name__}")
    return {name: value for name, value in network.config.items() if name not in ("out_channels", "num_classes")}


def _copy_weights(model: Model, init: Model) -> None:
    network, source = model.network, unwrapped(init.network)
    if init.prediction != model.prediction:
        raise ValueError(
            f"init: expected a model that predicts {model.prediction!r}, which is trained, got {init.prediction!r}"
        )
    live, stored = network.state_dict(), source.state_dict()
    ours, theirs = (weights.pop("class_embedding.weight", None) for weights in (live, stored))
    restore(live, stored, f"init: {init.name}")
    if ours is None or theirs is None:
        return
    rows = list(classes_of_init(model, init).items())
    if network.config["null_class"] and source.config["null_class"]:
        rows.append((-1, -1))
    for mine, other in rows:
        ours[mine] = theirs[other]


def classes_of_init(model: Model, init: Model) -> dict[int, int]:
    """The label in ``init`` whose embedding a class of ``model`` begins with, by label; others begin anew."""
    known = {name: label for label, name in enumerate(init.classes or ())}
    labels = {label: known[name] for label, name in enumerate(model.classes or ()) if name in known}
    if not labels and model.num_classes == init.num_classes:
        labels = {label: label for label in range(model.num_classes or 0)}
    return labels
