"""A folder of images: which files are images, of which classes, and all of them read by several threads."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from ..progress import bar as progress_bar
from .image_file import fault, read_square

SYSTEM_NAMES = frozenset(
    {"#recycle", "$recycle.bin", "@eadir", "__macosx", "desktop.ini", "ehthumbs.db", "lost+found", "thumbs.db"}
    | {"system volume information"}
)
"""Names that archives and systems leave in folders, in lower case, besides those that begin with a dot."""

NOT_PIXELS = frozenset({"EPS", "MPEG"})
"""Formats that Pillow identifies but does not decode by itself, beside its stubs."""

SPLITS = frozenset({"dev", "eval", "holdout", "test", "testing", "train", "training", "val", "valid", "validation"})
"""Names of folders that hold parts of a data set, in lower case, and are rarely classes."""

NAMED = 10  # files, classes or suffixes that a message names
THREADS = 16  # at most: each holds the image that it decodes
BLOCK = 8  # files that a thread reads in turn


@dataclass
class Folder:
    """The image files below ``root`` by class, or those in ``root`` itself under None; and what is left out."""

    root: Path
    files: dict[str | None, list[Path]] = field(default_factory=dict)
    suffixes: Counter = field(default_factory=Counter)  # of the files that are not images
    others: Counter = field(default_factory=Counter)  # anything else, by its kind in the singular
    empty: list[str] = field(default_factory=list)  # sub-folders without images

    @property
    def classes(self) -> tuple[str, ...] | None:
        return None if None in self.files else tuple(self.files)

    def notes(self) -> tuple[str, ...]:
        """Return notes on what is left out, and a warning if the sub-folders do not look like classes."""
        left = [f"{count:,} {plural(kind, count)}" for kind, count in sorted(self.others.items())]
        if self.suffixes:
            count = self.suffixes.total()
            most_first = sorted(self.suffixes.items(), key=lambda item: (-item[1], item[0]))
            listed = shortened(f"{suffix} {count:,}" for suffix, count in most_first)
            left.insert(0, f"{'1 file not an image' if count == 1 else f'{count:,} files not images'} ({listed})")
        if self.empty:
            count = len(self.empty)
            left.append(f"{count:,} {plural('folder', count)} without images ({shortened(self.empty)})")
        notes = [f"left out: {', '.join(left)}"] if left else []
        if self.classes and len(self.classes) == 1:
            notes.append(f"warning: a single class; to train on what is in it, give {self.root / self.classes[0]}")
        elif self.classes and all(name.lower() in SPLITS for name in self.classes):
            train = next((name for name in self.classes if name.lower().startswith("train")), self.classes[0])
            notes.append(f"warning: the classes are splits by their names; to train on one, give {self.root / train}")
        return tuple(notes)


def plural(word: str, count: int) -> str:
    """Return the form of ``word`` for ``count``."""
    return word if count == 1 else word + ("es" if word.endswith("s") else "s")


def shortened(names: Iterable[str]) -> str:
    """List the first ``NAMED`` names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def natural(name: str) -> tuple:
    """Return the key that sorts names with their numbers as numbers: 2 before 10."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if k % 2 else part for k, part in enumerate(parts)], name


def find_images(root: Path) -> Folder:
    """List the images below ``root``: classes in natural order, the files of a class in that of their paths' text.

    Hidden and system files and folders are left out. Links are followed, but no class has a folder twice, nor
    ``root`` or a folder around it. Raises ValueError for images both in ``root`` and in sub-folders, or in neither.
    """
    folder, suffixes = Folder(root), readable_suffixes()
    around = {_identity(path) for path in (root, *root.resolve().parents)}
    unlabelled, subfolders = _listed(root, folder, suffixes)
    for subfolder in sorted(subfolders, key=lambda path: natural(path.name)):
        files, seen, waiting = [], set(around), [subfolder]
        while waiting:
            path = waiting.pop()
            identity = _identity(path)
            if identity in seen:
                folder.others["repeated folder"] += 1
                continue
            seen.add(identity)
            images, deeper = _listed(path, folder, suffixes)
            files += images
            waiting += sorted(deeper, reverse=True)
        if files:
            folder.files[subfolder.name] = sorted(files)
        else:
            folder.empty.append(subfolder.name)
    if unlabelled and folder.files:
        got = f"{shortened(sorted(path.name for path in unlabelled))} beside the folders {shortened(folder.files)}"
        raise ValueError(f"{root}: expected images in sub-folders, a class each, or no such folder, got both: {got}")
    if unlabelled:
        folder.files[None] = sorted(unlabelled)
    if not folder.files:
        raise ValueError("; ".join((f"{root}: expected images (.png, .jpg ...), got none", *folder.notes())))
    return folder


def readable_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that this Pillow decodes, with those of registered plugins."""
    suffixes = Image.registered_extensions()
    stubs = {
        name
        for name, (factory, _) in Image.OPEN.items()
        if isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)
    }
    formats = Image.OPEN.keys() - stubs - NOT_PIXELS | {"MPO"}  # which is opened as a JPEG
    return frozenset(suffix for suffix, name in suffixes.items() if name in formats)


