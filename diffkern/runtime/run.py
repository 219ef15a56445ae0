"""Machine settings of a run. They change what is drawn by rounding alone."""

from dataclasses import dataclass
from typing import Any

import torch

from ..process import checked_count


@dataclass(frozen=True)
class Run:
    """The device, the dtype and other machine settings of a run.

    batch_size  rows of every network call, at most 16 unless given; the last batch is padded to it
    device      where to run; None is where the network is, and the CPU for a name, a file or a bare function
    dtype       torch.bfloat16 or float16 runs the network under autocast; the engine has bfloat16 kernels of its own.
                None is float32, or what the network was optimized for. x_t and the update stay float32
    engine      run a module on a CPU by :func:`diffkern.optimize`, which is faster and rounds otherwise
    cuda_graph  on a CUDA device, record a step of each kind, network and update, and replay it: no step waits for the
                host. The network must be one that a CUDA graph can hold; there is no callback
    progress    show a progress bar on stderr, or now and then a line where that is no terminal

    Raises TypeError or ValueError that names the field.
    """

    batch_size: int | None = None
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
    engine: bool = True
    cuda_graph: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("engine", "cuda_graph", "progress"):
            value: Any = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected True or False, got {value!r}")
        if self.dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.float16, got {self.dtype!r}")
        if self.batch_size is not None:
            checked_count("batch_size", self.batch_size)
