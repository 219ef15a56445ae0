"""``diffkern evaluate``: samples of a model, or a folder of images, against real images; the held-out loss; the quality
of samplers over network calls; the likelihood."""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from .. import evaluate
from ..data import FASHION_MNIST, FASHION_MNIST_CLASSES, Dataset, idx_folder, image_folder, load_dataset
from ..io.files import CHECKPOINT
from ..io.image_folder import find_images
from ..likelihood import Nll, nll
from ..model import Model, load_one, shipped
from ..progress import tell
from ..samplers import SAMPLERS
from ..schedule import Schedule
from .options import DTYPES, add_guidance, add_long_options, add_model, count, dtype_of, guidance
from .outputs import check_file
from .plot import Curves, check_plot, draw
from .tables import columns_of, print_curves, print_loss, print_protocol, print_rows

EXAMPLES = """\
  diffkern evaluate --model run --steps ddim:50 dpmpp_2m:20
  diffkern evaluate --model run --data photos --validation others --features inception:weights.pth --json run.json
  diffkern evaluate --model pictures --data photos --features features.pt
  diffkern evaluate --model run --guide fashion-mnist-noisy --guidance 4 --n 1000
  diffkern evaluate --model run --curves --calls 5 10 20 50 --n 1000 --plot curves.png
  diffkern evaluate --model run --nll 1000 --plot bound.png"""

SAMPLES, CALLS, LOSS = 10_000, [5, 10, 20, 50], 1000  # what is measured, unless told otherwise

MODES = {
    "n": ("model", "images", "curves"),
    "steps": ("model",),
    "measures": ("model", "images"),
    "features": ("model", "images", "curves"),
    "cache": ("model", "images", "curves"),
    "json": ("model", "images"),
    "loss_n": ("model",),
    "guidance": ("model", "curves"),
    "guide": ("model", "curves"),
    "dtype": ("model", "curves", "nll"),
    "size": ("images",),
    "channels": ("images",),
    "calls": ("curves",),
    "nll_steps": ("nll",),
    "plot": ("curves", "nll"),
}
"""Which options go with what: a model, a folder of images, --curves, or --nll. All others go with each."""

WITHOUT = {
    ("images",): "a folder of images",
    ("curves",): "--curves",
    ("nll",): "--nll",
    ("curves", "nll"): "--curves or --nll",
}
"""How the modes of an option that a model alone does not go with are asked for."""

NO_FEATURES = (
    "features: expected inception:WEIGHTS.pth, a file of TorchScript or a classifier for data other than Fashion-MNIST "
    "(diffkern evaluate --help), got none"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    add_model(parser, ", or a folder of images")
    parser.add_argument(
        "--data",
        default=FASHION_MNIST,
        help=f"real images: a folder, fashion-mnist, faces, emoji:style .. (diffkern data), or a folder of IDX "
        f"files (default: {FASHION_MNIST})",
    )
    parser.add_argument(
        *("--validation", "--test"),
        metavar="DATA",
        help="held-out images, for the floor and the loss (default: the test images of IDX files)",
    )
    parser.add_argument(
        "--features",
        metavar="NETWORK",
        help="compares images: inception:WEIGHTS.pth, a file of TorchScript, or CLASSIFIER.safetensors, trained on "
        "--data where there is none (default: the classifier that ships, for Fashion-MNIST alone)",
    )
    names = list(evaluate.MEASURES)
    parser.add_argument("--measures", nargs="+", choices=names, metavar="MEASURE", help=f"(default: {' '.join(names)})")
    parser.add_argument("--n", type=count, help=f"images a sampler (default: {SAMPLES}), or of the folder (all)")
    parser.add_argument(
        "--steps", nargs="+", metavar="SAMPLER:STEPS", help="(default: ddpm with all of a schedule's, ddim:50 20 10)"
    )
    add_guidance(parser)
    parser.add_argument("--loss-n", type=count, help=f"held-out images for the loss (default: {LOSS})")
    parser.add_argument("--size", type=count, help="of a folder's images (default: that of its first image)")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="of a folder's images (default: as its first)")
    parser.add_argument("--json", metavar="FILE.json", help="write the numbers and their protocol")
    parser.add_argument("--cache", metavar="FOLDER", help="keep features: the command goes on where it was interrupted")
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
        "--calls",
        type=count,
        nargs="+",
        metavar="CALLS",
        help=f"of --curves, for an image (default: {' '.join(map(str, CALLS))})",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw --curves, or the bound over t; needs matplotlib")
    parser.add_argument("--batch-size", type=count, default=100, help="(default: 100)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the network's arithmetic (default: float32)")


