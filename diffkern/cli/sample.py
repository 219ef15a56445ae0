"""``diffkern sample``: images from a model as a grid, an animation and arrays."""

import argparse
import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from .. import __version__, images, ops, parallel
from ..constraints import Quantile
from ..model import Model, load
from ..progress import tell
from ..samplers import SAMPLERS, VARIANCES, default_sampler
from ..sampling import Step, sample
from ..schedule import SPACINGS
from ..shards import SHARD, sample_to
from ..system import System
from .options import (
    add_grid,
    add_guidance,
    add_long_options,
    add_model,
    add_network,
    add_seeds,
    count,
    dtype_of,
    fresh_seeds,
    guidance,
    labels_of,
    named,
    seed_ranges,
)
from .outputs import check_file

N = 16
GIF_FRAMES = 50
EXAMPLES = """\
  diffkern sample --steps 20
  diffkern sample --n 40 --steps 50 --seeds random
  diffkern sample --labels Sneaker --guide fashion-mnist-noisy --guidance 4 --steps 50
  diffkern sample --model emoji.safetensors --prompt "red apple in fluent 3d style" --n 8
  torchrun --nproc-per-node 8 -m diffkern sample --device cuda --seeds 0:50000 --folder samples
  diffkern sample --model run --labels cat --guidance 2 --seeds 100:116 --out cats.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    add_model(parser)
    add_seeds(parser, N)
    parser.add_argument(
        "--labels", "--label", nargs="+", metavar="LABEL", help="classes by name or number, none for the null class"
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what to draw, for a model that reads text (docs/systems/unclip.md)"
    )
    add_guidance(parser, None)
    parser.add_argument("--steps", type=count, help="(default: all for ddpm, 50 for ddim, 20 for most others)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="(default: ddpm for all steps, unipc for fewer)")
    parser.add_argument("--spacing", choices=SPACINGS, help="of the steps (default: the model's, else trailing)")
    parser.add_argument(
        "--noise",
        choices=("step", "path"),
        default="step",
        help="path: similar images for any number of steps, with --sampler ddpm",
    )
    parser.add_argument(
        "--variance", choices=VARIANCES, help="of ddpm (default: learned if it was learned, else fixed_small)"
    )
    parser.add_argument(
        "--eta", type=float, help="ddim's noise, 0 none to 1 as much as ddpm's; by itself it asks for ddim"
    )
    parser.add_argument(
        *("--option", "-o"), action="append", default=[], metavar="NAME=VALUE", help="of the sampler, as order=3"
    )
    parser.add_argument(
        "--clip",
        action=argparse.BooleanOptionalAction,
        help="clamp the predicted x_0 to [-1, 1], or not at all (default: as the model does, else clamp)",
    )
    add_network(parser)
    add_grid(parser, "samples.png")
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="no grid, but a PNG an image there, for as many as a disk holds: by any number of processes, as of "
        "torchrun, and resumed by the same command",
    )
    parser.add_argument("--shard", type=count, default=SHARD, help=f"images a process takes at a time ({SHARD})")
    parser.add_argument("--gif", metavar="GIF", help="the denoising, animated")
    parser.add_argument("--npz", metavar="NPZ", help="images [N, H, W, C] uint8, seeds and labels as arrays")


def run(arguments: argparse.Namespace) -> int:
    for name, suffix in (("out", ".png"), ("gif", ".gif"), ("npz", ".npz")):
        if getattr(arguments, name) is not None:
            check_file(name, getattr(arguments, name), suffix)
    for name in ("gif", "npz"):
        if arguments.folder is not None and getattr(arguments, name) is not None:
            raise ValueError(f"{name}: expected none with --folder, got {getattr(arguments, name)!r}")
    source = load(arguments.model, parallel.own_card(arguments.device))
    system = isinstance(source, System)
    if arguments.prompt is not None and not system:
        raise ValueError(f"prompt: expected none, for {arguments.model} reads no text, got {arguments.prompt!r}")
    model, own_steps, own_guidance = (source.drawn, source.steps, source.guidance) if system else (source, None, 1.0)
    steps = arguments.steps or own_steps
    weight = own_guidance if arguments.guidance is None else arguments.guidance
    ranges = seed_ranges(arguments.seeds, arguments.n, N)
    n = sum(max(0, seeds.stop - seeds.start) for seeds in ranges)
    columns = arguments.columns or (len(model.classes) if model.classes and not arguments.labels else None)
    sampler = arguments.sampler or default_sampler(steps, _length(model), arguments.eta)
    spacing = arguments.spacing or model.spacing or model.schedule.spacing
    clip = next(clip for clip in (arguments.clip, model.clip, True) if clip is not None)
    shown = _shown_steps(model, steps, spacing, sampler) if arguments.gif else range(0)
    if arguments.folder is None:
        _check_size(n, model, arguments, columns, len(shown))
    labels = labels_of(arguments.labels, model, n)
    settings = {
        **({} if arguments.prompt is None else {"prompt": arguments.prompt}),
        "guidance": weight,
        "sampler": sampler,
        "steps": steps,
        "spacing": spacing,
        "variance": arguments.variance,
        "eta": arguments.eta or 0.0,
        "clip": clip,
        "batch_size": arguments.batch_size,
        **({} if arguments.noise == "step" else {"noise": arguments.noise}),
        **named(arguments.option),
    }
    if arguments.folder is not None:
        return _into_folder(source, ranges, labels, settings, weight, arguments)
    seeds = torch.cat([ops.as_seeds(numbers, "cpu") for numbers in ranges])
    names = None if labels is None else images.captions(model.classes, labels)
    film = Film(len(seeds), shown, names, columns, arguments.scale) if arguments.gif else None
    x = sample(
        source,
        seeds=seeds,
        labels=labels,
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
        callback=film and film.record,
        **settings | {"guidance": guidance(weight, arguments.guide)},
    )
    settings = {
        "model": str(arguments.model),
        "seeds": [seed for numbers in ranges for seed in numbers],
        "labels": labels,
        "classes": model.classes,
        **settings,
        **({} if arguments.guide is None else {"guide": arguments.guide}),
        **({"clip": {"quantile": clip.q}} if isinstance(settings["clip"], Quantile) else {}),
        "dtype": arguments.dtype,
        "device": str(model.device),
        "versions": {"diffkern": __version__, "torch": torch.__version__},
    }
    written = [arguments.out]
    images.save_png(images.grid(x, names, columns=columns, scale=arguments.scale), arguments.out, settings)
    if film:
        images.save_gif(film.frames(x), arguments.gif)
        written.append(arguments.gif)
    if arguments.npz:
        arrays = {"images": images.to_uint8(x), "seeds": seeds.numpy()}
        if labels is not None:
            arrays["labels"] = torch.tensor(labels, dtype=torch.int64, device="cpu").numpy()
        images.save_npz(arguments.npz, **arrays, settings=json.dumps(settings))
        written.append(arguments.npz)
    print(*fresh_seeds(arguments.seeds, ranges), *written, sep="\n")
    return 0


def _into_folder(
    source: Model | System,
    ranges: list[range],
    labels: list[int] | None,
    settings: dict[str, Any],
    weight: float,
    arguments: argparse.Namespace,
) -> int:
    """A PNG for each image. Says how many others are still making."""
    seeds = ranges[0] if len(ranges) == 1 else [seed for numbers in ranges for seed in numbers]
    told = {"source": str(arguments.model)}
    left = sample_to(
        arguments.folder,
        source,
        seeds,
        labels=labels,
        settings=told,
        shard=arguments.shard,
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
        **settings | {"guidance": guidance(weight, arguments.guide)},
    )
    if left:
        tell(f"folder: other processes are at work on {left:,} of the {len(seeds):,} images")
    print(*fresh_seeds(arguments.seeds, ranges), arguments.folder, sep="\n")
    return 0


class Film:
    """The denoising as frames: x_t of every image at the steps ``shown``, and no other is kept."""

    def __init__(self, n: int, shown: range, names: list[str] | None, columns: int | None, scale: int | None):
        self.n, self.shown = n, shown
        self.grid = lambda x: images.grid(x, names, columns=columns, scale=scale)
        self.taken: dict[int, torch.Tensor] = {}

    def record(self, step: Step) -> None:
        """The callback of :func:`diffkern.sample`."""
        if step.index not in self.shown:
            return
        if step.index not in self.taken:
            self.taken[step.index] = torch.empty(self.n, *step.x_t.shape[1:], dtype=torch.uint8, device="cpu")
        self.taken[step.index][step.images] = images.to_pixels(step.x_t).cpu()

    def frames(self, x: torch.Tensor) -> list:
        """The last of them is the result ``x``."""
        return [*(self.grid(images.from_pixels(self.taken[index])) for index in self.shown), self.grid(x)]


def _shown_steps(model: Model, steps: int | None, spacing: str, sampler: str) -> range:
    """Choose the steps that become frames, by index: every k-th, so that there are at most ``GIF_FRAMES``."""
    T = _length(model)
    steps = steps or min(SAMPLERS[sampler].steps or T or 1000, T or 1000)
    if T:
        steps = len(model.schedule.timesteps(steps, spacing))
    return range(0, steps, -(-steps // GIF_FRAMES))


def _length(model: Model) -> int | None:
    """How many time steps its schedule has; None of another process."""
    return model.schedule.T if model.schedule.discrete else None


def _check_size(n: int, model: Model, arguments: argparse.Namespace, columns: int | None, frames: int) -> None:
    """ValueError if the images and their ``frames`` are more than memory holds, or their grid more than a file can."""
    channels, height, width = model.shape
    if channels not in (1, 3):
        raise ValueError(f"model: expected one of images of 1 or 3 channels, got {model.shape}")
    value = 12 + frames  # bytes: a float, two copies on the way to pixels, and a byte in each frame
    most = _memory() // (value * channels * height * width)
    if n > most:
        raise ValueError(f"{'seeds' if arguments.seeds else 'n'}: expected at most {most}, which fill memory, got {n}")
    labelled = model.classes is not None
    layout = images.layout(n, height, width, labelled=labelled, columns=columns, scale=arguments.scale)
    pixel = 1 if channels == 1 else 4  # bytes, in Pillow
    if math.prod(layout.size) * pixel * (1 + frames) > _memory():
        grids = f"{1 + frames} of {layout.size} pixels"
        raise ValueError(f"n: expected grids that memory holds, got {n} images in {grids}")
    if arguments.gif:
        images.check_gif(layout.size)


def _memory() -> int:
    """Bytes that this process can use: of the machine, or of its container or its limit where they are less."""
    import resource  # absent on Windows

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # of the other kind of control group; or "max"
            limits.append(int(Path(path).read_text()))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits if limit == resource.RLIM_INFINITY else [*limits, limit])
