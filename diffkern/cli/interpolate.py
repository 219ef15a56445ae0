"""``diffkern interpolate``: the images between two."""

import argparse
import os

import torch

from .. import images
from ..model import Model, load
from ..sampling import interpolate
from ..system import System
from .options import add_grid, add_long_options, add_model, add_network, count, dtype_of
from .outputs import check_file
from .pictures import read_picture

EXAMPLES = """\
  diffkern interpolate 3 8 --label Sneaker
  diffkern interpolate --model emoji.safetensors "red heart" "blue heart"
  diffkern interpolate mine.png yours.png --n 12 --gif between.gif"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument(
        "ends", nargs=2, metavar="END", help="an image file, the seed of an image, or for unCLIP a text"
    )
    add_model(parser)
    parser.add_argument("--n", type=count, default=9, help="how many images, the ends too (default: 9)")
    parser.add_argument("--label", help="the class of all images, by name or number (default: none)")
    parser.add_argument("--steps", type=count, default=50, help="(default: 50)")
    parser.add_argument(
        "--fraction",
        type=float,
        help="mix the noised images with that part of the steps left to do (default: turn from one x_T to the other)",
    )
    add_network(parser)
    add_grid(parser, "interpolation.png")
    parser.add_argument("--gif", metavar="GIF", help="there and back, animated")


def run(arguments: argparse.Namespace) -> int:
    for name, suffix in (("out", ".png"), ("gif", ".gif")):
        if getattr(arguments, name) is not None:
            check_file(name, getattr(arguments, name), suffix)
    source = load(arguments.model, arguments.device)
    system = isinstance(source, System)
    model = source.drawn if system else source
    ends = [_end(end, model, texts=system) for end in arguments.ends]
    labels = {} if arguments.label is None else {"labels": model.label(arguments.label)}
    x = interpolate(
        source,
        *ends,
        arguments.n,
        fraction=arguments.fraction,
        **labels,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
    )
    settings = {name: getattr(arguments, name) for name in ("model", "ends", "n", "label", "steps", "fraction")}
    columns = arguments.columns or arguments.n
    images.save_png(images.grid(x, columns=columns, scale=arguments.scale), arguments.out, settings)
    written = [arguments.out]
    if arguments.gif:
        frames = [images.grid(frame[None], scale=arguments.scale) for frame in torch.cat((x, x.flip(0)[1:]))]
        images.save_gif(frames, arguments.gif, hold=60)
        written.append(arguments.gif)
    print(*written, sep="\n")
    return 0


def _end(end: str, model: Model, *, texts: bool) -> int | str | torch.Tensor:
    """A seed, a picture, or for a model that reads ``texts`` any other text than a file's name."""
    if end.isdecimal():
        return int(end)
    return end if texts and not os.path.exists(end) else read_picture("ends", end, model.shape)
