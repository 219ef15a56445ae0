"""A U-Net by native calls, for inference on a CPU.

Weights are packed once, and again when they have changed. What depends on the time step and the label alone is computed
once for each of their pairs. The calls for one shape of input are recorded once: :mod:`diffkern.engine.recording`.
"""

import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _C
from ..networks import (
    AttentionBlock,
    Conv3x3,
    Downsample,
    Level,
    MidBlock,
    ResBlock,
    TimestepEmbedding,
    UNet,
    Upsample,
)
from ..ops import PackedConv, transforms
from .recording import Recording, resblocks
from .watch import Watch

KEPT_RECORDINGS = 4
KEPT_CONDITIONS = 4096
KNOWN = {  # what modules may be; where others are, as those of LoRA, the network itself runs
    *(UNet, Level, MidBlock, ResBlock, AttentionBlock, Downsample, Upsample, Conv3x3, TimestepEmbedding),
    *(nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding, nn.Dropout, nn.ModuleList),
}


class Engine(nn.Module):
    """A U-Net run by native calls. See :func:`diffkern.optimize`."""

    def __init__(self, network: UNet, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.network, self.dtype, self._first = network, dtype, True

    @property
    def config(self) -> dict[str, Any]:
        return self.network.config

    def forward(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """x_t: [N, C, H, W]; t: [N] int64 or float; labels: [N] int64 or None. As ``UNet.forward``."""
        if self._may_run(x_t):
            self.network.check(x_t, t, labels)
            compiled, recorded = _compiled.setdefault(self.network, _Compiled()), torch.is_grad_enabled()
            with compiled.lock, torch.inference_mode(False), torch.no_grad():
                first, self._first = self._first, False
                if compiled.update(self.network, first) and not (recorded and compiled.learns()):
                    conditions = compiled.conditions(self.network, t, labels)
                    recording = compiled.recording(self.network, x_t.shape, self.dtype, terms_of(self.dtype))
                    return recording.run(x_t, conditions)
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
            self._recordings: dict[tuple[torch.Size, torch.dtype, int | None], Recording] = {}
            self._rows: dict[tuple[float, int], Tensor] = {}  # (t, label) -> the condition of every residual block
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

    def recording(self, network: UNet, shape: torch.Size, dtype: torch.dtype, terms: int | None) -> Recording:
        """The calls for these inputs. ``KEPT_RECORDINGS`` are kept, in the order of their last use."""
        key = shape, dtype, terms
        recording = self._recordings.pop(key, None)
        while len(self._recordings) >= KEPT_RECORDINGS:
            del self._recordings[next(iter(self._recordings))]
        self._recordings[key] = recording or Recording(self.packed, network, *key)
        return self._recordings[key]

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


def _condition(network: UNet, t: int | float, label: int) -> Tensor:
    """One row, alone: torch's product for a batch is not that for each of its rows, bit for bit."""
    t = torch.tensor([t], dtype=torch.int64 if isinstance(t, int) else torch.float32, device="cpu")
    label = torch.tensor([label], dtype=torch.int64, device="cpu")
    emb = F.silu(network.embedding(t, None if network.config["num_classes"] is None else label))
    return torch.cat([block.time_emb_proj(emb)[0] for block in resblocks(network)])
