"""Datasets against files made by hand, and the order of an epoch against the noise standard's words."""

import gzip

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffkern.data import (
    FASHION_MNIST_CLASSES,
    Dataset,
    epoch_order,
    fashion_mnist,
    image_folder,
    load_dataset,
    read_idx,
    words,
)

# --- IDX files ---


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_fashion_mnist_is_read_and_padded_with_black(tmp_path, compress):
    arrays = tiny.write_fashion_mnist(tmp_path, compress=compress)
    for split, stem in (("train", "train"), ("test", "t10k")):
        data = fashion_mnist(tmp_path, split=split)
        assert data.shape == (1, 32, 32) and len(data) == 20 and data.classes == FASHION_MNIST_CLASSES
        assert np.array_equal(data.images[:, 0, 2:30, 2:30], arrays[f"{stem}-images-idx3-ubyte"])
        assert data.images.long().sum() == data.images[:, :, 2:30, 2:30].long().sum()
        assert np.array_equal(data.labels, arrays[f"{stem}-labels-idx1-ubyte"])


def test_a_folder_of_idx_files_is_recognised(tmp_path):
    tiny.write_fashion_mnist(tmp_path)
    assert torch.equal(load_dataset(tmp_path).images, fashion_mnist(tmp_path).images)


def test_bytes_become_images_in_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x_0 = Dataset(pixels).x_0(slice(None))
    assert x_0.dtype == torch.float32 and x_0.min() == -1 and x_0.max() == 1
    assert torch.equal(((x_0 + 1) * 127.5).round().byte(), pixels)


GOOD = tiny.idx(np.arange(12).reshape(3, 2, 2))
BAD_IDX = {
    "empty": ("f", b"", "expected IDX bytes of 3 dimensions, got a file that begins"),
    "cut in the header": ("f", GOOD[:10], "expected IDX bytes of 3 dimensions"),
    "cut in the data": ("f", GOOD[:-1], r"expected \(3, 2, 2\) bytes after the header, got 11"),
    "too long": ("f", GOOD + b"\0", r"expected \(3, 2, 2\) bytes after the header, got 13"),
    "floats": ("f", b"\0\0\x0d\3" + GOOD[4:], "got a file that begins 00 00 0d 03"),
    "one dimension": ("f", tiny.idx(np.arange(3)), "got a file that begins 00 00 08 01"),
    "huge sizes": ("f", b"\0\0\x08\3" + b"\xff" * 12, "bytes after the header, got 0"),
    "no gzip": ("f.gz", GOOD, "expected a whole gzip file"),
    "cut gzip": ("f.gz", gzip.compress(GOOD)[:-9], "expected a whole gzip file"),
    "broken gzip": ("f.gz", gzip.compress(GOOD)[:12] + b"\xff" * 20, "expected a whole gzip file"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_IDX.values(), ids=BAD_IDX)
def test_a_corrupt_idx_file_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name, ndim=3)


# --- image folders ---


def paint(path, colour, size=(20, 12), mode="RGB"):
    path.parent.mkdir(exist_ok=True)
    Image.new(mode, size, colour).save(path)


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    paint(tmp_path / "red" / "1.png", (255, 0, 0))
    paint(tmp_path / "blue" / "b.PNG", (0, 0, 255))
    paint(tmp_path / "blue" / "a.bmp", (0, 0, 128))
    (tmp_path / "blue" / "notes.txt").write_text("no image")
    data = image_folder(tmp_path, size=8)
    assert data.classes == ("blue", "red") and data.labels.tolist() == [0, 0, 1]
    assert data.images[:, :, 4, 4].tolist() == [[0, 0, 128], [0, 0, 255], [255, 0, 0]]


def test_images_without_sub_folders_have_no_labels(tmp_path):
    paint(tmp_path / "1.png", (10, 20, 30))
    data = load_dataset(tmp_path, size=4)
    assert data.labels is None and data.classes is None
    assert torch.equal(
        data.images, torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 4)
    )


def test_the_centre_is_cut_out_and_scaled(tmp_path):
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 200  # the middle third is the centre square
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (image_folder(tmp_path, size=8).images == 200).all()
    assert image_folder(tmp_path, size=4).images.float().mean() == pytest.approx(200, abs=6)  # edges blend a little


def test_a_rotated_photograph_stands_upright(tmp_path):
    halves = np.zeros((8, 8, 3), np.uint8)
    halves[:4] = 255
    image, exif = Image.fromarray(halves), Image.Exif()
    exif[0x0112] = 3  # turn by 180 degrees to show
    image.save(tmp_path / "1.png", exif=exif)
    assert image_folder(tmp_path, size=8).images[0, 0, :, 0].tolist() == [0] * 4 + [255] * 4


