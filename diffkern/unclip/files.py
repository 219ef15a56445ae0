"""unCLIP's three networks in one safetensors file, with one description."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..io.files import fill, state, write
from ..model import Model, build
from ..networks.blueprint import Blueprint
from .clip import CLIP

if TYPE_CHECKING:
    from .system import UnCLIP

KIND, FORMAT = "unclip", 1
MOST_WORDS = 2**20
NUMBERS = ("guidance", "prior_guidance", "steps", "prior_steps")


def save(system: "UnCLIP", path: str | os.PathLike, dtype: torch.dtype) -> None:
    """Write what :func:`read` reads; floating-point weights as ``dtype``."""
    tensors = {
        f"{part}.{key}": tensor for part, network in system.networks().items() for key, tensor in state(network).items()
    }
    halves = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    for key, tensor in halves.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: expected weights that are finite in {dtype}, got others in {key}")
    write(path, describe(system), halves)


def describe(system: "UnCLIP") -> dict[str, Any]:
    """All but the weights, as JSON holds it."""
    models = {"prior": system.prior, "decoder": system.decoder}
    return {
        "system": KIND,
        "format": FORMAT,
        "name": system.name,
        **{name: getattr(system, name) for name in NUMBERS},
        "clip": describe_clip(system.clip),
        **{name: model.description() | {"prefix": f"{name}."} for name, model in models.items()},
    }


def read(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike, device: torch.device
) -> "UnCLIP":
    """The system of a file. Raises ValueError that begins with ``path`` for whatever no diffkern has written."""
    from .system import UnCLIP

    try:
        if description.get("format") != FORMAT:
            raise ValueError(f"expected a system of format {FORMAT}, got {description.get('format')!r:.80}")
        numbers = {name: description.get(name) for name in NUMBERS}
        for name, value in numbers.items():
            if type(value) not in (int, float):
                raise TypeError(f"{name}: expected a number, got {value!r:.80}")
        for name in ("clip", "prior", "decoder"):
            if not isinstance(description.get(name), dict):
                raise TypeError(f"{name}: expected an object, got {description.get(name)!r:.80}")
        clip = filled(description["clip"], tensors, path, device)
        prior, decoder = (_model(description[name], name, tensors, path, device) for name in ("prior", "decoder"))
        return UnCLIP(clip, prior, decoder, name=str(description.get("name", "unclip")), **numbers)
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message[:500]}") from None


def describe_clip(clip: CLIP) -> dict[str, Any]:
    return {**clip.config, "words": clip.vocabulary.words}


def _made(config: Mapping[str, Any]) -> CLIP:
    """CLIP of a description, without memory. Raises TypeError or ValueError for words that are none."""
    options = dict(config)
    words = options.pop("words", None)
    if not isinstance(words, list | tuple) or len(words) > MOST_WORDS or not all(isinstance(w, str) for w in words):
        raise TypeError(f"words: expected a list of words, got {type(words).__name__}")
    with Blueprint():
        return CLIP(words, **options).float()


def filled(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike, device: torch.device
) -> CLIP:
    """CLIP of a description with the weights of a file, in eval mode."""
    clip = _made(config)
    fill(clip, {k.removeprefix("clip."): t for k, t in tensors.items() if k.startswith("clip.")}, path, device)
    return clip.eval().requires_grad_(False)


def _model(
    description: dict[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    device: torch.device,
) -> Model:
    model = build(description, tensors, path, prefix=f"{name}.", device=device)
    model.network.eval().requires_grad_(False)
    return model
