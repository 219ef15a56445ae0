"""Checkpoints of other libraries for tests: names, shapes, random weights, and what their own code made of these.

    python tests/foreign.py FOLDER FAMILY...

writes ``tests/data/foreign/FAMILY.json`` again, by the library's own code in clones under FOLDER.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import diffkern

FIXTURES = Path(__file__).parent / "data" / "foreign"
NUMBERS = 64  # of an output, kept


def normals(seed: int, shape: tuple[int, ...]) -> Tensor:
    return diffkern.noise(torch.tensor([seed]), shape=shape, step=0)[0]


def random_weights(shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """Of a size that keeps activations of order 1; nothing is left at zero. A scale is near 1."""
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


def _openai(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        unet = importlib.import_module("guided_diffusion.unet")
        kind = options.pop("kind", "UNetModel")
        common = dict(image_size=8, in_channels=3, model_channels=32, num_res_blocks=1, attention_resolutions=(2,))
        return getattr(unet, kind)(**common | dict(out_channels=6, channel_mult=(1, 2)) | options)

    return make


def _pytorch_ddpm() -> nn.Module:
    return importlib.import_module("model").UNet(20, 32, [1, 2], [1], 1, 0.1)


T = [7.0, 900.0]
LIBRARIES: dict[str, tuple[str, Callable[[], nn.Module], dict[str, Any]]] = {
    "openai": ("guided-diffusion", _openai(num_heads=4), {}),
    "openai_adm": (
        "guided-diffusion",
        _openai(
            **dict(num_head_channels=16, num_classes=5, resblock_updown=True, use_scale_shift_norm=True),
            **dict(use_new_attention_order=True, channel_mult=(0.5, 1, 2), model_channels=64),
        ),
        {"y": [1, 4]},
    ),
    "openai_upsampler": (
        "guided-diffusion",
        _openai(kind="SuperResModel", num_heads=2, out_channels=3, resblock_updown=True),
        {"low_res": [2, 3, 4, 4]},
    ),
    "pytorch_ddpm": ("pytorch-ddpm", _pytorch_ddpm, {"t": [3, 17]}),
}
"""A fixture -> (the clone, what makes the network, what it gets beside x and t)."""


def record(clones: Path, name: str) -> dict[str, Any]:
    """Names, shapes and the output of a library's network with our weights for our x."""
    folder, make, given = LIBRARIES[name]
    sys.path.insert(0, str(clones / folder))
    network = make().eval()
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    kept = {key: t for key, t in network.state_dict().items() if "timembedding.0" in key}
    network.load_state_dict(random_weights(shapes) | kept)
    given = dict(given)
    t = given.pop("t", T)
    size = given.pop("size", 8)
    call = {key: normals(101, tuple(v)) if len(v) == 4 else torch.tensor(v) for key, v in given.items()}
    with torch.no_grad():
        out = network(normals(100, (2, 3, size, size)), torch.tensor(t), **call)
    return dict(shapes=shapes, t=t, given=given, size=size, out=sampled(out))


if __name__ == "__main__":
    clones, *names = sys.argv[1:]
    FIXTURES.mkdir(exist_ok=True)
    for name in names:
        text = json.dumps(record(Path(clones), name), separators=(",", ":"))
        (FIXTURES / f"{name}.json").write_text(text + "\n")
        print(name, len(text))
