"""Images in: whole datasets as uint8 tensors, and the order in which training sees them."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .datasets import Labelled, attribute_of, sets
from .images import from_pixels
from .io.idx import read_idx
from .io.image_folder import find_images, plural, read_images, shortened
from .philox import words
from .progress import bar as progress_bar

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""The folder in which Debian's package ``dataset-fashion-mnist`` (MIT licence) puts the files."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

FASHION_MNIST_LABELS = {
    "train": "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "test": "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
}
"""SHA-256 of the labels of each split, a byte each: what tells Fashion-MNIST from sets whose files have its names."""

EXAMPLE_STREAM, ORDER_STREAM = 3, 4
"""Philox streams beside those of the noise (0, 1, 2): what training draws for an example; the order of an epoch."""

PAD = 2  # black pixels on each side of an image of IDX files: 28x28 become 32x32
HASH_BLOCK = 1 << 24  # bytes that a thread hashes at a time: other blocks make other fingerprints


@dataclass(frozen=True)
class Dataset:
    """K images in memory: images [K, C, H, W] uint8; labels [K] int64 with a name each in classes, or None both.

    ``notes`` are the parts of :attr:`summary` that the other fields do not tell; ``resize`` is how the images came to
    their size, in words.
    """

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    resize: str = "none"

    def __post_init__(self):
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or not len(self.images):
            raise ValueError(
                f"images: expected uint8 [K, C, H, W] with K > 0, got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if (self.labels is None) != (self.classes is None):
            raise ValueError("labels: expected both labels and classes, or neither")
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels: expected int64 [{len(self.images)}], got {self.labels.dtype} {tuple(self.labels.shape)}"
            )
        if self.labels.min() < 0 or self.labels.max() >= len(self.classes):
            raise ValueError(
                f"labels: expected 0..{len(self.classes) - 1}, got {self.labels.min()}..{self.labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Item i of a map-style dataset: "x", uint8 [C, H, W], and its "label" where there are labels."""
        return {"x": self.images[i]} | ({} if self.labels is None else {"label": int(self.labels[i])})

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    @property
    def labelled(self) -> bool:
        return self.labels is not None

    @property
    def summary(self) -> str:
        """Tell in one line what was read and what was left out."""
        text = f"data: {len(self):,} {plural('image', len(self))} of {'x'.join(map(str, self.shape))}, "
        if self.classes is None:
            return "; ".join((text + "no classes", *self.notes))
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        names = [name if name.isprintable() else ascii(name) for name in self.classes]
        listed = shortened([f"{name} {count:,}" for name, count in zip(names, counts, strict=True)])
        return "; ".join((f"{text}{len(names):,} {plural('class', len(names))} ({listed})", *self.notes))

    @cached_property
    def fingerprint(self) -> str:
        """Hash images, labels and classes to 16 hexadecimal digits, by which runs can tell whether their data agree."""
        pixels = self.images.contiguous().cpu().numpy().reshape(-1)
        blocks = [pixels[first : first + HASH_BLOCK] for first in range(0, len(pixels), HASH_BLOCK)]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(lambda block: hashlib.sha256(block).digest(), blocks))
        labels = b"" if self.labels is None else self.labels.contiguous().cpu().numpy().tobytes()
        parts = (repr((self.shape, len(self), self.classes)).encode(), labels, *digests)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:16]

    def in_order_of(self, classes: Sequence[str] | None) -> "Dataset":
        """Give the classes the labels that they have in ``classes``, the same names in another order.

        Images are grouped by label then: the data are those that a folder gave when its classes had this order. With
        other names, or the same order, the data stay as they are.
        """
        if None in (classes, self.classes) or tuple(classes) == self.classes or sorted(classes) != sorted(self.classes):
            return self
        places = {name: label for label, name in enumerate(classes)}
        moved = [places[name] for name in self.classes]
        labels = torch.tensor(moved, dtype=torch.int64, device="cpu")[self.labels]
        order = labels.argsort(stable=True)
        return replace(self, images=self.images[order], labels=labels[order], classes=tuple(classes))

    def x_0(self, index: Tensor | slice) -> Tensor:
        """The images of ``index`` as the network sees them: [N, C, H, W] float32 in [-1, 1]."""
        return from_pixels(self.images[index])

    def batch(self, index: Tensor, seeds: Tensor | None = None) -> "Batch":
        """The examples of ``index``; nothing is drawn."""
        return Batch(self.x_0(index), None if self.labels is None else self.labels[index], {})


