"""How the model ``emoji`` is made, part by part, each a command that goes on where it was interrupted:

python -m diffkern.unclip.recipe clip --out runs/emoji        # 20 minutes on two cores
python -m diffkern.unclip.recipe prior --out runs/emoji       # 5 minutes
python -m diffkern.unclip.recipe decoder --out runs/emoji     # 4 hours
python -m diffkern.unclip.recipe upsampler --out runs/emoji   # 2 hours, and npm; without it, pictures are 32 x 32
python -m diffkern.unclip.recipe pack --out runs/emoji        # emoji.safetensors
"""

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cascade.pictures import LowResolution
from ..cascade.recipe import picture_model
from ..datasets import emoji
from ..io.files import CHECKPOINT
from ..model import Model, load
from ..model import save as save_model
from ..networks import ResidualMLP, UNet
from ..schedule import Schedule
from ..training import Config, recipes
from .clip import CLIP
from .contrastive import CLIP_FILE, by_parts, embeddings, save_clip, train_clip, trained_clip
from .pictures import Pictures
from .system import UnCLIP

FEATURES = 128  # of an embedding
CAPTIONS = 4  # of each picture, with other tags and without parts, for the prior and the decoder
LEFT_OUT = {"embedding": 0.1, "caption": 0.4}
"""The chance that the decoder learns without one of its conditions, beside the trainer's chance to drop both."""

# --- what the prior and the decoder learn from ---


class Embedded(torch.utils.data.Dataset):
    """Pictures with the embeddings, times sqrt(D), of each and of its captions; item i is picture i modulo P."""

    def __init__(self, clip: CLIP, pictures: Pictures):
        self.pictures, scale = pictures, math.sqrt(clip.config["features"])
        self.image = embeddings(clip, pictures) * scale
        index = torch.arange(len(pictures), dtype=torch.int64, device="cpu")
        texts = [text for round in range(CAPTIONS) for text in pictures.captions(index, round)]
        with torch.no_grad():
            self.text = by_parts(clip.text, clip.vocabulary.rows(texts, clip.config["length"])) * scale

    def __len__(self) -> int:
        return len(self.text)


class ForPrior(Embedded):
    """x: the embedding of a picture; text: of a caption."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": self.image[i % len(self.image)], "text": self.text[i]}


class ForDecoder(Embedded):
    """x: a picture; its embedding and its caption's, each left out at times, so that either alone will do."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        k = i % len(self.image)
        found = {"embedding": self.image[k], "caption": self.text[i]}
        for name, chance in LEFT_OUT.items():
            if torch.rand((), dtype=torch.float32, device="cpu") < chance:
                found[name] = torch.zeros_like(found[name])
        return {"x": self.pictures.x[k], **found}


def prior_model(features: int) -> Model:
    network = ResidualMLP(features, conditions={"text": (features,)})
    return Model(network, Schedule.cosine(1000), "x0", (features,), name="prior", clip=False)


def decoder_model(features: int) -> Model:
    network = UNet(
        3,
        channels=32,
        channel_mult=(1, 2, 4),
        attention_levels=(2,),
        groups=8,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0.0,
        conditions={"embedding": (features,), "caption": (features,)},
    )
    return Model(network, Schedule.cosine(1000), "v", (3, 32, 32), name="decoder")


def _config(**given: Any) -> Config:
    return Config(lr_schedule="cosine", weight_decay=0.0, sample_every=0, **given)


def large_pictures(out: Path) -> emoji.Emoji:
    """The data of the upsampler: the drawings at 64 x 64, which npm gets, beside those that it is to enlarge."""
    return emoji.Emoji.fetch(size=64, transform=LowResolution(2, Schedule.cosine(1000)))


def embedded(kind: type[Embedded], out: Path) -> Embedded:
    """The data of the prior or the decoder, by the CLIP of the run."""
    return kind(trained_clip(out), Pictures())


PARTS = {  # name: data of a run's folder, model, settings
    "prior": (
        partial(embedded, ForPrior),
        partial(prior_model, FEATURES),
        dict(batch_size=256, lr=5e-4, objective="x0", warmup=100, checkpoint_every=1000),
    ),
    "decoder": (
        partial(embedded, ForDecoder),
        partial(decoder_model, FEATURES),
        dict(batch_size=64, lr=6e-4, warmup=200, checkpoint_every=250),
    ),
    "upsampler": (
        large_pictures,
        partial(picture_model, 64),
        dict(batch_size=32, lr=4e-4, warmup=200, checkpoint_every=250, label_dropout=0.0),
    ),
}
STEPS = {"clip": 5000, "prior": 6000, "decoder": 14_000, "upsampler": 6000}


def train_part(part: str, out: Path, steps: int, init: str | None = None) -> None:
    """Train a part, or go on; ``init``: a packed model with whose weights, and CLIP where there is none, it begins."""
    data, make, settings = PARTS[part]
    config, begin = _config(steps=steps, **settings), None
    if init is not None:
        packed = load(init)
        begin = packed.models()[part]
        if not (out / CLIP_FILE).exists():
            save_clip(out, packed.clip, STEPS["clip"])
    recipes.train_part(out / part, make, data(out), config, begin)


def pack(out: Path) -> UnCLIP:
    """Write ``emoji.safetensors`` of the parts that a run's folder has."""
    parts = {part: load(out / part) for part in PARTS if part != "upsampler" or (out / part / CHECKPOINT).exists()}
    system = UnCLIP(trained_clip(out), **parts, name="emoji")
    save_model(system, out / "emoji.safetensors", dtype=torch.float16)
    size = os.path.getsize(out / "emoji.safetensors")
    print(f"{out / 'emoji.safetensors'}: {size / 1e6:.1f} MB")
    return system


def main() -> None:
    arguments = recipes.parsed(__doc__, ("clip", *PARTS, "pack"), STEPS)
    if arguments.part == "clip":
        train_clip(arguments.out, arguments.steps)
    elif arguments.part == "pack":
        pack(arguments.out)
    else:
        train_part(arguments.part, arguments.out, arguments.steps, arguments.init)


if __name__ == "__main__":
    main()
