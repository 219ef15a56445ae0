"""Many samples as a folder of PNGs, by any number of processes on any number of machines, resumed where they ended.

The images are cut into shards. A process takes the next shard that is neither there nor being made, draws it and writes
it. So the number of processes changes no image: an image is a function of its seed, the batch size and the kind of
device. Processes know each other by the folder alone.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import __version__, images
from .io.files import digest_of, write_atomically
from .model import Model, unwrapped
from .ops.seeds import as_seeds
from .process import checked_count
from .progress import bar as progress_bar
from .sampling import sample
from .system import System

MANIFEST, LOCK = "manifest.json", ".lock"
FORMAT = 1
SHARD = 256
UNLOCKED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system without locks


def sample_to(
    folder: str | os.PathLike,
    model: Model | System,
    seeds: Sequence[int],
    *,
    labels: Sequence[int] | None = None,
    settings: Mapping[str, Any] | None = None,
    shard: int = SHARD,
    progress: bool = True,
    **options: Any,
) -> int:
    """Draw the image of each seed into ``folder``, as 0000000.png, 0000001.png, .. in their order.

    seeds     a range or any ints, as ``sample`` takes them; labels: the class of each, or None
    settings  what ``manifest.json`` and each PNG tell beside the model and the options; a PNG has its own seed, label
              and class, too
    shard     how many images a process takes at a time: what an interruption loses, at most
    options   as :func:`diffkern.sample` takes them

    Any number of processes may do the same at the same time, on machines that share the folder, and any may be killed.
    A later call goes on. Every process draws what nobody has drawn or is drawing; it returns how many images are still
    being made by others when it has nothing left to do: 0 when all are there.

    Raises ValueError for a folder with other settings, seeds, labels or weights.
    """
    folder, shard = Path(folder), checked_count("shard", shard)
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(seeds, range) or seeds.step != 1:
        seeds = as_seeds(seeds, "cpu").tolist()
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device="cpu").tolist()
    for name, values in (("seeds", seeds), ("labels", seeds if labels is None else labels)):
        if not len(seeds) or len(values) != len(seeds):
            raise ValueError(f"{name}: expected one for each image, and an image, got {len(values)}")
    told = _told(model, seeds, labels, shard, {**(settings or {}), **{k: _plain(v) for k, v in options.items()}})
    work = _Work(folder, len(seeds), shard)
    with _Locks(folder) as locks, progress_bar(len(seeds), "sampling", "img", progress) as bar:
        with locks.waited():
            _agree(folder, told)
        for k, rows in enumerate(work.shards):
            if not work.done(rows) and locks.take(k):
                try:
                    if not work.done(rows):
                        drawn = [seeds[i] for i in rows]
                        given = {} if labels is None else {"labels": [labels[i] for i in rows]}
                        x = sample(model, seeds=drawn, progress=False, **given, **options)
                        shared = {name: told[name] for name in ("weights", "versions")} | told["settings"]
                        shared |= {"device": x.device.type}
                        own = [{"seed": seeds[i], **({} if labels is None else _label(model, labels[i]))} for i in rows]
                        work.write(rows, x, [shared | image for image in own])
                finally:
                    locks.release(k)
            bar.update(len(rows))
    return sum(len(rows) for rows in work.shards if not work.done(rows))


class _Work:
    """Which images a folder is to have, and which it has."""

    def __init__(self, folder: Path, n: int, shard: int):
        self.folder = folder
        self.shards = [range(first, min(first + shard, n)) for first in range(0, n, shard)]

    def path(self, i: int) -> Path:
        return self.folder / f"{i:07d}.png"

    def done(self, rows: range) -> bool:
        """Whether all of them are there; they are written in their order, each whole."""
        return self.path(rows[-1]).exists() and all(self.path(i).exists() for i in rows)

    def write(self, rows: range, x: torch.Tensor, settings: list[dict[str, Any]]) -> None:
        for i, image, told in zip(rows, x, settings, strict=True):
            images.save_png(images.picture(image), self.path(i), told)


class _Locks:
    """One lock a shard: a byte of the file ``.lock``. A lock ends with its process, however that ends."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK

    def __enter__(self) -> "_Locks":
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        return self

    def __exit__(self, *error: Any) -> None:
        os.close(self.file)

    def take(self, shard: int) -> bool:
        """Whether nobody else has it; a file system without locks always gives it."""
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard + 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in UNLOCKED:
                raise
        return True

    def release(self, shard: int) -> None:
        with _ignored(UNLOCKED):
            fcntl.lockf(self.file, fcntl.LOCK_UN, 1, shard + 1)

    @contextmanager
    def waited(self) -> Iterator[None]:
        """Within, this process alone reads and writes the manifest."""
        with _ignored(UNLOCKED):
            fcntl.lockf(self.file, fcntl.LOCK_EX, 1, 0)
        yield
        self.release(-1)


@contextmanager
def _ignored(numbers: tuple[int, ...]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in numbers:
            raise


# --- the manifest ---


def _told(
    model: Model | System, seeds: Sequence[int], labels: Sequence[int] | None, shard: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all that the images of a folder are a function of, fit for JSON."""
    found = {
        "format": FORMAT,
        "images": len(seeds),
        "seeds": [seeds[0], seeds[-1] + 1] if isinstance(seeds, range) else _digest(json.dumps(seeds)),
        "labels": None if labels is None else _digest(json.dumps(list(labels))),
        "shard": shard,
        "weights": _weights(model),
        "model": _digest(json.dumps(model.description(), sort_keys=True)),
        "settings": dict(settings),
        "versions": {"diffkern": __version__, "torch": torch.__version__},
    }
    return json.loads(json.dumps(found))


def _agree(folder: Path, told: dict[str, Any]) -> None:
    """Write the manifest, or raise ValueError where the folder's own says something else."""
    path = folder / MANIFEST
    if not path.exists():
        others = [entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")]
        if others:
            got = f"{str(folder)!r} with {others[0]}"
            raise ValueError(f"folder: expected the folder of such a run, or an empty one, got {got}")
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(told, indent=1), encoding="utf-8"))
        return
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError):
        raise ValueError(f"{path}: expected what a run wrote, got something else") from None
    for name, value in told.items():
        theirs = there.get(name)
        if isinstance(value, dict) and isinstance(theirs, dict):
            odd = [key for key in value.keys() | theirs.keys() if value.get(key) != theirs.get(key)]
            name, value, theirs = (f"{name}.{odd[0]}", value.get(odd[0]), theirs.get(odd[0])) if odd else (name, 0, 0)
        if name == "weights" and theirs == _digest(value):
            continue  # of a folder begun by an earlier version
        if value != theirs:
            raise ValueError(f"{name}: expected that of {path}, {theirs!r}, got {value!r}")


def _weights(model: Model | System) -> str:
    if isinstance(model, System):
        return _digest("".join(part + digest_of(network) for part, network in model.networks().items()))
    return digest_of(unwrapped(model.network))  # as the protocol of evaluate has it


def _label(model: Model | System, label: int) -> dict[str, Any]:
    """The class as a PNG tells it: the number, and the name if classes have names."""
    classes = (model.drawn if isinstance(model, System) else model).classes
    named = {} if classes is None else {"class": "none" if label < 0 else classes[label]}
    return {"label": label, **named}


def _plain(value: Any) -> Any:
    """An option as JSON holds it: by its own words where that has none, a tensor by its numbers' digest."""
    if isinstance(value, torch.Tensor):
        return _digest(repr((value.dtype, tuple(value.shape), value.tolist())))
    return value if isinstance(value, bool | int | float | str | None) else repr(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