@dataclass(frozen=True)
class Batch:
    """N examples: x_0 [N, ...] float32, labels [N] int64 or None, and by name what else the network gets, [N, ...]."""

    x_0: Tensor
    labels: Tensor | None
    conditions: dict[str, Tensor]


@dataclass(frozen=True)
class Items:
    """Any map-style dataset, as ``torch.utils.data.Dataset`` is, in the way that training reads it.

    An item is x, or (x, label), or a dict of "x", perhaps "label", and conditions by their names; all items have the
    same of these. x is a tensor or an array of any shape: uint8 is taken as pixels 0..255, which become [-1, 1], floats
    as they are. A label is an int. What an item draws from torch's generator, as augmentation does, is a function of
    the seed of its example: the same in any batch, and in a run that is resumed.

    classes     names for the labels 0..K-1
    conditions  the names that an item may have beside "x" and "label"; None: any
    transform   makes an item as above of one of ``items``; None: they are such items
    """

    items: Any
    classes: tuple[str, ...] | None = None
    conditions: tuple[str, ...] | None = None
    transform: Callable[[Any], Any] | None = None

    def __post_init__(self):
        items = self.items
        if not (hasattr(items, "__len__") and hasattr(items, "__getitem__")):
            raise TypeError(f"data: expected a map-style dataset, with a length and items, got {type(items).__name__}")
        if not len(self):
            raise ValueError("data: expected at least one item, got none")
        if isinstance(items, Mapping) and 0 not in items:
            raise TypeError(
                f"data: expected items 0..{len(self) - 1}, got a {type(items).__name__} of {_listed(items)}"
            )

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str | None:
        """The dataset's own fingerprint, or None: to read every item would take as long as an epoch."""
        found = getattr(self.items, "fingerprint", None)
        return found if isinstance(found, str) else None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names in the first item, and so in each: "x", perhaps "label", and conditions."""
        with torch.random.fork_rng(devices=[]):
            return tuple(self._item(0, 0))

    @property
    def labelled(self) -> bool:
        return "label" in self.names

    @cached_property
    def first(self) -> Batch:
        """The first example."""
        return self.batch(torch.zeros(1, dtype=torch.int64, device="cpu"))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.first.x_0.shape[1:])

    @property
    def summary(self) -> str:
        """Tell in one line what there is."""
        return f"data: {len(self):,} {plural('item', len(self))} of {'x'.join(map(str, self.shape))}"

    def in_order_of(self, classes: Sequence[str] | None) -> "Items":
        """Name the labels so, where they have no names."""
        return self if self.classes is not None else replace(self, classes=classes and tuple(classes))

    def batch(self, index: Tensor, seeds: Tensor | None = None) -> Batch:
        """The examples of ``index`` [N]; each draws from torch's CPU generator as if that had its own of ``seeds`` [N]
        (None: 0), and leaves it as it was. Raises TypeError or ValueError, with its number, for an item of another kind
        than the first."""
        seeds = torch.zeros_like(index) if seeds is None else seeds
        numbers, names = index.tolist(), self.names
        with torch.random.fork_rng(devices=[]):
            found = [self._item(i, seed) for i, seed in zip(numbers, seeds.tolist(), strict=True)]
        for i, item in zip(numbers, found, strict=True):
            if item.keys() != set(names):
                raise ValueError(f"item {i}: expected {_listed(names)}, as item 0 has, got {_listed(item)}")
            for name, value in item.items():
                shape = tuple(found[0][name].shape)
                if value.shape != shape:
                    expected = f"shape {shape} in item {i}, as in item {numbers[0]}"
                    raise ValueError(f"{name}: expected {expected}, got {tuple(value.shape)}")
        stacked = {name: torch.stack([item[name] for item in found]) for name in names}
        return Batch(stacked.pop("x"), stacked.pop("label", None), stacked)

    def _item(self, i: int, seed: int) -> dict[str, Tensor]:
        """The parts of item i by name, drawn with ``seed``."""
        torch.default_generator.manual_seed(seed)
        item = self.items[i]
        return _parts(item if self.transform is None else self.transform(item), i, self.conditions)


def as_dataset(data: Any) -> "Dataset | Items":
    """``data`` as training reads it. Raises TypeError for what has no length or no items."""
    return data if isinstance(data, Dataset | Items) else Items(data)


def _parts(item: Any, i: int, conditions: Sequence[str] | None) -> dict[str, Tensor]:
    """The parts of item i by name: x float32, the label int64 [], and conditions; their names are checked."""
    if isinstance(item, tuple | list):
        if not 1 <= len(item) <= 2:
            raise ValueError(f"item {i}: expected x or (x, label), got {len(item)} parts")
        item = dict(zip(("x", "label"), item, strict=False))
    elif not isinstance(item, Mapping):
        item = {"x": item}
    known = ("x", "label", *(item if conditions is None else conditions))
    if "x" not in item or not all(name in known for name in item):
        expected = "x, and perhaps label" if conditions is None else f"x, and perhaps {_listed(known[1:])}"
        raise ValueError(f"item {i}: expected {expected}, got {_listed(item)}")
    parts = {name: _tensor(name, value, i) for name, value in item.items()}
    x, label = parts["x"], parts.get("label")
    if x.dtype == torch.uint8:
        parts["x"] = from_pixels(x)
    elif x.is_floating_point():
        parts["x"] = x.float()
    else:
        raise TypeError(f"x: expected uint8 pixels or floats in item {i}, got {x.dtype}")
    if label is not None:
        if label.is_floating_point() or label.is_complex() or label.ndim:
            got = f"{label.tolist()!r:.80}"
            raise TypeError(f"label: expected an int in item {i}, got {got}")
        parts["label"] = label.long()
    return parts


def _tensor(name: str, value: Any, i: int) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.from_numpy(np.asarray(value))
    except (TypeError, ValueError):
        got = type(value).__name__
        raise TypeError(f"{name}: expected a tensor, an array or a number in item {i}, got {got}") from None


def _listed(names: Any) -> str:
    return ", ".join(map(str, names)) or "nothing"


def load_dataset(
    source: str | Path, *, split: str = "train", size: int = 32, channels: int = 3, progress: bool = False
) -> Dataset:
    """Read ``"fashion-mnist"``, a set of :mod:`diffkern.datasets` (``"faces"``, ``"emoji:style"``; the first
    :data:`SET_IMAGES`), a directory of IDX files, or an image folder (which has no splits).

    The text ``"fashion-mnist"`` is the installed set; a folder of that name is taken where none is installed, and
    refused beside one, unless it is the output of a run; so are folders with the names of other sets.
    ``"./fashion-mnist"`` and every ``Path`` are folders.
    """
    found = picture_set(source, split=split, size=size, channels=channels)
    if found is not None:
        return _in_memory(found, progress)
    idx = idx_folder(source)
    if idx is not None:
        return fashion_mnist(idx, split=split)
    return image_folder(source, size=size, channels=channels, progress=progress)


SET_IMAGES = 10_000
"""How many pictures of a set :func:`load_dataset` holds in memory, at most."""


def picture_set(source: str | Path, *, split: str = "train", size: int = 32, channels: int = 3) -> Items | None:
    """The set of :mod:`diffkern.datasets` that ``source`` names, as training reads it; None for another source.

    ``"faces"`` has no labels; ``"faces:hair"`` has those of the attribute "hair". A picture is drawn when it is read.
    Raises ValueError for an attribute or a size that the set has not, for grey, and beside a folder of the set's name.
    """
    found = _set_of(source)
    if found is None:
        return None
    made, attribute = found
    if channels != 3:
        raise ValueError(f"channels: expected 3, those of {source!r}, got {channels}")
    classes = attribute_of(made, attribute)
    return Items(made(size=size, split=split, transform=Labelled(attribute, classes)), classes)


def _set_of(source: str | Path) -> tuple[type, str | None] | None:
    """The set that a text names, and the attribute after a colon."""
    name, colon, attribute = source.partition(":") if isinstance(source, str) else ("", "", "")
    if name not in sets():
        return None
    root = Path(name)
    if root.is_dir() and not (root / "log.csv").exists():
        raise ValueError(f"data: expected ./{name} or the set {name}, got {source!r}, which could be either")
    return sets()[name], attribute if colon else None


def _in_memory(items: Items, progress: bool) -> Dataset:
    n = min(len(items), SET_IMAGES)
    drawn = []
    with progress_bar(n, "drawing", "img", progress) as bar:
        for i in range(n):
            drawn.append(items.items[i])
            bar.update(1)
    labels = None
    if items.classes is not None:
        labels = torch.tensor([item["label"] for item in drawn], dtype=torch.int64, device="cpu")
    return Dataset(torch.stack([item["x"] for item in drawn]), labels, items.classes)


def idx_folder(source: str | Path) -> Path | None:
    """The folder of IDX files, which have two splits, that :func:`load_dataset` reads; None for an image folder."""
    root = Path(source)
    if _set_of(source) is not None:
        return None
    if source == "fashion-mnist":
        if root.is_dir() and FASHION_MNIST.is_dir() and not (root / "log.csv").exists():
            raise ValueError(f"data: expected ./{root} or {FASHION_MNIST}, got {source!r}, which could be either")
        if FASHION_MNIST.is_dir() or not root.is_dir():
            return FASHION_MNIST
    if not root.is_dir():
        names = ", ".join(map(repr, ("fashion-mnist", *sets())))
        raise FileNotFoundError(f"data: expected {names} or an existing directory, got {str(source)!r}")
    return root if any(not path.name.startswith(".") for path in root.glob("*-idx3-ubyte*")) else None


def fashion_mnist(root: str | Path = FASHION_MNIST, *, split: str = "train") -> Dataset:
    """Read Fashion-MNIST (Xiao et al. 2017), or another set in files of its names and format, plain or gzipped.

    The images are padded by two black pixels on each side, from 28x28 to 32x32. ``split`` is "train" (60,000 images)
    or "test" (10,000). The classes are Fashion-MNIST's if the labels are, else "0", "1" ... up to the largest label.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    stem = "train" if split == "train" else "t10k"
    images_file = _idx_file(Path(root), f"{stem}-images-idx3-ubyte")
    labels = read_idx(_idx_file(Path(root), f"{stem}-labels-idx1-ubyte"), ndim=1)
    images = read_idx(images_file, ndim=3, length=len(labels), pad=PAD)
    if hashlib.sha256(labels.numpy()).hexdigest() == FASHION_MNIST_LABELS[split]:
        classes = FASHION_MNIST_CLASSES
    else:
        classes = tuple(map(str, range(int(labels.max()) + 1)))
    return Dataset(images[:, None], labels.long(), classes, resize=f"{PAD} black pixels on each side")


