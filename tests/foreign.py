"""Checkpoints of other libraries for tests: names, shapes, random weights, and what their own code made of these.

    python tests/foreign.py FOLDER NAME

writes ``tests/data/foreign/NAME.json`` again, by the library's own code in clones under FOLDER.
"""

import importlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import diffkern

FIXTURES = Path(__file__).parent / "data" / "foreign"
FIXED = re.compile(r"(timembedding\.0\.weight|resample_filter|sigmas|^u)$")  # no weights: what they are
NUMBERS = 64  # of an output, kept


def normals(seed: int, shape: tuple[int, ...]) -> Tensor:
    return diffkern.noise(torch.tensor([seed]), shape=shape, step=0)[0]


def random_weights(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Random weights that keep activations of order 1; nothing is left at zero. A scale is near 1."""
    made = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        noise = normals(seed, tuple(shape) or (1,)).reshape(shape)
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
        scales = len(shape) < 2 and not name.endswith("bias")
        made[name] = scales + noise / fan_in**0.5
    return made


def sampled(out: Tensor) -> list[float]:
    flat = out.detach().flatten().double()
    return [float(f"{value:.9g}") for value in flat[torch.linspace(0, len(flat) - 1, NUMBERS).long()].tolist()]


def fixture(name: str) -> dict[str, Any]:
    return json.loads((FIXTURES / f"{name}.json").read_text())


def error_of(out: Tensor, expected: list[float]) -> float:
    """The largest error, relative to the largest number."""
    expected = torch.tensor(expected, dtype=torch.float64)
    return float((torch.tensor(sampled(out)) - expected).abs().max() / expected.abs().max())


# --- the libraries' own networks, tiny ---


class Library:
    """A network of a library: how it is made, and what it is called with."""

    def __init__(self, clone: str, make: Callable[[], nn.Module], t: list[float] | None = None, **given: Any):
        self.clone, self.make, self.given = clone, make, given
        self.t = [7.0, 900.0] if t is None else t

    def call(self, network: nn.Module, x: Tensor, t: Tensor, **given: Tensor) -> Tensor:
        return network(x, t, **given)


class Denoiser(Library):
    """One of edm: (x, sigma, one-hot labels) -> x0_hat."""

    def call(self, network, x, t, labels=None):
        given = {} if labels is None else {"class_labels": torch.eye(network.label_dim)[labels]}
        return network(x, t, force_fp32=True, **given)


class VEScore(Library):
    """One of score_sde: (x in [0, 1], sigma) -> the score, which is -eps / sigma."""

    def call(self, network, x, t):
        return -t[:, None, None, None] * network((x + 1) / 2, t)


def openai(kind: str = "UNetModel", **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        common = dict(image_size=8, in_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=(2,))
        unet = importlib.import_module("guided_diffusion.unet")
        return getattr(unet, kind)(**common | dict(out_channels=6, channel_mult=(1, 2)) | options)

    return make


def pytorch_ddpm() -> nn.Module:
    return importlib.import_module("model").UNet(20, 32, [1, 2], [1], 1, 0.1)


def edm(precond: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        networks = importlib.import_module("training.networks")
        common = dict(img_resolution=8, img_channels=3, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4])
        return getattr(networks, precond)(**common | options)

    return make


def edm2() -> nn.Module:
    networks = importlib.import_module("training.networks_edm2")
    options = dict(channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16)
    return networks.Precond(8, 3, 5, use_fp16=False, model_channels=32, **options)


def score_sde(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        cpp_extension = importlib.import_module("torch.utils.cpp_extension")
        cpp_extension.load = lambda *args, **kwargs: None  # the CUDA kernels, which nothing here calls
        model = dict(sigma_min=0.01, sigma_max=50.0, num_scales=20, nf=32, ch_mult=(1, 2), num_res_blocks=1)
        model |= dict(attn_resolutions=(4,), dropout=0.0, resamp_with_conv=True, conditional=True, fir=False)
        model |= dict(fir_kernel=[1, 3, 3, 1], skip_rescale=True, resblock_type="biggan", progressive="none")
        model |= dict(progressive_input="none", progressive_combine="sum", embedding_type="positional")
        model |= dict(init_scale=0.0, fourier_scale=16, scale_by_sigma=False, nonlinearity="swish") | options
        data = SimpleNamespace(image_size=8, num_channels=3, centered=not model["scale_by_sigma"])
        training = SimpleNamespace(continuous=True)
        config = SimpleNamespace(model=SimpleNamespace(**model), data=data, training=training)
        return importlib.import_module("models.ncsnpp").NCSNpp(config)

    return make


def lucidrains(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        package = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
        return package.Unet(**dict(dim=16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8) | options)

    return make


ADM = dict(model_type="DhariwalUNet", model_channels=128, channel_mult=[1, 1])  # 32 groups at every level
NCSNPP = dict(fir=True, embedding_type="fourier", scale_by_sigma=True)
LIBRARIES = {
    "openai": Library("guided-diffusion", openai(num_heads=4)),
    "openai_adm": Library(
        "guided-diffusion",
        openai(
            **dict(num_head_channels=16, num_classes=5, resblock_updown=True, use_scale_shift_norm=True),
            **dict(use_new_attention_order=True, channel_mult=(0.5, 1, 2), model_channels=64),
        ),
        y=[1, 4],
    ),
    "openai_upsampler": Library(
        "guided-diffusion",
        openai("SuperResModel", num_heads=2, out_channels=3, resblock_updown=True),
        low_res=[2, 3, 4, 4],
    ),
    "openai_classifier": Library(
        "guided-diffusion",
        openai(
            **dict(kind="EncoderUNetModel", num_head_channels=64, resblock_updown=True, use_scale_shift_norm=True),
            **dict(pool="attention", out_channels=7, model_channels=128, channel_mult=(0.5, 0.5)),
        ),
    ),
    "pytorch_ddpm": Library("pytorch-ddpm", pytorch_ddpm, [3, 17]),
    "edm_adm": Denoiser(
        "edm", edm("EDMPrecond", **ADM, label_dim=5, augment_dim=9),
        [0.3, 4.0], labels=[1, 4],
    ),
    "edm_iddpm": Denoiser("edm", edm("iDDPMPrecond", **ADM), [0.3, 4.0]),
    "edm_ddpmpp": Denoiser(
        "edm", edm("VPPrecond", model_channels=32, label_dim=5, augment_dim=9), [0.3, 4.0], labels=[1, 4]
    ),
    "edm_ncsnpp": Denoiser(
        "edm",
        edm(
            **dict(precond="VEPrecond", model_channels=32, embedding_type="fourier", channel_mult_noise=2),
            **dict(encoder_type="residual", resample_filter=[1, 3, 3, 1]),
        ),
        [0.3, 4.0],
    ),
    "edm2": Denoiser("edm2", edm2, [0.3, 4.0], labels=[1, 4]),
    "score_sde_ddpmpp": Library("score_sde_pytorch", score_sde(num_scales=1000), [7, 900]),
    "score_sde_ncsnpp": VEScore("score_sde_pytorch", score_sde(**NCSNPP, progressive_input="residual"), [0.3, 4.0]),
    "score_sde_skip": VEScore(
        "score_sde_pytorch",
        score_sde(**NCSNPP, progressive_input="input_skip", progressive="output_skip"), [0.3, 4.0],
    ),
    "lucidrains": Library("denoising-diffusion-pytorch", lucidrains()),
    "lucidrains_fourier": Library(
        "denoising-diffusion-pytorch",
        lucidrains(learned_sinusoidal_cond=True, init_dim=24, full_attn=(True, True)), [0.3, 0.9],
    ),
}  # fmt: skip


def record(clones: Path, name: str) -> dict[str, Any]:
    """Names, shapes and the output of a library's network with our weights for our x."""
    library = LIBRARIES[name]
    sys.path.insert(0, str(clones / library.clone))
    network = library.make().eval()
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    kept = {key: tensor for key, tensor in network.state_dict().items() if FIXED.search(key)}
    network.load_state_dict(random_weights(shapes) | kept)
    given = {k: normals(101, tuple(v)) if len(v) == 4 else torch.tensor(v) for k, v in library.given.items()}
    with torch.no_grad():
        out = library.call(network, normals(100, (2, 3, 8, 8)), torch.tensor(library.t), **given)
    small = {key: t.tolist() for key, t in kept.items() if key == "sigmas" and len(t) < 100}
    return dict(shapes=shapes, t=library.t, given=library.given, out=sampled(out), **small)


if __name__ == "__main__":
    clones, *names = sys.argv[1:]
    FIXTURES.mkdir(exist_ok=True)
    for name in names or LIBRARIES:
        text = json.dumps(record(Path(clones), name), separators=(",", ":"))
        (FIXTURES / f"{name}.json").write_text(text + "\n")
        print(name, len(text))
