"""IDX files against the bytes that their format prescribes, and what a hostile one costs."""

import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest
import tiny

from diffkern.io.idx import read_idx

CUBE = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
GOOD = tiny.idx(CUBE)


@pytest.mark.parametrize("name", ["f", "f.gz"])
def test_the_values_come_back_with_zeros_around_them(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(GOOD) if name == "f.gz" else GOOD)
    assert np.array_equal(read_idx(tmp_path / name, ndim=3), CUBE)
    assert np.array_equal(read_idx(tmp_path / name, ndim=3, pad=1), np.pad(CUBE, ((0, 0), (1, 1), (1, 1))))


def test_a_file_longer_than_a_block_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("diffkern.io.idx.BLOCK", 9)  # two items of four bytes
    (tmp_path / "f").write_bytes(GOOD)
    assert np.array_equal(read_idx(tmp_path / "f", ndim=3), CUBE)


def sizes(*shape):
    return struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape)


BAD_IDX = {
    "empty": ("f", b"", "expected IDX bytes of 3 dimensions, got a file that begins"),
    "cut in the header": ("f", GOOD[:10], "expected IDX bytes of 3 dimensions"),
    "cut in the data": ("f", GOOD[:-1], r"expected \(3, 2, 2\) bytes after the header, got 11"),
    "too long": ("f", GOOD + b"\0", r"expected \(3, 2, 2\) bytes after the header, got 13"),
    "floats": ("f", b"\0\0\x0d\3" + GOOD[4:], "got a file that begins 00 00 0d 03"),
    "one dimension": ("f", tiny.idx(np.arange(3)), "got a file that begins 00 00 08 01"),
    "no rows": ("f", sizes(4, 0, 28), r"expected sizes above 0, got \(4, 0, 28\)"),
    "no images": ("f", sizes(0, 28, 28), r"expected sizes above 0, got \(0, 28, 28\)"),
    "huge sizes": ("f", b"\0\0\x08\3" + b"\xff" * 12, "bytes after the header, got 0"),
    "huge sizes in a gzip file": ("f.gz", gzip.compress(sizes(10**9, 28, 28)), "got a gzip file of [0-9]{2} bytes"),
    "no gzip": ("f.gz", GOOD, "expected a whole gzip file"),
    "cut gzip": ("f.gz", gzip.compress(GOOD)[:-9], "expected a whole gzip file"),
    "broken gzip": ("f.gz", gzip.compress(GOOD)[:-8] + b"\xff" * 8, "expected a whole gzip file, got CRC"),
    "gzip cut at an item": ("f.gz", gzip.compress(GOOD[:-4]), r"expected \(3, 2, 2\) bytes after the header, got 8"),
    "other labels": ("f", tiny.idx(np.zeros((2, 2, 2))), "expected 3 entries, one for each label, got 2"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_a_bad_file_is_refused_by_its_name(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{tmp_path / name}: .*{message}"):
        read_idx(tmp_path / name, ndim=3, length=3)


def test_a_gzip_bomb_is_left_after_the_promised_bytes(tmp_path):
    (tmp_path / "f.gz").write_bytes(gzip.compress(GOOD + bytes(1 << 25), 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"f.gz: expected \(3, 2, 2\) bytes after the header, got more"):
            read_idx(tmp_path / "f.gz", ndim=3)
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_sizes_that_fit_the_file_and_no_memory_are_an_error_of_the_file(tmp_path, monkeypatch):
    def zeros(*arguments):
        raise MemoryError

    with (tmp_path / "f").open("wb") as file:
        file.write(sizes(1 << 15, 1 << 10, 1 << 10))
        file.truncate(16 + (1 << 35))  # sparse: no block of the disk
    monkeypatch.setattr(np, "zeros", zeros)
    with pytest.raises(ValueError, match=r"f: expected sizes that fit in memory, got \(32768, 1024, 1024\)"):
        read_idx(tmp_path / "f", ndim=3)


@pytest.mark.parametrize("name", ["f", "f.gz"])
def test_a_pipe_is_refused_before_it_is_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a pipe"):
        read_idx(tmp_path / name, ndim=3)
    with pytest.raises(ValueError, match="expected a file, got a directory"):
        read_idx(tmp_path, ndim=3)
