"""A classifier of noisy images: the way down of a U-Net, and attention that pools it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..process import checked_int
from .blocks import (
    AttentionBlock,
    Conv3x3,
    Downsample,
    Level,
    MidBlock,
    ResBlock,
    TimestepEmbedding,
    group_norm_silu,
    timestep_embedding,
)

LARGEST = 2**16  # channels or classes
MOST = 32  # levels, or blocks a level


class HalfUNet(nn.Module):
    """Classifies x_t at the time step t (Dhariwal & Nichol 2021, section 4.3). For the options see ``UNet``.

    pool_size  height and width at the bottom of the U, whose attention then knows positions and has heads of
               ``head_dim``, as openai's; None: one head that knows none, for images of any size

    ``config`` holds the options, fit for JSON. Raises TypeError or ValueError for those of which none can be made.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        channels: int = 32,
        channel_mult: Sequence[int] = (1, 2, 2),
        blocks: int = 1,
        attention_levels: Sequence[int] = (2,),
        groups: int = 8,
        head_dim: int | None = None,
        scale_shift: bool = False,
        resample_blocks: bool = False,
        embedding_channels: int | None = None,
        pool_size: int | None = None,
    ):
        super().__init__()
        last = len(channel_mult) - 1 if isinstance(channel_mult, Sequence) else 0
        self.config = {
            name: _checked(name, value, *limits)
            for name, value, limits in (
                ("in_channels", in_channels, (1, LARGEST)),
                ("num_classes", num_classes, (1, LARGEST)),
                ("channels", channels, (2, LARGEST)),
                ("channel_mult", channel_mult, (1, LARGEST)),
                ("blocks", blocks, (1, MOST)),
                ("attention_levels", attention_levels, (0, last)),
                ("groups", groups, (1, LARGEST)),
            )
        }
        others = dict(head_dim=head_dim, embedding_channels=embedding_channels, pool_size=pool_size)
        self.config |= {k: _checked(k, value, 1, LARGEST) for k, value in others.items() if value is not None}
        self.config |= {
            k: True for k, value in dict(scale_shift=scale_shift, resample_blocks=resample_blocks).items() if value
        }
        widths = [channels * m for m in channel_mult]
        if channels % 2 or any(width % groups for width in (channels, *widths)):
            raise ValueError(f"channels: expected an even number and widths divisible by {groups} groups, got {widths}")
        emb_channels, c = embedding_channels or channels, channels
        emb_dim = 4 * emb_channels

        def resblock(c_in: int, c_out: int, resample: str | None = None) -> ResBlock:
            norms = dict(groups=groups, eps=1e-5)
            return ResBlock(c_in, c_out, emb_dim, **norms, dropout=0.0, scale_shift=scale_shift, resample=resample)

        def attention(c: int) -> AttentionBlock:
            return AttentionBlock(c, head_dim=head_dim, groups=groups, eps=1e-5)

        self.conv_in = Conv3x3(in_channels, channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(emb_channels, emb_dim)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            resnets = [resblock(c_in, width) for c_in in [c] + [width] * (blocks - 1)]
            attentions = [attention(width) for _ in resnets if level in attention_levels]
            resampler = None
            if level < len(widths) - 1:
                down = resblock(width, width, "down") if resample_blocks else Downsample(width, 1)
                resampler = "downsamplers", down
            self.down_blocks.append(Level(resnets, attentions, resampler))
            c = width
        self.mid_block = MidBlock([resblock(c, c), resblock(c, c)], attention(c))
        self.norm_out = nn.GroupNorm(groups, c, 1e-5)
        self.pool = AttentionPool(c, num_classes, pool_size, head_dim if pool_size else None)
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return logits [N, num_classes] of x_t [N, C, H, W] at t [N], as guidance calls it; labels count for nothing.

        H and W are divisible by 2 for each level but the last. ValueError for another shape.
        """
        channels, factor = self.config["in_channels"], 2 ** (len(self.config["channel_mult"]) - 1)
        if x_t.ndim != 4 or x_t.shape[1] != channels or x_t.shape[2] % factor or x_t.shape[3] % factor:
            raise ValueError(
                f"x_t: expected [N, {channels}, H, W] with H and W divisible by {factor}, got {tuple(x_t.shape)}"
            )
        emb = self.time_embedding(timestep_embedding(t, self.time_embedding.linear_1.in_features).to(x_t.dtype))
        x = self.conv_in(x_t.contiguous(memory_format=torch.channels_last))
        for level in self.down_blocks:
            for block in [block for stage in level.stages() for block in stage] + level.resampling():
                x = block(x, emb)
        for block in self.mid_block.stages():
            x = block(x, emb)
        return self.pool(group_norm_silu(self.norm_out, x))


class AttentionPool(nn.Module):
    """[N, C, H, W] -> [N, out_features]: the pixels' mean attends to all pixels (Radford et al. 2021, section 2.4).

    With a ``size``, H and W are that; the mean is a token too, and each token has a position, which is learned.
    """

    def __init__(self, channels: int, out_features: int, size: int | None = None, head_dim: int | None = None):
        super().__init__()
        self.heads = channels // head_dim if head_dim else 1
        self.positions = None
        if size is not None:
            tokens = torch.zeros(size * size + 1, channels, dtype=torch.float32, device="cpu")
            self.positions = nn.Parameter(tokens)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.Linear(channels, out_features)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)  # [N, H W, C]
        mean = tokens.mean(1, keepdim=True)
        if self.positions is not None:
            tokens = torch.cat((mean, tokens), dim=1) + self.positions
            mean = tokens[:, :1]
        q, k, v = (
            to(part).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for to, part in ((self.to_q, mean), (self.to_k, tokens), (self.to_v, tokens))
        )  # [N, heads, 1 or H W, C / heads]
        return self.to_out(ops.attention(q, k, v).transpose(1, 2).flatten(1))


def _checked(name: str, value: int | Sequence[int], low: int, high: int) -> int | list[int]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    expected = f"{'ints' if several else 'an int'} in {low}..{high}"
    if several != (name in ("channel_mult", "attention_levels")) or (several and len(value) > MOST):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    numbers = [checked_int(name, number, expected) for number in (value if several else [value])]
    if not all(low <= number <= high for number in numbers) or (name == "channel_mult" and not numbers):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return numbers if several else numbers[0]
