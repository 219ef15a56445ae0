"""The IDX format of MNIST and its successors: 0, 0, type, dimensions; the sizes, big-endian; the values."""

import gzip
import math
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import check_regular

DEFLATE_RATIO = 1032  # the most bytes that one byte of a gzip file can stand for
BLOCK = 1 << 20  # bytes read at a time


def read_idx(path: str | Path, *, ndim: int, length: int | None = None, pad: int = 0) -> Tensor:
    """Read an IDX file of bytes, plain or .gz, as a uint8 tensor of ``ndim`` dimensions.

    ``length`` is the first size that is expected, ``pad`` the zeros added on each side of the last two dimensions.
    The sizes in the header are compared with the file before memory is taken for them. Raises ValueError, with the
    file's name, for a file of another kind, a damaged one, a pipe or a device.
    """
    path = Path(path)
    check_regular(path)
    with _opened(path) as stream:
        shape = _read_header(stream, path, ndim)
        if length is not None and shape[0] != length:
            raise ValueError(f"{path}: expected {length} entries, one for each label, got {shape[0]}")
        try:
            padded = np.zeros([*shape[:-2], *(size + 2 * pad for size in shape[-2:])], np.uint8)
            _read_values(stream, path, padded[..., pad:-pad, pad:-pad] if pad else padded)
        except MemoryError:
            raise ValueError(f"{path}: expected sizes that fit in memory, got {shape}") from None
    return torch.from_numpy(padded)


@contextmanager
def _opened(path: Path):
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got {error}") from None


def _read_header(stream, path: Path, ndim: int) -> tuple[int, ...]:
    """The sizes, each above 0, for which the file is neither too short nor too long as far as its own size tells."""
    start = stream.read(4 + 4 * ndim)
    if len(start) < 4 + 4 * ndim or start[:4] != bytes((0, 0, 8, ndim)):
        raise ValueError(
            f"{path}: expected IDX bytes of {ndim} dimensions, got a file that begins {start[:4].hex(' ')}"
        )
    shape = struct.unpack(f">{ndim}I", start[4:])
    expected, size = math.prod(shape), path.stat().st_size
    if not expected:
        raise ValueError(f"{path}: expected sizes above 0, got {shape}")
    if path.suffix == ".gz":
        if expected > size * DEFLATE_RATIO:
            raise ValueError(f"{path}: expected {shape} bytes after the header, got a gzip file of {size} bytes")
    elif expected != size - len(start):
        raise ValueError(f"{path}: expected {shape} bytes after the header, got {size - len(start)}")
    return shape


def _read_values(stream, path: Path, values: np.ndarray) -> None:
    """Fill ``values`` block by block: of a longer stream no more than one byte is read beyond them."""
    item = math.prod(values.shape[1:])
    rows = max(1, BLOCK // item)
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        block = stream.read(part.size)
        if len(block) != part.size:
            got = first * item + len(block)
            raise ValueError(f"{path}: expected {values.shape} bytes after the header, got {got}")
        part[:] = np.frombuffer(block, np.uint8).reshape(part.shape)
    if stream.read(1):  # at the end, this compares gzip's checksum
        raise ValueError(f"{path}: expected {values.shape} bytes after the header, got more")
