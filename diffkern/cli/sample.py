"""The command line: diffkern sample, train, evaluate, export, doctor."""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import __version__, evaluate, images, ops, training
from ..data import FASHION_MNIST, fashion_mnist
from ..io.files import check_writable, is_checkpoint
from ..model import Model, find, load, save
from ..progress import tell
from ..samplers import SAMPLERS, VARIANCES, default_sampler
from ..sampling import DEFAULT_STEPS, Step, sample
from . import train as train_command

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
GIF_FRAMES = 50
MOST_THREADS = 1024  # OpenMP ends the process where the system gives it no more


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error (one line on stderr), 130 for Ctrl-C, 141 for a reader
    that left."""
    with _streams():
        try:
            arguments = _parser().parse_args(argv)
            if arguments.threads is not None:
                torch.set_num_threads(arguments.threads)
            status = arguments.run(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            tell("diffkern: interrupted")
            return 130
        except BrokenPipeError:
            return 141
        except (ImportError, MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            message, *_ = str(error).strip().splitlines() or [type(error).__name__]
            tell(f"diffkern: error: {message}")
            return 2


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Within, there are stdout and stderr: closed ones lead nowhere, and text that they cannot encode is escaped.

    Nothing that they hold at the end is an error at the exit: their reader may be gone, or their disk full.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w")))
                stack.callback(setattr, sys, name, None)
            elif isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


# --- sample ------------------------------------------------------------------------------------------------------


def _sample(arguments: argparse.Namespace) -> int:
    for name, suffix in (("out", ".png"), ("gif", ".gif"), ("npz", ".npz")):
        if getattr(arguments, name) is not None:
            _check_file(name, getattr(arguments, name), suffix)
    model = load(arguments.model, arguments.device)
    ranges = _ranges(arguments.seeds) if arguments.seeds else [range(arguments.n or 16)]
    n = sum(max(0, seeds.stop - seeds.start) for seeds in ranges)
    if arguments.n is not None and n != arguments.n:
        raise ValueError(f"n: expected {n}, one for each of --seeds, got {arguments.n}")
    columns = arguments.columns or (len(model.classes) if model.classes and not arguments.labels else None)
    sampler = arguments.sampler or default_sampler(arguments.steps, model.schedule.T)
    shown = _shown_steps(model, arguments, sampler) if arguments.gif else range(0)
    _check_size(n, model, arguments, columns, len(shown))
    seeds = torch.cat([ops.as_seeds(numbers, "cpu") for numbers in ranges])
    labels = _labels(arguments.labels, model, len(seeds))
    settings = {
        "guidance": arguments.guidance,
        "sampler": sampler,
        "steps": arguments.steps,
        "spacing": arguments.spacing,
        "variance": arguments.variance,
        "eta": arguments.eta,
        "clip": arguments.clip,
        "batch_size": arguments.batch_size,
    }
    names = None if labels is None else images.captions(model.classes, labels)
    film = Film(len(seeds), shown, names, columns, arguments.scale) if arguments.gif else None
    x = sample(
        model,
        seeds=seeds,
        labels=labels,
        dtype=None if arguments.dtype == "float32" else DTYPES[arguments.dtype],
        progress=arguments.progress,
        callback=film and film.record,
        **settings,
    )
    settings = {
        "model": str(arguments.model),
        "seeds": [seed for numbers in ranges for seed in numbers],
        "labels": labels,
        "classes": model.classes,
        **settings,
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
    print(*written, sep="\n")
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
        pixels = (step.x_t.clamp(-1, 1) + 1) * 127.5
        self.taken[step.index][step.images] = pixels.round().byte().cpu()

    def frames(self, x: torch.Tensor) -> list:
        """The last of them is the result ``x``."""
        return [*(self.grid(self.taken[index].float() / 127.5 - 1) for index in self.shown), self.grid(x)]


def _shown_steps(model: Model, arguments: argparse.Namespace, sampler: str) -> range:
    """Choose the steps that become frames, by index: every k-th, so that there are at most ``GIF_FRAMES``."""
    T = model.schedule.T
    steps = arguments.steps or min(DEFAULT_STEPS[sampler] or T, T)
    steps = len(model.schedule.timesteps(steps, arguments.spacing))
    return range(0, steps, -(-steps // GIF_FRAMES))


def _ranges(tokens: list[str]) -> list[range]:
    """Integers, and half-open ranges a:b."""
    ranges = []
    for token in tokens:
        try:
            first, colon, last = token.partition(":")
            ranges.append(range(int(first), int(last) if colon else int(first) + 1))
        except ValueError:
            raise ValueError(f"seeds: expected integers or ranges a:b, got {token!r}") from None
    if not any(ranges):
        raise ValueError(f"seeds: expected at least one, got none in {' '.join(tokens)}")
    return ranges


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


def _labels(tokens: list[str] | None, model: Model, n: int) -> list[int] | None:
    """A label an image: the classes in turn, or those given (numbers, names, or "none"); one serves all images."""
    classes = model.classes
    if classes is None:
        if tokens:
            raise ValueError("labels: expected none, this model has no classes")
        return None
    if not tokens:
        return [i % len(classes) for i in range(n)]
    labels = [model.label(token) for token in tokens]
    if len(labels) not in (1, n):
        raise ValueError(f"labels: expected 1 or {n}, one for each image, got {len(labels)}")
    return labels * n if len(labels) == 1 else labels


def _check_file(name: str, path: str, suffix: str = "") -> None:
    """Whether a file can be written there is found out before minutes of work, not after."""
    if not path.lower().endswith(suffix):
        raise ValueError(f"{name}: expected a file name that ends in {suffix}, got {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file in an existing folder, got {path!r}")
    check_writable(path)


# --- export -----------------------------------------------------------------------------------------------


def _export(arguments: argparse.Namespace) -> int:
    source = find(arguments.checkpoint)
    _check_file("out", arguments.out, ".safetensors")
    if os.path.exists(arguments.out):
        if os.path.samefile(source, arguments.out):
            raise ValueError(f"out: expected another file than the one to export, got {arguments.out!r}")
        if is_checkpoint(arguments.out):
            raise ValueError(f"out: expected no training checkpoint to be overwritten, got {arguments.out!r}")
    model = dataclasses.replace(load(source), name=arguments.name or Path(arguments.out).stem)
    save(model, arguments.out, dtype=DTYPES[arguments.dtype])
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    print(f"{arguments.out}: {parameters} parameters, {os.path.getsize(arguments.out) / 1e6:.1f} MB")
    return 0


# --- evaluate ----------------------------------------------------------------------------------------------------


def _evaluate(arguments: argparse.Namespace) -> int:
    runs = [_run(token) for token in arguments.steps]
    model = load(arguments.model, arguments.device)
    net = None
    if os.path.lexists(arguments.classifier):
        net, accuracy = evaluate.load_classifier(arguments.classifier)
    else:
        _check_file("classifier", arguments.classifier)
    train, test = (fashion_mnist(arguments.data, split=split) for split in ("train", "test"))
    options = dict(n=arguments.n, runs=runs, guidance=arguments.guidance)
    evaluate.check(model, train, test, net, **options)
    tell(f"training {train.summary}")
    tell(f"test {test.summary}")
    losses = evaluate.eps_loss(model, test, n=arguments.loss_n)
    if net is None:
        net = evaluate.train_classifier(train, progress=arguments.progress)
        evaluate.save_classifier(net, arguments.classifier, evaluate.accuracy(net, test.images, test.labels))
        net, accuracy = evaluate.load_classifier(arguments.classifier)

    T, width = model.schedule.T, len(losses)
    n = min(arguments.loss_n, len(test))
    print(f"Held-out eps-loss of {n} test images at each part of t; mean {sum(losses) / width:.5f}\n")
    print("| t | " + " | ".join(f"{b * T // width}..{(b + 1) * T // width - 1}" for b in range(width)) + " |")
    print("| --- " * (width + 1) + "|")
    print("| loss | " + " | ".join(f"{loss:.5f}" for loss in losses) + " |\n")

    print(f"Frechet distance to the training images, in the features of a classifier of {accuracy:.2%} test accuracy\n")
    print("| sampler | steps | images | distance | as many test images | label agreement | s an image |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for row in evaluate.evaluate(
        model,
        train,
        test,
        net,
        **options,
        batch_size=arguments.batch_size,
        dtype=None if arguments.dtype == "float32" else DTYPES[arguments.dtype],
        progress=arguments.progress,
    ):
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        print(
            f"| {row.sampler} | {row.steps} | {row.n} | {row.distance:.3f} | {row.floor:.3f} | {agreement} "
            f"| {row.seconds:.3f} |",
            flush=True,
        )
    return 0


def _run(token: str) -> tuple[str, int]:
    sampler, _, steps = token.partition(":")
    if sampler not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"steps: expected SAMPLER:STEPS with one of {', '.join(SAMPLERS)}, got {token!r}")
    return sampler, int(steps)


def _doctor(arguments: argparse.Namespace) -> int:
    from ..doctor import main

    return main()


# --- the parser --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Lets :func:`main` say what is wrong, in one line; ``--help`` has the rest."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


EXAMPLES = {
    "sample": """\
  diffkern sample --model fashion-mnist --n 40 --steps 50
  diffkern sample --model run --labels cat --guidance 2 --seeds 100:116 --out cats.png""",
    "train": """\
  diffkern train --data photos --size 64 --out run --network '{"channels": 64}'
  diffkern train --data photos --out run --steps 200000     # resume it, and go on for longer
  diffkern train --data digits --out run --init fashion-mnist --lr 1e-4
  torchrun --nproc-per-node 8 -m diffkern train --device cuda --data photos --out run""",
    "export": """\
  diffkern export run --out photos.safetensors""",
    "evaluate": """\
  diffkern evaluate --model run --steps ddim:50 dpmpp_2m:20""",
}


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


_count.__name__ = "count"  # argparse's "invalid count value"


def _threads(text: str) -> int:
    if _count(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got {text}")
    return int(text)


_threads.__name__ = "count"


def _parser() -> Parser:
    parser = Parser("diffkern", description="Denoising diffusion: sample, train and evaluate.")
    parser.add_argument("--version", action="version", version=f"diffkern {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(run=lambda _: parser.error(f"expected a command: {', '.join(commands.choices)}"), threads=None)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=_threads, help="CPU threads (default: torch's choice)")
    long = argparse.ArgumentParser(add_help=False, parents=[common])
    long.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cpu)")
    long.add_argument("--no-progress", dest="progress", action="store_false", help="neither a progress bar nor lines")

    def command(name: str, run, text: str, parent=common) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"examples:\n{EXAMPLES[name]}" if name in EXAMPLES else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[parent],
            allow_abbrev=False,
        )
        sub.set_defaults(run=run)
        return sub

    p = command("sample", _sample, "Draw images from a model into a labelled grid.", long)
    p.add_argument("--model", required=True, help="a shipped model's name, a model file, a run's checkpoint or folder")
    p.add_argument("--n", type=_count, help="how many images, of the seeds 0..n-1 (default: 16)")
    p.add_argument("--seeds", nargs="+", metavar="SEED", help="the seed of each image; a:b is a range without b")
    p.add_argument(
        "--labels", "--label", nargs="+", metavar="LABEL", help="classes by name or number, none for the null class"
    )
    p.add_argument("--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance (default: 1)")
    p.add_argument("--steps", type=_count, help="(default: all for ddpm, 50 for ddim, 20 for dpmpp_2m)")
    p.add_argument("--sampler", choices=SAMPLERS, help="(default: ddim for fewer steps than all, else ddpm)")
    p.add_argument("--spacing", choices=("trailing", "leading", "linspace", "quadratic"), default="trailing")
    p.add_argument(
        "--variance", choices=VARIANCES, help="of ddpm (default: learned if it was learned, else fixed_small)"
    )
    p.add_argument("--eta", type=float, default=0.0, help="ddim's noise, 0 none to 1 as much as ddpm's (default: 0)")
    p.add_argument("--no-clip", dest="clip", action="store_false", help="do not clamp the predicted x_0 to [-1, 1]")
    p.add_argument("--batch-size", type=_count, help="rows of each pass through the network (default: 16 at most)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network's arithmetic (default: float32)")
    p.add_argument("--out", default="samples.png", metavar="PNG", help="the grid (default: samples.png)")
    p.add_argument("--gif", metavar="GIF", help="the denoising, animated")
    p.add_argument("--npz", metavar="NPZ", help="images [N, H, W, C] uint8, seeds and labels as arrays")
    p.add_argument("--columns", type=_count, help="of the grid")
    p.add_argument("--scale", type=_count, help="screen pixels a pixel")

    p = command("train", train_command.train, "Train a model, or resume the run in --out.", long)
    p.add_argument(
        "--data",
        required=True,
        help="fashion-mnist, a folder of IDX files, or a folder of images: a class is a sub-folder, "
        "transparent pixels become white, 16 bits of grey are scaled to 8, hidden files are left out",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="checkpoint.safetensors, log.csv and samples-*.png")
    p.add_argument("--preset", choices=training.PRESETS, help="a recipe; what follows changes it")
    p.add_argument("--init", metavar="MODEL", help="begin with the weights and the network of this model: fine-tune it")
    p.add_argument(
        "--size", type=_count, help="of an image folder's images, in pixels (default: that of --init, or 32)"
    )
    p.add_argument("--network", metavar="JSON", help='arguments of the U-Net, as {"channels": 64}')
    p.add_argument("--schedule", choices=("linear", "cosine", "sigmoid", "scaled_linear"), help="(default: linear)")
    p.add_argument("--timesteps", type=_count, metavar="T", help="steps of the schedule (default: 1000)")
    for f in training.config_fields():
        _add_config_option(p, f)

    p = command("export", _export, "Write a checkpoint's averaged weights as a model file to ship.")
    p.add_argument("checkpoint", help="a run's folder, its checkpoint.safetensors, or another model")
    p.add_argument("--out", required=True, metavar="FILE", help="the .safetensors to write")
    p.add_argument("--dtype", choices=DTYPES, default="float16", help="of the weights (default: float16)")
    p.add_argument("--name", help="the model's name (default: the file's)")

    p = command("evaluate", _evaluate, "Frechet distances and held-out loss of a model of Fashion-MNIST.", long)
    p.add_argument("--model", required=True, help="a shipped model's name, a model file, a run's checkpoint or folder")
    p.add_argument("--data", default=FASHION_MNIST, metavar="DIR", help=f"of the IDX files (default: {FASHION_MNIST})")
    p.add_argument("--n", type=_count, default=10_000, help="images a sampler (default: 10000)")
    p.add_argument(
        "--steps",
        nargs="+",
        default=[f"{sampler}:{steps}" for sampler, steps in evaluate.RUNS],
        metavar="SAMPLER:STEPS",
        help="(default: ddpm:1000 ddim:50 ddim:20 ddim:10)",
    )
    p.add_argument("--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance (default: 1)")
    p.add_argument("--loss-n", type=_count, default=1000, help="test images for the held-out loss (default: 1000)")
    p.add_argument("--batch-size", type=_count, default=100, help="(default: 100)")
    p.add_argument("--dtype", choices=DTYPES, default="float32", help="of the network's arithmetic (default: float32)")
    p.add_argument(
        "--classifier",
        default=os.fspath(evaluate.CLASSIFIER),
        metavar="FILE",
        help="of the features; trained into FILE where there is none (default: the shipped one)",
    )

    command("doctor", _doctor, "What is this installation, and does it work?")
    return parser


def _add_config_option(parser: argparse.ArgumentParser, f: dataclasses.Field) -> None:
    """--batch-size from ``batch_size``, and so on; absent from the namespace unless given."""
    name, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {_shown(f.default)})"
    kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if f.type is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, **kwargs)
    elif isinstance(f.type, types.GenericAlias):  # tuple[float, float]
        item, *rest = typing.get_args(f.type)
        parser.add_argument(name, type=item, nargs=1 + len(rest), metavar="X", **kwargs)
    else:
        choices = f.metadata.get("choices")
        metavar = None if choices else f.type.__name__.upper()
        parser.add_argument(name, type=f.type, choices=choices, metavar=metavar, **kwargs)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
