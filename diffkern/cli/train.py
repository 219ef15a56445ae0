"""``diffkern train``: which options make which run, what is checked before it, and what is said of it."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import types
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import parallel, training
from ..data import Dataset, Items, idx_folder, load_dataset, picture_set, shortened
from ..model import Model, load_one
from ..progress import tell
from ..schedule import KINDS, from_config
from ..training import board
from ..training.runs import check_folder, ignore_signals, locked
from ..training.start import classes_of_init, network_of
from .options import add_long_options, count

EXAMPLES = """\
  diffkern train --data photos --size 64 --out run --network '{"channels": 64}'
  diffkern train --data photos --out run --steps 200000     # resume it, and go on for longer
  diffkern train --data digits --out run --init fashion-mnist --lr 1e-4
  diffkern train --data photos --validation more --out run --process edm --prediction v
  torchrun --nproc-per-node 8 -m diffkern train --device cuda --data photos --out run"""
PROCESSES = [
    kind
    for kind, make in KINDS.items()
    if not any(p.default is p.empty for p in inspect.signature(make).parameters.values())
]
"""The kinds of process that can be named alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_long_options(parser)
    parser.add_argument(
        "--data",
        required=True,
        help="fashion-mnist, faces, emoji, or with an attribute for classes faces:hair .. (diffkern data lists them), "
        "a folder of IDX files, or a folder of images: a class is a sub-folder, "
        "transparent pixels become white, 16 bits of grey are scaled to 8, hidden files are left out",
    )
    parser.add_argument(
        "--validation",
        metavar="DATA",
        help="held-out images, as --data; of fashion-mnist, IDX files and sets the test images",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="checkpoint.safetensors, log.csv, loss.png, samples-*.png"
    )
    parser.add_argument("--preset", choices=training.PRESETS, help="a recipe; what follows changes it")
    parser.add_argument(
        "--init", metavar="MODEL", help="begin with the weights and the network of this model: fine-tune it"
    )
    parser.add_argument(
        "--size", type=count, help="of an image folder's images, in pixels (default: that of --init, or 32)"
    )
    parser.add_argument("--network", metavar="JSON", help='arguments of the U-Net, as {"channels": 64}')
    parser.add_argument(
        "--process",
        "--schedule",
        action=_Once,
        metavar="KIND",
        help=f"{', '.join(PROCESSES)}; or with its arguments, as "
        '{"kind": "edm", "sigma_data": 0.25} (default: linear)',
    )
    parser.add_argument("--timesteps", type=count, metavar="T", help="steps of a schedule of betas (default: 1000)")
    for f in training.config_fields():
        _add_config_option(parser, f)


class _Once(argparse.Action):
    """An option of two names, which is given by one of them."""

    def __call__(self, parser, namespace, value, name=None):
        before = getattr(namespace, self.dest)
        if before is not None:
            raise argparse.ArgumentError(self, f"expected one value, got {before} and {value}")
        setattr(namespace, self.dest, value)


def _add_config_option(parser: argparse.ArgumentParser, f: dataclasses.Field) -> None:
    """--batch-size from ``batch_size``, and so on; absent from the namespace unless given."""
    shown = f.metadata.get("shown", _shown(f.default))
    name, text = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {shown})"
    kwargs: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if f.type is bool:
        parser.add_argument(name, action=argparse.BooleanOptionalAction, **kwargs)
    elif isinstance(f.type, types.GenericAlias):  # tuple[float, float]
        item, *rest = typing.get_args(f.type)
        parser.add_argument(name, type=item, nargs=1 + len(rest), metavar="X", **kwargs)
    else:
        choices = f.metadata.get("choices")
        kind = f.type if isinstance(f.type, type) else typing.get_args(f.type)[0]  # of str | None: None is not given
        metavar = None if choices else kind.__name__.upper()
        parser.add_argument(name, type=kind, choices=choices, metavar=metavar, **kwargs)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status: 0, or 128 + a signal's number."""
    with parallel.joined(arguments.device) as device, _warnings_as_lines(), contextlib.ExitStack() as held:
        return _train_on(device, arguments, held)


def _train_on(device: str | None, arguments: argparse.Namespace, held: contextlib.ExitStack) -> int:
    """Check everything against everything else, the quick things first; only then train, and write."""
    out, first = Path(arguments.out), parallel.rank() == 0
    checkpoint = out / training.CHECKPOINT
    begun = init = lock = None
    with parallel.together():
        check_folder(out)
        if first and out.is_dir():
            lock = held.enter_context(locked(out))
        if checkpoint.exists():
            begun = training.read_checkpoint(checkpoint)[0]
        elif arguments.init is not None:
            init = load_one(arguments.init)
        options = _options(arguments, begun, init)
        config = training.Config(**options)
        if config.tensorboard:
            board.check()
        shape = begun["shape"] if begun else init.shape if init else None
        dataset = _dataset(arguments, checkpoint if begun else None, shape, config)
        validation = None if arguments.validation is None else _held_out(arguments, dataset)
    parallel.check_same("data", f"{len(dataset)} images {dataset.fingerprint}")
    parallel.check_same("out", f"a checkpoint of step {begun['training']['steps']}" if begun else "no checkpoint")
    if begun:
        trainer = training.Trainer.resume(checkpoint, dataset, device=device, validation=validation, **options)
        if first:
            tell(f"resuming {checkpoint} at step {trainer.steps}{_changes(begun, trainer.config, arguments.init)}")
    else:
        model = training.new_model(dataset, config, name=arguments.preset or out.resolve().name, init=init)
        trainer = training.Trainer(model, dataset, config, device=device, validation=validation)
    with parallel.together():
        if first and not lock:
            out.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(locked(out))
            if checkpoint.exists():
                raise RuntimeError(f"out: expected a new folder, got {str(out)!r}, where a run has begun: resume that")
    if first:
        tell(trainer.dataset.summary)
        if init:
            _tell_of_init(model, init, arguments)
        if validation:
            tell(f"validation {validation.summary}")
        if trainer.config.warmup > trainer.config.steps:
            warmup, steps = trainer.config.warmup, trainer.config.steps
            tell(f"warmup: {warmup} steps, more than the {steps} of the run: the learning rate does not reach --lr")
    stopped = trainer.run(out, progress=arguments.progress, lock=False)
    if stopped is None:
        if first:
            print(checkpoint)
        return 0
    ignore_signals()
    if first:
        tell(f"diffkern: {stopped.name} at step {trainer.steps}: saved {checkpoint}; run again to resume")
    return 128 + stopped