def _listed(path: Path, folder: Folder, suffixes: frozenset[str]) -> tuple[list[Path], list[Path]]:
    """The images and the sub-folders in ``path``; counts the rest in ``folder``."""
    images, subfolders = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            kind, suffix = _kind(entry), os.path.splitext(entry.name)[1].lower()
            if entry.name.startswith("."):
                folder.others[f"hidden {kind}"] += 1
            elif entry.name.lower() in SYSTEM_NAMES:
                folder.others[f"system {kind}"] += 1
            elif kind == "folder":
                subfolders.append(path / entry.name)
            elif kind != "file":
                folder.others[kind] += 1
            elif suffix in suffixes:
                images.append(path / entry.name)
            else:
                folder.suffixes[suffix or "no suffix"] += 1
    return images, subfolders


def _kind(entry: os.DirEntry) -> str:
    """Name the kind of a directory entry. A link is of the kind that it points to."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError:  # a link to itself
        return "broken link"
    return "special file" if os.path.exists(entry) else "broken link"


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def read_images(folder: Folder, size: int, channels: int, progress: bool = False) -> np.ndarray:
    """Read the images of a folder, class after class: [K, channels, size, size] uint8.

    All headers are read first. Raises ValueError that names the files which cannot be read.
    """
    files = [path for paths in folder.files.values() for path in paths]
    try:
        images = np.empty((len(files), channels, size, size), np.uint8)
    except (MemoryError, ValueError):  # ValueError: more bytes than an address has
        got = f"{len(files):,} of {channels}x{size}x{size}"
        raise ValueError(f"size: expected images that fit in memory, got {got}") from None
    for doing, read in (
        ("checking", lambda k: fault(files[k])),
        ("reading", lambda k: read_square(files[k], images[k])),
    ):
        reasons = _in_threads(read, len(files), doing, progress)
        bad = [(path, reason) for path, reason in zip(files, reasons, strict=True) if reason]
        if len(bad) == 1:
            raise ValueError(f"{bad[0][0]}: expected an image, got {bad[0][1]}")
        if bad:
            listed = shortened([f"{path.relative_to(folder.root)} ({reason})" for path, reason in bad])
            raise ValueError(f"{folder.root}: expected images, got {len(bad):,} files that cannot be read: {listed}")
    return images


def _in_threads(function: Callable[[int], str | None], length: int, doing: str, progress: bool) -> list[str | None]:
    """``function(k)`` of each k below ``length``, in order."""
    bar = progress_bar(length, doing, "img", progress)
    pool = ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0))))
    results = []
    try:
        blocks = [range(first, min(first + BLOCK, length)) for first in range(0, length, BLOCK)]
        with bar:
            for part in pool.map(lambda block: [function(k) for k in block], blocks):
                results += part
                bar.update(len(part))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C waits for the blocks at hand alone
    return results
