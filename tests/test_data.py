"""Datasets against files made by hand, and the order of an epoch against the noise standard's words."""

import hashlib
import os
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from diffkern import data as data_module
from diffkern.data import (
    FASHION_MNIST,
    FASHION_MNIST_CLASSES,
    Dataset,
    epoch_order,
    fashion_mnist,
    image_folder,
    load_dataset,
    words,
)
from diffkern.io.idx import read_idx

# --- IDX files ---


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_fashion_mnist_is_read_and_padded_with_black(tmp_path, compress):
    arrays = tiny.write_fashion_mnist(tmp_path, compress=compress)
    for split, stem in (("train", "train"), ("test", "t10k")):
        data = fashion_mnist(tmp_path, split=split)
        assert data.shape == (1, 32, 32) and len(data) == 20
        assert np.array_equal(data.images[:, 0, 2:30, 2:30], arrays[f"{stem}-images-idx3-ubyte"])
        assert data.images.long().sum() == data.images[:, :, 2:30, 2:30].long().sum()
        assert np.array_equal(data.labels, arrays[f"{stem}-labels-idx1-ubyte"])


def test_another_set_in_files_of_the_same_names_has_numbers_for_classes(tmp_path):
    """MNIST and KMNIST, for two, name their files so, and have no sneakers."""
    tiny.write_fashion_mnist(tmp_path)
    assert fashion_mnist(tmp_path).classes == tuple("0123456789")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(tiny.idx(np.arange(20) % 12))
    assert fashion_mnist(tmp_path).classes == tuple(map(str, range(12)))


def test_the_classes_have_names_if_the_labels_are_fashion_mnists(tmp_path, monkeypatch):
    arrays = tiny.write_fashion_mnist(tmp_path)
    digest = hashlib.sha256(arrays["t10k-labels-idx1-ubyte"].tobytes()).hexdigest()
    monkeypatch.setitem(data_module.FASHION_MNIST_LABELS, "test", digest)
    assert fashion_mnist(tmp_path, split="test").classes == FASHION_MNIST_CLASSES
    assert fashion_mnist(tmp_path, split="train").classes == tuple("0123456789")


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_the_installed_fashion_mnist_is_known_by_its_labels():
    data = fashion_mnist(split="test")
    assert data.classes == FASHION_MNIST_CLASSES and data.labels.bincount().tolist() == [1000] * 10
    labels = read_idx(FASHION_MNIST / "train-labels-idx1-ubyte.gz", ndim=1)
    assert hashlib.sha256(labels.numpy()).hexdigest() == data_module.FASHION_MNIST_LABELS["train"]


def test_a_folder_of_idx_files_is_recognised(tmp_path):
    tiny.write_fashion_mnist(tmp_path)
    assert torch.equal(load_dataset(tmp_path).images, fashion_mnist(tmp_path).images)


