"""``diffkern classifier``: train a classifier of noisy images, whose gradient guides, and tell its accuracy."""

import argparse
import os

from .. import evaluate
from ..classifier import CLASSIFIERS, load_noisy_classifier, save_noisy_classifier
from ..data import FASHION_MNIST, fashion_mnist
from ..model import load
from ..progress import tell
from ..training.classifier import train_noisy_classifier
from .options import add_long_options, count
from .outputs import check_file

EXAMPLES = """\
  diffkern classifier --classifier fashion-mnist-noisy     # its accuracy
  diffkern classifier --classifier mine.safetensors        # trains it first
  diffkern sample --model fashion-mnist --labels Sneaker --guide mine.safetensors --guidance 4"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument(
        "--classifier", required=True, help="a shipped one's name, or a file; trained into the file where there is none"
    )
    parser.add_argument(
        "--data", default=FASHION_MNIST, metavar="DIR", help=f"of the IDX files (default: {FASHION_MNIST})"
    )
    parser.add_argument(
        "--model", default="fashion-mnist", help="whose schedule makes the noise to train on (default: fashion-mnist)"
    )
    parser.add_argument("--examples", type=count, default=200_000, help="images to train on (default: 200000)")
    parser.add_argument("--batch-size", type=count, default=64, help="of a training step (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="largest learning rate of AdamW (default: 0.002)")
    parser.add_argument("--seed", type=int, default=0, help="of all that training draws (default: 0)")
    parser.add_argument("--n", type=count, default=1000, help="test images to measure with (default: 1000)")


def run(arguments: argparse.Namespace) -> int:
    test = fashion_mnist(arguments.data, split="test")
    if not (os.path.lexists(arguments.classifier) or (CLASSIFIERS / f"{arguments.classifier}.safetensors").exists()):
        check_file("classifier", arguments.classifier, ".safetensors")
        train, schedule = fashion_mnist(arguments.data), load(arguments.model).schedule
        tell(f"training {train.summary}")
        names = ("examples", "batch_size", "lr", "seed", "device", "progress")
        options = {name: getattr(arguments, name) for name in names}
        save_noisy_classifier(train_noisy_classifier(train, schedule, **options), arguments.classifier)
    classifier = load_noisy_classifier(arguments.classifier, arguments.device)
    T = classifier.schedule.T
    times = sorted({tenth * T // 10 for tenth in range(10)} | {T - 1})
    shares = evaluate.noisy_accuracy(classifier, test, times, n=arguments.n)
    print(f"Accuracy on {min(arguments.n, len(test))} test images at the time step t\n")
    print("| t | " + " | ".join(map(str, times)) + " |")
    print("| --- " + "| ---: " * len(times) + "|")
    print("| accuracy | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return 0
