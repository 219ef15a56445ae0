"""Images out: a labelled grid, PNG with its settings inside, the denoising as a GIF, arrays as npz."""

import json
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .model import write_atomically

KEY = "diffkern"
"""The PNG's tEXt keyword under which the settings are, as JSON."""


def to_uint8(x: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1] (clamped) -> uint8 [N, H, W, C]; the inverse of x / 127.5 - 1, to the nearest.

    ValueError where a value is not finite: no pixel shows what a network that diverged has drawn.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x: expected [N, 1 or 3, H, W], got {tuple(x.shape)}")
    finite = x.detach().isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"x: expected finite images, got NaN or infinity in {int((~finite).sum())} of {len(x)}")
    pixels = (x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return pixels.round().byte().permute(0, 2, 3, 1).numpy()


def grid(x: Tensor, labels: Sequence[str] | None = None, *, columns: int | None = None, scale: int | None = None):
    """x [N, C, H, W] in [-1, 1] as one ``PIL.Image``, row by row, each image with its label below.

    ``columns`` makes the grid about square unless given; ``scale``, whole pixels a pixel, makes images 64 wide or more.
    """
    from PIL import Image, ImageDraw, ImageFont

    pixels = to_uint8(x)
    n, height, width, channels = pixels.shape
    if not n:
        raise ValueError("x: expected at least one image, got none")
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels: expected {n}, one an image, got {len(labels)}")
    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    scale = scale or math.ceil(64 / width)
    gap, text = 4, 14 if labels is not None else 0
    cell_w, cell_h = width * scale + gap, height * scale + gap + text

    mode, white = ("L", 255) if channels == 1 else ("RGB", (255, 255, 255))
    canvas = Image.new(mode, (columns * cell_w + gap, rows * cell_h + gap), white)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(11)
    for i, image in enumerate(pixels):
        left, top = gap + i % columns * cell_w, gap + i // columns * cell_h
        tile = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        canvas.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, top))
        if labels is not None:
            middle = (left + width * scale / 2, top + height * scale + text / 2)
            draw.text(middle, _fitted(labels[i], font, width * scale), 0, font=font, anchor="mm")
    return canvas


def _fitted(label: str, font, width: float) -> str:
    """The label, or as much of its beginning as fits."""
    if font.getlength(label) <= width:
        return label
    while label and font.getlength(label + "…") > width:
        label = label[:-1]
    return label + "…"


def save_png(image, path: str | os.PathLike, settings: dict[str, Any] | None = None) -> None:
    """Write a ``PIL.Image`` with ``settings`` (anything JSON holds) inside, for :func:`read_settings`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEY, json.dumps(settings or {}))
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info, optimize=True))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`save_png` put into the file."""
    from PIL import Image

    with Image.open(path) as image:
        text = getattr(image, "text", {})  # PNG alone has it
    if KEY not in text:
        raise ValueError(f"{path}: expected a PNG written by diffkern, got one without its settings")
    return json.loads(text[KEY])


def save_gif(frames: Sequence, path: str | os.PathLike, *, milliseconds: int = 60, hold: int = 2000) -> None:
    """``PIL.Image`` frames as an endless GIF, a frame each ``milliseconds``, the last one for ``hold``."""
    if not frames:
        raise ValueError("frames: expected at least one, got none")
    first, *rest = [frame.quantize(256) if frame.mode == "RGB" else frame for frame in frames]
    durations = [milliseconds] * len(rest) + [hold]
    write_atomically(
        path,
        lambda temporary: first.save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=False
        ),
    )


def save_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Named arrays, compressed; none of them holds Python objects."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"{name}: expected numbers or text, got Python objects")

    def write_to(temporary):
        with open(temporary, "wb") as file:  # a path would get .npz appended
            np.savez_compressed(file, **arrays)

    write_atomically(path, write_to)
