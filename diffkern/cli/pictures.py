"""Image files that a command is given, as a model's samples, and masks."""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .. import images
from ..io.image_file import read_square
from ..progress import tell

GRAY = ("1", "I", "L")
"""The first bands, in Pillow's words, of an image without colours."""


def read_picture(name: str, path: str | os.PathLike, shape: tuple[int, ...]) -> Tensor:
    """The image [C, size, size] in [-1, 1], its centre cut out. A line on stderr says what that changes of it.

    Raises FileNotFoundError or ValueError.
    """
    channels, height, width = shape
    if height != width or channels not in (1, 3):
        raise ValueError(f"model: expected one of square images of 1 or 3 channels, got {shape}")
    _check_is_file(name, path)
    pixels = np.empty((channels, height, width), np.uint8)
    reason = read_square(Path(path), pixels)
    if reason is not None:
        raise ValueError(f"{name}: expected an image file, got {os.fspath(path)!r}: {reason}")
    with Image.open(path) as image:
        changes = [f"{image.width} x {image.height} pixels become {width} x {height}"] * (image.size != (width, height))
        changes += ["its colours become gray"] * (channels == 1 and image.getbands()[0] not in GRAY)
    if changes:
        tell(f"{name}: {os.fspath(path)}: {', '.join(changes)}, as the model has them")
    return images.from_pixels(torch.from_numpy(pixels))


def side_of(name: str, path: str | os.PathLike) -> int:
    """The shorter side of an image file, in pixels. Raises FileNotFoundError or ValueError."""
    _check_is_file(name, path)
    try:
        with Image.open(path) as image:
            return min(image.size)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: expected an image file, got {os.fspath(path)!r}") from None


def _check_is_file(name: str, path: str | os.PathLike) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: expected an image file, got {os.fspath(path)!r}")


def add_mask(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the options that :func:`mask_of` reads."""
    where = parser.add_mutually_exclusive_group(required=required)
    where.add_argument("--mask", metavar="FILE", help="an image file, white where to make something new")
    where.add_argument(
        "--box",
        nargs=4,
        type=int,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="the same as a box, in pixels of the model: those of the image after it was cut to a square and scaled",
    )


def mask_of(arguments: argparse.Namespace, shape: tuple[int, ...]) -> Tensor | None:
    """The mask [1, H, W] of the options, 1 where to make something new; None where there is none."""
    if arguments.mask is not None:
        return (read_picture("mask", arguments.mask, (1, *shape[1:])) > 0).float()
    if arguments.box is None:
        return None
    left, top, right, bottom = arguments.box
    _, height, width = shape
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        box = arguments.box
        raise ValueError(f"box: expected 0 <= left < right <= {width}, 0 <= top < bottom <= {height}, got {box}")
    mask = torch.zeros(1, height, width, dtype=torch.float32, device="cpu")
    mask[:, top:bottom, left:right] = 1
    return mask
