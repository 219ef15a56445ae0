"""The same networks by native kernels, for inference on a CPU."""

import dataclasses
from typing import Any

import torch

from ..networks import UNet
from .diffusers import DiffusersEngine
from .unet import Engine

__all__ = ["DiffusersEngine", "Engine", "optimize"]


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
    from ..model import Model  # which runs its network by an Engine

    if isinstance(network, Model):
        return dataclasses.replace(network, network=optimize(network.network, dtype=dtype))
    if isinstance(network, UNet):
        return Engine(network, dtype)
    if type(network).__name__ == "UNet2DModel":
        return DiffusersEngine(network, dtype)
    kind = type(network).__name__
    hint = ": give it the pipeline's unet" if hasattr(network, "unet") else ""
    raise TypeError(f"network: expected a diffkern UNet or Model, or diffusers' UNet2DModel, got {kind}{hint}")