def _idx_file(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{root}: expected {name} or {name}.gz, got neither (Debian and Ubuntu: apt-get install dataset-fashion-mnist)"
    )


def image_folder(root: str | Path, *, size: int = 32, channels: int = 3, progress: bool = False) -> Dataset:
    """Read the images below ``root``: a class is a sub-folder; images in ``root`` itself have no labels.

    The shorter side is scaled to ``size`` and the centre cut out; ``channels`` is 3 (RGB) or 1 (grey). Every format
    that Pillow decodes is read. Transparent pixels are composited over white. Grey of 16 bits is divided by 257 and
    rounded; floats and integers of 32 bits are refused, because their range is not known. Hidden files and folders
    (``.name``) and those of systems are left out; links to folders are followed. Numbers in the names of classes
    sort as numbers: label 2 of the classes 0 to 11 is "2". ``progress`` shows a bar on a terminal, and lines elsewhere.
    """
    root = Path(root)
    if size < 1:
        raise ValueError(f"size: expected a positive number of pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected an existing directory, got none")
    folder = find_images(root)
    images = torch.from_numpy(read_images(folder, size, channels, progress))
    told = dict(notes=folder.notes(), resize=f"the shorter side to {size} (Lanczos), the centre cut out")
    if folder.classes is None:
        return Dataset(images, **told)
    counts = torch.tensor([len(paths) for paths in folder.files.values()], dtype=torch.int64, device="cpu")
    labels = torch.arange(len(counts), dtype=torch.int64, device="cpu").repeat_interleave(counts)
    return Dataset(images, labels, folder.classes, **told)


def epoch_order(length: int, epoch: int, seed: int) -> Tensor:
    """The permutation of 0..length-1 that an epoch follows: [length] int64, a function of its arguments alone."""
    w = words(np.arange(length), epoch, ORDER_STREAM, seed)
    return torch.from_numpy(np.argsort(w[:, 0] | w[:, 1] << np.uint64(32), kind="stable"))
