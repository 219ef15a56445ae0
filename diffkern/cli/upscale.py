"""``diffkern upscale``: large pictures of small ones."""

import argparse

import torch

from .. import images, ops
from ..image_to_image import upscale
from ..model import load
from ..samplers import SAMPLERS
from ..system import System
from .options import (
    add_grid,
    add_long_options,
    add_model,
    add_network,
    add_seeds,
    count,
    dtype_of,
    fresh_seeds,
    seed_ranges,
)
from .outputs import check_file
from .pictures import read_picture, side_of

STEPS = 25
EXAMPLES = """\
  diffkern upscale --model faces.safetensors small.png
  diffkern upscale --model faces.safetensors mine.png --size 32 --n 4 --augmentation 20"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument("image", help="an image file, whose centre is enlarged")
    add_model(parser, "; of pictures that are enlarged (docs/systems/cascade.md)", required=True)
    parser.add_argument(
        "--size", type=count, help="shrink the image to that many pixels a side first (default: its own)"
    )
    add_seeds(parser, 1)
    parser.add_argument(
        "--augmentation", type=int, metavar="STEPS", help="noise that hides the image's details (default: the model's)"
    )
    parser.add_argument("--sampler", choices=SAMPLERS, help="(default: unipc)")
    parser.add_argument("--steps", type=count, default=STEPS, help=f"of every model (default: {STEPS})")
    add_network(parser)
    add_grid(parser, "upscaled.png")


def run(arguments: argparse.Namespace) -> int:
    check_file("out", arguments.out, ".png")
    source = load(arguments.model, arguments.device)
    shape = (source.drawn if isinstance(source, System) else source).shape
    channels, largest = shape[0], shape[-1]
    side = arguments.size or side_of("image", arguments.image)
    if side >= largest:
        asked = f"--size {side}" if arguments.size else f"{side} pixels a side, which --size can shrink"
        raise ValueError(f"image: expected fewer pixels a side than the {largest} of the model, got {asked}")
    small = read_picture("image", arguments.image, (channels, side, side))
    ranges = seed_ranges(arguments.seeds, arguments.n, 1)
    seeds = torch.cat([ops.as_seeds(numbers, "cpu") for numbers in ranges])
    x = upscale(
        source,
        small.expand(len(seeds), -1, -1, -1),
        seeds=seeds,
        augmentation=arguments.augmentation,
        sampler=arguments.sampler,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
    )
    names = ("model", "image", "size", "augmentation", "sampler", "steps")
    settings = {name: getattr(arguments, name) for name in names} | {"seeds": seeds.tolist()}
    images.save_png(images.grid(x, columns=arguments.columns, scale=arguments.scale), arguments.out, settings)
    print(*fresh_seeds(arguments.seeds, ranges), arguments.out, sep="\n")
    return 0
