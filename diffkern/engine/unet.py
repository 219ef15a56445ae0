"""A U-Net as a flat list of kernel calls on a CPU, for inference.

    network -> steps        what is computed from what, for one shape of input          (_Trace)
    steps   -> buffers      a value's memory is another's after its last use            (_buffers)
    buffers -> program      every kernel's call, recorded once, replayed without Python (_Plan)

Weights are packed once, and again when they have changed. What depends on the time step and the label alone is computed
once for each of their pairs. All kernels treat the samples of a batch apart: a sample's bits are the same in any batch,
on any number of threads.
"""

import dataclasses
import math
import os
import threading
import weakref
from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _C, ops
from ..io.pipelines import check_same
from ..model import Model
from ..networks.unet import (
    AttentionBlock,
    Conv3x3,
    Downsample,
    Level,
    MidBlock,
    ResBlock,
    TimestepEmbedding,
    UNet,
    Upsample,
    from_diffusers,
)
from ..ops import PackedConv, transforms
from .watch import Watch

_ops = torch.ops.diffkern

FEW_TILES = 64  # with at most this many 4x4 tiles in a batch, make Winograd's matrices from the taps as they are used
FEW_CHANNELS = 4  # with this few channels, use the direct kernel
DEEP = 256  # from this many in_channels * taps on, three bfloat16 parts are faster than float32, at batch 1 too
KEPT_PLANS = 4
KEPT_CONDITIONS = 4096
KNOWN = {  # what modules may be; where others are, as those of LoRA, the network itself runs
    *(UNet, Level, MidBlock, ResBlock, AttentionBlock, Downsample, Upsample, Conv3x3, TimestepEmbedding),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding, nn.Dropout, nn.ModuleList),
}


def optimize(network: Any, *, dtype: torch.dtype = torch.float32) -> Any:
    """The same network, run by packed weights and fused kernels where it infers on a CPU in float32.

    network  a :class:`diffkern.unet.UNet`, a :class:`diffkern.Model` that holds one, or diffusers' ``UNet2DModel``
    dtype    float32; or bfloat16: images and weights between input and output, products of convolutions and of
             attention. Their sums, softmax, the embeddings and statistics stay float32, and so does the result

    In float32, ``torch.set_float32_matmul_precision`` says what products may be, as it does for torch. With "highest",
    the default, they are those of floats, or as exact; with "high" or "medium", where the processor has AMX, those of
    sums of two bfloat16 numbers, which have 16 bits.

    Returns what is called as ``network`` was: an :class:`Engine`, a ``Model``, or a module with the signature and the
    attributes of ``UNet2DModel``. It shares the network's weights and notices when they change: by torch's count of
    what it writes to them, and by their numbers, all of them at its first call, then 16 of each weight. So a few
    numbers that are changed through ``.data`` or NumPy may pass unnoticed until the next ``optimize``.

    Where there is a gradient to record, on another device, in another dtype, in training with dropout, under autocast,
    or with hooks or modules that are not ours, the network itself runs; for bfloat16, under autocast.

    Raises TypeError for other networks; ValueError for an option of ``UNet2DModel`` that our U-Net has not, and for one
    that computes something else, which is seen by running both on a small input.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    if isinstance(network, Engine | DiffusersEngine):
        return network if network.dtype == dtype else type(network)(network.network, dtype)
    if isinstance(network, Model):
        return dataclasses.replace(network, network=optimize(network.network, dtype=dtype))
    if isinstance(network, UNet):
        return Engine(network, dtype)
    if type(network).__name__ == "UNet2DModel":
        return DiffusersEngine(network, dtype)
    kind = type(network).__name__
    hint = ": give it the pipeline's unet" if hasattr(network, "unet") else ""
    raise TypeError(f"network: expected a diffkern UNet or Model, or diffusers' UNet2DModel, got {kind}{hint}")


class Engine(nn.Module):
    """A U-Net run by native calls. See :func:`optimize`."""

    def __init__(self, network: UNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.network, self.dtype, self._first = network, dtype, True

    @property
    def config(self) -> dict[str, Any]:
        return self.network.config

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: [N, C, H, W]; t: [N] int64; labels: [N] int64 or None. As ``UNet.forward``."""
        if self._may_run(x_t):
            self.network.check(x_t, t, labels)
            compiled, recording = _compiled.setdefault(self.network, _Compiled()), torch.is_grad_enabled()
            with compiled.lock, torch.inference_mode(False), torch.no_grad():
                first, self._first = self._first, False
                if compiled.update(self.network, first) and not (recording and compiled.learns()):
                    conditions = compiled.conditions(self.network, t, labels)
                    return compiled.plan(self.network, x_t.shape, self.dtype, terms_of(self.dtype)).run(x_t, conditions)
        if self.dtype == torch.float32:
            return self.network(x_t, t, labels)
        with torch.autocast(x_t.device.type, self.dtype):
            return self.network(x_t, t, labels).to(x_t.dtype)

    def _may_run(self, x_t: Tensor) -> bool:
        random = self.network.training and self.config["dropout"] > 0
        native = x_t.dtype == torch.float32 and x_t.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        gradient = torch.is_grad_enabled() and x_t.requires_grad
        return native and x_t.numel() > 0 and transforms.unseen(x_t) and not (gradient or random)