def test_a_hidden_idx_file_makes_no_folder_of_them(tmp_path):
    (tmp_path / "._train-images-idx3-ubyte").write_bytes(b"")
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    assert load_dataset(tmp_path).shape == (3, 32, 32)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
def test_a_pipe_among_idx_files_does_not_hang(tmp_path, name):
    tiny.write_fashion_mnist(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: expected a file, got a pipe"):
        load_dataset(tmp_path)


# --- names ---


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A working directory, and Fashion-MNIST installed elsewhere."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(data_module, "FASHION_MNIST", tmp_path / "installed")
    tiny.write_fashion_mnist(tmp_path / "installed")
    return tmp_path / "installed"


def test_a_name_that_is_also_a_folder_is_refused(installed, tmp_path):
    own = tmp_path / "here" / "fashion-mnist"
    assert load_dataset("fashion-mnist").shape == (1, 32, 32)
    own.mkdir()
    Image.new("L", (4, 4)).save(own / "1.png")
    with pytest.raises(ValueError, match=f"data: expected ./fashion-mnist or {installed}, got 'fashion-mnist', which"):
        load_dataset("fashion-mnist")
    for source in ("./fashion-mnist", own, own.relative_to(tmp_path / "here")):
        assert load_dataset(source).shape == (3, 32, 32)
    assert load_dataset(installed).shape == (1, 32, 32)


def test_the_folder_of_a_run_does_not_hide_the_installed_set(installed, tmp_path):
    (tmp_path / "here" / "fashion-mnist").mkdir()
    (tmp_path / "here" / "fashion-mnist" / "log.csv").write_text("")
    assert load_dataset("fashion-mnist").shape == (1, 32, 32)


def test_a_folder_is_taken_by_the_name_of_a_set_that_is_not_installed(installed, tmp_path, monkeypatch):
    tiny.write_fashion_mnist(tmp_path / "here" / "fashion-mnist", length=10)
    monkeypatch.setattr(data_module, "FASHION_MNIST", tmp_path / "none")
    assert len(load_dataset("fashion-mnist")) == 10


# --- what a data set tells of itself ---


def test_bytes_become_images_in_minus_one_to_one():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    x_0 = Dataset(pixels).x_0(slice(None))
    assert x_0.dtype == torch.float32 and x_0.min() == -1 and x_0.max() == 1
    assert torch.equal(((x_0 + 1) * 127.5).round().byte(), pixels)


def test_the_summary_counts_images_and_classes():
    assert tiny.dataset(5).summary == "data: 5 images of 1x8x8, 3 classes (class 0 2, class 1 2, class 2 1)"
    assert Dataset(torch.zeros(1, 3, 2, 4, dtype=torch.uint8)).summary == "data: 1 image of 3x2x4, no classes"
    many = Dataset(
        torch.zeros(2600, 1, 1, 1, dtype=torch.uint8),
        torch.arange(2600) % 13,
        ("a\nb", *map(str, range(12))),
        ("left out: 1 hidden file",),
    )
    assert many.summary == (
        "data: 2,600 images of 1x1x1, 13 classes ('a\\nb' 200, 0 200, 1 200, 2 200, 3 200, 4 200, 5 200, 6 200, "
        "7 200, 8 200 and 3 more); left out: 1 hidden file"
    )


def test_a_fingerprint_is_of_images_labels_and_classes_alone(monkeypatch):
    data = tiny.dataset()
    same = Dataset(data.images.clone(), data.labels.clone(), data.classes, ("left out: 1 hidden file",))
    assert same.fingerprint == data.fingerprint and len(data.fingerprint) == 16
    assert int(data.fingerprint, 16)

    pixel, label = data.images.clone(), data.labels.clone()
    pixel[-1, 0, -1, -1] ^= 1
    label[0] = 1
    others = [
        replace(data, images=pixel),
        replace(data, images=data.images.flip(0)),
        replace(data, images=data.images.reshape(10, 1, 16, 4)),
        replace(data, labels=label),
        replace(data, classes=("class 0", "class 1", "class 3")),
        Dataset(data.images),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 7

    monkeypatch.setattr(data_module, "HASH_BLOCK", 100)
    transposed = replace(data, images=data.images.mT.contiguous().mT)
    assert transposed.fingerprint == replace(data).fingerprint


def test_data_in_another_order_of_classes_are_those_of_folders_sorted_so(tmp_path):
    for label in range(12):
        (tmp_path / str(label)).mkdir()
        for k in range(2):
            Image.new("L", (2, 2), 10 * label + k).save(tmp_path / str(label) / f"{k}.png")
    data = image_folder(tmp_path, size=2, channels=1)
    as_text = tuple(sorted(data.classes))
    old = data.in_order_of(as_text)
    assert old.classes == as_text == ("0", "1", "10", "11", *"23456789")
    assert old.images[:, 0, 0, 0].tolist() == [10 * int(name) + k for name in as_text for k in range(2)]
    assert [as_text[label] for label in old.labels] == [name for name in as_text for _ in range(2)]
    assert old.in_order_of(data.classes).fingerprint == data.fingerprint
    for classes in (None, data.classes, (*"0123456789", "10", "12"), ("a",)):
        assert data.in_order_of(classes) is data
    assert Dataset(data.images).in_order_of(as_text).classes is None


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


def mismatched(folder):
    tiny.write_fashion_mnist(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(tiny.idx(np.zeros(19)))
    return fashion_mnist(folder)


PIXELS = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
BAD_DATA = {
    "no folder": (lambda f: load_dataset(f / "x"), "data: expected 'fashion-mnist', 'emoji', 'faces' or an existing"),
    "no image folder": (lambda f: image_folder(f / "x"), "expected an existing directory, got none"),
    "no IDX files": (fashion_mnist, "expected train-images-idx3-ubyte or .*gz, got neither .*dataset-fashion-mnist"),
    "no such split": (lambda f: fashion_mnist(f, split="val"), "split: expected 'train' or 'test', got 'val'"),
    "labels too few": (mismatched, "train-images-idx3-ubyte: expected 19 entries, one for each label, got 20"),
    "size 0": (lambda f: image_folder(f, size=0), "size: expected a positive number of pixels, got 0"),
    "two channels": (lambda f: image_folder(f, channels=2), "channels: expected 1 or 3, got 2"),
    "floats": (lambda f: Dataset(PIXELS.float()), r"images: expected uint8 \[K, C, H, W\] .*, got torch.float32"),
    "no batch": (lambda f: Dataset(PIXELS[0]), r"images: expected uint8 \[K, C, H, W\].*\(1, 4, 4\)"),
    "empty": (lambda f: Dataset(PIXELS[:0]), r"with K > 0, got torch.uint8 \(0, 1, 4, 4\)"),
    "labels alone": (lambda f: Dataset(PIXELS, torch.zeros(2).long()), "expected both labels and classes, or neither"),
    "labels of other images": (
        lambda f: Dataset(PIXELS, torch.zeros(3).long(), ("a",)),
        r"labels: expected int64 \[2\], got torch.int64 \(3,\)",
    ),
    "label 1 of 1": (lambda f: Dataset(PIXELS, torch.ones(2).long(), ("a",)), "labels: expected 0..0, got 1..1"),
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
