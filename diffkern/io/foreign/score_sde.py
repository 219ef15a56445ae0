"""yang-song/score_sde_pytorch (Song et al. 2021b): DDPM++ and NCSN++ with blocks of BigGAN's kind.

Its modules are numbered in the order in which they run. A checkpoint's averaged weights are a list in that order.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ...networks import NCSNpp
from ...process import VE, VP, Process, SubVP
from .edm import negate, song_names, song_options
from .weights import Option, Weights, fill, unet_weights

NAME = "yang-song/score_sde_pytorch"
ANCHOR = "sigmas"
OPTIONS = {
    "sde": Option(str, "'vp', 'subvp' or 've'"),
    "image_size": Option(int, "of the images"),
    "fir": Option(bool, "whether images are resampled by the filter 1, 3, 3, 1 (True in NCSN++, False in DDPM++)"),
    "skip_rescale": Option(bool, "whether sums are scaled (True)"),
    "centered": Option(bool, "whether data are in [-1, 1], not [0, 1] (True of VP, False of VE)"),
    "beta_min": Option(float, "of VP (0.1)"),
    "beta_max": Option(float, "of VP (20)"),
}
PARTS = (
    ("", ""),
    ("norm1", "GroupNorm_0"),
    ("conv1", "Conv_0"),
    ("time_emb_proj", "Dense_0"),
    ("norm2", "GroupNorm_1"),
    ("conv2", "Conv_1"),
    ("conv_shortcut", "Conv_2"),
)
ATTENTION_PARTS = (
    ("group_norm", "GroupNorm_0"),
    ("to_q", "NIN_0"),
    ("to_k", "NIN_1"),
    ("to_v", "NIN_2"),
    ("to_out.0", "NIN_3"),
)


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model``: the process is that in which data are in [-1, 1]."""
    tensors = _averaged(weights)
    kinds = _kinds(tensors)
    fourier = "W" in kinds[0]
    sde = options.get("sde", "ve" if fourier else None)
    process = _process(sde, options, weights)
    if "image_size" not in options:
        raise ValueError("image_size: expected it as an option, which no tensor shows, got none")
    places, attention, encoder, levels, blocks = _places(kinds, first=3 if fourier else 2)
    rest = {
        _renamed(name): tensor.T if name.endswith(".W") and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }
    linears = {"time_embedding.linear_1": f"{int(fourier)}", "time_embedding.linear_2": f"{1 + int(fourier)}"}
    left = {
        name: tensor
        for name, tensor in rest.items()
        if not any(name.startswith(f"{place}.") for place in attention.values()) and name != "0.W"
    }
    made = unet_weights(Weights(left, weights.path, {}), linears | places, PARTS)
    for block, place in attention.items():
        for part, name in ATTENTION_PARTS:
            for kind in ("weight", "bias"):
                made[f"{block}.{part}.{kind}"] = rest[f"{place}.{name}.{kind}"]
    made = song_names(made)
    config = song_options(made, levels, blocks) | dict(
        encoder=encoder,
        taps=(1, 3, 3, 1) if options.get("fir", fourier) else (1, 1),
        skip_rescale=options.get("skip_rescale", True),
    )
    if fourier:
        made["freqs"] = tensors["0.W"]
    negate(made, -1.0 if sde == "ve" else 1.0)
    size, channels = options["image_size"], config["in_channels"]
    return dict(
        network=fill(lambda: NCSNpp(**config), made), schedule=process, prediction="eps", shape=(channels, size, size)
    )


def _process(sde: Any, options: Mapping[str, Any], weights: Weights) -> Process:
    centered = options.get("centered", sde != "ve")
    if sde == "ve":
        sigmas = weights.tensors["sigmas"]
        scale = 1 if centered else 2  # from [0, 1] to [-1, 1]
        return VE(scale * float(sigmas.min()), scale * float(sigmas.max()), 1 / scale)
    if not centered or sde not in ("vp", "subvp"):
        raise ValueError(f"sde: expected {OPTIONS['sde']}, centered but for VE, as options, got {sde!r}")
    return (VP if sde == "vp" else SubVP)(options.get("beta_min", 0.1), options.get("beta_max", 20.0))


