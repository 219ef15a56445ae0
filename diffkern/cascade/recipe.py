"""How the model ``faces`` is made, part by part, each a command that goes on where it was interrupted:

python -m diffkern.cascade.recipe base --out runs/faces    # 105 minutes on two cores: 16 x 16
python -m diffkern.cascade.recipe sr32 --out runs/faces    # 70 minutes: 16 x 16 to 32 x 32
python -m diffkern.cascade.recipe sr64 --out runs/faces    # 110 minutes: 32 x 32 to 64 x 64
python -m diffkern.cascade.recipe pack --out runs/faces    # faces.safetensors

The parts sr32-plain and sr64-plain are the same without noise on what is enlarged, and pack-plain makes
faces-plain.safetensors of them. The minutes include the drawing of fresh faces, by resvg-py (pip install
diffkern[faces]); without it the runs see the 1,536 packed ones alone.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..datasets import Labelled
from ..datasets.faces import Faces
from ..evaluate.distortion import psnr
from ..image_to_image import AUGMENTATION, IMAGE, resized, upscale
from ..images import from_pixels
from ..model import Model, load
from ..model import save as save_model
from ..networks import UNet
from ..schedule import Schedule
from ..training import Config, recipes
from .pictures import LowResolution, shrunk
from .system import Cascade

COMMON = dict(groups=8, norm_eps=1e-5, downsample_padding=1, flip_sin_to_cos=True, freq_shift=0.0)
WIDTHS = {  # side of the pictures: the network's options
    16: dict(channels=48, channel_mult=(1, 2), attention_levels=(1,)),
    32: dict(channels=32, channel_mult=(1, 2, 4), attention_levels=(2,)),
    64: dict(channels=32, channel_mult=(1, 2, 2, 4), attention_levels=(), blocks=1),
}
SCHEDULE = Schedule.cosine(1000)


def base_model(size: int) -> Model:
    return Model(UNet(3, **COMMON, **WIDTHS[size]), SCHEDULE, "v", (3, size, size), name="base")


def picture_model(size: int, name: str = "upsampler", *, noised: bool = True) -> Model:
    """A model that is given pictures of the size of its samples, and the level of their noise if they are noised."""
    conditions = {IMAGE: (3, size, size), **({AUGMENTATION: ()} if noised else {})}
    network = UNet(3, **COMMON, **WIDTHS[size], conditions=conditions)
    return Model(network, SCHEDULE, "v", (3, size, size), name=name)


def small_faces(size: int) -> Faces:
    return Faces(size=size, transform=Labelled(None, None))


def faces_to_enlarge(size: int, *, noised: bool = True) -> Faces:
    return Faces(size=size, transform=LowResolution(2, SCHEDULE if noised else None))


SETTINGS = dict(lr_schedule="cosine", lr=4e-4, warmup=200, label_dropout=0.0, sample_every=0, checkpoint_every=250)
UPSAMPLERS = ("sr32", "sr64")
PARTS = {  # name: data, model, settings
    "base": (partial(small_faces, 16), partial(base_model, 16), dict(batch_size=64)),
    **{
        f"sr{size}{suffix}": (
            partial(faces_to_enlarge, size, noised=noised),
            partial(picture_model, size, noised=noised),
            dict(batch_size=batch_size),
        )
        for size, batch_size in ((32, 64), (64, 32))
        for suffix, noised in (("", True), ("-plain", False))
    },
}
STEPS = {"base": 9400, "sr32": 3900, "sr32-plain": 3900, "sr64": 6200, "sr64-plain": 6200}


def train_part(part: str, out: Path, steps: int, init: str | None = None) -> None:
    """Train a part, or go on; ``init``: with the weights of that part of a packed model. Prints an upsampler's PSNR."""
    data, make, settings = PARTS[part]
    config = Config(steps=steps, **SETTINGS | settings)
    begin = None if init is None else _part_of(load(init), part)
    model = recipes.train_part(out / part, make, data(), config, begin)
    if part != "base":
        enlarged, bicubic = measured(model)
        print(f"{part}: PSNR of held-out faces {enlarged:.2f} dB, of bicubic interpolation {bicubic:.2f} dB")


def _part_of(cascade: Cascade, part: str) -> Model:
    part = part.removesuffix("-plain")
    return cascade.base if part == "base" else cascade.upsamplers[UPSAMPLERS.index(part)]


def measured(model: Model, n: int = 32, samples: int = 8, **options: Any) -> tuple[float, float]:
    """The PSNR of the mean of some samples for each of n held-out faces, and of bicubic interpolation, in dB."""
    faces = Faces(n, size=model.shape[1], split="test")
    x = from_pixels(torch.stack([faces[i]["x"] for i in range(n)]))
    small = shrunk(x, 2)
    drawn = upscale(model, small.repeat_interleave(samples, 0), **{"steps": 25, "augmentation": None} | options)
    mean = drawn.unflatten(0, (n, samples)).mean(1)
    return psnr(mean, x), psnr(resized(small, x.shape[2:]), x)


def pack(out: Path, suffix: str = "") -> Cascade:
    """Write ``faces.safetensors``, or that of the parts of a suffix, of the parts that a run's folder has."""
    parts = tuple(load(out / f"{part}{suffix}") for part in UPSAMPLERS)
    system, path = Cascade(load(out / "base"), parts, name=f"faces{suffix}"), out / f"faces{suffix}.safetensors"
    save_model(system, path, dtype=torch.float16)
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")
    return system


def main() -> None:
    arguments = recipes.parsed(__doc__, (*PARTS, "pack", "pack-plain"), STEPS)
    if arguments.part in PARTS:
        train_part(arguments.part, arguments.out, arguments.steps, arguments.init)
    else:
        pack(arguments.out, arguments.part.removeprefix("pack"))


if __name__ == "__main__":
    main()
