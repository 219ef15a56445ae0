"""Options that several commands have."""

import argparse
from typing import Any

DTYPES = ("float32", "float16", "bfloat16")
MOST_THREADS = 1024  # OpenMP ends the process where the system gives it no more


def add_long_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that take long: where they run, and whether they show progress."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="neither a progress bar nor lines")


def add_guidance(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`guidance`."""
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance (default: 1)"
    )
    parser.add_argument(
        "--guide",
        metavar="CLASSIFIER",
        help="a shipped classifier of noisy images, or a file: its gradient guides, at the scale --guidance",
    )


def guidance(arguments: argparse.Namespace) -> Any:
    """What the options ask for, as ``diffkern.sample`` takes it."""
    from ..guidance import Guidance  # which needs torch

    weight, guide = arguments.guidance, arguments.guide
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
