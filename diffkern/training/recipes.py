"""Recipes of training, by name."""

from dataclasses import fields
from typing import Any

from .config import Config

PRESETS = {
    "fashion-mnist": Config(
        steps=60_000,
        lr=4e-4,
        bf16=True,
        network={
            "channels": 32,
            "channel_mult": (1, 2, 4),
            "attention_levels": (2,),
            "groups": 8,
            "norm_eps": 1e-5,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0.0,
        },
    ),
}
"""Recipes by name. ``fashion-mnist`` is the shipped model's, of 3.9 million parameters."""


def recipe(preset: str) -> dict[str, Any]:
    """Return the settings of a preset that differ from the defaults of :class:`Config`."""
    default, said = Config(), PRESETS[preset]
    return {f.name: getattr(said, f.name) for f in fields(Config) if getattr(said, f.name) != getattr(default, f.name)}
