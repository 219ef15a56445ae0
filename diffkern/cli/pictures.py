"""Image files that a command is given, as a model's samples."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import images
from ..io.image_file import read_square


def read_picture(name: str, path: str | os.PathLike, shape: tuple[int, ...]) -> Tensor:
    """The image [C, size, size] in [-1, 1], its centre cut out. Raises FileNotFoundError or ValueError."""
    channels, height, width = shape
    if height != width or channels not in (1, 3):
        raise ValueError(f"model: expected one of square images of 1 or 3 channels, got {shape}")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name}: expected an image file, got {os.fspath(path)!r}")
    pixels = np.empty((channels, height, width), np.uint8)
    reason = read_square(Path(path), pixels)
    if reason is not None:
        raise ValueError(f"{name}: expected an image file, got {os.fspath(path)!r}: {reason}")
    return images.from_pixels(torch.from_numpy(pixels))