def _tell_of_init(model: Model, init: Model, arguments: argparse.Namespace) -> None:
    """Say what fine-tuning changes of the images, and which classes begin anew."""
    if model.shape[0] == 1 and idx_folder(arguments.data) is None:
        tell(f"init: {arguments.init} draws gray images: colours of the data become gray")
    if model.num_classes:
        kept = classes_of_init(model, init)
        anew = [name for label, name in enumerate(model.classes or ()) if label not in kept]
        if anew:
            tell(f"init: {len(anew)} of {model.num_classes} classes begin anew: {shortened(anew)}")


def _options(arguments: argparse.Namespace, begun: dict[str, Any] | None, init: Model | None) -> dict[str, Any]:
    """Merge the preset and the options into fields of a Config. Options win over the preset, and that over ``init``.

    A run that has ``begun`` keeps what it has in all that they do not say.
    """
    options = training.recipe(arguments.preset) if arguments.preset else {}
    if init:
        network = network_of(init) | options.get("network", {})
        options = {"schedule": init.schedule.config(), **options, "network": network}
    given = {f.name: getattr(arguments, f.name) for f in training.config_fields() if hasattr(arguments, f.name)}
    if arguments.network is not None:
        given["network"] = options.get("network", {}) | _json_object("network", arguments.network)
    if arguments.process is not None or arguments.timesteps is not None:
        base = begun["training"]["config"] if begun and "schedule" not in options else options
        given["schedule"] = _process(arguments, base.get("schedule", training.Config().schedule))
    return options | given


def _process(arguments: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any]:
    """--process with --timesteps; the latter alone changes that much of ``base``."""
    name = arguments.process
    if name is None:
        config = base
    elif name.startswith("{"):
        config = _json_object("process", name)
    elif name in PROCESSES:
        config = {"kind": name}
    else:
        raise ValueError(f"process: expected one of {', '.join(PROCESSES)}, or a JSON object, got {name!r}")
    process = from_config(config)
    if arguments.timesteps is None:
        return process.config()
    if "T" not in process.config():
        kind = process.config()["kind"]
        raise ValueError(f"timesteps: expected a schedule of betas that has a T, as linear, got one of kind {kind!r}")
    return from_config({**config, "T": arguments.timesteps}).config()


def _dataset(
    arguments: argparse.Namespace, checkpoint: Path | None, shape: Sequence[int] | None, config: training.Config
) -> Dataset | Items:
    """The images: of ``shape``, the checkpoint's or that of --init, in all that the options do not say."""
    channels, size = (3, 32) if shape is None else (shape[0], shape[-1])
    if checkpoint and arguments.size not in (None, size):
        raise ValueError(f"size: expected that of {checkpoint}, {size}, got {arguments.size}")
    channels, size = config.network.get("in_channels", channels), arguments.size or size
    progress = arguments.progress and parallel.rank() == 0
    options = dict(size=size, channels=channels)
    dataset = picture_set(arguments.data, **options) or load_dataset(arguments.data, progress=progress, **options)
    if arguments.size is not None and dataset.shape[1:] != (size, size):
        raise ValueError(f"size: expected that of the images, {dataset.shape[1]} x {dataset.shape[2]}, got {size}")
    return dataset


def _held_out(arguments: argparse.Namespace, dataset: Dataset | Items) -> Dataset:
    """The images of --validation, of the size of ``dataset``'s."""
    channels, _, size = dataset.shape
    progress = arguments.progress and parallel.rank() == 0
    return load_dataset(arguments.validation, split="test", size=size, channels=channels, progress=progress)


def _changes(begun: dict[str, Any], config: training.Config, init: str | None) -> str:
    """List the settings that a resumed run changes from here on."""
    before, after = begun["training"]["config"], json.loads(json.dumps(dataclasses.asdict(config)))
    changes = [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]
    if init is not None:
        changes.append("with its own weights, not those of --init")
    return "".join(f", {change}" for change in changes)


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Python's warnings as one line each, of the first process."""

    def show(message, *where, **options):
        if parallel.rank() == 0:
            tell(f"diffkern: warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: expected a JSON object, got {text!r} ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a JSON object, got {text!r}")
    return value
