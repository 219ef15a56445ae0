"""Recipes of training: those of the command line by name, and what the recipes of systems share."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..io.files import CHECKPOINT
from ..model import Model
from .config import Config
from .trainer import Trainer

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


def train_part(folder: Path, make: Callable[[], Model], data: Any, config: Config, init: Model | None = None) -> Model:
    """Train a part of a system in a folder, or go on where its run was interrupted. Returns the averaged model.

    A signal that stops the run ends the process, with the status 128 + its number.

    make  the model, its weights drawn by torch's generator, which is seeded with 0
    init  a model whose weights the run begins with
    """
    if (folder / CHECKPOINT).exists():
        trainer = Trainer.resume(folder / CHECKPOINT, data, steps=config.steps)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = make()
        if init is not None:
            model.network.load_state_dict(init.network.state_dict())
        trainer = Trainer(model, data, config)
    stopped = trainer.run(folder)
    if stopped is not None:
        print(f"stopped by {stopped.name} after {trainer.steps} steps", flush=True)
        raise SystemExit(128 + stopped)
    return trainer.model


def parsed(description: str, parts: Sequence[str], steps: Mapping[str, int]) -> argparse.Namespace:
    """The arguments of a recipe's command: part, out (a folder that is there), steps (of the part) and init."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=parts)
    parser.add_argument("--out", type=Path, required=True, help="a folder, of all parts")
    parser.add_argument("--steps", type=int, help=f"(default: {dict(steps)})")
    parser.add_argument("--init", help="a packed model, whose weights of the part the run begins with")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    arguments.steps = arguments.steps or steps.get(arguments.part, 0)
    return arguments
