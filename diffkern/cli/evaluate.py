"""``diffkern evaluate``: a model of Fashion-MNIST in tables: its distances and held-out loss, the quality of samplers
over network calls, or its likelihood."""

import argparse
import os
from collections.abc import Iterable, Sequence

from torch import Tensor

from .. import evaluate
from ..data import FASHION_MNIST, Dataset, fashion_mnist
from ..likelihood import Nll, nll
from ..model import Model, load
from ..progress import tell
from ..samplers import SAMPLERS
from ..schedule import Schedule
from .options import DTYPES, add_guidance, add_long_options, add_model, count, dtype_of, guidance
from .outputs import check_file
from .plot import Curves, check_plot, draw

EXAMPLES = """\
  diffkern evaluate --model run --steps ddim:50 dpmpp_2m:20
  diffkern evaluate --model run --guide fashion-mnist-noisy --guidance 4 --n 1000
  diffkern evaluate --model run --curves --calls 5 10 20 50 --n 1000 --plot curves.png
  diffkern evaluate --model run --nll 1000 --plot bound.png"""


OPTIONS = {
    "n": (("", "curves"), 10_000),
    "steps": (("",), [f"{sampler}:{steps}" for sampler, steps in evaluate.RUNS]),
    "loss_n": (("",), 1000),
    "guidance": (("", "curves"), 1.0),
    "guide": (("", "curves"), None),
    "classifier": (("", "curves"), os.fspath(evaluate.CLASSIFIER)),
    "calls": (("curves",), [5, 10, 20, 50]),
    "nll_steps": (("nll",), None),
    "plot": (("curves", "nll"), None),
}
"""Which options go with what: with --curves, with --nll, or with neither (""); and their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    add_model(parser)
    parser.add_argument(
        "--data", default=FASHION_MNIST, metavar="DIR", help=f"of the IDX files (default: {FASHION_MNIST})"
    )
    parser.add_argument("--n", type=count, help="images a sampler (default: 10000)")
    parser.add_argument(
        "--steps",
        nargs="+",
        metavar="SAMPLER:STEPS",
        help=f"(default: {' '.join(OPTIONS['steps'][1])})",
    )
    add_guidance(parser)
    parser.add_argument("--loss-n", type=count, help="test images for the held-out loss (default: 1000)")
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
    parser.add_argument(
        "--curves",
        nargs="*",
        metavar="SAMPLER",
        help=f"instead, compare samplers over network calls (default: {' '.join(evaluate.CURVES)})",
    )
    parser.add_argument(
        "--calls", type=count, nargs="+", metavar="CALLS", help="of --curves, for an image (default: 5 10 20 50)"
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw --curves, or the bound over t; needs matplotlib")
    parser.add_argument("--batch-size", type=count, default=100, help="(default: 100)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the network's arithmetic (default: float32)"
    )
    parser.add_argument(
        "--classifier",
        metavar="FILE",
        help="of the features; trained into FILE where there is none (default: the shipped one)",
    )


def run(arguments: argparse.Namespace) -> int:
    _check_options(arguments)
    if arguments.nll is not None:
        return _likelihood(arguments)
    model = load(arguments.model, arguments.device)
    if arguments.curves is None:
        runs = [_sampler_and_steps(token) for token in arguments.steps]
    else:
        runs = _runs_within(model, arguments)
    net = None
    if os.path.lexists(arguments.classifier):
        net, accuracy = evaluate.load_classifier(arguments.classifier)
    else:
        check_file("classifier", arguments.classifier)
    train, test = (fashion_mnist(arguments.data, split=split) for split in ("train", "test"))
    options = dict(n=arguments.n, runs=runs, guidance=guidance(arguments))
    evaluate.check(model, train, test, net, **options)
    tell(f"training {train.summary}")
    tell(f"test {test.summary}")
    by_time = arguments.curves is None and model.prediction == "eps" and model.schedule.discrete
    losses = evaluate.eps_loss(model, test, n=arguments.loss_n) if by_time else []
    if net is None:
        net = evaluate.train_classifier(train, progress=arguments.progress)
        evaluate.save_classifier(net, arguments.classifier, evaluate.accuracy(net, test.images, test.labels))
        net, accuracy = evaluate.load_classifier(arguments.classifier)
    options |= dict(batch_size=arguments.batch_size, dtype=dtype_of(arguments.dtype), progress=arguments.progress)
    if arguments.curves is not None:
        return _curves(arguments, runs, model, evaluate.evaluate(model, train, test, net, **options), accuracy)

    if losses:
        _print_losses(losses, model.schedule.T, min(arguments.loss_n, len(test)))
    print(f"Frechet distance to the training images, in the features of a classifier of {accuracy:.2%} test accuracy\n")
    print("| sampler | steps | images | distance | as many test images | label agreement | s an image |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for row in evaluate.evaluate(model, train, test, net, **options):
        agreement = "" if row.agreement is None else f"{row.agreement:.1%}"
        print(
            f"| {row.sampler} | {row.steps} | {row.n} | {row.distance:.3f} | {row.floor:.3f} | {agreement} "
            f"| {row.seconds:.3f} |",
            flush=True,
        )
    return 0


def _print_losses(losses: Sequence[float], T: int, n: int) -> None:
    width = len(losses)
    print(f"Held-out eps-loss of {n} test images at each part of t; mean {sum(losses) / width:.5f}\n")
    print("| t | " + " | ".join(f"{b * T // width}..{(b + 1) * T // width - 1}" for b in range(width)) + " |")
    print("| --- " * (width + 1) + "|")
    print("| loss | " + " | ".join(f"{loss:.5f}" for loss in losses) + " |\n")


def _check_options(arguments: argparse.Namespace) -> None:
    """Check what goes with what, and that there is a place for the picture; fill in what is not given."""
    if arguments.curves is not None and arguments.nll is not None:
        raise ValueError(f"nll: expected none with --curves, got {arguments.nll}")
    mode = "curves" if arguments.curves is not None else "nll" if arguments.nll is not None else ""
    for name, (modes, default) in OPTIONS.items():
        value = getattr(arguments, name)
        if value in (None, default):
            setattr(arguments, name, default)
        elif mode not in modes:
            where = f"with --{mode}" if mode else f"without {' or '.join(f'--{other}' for other in modes)}"
            got = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{name.replace('_', '-')}: expected none {where}, got {got}")
    arguments.plot = check_plot(arguments.plot)


def _runs_within(model: Model, arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """(sampler, steps) of each sampler and number of calls in turn."""
    arguments.curves = arguments.curves or list(evaluate.CURVES)
    for name in arguments.curves:
        if name not in SAMPLERS:
            raise ValueError(f"curves: expected samplers among {', '.join(SAMPLERS)}, got {name!r}")
    if not isinstance(model.schedule, Schedule):
        raise ValueError(f"model: expected one of a Schedule, got {model.schedule}")
    return [(name, evaluate.steps_within(model, name, calls)) for name in arguments.curves for calls in arguments.calls]


def _curves(
    arguments: argparse.Namespace,
    runs: Sequence[tuple[str, int]],
    model: Model,
    rows: Iterable[evaluate.Row],
    accuracy: float,
) -> int:
    n, calls = min(arguments.n, 8), arguments.calls
    options = dict(guidance=guidance(arguments), dtype=dtype_of(arguments.dtype), progress=arguments.progress)
    rms = evaluate.distances_to_limit(model, runs, n=n, batch_size=n, **options)
    limit = f"Distance of {n} images to the ODE's limit, rms of a pixel unclipped; none where a sampler draws noise"
    found = {limit: _by_sampler(arguments, rms)}
    _print_curves(limit, found[limit], calls, 4)
    measured = list(rows)
    title = (
        f"Frechet distance of {arguments.n} images to the training images, in the features of a classifier of "
        f"{accuracy:.2%} test accuracy; of as many test images {measured[0].floor:.3f}"
    )
    found[title] = _by_sampler(arguments, [row.distance for row in measured])
    _print_curves(title, found[title], calls, 3)
    if arguments.plot is not None:
        panels = dict(zip(("rms distance to the limit", "Frechet distance"), found.values(), strict=True))
        draw(arguments.plot, panels, "network calls", xscale="log", yscale="log")
    return 0


def _by_sampler(arguments: argparse.Namespace, values: Sequence[float | None]) -> Curves:
    """By sampler: (calls, value) of each number of calls."""
    width = len(arguments.calls)
    return {
        name: list(zip(arguments.calls, values[i * width : (i + 1) * width], strict=True))
        for i, name in enumerate(arguments.curves)
    }


def _print_curves(title: str, curves: Curves, calls: Sequence[int], digits: int) -> None:
    print(f"{title}\n")
    print("| sampler | " + " | ".join(f"{number} calls" for number in calls) + " |")
    print("| --- " + "| ---: " * len(calls) + "|")
    for name, points in curves.items():
        print(f"| {name} | " + " | ".join("" if y is None else f"{y:.{digits}f}" for _, y in points) + " |")
    print(flush=True)


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
    over_t: dict[str, list[tuple[float, float]]] = {}
    for name, data in sets.items():
        found = _nll(arguments, model, data)
        n, terms = len(found.bits), found.terms
        values = [terms["prior"], *(terms["t"][low:high].sum().item() for low, high in parts), terms["data"]]
        error = found.bits.std(correction=int(n > 1)).item() / n**0.5
        values += [found.bits.mean().item(), error]
        over_t[f"{name} images"] = _over_t(terms["t"], arguments.nll_steps)
        print(f"| {name} | {n} | " + " | ".join(f"{value:.4f}" for value in values) + " |", flush=True)
    if arguments.plot is not None:
        draw(arguments.plot, {"L_t of the bound, bits a dimension": over_t}, "t", yscale="log")
    return 0


def _over_t(terms: Tensor, steps: int | None) -> list[tuple[float, float]]:
    """(t, L_t), the mean over each of up to 100 parts of the time steps 1..T-1, and of no more than were drawn from."""
    parts = min(100, len(terms) - 1, steps or len(terms))
    edges = [1 + j * (len(terms) - 1) // parts for j in range(parts + 1)]
    pairs = zip(edges[:-1], edges[1:], strict=True)
    return [((low + high - 1) / 2, terms[low:high].mean().item()) for low, high in pairs]


def _nll(arguments: argparse.Namespace, model: Model, data: Dataset) -> Nll:
    """Of the first images."""
    first = slice(min(arguments.nll, len(data)))
    return nll(
        model,
        data.x_0(first),
        labels=data.labels[first] if model.classes is not None and data.labels is not None else None,
        steps=arguments.nll_steps,
        batch_size=min(arguments.batch_size, first.stop),
        dtype=dtype_of(arguments.dtype),
        progress=arguments.progress,
    )


def _sampler_and_steps(token: str) -> tuple[str, int]:
    sampler, _, steps = token.partition(":")
    if sampler not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
        raise ValueError(f"steps: expected SAMPLER:STEPS with one of {', '.join(SAMPLERS)}, got {token!r}")
    return sampler, int(steps)
