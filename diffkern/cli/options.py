"""Options that several commands have, and what they stand for."""

import argparse
import ast
import contextlib
import json
import secrets
from typing import Any

DEFAULT_MODEL = "fashion-mnist"
DTYPES = ("float32", "float16", "bfloat16")
MOST_THREADS = 1024  # OpenMP ends the process where the system gives it no more


def add_model(parser: argparse.ArgumentParser, more: str = "", *, required: bool = False) -> None:
    """Add ``--model``, which has a default unless it is ``required``."""
    default = "" if required else f" (default: {DEFAULT_MODEL})"
    parser.add_argument(
        "--model",
        required=required,
        default=None if required else DEFAULT_MODEL,
        help=f"a shipped model's name, a model file, a run's checkpoint or folder{more}{default}",
    )


def add_seeds(parser: argparse.ArgumentParser, n: int) -> None:
    parser.add_argument("--n", type=count, help=f"how many images, of the seeds 0..n-1 (default: {n})")
    parser.add_argument(
        *("--seeds", "--seed"),
        nargs="+",
        metavar="SEED",
        help="the seed of each image; a:b is a range without b; random draws fresh ones and prints them",
    )


def add_grid(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", default=out, metavar="PNG", help=f"the grid (default: {out})")
    parser.add_argument("--columns", type=count, help="of the grid")
    parser.add_argument("--scale", type=count, help="screen pixels a pixel")


def add_network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=count, help="rows of each pass through the network (default: 16 at most)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the network's arithmetic (default: float32)"
    )


def add_long_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that take long: where they run, and whether they show progress."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="neither a progress bar nor lines")


def add_guidance(parser: argparse.ArgumentParser, default: float | None = 1.0) -> None:
    """Add the options that :func:`guidance` reads. ``default`` None: the model's own."""
    shown = "the model's own" if default is None else f"{default:g}"
    parser.add_argument(
        "--guidance", type=float, default=default, metavar="W", help=f"classifier-free guidance (default: {shown})"
    )
    parser.add_argument(
        "--guide",
        metavar="CLASSIFIER",
        help="a shipped classifier of noisy images, or a file: its gradient guides, at the scale --guidance",
    )


def guidance(weight: float, guide: str | None) -> Any:
    """Return the guidance of the options, as ``diffkern.sample`` takes it."""
    from ..guidance import Guidance  # which needs torch

    return weight if guide is None else Guidance(weight, classifier=guide)


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def threads(text: str) -> int:
    if count(text) > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {MOST_THREADS}, got {text}")
    return int(text)


threads.__name__ = "count"  # argparse's "invalid count value"


def seed_ranges(tokens: list[str] | None, n: int | None, default: int) -> list[range]:
    """The seeds that ``--seeds`` and ``--n`` ask for: integers, half-open ranges a:b, or fresh ones."""
    if not tokens:
        return [range(n or default)]
    if tokens == ["random"]:
        return [range(seed, seed + 1) for seed in (secrets.randbits(63) for _ in range(n or default))]
    ranges = []
    for token in tokens:
        try:
            first, colon, last = token.partition(":")
            ranges.append(range(int(first), int(last) if colon else int(first) + 1))
        except ValueError:
            raise ValueError(f"seeds: expected integers, ranges a:b or random, got {token!r}") from None
    found = sum(max(0, seeds.stop - seeds.start) for seeds in ranges)
    if not found:
        raise ValueError(f"seeds: expected at least one, got none in {' '.join(tokens)}")
    if n is not None and n != found:
        raise ValueError(f"n: expected {found}, one for each of --seeds, got {n}")
    return ranges


def fresh_seeds(tokens: list[str] | None, ranges: list[range]) -> list[str]:
    """The line that tells fresh seeds, in the words that draw their images again."""
    return [" ".join(["--seeds", *(str(seeds.start) for seeds in ranges)])] if tokens == ["random"] else []


def labels_of(tokens: list[str] | None, model: Any, n: int) -> list[int] | None:
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


def named(tokens: list[str]) -> dict[str, Any]:
    """The values of ``--option NAME=VALUE``, as JSON (true, null) or Python (True, None) writes them, else text."""
    options = {}
    for token in tokens:
        name, equals, value = token.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"option: expected NAME=VALUE, got {token!r}")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(SyntaxError, TypeError, ValueError):
            return read(text)
    return text


def dtype_of(name: str) -> Any:
    """The ``dtype`` of a run: None is float32, the network's own."""
    import torch

    return None if name == "float32" else getattr(torch, name)
