"""The blocks of the U-Net: residual and attention blocks, up- and downsampling, the embedding of the time step."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops


def timestep_embedding(
    t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0, theta: float = 10000.0
) -> Tensor:
    """Sinusoids of the time step at ``dim // 2`` frequencies from 1 down to 1/theta (Vaswani et al. 2017, section 3.5).

    t: [N], any number type. Returns [N, dim], (cos, sin), or (sin, cos) without ``flip_sin_to_cos``: in float32, or in
    float64 for a t that is float64.
    """
    half = dim // 2
    t = t if t.dtype == torch.float64 else t.float()
    index = torch.arange(half, dtype=t.dtype, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(theta) / (half - freq_shift) * index)
    sin, cos = angle.sin(), angle.cos()
    return torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=-1)


class TimestepEmbedding(nn.Module):
    """The MLP behind the sinusoids: [N, in] -> [N, dim]."""

    def __init__(self, in_features: int, dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class Conv3x3(nn.Conv2d):
    """A ``Conv2d``, run by ``ops.conv3x3`` where that computes the same and has a kernel, in float32 on a CPU.

    It computes the same for kernels of 3x3 with stride 1 and padding 1. Other settings are torch's.
    """

    def forward(self, x: Tensor) -> Tensor:
        native = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in (x, self.weight))
        if native and self._keeps_size() and not torch.is_autocast_enabled("cpu"):
            return ops.conv3x3(x, self.weight, self.bias)
        return super().forward(x)

    def _keeps_size(self) -> bool:
        """Is it what ``ops.conv3x3`` computes?"""
        settings = self.kernel_size, self.stride, self.padding, self.dilation, self.groups, self.padding_mode
        return settings == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


class Downsample(nn.Module):
    """Halves the resolution by a strided convolution; ``padding=0`` pads right and below only (Ho et al. 2020)."""

    def __init__(self, channels: int, padding: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv3x3(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """norm, silu, conv, + time; norm, silu, conv; + shortcut. With ``resample`` it also changes the resolution."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resample: str | None = None,
    ):
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv3x3(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest") if self.resample == "up" else x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resampled(group_norm_silu(self.norm1, x)))
        time = self.time_emb_proj(F.silu(emb))
        h = group_norm_silu(self.norm2, h, **{"scale_shift" if self.scale_shift else "add": time})
        h = self.conv2(self.dropout(h))
        x = self.resampled(x)
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention over the pixels, with a residual: x + out(attention(q, k, v))."""

    def __init__(self, channels: int, *, head_dim: int | None, groups: int, eps: float):
        super().__init__()
        self.heads = 1 if head_dim is None else channels // head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])
        nn.init.zeros_(self.to_out[0].weight)
        nn.init.zeros_(self.to_out[0].bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = group_norm_silu(self.group_norm, x, silu=False).permute(0, 2, 3, 1).reshape(n, h * w, c)
        q, k, v = (
            to(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2) for to in (self.to_q, self.to_k, self.to_v)
        )  # [N, heads, H*W, C/heads]
        out = self.to_out[0](ops.attention(q, k, v).transpose(1, 2).reshape(n, h * w, c))
        return x + out.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def group_norm_silu(norm: nn.GroupNorm, x: Tensor, **options) -> Tensor:
    """``ops.group_norm_silu`` with the parameters of a ``GroupNorm``."""
    return ops.group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, eps=norm.eps, **options)


class Level(nn.Module):
    """The blocks of one resolution on one side of the U, and the step to the next resolution."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module], resampler: tuple[str, nn.Module] | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if resampler is not None:
            name, module = resampler
            self.add_module(name, nn.ModuleList([module]))
        self.resampler = None if resampler is None else resampler[0]

    def stages(self) -> list[list[nn.Module]]:
        """Each residual block, with the attention behind it if it has one."""
        attentions = getattr(self, "attentions", None)
        return [[resnet] if attentions is None else [resnet, attentions[j]] for j, resnet in enumerate(self.resnets)]

    def resampling(self) -> list[nn.Module]:
        """The block that leads to the next resolution, or nothing."""
        return [] if self.resampler is None else list(getattr(self, self.resampler))


class MidBlock(nn.Module):
    """The lowest resolution: residual block, attention (unless left out), residual block."""

    def __init__(self, resnets: list[nn.Module], attention: nn.Module | None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([] if attention is None else [attention])

    def stages(self) -> list[nn.Module]:
        return [self.resnets[0], *self.attentions, self.resnets[1]]
