"""Images out: a labelled grid, PNG with its settings inside, the denoising as a GIF, arrays as npz."""

import bisect
import functools
import json
import math
import os
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .io.files import check_regular, write_atomically

KEY = "diffkern"
"""The PNG's tEXt keyword under which the settings are, as JSON."""

FAR = 2.0  # the largest magnitude of floats that are taken for a picture in [-1, 1]; those of pixels reach 255
GAP, TEXT = 4, 14  # pixels between images, and for the text below each
LONGEST_SIDE = 2**29 - 1  # of an image in Pillow
LONGEST_SIDE_OF_GIF = 2**16 - 1


def to_pixels(x: Tensor) -> Tensor:
    """Round [-1, 1] (clamped) to 0..255, as uint8 of the same shape: the inverse of :func:`from_pixels`."""
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()


def from_pixels(pixels: Tensor) -> Tensor:
    """Map 0..255 to [-1, 1], as float32: pixels / 127.5 - 1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x: Tensor) -> np.ndarray:
    """[N, C, H, W] in [-1, 1] (clamped) -> uint8 [N, H, W, C], by :func:`to_pixels`.

    ValueError where a value is not finite: no pixel shows what a network that diverged has drawn.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"x: expected [N, 1 or 3, H, W], got {tuple(x.shape)}")
    finite = x.detach().isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(f"x: expected finite images, got NaN or infinity in {int((~finite).sum())} of {len(x)}")
    return to_pixels(x.cpu()).permute(0, 2, 3, 1).numpy()


class Layout(NamedTuple):
    """How a grid is laid out, in pixels; ``size`` and ``cell`` are (width, height)."""

    columns: int
    scale: int
    cell: tuple[int, int]
    size: tuple[int, int]


def layout(
    n: int, height: int, width: int, *, labelled: bool, columns: int | None = None, scale: int | None = None
) -> Layout:
    """Lay :func:`grid` out for ``n`` images of that size.

    Raises ValueError for a grid that Pillow cannot hold, and for a ``scale`` by which it could not open it again.
    """
    from PIL import Image

    for name, value in (("columns", columns), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    columns = min(n, columns or math.ceil(math.sqrt(n)))
    rows = math.ceil(n / columns)
    pixels = scale or math.ceil(64 / width)
    cell = (width * pixels + GAP, height * pixels + GAP + (TEXT if labelled else 0))
    size = (columns * cell[0] + GAP, rows * cell[1] + GAP)
    if max(size) > LONGEST_SIDE:
        name, value = ("columns", columns) if scale is None else ("scale", scale)
        raise ValueError(f"{name}: expected a grid of at most {LONGEST_SIDE} pixels a side, got {size} by {value}")
    limit = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    if scale not in (None, 1) and math.prod(size) > limit:
        raise ValueError(f"scale: expected a grid of at most {limit} pixels, got {size} by {scale}")
    return Layout(columns, pixels, cell, size)


def grid(x: Tensor, labels: Sequence[str] | None = None, *, columns: int | None = None, scale: int | None = None):
    """x [N, C, H, W] in [-1, 1] as one ``PIL.Image``, row by row, each image with its label below.

    ``columns`` makes the grid about square unless given; ``scale``, whole pixels a pixel, makes images 64 wide or more.
    A label is one line; a character that the font does not have is its base letter, or else Python's escape of it.
    """
    from PIL import Image, ImageDraw

    pixels = to_uint8(x)
    n, height, width, channels = pixels.shape
    if not n:
        raise ValueError("x: expected at least one image, got none")
    if labels is not None and len(labels) != n:
        raise ValueError(f"labels: expected {n}, one an image, got {len(labels)}")
    columns, scale, (cell_w, cell_h), size = layout(
        n, height, width, labelled=labels is not None, columns=columns, scale=scale
    )

    mode, white = ("L", 255) if channels == 1 else ("RGB", (255, 255, 255))
    canvas = Image.new(mode, size, white)
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(pixels):
        left, top = GAP + i % columns * cell_w, GAP + i // columns * cell_h
        tile = Image.fromarray(image.squeeze(-1) if channels == 1 else image)
        canvas.paste(tile.resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, top))
        if labels is not None:
            middle = (left + width * scale / 2, top + height * scale + TEXT / 2)
            draw.text(middle, _fitted(labels[i], width * scale), 0, font=font(), anchor="mm")
    return canvas


