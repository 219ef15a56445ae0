"""``diffkern restore``: pictures of which a damaged one may be what is left."""

import argparse

from ..image_to_image import restore
from ..model import load_one
from .drawing import Drawing, add_drawing
from .options import add_long_options, add_model
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
    add_drawing(parser, "restored.png", N, STEPS)


def run(arguments: argparse.Namespace) -> int:
    drawing, model = Drawing(arguments, N), load_one(arguments.model, arguments.device)
    mask = mask_of(arguments, model.shape)
    image = read_picture("image", arguments.image, model.shape)
    x = restore(model, image, mask=mask, **drawing.options)
    drawing.write(x, ("model", "image", "mask", "box"), given=image if mask is None else image * (1 - mask))
    return 0