def run(arguments: argparse.Namespace) -> int:
    mode = _check_options(arguments)
    if mode == "nll":
        return _likelihood(arguments)
    model = None if mode == "images" else load_one(arguments.model, arguments.device)
    shape = _shape_of(arguments) if model is None else model.shape
    runs = []
    if model is not None:
        runs = _runs_within(model, arguments) if mode == "curves" else _runs(model, arguments.steps)
    network = _network(arguments)
    data, held_out = _real(arguments, shape)
    if data.shape != shape:
        raise ValueError(f"model: expected images of shape {data.shape}, got {shape}")
    if arguments.features is None and data.classes != FASHION_MNIST_CLASSES:
        raise ValueError(NO_FEATURES)
    if model is None:
        images = image_folder(arguments.model, size=shape[1], channels=shape[0], progress=arguments.progress)
        sources: list[evaluate.Pictures | evaluate.Drawn] = [evaluate.Pictures(images, arguments.n, "images")]
    else:
        options = dict(
            guidance=guidance(arguments.guidance, arguments.guide),
            batch_size=arguments.batch_size,
            dtype=_dtype(arguments),
        )
        n, options["like"] = arguments.n or SAMPLES, data
        sources = [evaluate.Drawn(model, n, sampler=name, steps=steps, **options) for name, steps in runs]
    if network is None:
        network = _trained(arguments, data, held_out)
    measures = ["distance"] if mode == "curves" else arguments.measures or list(evaluate.MEASURES)
    options = dict(held_out=held_out, measures=measures, cache=arguments.cache, progress=arguments.progress)
    rows = evaluate.evaluate(sources, data, network, **options)
    tell(f"training {data.summary}")
    if held_out is not None:
        tell(f"held-out {held_out.summary}")
    if mode == "curves":
        return _curves(arguments, runs, model, rows, network.name)
    loss = None
    if model is not None and held_out is not None:
        loss = _loss(arguments, model, held_out)
    protocol = {"samples": [source.description for source in sources], **evaluate.protocol(data, network, held_out)}
    found = {"protocol": protocol, "held_out_loss": None if loss is None else asdict(loss), "rows": []}
    print_protocol(protocol)
    print_rows(rows, columns_of(measures, network, held_out), found, arguments.json)
    return 0


# --- what is measured ---


def _check_options(arguments: argparse.Namespace) -> str:
    """Check what goes with what, and that there are places for the files; return the mode."""
    if arguments.curves is not None and arguments.nll is not None:
        raise ValueError(f"nll: expected none with --curves, got {arguments.nll}")
    mode = "model"
    if arguments.curves is not None:
        mode = "curves"
    elif arguments.nll is not None:
        mode = "nll"
    elif _is_folder(arguments.model):
        mode = "images"
    for name, modes in MODES.items():
        value = getattr(arguments, name)
        if value is not None and mode not in modes and (name, value) != ("guidance", 1.0):
            where = {"images": "with a folder of images", "model": f"without {WITHOUT.get(modes, 'it')}"}
            got = " ".join(map(str, value)) if isinstance(value, list) else value
            raise ValueError(f"{name.replace('_', '-')}: expected none {where.get(mode, f'with --{mode}')}, got {got}")
    arguments.plot = check_plot(arguments.plot)
    if arguments.json is not None:
        check_file("json", arguments.json, ".json")
    return mode


def _is_folder(model: str) -> bool:
    """Whether ``--model`` is a folder of images: neither a shipped model nor the folder of a run."""
    return model not in shipped() and Path(model).is_dir() and not Path(model, CHECKPOINT).exists()


def _shape_of(arguments: argparse.Namespace) -> tuple[int, int, int]:
    """(C, size, size) to which the folder of images is read: those of its first one, unless told otherwise."""
    first = next(iter(find_images(Path(arguments.model)).files.values()))[0]
    with Image.open(first) as image:
        size, grey = min(image.size), image.getbands()[0] in ("1", "I", "L")
    size, channels = arguments.size or size, arguments.channels or (1 if grey else 3)
    return channels, size, size


def _network(arguments: argparse.Namespace) -> evaluate.FeatureNetwork | None:
    """The feature network, before any image is read; None for a classifier that is yet to be trained."""
    source = arguments.features
    if source is None:
        if idx_folder(arguments.data) is None:
            raise ValueError(NO_FEATURES)
        return evaluate.feature_network(device=arguments.device)
    if source.endswith(".safetensors") and not os.path.lexists(source):
        check_file("features", source)
        return None
    return evaluate.feature_network(source, arguments.device)


def _trained(arguments: argparse.Namespace, data: Dataset, held_out: Dataset | None) -> evaluate.FeatureNetwork:
    """A classifier of the data, as its file has it; its accuracy is that on held-out images."""
    if held_out is None:
        raise ValueError("validation: expected held-out images to try a new classifier on, got none")
    evaluate.check_labelled("validation", held_out, data.shape, data.classes or ())
    net = evaluate.train_classifier(data, progress=arguments.progress)
    evaluate.save_classifier(net, arguments.features, evaluate.accuracy(net, held_out.images, held_out.labels))
    return evaluate.feature_network(arguments.features, arguments.device)