def picture(x: Tensor):
    """x [C, H, W] in [-1, 1], of 1 or 3 channels, as a ``PIL.Image``."""
    from PIL import Image

    pixels = to_uint8(x[None])[0]
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def captions(classes: Sequence[str], labels: Sequence[int]) -> list[str]:
    """The text below each image: its class's name, or its number if the font cannot spell it; "" for the null class."""
    spelled = [all(_spelled(character) is not None for character in name) and _line(name) for name in classes]
    names = [line or str(label) for label, line in enumerate(spelled)]
    return ["" if label < 0 else names[label] for label in labels]


def _fitted(label: str, width: int) -> str:
    """The label as one line that the font can draw, or as much of its beginning as fits."""
    line, whole = _line(label[:width]), len(label) <= width  # no character is less than a pixel wide
    if whole and font().getlength(line) <= width:
        return line
    fits = bisect.bisect_right(range(len(line)), width, key=lambda length: font().getlength(line[:length] + "…"))
    return line[: max(fits - 1, 0)] + "…"


def _line(text: str) -> str:
    spelled = (_spelled(character) for character in text)
    escaped = (ascii(character)[1:-1] if line is None else line for character, line in zip(text, spelled, strict=True))
    return " ".join("".join(escaped).split())


@functools.lru_cache(4096)
def _spelled(character: str) -> str | None:
    """The character by what the font has: a space for a line break, the base letter of an accented one. None: nothing.

    Marks and formats that are invisible alone are left out.
    """
    kind = unicodedata.category(character)
    if kind in ("Cc", "Zl", "Zp", "Zs"):
        return " "
    if kind in ("Cf", "Me", "Mn"):
        return ""
    if _drawn(character) != _drawn("\uffff"):  # no character: the font draws a box for it, and for what it lacks
        return character
    base = unicodedata.normalize("NFKD", character)
    return None if base == character else "".join(_spelled(part) or "" for part in base) or None


def _drawn(character: str) -> tuple[tuple[int, int], bytes]:
    mask = font().getmask(character)
    return mask.size, bytes(mask)


@functools.cache
def font():
    """The font of labels: 11 pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(11)


def save_png(image, path: str | os.PathLike, settings: dict[str, Any] | None = None) -> None:
    """Write a ``PIL.Image`` with ``settings`` (anything JSON holds) inside, for :func:`read_settings`."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(KEY, json.dumps(settings or {}))
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG", pnginfo=info, optimize=True))


def read_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Return the settings that :func:`save_png` put into the file."""
    from PIL import Image

    check_regular(path)
    with Image.open(path) as image:
        text = getattr(image, "text", {})  # PNG alone has it
    if KEY not in text:
        raise ValueError(f"{path}: expected a PNG written by diffkern, got one without its settings")
    return json.loads(text[KEY])


def save_gif(frames: Sequence, path: str | os.PathLike, *, milliseconds: int = 60, hold: int = 2000) -> None:
    """``PIL.Image`` frames as an endless GIF, a frame each ``milliseconds``, the last one for ``hold``."""
    if not frames:
        raise ValueError("frames: expected at least one, got none")
    check_gif(frames[0].size)
    first, *rest = [frame.quantize(256) if frame.mode == "RGB" else frame for frame in frames]
    durations = [milliseconds] * len(rest) + [hold]
    write_atomically(
        path,
        lambda temporary: first.save(
            temporary, format="GIF", save_all=True, append_images=rest, duration=durations, loop=0, optimize=False
        ),
    )


def check_gif(size: tuple[int, int]) -> None:
    """ValueError if a GIF cannot be as large as ``size``, in pixels."""
    if max(size) > LONGEST_SIDE_OF_GIF:
        raise ValueError(f"frames: expected at most {LONGEST_SIDE_OF_GIF} pixels a side, got {size}")


def save_npz(path: str | os.PathLike, **arrays: np.ndarray) -> None:
    """Named arrays, compressed; none of them holds Python objects."""
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:
            raise TypeError(f"{name}: expected numbers or text, got Python objects")

    def write_to(temporary):
        with open(temporary, "wb") as file:  # a path would get .npz appended
            np.savez_compressed(file, **arrays)

    write_atomically(path, write_to)
