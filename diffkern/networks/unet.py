"""The U-Net of DDPM and its relatives.

Ho et al. 2020 (appendix B), with the options of Nichol & Dhariwal 2021 and Dhariwal & Nichol 2021:
scale-shift conditioning, residual up- and downsampling, several attention heads, class labels.
Parameter names are those of diffusers' ``UNet2DModel``, so that the field's checkpoints load as they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops
from ..io.files import Blueprint
from ..ops import transforms
from ..schedule import checked_float, checked_int

Image = TypeVar("Image")


def timestep_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoids of the time step at ``dim // 2`` frequencies from 1 down to 1/10000 (Vaswani et al. 2017, section 3.5).

    t: [N], any number type. Returns [N, dim], (cos, sin), or (sin, cos) without ``flip_sin_to_cos``: in float32, or in
    float64 for a t that is float64.
    """
    half = dim // 2
    t = t if t.dtype == torch.float64 else t.float()
    index = torch.arange(half, dtype=t.dtype, device=t.device)
    angle = t[:, None] * torch.exp(-math.log(10000) / (half - freq_shift) * index)
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


class UNet(nn.Module):
    """Predicts eps (or x_0, v, score) from x_t and t.

    in_channels, out_channels   of the image; ``learned_variance`` doubles what is returned (Nichol & Dhariwal 2021)
    channels, channel_mult      width of the first level, and each level's multiple of it; a level halves H and W
    blocks                      residual blocks a level (one more on the way up)
    attention_levels            the levels, 0-based from the full resolution, that have self-attention
    mid_attention               self-attention at the bottom of the U
    head_dim                    channels an attention head; None: one head over all channels (Ho et al. 2020)
    groups, norm_eps            of every GroupNorm
    mid_attention_groups        of the GroupNorm in ``mid_attention``, if not ``groups``
    num_classes                 class-conditional: labels 0..num_classes-1, and -1 for the null class
    null_class                  False: there is no null class, and every call needs labels
    scale_shift                 time enters as (1 + scale) * norm + shift instead of a sum (Dhariwal & Nichol 2021)
    resample_blocks             resolution changes inside residual blocks (BigGAN's) instead of by one convolution
    downsample_padding          0 pads right and below only; 1 pads all around
    flip_sin_to_cos, freq_shift of the sinusoidal embedding; Ho et al. 2020 has (False, 1)

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
        groups: int = 32,
        mid_attention_groups: int | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        num_classes: int | None = None,
        null_class: bool = True,
        scale_shift: bool = False,
        resample_blocks: bool = False,
        downsample_padding: int = 0,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 1.0,
        learned_variance: bool = False,
    ):
        super().__init__()
        out_channels = in_channels if out_channels is None else out_channels
        self.config = _checked_config({k: v for k, v in locals().items() if k not in ("self", "__class__")})
        widths = [channels * m for m in channel_mult]
        emb_dim = 4 * channels
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
            return AttentionBlock(c, head_dim=head_dim, groups=groups, eps=norm_eps)

        self.conv_in = Conv3x3(in_channels, channels, 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels, emb_dim)
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

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: [N, C, H, W]; t: [N] int64, 0-based; labels: [N] int64, -1 for the null class, None for all null.

        Labels are needed where ``num_classes`` are without a null class.

        Returns [N, out_channels, H, W], twice the channels with a learned variance. ValueError for other shapes, and
        for labels out of range, which give NaN on other devices than the CPU, when compiled and in ``torch.func``.
        """
        self.check(x_t, t, labels)
        emb = self.embedding(t, labels)

        def run(block: nn.Module, x: Tensor, skip: Tensor | None = None) -> Tensor:
            return block(x if skip is None else torch.cat([x, skip], dim=1), emb)

        if not transforms.by_torch(x_t):  # torch.vmap has no channels_last
            x_t = x_t.contiguous(memory_format=torch.channels_last)
        x = self.walk(self.conv_in(x_t), run)
        return self.conv_out(group_norm_silu(self.conv_norm_out, x))

    def walk(self, x: Image, run: Callable[..., Image]) -> Image:
        """All between the first convolution and the last norm: down the U, and up with what was met on the way.

        ``run(block, x)``, or ``run(block, x, skip)`` for a block that sees x and skip side by side, gives the next x.
        What an x is, is the caller's matter: a tensor in ``forward``, a step of a program in :mod:`diffkern.engine`.
        """

        def through(blocks: list[nn.Module], x: Image) -> Image:
            for block in blocks:
                x = run(block, x)
            return x

        skips = [x]
        for level in self.down_blocks:
            for stage in level.stages():
                x = through(stage, x)
                skips.append(x)
            if level.resampling():
                x = through(level.resampling(), x)
                skips.append(x)
        x = through(self.mid_block.stages(), x)
        for level in self.up_blocks:
            for resnet, *attention in level.stages():
                x = through(attention, run(resnet, x, skips.pop()))
            x = through(level.resampling(), x)
        return x

    def embedding(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """What conditions the residual blocks: [N, 4 channels] of t [N] and labels [N] or None."""
        config, num_classes = self.config, self.config["num_classes"]
        dtype = self.conv_in.weight.dtype
        t = t if dtype == torch.float64 else t.float()
        emb = timestep_embedding(
            t, config["channels"], flip_sin_to_cos=config["flip_sin_to_cos"], freq_shift=config["freq_shift"]
        )
        emb = self.time_embedding(emb.to(dtype))
        if num_classes is None:
            return emb
        labels = torch.full_like(t, -1, dtype=torch.int64) if labels is None else labels
        inside = (labels >= 0) & (labels < num_classes)
        rows = self.class_embedding(torch.where(inside, labels, num_classes if config["null_class"] else 0))
        known = inside | (labels == -1) if config["null_class"] else inside
        return emb + torch.where(known[:, None], rows, torch.nan)

    def check(self, x_t: Tensor, t: Tensor, labels: Tensor | None) -> None:
        """TypeError or ValueError unless these are inputs of ``forward``."""
        for name, value in dict(x_t=x_t, t=t, **({} if labels is None else {"labels": labels})).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
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

    def check_float(name: str, expected: str, holds: Callable[[float], bool]) -> None:
        c[name] = checked_float(name, c[name], expected, holds)

    for name in ("channel_mult", "attention_levels"):
        if not isinstance(c[name], Sequence):
            raise TypeError(f"{name}: expected a sequence of ints, got {c[name]!r}")
    if not c["channel_mult"]:
        raise ValueError("channel_mult: expected at least one level, got none")
    optional = [name for name in ("head_dim", "mid_attention_groups", "num_classes") if c[name] is not None]
    for name in FLAGS:
        if not isinstance(c[name], bool):
            raise TypeError(f"{name}: expected True or False, got {c[name]!r}")
    for name in ("in_channels", "out_channels", "channels", "channel_mult", "blocks", "groups", *optional):
        check(name, 1)
    widths = [c["channels"] * m for m in c["channel_mult"]]
    last = len(widths) - 1
    check("attention_levels", 0, last)
    check("downsample_padding", 0, 1)
    check_float("norm_eps", "a number >= 0", lambda value: value >= 0)
    check_float("dropout", "a number in [0, 1]", lambda value: 0 <= value <= 1)
    if c["channels"] % 2:
        raise ValueError(f"channels: expected an even int, half of them sines, got {c['channels']}")
    half = c["channels"] // 2
    check_float("freq_shift", f"a number below channels / 2 = {half}", lambda value: value < half)
    if any(width % c["groups"] for width in (c["channels"], *widths)):
        raise ValueError(f"groups: expected a divisor of every width {widths}, got {c['groups']}")
    mid_groups = c["mid_attention_groups"] or 1
    if widths[last] % mid_groups:
        raise ValueError(f"mid_attention_groups: expected a divisor of the last width {widths[last]}, got {mid_groups}")
    for level in sorted({*c["attention_levels"], *([last] if c["mid_attention"] else [])}):
        if c["head_dim"] is not None and widths[level] % c["head_dim"]:
            raise ValueError(
                f"head_dim: expected a divisor of level {level}'s width {widths[level]}, got {c['head_dim']}"
            )
    return c


DIFFUSERS_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


def from_diffusers(network: nn.Module) -> UNet:
    """diffusers' ``UNet2DModel`` as our U-Net, with the very same parameters; its classes are without a null class.

    Raises ValueError that names an option of it which ours has not. It looks at the config and at the parameters;
    :func:`diffkern.pipelines.check_same` looks at what the two compute.
    """
    c = network.config
    down_of_up = tuple(kind.replace("Up", "Down") for kind in reversed(c.up_block_types))
    resnets = {
        kind.startswith("Resnet") or (kind.startswith("Attn") and c.downsample_type == "resnet")
        for kind in c.down_block_types[:-1]
    }
    allowed = {
        "down_block_types": all(kind in DIFFUSERS_BLOCKS for kind in c.down_block_types) and len(resnets) < 2,
        "up_block_types": down_of_up == tuple(c.down_block_types),
        "block_out_channels": all(width % c.block_out_channels[0] == 0 for width in c.block_out_channels),
        "upsample_type": c.upsample_type == c.downsample_type,
        "mid_block_type": c.mid_block_type == "UNetMidBlock2D",
        "mid_block_scale_factor": c.mid_block_scale_factor == 1,
        "time_embedding_type": c.time_embedding_type == "positional",
        "center_input_sample": not c.center_input_sample,
        "act_fn": c.act_fn in ("silu", "swish"),
        "class_embed_type": c.class_embed_type is None,
    }
    for name, holds in allowed.items():
        if not holds:
            raise ValueError(f"{name}: expected what diffkern's UNet has, got {c[name]!r}")
    with Blueprint():  # every parameter is replaced
        unet = UNet(
            c.in_channels,
            c.out_channels,
            channels=c.block_out_channels[0],
            channel_mult=tuple(width // c.block_out_channels[0] for width in c.block_out_channels),
            blocks=c.layers_per_block,
            attention_levels=tuple(i for i, kind in enumerate(c.down_block_types) if kind.startswith("Attn")),
            mid_attention=c.add_attention,
            head_dim=c.attention_head_dim,
            groups=c.norm_num_groups,
            mid_attention_groups=c.attn_norm_num_groups if c.add_attention else None,
            norm_eps=c.norm_eps,
            dropout=c.dropout,
            num_classes=c.num_class_embeds,
            null_class=c.num_class_embeds is None,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
            resample_blocks=resnets == {True},
            downsample_padding=c.downsample_padding,
            flip_sin_to_cos=c.flip_sin_to_cos,
            freq_shift=c.freq_shift,
        )
    theirs, ours = network.state_dict(keep_vars=True), unet.state_dict()
    shapes, expected = ({(key, p.shape) for key, p in parameters.items()} for parameters in (theirs, ours))
    if shapes != expected:
        odd = sorted({key for key, _ in shapes ^ expected})
        raise ValueError(f"network: expected the parameters of diffkern's UNet, got others: {', '.join(odd[:3])}")
    for key, parameter in theirs.items():
        module, _, name = key.rpartition(".")
        setattr(unet.get_submodule(module), name, parameter)
    return unet.train(network.training)
