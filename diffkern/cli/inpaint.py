"""``diffkern inpaint``: a part of an image, made anew."""

import argparse

import torch

from .. import images, ops
from ..constraints import Inpaint
from ..model import load_one
from ..samplers import SAMPLERS
from ..sampling import sample
from .options import (
    add_grid,
    add_guidance,
    add_long_options,
    add_model,
    add_network,
    add_seeds,
    count,
    dtype_of,
    fresh_seeds,
    guidance,
    labels_of,
    seed_ranges,
)
from .outputs import check_file
from .pictures import add_mask, mask_of, read_picture

N = 7
EXAMPLES = """\
  diffkern inpaint mine.png --box 8 0 24 16
  diffkern inpaint mine.png --mask hole.png --resample 10 --labels Bag --seeds random"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument("image", help="an image file")
    add_mask(parser, required=True)
    add_model(parser)
    add_seeds(parser, N)
    parser.add_argument("--labels", "--label", nargs="+", metavar="LABEL", help="of the images (default: none)")
    add_guidance(parser)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="(default: ddpm)")
    parser.add_argument("--steps", type=count, default=100, help="(default: 100)")
    parser.add_argument(
        "--resample", type=count, default=1, help="how often to go through each part of the run, as RePaint does"
    )
    add_network(parser)
    add_grid(parser, "inpainted.png")


def run(arguments: argparse.Namespace) -> int:
    check_file("out", arguments.out, ".png")
    model = load_one(arguments.model, arguments.device)
    mask = mask_of(arguments, model.shape)
    image = read_picture("image", arguments.image, model.shape)
    ranges = seed_ranges(arguments.seeds, arguments.n, N)
    seeds = torch.cat([ops.as_seeds(numbers, "cpu") for numbers in ranges])
    labels = labels_of(arguments.labels or (["none"] if model.classes else None), model, len(seeds))
    x = sample(
        model,
        seeds=seeds,
        labels=labels,
        sampler=arguments.sampler,
        steps=arguments.steps,
        guidance=guidance(arguments.guidance, arguments.guide),
        constraint=Inpaint(image[None], mask[None], arguments.resample),
        batch_size=arguments.batch_size,
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
    )
    names = ("model", "image", "mask", "box", "labels", "guidance", "guide", "sampler", "steps", "resample")
    settings = {name: getattr(arguments, name) for name in names} | {"seeds": seeds.tolist()}
    shown = torch.cat(((image * (1 - mask))[None], x.cpu()))  # first what was given, its hole in grey
    columns = arguments.columns or len(shown)
    images.save_png(images.grid(shown, columns=columns, scale=arguments.scale), arguments.out, settings)
    print(*fresh_seeds(arguments.seeds, ranges), arguments.out, sep="\n")
    return 0
