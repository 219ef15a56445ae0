"""A file's description of its model and training, checked before anything of that size is made.

Files come from anywhere. One that no diffkern has written raises a TypeError or a ValueError of one line.
"""

import inspect
import math
import os
import reprlib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from ..networks import ARCHITECTURES
from ..schedule import KINDS

FORMAT = 1

LARGEST_INT = 2**31  # of a network's options
LARGEST_COUNT = 2**62  # of steps and examples: their sums stay within int64
LEAST_TENSORS = 3  # of a residual block
MOST_LEVELS = 32  # each halves the image
MOST_STEPS = 2**20  # T of a schedule: a table of 8 MiB
MOST_VALUES = 2**28  # C * H * W of an image: 1 GiB
MOST_SIZES = 8  # of the shape that a network of one's own has
MOST_OWN = 64  # conditions and the like
DEEPEST = 8  # schedules respaced from respaced ones

REQUIRED = ("name", "network", "schedule", "prediction", "shape", "classes")
KEPT = {"variance": str, "clip": (bool, int, float, dict), "spacing": str}  # for sample, where they are not its own
KNOWN = {
    "format",
    *REQUIRED,
    *KEPT,
    "architecture",
    "own",
    "prefix",
    "training",
    "learned_variance",
}  # the last: once beside the network's own

Config = TypeVar("Config")


def check_model(description: Mapping[str, Any], tensors: int) -> None:
    """Check all of a model's description but what ``Model`` checks; ``tensors`` is how many the file has."""
    version = description.get("format")
    if type(version) is not int or version != FORMAT:
        newer = " (written by a newer diffkern?)" if type(version) is int and version > FORMAT else ""
        raise ValueError(f"expected a model of format {FORMAT}, got format {_shown(version)}{newer}")
    for key in REQUIRED:
        if key not in description:
            raise ValueError(f"expected {key!r} in the model's description, got {', '.join(description)}")
    _check_known("description", description, KNOWN)
    for key in ("name", "prediction", "prefix"):
        if not isinstance(description.get(key, ""), str):
            raise TypeError(f"{key}: expected text, got {_shown(description[key])}")
    for key in KEPT.keys() & description.keys():
        if not isinstance(description[key], KEPT[key]):
            raise TypeError(f"{key}: expected what sample() takes, got {_shown(description[key])}")
    if isinstance(description.get("clip"), dict):
        _check_known("clip", description["clip"], {"quantile"})
        if "quantile" not in description["clip"]:
            raise ValueError("clip: expected a quantile, got none")
    classes, shape = description["classes"], description["shape"]
    if classes is not None and not isinstance(classes, list):
        raise TypeError(f"classes: expected a list of names or null, got {_shown(classes)}")
    own = description.get("own", {})
    if not (isinstance(own, dict) and all(isinstance(kind, str) for kind in own.values())) or len(own) > MOST_OWN:
        raise TypeError(f"own: expected an object of names, got {_shown(own)}")
    architecture = description.get("architecture", "UNet")
    if architecture not in tuple(ARCHITECTURES):
        raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {_shown(architecture)}")
    few = (3,) if architecture == "UNet" and "network" not in own else range(1, MOST_SIZES + 1)
    sizes = shape if isinstance(shape, list) and len(shape) in few else [None]
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError(f"shape: expected three positive sizes (C, H, W), got {_shown(shape)}")
    if math.prod(shape) > MOST_VALUES:
        raise ValueError(f"shape: expected at most {MOST_VALUES} values an image, got {_shown(shape)}")
    if "network" not in own:
        _check_network(description["network"], ARCHITECTURES[architecture], tensors)
    if "schedule" not in own:
        check_schedule(description["schedule"])


