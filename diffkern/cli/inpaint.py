"""``diffkern inpaint``: a part of an image, made anew."""

import argparse

from ..constraints import Inpaint
from ..model import load_one
from ..sampling import sample
from .drawing import Drawing, add_drawing
from .options import add_guidance, add_long_options, add_model, count, guidance, labels_of
from .pictures import add_mask, mask_of, read_picture

N, STEPS = 7, 100
EXAMPLES = """\
  diffkern inpaint mine.png --box 8 0 24 16
  diffkern inpaint mine.png --mask hole.png --resample 10 --labels Bag --seeds random"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument("image", help="an image file")
    add_mask(parser, required=True)
    add_model(parser)
    parser.add_argument("--labels", "--label", nargs="+", metavar="LABEL", help="of the images (default: none)")
    add_guidance(parser)
    parser.add_argument(
        "--resample", type=count, default=1, help="how often to go through each part of the run, as RePaint does"
    )
    add_drawing(parser, "inpainted.png", N, STEPS, sampler="ddpm")


def run(arguments: argparse.Namespace) -> int:
    drawing, model = Drawing(arguments, N), load_one(arguments.model, arguments.device)
    mask = mask_of(arguments, model.shape)
    image = read_picture("image", arguments.image, model.shape)
    x = sample(
        model,
        labels=labels_of(arguments.labels or (["none"] if model.classes else None), model, len(drawing.seeds)),
        guidance=guidance(arguments.guidance, arguments.guide),
        constraint=Inpaint(image[None], mask[None], arguments.resample),
        **drawing.options,
    )
    settings = ("model", "image", "mask", "box", "labels", "guidance", "guide", "resample")
    drawing.write(x, settings, given=image * (1 - mask))  # its hole in gray
    return 0
