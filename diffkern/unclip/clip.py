"""CLIP (Radford et al. 2021): two towers embed pictures and texts in one space, near where they belong together."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..networks.blocks import Conv3x3, group_norm_silu
from ..process import checked_count
from .vocabulary import Vocabulary

GROUPS, EPS = 8, 1e-5  # of every GroupNorm
LARGEST_SCALE = 50.0  # of the cosines in the loss
LARGEST = {"size": 2**12, "features": 2**16, "text_width": 2**16, "text_layers": 64, "heads": 2**10, "length": 2**16}


class CLIP(nn.Module):
    """Embeds pictures and texts as unit vectors [N, features].

    words       the vocabulary
    size        of a picture's side, a multiple of 16
    features    of an embedding
    widths      of the image tower, at 1/2, 1/4, 1/8 and 1/16 of the side
    text_width, text_layers, heads, length
                of the text tower: a transformer of that many layers over at most ``length`` words

    ``config`` holds the options but for the words. Raises TypeError or ValueError for those of which none can be made.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        size: int = 32,
        features: int = 128,
        widths: Sequence[int] = (32, 64, 128, 192),
        text_width: int = 128,
        text_layers: int = 2,
        heads: int = 4,
        length: int = 16,
    ):
        super().__init__()
        sizes = dict(size=size, features=features, text_width=text_width, text_layers=text_layers, heads=heads)
        self.config: dict[str, Any] = {
            **{name: _checked(name, value) for name, value in (sizes | dict(length=length)).items()},
            "widths": _checked_widths(widths, size),
        }
        if text_width % heads:
            raise ValueError(f"heads: expected a divisor of text_width {text_width}, got {heads}")
        self.vocabulary = Vocabulary(words)
        self.image = ImageTower(size, widths, features)
        self.text = TextTower(len(words), text_width, text_layers, heads, length, features)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0), dtype=torch.float32, device="cpu"))

    def embed_images(self, x: Tensor) -> Tensor:
        """Embed pictures [N, 3, H, W] in [-1, 1], scaled to the model's size, as unit vectors [N, features]."""
        size = self.config["size"]
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"images: expected floats [N, 3, H, W], got {got}")
        if x.shape[2:] != (size, size):
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
        return self.image(x.to(self.log_scale.device))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Embed texts as unit vectors [N, features], each by itself: the others change no bit of it.

        Warns of unknown words, which are left out. Raises ValueError for a text that has no others.
        """
        known: dict[str, Tensor] = {}
        for text in texts:
            if text not in known:
                words = self.vocabulary.rows([text], self.config["length"])
                known[text] = self.text(words.to(self.log_scale.device))
        return torch.cat([known[text] for text in texts])

    def loss(self, images: Tensor, texts: Tensor, things: Tensor) -> Tensor:
        """The contrastive loss of N pairs, in both directions: []. Pairs of one thing are right answers to each other.

        images  [N, 3, size, size]; texts: [N, length] int64, the numbers of words; things: [N] int64
        """
        cosines = self.image(images) @ self.text(texts).T
        logits = self.log_scale.exp().clamp(max=LARGEST_SCALE) * cosines
        same = (things[:, None] == things).float()
        right = same / same.sum(1, keepdim=True)
        by_image, by_text = (-(right * scores.log_softmax(1)).sum(1).mean() for scores in (logits, logits.T))
        return (by_image + by_text) / 2


def _checked(name: str, value: Any) -> int:
    if checked_count(name, value) > LARGEST[name]:
        raise ValueError(f"{name}: expected at most {LARGEST[name]}, got {value}")
    return value


def _checked_widths(widths: Any, size: int) -> tuple[int, ...]:
    expected = f"widths: expected multiples of {GROUPS}, as many as halve {size} to a whole number"
    if not isinstance(widths, Sequence) or isinstance(widths, str):
        raise TypeError(f"{expected}, got {widths!r}")
    widths = tuple(checked_count("widths", width) for width in widths)
    if not widths or size % 2 ** len(widths) or any(width % GROUPS or width > LARGEST["features"] for width in widths):
        raise ValueError(f"{expected}, got {widths}")
    return widths


class ImageTower(nn.Module):
    def __init__(self, size: int, widths: Sequence[int], features: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, 2, 1)
        blocks = []
        for c_in, c_out in zip(widths, (*widths[1:], None), strict=True):
            if c_out is not None:
                blocks += [Residual(c_in, c_in, 1), Residual(c_in, c_out, 2)]
        self.blocks = nn.Sequential(*blocks)
        side = size // 2 ** len(widths)
        self.linear_1 = nn.Linear(widths[-1] * side * side, 3 * features)
        self.linear_2 = nn.Linear(3 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.conv_in(x)).flatten(1)
        return F.normalize(self.linear_2(F.silu(self.linear_1(x))), dim=-1)


class Residual(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.norm_1, self.norm_2 = nn.GroupNorm(GROUPS, c_in, EPS), nn.GroupNorm(GROUPS, c_out, EPS)
        self.conv_1, self.conv_2 = Conv3x3(c_in, c_out, 3, stride, 1), Conv3x3(c_out, c_out, 3, 1, 1)
        self.stride, self.shortcut = stride, nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_2(group_norm_silu(self.norm_2, self.conv_1(group_norm_silu(self.norm_1, x))))
        return h + self.shortcut(F.avg_pool2d(x, 2) if self.stride == 2 else x)


class TextTower(nn.Module):
    def __init__(self, words: int, width: int, layers: int, heads: int, length: int, features: int):
        super().__init__()
        self.embedding = nn.Embedding(words + 1, width, padding_idx=0)
        self.position = nn.Parameter(torch.empty(length, width, dtype=torch.float32, device="cpu"))
        nn.init.normal_(self.position, std=0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.linear = nn.Linear(width, features)
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, words: Tensor) -> Tensor:
        """[N, length] int64, 0 where there is none -> [N, features]: the mean over the words."""
        absent = words == 0
        x = self.layers(self.embedding(words) + self.position, src_key_padding_mask=absent)
        there = (~absent).to(x.dtype)[..., None]
        return F.normalize(self.linear((x * there).sum(1) / there.sum(1)), dim=-1)
