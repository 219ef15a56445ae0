"""``diffkern evaluate``: a model of Fashion-MNIST in tables: its distances and held-out loss, or its likelihood."""

import argparse
import os

import torch

from .. import evaluate
from ..data import FASHION_MNIST, Dataset, fashion_mnist
from ..likelihood import Nll, nll
from ..model import Model, load
from ..progress import tell
from ..samplers import SAMPLERS
from .options import DTYPES, add_long_options, count
from .outputs import check_file

EXAMPLES = """\
  diffkern evaluate --model run --steps ddim:50 dpmpp_2m:20
  diffkern evaluate --model run --nll 1000"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument(
        "--model", required=True, help="a shipped model's name, a model file, a run's checkpoint or folder"
    )
    parser.add_argument(
        "--data", default=FASHION_MNIST, metavar="DIR", help=f"of the IDX files (default: {FASHION_MNIST})"
    )
    parser.add_argument("--n", type=count, default=10_000, help="images a sampler (default: 10000)")
    parser.add_argument(
        "--steps",
        nargs="+",
        default=[f"{sampler}:{steps}" for sampler, steps in evaluate.RUNS],
        metavar="SAMPLER:STEPS",
        help="(default: ddpm:1000 ddim:50 ddim:20 ddim:10)",
    )
    parser.add_argument(
        "--guidance", type=float, default=1.0, metavar="W", help="classifier-free guidance (default: 1)"
    )
    parser.add_argument("--loss-n", type=count, default=1000, help="test images for the held-out loss (default: 1000)")
    parser.add_argument(
        "--nll",
        type=count,
        nargs="?",
        const=100,
        metavar="N",
        help="instead, the bound in bits a dimension of N test and N training images (default: 100)",
    )
    parser.add_argument(
        "--nll-steps",
        type=count,
        metavar="STEPS",
        help="terms of the bound to compute for each image, an estimate without bias (default: all)",
    )
    parser.add_argument("--batch-size", type=count, default=100, help="(default: 100)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the network's arithmetic (default: float32)"
    )
    parser.add_argument(
        "--classifier",
        default=os.fspath(evaluate.CLASSIFIER),
        metavar="FILE",
        help="of the features; trained into FILE where there is none (default: the shipped one)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.nll is not None:
        return _likelihood(arguments)
    if arguments.nll_steps is not None:
        raise ValueError(f"nll-steps: expected none without --nll, got {arguments.nll_steps}")
    runs = [_sampler_and_steps(token) for token in arguments.steps]
    model = load(arguments.model, arguments.device)
    net = None
    if os.path.lexists(arguments.classifier):
        net, accuracy = evaluate.load_classifier(arguments.classifier)
    else:
        check_file("classifier", arguments.classifier)
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
        dtype=_dtype(arguments),
        progress=arguments.progress,
    ):
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        print(
            f"| {row.sampler} | {row.steps} | {row.n} | {row.distance:.3f} | {row.floor:.3f} | {agreement} "
            f"| {row.seconds:.3f} |",
            flush=True,
        )
    return 0


def _likelihood(arguments: argparse.Namespace) -> int:
    model = load(arguments.model, arguments.device)
    if not model.schedule.discrete:
        raise ValueError(f"nll: expected a model of time steps, which has the bound, got one of {model.schedule}")
    sets = {
        name: fashion_mnist(arguments.data, split=split) for name, split in (("test", "test"), ("training", "train"))
    }
    for name, data in sets.items():
        if data.shape != model.shape:
            raise ValueError(f"data: expected images of shape {model.shape}, got {data.shape}")
        tell(f"{name} {data.summary}")
    T, width = model.schedule.T, min(10, model.schedule.T)
    parts = [(b * T // width, (b + 1) * T // width) for b in range(width)]
    print("The variational bound in bits a dimension: of x_T, of the steps of each part of t, of the levels from x_1\n")
    columns = ["images", "n", "prior", *(f"{low}..{high - 1}" for low, high in parts), "L_0", "sum", "+-"]
    print("| " + " | ".join(columns) + " |")
    print("| --- " + "| ---: " * (len(columns) - 1) + "|", flush=True)
    for name, data in sets.items():
        found = _nll(arguments, model, data)
        n, terms = len(found.bits), found.terms
        values = [terms["prior"], *(terms["t"][low:high].sum().item() for low, high in parts), terms["data"]]
        error = found.bits.std(correction=int(n > 1)).item() / n**0.5
        values += [found.bits.mean().item(), error]
        print(f"| {name} | {n} | " + " | ".join(f"{value:.4f}" for value in values) + " |", flush=True)
    return 0


def _nll(arguments: argparse.Namespace, model: Model, data: Dataset) -> Nll:
    """Of the first images."""
    first = slice(min(arguments.nll, len(data)))
    return nll(
        model,
        data.x_0(first),
        labels=data.labels[first] if model.classes is not None and data.labels is not None else None,
        steps=arguments.nll_steps,
        batch_size=min(arguments.batch_size, first.stop),
        dtype=_dtype(arguments),
        progress=arguments.progress,
    )


def _dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    return None if arguments.dtype == "float32" else getattr(torch, arguments.dtype)


def _sampler_and_steps(token: str) -> tuple[str, int]:
    sampler, _, steps = token.partition(":")
    if sampler not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"steps: expected SAMPLER:STEPS with one of {', '.join(SAMPLERS)}, got {token!r}")
    return sampler, int(steps)
