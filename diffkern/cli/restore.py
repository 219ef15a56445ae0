"""``diffkern restore``: pictures of which a damaged one may be what is left."""

import argparse

import torch

from .. import images, ops
from ..image_to_image import restore
from ..model import load_one
from ..samplers import SAMPLERS
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
from .pictures import add_mask, mask_of, read_picture

N, STEPS = 4, 25
EXAMPLES = """\
  diffkern restore --model palette.safetensors gray.png
  diffkern restore --model palette.safetensors mine.png --box 8 8 20 20 --seeds random"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument("image", help="an image file: gray, with a hole, or a coarse JPEG")
    add_mask(parser)
    add_model(parser, "; of pictures that are restored (docs/systems/cascade.md)", required=True)
    add_seeds(parser, N)
    parser.add_argument("--sampler", choices=SAMPLERS, help="(default: unipc)")
    parser.add_argument("--steps", type=count, default=STEPS, help=f"(default: {STEPS})")
    add_network(parser)
    add_grid(parser, "restored.png")


def run(arguments: argparse.Namespace) -> int:
    check_file("out", arguments.out, ".png")
    model = load_one(arguments.model, arguments.device)
    mask = mask_of(arguments, model.shape)
    image = read_picture("image", arguments.image, model.shape)
    ranges = seed_ranges(arguments.seeds, arguments.n, N)
    seeds = torch.cat([ops.as_seeds(numbers, "cpu") for numbers in ranges])
    x = restore(
        model,
        image,
        seeds=seeds,
        mask=mask,
        sampler=arguments.sampler,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
    )
    names = ("model", "image", "mask", "box", "sampler", "steps")
    settings = {name: getattr(arguments, name) for name in names} | {"seeds": seeds.tolist()}
    shown = torch.cat(((image if mask is None else image * (1 - mask))[None], x.cpu()))  # first what was given
    columns = arguments.columns or len(shown)
    images.save_png(images.grid(shown, columns=columns, scale=arguments.scale), arguments.out, settings)
    print(*fresh_seeds(arguments.seeds, ranges), arguments.out, sep="\n")
    return 0
