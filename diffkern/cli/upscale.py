"""``diffkern upscale``: large pictures of small ones."""

import argparse

from ..image_to_image import upscale
from ..model import load
from ..system import System
from .drawing import Drawing, add_drawing
from .options import add_long_options, add_model, count
from .pictures import read_picture, side_of

N, STEPS = 1, 25
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
    parser.add_argument(
        "--augmentation", type=int, metavar="STEPS", help="noise that hides the image's details (default: the model's)"
    )
    add_drawing(parser, "upscaled.png", N, STEPS)


def run(arguments: argparse.Namespace) -> int:
    drawing, source = Drawing(arguments, N), load(arguments.model, arguments.device)
    shape = (source.drawn if isinstance(source, System) else source).shape
    channels, largest = shape[0], shape[-1]
    side = arguments.size or side_of("image", arguments.image)
    if side >= largest:
        asked = f"--size {side}" if arguments.size else f"{side} pixels a side, which --size can shrink"
        raise ValueError(f"image: expected fewer pixels a side than the {largest} of the model, got {asked}")
    small = read_picture("image", arguments.image, (channels, side, side)).expand(len(drawing.seeds), -1, -1, -1)
    x = upscale(source, small, augmentation=arguments.augmentation, **drawing.options)
    drawing.write(x, ("model", "image", "size", "augmentation"))
    return 0
