"""Many samples as a folder: the same by any number of processes, resumed after any end, never made twice."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import exit_code
from PIL import Image
from tiny import one_thread  # noqa: F401

from diffkern import Model, Schedule, UNet, cli, images, sample, save, shards
from diffkern.evaluate import Drawn
from diffkern.shards import MANIFEST, sample_to

OPTIONS = dict(steps=2, batch_size=2, progress=False)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = UNet(1, channels=8, channel_mult=(1, 1), blocks=1, attention_levels=(), groups=4, num_classes=2)
    torch.nn.init.normal_(network.conv_out.weight, std=0.2)
    return Model(network.eval(), Schedule.linear(10), shape=(1, 8, 8), classes=("a", "b"))


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


def drawn(model: Model, n: int, **options) -> np.ndarray:
    return images.to_uint8(sample(model, n, **OPTIONS, **options))[..., 0]


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("*.png"))}


def child(work: Callable[[], None]) -> int:
    """The number of a process that does ``work``; it ends with 0 unless that raises."""
    number = os.fork()
    if not number:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return number


def test_a_folder_has_the_images_of_sample_and_tells_of_what_they_are_made(model, tmp_path):
    labels = [0, 1, 0, 1, 0]
    (tmp_path / ".manifest.json.left").mkdir()  # by a process that was killed
    assert sample_to(tmp_path, model, torch.arange(5), labels=torch.tensor(labels), shard=2, **OPTIONS) == 0
    assert np.array_equal(pixels(tmp_path), drawn(model, 5, labels=labels))
    told = images.read_settings(tmp_path / "0000003.png")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert told["seed"] == 3 and told["steps"] == 2 and told["weights"] == manifest["weights"]
    assert (told["label"], told["class"], told["device"]) == (1, "b", "cpu")
    assert told["versions"]["torch"] == torch.__version__
    assert manifest["images"] == 5
    assert manifest["weights"] == Drawn(model, 2, sampler="ddim", steps=2).description["weights"]
    earlier = manifest | {"weights": hashlib.sha256(manifest["weights"].encode()).hexdigest()[:16]}
    (tmp_path / MANIFEST).write_text(json.dumps(earlier))  # still the folder of these weights
    assert sample_to(tmp_path, model, torch.arange(5), labels=torch.tensor(labels), shard=2, **OPTIONS) == 0
    with pytest.raises(ValueError, match="seeds: expected that of"):
        sample_to(tmp_path, model, range(5), labels=labels, shard=2, **OPTIONS)


def test_three_processes_make_what_one_does_and_no_image_twice(model, tmp_path):
    def work():
        save_png = shards.images.save_png

        def once(image, path, settings):
            assert not path.exists()
            save_png(image, path, settings)

        shards.images.save_png = once
        sample_to(tmp_path, model, range(20), shard=2, **OPTIONS)

    assert [exit_code(number) for number in [child(work) for _ in range(3)]] == [0, 0, 0]
    assert np.array_equal(pixels(tmp_path), drawn(model, 20))


def test_a_killed_process_loses_its_shard_at_most(model, tmp_path):
    """It ends by SIGKILL in its second shard; the next call makes what is not there."""

    def killed():
        save_png = shards.images.save_png

        def until_killed(image, path, settings):
            if path.name == "0000003.png":
                os.kill(os.getpid(), signal.SIGKILL)
            save_png(image, path, settings)

        shards.images.save_png = until_killed
        sample_to(tmp_path, model, range(6), shard=2, **OPTIONS)

    assert exit_code(child(killed)) == -signal.SIGKILL
    before = times(tmp_path)
    assert list(before) == ["0000000.png", "0000001.png", "0000002.png"]
    assert sample_to(tmp_path, model, range(6), shard=2, **OPTIONS) == 0
    assert np.array_equal(pixels(tmp_path), drawn(model, 6))
    after = times(tmp_path)
    assert all(after[name] == before[name] for name in ("0000000.png", "0000001.png"))
    assert sample_to(tmp_path, model, range(6), shard=2, **OPTIONS) == 0
    assert times(tmp_path) == after


def test_a_shard_that_another_process_holds_is_left_to_it(model, tmp_path):
    ready, done = os.pipe(), os.pipe()

    def holding():
        with shards._Locks(tmp_path) as locks:
            assert locks.take(1)
            os.write(ready[1], b"x")
            os.read(done[0], 1)

    number = child(holding)
    os.close(ready[1])  # so that a child that fails is not waited for
    os.read(ready[0], 1)
    assert sample_to(tmp_path, model, range(5), shard=2, **OPTIONS) == 2
    assert list(times(tmp_path)) == ["0000000.png", "0000001.png", "0000004.png"]
    os.write(done[1], b"x")
    assert exit_code(number) == 0
    assert sample_to(tmp_path, model, range(5), shard=2, **OPTIONS) == 0
    assert np.array_equal(pixels(tmp_path), drawn(model, 5))


def test_another_run_is_refused_by_name(model, tmp_path):
    given = dict(labels=[0, 0], shard=2, guidance=1.0, **OPTIONS)
    assert sample_to(tmp_path, model, range(2), **given) == 0
    other = Model(UNet(**model.network.config | {"channels": 16}), model.schedule, shape=model.shape)
    for change, message in (
        (dict(seeds=range(1, 3)), r"seeds: expected that of .*manifest.json, \[0, 2\], got \[1, 3\]"),
        (dict(seeds=range(3), labels=[0] * 3), "images: expected that of .*, 2, got 3"),
        (dict(labels=[0, 1]), "labels: expected that of"),
        (dict(steps=3), "settings.steps: expected that of .*, 2, got 3"),
        (dict(settings={"by": "me"}), "settings.by: expected that of .*, None, got 'me'"),
        (dict(model=replace(model, prediction="v")), "model: expected that of"),
        (dict(seeds=range(0), labels=None), "seeds: expected one for each image, and an image, got 0"),
        (dict(labels=[0]), "labels: expected one for each image, and an image, got 1"),
        (dict(shard=1), "shard: expected that of .*, 2, got 1"),
        (dict(model=other), "weights: expected that of"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_to(tmp_path, **dict(model=model, seeds=range(2)) | given | change)
    (tmp_path / MANIFEST).write_text("7")
    with pytest.raises(ValueError, match="manifest.json: expected what a run wrote, got something else"):
        sample_to(tmp_path, model, range(2), **given)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match="folder: expected the folder of such a run, or an empty one, got .* with "):
        sample_to(tmp_path, model, range(2), **given)


def test_the_command_goes_on(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(model, "m.safetensors")
    command = ["sample", "--model", "m.safetensors", "--n", "5", "--steps", "2", "--shard", "2", "--no-progress"]
    assert cli.main([*command, "--folder", "out"]) == 0
    before = times(Path("out"))
    Path("out/0000004.png").unlink()
    assert cli.main([*command, "--folder", "out"]) == 0
    assert len(before) == 5 and times(Path("out")).keys() == before.keys()
    assert np.array_equal(
        pixels(Path("out")), images.to_uint8(sample(model, 5, labels=[0, 1, 0, 1, 0], steps=2))[..., 0]
    )
    assert capsys.readouterr().out.split() == ["out", "out"]
    assert cli.main([*command, "--folder", "out", "--guidance", "2"]) == 2
    assert "settings.guidance: expected that of out/manifest.json, 1.0, got 2.0" in capsys.readouterr().err
    assert cli.main([*command, "--folder", "out", "--gif", "x.gif"]) == 2
    assert "gif: expected none with --folder, got 'x.gif'" in capsys.readouterr().err
