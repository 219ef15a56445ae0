"""``diffkern classifier``: train a classifier of noisy images, whose gradient guides, and tell its accuracy."""

import argparse
import inspect
import os
from typing import Any

from .. import evaluate
from ..classifier import CLASSIFIERS, NoisyClassifier, check_time_steps, load_noisy_classifier, save_noisy_classifier
from ..data import FASHION_MNIST, Dataset, fashion_mnist
from ..model import load_one
from ..progress import tell
from ..training.classifier import train_noisy_classifier
from .options import DEFAULT_MODEL, add_long_options, count
from .outputs import check_file

EXAMPLES = """\
  diffkern classifier --classifier fashion-mnist-noisy     # its accuracy
  diffkern classifier --classifier mine.safetensors        # trains it first
  diffkern sample --model fashion-mnist --labels Sneaker --guide mine.safetensors --guidance 4"""

RECIPE = {
    "examples": (count, "images to train on"),
    "batch_size": (count, "of a training step"),
    "lr": (float, "largest learning rate of AdamW"),
    "seed": (int, "of all that training draws"),
}
"""The options of training by name, each with its type and its help."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument(
        "--classifier", required=True, help="a shipped one's name, or a file; trained into the file where there is none"
    )
    parser.add_argument(
        "--data", default=FASHION_MNIST, metavar="DIR", help=f"of the IDX files (default: {FASHION_MNIST})"
    )
    parser.add_argument("--model", help=f"whose schedule makes the noise to train on (default: {DEFAULT_MODEL})")
    defaults = inspect.signature(train_noisy_classifier).parameters
    for name, (kind, text) in RECIPE.items():
        shown = f"{text} (default: {defaults[name].default})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=shown)
    parser.add_argument("--n", type=count, default=1000, help="test images to measure with (default: 1000)")


def run(arguments: argparse.Namespace) -> int:
    given = {name: getattr(arguments, name) for name in ("model", *RECIPE) if getattr(arguments, name) is not None}
    path = arguments.classifier
    if os.path.lexists(path) or (CLASSIFIERS / f"{path}.safetensors").exists():
        for name, value in given.items():
            raise ValueError(f"{name}: expected none for {path}, which is trained already, got {value}")
        classifier = load_noisy_classifier(path, arguments.device)
        test = fashion_mnist(arguments.data, split="test")
    else:
        classifier, test = _trained(arguments, **given)
    T = classifier.schedule.T
    times = sorted({tenth * T // 10 for tenth in range(10)} | {T - 1})
    shares = evaluate.noisy_accuracy(classifier, test, times, n=arguments.n)
    print(f"Accuracy on {min(arguments.n, len(test))} test images at the time step t\n")
    print("| t | " + " | ".join(map(str, times)) + " |")
    print("| --- " + "| ---: " * len(times) + "|")
    print("| accuracy | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return 0


def _trained(
    arguments: argparse.Namespace, model: str = DEFAULT_MODEL, **options: Any
) -> tuple[NoisyClassifier, Dataset]:
    """A new classifier, as its file has it, and the test images."""
    path = arguments.classifier
    check_file("classifier", path, ".safetensors")
    schedule = load_one(model).schedule
    check_time_steps(schedule)
    train, test = (fashion_mnist(arguments.data, split=split) for split in ("train", "test"))
    evaluate.check_labelled("test", test, train.shape, train.classes)
    tell(f"training {train.summary}")
    options |= dict(device=arguments.device, progress=arguments.progress)
    save_noisy_classifier(train_noisy_classifier(train, schedule, **options), path)
    return load_noisy_classifier(path, arguments.device), test
