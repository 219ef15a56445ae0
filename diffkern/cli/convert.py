"""``diffkern convert``: a checkpoint of another library as a model file."""

import argparse
import os
from pathlib import Path

import torch

from ..io import foreign
from ..io.foreign import pickles
from ..io.foreign.weights import is_pickle
from ..model import Model, find, load, save
from ..progress import tell
from .options import DTYPES, named
from .outputs import check_file

EXAMPLES = """\
  diffkern convert 64x64_diffusion.pt --out adm.safetensors
  diffkern convert edm-cifar10-32x32-cond-vp.pkl --out edm.safetensors
  diffkern convert model-1.pt --option image_size=64 --out mine.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a file, or a folder of diffusers")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .safetensors to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: float32)")
    parser.add_argument("--name", help="the model's name (default: the file's)")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what the checkpoint does not say, as num_heads=4; may be given several times",
    )
    parser.add_argument(
        "--unsafe-pickle",
        action="store_true",
        help="run a pickle that cannot be read otherwise, with any code that is in it: only of a source you trust",
    )


def run(arguments: argparse.Namespace) -> int:
    path = find(Path(arguments.checkpoint))
    check_file("out", arguments.out, ".safetensors")
    if os.path.exists(arguments.out) and os.path.samefile(path, arguments.out):
        raise ValueError(f"out: expected another file than the one to convert, got {arguments.out!r}")
    name, options = arguments.name or Path(arguments.out).stem, named(arguments.option)
    if path.is_file() and is_pickle(path):
        tree, told, how = pickles.read(path, arguments.unsafe_pickle)
        tell(f"{path}: {how}")
        found, line = foreign.read_tree(tree, path, told | options)
        tell(line)
        model = Model(**found, name=name)
    else:
        model = load(path, **options)
        model.name = name
    if "own" in model.description():
        listed = ", ".join(model.description()["own"])
        raise ValueError(f"{path}: expected a model that a file can hold, got one with {listed} of its own")
    save(model, arguments.out, dtype=getattr(torch, arguments.dtype))
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    print(f"{arguments.out}: {parameters} parameters, {os.path.getsize(arguments.out) / 1e6:.1f} MB")
    return 0