def terms_of(dtype: torch.dtype) -> int | None:
    """How many numbers of bfloat16 a factor of a product is the sum of (``ops.pack_conv``); None if it is a float."""
    if dtype == torch.bfloat16:
        return 1
    if _C.cpu_level() != "avx512_amx":
        return None
    return 3 if torch.get_float32_matmul_precision() == "highest" else 2


class _Compiled:
    """All that is made of a network's weights. It never holds the network."""

    def __init__(self):
        self.lock = threading.Lock()
        self._watch: Watch | None = None

    def update(self, network: UNet, exact: bool) -> bool:
        """Forget everything if the network is not what it was. Returns whether kernels can do what it does."""
        if self._watch is None or self._watch.changed(exact):
            self._watch = Watch(network)
            self._packed: dict[Any, PackedConv] = {}
            self._plans: dict[tuple[torch.Size, torch.dtype, int | None], _Plan] = {}
            self._rows: dict[tuple[int, int], Tensor] = {}  # (t, label) -> the condition of every residual block
        return self._watch.native and self._watch.kinds <= KNOWN and self._watch.does_as_written()

    def learns(self) -> bool:
        return any(weight.requires_grad for weight in self._watch.weights)

    def packed(
        self, key: Any, weight: Callable[[], Tensor], pack: Callable[..., PackedConv], **options: Any
    ) -> PackedConv:
        """A weight as ``ops.conv2d`` takes it, made once."""
        key = key, pack, *options.values()
        if key not in self._packed:
            self._packed[key] = pack(weight(), **options)
        return self._packed[key]

    def plan(self, network: UNet, shape: torch.Size, dtype: torch.dtype, terms: int | None) -> "_Plan":
        """The program for these inputs. ``KEPT_PLANS`` are kept, in the order of their last use."""
        key = shape, dtype, terms
        plan = self._plans.pop(key, None)
        while len(self._plans) >= KEPT_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[key] = plan or _Plan(self, network, *key)
        return self._plans[key]

    def conditions(self, network: UNet, t: Tensor, labels: Tensor | None) -> Tensor:
        """Every residual block's projection of the embedding, side by side: [N, sum of their widths]."""
        labels = [-1] * len(t) if labels is None else labels.clamp(min=-1).tolist()
        keys = list(zip(t.tolist(), labels, strict=True))
        if len(self._rows) > KEPT_CONDITIONS:
            self._rows.clear()
        for key in dict.fromkeys(keys):
            if key not in self._rows:
                self._rows[key] = _condition(network, *key)
        if len(set(keys)) == 1:
            return self._rows[keys[0]].expand(len(keys), -1)
        return torch.stack([self._rows[key] for key in keys])


