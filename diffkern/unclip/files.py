"""unCLIP's networks in one safetensors file, with one description."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..io.files import fill
from ..model import load_part
from ..networks.blueprint import Blueprint
from ..system import FORMAT, described, numbers_of
from .clip import CLIP

if TYPE_CHECKING:
    from .system import UnCLIP

KIND = "unclip"
MOST_WORDS = 2**20
NUMBERS = ("guidance", "prior_guidance", "steps", "prior_steps", "augmentation")


def describe(system: "UnCLIP") -> dict[str, Any]:
    """All but the weights, as JSON holds it."""
    return {
        "system": KIND,
        "format": FORMAT,
        "name": system.name,
        **{name: getattr(system, name) for name in NUMBERS},
        "clip": describe_clip(system.clip),
        **described(system.models()),
    }


def read(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike, device: torch.device
) -> "UnCLIP":
    """The system of a file. Raises TypeError or ValueError for whatever no diffkern has written."""
    from .system import UnCLIP

    numbers = numbers_of(description, NUMBERS)
    if not isinstance(description.get("clip"), dict):
        raise TypeError(f"clip: expected an object, got {description.get('clip')!r:.80}")
    clip = filled(description["clip"], tensors, path, device)
    names = ("prior", "decoder", *(["upsampler"] if "upsampler" in description else []))
    models = {name: load_part(description, name, tensors, path, device) for name in names}
    return UnCLIP(clip, **models, name=str(description.get("name", KIND)), **numbers)


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
