"""NVlabs/edm2 (Karras et al. 2024). The magnitude-preserving scales are multiplied into the weights."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...networks import EDM2UNet
from ...process import EDM
from .edm import levels_of
from .weights import Option, Weights, fill

NAME = "NVlabs/edm2"
ANCHOR = "emb_fourier.freqs"
OPTIONS = {
    "sigma_data": Option(float, "the data's standard deviation (0.5)"),
    "head_dim": Option(int, "channels a head (64)"),
    "latents": Option(bool, "whether it diffuses latents, which are not clipped (True of 4 channels)"),
}
PARTS = {
    "conv_res0": "conv0",
    "emb_linear": "emb",
    "conv_res1": "conv1",
    "conv_skip": "skip",
    "attn_qkv": "qkv",
    "attn_proj": "proj",
}
NAMES = {"emb_noise.weight": "emb_noise.weight", "emb_fourier.freqs": "freqs", "emb_fourier.phases": "phases"}


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model``. Those that NVIDIA published for images of 512 diffuse latents, [4, 64, 64]."""
    sizes, blocks = levels_of(weights)
    made, tensors = {}, weights.tensors
    places = _places(sizes, blocks)
    for name, tensor in tensors.items():
        head, part, kind = ([*name.rsplit(".", 2)] + ["", ""])[:3]
        if head in places and part in PARTS and kind == "weight":
            gain = tensors[f"{head}.emb_gain"] if part == "emb_linear" else 1.0
            made[f"{places[head]}.{PARTS[part]}.weight"] = _scaled(tensor, gain)
        elif name in NAMES:
            made[NAMES[name]] = _scaled(tensor) if name.endswith("weight") else tensor
        elif name == f"enc.{sizes[0]}x{sizes[0]}_conv.weight":
            made["conv_in.weight"] = _scaled(tensor)
        elif name == "out_conv.weight":
            made[name.replace("out_conv", "conv_out")] = _scaled(tensor, tensors["out_gain"])
        elif name == "emb_label.weight":
            rows = math.sqrt(tensor.shape[1]) * _scaled(tensor).T
            made["class_embedding.weight"] = torch.cat((rows, torch.zeros_like(rows[:1])))
        elif not re.search(r"(^|\.)(emb_gain|out_gain)$", name):
            raise ValueError(f"expected the tensors of EDM2, got also {name}")
    width, with_ones = made["conv_in.weight"].shape[:2]
    labels = made.get("class_embedding.weight")
    widths = [len(made[f"enc.{level * (blocks + 1)}.conv1.weight"]) for level in range(len(sizes))]
    config = dict(
        in_channels=with_ones - 1,
        channels=width,
        channel_mult=tuple(w // width if w % width == 0 else w / width for w in widths),
        blocks=blocks,
        attention_levels=tuple(
            level for level in range(len(sizes)) if f"enc.{level * (blocks + 1)}.qkv.weight" in made
        ),
        head_dim=options.get("head_dim", 64),
        num_classes=None if labels is None else len(labels) - 1,
        noise_channels=len(made["freqs"]),
        embedding_channels=len(made["emb_noise.weight"]),
    )
    return dict(
        network=fill(lambda: EDM2UNet(**config), made),
        schedule=EDM(options.get("sigma_data", 0.5)),
        prediction="edm",
        shape=(with_ones - 1, sizes[0], sizes[0]),
        clip=False if options.get("latents", with_ones - 1 == 4) else None,
    )


def _places(sizes: list[int], blocks: int) -> dict[str, str]:
    """The name of a block -> ours: one list on each side, in the order in which they run."""
    names = [f"{size}x{size}" for size in sizes]
    enc = [f"enc.{name}_{kind}" for name in names for kind in ("down", *(f"block{j}" for j in range(blocks)))]
    up = names[::-1]
    dec = [f"dec.{name}_{kind}" for name in up for kind in ("up", *(f"block{j}" for j in range(blocks + 1)))]
    places = {name: f"enc.{i}" for i, name in enumerate(enc[1:])} | {name: f"dec.{i}" for i, name in enumerate(dec[1:])}
    return places | {f"dec.{up[0]}_in{j}": f"mid.{j}" for j in range(2)}


def _scaled(weight: Tensor, gain: Tensor | float = 1.0) -> Tensor:
    """A weight as it is used: rows of mean square 1 (equation 47), times gain / sqrt(inputs) (equation 66)."""
    w = weight.float()
    inputs = w[0].numel()
    norm = torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True)
    return w / (1e-4 + norm / math.sqrt(inputs)) * (gain / math.sqrt(inputs))
