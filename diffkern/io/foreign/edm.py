"""NVlabs/edm (Karras et al. 2022): DhariwalUNet, which is our U-Net, and SongUNet, which is DDPM++ and NCSN++.

Its files are pickles with code: ``diffkern convert`` makes of them the tree of tensors that is read here.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...networks import NCSNpp, UNet
from ...process import EDM, VE, VP, Process
from ...schedule import Schedule
from .weights import Option, Weights, fill, split_qkv, unet_options, unet_places, unet_weights

NAME = "NVlabs/edm"
ANCHOR = "map_layer0.weight"
OPTIONS = {
    "precond": Option(str, "'edm', 'vp', 've' or 'iddpm': how the network was trained"),
    "sigma_data": Option(float, "of 'edm' (0.5)"),
    "beta_d": Option(float, "of 'vp' (19.9)"),
    "beta_min": Option(float, "of 'vp' (0.1)"),
    "epsilon_t": Option(float, "of 'vp' (1e-5)"),
    "sigma_min": Option(float, "of 've' (0.02)"),
    "sigma_max": Option(float, "of 've' (100)"),
}
PRECONDS = {"EDMPrecond": "edm", "VPPrecond": "vp", "VEPrecond": "ve", "iDDPMPrecond": "iddpm"}

PARTS = (
    ("", ""),
    ("norm1", "norm0"),
    ("conv1", "conv0"),
    ("time_emb_proj", "affine"),
    ("norm2", "norm1"),
    ("conv2", "conv1"),
    ("conv_shortcut", "skip"),
    ("group_norm", "norm2"),
    ("qkv", "qkv"),
    ("to_out.0", "proj"),
)
FILTER = re.compile(r"(^|\.)resample_filter$")
IGNORED = ("map_augment.weight",)  # of the augmentation in training: absent where images are drawn


def levels_of(weights: Weights) -> tuple[list[int], int]:
    """(the resolution of each level, from the first down; blocks a level): both are in the blocks' names."""
    sizes = sorted({int(name[4:].split("x")[0]) for name in weights.tensors if name.startswith("enc.")}, reverse=True)
    if not sizes:
        raise ValueError("expected tensors of an encoder, enc.*, got none")
    return sizes, sum(weights.has(f"enc.{sizes[0]}x{sizes[0]}_block{j}") for j in range(64))


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model``."""
    sizes, blocks = levels_of(weights)
    precond = options.get("precond", None if weights.beside("u") is None else "iddpm")
    if precond not in PRECONDS.values():
        raise ValueError(f"precond: expected {OPTIONS['precond']}, as an option, got {precond!r}")
    process, prediction = _process(precond, options, weights)
    read_network = _adm if weights.has("out_conv") else _song
    network, channels = read_network(weights, sizes, blocks, sign=-1.0 if precond == "ve" else 1.0)
    return dict(
        network=network,
        schedule=process,
        prediction=prediction,
        shape=(channels, sizes[0], sizes[0]),
    )


def _process(precond: str, options: Mapping[str, Any], weights: Weights) -> tuple[Process, str]:
    """The process that the preconditioning stands for, and what the network predicts there. VE predicts -eps."""
    if precond == "edm":
        return EDM(options.get("sigma_data", 0.5)), "edm"
    if precond == "vp":
        beta_min = options.get("beta_min", 0.1)
        return VP(beta_min, beta_min + options.get("beta_d", 19.9), options.get("epsilon_t", 1e-5)), "eps"
    if precond == "ve":
        return VE(options.get("sigma_min", 0.02), options.get("sigma_max", 100.0), 0.5), "eps"
    sigma = weights.beside("u")[:-1].double().flip(0)  # the last is 0; from the least noise to the most
    return Schedule.from_alpha_bar(1 / (1 + sigma.square())), "eps"


def _prefixes(sizes: list[int]) -> tuple[list[str], list[str]]:
    """(those of the levels on the way down, and on the way up)."""
    return [f"enc.{size}x{size}" for size in sizes], [f"dec.{size}x{size}" for size in sizes[::-1]]


def _adm(weights: Weights, sizes: list[int], blocks: int, sign: float) -> tuple[UNet, int]:
    down, up = _prefixes(sizes)

    def side(way: str, level: int, j: int) -> tuple[str, str]:
        if way == "down":
            place = f"{down[level]}_block{j}" if j < blocks else f"{down[level + 1]}_down"
        else:
            place = f"{up[level]}_block{j}" if j <= blocks else f"{up[level + 1]}_up"
        return place, place

    others = {
        "conv_in": f"{down[0]}_conv",
        "time_embedding.linear_1": "map_layer0",
        "time_embedding.linear_2": "map_layer1",
        "mid_block.resnets.0": f"{up[0]}_in0",
        "mid_block.attentions.0": f"{up[0]}_in0",
        "mid_block.resnets.1": f"{up[0]}_in1",
        "conv_norm_out": "out_norm",
        "conv_out": "out_conv",
    }
    tensors = dict(weights.tensors)
    labels = tensors.pop("map_label.weight", None)
    ignored = (*IGNORED, *(name for name in tensors if FILTER.search(name)))

    def split(tensor: Tensor, block: str) -> tuple[Tensor, Tensor, Tensor]:
        return split_qkv(tensor, len(tensor) // 3 // 64, "hd3")

    rest = Weights(tensors, weights.path, weights.all)
    made = unet_weights(rest, unet_places(len(sizes), blocks, side, others), PARTS, split, ignored)
    if labels is not None:  # no class adds nothing
        made["class_embedding.weight"] = torch.cat((labels.T, torch.zeros_like(labels.T[:1])))
    config = unet_options(made, len(sizes), blocks) | dict(
        head_dim=64, norm_eps=1e-5, flip_sin_to_cos=True, freq_shift=0.0
    )
    if labels is not None:
        config |= dict(num_classes=labels.shape[1], null_class=True)
    if min(config["channels"], *(len(made[name]) for name in made if name.endswith("norm2.weight"))) < 128:
        raise ValueError("expected at least 128 channels at each level, whose norms all have 32 groups, got fewer")
    channels = config["in_channels"]
    if config["out_channels"] == 2 * channels:
        config |= dict(out_channels=channels, learned_variance=True)
    for name in ("conv_out.weight", "conv_out.bias"):
        made[name] = sign * made[name]
    return fill(lambda: UNet(**config), made), channels


TAPS = {2: (1, 1), 4: (1, 3, 3, 1)}
"""Filters between resolutions, by their length."""


def _song(weights: Weights, sizes: list[int], blocks: int, sign: float) -> tuple[NCSNpp, int]:
    down, up = _prefixes(sizes)
    tensors, last = weights.tensors, len(sizes) - 1
    places = {"conv_in": f"{down[0]}_conv", "mid.0": f"{up[0]}_in0", "mid.1": f"{up[0]}_in1"}
    for level in range(len(sizes)):
        places |= {f"down.{level}.blocks.{j}": f"{down[level]}_block{j}" for j in range(blocks)}
        places |= {f"up.{level}.blocks.{j}": f"{up[level]}_block{j}" for j in range(blocks + 1)}
        places[f"down.{level}.resample"] = f"{down[level]}_down"
        places[f"up.{level}.resample"] = f"{up[level]}_up"
        for kind in ("skip", "residual"):
            if weights.has(f"{down[level]}_aux_{kind}"):
                places[f"down.{level}.pyramid.conv"] = f"{down[level]}_aux_{kind}"
        places[f"up.{level}.head.norm"] = f"{up[level]}_aux_norm"
        places[f"up.{level}.head.conv"] = f"{up[level]}_aux_conv"
    places |= {"time_embedding.linear_1": "map_layer0", "time_embedding.linear_2": "map_layer1"}

    def split(tensor: Tensor, block: str) -> tuple[Tensor, Tensor, Tensor]:
        return split_qkv(tensor, 1, "hd3")

    filters = {len(tensor[0, 0]) for name, tensor in tensors.items() if FILTER.search(name)}
    known = {name for name in tensors if FILTER.search(name)} | {*IGNORED, "map_noise.freqs"}
    known |= {"map_label.weight", "map_label.bias"}
    made = song_names(unet_weights(weights, places, PARTS, split, tuple(known)))
    config = song_options(made, len(sizes), blocks) | dict(
        taps=TAPS[max(filters, default=2)],
        encoder="residual" if weights.has(f"{down[last]}_aux_residual") else "plain",
    )
    if weights.has(f"{down[last]}_aux_skip"):
        config["encoder"] = "skip"
    if "map_noise.freqs" in tensors:
        made["freqs"] = tensors["map_noise.freqs"]
    if "map_label.weight" in tensors:
        rows = tensors["map_label.weight"].T * tensors["map_label.weight"].shape[1] ** 0.5
        made["class_embedding.weight"] = torch.cat((rows, torch.zeros_like(rows[:1]))) + tensors["map_label.bias"]
        config["num_classes"] = len(rows)
    negate(made, sign)
    return fill(lambda: NCSNpp(**config), made), config["in_channels"]


def song_names(made: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Attention is within a block of NCSN++."""
    inner = ("group_norm.", "to_q.", "to_k.", "to_v.", "to_out.")
    names = {name: name for name in made}
    for name in made:
        for part in inner:
            if f".{part}" in name:
                names[name] = name.replace(f".{part}", f".attention.{part}")
    return {names[name]: tensor for name, tensor in made.items()}


def song_options(made: Mapping[str, Tensor], levels: int, blocks: int) -> dict[str, Any]:
    """The options of an NCSN++ that names and shapes tell."""
    channels, in_channels = made["conv_in.weight"].shape[:2]
    widths = [len(made[f"down.{level}.blocks.0.conv2.weight"]) for level in range(levels)]
    head = f"up.{levels - 1}.head.conv.weight"
    return dict(
        in_channels=in_channels,
        out_channels=len(made[head]),
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        blocks=blocks,
        attention_levels=tuple(
            level for level in range(levels) if f"down.{level}.blocks.0.attention.to_q.weight" in made
        ),
        embedding="sines" if made["time_embedding.linear_1.weight"].shape[1] == channels else "fourier",
        decoder="skip" if levels > 1 and "up.0.head.conv.weight" in made else "plain",
    )


def negate(made: dict[str, Tensor], sign: float) -> None:
    """Change the sign of what an NCSN++ returns: of a network that predicts -eps."""
    for name in made if sign < 0 else ():
        if ".head.conv." in name:
            made[name] = -made[name]