def _averaged(weights: Weights) -> dict[str, Tensor]:
    """The tensors by number and part: the averaged ones of a checkpoint, which are a list of what is trained."""
    tensors = {k.removeprefix("all_modules."): t for k, t in weights.tensors.items() if k.startswith("all_modules.")}
    if not tensors:
        raise ValueError("expected all_modules, got a network of another kind")
    shadow = [value for name, value in weights.all.items() if name.startswith("ema.shadow_params.")]
    trained = [name for name in tensors if name != "0.W"]
    if not shadow:
        return tensors
    if [t.shape for t in shadow] != [tensors[name].shape for name in trained]:
        raise ValueError(f"ema: expected the {len(trained)} tensors that are trained, got {len(shadow)} others")
    return tensors | dict(zip(trained, shadow, strict=True))


def _renamed(name: str) -> str:
    """W, [in, out], and b of a layer for each pixel, as those of a linear one; that of the Fourier features stays."""
    return name if name == "0.W" else re.sub(r"\.b$", ".bias", re.sub(r"\.W$", ".weight", name))


def _kinds(tensors: Mapping[str, Tensor]) -> list[dict[str, tuple[int, ...]]]:
    """The parts of each module with their shapes, by number."""
    modules: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.partition(".")
        modules.setdefault(int(number), {})[part] = tuple(tensor.shape)
    return [modules[i] for i in sorted(modules)]


def _places(
    kinds: list[dict[str, tuple[int, ...]]], first: int
) -> tuple[dict[str, str], dict[str, str], str, int, int]:
    """(our block -> its number, our block -> the number of its attention, encoder, levels, blocks a level)."""

    def is_block(i: int) -> bool:
        return "Conv_1.weight" in kinds[i]

    def resamples(i: int) -> bool:
        return is_block(i) and kinds[i].get("Conv_2.weight", ())[:1] == kinds[i].get("Conv_2.weight", (0, 0))[1:2]

    numbers = list(range(first, len(kinds)))
    if any("NIN_0.W" in kinds[i] and is_block(i) for i in numbers) or not any(map(is_block, numbers)):
        raise ValueError("resblock_type: expected 'biggan', got 'ddpm'")
    steps = [i for i in numbers if resamples(i)]
    levels = len(steps) // 2 + 1
    plain = [i for i in numbers if is_block(i) and not resamples(i)]
    blocks = (len(plain) - 2 - levels) // (2 * levels)
    order = _order(levels, blocks)
    places, attention, encoder = {"conv_in": str(first)}, {}, "plain"
    block = ""
    level = 0
    for i in numbers[1:]:
        parts = kinds[i]
        if is_block(i):
            block = next(order)
            level = int(block.split(".")[1]) if block.startswith(("down", "up")) else level
            places[block] = str(i)
        elif "NIN_3.W" in parts:
            attention[block] = str(i)
        elif "Conv2d_0.weight" in parts or "Conv_0.weight" in parts:
            encoder = "residual" if "Conv2d_0.weight" in parts else "skip"
            part = "Conv2d_0" if encoder == "residual" else "Conv_0"
            places[f"{block.removesuffix('.resample')}.pyramid.conv"] = f"{i}.{part}"
        else:
            kind = "norm" if len(parts["weight"]) == 1 else "conv"
            places[f"up.{level}.head.{kind}"] = str(i)
    return places, attention, encoder, levels, blocks


def _order(levels: int, blocks: int) -> Iterator[str]:
    """Our names of the blocks, in the order in which they run."""
    for level in range(levels):
        if level:
            yield f"down.{level}.resample"
        yield from (f"down.{level}.blocks.{j}" for j in range(blocks))
    yield from ("mid.0", "mid.1")
    for level in range(levels):
        if level:
            yield f"up.{level}.resample"
        yield from (f"up.{level}.blocks.{j}" for j in range(blocks + 1))
