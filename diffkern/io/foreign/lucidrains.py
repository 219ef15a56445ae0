"""lucidrains/denoising-diffusion-pytorch: its ``Unet``, alone, in a ``GaussianDiffusion`` or a ``Trainer``'s file."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...networks import RMSUNet
from ...schedule import Schedule
from .weights import Option, Weights, fill

NAME = "lucidrains/denoising-diffusion-pytorch"
ANCHOR = "init_conv.weight"
OPTIONS = {
    "image_size": Option(int, "of the images"),
    "objective": Option(str, "'pred_v', 'pred_noise' or 'pred_x0', where the file has no loss_weight, which shows it"),
    "betas": Option(list, "where the file has none"),
    "theta": Option(float, "of the sinusoids (10000)"),
}
PREDICTIONS = {"pred_v": "v", "pred_noise": "eps", "pred_x0": "x0"}

TABLE = (
    (r"init_conv\.", "conv_in."),
    (r"final_conv\.", "conv_out."),
    (r"final_res_block\.", "block_out."),
    (r"time_mlp\.0\.weights$", "freqs"),
    (r"time_mlp\.1\.", "linear_1."),
    (r"time_mlp\.3\.", "linear_2."),
    (r"mid_block1\.", "mid.0."),
    (r"mid_block2\.", "mid.1."),
    (r"mid_attn\.", "mid_attention."),
    (r"(down|up)s\.(\d+)\.([01])\.", r"\1.\2.blocks.\3."),
    (r"(down|up)s\.(\d+)\.2\.", r"\1.\2.attention."),
    (r"(down|up)s\.(\d+)\.3\.(1\.)?(weight|bias)$", r"\1.\2.conv.\4"),
)
PARTS = (
    (r"\.mlp\.1\.", ".time_emb_proj."),
    (r"\.block([12])\.proj\.", r".conv\1."),
    (r"\.block([12])\.norm\.", r".norm\1."),
    (r"\.res_conv\.", ".conv_shortcut."),
    (r"\.mem_kv$", ".memory"),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.to_out\.1\.", ".norm_out."),
)
"""(pattern of a name, ours): the first of TABLE that fits, then those of PARTS."""


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model``. What the file of a ``GaussianDiffusion`` shows, no option need say."""
    linear = {name.removesuffix(".to_out.1.g") for name in weights.tensors if name.endswith(".to_out.1.g")}
    made = {_ours(name): _shaped(name, tensor, linear) for name, tensor in weights.tensors.items()}
    levels = weights.count("downs")
    first, in_channels = made["conv_in.weight"].shape[:2]
    channels = len(made["linear_2.weight"]) // 4
    widths = [len(made[f"down.{level}.conv.weight"]) for level in range(levels)]
    memory = [made[f"down.{level}.attention.memory"].shape for level in range(levels)]
    out_channels = len(made["conv_out.weight"])
    if in_channels != out_channels:
        raise ValueError(f"expected a network without self-conditioning, got {in_channels} channels in")
    config = dict(
        in_channels=in_channels,
        out_channels=out_channels,
        channels=channels,
        channel_mult=tuple(width // channels for width in widths),
        first_channels=first,
        full_attention=tuple(f"downs.{level}.2" not in linear for level in range(levels)),
        heads=tuple(shape[1] for shape in memory),
        head_dim=tuple(shape[3] for shape in memory),
        memory=memory[0][2],
        frequencies=len(made.get("freqs", ())),
        theta=float(options.get("theta", 10000)),
    )
    if "image_size" not in options:
        raise ValueError("image_size: expected it as an option, which no tensor shows, got none")
    schedule = _schedule(weights, options)
    objective = _objective(weights, options, schedule)
    return dict(
        network=fill(lambda: RMSUNet(**config), made),
        schedule=schedule,
        prediction=PREDICTIONS[objective],
        shape=(in_channels, options["image_size"], options["image_size"]),
    )


def _ours(name: str) -> str:
    for pattern, ours in TABLE:
        changed, count = re.subn(f"^{pattern}", ours, name)
        if count:
            for part, replacement in PARTS:
                changed = re.sub(part, replacement, changed)
            return changed
    raise ValueError(f"expected the tensors of a Unet, got also {name}")


def _shaped(name: str, tensor: Tensor, linear: set[str]) -> Tensor:
    """Scales as vectors; keys and values of linear attention as rows, like those of the full one."""
    if name.endswith(".g"):
        return tensor.flatten()
    return tensor.transpose(2, 3) if name.endswith("mem_kv") and name.removesuffix(".mem_kv") in linear else tensor


def _schedule(weights: Weights, options: Mapping[str, Any]) -> Schedule:
    """Return the schedule of the file's betas, which are rounded: the exact schedule that they are, if it is known."""
    betas = options.get("betas", weights.beside("betas"))
    if betas is None:
        raise ValueError("betas: expected them as an option, for the file has the network alone, got none")
    betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
    T = len(betas)
    for known in (Schedule.cosine(T), Schedule.linear(T, 0.1 / T, min(20 / T, 0.999))):
        if torch.allclose(known.betas, betas, rtol=1e-5, atol=0):
            return known
    return Schedule(betas)


def _objective(weights: Weights, options: Mapping[str, Any], schedule: Schedule) -> str:
    """Return the prediction: the loss has the weight 1, snr, or snr / (snr + 1), or that with a smaller snr."""
    objective, weight = options.get("objective"), weights.beside("loss_weight")
    if objective is None and weight is not None:
        snr = schedule.alpha_bar / schedule.one_minus_alpha_bar
        clipped = snr.clamp(max=5.0)
        for name, expected in (
            ("pred_noise", (1 + 0 * snr, clipped / snr)),
            ("pred_x0", (snr, clipped)),
            ("pred_v", (snr / (snr + 1), clipped / (snr + 1))),
        ):
            if any(torch.allclose(weight.double(), values, rtol=1e-3, atol=1e-6) for values in expected):
                return name
    if objective not in PREDICTIONS:
        raise ValueError(f"objective: expected {OPTIONS['objective']}, got {objective!r}")
    return objective
