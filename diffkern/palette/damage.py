"""Damage to pictures that a restoration undoes: gray, a hole, a coarse JPEG. Each is a function of a seed."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..datasets import DATASET_STREAM
from ..image_to_image import IMAGE, gray, holed, picture_of
from ..images import from_pixels, to_pixels
from ..philox import words

KINDS = ("gray", "hole", "jpeg")

DAMAGE_STEP = 3 << 30
"""The step, in the stream of the data sets, of what is drawn for a damage by its seed."""

HOLE = (0.25, 0.75)  # of a side: the least and the largest side of a hole
QUALITIES = (5, 30)  # of a JPEG


class Damage:
    """A transform of items: x, and as "image" what is left of it after one of ``kinds``. Labels and all else are left
    out, and an item is as :class:`diffkern.cascade.pictures.LowResolution` takes it.

    The damage is that of a seed drawn by torch's generator, and so that of the example (:class:`diffkern.data.Items`).
    """

    def __init__(self, kinds: Sequence[str] = KINDS):
        self.kinds = tuple(kinds)

    def __call__(self, item: Any) -> dict[str, Any]:
        x, picture = picture_of(item)
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        return {"x": x, IMAGE: damaged(picture, int(seed), self.kinds)}


def damaged(x: Tensor, seed: int, kinds: Sequence[str] = KINDS) -> Tensor:
    """Damage a picture [3, H, W] in [-1, 1] as a seed says: by one of ``kinds``, equally likely.

    "gray" is its luma; "hole" has noise in a rectangle; "jpeg" is what a JPEG of quality 5 to 30 holds.
    Raises ValueError for other kinds.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds: expected some of {', '.join(KINDS)}, got {kind!r}")
    blocks = [words(np.array([seed]), DAMAGE_STEP + block, DATASET_STREAM, 0)[0].tolist() for block in range(2)]
    which, *drawn = (word * 2.0**-32 for word in (*blocks[0], *blocks[1]))
    kind = kinds[int(which * len(kinds))]
    if kind == "gray":
        return gray(x)
    if kind == "jpeg":
        low, high = QUALITIES
        return jpeg(x, low + int(drawn[0] * (high + 1 - low)))
    mask = hole(tuple(x.shape[1:]), drawn[:4])
    return holed(x[None], mask, torch.tensor([seed], dtype=torch.int64, device="cpu"))[0]


def hole(size: tuple[int, int], drawn: Sequence[float]) -> Tensor:
    """A rectangle of ones in zeros, [1, *size], by four numbers in [0, 1): its height and width, its top and left."""
    mask = torch.zeros(1, *size, dtype=torch.float32, device="cpu")
    low, high = HOLE
    sides = [max(1, int((low + (high - low) * u) * whole)) for u, whole in zip(drawn[:2], size, strict=True)]
    first = [int(u * (whole - side + 1)) for u, whole, side in zip(drawn[2:], size, sides, strict=True)]
    mask[:, first[0] : first[0] + sides[0], first[1] : first[1] + sides[1]] = 1
    return mask


def jpeg(x: Tensor, quality: int) -> Tensor:
    """A picture [3, H, W] in [-1, 1] as a JPEG of that quality, with halved colour resolution, holds it."""
    from PIL import Image

    pixels = to_pixels(x).permute(1, 2, 0).contiguous().numpy()
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        with Image.open(file) as image:
            decoded = np.asarray(image.convert("RGB"))
    return from_pixels(torch.from_numpy(decoded.copy()).permute(2, 0, 1)).contiguous()
