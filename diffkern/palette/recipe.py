"""How the model ``palette`` is made, each a command that goes on where it was interrupted:

python -m diffkern.palette.recipe train --out runs/palette    # 140 minutes on two cores
python -m diffkern.palette.recipe pack --out runs/palette     # palette.safetensors

The minutes include the drawing of fresh faces, by resvg-py (pip install diffkern[faces]); without it the run sees the
1,536 packed ones alone.
"""

import os
from pathlib import Path
from typing import Any

import torch

from ..cascade.recipe import picture_model
from ..datasets.faces import Faces
from ..evaluate.distortion import psnr
from ..image_to_image import sample_given
from ..images import from_pixels
from ..model import Model, load
from ..model import save as save_model
from ..training import Config, recipes
from .damage import KINDS, Damage, jpeg

SIZE = 32
SETTINGS = dict(lr_schedule="cosine", batch_size=64, lr=4e-4, warmup=200, label_dropout=0.0)
STEPS = {"train": 7800}


def palette_model() -> Model:
    """A model that is given a damaged picture, and not told how it was damaged."""
    return picture_model(SIZE, "palette", noised=False)


def train(out: Path, steps: int, init: str | None = None) -> None:
    """Train, or go on; ``init``: with the weights of a packed model. Prints the PSNR of coarse JPEGs."""
    config = Config(steps=steps, sample_every=0, checkpoint_every=250, **SETTINGS)
    data = Faces(size=SIZE, transform=Damage(KINDS))
    model = recipes.train_part(out / "train", palette_model, data, config, None if init is None else load(init))
    restored, coarse = measured(model)
    print(f"train: PSNR of held-out faces from JPEGs of quality 10 {restored:.2f} dB, of the JPEGs {coarse:.2f} dB")


def measured(model: Model, n: int = 32, samples: int = 8, quality: int = 10, **options: Any) -> tuple[float, float]:
    """The PSNR of the mean of some restorations of each of n held-out faces' JPEGs, and of the JPEGs, in dB."""
    faces = Faces(n, size=SIZE, split="test")
    x = from_pixels(torch.stack([faces[i]["x"] for i in range(n)]))
    coarse = torch.stack([jpeg(picture, quality) for picture in x])
    seeds = torch.arange(n * samples, dtype=torch.int64, device="cpu")
    drawn = sample_given(model, coarse.repeat_interleave(samples, 0), seeds, **{"steps": 25} | options)
    return psnr(drawn.unflatten(0, (n, samples)).mean(1), x), psnr(coarse, x)


def pack(out: Path) -> Model:
    """Write ``palette.safetensors``."""
    model, path = load(out / "train"), out / "palette.safetensors"
    save_model(model, path, dtype=torch.float16)
    print(f"{path}: {os.path.getsize(path) / 1e6:.1f} MB")
    return model


def main() -> None:
    arguments = recipes.parsed(__doc__, ("train", "pack"), STEPS)
    if arguments.part == "pack":
        pack(arguments.out)
    else:
        train(arguments.out, arguments.steps, arguments.init)


if __name__ == "__main__":
    main()