def _real(arguments: argparse.Namespace, shape: Sequence[int]) -> tuple[Dataset, Dataset | None]:
    """The training and the held-out images, to be compared with those of that shape."""
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ValueError(f"model: expected square images of 1 or 3 channels, got {tuple(shape)}")
    options = dict(size=shape[1], channels=shape[0], progress=arguments.progress)
    data = load_dataset(arguments.data, **options)
    if arguments.validation is not None:
        held_out = load_dataset(arguments.validation, split="test", **options)
    elif idx_folder(arguments.data) is not None:
        held_out = load_dataset(arguments.data, split="test", **options)
    else:
        return data, None
    if held_out.shape != data.shape:
        raise ValueError(f"validation: expected images of shape {data.shape}, got {held_out.shape}")
    return data, held_out


def _runs(model: Model, tokens: Sequence[str] | None) -> list[tuple[str, int]]:
    """(sampler, steps) of each SAMPLER:STEPS."""
    if tokens is None:
        T = model.schedule.T if model.schedule.discrete else None
        return [("ddpm", T)] * (T is not None) + [("ddim", steps) for steps in (50, 20, 10) if T is None or steps <= T]
    runs = []
    for token in tokens:
        sampler, _, steps = token.partition(":")
        if sampler not in SAMPLERS or not steps.isdecimal() or int(steps) < 1:
            raise ValueError(f"steps: expected SAMPLER:STEPS with one of {', '.join(SAMPLERS)}, got {token!r}")
        runs.append((sampler, int(steps)))
    return runs


def _runs_within(model: Model, arguments: argparse.Namespace) -> list[tuple[str, int]]:
    """(sampler, steps) of each sampler and number of calls in turn."""
    arguments.curves, arguments.calls = arguments.curves or list(evaluate.CURVES), arguments.calls or CALLS
    for name in arguments.curves:
        if name not in SAMPLERS:
            raise ValueError(f"curves: expected samplers among {', '.join(SAMPLERS)}, got {name!r}")
    if not isinstance(model.schedule, Schedule):
        raise ValueError(f"model: expected one of a Schedule, got {model.schedule}")
    return [(name, evaluate.steps_within(model, name, calls)) for name in arguments.curves for calls in arguments.calls]


def _dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    return dtype_of(arguments.dtype or "float32")


# --- the held-out loss ---


def _loss(arguments: argparse.Namespace, model: Model, held_out: Dataset) -> evaluate.HeldOutLoss:
    """Measure the loss and print it."""
    loss = evaluate.held_out_loss(
        model,
        held_out,
        n=arguments.loss_n or LOSS,
        buckets=min(10, model.schedule.T) if model.schedule.discrete else 10,
        batch_size=arguments.batch_size,
        dtype=_dtype(arguments),
        progress=arguments.progress,
    )
    print_loss(loss, steps=model.schedule.discrete)
    return loss


# --- samplers over network calls ---


def _curves(
    arguments: argparse.Namespace,
    runs: Sequence[tuple[str, int]],
    model: Model,
    rows: Iterator[evaluate.Row],
    network: str,
) -> int:
    samples, calls = arguments.n or SAMPLES, arguments.calls
    n = min(samples, 8)
    options = dict(
        guidance=guidance(arguments.guidance, arguments.guide), dtype=_dtype(arguments), progress=arguments.progress
    )
    rms = evaluate.distances_to_limit(model, runs, n=n, batch_size=n, **options)
    limit = f"Distance of {n} images to the ODE's limit, rms of a pixel unclipped; none where a sampler draws noise"
    found = {limit: _by_sampler(arguments, rms)}
    print_curves(limit, found[limit], calls, 4)
    measured = list(rows)
    floor = [row.values["distance"] for row in measured if row.name == evaluate.HELD_OUT]
    title = f"Frechet distance of {samples} images to the training images, in the features of {network}"
    title += "".join(f"; of as many held-out images {distance:.3f}" for distance in floor)
    found[title] = _by_sampler(arguments, [row.values["distance"] for row in measured[len(floor) :]])
    print_curves(title, found[title], calls, 3)
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


# --- the likelihood ---


def _likelihood(arguments: argparse.Namespace) -> int:
    model = load_one(arguments.model, arguments.device)
    if not model.schedule.discrete:
        raise ValueError(f"nll: expected a model of time steps, which has the bound, got one of {model.schedule}")
    data, held_out = _real(arguments, model.shape)
    sets = {"test": held_out, "training": data} if held_out is not None else {"training": data}
    for name, images in sets.items():
        if images.shape != model.shape:
            raise ValueError(f"data: expected images of shape {model.shape}, got {images.shape}")
        tell(f"{name} {images.summary}")
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
    """Measure the likelihood of ``--nll`` images, with classes as frequent as in all."""
    index = evaluate.in_proportion(data.labels, len(data))[: arguments.nll]
    labels = evaluate.labels_of(data, model)
    return nll(
        model,
        data.x_0(index),
        labels=None if labels is None else labels[index],
        steps=arguments.nll_steps,
        batch_size=min(arguments.batch_size, len(index)),
        dtype=_dtype(arguments),
        progress=arguments.progress,
    )
