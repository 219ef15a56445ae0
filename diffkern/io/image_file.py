"""One image file, of any mode that Pillow reads, as a small square of bytes.

Grey of 16 bits is scaled to 8, transparent pixels lie on white, photographs stand upright. Levels without a known
range are refused. A large image takes its decoded pixels and one strip more, and is read alone.
"""

import math
import threading
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

GAP = 8  # reduce by whole factors down to this many times the size; the filter does the rest
LARGE = 1 << 24  # pixels above which an image is reduced in strips
STRIP = 1 << 22  # pixels of a strip
LANCZOS_SUPPORT = 3  # pixels of the result that the filter reaches to each side

SIXTEEN_BITS = {
    "I;16": ("JPEG2000", "PNG", "TIFF"),
    "I;16B": ("PNG", "TIFF"),
    "I": ("PNG", "PPM"),  # 16 bits, or fewer that Pillow has scaled to 16
}
"""Modes of more than 8 bits, with the formats in which the range of their levels is known."""

PNG_TRANSPARENCY = {
    "L;2": lambda level: level * 85,
    "L;4": lambda level: level * 17,
    "RGB;16B": lambda colour: tuple(level >> 8 for level in colour),
}
"""From the bits of a PNG to the 8 bits that Pillow decodes them to, which it leaves out for the transparent colour."""

_large = threading.Lock()


def fault(path: Path) -> str | None:
    """Read the header of an image file: the reason why the image cannot be read, or None."""
    return _attempt(lambda: _opened(path).close())


def read_square(path: Path, out: np.ndarray) -> str | None:
    """Read an image file into ``out`` [C, size, size] uint8, with C = 3 for RGB or 1 for grey.

    The shorter side is scaled to ``size`` and the centre cut out. Returns the reason if it cannot be read, else None.
    """

    def read():
        with _opened(path) as image:
            out[:] = _square(image, out.shape[-1], "L" if len(out) == 1 else "RGB")

    return _attempt(read)


def _attempt(read) -> str | None:
    try:
        read()
    except UnidentifiedImageError:
        return "a file that Pillow does not identify"
    except MemoryError:
        return "one that does not fit in memory"
    except Exception as error:  # on a damaged file, Pillow's decoders raise nearly anything
        return " ".join(str(error).split()) or type(error).__name__
    return None


def _opened(path: Path) -> Image.Image:
    """Open an image without decoding it. Raises ValueError for levels without a known range."""
    image = Image.open(path)
    if image.mode == "F" or image.mode.startswith("I") and image.format not in SIXTEEN_BITS.get(image.mode, ()):
        image.close()
        raise ValueError(f"{'floats' if image.mode == 'F' else 'integers'} ({image.format}) without a known range")
    if image.format == "PNG" and "transparency" in image.info and image.tile[0][3] in PNG_TRANSPARENCY:
        image.info["transparency"] = PNG_TRANSPARENCY[image.tile[0][3]](image.info["transparency"])
    return image


def _square(image: Image.Image, size: int, mode: str) -> np.ndarray:
    """Decode an open image: [C, size, size] uint8."""
    drafted = image.draft(image.mode, (GAP * size, GAP * size))  # decodes a JPEG at 1/2, 1/4 or 1/8
    large = image.width * image.height > LARGE
    with _large if large else nullcontext():
        image.load()
        width, height = drafted[1][2:] if drafted else image.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if image.mode.startswith("I"):
            image = _eight_bits(image)
        image, box = _reduced(image, box, size, mode) if large else (_flat(image, mode), box)
        if orientation in (5, 6, 7, 8):
            image, box = image.transpose(Image.Transpose.TRANSPOSE), (box[1], box[0], box[3], box[2])
        pixels = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS, box)).reshape(size, size, -1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels.transpose(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey of 16 bits, or of as many as a TIFF says, to mode L; or to LA if a level is transparent."""
    tags = getattr(image, "tag_v2", {})
    white = 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
    inverted = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # white is zero
    transparent = image.info.get("transparency")
    width, height = image.size
    grey = np.empty((height, width), np.uint8)
    alpha = None if transparent is None else np.empty_like(grey)
    rows = max(1, STRIP // width)
    for y in range(0, height, rows):
        levels = np.asarray(image.crop((0, y, width, min(y + rows, height)))).astype(np.uint32)
        if alpha is not None:
            alpha[y : y + rows] = np.where(levels == transparent, 0, 255)
        levels = (levels * 255 + white // 2) // white
        grey[y : y + rows] = 255 - levels if inverted else levels
    bands = [Image.fromarray(band) for band in (grey, alpha) if band is not None]
    return bands[0] if alpha is None else Image.merge("LA", bands)


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of 8 bits to mode L or RGB, composited over white if it has transparency."""
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        image = canvas
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _reduced(image: Image.Image, box: tuple[float, ...], size: int, mode: str) -> tuple[Image.Image, tuple[float, ...]]:
    """Cut out what a filter from ``box`` to ``size`` reads; flatten it and reduce it to ``GAP * size`` pixels or more.

    Returns it with the box in its coordinates. Works strip by strip: a conversion of the whole would be a second copy.
    """
    side = box[2] - box[0]
    margin = LANCZOS_SUPPORT * max(1, side / size)
    left, top = (max(0, math.floor(edge - margin)) for edge in box[:2])
    right, bottom = (min(limit, math.ceil(edge + margin)) for edge, limit in zip(box[2:], image.size, strict=True))
    factor = max(1, int(side) // (GAP * size))
    rows = max(1, STRIP // (right - left) // factor) * factor
    reduced = Image.new(mode, (-(-(right - left) // factor), -(-(bottom - top) // factor)))
    for y in range(top, bottom, rows):
        strip = _flat(image.crop((left, y, right, min(y + rows, bottom))), mode)
        reduced.paste(strip.reduce(factor), (0, (y - top) // factor))
    return reduced, tuple((edge - first) / factor for edge, first in zip(box, (left, top, left, top), strict=True))