@pytest.mark.parametrize(
    ("channels", "mode", "colour"), [(1, "RGB", (90, 90, 90)), (3, "L", 90), (3, "RGBA", (90,) * 4)]
)
def test_any_mode_becomes_the_channels_asked_for(tmp_path, channels, mode, colour):
    paint(tmp_path / "1.png", colour, mode=mode)
    data = image_folder(tmp_path, size=8, channels=channels)
    assert data.shape == (channels, 8, 8) and (data.images == 90).all()


# --- order ---


def test_the_words_are_those_of_the_noise_standard():
    """Random123's known answers: counters (1, 0, 0, 0) and (0, 1, 0, 0) with key 0, and one with all bits in use."""
    assert words(np.array([1, 1 << 32]), 0, 0, 0).tolist() == [
        [0xF8E4CCA4, 0x5CB200DB, 0xB1A574EB, 0x097EFF67],
        [0x6AD0C5EC, 0xEA236249, 0x73A459F5, 0x074944B3],
    ]
    index = np.array([0x85A308D3243F6A88], np.uint64)
    assert words(index, 0x13198A2E, 0x03707344, 0x299F31D0A4093822).tolist() == [
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]
    ]


def test_a_negative_seed_is_taken_modulo_two_to_the_64():
    assert np.array_equal(words(np.arange(3), 1, 2, -5), words(np.arange(3), 1, 2, 2**64 - 5))


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_an_epoch_visits_every_image_once_in_an_order_of_its_own(length):
    orders = [epoch_order(length, epoch, seed).tolist() for epoch, seed in ((0, 0), (1, 0), (0, 1))]
    assert all(sorted(order) == list(range(length)) for order in orders)
    assert epoch_order(length, 0, 0).tolist() == orders[0]
    if length > 7:
        assert orders[0] != orders[1] and orders[0] != orders[2]


def test_the_order_sorts_the_words_of_the_standard():
    w = words(np.arange(50), 3, 4, 9)
    by_hand = sorted(range(50), key=lambda i: int(w[i, 0]) + (int(w[i, 1]) << 32))
    assert epoch_order(50, 3, 9).tolist() == by_hand


# --- bad input ---


def both(folder):
    paint(folder / "1.png", 0)
    paint(folder / "sub" / "1.png", 0)
    return image_folder(folder)


def broken(folder):
    (folder / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return image_folder(folder)


def mislabelled(folder):
    tiny.write_fashion_mnist(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(tiny.idx(np.full(20, 10)))
    return fashion_mnist(folder)


def mismatched(folder):
    tiny.write_fashion_mnist(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(tiny.idx(np.zeros(19)))
    return fashion_mnist(folder)


PIXELS = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
BAD_DATA = {
    "no folder": (lambda f: load_dataset(f / "x"), "data: expected 'fashion-mnist' or an existing directory, got"),
    "no image folder": (lambda f: image_folder(f / "x"), "expected an existing directory, got none"),
    "no IDX files": (fashion_mnist, "expected train-images-idx3-ubyte or .*gz, got neither .*dataset-fashion-mnist"),
    "no such split": (lambda f: fashion_mnist(f, split="val"), "split: expected 'train' or 'test', got 'val'"),
    "label 10": (mislabelled, r"labels: expected 0..9, got 10..10"),
    "labels too few": (mismatched, r"labels: expected int64 \[20\], got torch.int64 \(19,\)"),
    "no images": (image_folder, r"expected images \(.bmp, .*\), got none"),
    "both kinds": (both, "expected images in sub-folders.*got both"),
    "a broken image": (broken, r"1.png: expected an image, got"),
    "size 0": (lambda f: image_folder(f, size=0), "size: expected a positive number of pixels, got 0"),
    "two channels": (lambda f: image_folder(f, channels=2), "channels: expected 1 or 3, got 2"),
    "floats": (lambda f: Dataset(PIXELS.float()), r"images: expected uint8 \[K, C, H, W\] .*, got torch.float32"),
    "no batch": (lambda f: Dataset(PIXELS[0]), r"images: expected uint8 \[K, C, H, W\].*\(1, 4, 4\)"),
    "empty": (lambda f: Dataset(PIXELS[:0]), r"with K > 0, got torch.uint8 \(0, 1, 4, 4\)"),
    "labels alone": (lambda f: Dataset(PIXELS, torch.zeros(2).long()), "expected both labels and classes, or neither"),
    "float labels": (lambda f: Dataset(PIXELS, torch.zeros(2), ("a",)), r"labels: expected int64 \[2\], got .*float32"),
    "negative label": (
        lambda f: Dataset(PIXELS, torch.tensor([0, -1]), ("a",)),
        r"labels: expected 0..0, got -1..0",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_say_what_was_expected(tmp_path, call, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        call(tmp_path)
