"""The U-Net of DDPM and its relatives.

Ho et al. 2020 (appendix B), with the options of Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021:
scale-shift conditioning, residual up- and downsampling, several attention heads, class labels.
Parameter names are those of diffusers' ``UNet2DModel``, so that the field's checkpoints load as they are.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import transforms
from ..process import checked_float, checked_int
from .blocks import (
    AttentionBlock,
    Conv3x3,
    Downsample,
    Level,
    MidBlock,
    ResBlock,
    TimestepEmbedding,
    Upsample,
    group_norm_silu,
    timestep_embedding,
)
from .conditioning import check_conditions, checked_conditions, condition_embeddings, embedded


class UNet(nn.Module):
    """Predicts eps (or x_0, v, score) from x_t and t.

    in_channels, out_channels   of the image; ``learned_variance`` doubles what is returned (Nichol & Dhariwal 2021)
    channels, channel_mult      width of the first convolution, and each level's multiple of it, 1.5 too where that is
                                a whole number; a level halves H and W
    blocks                      residual blocks a level (one more on the way up)
    attention_levels            the levels, 0-based from the full resolution, that have self-attention
    mid_attention               self-attention at the bottom of the U
    head_dim                    channels an attention head; None: one head over all channels (Ho et al. 2020)
    heads                       or how many heads at every level, whatever its width (Nichol & Dhariwal 2021)
    groups, norm_eps            of every GroupNorm
    mid_attention_groups        of the GroupNorm in ``mid_attention``, if not ``groups``
    num_classes                 class-conditional: labels 0..num_classes-1, and -1 for the null class
    conditions                  what else conditions it, by name, each with its shape, which says how it enters: () a
                                number, as t does; (D,) a vector, added to the embedding of t; (C, H, W) an image
                                beside x_t (Saharia et al. 2022)
    null_class                  False: there is no null class, and every call needs labels
    scale_shift                 time enters as (1 + scale) * norm + shift instead of a sum (Dhariwal & Nichol 2021)
    resample_blocks             resolution changes inside residual blocks (BigGAN's) instead of by one convolution
    downsample_padding          0 pads right and below only; 1 pads all around
    flip_sin_to_cos, freq_shift of the sinusoidal embedding; Ho et al. 2020 has (False, 1)
    t_scale                     the embedding is of t_scale t: 0.25 where T is 4000 and the network counts to 1000
    embedding_channels          of the sinusoidal embedding, if not ``channels``; all behind it has four times as many

    Raises TypeError or ValueError for options of which no U-Net can be made.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int | None = None,
        *,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention_levels: Sequence[int] = (1,),
        mid_attention: bool = True,
        head_dim: int | None = None,
        heads: int | None = None,
        groups: int = 32,
        mid_attention_groups: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        num_classes: int | None = None,
        null_class: bool = True,
        conditions: Mapping[str, Sequence[int]] | None = None,
        scale_shift: bool = False,
        resample_blocks: bool = False,
        downsample_padding: int = 0,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 1.0,
        t_scale: float = 1.0,
        embedding_channels: int | None = None,
        learned_variance: bool = False,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.config = _checked_config({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        widths = widths_of(channels, self.config["channel_mult"])
        emb_channels = embedding_channels or channels
        emb_dim = 4 * emb_channels
        last = len(widths) - 1

        def resblock(c_in: int, c_out: int, resample: str | None = None) -> ResBlock:
            return ResBlock(
                c_in,
                c_out,
                emb_dim,
                groups=groups,
                eps=norm_eps,
                dropout=dropout,
                scale_shift=scale_shift,
                resample=resample,
            )

        def attention(c: int, groups: int = groups) -> AttentionBlock:
            return AttentionBlock(c, head_dim=c // heads if heads else head_dim, groups=groups, eps=norm_eps)

        conditions = self.config["conditions"]
        beside = sum(shape[0] for shape in conditions.values() if len(shape) == 3)
        self.conv_in = Conv3x3(in_channels + beside, channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(emb_channels, emb_dim)
        if conditions:
            self.condition_embeddings = condition_embeddings(conditions, channels, emb_dim)
        self.num_classes, self.null_class = num_classes, null_class or num_classes is None
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + null_class, emb_dim)  # the last row is the null class

        skips = [channels]
        self.down_blocks = nn.ModuleList()
        c = channels
        for level, width in enumerate(widths):
            inputs = [c] + [width] * (blocks - 1)
            resnets = [resblock(c_in, width) for c_in in inputs]
            attentions = [attention(width) for _ in inputs if level in attention_levels]
            skips += [width] * blocks
            c = width
            resampler = None
            if level < last:
                down = resblock(c, c, "down") if resample_blocks else Downsample(c, downsample_padding)
                resampler = ("downsamplers", down)
                skips.append(c)
            self.down_blocks.append(Level(resnets, attentions, resampler))

        mid = attention(c, mid_attention_groups or groups) if mid_attention else None
        self.mid_block = MidBlock([resblock(c, c), resblock(c, c)], mid)

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            resnets, attentions = [], []
            for _ in range(blocks + 1):
                resnets.append(resblock(c + skips.pop(), width))
                if level in attention_levels:
                    attentions.append(attention(width))
                c = width
            resampler = None
            if level > 0:
                up = resblock(c, c, "up") if resample_blocks else Upsample(c)
                resampler = ("upsamplers", up)
            self.up_blocks.append(Level(resnets, attentions, resampler))

        self.conv_norm_out = nn.GroupNorm(groups, c, norm_eps)
        self.conv_out = Conv3x3(c, out_channels * (2 if learned_variance else 1), 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, **conditions: Tensor) -> Tensor:
        """x_t: [N, C, H, W]; t: [N] int64, 0-based; labels: [N] int64, -1 for the null class, None for all null;
        conditions: [N, *shape] by name.

        Labels are needed where ``num_classes`` are without a null class, and all conditions.

        Returns [N, out_channels, H, W], twice the channels with a learned variance. ValueError for other shapes, and
        for labels out of range, which give NaN on other devices than the CPU, when compiled and in ``torch.func``.
        """
        self.check(x_t, t, labels, conditions)
        emb = self.embedding(t, labels, conditions)
        beside = [conditions[name] for name, shape in self.config["conditions"].items() if len(shape) == 3]
        x_t = torch.cat([x_t, *beside], 1) if beside else x_t
        if not transforms.by_torch(x_t):  # torch.vmap has no channels_last
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        x = self.conv_in(x_t)
        skips = [x]
        for level in self.down_blocks:
            for stage in level.stages():
                for block in stage:
                    x = block(x, emb)
                skips.append(x)
            for block in level.resampling():
                x = block(x, emb)
                skips.append(x)
        for block in self.mid_block.stages():
            x = block(x, emb)
        for level in self.up_blocks:
            for resnet, *attention in level.stages():
                x = resnet(torch.cat([x, skips.pop()], dim=1), emb)
                for block in attention:
                    x = block(x, emb)
            for block in level.resampling():
                x = block(x, emb)
        return self.conv_out(group_norm_silu(self.conv_norm_out, x))

    def embedding(self, t: Tensor, labels: Tensor | None, conditions: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the embedding of t [N], labels and conditions for the residual blocks: [N, 4 embedding_channels]."""
        config, num_classes = self.config, self.config["num_classes"]
        dtype = self.conv_in.weight.dtype
        t = t if dtype == torch.float64 else t.float()
        if config["t_scale"] != 1:
            t = config["t_scale"] * t
        channels = config["embedding_channels"] or config["channels"]
        emb = timestep_embedding(
            t, channels, flip_sin_to_cos=config["flip_sin_to_cos"], freq_shift=config["freq_shift"]
        )
        emb = self.time_embedding(emb.to(dtype))
        if config["conditions"]:
            emb = emb + embedded(self.condition_embeddings, conditions, config["channels"], dtype)
        if num_classes is None:
            return emb
        labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
        inside = (labels >= 0) & (labels < num_classes)
        rows = self.class_embedding(torch.where(inside, labels, num_classes if config["null_class"] else 0))
        known = inside | (labels == -1) if config["null_class"] else inside
        return emb + torch.where(known[:, None], rows, torch.nan)

    def check(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None, conditions: Mapping[str, Tensor] | None = None
    ) -> None:
        """TypeError or ValueError unless these are inputs of ``forward``."""
        for name, value in dict(x_t=x_t, t=t, **({} if labels is None else {"labels": labels})).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        check_conditions(conditions or {}, self.config["conditions"], len(x_t))
        in_channels, factor = self.config["in_channels"], 2 ** (len(self.config["channel_mult"]) - 1)
        if x_t.ndim != 4 or x_t.shape[1] != in_channels or x_t.shape[2] % factor or x_t.shape[3] % factor:
            raise ValueError(
                f"x_t: expected [N, {in_channels}, H, W] with H and W divisible by {factor}, got {tuple(x_t.shape)}"
            )
        if t.shape != x_t.shape[:1]:
            raise ValueError(f"t: expected shape {tuple(x_t.shape[:1])}, got {tuple(t.shape)}")
        if labels is None:
            if self.config["num_classes"] is not None and not self.config["null_class"]:
                raise ValueError("labels: expected a class for each image, this network has no null class, got None")
            return
        if self.config["num_classes"] is None:
            raise ValueError("labels: expected None, this network has no classes (num_classes is None)")
        if labels.shape != t.shape:
            raise ValueError(f"labels: expected shape {tuple(t.shape)}, got {tuple(labels.shape)}")
        if transforms.readable(labels):
            low, classes = -1 if self.config["null_class"] else 0, self.config["num_classes"]
            for label in labels.tolist():
                if not low <= label < classes:
                    raise ValueError(f"labels: expected values in {low}..{classes - 1}, got {label}")


def widths_of(channels: int, channel_mult: Sequence[float]) -> list[int]:
    """The channels of each level."""
    return [round(channels * m) for m in channel_mult]


FLAGS = ("mid_attention", "null_class", "scale_shift", "resample_blocks", "flip_sin_to_cos", "learned_variance")


def _checked_config(options: dict[str, Any]) -> dict[str, Any]:
    """The options as Python's own numbers, which JSON can hold, and tuples.

    TypeError or ValueError unless there is a U-Net of them, which then has all that they say.
    """
    c = dict(options)

    def check(name: str, low: int, high: float = math.inf) -> None:
        value, several = c[name], isinstance(c[name], Sequence)
        expected = ("ints " if several else "an int ") + (f">= {low}" if high == math.inf else f"in {low}..{high}")
        numbers = tuple(checked_int(name, number, expected) for number in (value if several else [value]))
        if not all(low <= number <= high for number in numbers):
            raise ValueError(f"{name}: expected {expected}, got {value}")
        c[name] = numbers if several else numbers[0]

    c["conditions"] = checked_conditions(c["conditions"])

    def check_float(name: str, expected: str, holds: Callable[[float], bool]) -> None:
        c[name] = checked_float(name, c[name], expected, holds)

    for name in ("channel_mult", "attention_levels"):
        if not isinstance(c[name], Sequence):
            raise TypeError(f"{name}: expected a sequence of ints, got {c[name]!r}")
    if not c["channel_mult"]:
        raise ValueError("channel_mult: expected at least one level, got none")
    optional = ("head_dim", "heads", "mid_attention_groups", "num_classes", "embedding_channels")
    optional = [name for name in optional if c[name] is not None]
    for name in FLAGS:
        if not isinstance(c[name], bool):
            raise TypeError(f"{name}: expected True or False, got {c[name]!r}")
    for name in ("in_channels", "out_channels", "channels", "blocks", "groups", *optional):
        check(name, 1)
    c["channel_mult"] = tuple(_checked_multiple(m, c["channels"]) for m in c["channel_mult"])
    widths = widths_of(c["channels"], c["channel_mult"])
    last = len(widths) - 1
    check("attention_levels", 0, last)
    check("downsample_padding", 0, 1)
    check_float("norm_eps", "a number >= 0", lambda value: value >= 0)
    check_float("t_scale", "a number > 0", lambda value: value > 0)
    check_float("dropout", "a number in [0, 1]", lambda value: 0 <= value <= 1)
    name = "channels" if c["embedding_channels"] is None else "embedding_channels"
    if c[name] % 2:
        raise ValueError(f"{name}: expected an even int, half of them sines, got {c[name]}")
    half = c[name] // 2
    check_float("freq_shift", f"a number below {name} / 2 = {half}", lambda value: value < half)
    if any(width % c["groups"] for width in (c["channels"], *widths)):
        raise ValueError(f"groups: expected a divisor of every width {widths}, got {c['groups']}")
    mid_groups = c["mid_attention_groups"] or 1
    if widths[last] % mid_groups:
        raise ValueError(f"mid_attention_groups: expected a divisor of the last width {widths[last]}, got {mid_groups}")
    if c["head_dim"] is not None and c["heads"] is not None:
        raise ValueError(f"heads: expected None beside head_dim = {c['head_dim']}, got {c['heads']}")
    for level in sorted({*c["attention_levels"], *([last] if c["mid_attention"] else [])}):
        for name in ("head_dim", "heads"):
            if c[name] is not None and widths[level] % c[name]:
                raise ValueError(f"{name}: expected a divisor of level {level}'s width {widths[level]}, got {c[name]}")
    return c


def _checked_multiple(value: Any, channels: int) -> int | float:
    """A level's multiple of ``channels``: an int where it is one, else a float that makes a whole width."""
    expected = f"a whole number of channels, times {channels}"
    number = checked_float("channel_mult", value, expected, lambda value: round(channels * value) >= 1)
    if not math.isclose(channels * number, round(channels * number), rel_tol=1e-9):
        raise ValueError(f"channel_mult: expected {expected}, got {value!r}")
    return int(number) if number == int(number) else number