_compiled: weakref.WeakKeyDictionary[UNet, _Compiled] = weakref.WeakKeyDictionary()


def _after_fork() -> None:
    """The child has one thread: whatever another one was at work on stays locked, and is made anew."""
    for network, compiled in list(_compiled.items()):
        if compiled.lock.locked():
            _compiled[network] = _Compiled()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _condition(network: UNet, t: int, label: int) -> Tensor:
    """One row, alone: torch's product for a batch is not that for each of its rows, bit for bit."""
    t, label = (torch.tensor([value], dtype=torch.int64, device="cpu") for value in (t, label))
    emb = F.silu(network.embedding(t, None if network.config["num_classes"] is None else label))
    return torch.cat([block.time_emb_proj(emb)[0] for block in _resblocks(network)])


def _pack_matrices(weight: Tensor) -> PackedConv:
    return ops.expand_taps(ops.pack_taps(weight))


def _resblocks(network: UNet) -> list[ResBlock]:
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
        compiled: _Compiled,
        network: UNet,
        shape: torch.Size,
        dtype: torch.dtype,
        terms: int | None,
        conditions: list[Tensor],
    ):
        self.compiled, self.dtype, self.terms, self.steps = compiled, dtype, terms, []
        self.condition_of = dict(zip(_resblocks(network), conditions, strict=True))
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
            packed = self.compiled.packed(key, weight, pack)
        elif self.by_terms(channels, out_channels, kernel):
            pack = ops.pack_upsampling if upsample and kernel == 3 else ops.pack_conv
            packed = self.compiled.packed(key, weight, pack, terms=self.terms)
        else:
            packed = self.compiled.packed(key, weight, ops.pack_conv)

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


class _Plan:
    """The program for one shape of input, with the memory that it works on."""

    def __init__(self, compiled: _Compiled, network: UNet, shape: torch.Size, dtype: torch.dtype, terms: int | None):
        self.widths = [block.time_emb_proj.out_features for block in _resblocks(network)]
        self.conditions = [torch.zeros(shape[0], w, dtype=torch.float32, device="cpu") for w in self.widths]
        trace = _Trace(compiled, network, shape, dtype, terms, self.conditions)
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


# --- diffusers ---


class DiffusersEngine(nn.Module):
    """A ``UNet2DModel`` with its own signature and attributes, so that pipelines take it."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.network, self.dtype = network, dtype
        self._share()
        self._runs()

    def _share(self) -> None:
        """Makes ours of its weights as they are now."""
        self.engine, self._watch = Engine(from_diffusers(self.network), self.dtype), Watch(self.network)
        self._agrees: bool | None = None  # not compared yet

    def _runs(self) -> bool:
        """Are there modules alone that the engine knows, as they are written? ValueError if it computes something else,
        which is looked at once."""
        kinds = {kind.__module__.split(".")[0] for kind in self._watch.kinds}
        if not (kinds <= {"diffusers", "torch"} and self._watch.does_as_written()):
            return False
        if self._agrees is None:
            self._agrees = False
            check_same(self.engine.network, self.network)
            self._agrees = True
        return self._agrees

    def _same(self) -> bool:
        """Does the engine what the network does now?"""
        try:
            if self._watch.changed_members():
                self._share()
            return self._runs()
        except ValueError:  # it is a U-Net of ours no more
            return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, **options) -> Any:
        """As ``UNet2DModel.forward``: ``UNet2DOutput``, or a tuple with ``return_dict=False``."""
        t = timestep
        if isinstance(t, Integral):
            t = torch.tensor(t, dtype=torch.int64, device=sample.device)
        whole = isinstance(t, Tensor) and not t.is_floating_point()
        unlike = not whole or (class_labels is None) != (self.engine.config["num_classes"] is None)
        if unlike or not self._same():
            return self.network(sample, timestep, class_labels, **options)
        out = self.engine(sample, t.expand(len(sample)), class_labels)
        if not options.get("return_dict", True):
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)
