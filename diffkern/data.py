"""Images in: whole datasets as uint8 tensors, and the order in which training sees them."""

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .reference import philox4x32

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` (MIT licence) puts the files."""

FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))

EXAMPLE_STREAM, ORDER_STREAM = 3, 4
"""Philox streams beside those of the noise (0, 1, 2): what training draws for an example; the order of an epoch."""


@dataclass(frozen=True)
class Dataset:
    """K images in memory: images [K, C, H, W] uint8; labels [K] int64 with a name each in classes, or None both."""

    images: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] | None = None

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

    @property
    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])

    def x_0(self, index: Tensor | slice) -> Tensor:
        """The images of ``index`` as the network sees them: [N, C, H, W] float32 in [-1, 1]."""
        return self.images[index].float() / 127.5 - 1


def load_dataset(source: str | Path, *, split: str = "train", size: int = 32, channels: int = 3) -> Dataset:
    """``"fashion-mnist"``, a directory of its IDX files, or an image folder (which has no splits)."""
    if str(source) == "fashion-mnist":
        return fashion_mnist(split=split)
    root = Path(source)
    if not root.is_dir():
        raise FileNotFoundError(f"data: expected 'fashion-mnist' or an existing directory, got {str(source)!r}")
    if any(root.glob("*-idx3-ubyte*")):
        return fashion_mnist(root, split=split)
    return image_folder(root, size=size, channels=channels)


def fashion_mnist(root: str | Path = FASHION_MNIST, *, split: str = "train") -> Dataset:
    """Fashion-MNIST (Xiao et al. 2017) from its four IDX files, plain or gzipped, padded from 28x28 to 32x32 by black.

    ``split`` is "train" (60,000 images) or "test" (10,000).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: expected 'train' or 'test', got {split!r}")
    stem = "train" if split == "train" else "t10k"
    images = read_idx(_idx_file(Path(root), f"{stem}-images-idx3-ubyte"), ndim=3)
    labels = read_idx(_idx_file(Path(root), f"{stem}-labels-idx1-ubyte"), ndim=1)
    return Dataset(F.pad(images[:, None], (2, 2, 2, 2)), labels.long(), FASHION_MNIST_CLASSES)


def _idx_file(root: Path, name: str) -> Path:
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{root}: expected {name} or {name}.gz, got neither (Debian and Ubuntu: apt-get install dataset-fashion-mnist)"
    )


def read_idx(path: str | Path, *, ndim: int) -> Tensor:
    """A file of bytes in the IDX format, plain or .gz: 0, 0, type 8, ndim; the sizes, big-endian; the bytes."""
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got {error}") from None
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, 8, ndim)):
        start = content[:4].hex(" ")
        raise ValueError(f"{path}: expected IDX bytes of {ndim} dimensions, got a file that begins {start}")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    if len(content) - header != int(np.prod(shape, dtype=object)):
        raise ValueError(f"{path}: expected {shape} bytes after the header, got {len(content) - header}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def image_folder(root: str | Path, *, size: int = 32, channels: int = 3) -> Dataset:
    """The images below ``root``: a class is a sub-folder; images in ``root`` itself have no labels.

    The shorter side is scaled to ``size`` and the centre cut out; ``channels`` is 3 (RGB) or 1 (grey).
    """
    root = Path(root)
    if size < 1:
        raise ValueError(f"size: expected a positive number of pixels, got {size}")
    if channels not in (1, 3):
        raise ValueError(f"channels: expected 1 or 3, got {channels}")
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: expected an existing directory, got none")
    unlabelled = _image_files(root.glob("*"))
    folders = {path.name: _image_files(path.rglob("*")) for path in sorted(root.iterdir()) if path.is_dir()}
    folders = {name: files for name, files in folders.items() if files}
    if unlabelled and folders:
        raise ValueError(f"{root}: expected images in sub-folders, a class each, or beside no sub-folder, got both")
    files = unlabelled or [path for paths in folders.values() for path in paths]
    if not files:
        raise ValueError(f"{root}: expected images ({', '.join(sorted(SUFFIXES))}), got none")
    images = torch.from_numpy(np.stack([_read_image(path, size, channels) for path in files]))
    if unlabelled:
        return Dataset(images)
    labels = torch.tensor([label for label, paths in enumerate(folders.values()) for _ in paths])
    return Dataset(images, labels, tuple(folders))


def _image_files(paths) -> list[Path]:
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file())


def _read_image(path: Path, size: int, channels: int) -> np.ndarray:
    """[C, size, size] uint8."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected an image, got {error}") from None
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def words(index: np.ndarray, step: int, stream: int, seed: int) -> np.ndarray:
    """Four Philox words for each 64-bit index [N], as uint64 [N, 4]: counter (index, step, stream), key ``seed``."""
    index = np.asarray(index, np.uint64)
    counter = np.empty((len(index), 4), np.uint32)
    counter[:, 0], counter[:, 1] = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
    counter[:, 2], counter[:, 3] = step, stream
    key = np.array((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), np.uint32)
    return philox4x32(counter, key).astype(np.uint64)


def epoch_order(length: int, epoch: int, seed: int) -> Tensor:
    """The permutation of 0..length-1 that an epoch follows: [length] int64, a function of its arguments alone."""
    w = words(np.arange(length), epoch, ORDER_STREAM, seed)
    return torch.from_numpy(np.argsort(w[:, 0] | w[:, 1] << np.uint64(32), kind="stable"))
