"""The training of CLIP, and what it is worth: how often a drawing finds its name."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..data import epoch_order
from ..datasets import emoji
from ..io.files import read, state, write
from ..progress import bar as progress_bar
from ..training.runs import signals
from . import files
from .clip import CLIP
from .pictures import Pictures, moved

CLIP_FILE = "clip.safetensors"
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
                save_clip(out, clip, done, optimizer)
    save_clip(out, clip, done, optimizer)
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


def save_clip(out: Path, clip: CLIP, steps: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write CLIP after so many steps into a run's folder, with the optimizer's moments, from which its run goes on."""
    moments = {
        f"{kind}.{name}": optimizer.state[parameter][kind]
        for kind in ("exp_avg", "exp_avg_sq")
        for name, parameter in clip.named_parameters()
        if optimizer is not None and optimizer.state
    }
    weights = {f"clip.{name}": tensor for name, tensor in state(clip).items()}
    write(out / CLIP_FILE, {"clip": files.describe_clip(clip), "steps": steps}, {**weights, **moments})


def _resume_clip(out: Path, named: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """The steps that were taken; weights and moments are set to what they were then."""
    if not (out / CLIP_FILE).exists():
        return 0
    description, tensors = read(out / CLIP_FILE)
    done = description["steps"]
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[f"clip.{name}"])
            if f"exp_avg.{name}" in tensors:
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
    texts = by_parts(clip.text, clip.vocabulary.rows([thing.label for thing in emoji.THINGS], clip.config["length"]))
    scores = embeddings(clip, pictures) @ texts.T
    rank = (scores > scores.gather(1, pictures.things[:, None])).sum(1)
    return (rank < 1).float().mean().item(), (rank < 5).float().mean().item()


@torch.no_grad()
def embeddings(clip: CLIP, pictures: Pictures) -> Tensor:
    index = torch.arange(len(pictures), dtype=torch.int64, device="cpu")
    return torch.cat([clip.image(pictures.pixels(part)) for part in index.split(256)])


def by_parts(network: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """``network(rows)``, 256 rows at a time."""
    return torch.cat([network(part) for part in rows.split(256)])
