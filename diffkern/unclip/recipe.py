"""How the model ``emoji`` is made, part by part, each a command that goes on where it was interrupted:

python -m diffkern.unclip.recipe clip --out runs/emoji        # 20 minutes on two cores
python -m diffkern.unclip.recipe prior --out runs/emoji       # 5 minutes
python -m diffkern.unclip.recipe decoder --out runs/emoji     # 4 hours
python -m diffkern.unclip.recipe pack --out runs/emoji        # emoji.safetensors
"""

import argparse
import math
import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import epoch_order
from ..datasets import emoji
from ..io.files import CHECKPOINT, read, state, write
from ..model import Model, load
from ..model import save as save_model
from ..networks import ResidualMLP, UNet
from ..progress import bar as progress_bar
from ..schedule import Schedule
from ..training import Config, Trainer
from ..training.runs import signals
from . import files
from .clip import CLIP
from .system import UnCLIP

CLIP_FILE = "clip.safetensors"
CAPTIONS = 4  # of each picture, with other tags and without parts, for the prior and the decoder
DROP = 0.5  # the chance that a caption leaves out its tag, and its style
LEFT_OUT = {"embedding": 0.1, "caption": 0.4}
"""The chance that the decoder learns without one of its conditions, beside the trainer's chance to drop both."""

# --- pictures and their captions ---


class Pictures:
    """The drawings of a split in memory: ``x`` uint8 [P, 3, 32, 32], the number of the thing of each, captions."""

    def __init__(self, split: str = "train"):
        self.set = emoji.Emoji(split=split, drop=DROP)
        self.x = torch.stack([self.set[i]["x"] for i in range(len(self.set))])
        self.things = torch.tensor([thing for thing, _ in emoji.pairs(split)], dtype=torch.int64, device="cpu")

    def __len__(self) -> int:
        return len(self.x)

    def pixels(self, index: Tensor) -> Tensor:
        return self.x[index].float() / 127.5 - 1

    def captions(self, index: Tensor, round: int) -> list[str]:
        """Another one of the same picture in each ``round``."""
        return [self.set.caption(i + round * len(self)) for i in index.tolist()]


# --- CLIP ---

BATCH, RATE, WARMUP = 128, 1e-3, 50


def train_clip(out: Path, steps: int) -> None:
    """Train the two towers, by counters alone: a resumed run is the one that was not interrupted."""
    pictures = Pictures()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        clip = CLIP(emoji.Emoji.vocabulary())
    named = dict(clip.named_parameters())
    optimizer = torch.optim.AdamW(named.values(), RATE, (0.9, 0.98), weight_decay=0.05, fused=True)
    done = _resume_clip(out, named, optimizer)
    with progress_bar(steps * BATCH, "training", "img", True, initial=done * BATCH) as bar, signals() as received:
        while done < steps and not received.take():
            loss = _clip_step(clip, pictures, optimizer, done, steps)
            done += 1
            bar.update(BATCH)
            if done % 100 == 0:
                bar.report(step=done, loss=f"{loss:.3f}")
            if done % 500 == 0:
                _save_clip(out, clip, optimizer, done)
    _save_clip(out, clip, optimizer, done)
    for split in ("test", "train"):
        top_1, top_5 = retrieval(clip.eval(), Pictures(split))
        print(f"{split}: a drawing's label among {len(emoji.THINGS):,}: top-1 {top_1:.3f}, top-5 {top_5:.3f}")


def _clip_step(clip: CLIP, pictures: Pictures, optimizer: torch.optim.Optimizer, step: int, steps: int) -> float:
    examples = torch.arange(step * BATCH, (step + 1) * BATCH, dtype=torch.int64, device="cpu")
    epochs, places = examples // len(pictures), examples % len(pictures)
    orders = {epoch: epoch_order(len(pictures), epoch, 0) for epoch in epochs.unique().tolist()}
    index = torch.stack([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places, strict=True)])
    captions = pictures.captions(index, int(epochs[0]))
    for group in optimizer.param_groups:
        group["lr"] = rate(step, steps)
    x = moved(pictures.pixels(index), torch.Generator().manual_seed(step))
    loss = clip.loss(x, clip.vocabulary.rows(captions, clip.config["length"]), pictures.things[index])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def rate(step: int, steps: int) -> float:
    """The learning rate of a step: a short warm-up, then half a cosine."""
    return RATE * min(1, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))


SHIFT, SCALE, TURN = 0.2, 0.15, 0.2  # of half a side; of the size; in radians: at most
ERASED = 0.5  # the chance that a rectangle of a picture is white


def moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures shifted, scaled and turned a little, on white, of half of which a rectangle is missing.

    Few drawings are seen often: without this, CLIP knows them by heart and others badly.
    """
    n, _, height, width = x.shape
    drawn = torch.rand(n, 9, generator=generator, dtype=torch.float32, device="cpu")
    shift, (scale, turn) = SHIFT * (2 * drawn[:, :2] - 1), (2 * drawn[:, 2:4] - 1).T
    size, angle = 1 + SCALE * scale, TURN * turn
    cos, sin = size * angle.cos(), size * angle.sin()
    matrix = torch.stack((cos, -sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(n, 2, 3)
    x = 1 - F.grid_sample(1 - x, F.affine_grid(matrix, x.shape, align_corners=False), align_corners=False)
    low, extent = drawn[:, 4:6], 0.1 + 0.3 * drawn[:, 6:8]
    inside = [
        (place >= low[:, i, None]) & (place < low[:, i, None] + extent[:, i, None])
        for i, place in enumerate((_places(height), _places(width)))
    ]
    hole = inside[0][:, :, None] & inside[1][:, None, :] & (drawn[:, 8] < ERASED)[:, None, None]
    return x.masked_fill(hole[:, None], 1.0)


def _places(size: int) -> Tensor:
    """Where pixels are along a side, in [0, 1)."""
    return torch.arange(size, dtype=torch.float32, device="cpu") / size


def _save_clip(out: Path, clip: CLIP, optimizer: torch.optim.Optimizer, done: int) -> None:
    named = dict(clip.named_parameters())
    moments = {
        f"{kind}.{name}": optimizer.state[parameter][kind]
        for kind in ("exp_avg", "exp_avg_sq")
        for name, parameter in named.items()
        if done
    }
    weights = {f"clip.{name}": tensor for name, tensor in state(clip).items()}
    write(out / CLIP_FILE, {"clip": files.describe(clip), "steps": done}, {**weights, **moments})


def _resume_clip(out: Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """The steps that were taken; weights and moments are set to what they were then."""
    if not (out / CLIP_FILE).exists():
        return 0
    description, tensors = read(out / CLIP_FILE)
    done = description["steps"]
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"clip.{name}"])
            if done:
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(done), dtype=torch.float32, device="cpu"),
                    **{kind: tensors[f"{kind}.{name}"].clone() for kind in ("exp_avg", "exp_avg_sq")},
                }
    return done


def trained_clip(out: Path) -> CLIP:
    """CLIP of a run's folder, in eval mode."""
    description, tensors = read(out / CLIP_FILE)
    return files.filled(description["clip"], tensors, out / CLIP_FILE, torch.device("cpu"))


@torch.no_grad()
def retrieval(clip: CLIP, pictures: Pictures) -> tuple[float, float]:
    """How often a drawing's label is the nearest of all things' labels, and one of the five nearest."""
    texts = _by_parts(clip.text, clip.vocabulary.rows([thing.label for thing in emoji.THINGS], clip.config["length"]))
    scores = embeddings(clip, pictures) @ texts.T
    rank = (scores > scores.gather(1, pictures.things[:, None])).sum(1)
    return (rank < 1).float().mean().item(), (rank < 5).float().mean().item()


@torch.no_grad()
def embeddings(clip: CLIP, pictures: Pictures) -> Tensor:
    index = torch.arange(len(pictures), dtype=torch.int64, device="cpu")
    return torch.cat([clip.image(pictures.pixels(part)) for part in index.split(256)])


def _by_parts(network: Any, rows: Tensor) -> Tensor:
    return torch.cat([network(part) for part in rows.split(256)])


# --- what the prior and the decoder learn from ---


class Embedded(torch.utils.data.Dataset):
    """Pictures with the embeddings, times sqrt(D), of each and of its captions; item i is picture i modulo P."""

    def __init__(self, clip: CLIP, pictures: Pictures):
        self.pictures, scale = pictures, math.sqrt(clip.config["features"])
        self.image = embeddings(clip, pictures) * scale
        index = torch.arange(len(pictures), dtype=torch.int64, device="cpu")
        texts = [text for round in range(CAPTIONS) for text in pictures.captions(index, round)]
        with torch.no_grad():
            self.text = _by_parts(clip.text, clip.vocabulary.rows(texts, clip.config["length"])) * scale

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


PARTS = {  # name: dataset, model, settings
    "prior": (ForPrior, prior_model, dict(batch_size=256, lr=5e-4, objective="x0", warmup=100, checkpoint_every=1000)),
    "decoder": (ForDecoder, decoder_model, dict(batch_size=64, lr=6e-4, warmup=200, checkpoint_every=250)),
}
STEPS = {"clip": 5000, "prior": 6000, "decoder": 14_000}


def train_part(part: str, out: Path, steps: int, init: str | None = None) -> None:
    """Train the prior or the decoder, or go on; ``init``: with the weights of that part of a packed model."""
    dataset, make, settings = PARTS[part]
    clip = trained_clip(out)
    data = dataset(clip, Pictures())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        folder, model = out / part, make(clip.config["features"])
    if (folder / CHECKPOINT).exists():
        trainer = Trainer.resume(folder / CHECKPOINT, data, steps=steps)
    else:
        if init is not None:
            model.network.load_state_dict(getattr(load(init), part).network.state_dict())
        trainer = Trainer(model, data, _config(steps=steps, **settings))
    stopped = trainer.run(folder)
    if stopped is not None:
        print(f"stopped by {signal.Signals(stopped).name} after {trainer.steps} steps", flush=True)


def pack(out: Path) -> UnCLIP:
    """Write ``emoji.safetensors`` of the parts that a run's folder has."""
    system = UnCLIP(trained_clip(out), load(out / "prior"), load(out / "decoder"), name="emoji")
    save_model(system, out / "emoji.safetensors", dtype=torch.float16)
    size = os.path.getsize(out / "emoji.safetensors")
    print(f"{out / 'emoji.safetensors'}: {size / 1e6:.1f} MB")
    return system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("clip", "prior", "decoder", "pack"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help=f"(default: {STEPS})")
    parser.add_argument("--init", help="a packed model, whose weights of the part the run begins with")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    steps = arguments.steps or STEPS.get(arguments.part, 0)
    if arguments.part == "clip":
        train_clip(arguments.out, steps)
    elif arguments.part == "pack":
        pack(arguments.out)
    else:
        train_part(arguments.part, arguments.out, steps, arguments.init)


if __name__ == "__main__":
    main()
