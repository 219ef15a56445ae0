"""``diffkern export``: a checkpoint's averaged weights as a model file, or as a folder of diffusers."""

import argparse
import dataclasses
import os
from pathlib import Path

import torch

from ..io.files import is_checkpoint
from ..model import Model, find, load_one, save
from ..progress import tell
from .options import DTYPES
from .outputs import check_file

EXAMPLES = """\
  diffkern export run --out photos.safetensors
  diffkern export run --out photos.safetensors --ema 0.13     # of a run with --snapshot-every
  diffkern export run --to diffusers --out photos  # for DDPMPipeline.from_pretrained"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a run's folder, its checkpoint.safetensors, or another model")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .safetensors, or folder, to write")
    parser.add_argument(
        "--to", choices=("diffkern", "diffusers"), default="diffkern", help="whose format (default: diffkern)"
    )
    parser.add_argument(
        "--ema",
        type=float,
        metavar="STD",
        help="average the weights over this part of the run's steps, 0.28 at most, from its snapshots",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float16", help="of the weights (default: float16; float32 for diffusers)"
    )
    parser.add_argument("--name", help="the model's name (default: the file's)")


def run(arguments: argparse.Namespace) -> int:
    source = find(arguments.checkpoint)
    if arguments.to == "diffusers":
        model = _read(source, arguments.ema)
        model.to_diffusers(arguments.out)
        print(f"{arguments.out}: {sum(p.numel() for p in model.network.parameters())} parameters")
        return 0
    check_file("out", arguments.out, ".safetensors")
    if os.path.exists(arguments.out):
        if os.path.samefile(source, arguments.out):
            raise ValueError(f"out: expected another file than the one to export, got {arguments.out!r}")
        if is_checkpoint(arguments.out):
            raise ValueError(f"out: expected no training checkpoint to be overwritten, got {arguments.out!r}")
    model = _read(source, arguments.ema)
    model = dataclasses.replace(model, name=arguments.name or Path(arguments.out).stem)
    save(model, arguments.out, dtype=getattr(torch, arguments.dtype))
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    print(f"{arguments.out}: {parameters} parameters, {os.path.getsize(arguments.out) / 1e6:.1f} MB")
    return 0


def _read(source: Path, std: float | None) -> Model:
    """The model of a file, its weights averaged anew over that part of its run's steps."""
    if std is None:
        return load_one(source)
    from ..training import post_hoc_ema  # which no other export needs

    found = post_hoc_ema(source, std)
    tell(f"ema {std:g}: from {found.averages} averages, whose profile differs by {found.error:.2%}")
    return found.model
