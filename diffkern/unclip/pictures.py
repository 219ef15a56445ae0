"""The drawings that unCLIP is trained on, with their captions, as they are and moved a little."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..datasets import emoji

DROP = 0.5
"""The chance that a caption leaves out its tag, and its style."""


class Pictures:
    """The drawings of a split in memory: ``x`` uint8 [P, 3, 32, 32], the number of the thing of each, captions."""

    def __init__(self, split: str = "train"):
        self.set = emoji.Emoji(split=split, drop=DROP)
        self.x = torch.stack([self.set[i]["x"] for i in range(len(self.set))])
        self.things = torch.tensor([thing for thing, _ in emoji.pairs(split)], dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.x)

    def pixels(self, index: Tensor) -> Tensor:
        return self.x[index].float() / 127.5 - 1

    def captions(self, index: Tensor, round: int) -> list[str]:
        """Another one of the same picture in each ``round``."""
        return [self.set.caption(i + round * len(self)) for i in index.tolist()]


SHIFT, SCALE, TURN = 0.2, 0.15, 0.2  # of half a side; of the size; in radians: at most
ERASED = 0.5  # the chance that a rectangle of a picture is white


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures shifted, scaled and turned a little, on white, of half of which a rectangle is missing.

    Few drawings are seen often: without this, CLIP knows them by heart and others badly.
    """
    n, _, height, width = x.shape
    drawn = torch.rand(n, 9, generator=generator, dtype=torch.float32, device="cpu")
    shift, (scale, turn) = SHIFT * (2 * drawn[:, :2] - 1), (2 * drawn[:, 2:4] - 1).T
    size, angle = 1 + SCALE * scale, TURN * turn
    cos, sin = size * angle.cos(), size * angle.sin()
    matrix = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(n, 2, 3)
    x = 1 - F.grid_sample(1 - x, F.affine_grid(matrix, x.shape, align_corners=False), align_corners=False)
    low, extent = drawn[:, 4:6], 0.1 + 0.3 * drawn[:, 6:8]
    inside = [
        (place >= low[:, i, None]) & (place < low[:, i, None] + extent[:, i, None])
        for i, place in enumerate((_places(height), _places(width)))
    ]
    hole = inside[0][:, :, None] & inside[1][:, None, :] & (drawn[:, 8] < ERASED)[:, None, None]
    return x.masked_fill(hole[:, None], 1.0)


def _places(size: int) -> Tensor:
    """The positions of pixels along a side, in [0, 1)."""
    return torch.arange(size, dtype=torch.float32, device="cpu") / size
