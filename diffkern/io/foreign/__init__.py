"""Checkpoints of other libraries: what a path holds, and the arguments of the ``Model`` that it is.

A family is a module here. It has

    NAME        of the library
    ANCHOR      the end of a tensor's name that its files have, and those of no other family
    OPTIONS     what :func:`diffkern.load` may be told of it, because no file says so: name -> :class:`Option`
    read        (Weights, options) -> the arguments of a ``Model``, without its name

Names and shapes of the tensors decide the network. No code of a file is run: pickles are read with ``weights_only``.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from . import diffusers, edm, edm2, lucidrains, openai, pytorch_ddpm, score_sde
from .weights import Weights, is_ours, is_pickle, read_tensors

FAMILIES = (openai, pytorch_ddpm, lucidrains, edm, edm2, score_sde, diffusers)

LOOKS_LIKE = {
    "model.diffusion_model.": "a latent diffusion model in one file, which diffusers reads",
    "lora": "LoRA weights, which change another model",
    "text_model.": "a text encoder",
    "decoder.conv_in.": "an autoencoder of images",
    "transformer_blocks.": "a transformer",
    "fc.weight": "a classifier of images",
}
"""A part of a tensor's name -> what a file with it is, for the message that refuses it."""


def is_foreign(path: Path) -> bool:
    """Whether another library wrote this: a folder with a config, a pickle, safetensors without a description."""
    if path.is_dir():
        return diffusers.is_folder(path)
    return path.is_file() and (is_pickle(path) or is_ours(path) is False)  # a pipe would be waited for


def read(path: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments of a ``Model``, and one line that says what ``path`` is.

    Raises ValueError for a path of no family, TypeError for options that its family has not.
    """
    if path.is_dir() or (diffusers.is_folder(path.parent) and path.name.startswith(diffusers.STEM)):
        return _read(diffusers, lambda: diffusers.read_folder(path, options), path, options)
    return read_tree(read_tensors(path), path, options)


def read_tree(tree: Any, path: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The same of what a file held: tensors in dicts and lists."""
    weights = Weights.of(tree, path)
    anchored = ((family, weights.below(family.ANCHOR)) for family in FAMILIES)
    family, found = next((pair for pair in anchored if pair[1] is not None), (None, weights))
    names = [f"{found.prefix}{name}" for name in found.tensors]
    looks = _looks(names)  # before the family: other models have anchors too
    if family is not None and looks is None:
        return _read(family, lambda: family.read(found, options), path, options)
    got = looks or (f"{len(names)} tensors: {', '.join(names[:3])}" if names else "no tensors")
    known = ", ".join(family.NAME for family in FAMILIES)
    raise ValueError(f"{path}: expected a file written by diffkern, or by {known}, got {got}")


def read_classifier(path: Path) -> dict[str, Any]:
    """The arguments of a ``NoisyClassifier``, of a file that openai published. ValueError for another file."""
    found = Weights.of(read_tensors(path), path).below(openai.ANCHOR)
    if found is None or found.has("output_blocks"):
        raise ValueError(f"{path}: expected a classifier of noisy images, got another file")
    try:
        return openai.read_classifier(found)
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read(family: Any, make: Any, path: Path, options: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    others = sorted(options.keys() - family.OPTIONS.keys())
    if others:
        known = ", ".join(family.OPTIONS) or "none"
        raise TypeError(f"load: expected options of {family.NAME} ({known}), got {', '.join(others)}")
    for name, value in options.items():
        family.OPTIONS[name].check(name, value)
    try:
        arguments = make()
    except (KeyError, RuntimeError, ValueError) as error:
        text = f"no tensor {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{os.fspath(path)}: {text} (a checkpoint of {family.NAME})") from None
    network = arguments["network"]
    if network.num_classes is not None and not arguments.get("classes"):  # which have no names, but numbers
        arguments["classes"] = tuple(map(str, range(network.num_classes)))
    parameters = sum(tensor.numel() for tensor in network.parameters())
    shape = "x".join(map(str, arguments["shape"]))
    process = arguments["schedule"]
    noise = f"{len(process)} steps" if process.discrete else repr(process)
    kind = type(network).__name__
    return arguments, (
        f"{path}: {family.NAME}: {kind} of {parameters:,} parameters, predicts {arguments['prediction']} "
        f"for samples of {shape}, {noise}"
    )


def _looks(names: Collection[str]) -> str | None:
    """Say what a file looks like by its tensors' names; None where no entry of ``LOOKS_LIKE`` fits."""
    for part, what in LOOKS_LIKE.items():
        if any(part in name for name in names):
            return f"what looks like {what}"
    return None
