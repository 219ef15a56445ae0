"""A U-Net with RMS norms and linear attention: that of lucidrains' denoising-diffusion-pytorch."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from .blocks import Conv3x3, timestep_embedding


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 over channels), scaled (Zhang & Sennrich 2019)."""

    def __init__(self, channels: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(channels, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g[:, None, None] * len(self.g) ** 0.5


class Block(nn.Module):
    """conv, norm, time as (1 + scale) * norm + shift, silu; conv, norm, silu; + shortcut."""

    def __init__(self, c_in: int, c_out: int, emb_dim: int, dropout: float):
        super().__init__()
        self.time_emb_proj = nn.Linear(emb_dim, 2 * c_out)
        self.conv1, self.norm1 = Conv3x3(c_in, c_out, 3, padding=1), RMSNorm(c_out)
        self.conv2, self.norm2 = Conv3x3(c_out, c_out, 3, padding=1), RMSNorm(c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.time_emb_proj(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        h = self.dropout(F.silu(self.norm1(self.conv1(x)) * (scale + 1) + shift))
        return F.silu(self.norm2(self.conv2(h))) + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """x + attention over the pixels and ``memory`` keys and values that belong to the layer.

    linear: softmax of q over channels and of k over pixels, and a product of size d x d between (Shen et al. 2021).
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int, memory: int, linear: bool):
        super().__init__()
        self.heads, self.linear, inner = heads, linear, heads * head_dim
        self.norm = RMSNorm(channels)
        self.memory = nn.Parameter(torch.zeros(2, heads, memory, head_dim, dtype=torch.float32, device="cpu"))
        self.to_qkv = nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.to_out = nn.Conv2d(inner, channels, 1)
        self.norm_out = RMSNorm(channels) if linear else None

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).view(n, 3, self.heads, -1, h * w)
        q, k, v = qkv.permute(1, 0, 2, 4, 3)  # [N, heads, H W, d]
        k, v = (torch.cat((m.expand(n, *m.shape), own), dim=2) for m, own in zip(self.memory, (k, v), strict=True))
        if self.linear:
            context = k.softmax(dim=2).transpose(2, 3) @ v  # [N, heads, d, d]
            out = (q.softmax(dim=3) * q.shape[3] ** -0.5) @ context
        else:
            out = ops.attention(q, k, v)
        out = self.to_out(out.transpose(2, 3).reshape(n, -1, h, w))
        return x + (out if self.norm_out is None else self.norm_out(out))


class Level(nn.Module):
    """Two residual blocks, attention, and the step to the next resolution, or a convolution in its place."""

    def __init__(self, blocks: list[Block], attention: Attention, conv: nn.Module, resample: bool):
        super().__init__()
        self.blocks, self.attention, self.conv, self.resample = nn.ModuleList(blocks), attention, conv, resample


class RMSUNet(nn.Module):
    """Predicts v, eps or x_0 from x_t and t.

    in_channels, out_channels  of the image
    channels, channel_mult     width of the first level, and each level's multiple of it; a level halves H and W
    first_channels             of the first convolution, if not ``channels``
    full_attention             for each level, whether its attention is full; linear otherwise
    heads, head_dim            of the attention of each level
    memory                     keys and values of each attention
    frequencies                of the embedding, learned or random; 0: sinusoids of ``theta``
    """

    num_classes, null_class = None, True

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        *,
        channels: int = 64,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        first_channels: int | None = None,
        full_attention: Sequence[bool] = (False, False, False, True),
        heads: Sequence[int] = (4, 4, 4, 4),
        head_dim: Sequence[int] = (32, 32, 32, 32),
        memory: int = 4,
        frequencies: int = 0,
        theta: float = 10000.0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        for name in ("channel_mult", "full_attention", "heads", "head_dim"):
            self.config[name] = tuple(self.config[name])
        levels, emb_dim = len(channel_mult), 4 * channels
        for name in ("full_attention", "heads", "head_dim"):
            if len(self.config[name]) != levels:
                raise ValueError(f"{name}: expected {levels} entries, one a level, got {len(self.config[name])}")
        first = first_channels or channels
        widths = [first, *(channels * m for m in channel_mult)]

        def attention(c: int, level: int, full: bool) -> Attention:
            sizes = dict(heads=heads[level], head_dim=head_dim[level], memory=memory)
            return Attention(c, **sizes, linear=not full)

        def block(c_in: int, c_out: int) -> Block:
            return Block(c_in, c_out, emb_dim, dropout)

        self.conv_in = nn.Conv2d(in_channels, first, 7, padding=3)
        if frequencies:
            self.freqs = nn.Parameter(torch.zeros(frequencies, dtype=torch.float32, device="cpu"))
        features = 2 * frequencies + 1 if frequencies else channels
        self.linear_1, self.linear_2 = nn.Linear(features, emb_dim), nn.Linear(emb_dim, emb_dim)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level in range(levels):
            c, c_out, resample = widths[level], widths[level + 1], level < levels - 1
            conv = nn.Conv2d(4 * c, c_out, 1) if resample else Conv3x3(c, c_out, 3, padding=1)
            blocks = [block(c, c), block(c, c)]
            self.down.append(Level(blocks, attention(c, level, full_attention[level]), conv, resample))
        c = widths[-1]
        self.mid = nn.ModuleList([block(c, c), block(c, c)])
        self.mid_attention = attention(c, levels - 1, full=True)
        for level in range(levels - 1, -1, -1):
            c, c_out = widths[level + 1], widths[level]
            conv = Conv3x3(c, c_out, 3, padding=1)
            blocks = [block(c + c_out, c), block(c + c_out, c)]
            self.up.append(Level(blocks, attention(c, level, full_attention[level]), conv, level > 0))
        self.block_out = block(2 * first, first)
        self.conv_out = nn.Conv2d(first, out_channels, 1)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: [N, C, H, W], H and W divisible by 2 for each level but the last; t: [N]; labels count for nothing."""
        emb = self.embed(t)
        x = first = self.conv_in(x_t)
        skips = []
        for level in self.down:
            x = level.blocks[0](x, emb)
            skips.append(x)
            x = level.attention(level.blocks[1](x, emb))
            skips.append(x)
            x = level.conv(F.pixel_unshuffle(x, 2) if level.resample else x)
        x = self.mid[1](self.mid_attention(self.mid[0](x, emb)), emb)
        for level in self.up:
            for block in level.blocks:
                x = block(torch.cat((x, skips.pop()), dim=1), emb)
            x = level.attention(x)
            x = level.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if level.resample else x)
        return self.conv_out(self.block_out(torch.cat((x, first), dim=1), emb))

    def embed(self, t: Tensor) -> Tensor:
        """Return the embedding of t [N] that conditions the blocks: [N, 4 channels]."""
        t = t.to(self.conv_in.weight.dtype)
        if self.config["frequencies"]:
            angle = t[:, None] * self.freqs * 2 * math.pi
            emb = torch.cat((t[:, None], angle.sin(), angle.cos()), dim=1)
        else:
            options = dict(flip_sin_to_cos=False, freq_shift=1.0, theta=self.config["theta"])
            emb = timestep_embedding(t, self.config["channels"], **options)
        return self.linear_2(F.gelu(self.linear_1(emb)))