def _check_network(network: Any, architecture: type, tensors: int) -> None:
    options = {name: option.default for name, option in inspect.signature(architecture).parameters.items()}
    _check_known("network", network, options)
    for name, value in network.items():
        default = options[name]
        if name == "conditions":
            good = isinstance(value, dict) and len(value) <= MOST_OWN
            good = good and all(isinstance(shape, list) and all(map(_is_number, shape)) for shape in value.values())
            expected = "a list of sizes by name"
        elif isinstance(default, bool | str):
            good, expected = type(value) is type(default), f"a {type(default).__name__}"
        elif isinstance(default, tuple):
            flags = bool(default) and isinstance(default[0], bool)
            fits = all((type(v) is bool if flags else _is_number(v)) for v in value) if type(value) is list else False
            good, expected = fits and len(value) <= MOST_LEVELS, f"a list of at most {MOST_LEVELS} ints"
        else:
            good, expected = value is None or _is_number(value), f"a number below {LARGEST_INT}"
        if not good:
            raise TypeError(f"{name}: expected {expected}, got {_shown(value)}")
    made = options | network
    blocks = made.get("blocks", 2)
    blocks = blocks if isinstance(blocks, int) else 0
    if "channel_mult" in made:
        blocks = len(made["channel_mult"]) * (2 * blocks + 1)
    if LEAST_TENSORS * blocks > tensors:
        raise ValueError(f"blocks: expected a network of the file's {tensors} tensors, got {blocks} residual blocks")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_INT


def check_schedule(config: Any) -> None:
    """Check that ``config`` is a schedule's that :meth:`Schedule.from_config` can take."""
    for _ in range(DEEPEST):
        kind = config.get("kind") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"schedule: expected a kind among {sorted(KINDS)}, got {_shown(config)}")
        _check_known("schedule", config, {"kind", *inspect.signature(KINDS[kind]).parameters})
        T = config.get("T")
        if isinstance(T, int) and T > MOST_STEPS:
            raise ValueError(f"T: expected at most {MOST_STEPS}, got {T}")
        if kind != "respaced":
            return
        config = config.get("schedule")
    raise ValueError(f"schedule: expected at most {DEEPEST} schedules, one respaced from another, got more")


def checked_training(description: Mapping[str, Any], path: str | os.PathLike, config: type[Config]) -> Config:
    """The settings (of class ``config``) in the "training" part of a checkpoint's description, with its counts checked.

    The part is {"config": a dict of fields, "steps": n, "examples": n}; other keys are the caller's matter. Settings
    that a newer version added have their defaults. Raises ValueError that begins with ``path``.
    """
    if "training" not in description:
        raise ValueError(f"{path}: expected a training checkpoint, got a model without the state of its training")
    try:
        return checked_state(description["training"], config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def checked_state(state: Any, config: type[Config]) -> Config:
    """Check the "training" part itself, as ``checked_training`` does; its errors do not begin with a path."""
    if not isinstance(state, dict):
        raise TypeError(f"training: expected an object, got {_shown(state)}")
    for key in ("config", "steps", "examples"):
        if key not in state:
            raise ValueError(f"training: expected {key!r}, got {', '.join(state)}")
    for key in ("steps", "examples"):
        if type(state[key]) is not int or not 0 <= state[key] < LARGEST_COUNT:
            raise ValueError(f"{key}: expected an int in 0..2^62 - 1, got {_shown(state[key])}")
    types, stored = {f.name: f.type for f in fields(config)}, state["config"]
    _check_known("config", stored, types)
    for key in ("network", "schedule", "seed", "steps", "batch_size"):
        if key not in stored:
            raise ValueError(f"config: expected {key!r}, got {', '.join(stored)}")
    for name, value in stored.items():
        if not _is_of(types[name], value):
            raise TypeError(f"{name}: expected {getattr(types[name], '__name__', types[name])}, got {_shown(value)}")
        if type(value) is int and name != "seed" and abs(value) >= LARGEST_COUNT:
            raise ValueError(f"{name}: expected an int below 2^62, got {_shown(value)}")
    return config(**stored)


def _is_of(kind: Any, value: Any) -> bool:
    """Whether JSON's ``value`` is one of a field's type; a list is what became of a tuple."""
    if kind is float:
        return type(value) in (int, float)
    if typing.get_origin(kind) is tuple:
        return type(value) is list
    return type(value) is kind if isinstance(kind, type) else not isinstance(value, dict)


def _check_known(name: str, got: Any, known: Iterable[str]) -> None:
    if not isinstance(got, dict):
        raise TypeError(f"{name}: expected an object, got {_shown(got)}")
    others = sorted(got.keys() - set(known))
    if others:
        listed = ", ".join(map(_shown, others[:3]))
        raise ValueError(f"{name}: expected what this version knows, got also {listed} (written by a newer diffkern?)")


def _shown(value: Any) -> str:
    """``repr``, short, however large the value is."""
    return reprlib.repr(value)
