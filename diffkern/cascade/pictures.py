"""The data of an upsampler: pictures, each with a small version of it, enlarged and noised."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..image_to_image import AUGMENTATION, IMAGE, augmented, picture_of, resized
from ..schedule import Schedule

MOST = 300
"""The largest level of noise, in time steps of a schedule of 1000 (Ho et al. 2022)."""


class LowResolution:
    """A transform of items: x, and as "image" what an upsampler is given of it. Labels and all else are left out.

    An item is as :class:`diffkern.data.Items` reads it: x, (x, label), or a dict with "x", which is a picture [C, H, W]
    of bytes, or of floats in [-1, 1].

    factor    by how much x is shrunk, by averages over squares, before it is enlarged again
    schedule  of the noise on "image", whose level, uniform in 0..:data:`MOST`, is "augmentation"; None: no noise

    Level and noise are drawn by torch's generator, and so are those of the example (:class:`diffkern.data.Items`).
    """

    def __init__(self, factor: int, schedule: Schedule | None = None):
        self.factor, self.schedule = factor, schedule

    def __call__(self, item: Any) -> dict[str, Any]:
        x, picture = picture_of(item)
        image = resized(shrunk(picture[None], self.factor), x.shape[1:])
        if self.schedule is None:
            return {"x": x, IMAGE: image[0]}
        level = torch.randint(MOST + 1, (), dtype=torch.int64, device="cpu")
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")
        return {"x": x, IMAGE: augmented(image, int(level), seed, self.schedule)[0], AUGMENTATION: level}


def shrunk(x: Tensor, factor: int) -> Tensor:
    """Pictures [N, C, H, W] averaged over squares: [N, C, H / factor, W / factor]."""
    return F.avg_pool2d(x, factor)
