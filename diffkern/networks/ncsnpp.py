"""DDPM++ and NCSN++, the U-Nets of Song et al. 2021b (appendix H), as Karras et al. 2022 (appendix F.5) have them."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import AttentionBlock, Conv3x3, ResBlock, TimestepEmbedding, group_norm_silu, timestep_embedding

EPS = 1e-6  # of every norm
ENCODERS, DECODERS, EMBEDDINGS = ("plain", "skip", "residual"), ("plain", "skip"), ("sines", "fourier")


def groups_of(channels: int) -> int:
    """Return the number of groups of a norm: 4 channels a group, but at most 32 groups."""
    return min(32, channels // 4)


def resample(x: Tensor, taps: Sequence[int], up: bool) -> Tensor:
    """Double or halve the resolution by a separable filter; (1, 1) is nearest neighbour, and the mean."""
    kernel = torch.tensor(taps, dtype=x.dtype, device=x.device)
    kernel = kernel.outer(kernel) / kernel.sum().square()
    channels, padding = x.shape[1], (len(taps) - 1) // 2
    kernel = kernel.expand(channels, 1, -1, -1)
    if up:
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


class Block(ResBlock):
    """A residual block, and attention behind it if asked for. Sums are scaled to keep the variance."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        emb_dim: int,
        *,
        scale: float,
        taps: Sequence[int],
        dropout: float,
        attention: bool = False,
        resample: str | None = None,
    ):
        groups = groups_of(c_out)
        options = dict(groups=groups, eps=EPS)
        super().__init__(c_out, c_out, emb_dim, **options, dropout=dropout, scale_shift=False, resample=resample)
        self.scale, self.taps = scale, tuple(taps)
        self.norm1 = nn.GroupNorm(groups_of(c_in), c_in, EPS)
        self.conv1 = Conv3x3(c_in, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if resample or c_in != c_out else None
        self.attention = AttentionBlock(c_out, head_dim=None, **options) if attention else None

    def resampled(self, x: Tensor) -> Tensor:
        return resample(x, self.taps, self.resample == "up") if self.resample else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        x = self.scale * super().forward(x, emb)
        return x if self.attention is None else self.scale * self.attention(x, emb)


class Pyramid(nn.Module):
    """The image itself, at a lower resolution, beside the features: added to them by a convolution."""

    def __init__(self, c_in: int, c_out: int, residual: bool, scale: float, taps: Sequence[int]):
        super().__init__()
        self.residual, self.scale, self.taps = residual, scale, tuple(taps)
        self.conv = nn.Conv2d(c_in, c_out, 3 if residual else 1)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """(features, image) of this resolution, from x of this one and the image of the one before."""
        if not self.residual:
            image = resample(image, self.taps, up=False)
            return x + self.conv(image), image
        padding = 1 + (len(self.taps) - 1) // 2  # of the convolution and the filter, zeros once
        h = F.conv2d(F.pad(image, (padding,) * 4), self.conv.weight)
        kernel = torch.tensor(self.taps, dtype=h.dtype, device=h.device)
        kernel = (kernel.outer(kernel) / kernel.sum().square()).expand(h.shape[1], 1, -1, -1)
        h = F.conv2d(h, kernel, stride=2, groups=h.shape[1]) + self.conv.bias[:, None, None]
        x = self.scale * (x + h)
        return x, x


class Head(nn.Module):
    """norm, silu, conv: an image of features."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups_of(c_in), c_in, EPS)
        self.conv = Conv3x3(c_in, c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(group_norm_silu(self.norm, x))


class Stage(nn.Module):
    """The blocks of one resolution on one side of the U; the step to it comes first."""

    def __init__(self, resample: Block | None, pyramid: Pyramid | None, blocks: list[Block], head: Head | None):
        super().__init__()
        self.resample, self.pyramid, self.blocks, self.head = resample, pyramid, nn.ModuleList(blocks), head


class NCSNpp(nn.Module):
    """Predicts eps, or another target, from x_t and t.

    in_channels, out_channels   of the image
    channels, channel_mult      width of the first level, and each level's multiple of it; a level halves H and W
    blocks                      residual blocks a level (one more on the way up)
    attention_levels            levels with attention: behind each block on the way down, behind the last on the way up
    embedding                   of t: "sines" (DDPM++), or "fourier" at random frequencies (NCSN++)
    encoder                     how the image joins the features on the way down: "skip", "residual"; "plain": not
    decoder                     "plain", or "skip": the sum of an image of each level
    taps                        of the filter between resolutions: (1, 1) in DDPM++, (1, 3, 3, 1) in NCSN++
    skip_rescale                scale sums by 1 / sqrt(2)
    num_classes                 class-conditional: labels 0..num_classes-1, and -1 or None for the null class
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 4,
        attention_levels: Sequence[int] = (1,),
        embedding: str = "sines",
        encoder: str = "plain",
        decoder: str = "plain",
        taps: Sequence[int] = (1, 1),
        skip_rescale: bool = True,
        num_classes: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        known = dict(embedding=EMBEDDINGS, encoder=ENCODERS, decoder=DECODERS)
        for name, names in known.items():
            if self.config[name] not in names:
                raise ValueError(f"{name}: expected one of {', '.join(names)}, got {self.config[name]!r}")
        for name in ("channel_mult", "attention_levels", "taps"):
            self.config[name] = tuple(self.config[name])
        emb_dim, scale = 4 * channels, math.sqrt(0.5) if skip_rescale else 1.0
        features = channels if embedding == "sines" else 2 * channels

        def block(c_in: int, c_out: int, attention: bool = False, resample: str | None = None) -> Block:
            options = dict(scale=scale, taps=taps, dropout=dropout)
            return Block(c_in, c_out, emb_dim, **options, attention=attention, resample=resample)

        if embedding == "fourier":
            self.register_buffer("freqs", torch.zeros(channels, dtype=torch.float32, device="cpu"))
        self.time_embedding = TimestepEmbedding(features, emb_dim)
        self.num_classes, self.null_class = num_classes, True
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, features)  # the last row is the null class
        self.conv_in = Conv3x3(in_channels, channels, 3, padding=1)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, c, c_image, last = [channels], channels, in_channels, len(channel_mult) - 1
        for level, multiple in enumerate(channel_mult):
            down, pyramid, made = None, None, []
            if level > 0:
                down = block(c, c, resample="down")
                skips.append(c)
                if encoder != "plain":
                    pyramid = Pyramid(c_image, c, encoder == "residual", scale, taps)
                    c_image = c if encoder == "residual" else c_image
            for _ in range(blocks):
                made.append(block(c, channels * multiple, level in attention_levels))
                c = channels * multiple
                skips.append(c)
            self.down.append(Stage(down, pyramid, made, None))
        self.mid = nn.ModuleList([block(c, c, attention=True), block(c, c)])
        for level in range(last, -1, -1):
            up, made, width = block(c, c, resample="up") if level < last else None, [], channels * channel_mult[level]
            for j in range(blocks + 1):
                made.append(block(c + skips.pop(), width, j == blocks and level in attention_levels))
                c = width
            head = Head(c, out_channels) if decoder == "skip" or level == 0 else None
            self.up.append(Stage(up, None, made, head))

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: [N, C, H, W]; t: [N], ln(sigma) for "fourier"; labels: [N] int64, -1 for the null class, or None."""
        emb = self.embed(t, labels)
        x, image = self.conv_in(x_t), x_t
        skips = [x]
        for stage in self.down:
            if stage.resample is not None:
                x = stage.resample(x, emb)
                if stage.pyramid is not None:
                    x, image = stage.pyramid(x, image)
                skips.append(x)
            for block in stage.blocks:
                x = block(x, emb)
                skips.append(x)
        for block in self.mid:
            x = block(x, emb)
        out = None
        for stage in self.up:
            if stage.resample is not None:
                x = stage.resample(x, emb)
            for block in stage.blocks:
                x = block(torch.cat((x, skips.pop()), dim=1), emb)
            if stage.head is not None:
                below = 0 if out is None else resample(out, self.config["taps"], up=True)
                out = stage.head(x) + below
        return out

    def embed(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """Return the embedding of t and labels that conditions the blocks: [N, 4 channels]."""
        t = t.to(self.conv_in.weight.dtype)
        if self.config["embedding"] == "fourier":
            angle = t[:, None] * (2 * math.pi * self.freqs)
            emb = torch.cat((angle.sin(), angle.cos()), dim=1)
        else:
            emb = timestep_embedding(t, self.config["channels"], flip_sin_to_cos=False, freq_shift=1.0)
        if self.config["num_classes"] is not None:
            labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
            emb = emb + self.class_embedding(torch.where(labels == -1, self.config["num_classes"], labels))
        return self.time_embedding(emb)
