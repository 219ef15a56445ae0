"""A U-Net as a flat list of kernel calls on a CPU.

    network -> steps        what is computed from what, for one shape of input          (_Trace)
    steps   -> buffers      a value's memory is another's after its last use            (_buffers)
    buffers -> program      every kernel's call, recorded once, replayed without Python (Recording)

All kernels treat the samples of a batch apart: a sample's bits are the same in any batch, on any number of threads.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _C, ops
from ..networks import AttentionBlock, Downsample, ResBlock, UNet
from ..ops import PackedConv

_ops = torch.ops.diffkern

FEW_TILES = 64  # with at most this many 4x4 tiles in a batch, make Winograd's matrices from the taps as they are used
FEW_CHANNELS = 4  # with this few channels, use the direct kernel
DEEP = 256  # from this many in_channels * taps on, three bfloat16 parts are faster than float32, at batch 1 too


def _pack_matrices(weight: Tensor) -> PackedConv:
    return ops.expand_taps(ops.pack_taps(weight))


def resblocks(network: UNet) -> list[ResBlock]:
    return [module for module in network.modules() if isinstance(module, ResBlock)]


# --- network -> steps ---


@dataclasses.dataclass(eq=False)
class _Value:
    """An image [N, C, H, W] that a step makes, in channels_last memory; or if it has terms (of bfloat16), blocked:
    [N, C / 32, terms, H + 2, W + 2, 32]."""

    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    terms: int | None = None

    def image(self, memory: Tensor) -> Tensor:
        """In the first of these bytes."""
        n, c, h, w = self.shape
        memory = memory[: self.bytes].view(self.dtype)
        return memory.view(self._blocks) if self.terms else memory.view(n, h, w, c).permute(0, 3, 1, 2)

    @property
    def bytes(self) -> int:
        return math.prod(self._blocks if self.terms else self.shape) * self.dtype.itemsize

    @property
    def _blocks(self) -> tuple[int, ...]:
        n, c, h, w = self.shape
        return n, c // 32, self.terms, h + 2, w + 2, 32


@dataclasses.dataclass
class _Step:
    run: Callable[..., None]  # called with the memory of y, then of the inputs
    y: _Value
    inputs: tuple[_Value | None, ...]


class _Trace:
    """Walks the network as its ``forward`` does (``UNet.walk``), and notes the steps."""

    def __init__(
        self,
        packed: Callable[..., PackedConv],
        network: UNet,
        shape: torch.Size,
        dtype: torch.dtype,
        terms: int | None,
        conditions: list[Tensor],
    ):
        self.packed, self.dtype, self.terms, self.steps = packed, dtype, terms, []
        self.condition_of = dict(zip(resblocks(network), conditions, strict=True))
        self.x = _Value(tuple(shape), torch.float32)
        x = network.walk(self.conv(self.x, network.conv_in), self.block)
        x = self.norm(network.conv_norm_out, x, blocked=self.terms == 1)
        self.y = self.conv(x, network.conv_out, dtype=torch.float32)

    @property
    def winograd(self) -> bool:
        """Are 3x3 convolutions of stride 1 made so? Terms that are as exact are not as fast at them."""
        return self.terms in (None, 3)

    def by_terms(self, channels: int, out_channels: int, kernel: int) -> bool:
        """Are other convolutions made so?"""
        few, deep = min(channels, out_channels) <= FEW_CHANNELS, channels * kernel**2 >= DEEP
        return self.terms == 1 or (self.terms == 2 and not few) or (self.terms == 3 and not few and deep)

    def step(
        self,
        run: Callable[..., None],
        shape: tuple[int, ...],
        *inputs: _Value | None,
        dtype: torch.dtype | None = None,
        terms: int | None = None,
    ) -> _Value:
        y = _Value(tuple(shape), torch.bfloat16 if terms else dtype or self.dtype, terms)
        self.steps.append(_Step(run, y, inputs))
        return y

    def conv(
        self,
        x: _Value,
        weight: nn.Module | tuple[nn.Module, ...],
        *,
        skip: _Value | None = None,
        residual: _Value | None = None,
        add: Tensor | None = None,
        stride: int = 1,
        padding: int | None = None,
        upsample: bool = False,
        dtype: torch.dtype | None = None,
    ) -> _Value:
        """By the weight of a ``Conv2d``, or of ``Linear`` modules side by side."""
        modules = weight if isinstance(weight, tuple) else (weight,)
        kernel = 3 if modules[0].weight.ndim == 4 and modules[0].weight.shape[2] == 3 else 1
        weight = lambda: torch.cat([m.weight.view(*m.weight.shape[:2], kernel, kernel) for m in modules])  # noqa: E731
        bias = torch.cat([module.bias for module in modules])
        return self._conv(modules, weight, bias, kernel, x, skip, residual, add, stride, padding, upsample, dtype)

    def _conv(self, key, weight, bias, kernel, x, skip, residual, add, stride, padding, upsample, dtype=None) -> _Value:
        n, c, h, w = x.shape
        h, w = (-(-size * (2 if upsample else 1) // stride) for size in (h, w))
        channels = c + (skip.shape[1] if skip else 0)
        out_channels = len(bias)
        padding = kernel // 2 if padding is None else padding
        few = min(channels, out_channels) <= FEW_CHANNELS
        if self.winograd and kernel == 3 and stride == padding == 1 and not few:  # the same bits by either
            pack = ops.pack_taps if n * -(-h // 4) * -(-w // 4) <= FEW_TILES else _pack_matrices
            packed = self.packed(key, weight, pack)
        elif self.by_terms(channels, out_channels, kernel):
            pack = ops.pack_upsampling if upsample and kernel == 3 else ops.pack_conv
            packed = self.packed(key, weight, pack, terms=self.terms)
        else:
            packed = self.packed(key, weight, ops.pack_conv)

        def run(y: Tensor, x: Tensor, skip: Tensor | None, residual: Tensor | None) -> None:
            counts = packed.in_channels, packed.out_channels
            _ops.conv2d_out(y, x, skip, packed.tensor, *counts, bias, add, residual, stride, padding, upsample)

        return self.step(run, (n, out_channels, h, w), x, skip, residual, dtype=dtype)

    def norm(
        self,
        norm: nn.GroupNorm,
        x: _Value,
        skip: _Value | None = None,
        *,
        scale_shift: Tensor | None = None,
        silu: bool = True,
        blocked: bool = False,
    ) -> _Value:
        """blocked: where it can be, as convolutions by terms like it."""

        def run(y: Tensor, x: Tensor, skip: Tensor | None) -> None:
            _ops.group_norm_silu_out(y, x, skip, norm.weight, norm.bias, norm.num_groups, norm.eps, scale_shift, silu)

        n, _, h, w = x.shape
        channels = [value.shape[1] for value in (x, skip) if value]
        blocked = blocked and all(c % 32 == 0 for c in channels)
        return self.step(run, (n, sum(channels), h, w), x, skip, terms=self.terms if blocked else None)

    def resampled(self, x: _Value, how: str | None) -> _Value:
        """Means of 2x2 pixels, or each pixel four times: a convolution that keeps the channels apart."""
        if how is None:
            return x
        c = x.shape[1]
        floats = dict(dtype=torch.float32, device="cpu")
        taps = F.pad(torch.full((2, 2), 0.25, **floats), (0, 1, 0, 1)) if how == "down" else torch.ones(1, 1, **floats)
        weight = lambda: torch.eye(c, **floats)[:, :, None, None] * taps  # noqa: E731
        bias, stride = torch.zeros(c, **floats), 2 if how == "down" else 1
        return self._conv((how, c), weight, bias, len(taps), x, None, None, None, stride, 0, how == "up")

    def resblock(self, block: ResBlock, x: _Value, skip: _Value | None = None) -> _Value:
        condition = self.condition_of[block]
        add, scale_shift = (None, condition) if block.scale_shift else (condition, None)
        h = self.norm(block.norm1, x, skip, blocked=not self.winograd)
        up = block.resample == "up"
        h = self.conv(h if up else self.resampled(h, block.resample), block.conv1, add=add, upsample=up)
        h = self.norm(block.norm2, h, scale_shift=scale_shift, blocked=not self.winograd)
        if block.resample:
            x = self.resampled(x, block.resample)
        if block.conv_shortcut is not None:
            x = self.conv(x, block.conv_shortcut, skip=skip)
        return self.conv(h, block.conv2, residual=x)

    def attention(self, block: AttentionBlock, x: _Value) -> _Value:
        n, c, h, w = x.shape
        d = c // block.heads

        def run(y: Tensor, qkv: Tensor) -> None:
            tokens = qkv.permute(0, 2, 3, 1).view(n, h * w, 3, block.heads, d)
            q, k, v = tokens.permute(2, 0, 3, 1, 4)  # [N, heads, H W, d]
            out = y.permute(0, 2, 3, 1).view(n, h * w, block.heads, d).transpose(1, 2)
            _ops.attention_out(out, q, k, v, None, terms)

        terms = self.terms if d % 32 == 0 and d <= 256 else None
        dtype = self.dtype if terms else torch.float32
        blocked = self.terms != 1 and self.by_terms(c, 3 * c, 1)  # bfloat16 is read as it lies
        normed = self.norm(block.group_norm, x, silu=False, blocked=blocked)
        qkv = self.conv(normed, (block.to_q, block.to_k, block.to_v), dtype=dtype)
        out = self.step(run, x.shape, qkv, dtype=dtype)
        return self.conv(out, block.to_out[0], residual=x)

    def block(self, block: nn.Module, x: _Value, skip: _Value | None = None) -> _Value:
        """Any of those that ``UNet.walk`` meets."""
        if isinstance(block, ResBlock):
            return self.resblock(block, x, skip)
        if isinstance(block, AttentionBlock):
            return self.attention(block, x)
        if isinstance(block, Downsample):
            return self.conv(x, block.conv, stride=2, padding=block.conv.padding[0])
        return self.conv(x, block.conv, upsample=True)


# --- steps -> buffers -> program ---


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, device="cpu")


def _buffers(steps: list[_Step], fixed: dict[_Value, Tensor]) -> dict[_Value, Tensor]:
    """Memory for every value; that of a value whose last use is over serves those after it."""
    memory = dict(fixed)
    last_use = {value: i for i, step in enumerate(steps) for value in step.inputs if value is not None}
    ends: dict[int, list[_Value]] = {}
    for value, i in last_use.items():
        if value not in fixed:
            ends.setdefault(i, []).append(value)
    free: list[Tensor] = []
    owner: dict[_Value, Tensor] = {}
    for i, step in enumerate(steps):
        if step.y not in memory:
            fitting = [j for j, buffer in enumerate(free) if buffer.numel() >= step.y.bytes]
            best = min(fitting, key=lambda j: free[j].numel(), default=None)
            owner[step.y] = _bytes(step.y.bytes) if best is None else free.pop(best)
            memory[step.y] = step.y.image(owner[step.y])
        free += [owner[value] for value in ends.get(i, ())]
    return memory


class Recording:
    """The kernel calls for one shape of input, with the memory that they work on; ``packed`` makes the weights."""

    def __init__(
        self,
        packed: Callable[..., PackedConv],
        network: UNet,
        shape: torch.Size,
        dtype: torch.dtype,
        terms: int | None,
    ):
        self.widths = [block.time_emb_proj.out_features for block in resblocks(network)]
        self.conditions = [torch.zeros(shape[0], w, dtype=torch.float32, device="cpu") for w in self.widths]
        trace = _Trace(packed, network, shape, dtype, terms, self.conditions)
        self.x, self.y = (value.image(_bytes(value.bytes).zero_()) for value in (trace.x, trace.y))
        memory = _buffers(trace.steps, {trace.x: self.x, trace.y: self.y})
        self.program = _C.Program()
        with self.program:
            for step in trace.steps:
                step.run(memory[step.y], *(None if value is None else memory[value] for value in step.inputs))

    def run(self, x: Tensor, conditions: Tensor) -> Tensor:
        self.x.copy_(x)
        torch.split_with_sizes_copy(conditions, self.widths, dim=1, out=self.conditions)
        self.program.run()
        return self.y.clone(memory_format=torch.contiguous_format)
