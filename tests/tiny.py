"""Small things to train and to read: a network, a dataset, files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from diffkern.data import Dataset
from diffkern.model import Model
from diffkern.schedule import Schedule
from diffkern.training import Config
from diffkern.unet import UNet


@pytest.fixture(autouse=True)
def one_thread():
    """For the modules that import it: networks this small would only have a second thread wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NETWORK = {"in_channels": 1, "channels": 8, "channel_mult": [1, 2], "blocks": 1, "attention_levels": [1], "groups": 4}
SCHEDULE = Schedule.linear(20, 1e-3, 0.3)


def dataset(length: int = 10, classes: int | None = 3, size: int = 8) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (length, 1, size, size), dtype=torch.uint8, generator=generator)
    if classes is None:
        return Dataset(pixels)
    return Dataset(pixels, torch.arange(length) % classes, tuple(f"class {label}" for label in range(classes)))


def config(**changes) -> Config:
    defaults = dict(steps=6, batch_size=4, warmup=2, sample_every=0, network=NETWORK, schedule=SCHEDULE.config())
    return Config(**{**defaults, **changes})


def model(classes: int | None = 3, **changes) -> Model:
    torch.manual_seed(0)
    network = UNet(**{**NETWORK, "num_classes": classes, **changes})
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)  # it starts at zero, and would hide all the rest
    names = None if classes is None else tuple(f"class {label}" for label in range(classes))
    return Model(network.eval(), SCHEDULE, "eps", (1, 8, 8), names, name="tiny")


def idx(array: np.ndarray) -> bytes:
    """The IDX format as its inventors describe it: magic, big-endian sizes, data."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, length: int = 20, compress: bool = False) -> dict[str, np.ndarray]:
    """The four files, of random images; returns the arrays by file name."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    arrays = {}
    for stem in ("train", "t10k"):
        arrays[f"{stem}-images-idx3-ubyte"] = random.integers(0, 256, (length, 28, 28), dtype=np.uint8)
        arrays[f"{stem}-labels-idx1-ubyte"] = (np.arange(length) % 10).astype(np.uint8)
    for name, array in arrays.items():
        if compress:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays
