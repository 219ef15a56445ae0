"""Palette: the damage to a picture by its seed, what is given to the network of it, and its recipe."""

import io
import signal
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from test_cascade import Knows
from tiny import one_thread  # noqa: F401

from diffkern import cli, images, load, ops, restore
from diffkern.cascade.recipe import WIDTHS
from diffkern.data import Items
from diffkern.datasets.faces import Faces
from diffkern.image_to_image import gray
from diffkern.palette import Damage, damaged, recipe
from diffkern.palette.damage import hole as hole_of
from diffkern.palette.damage import jpeg
from diffkern.system import part_seeds
from diffkern.training import Trainer

FACE = images.from_pixels(Faces(1, 16)[0]["x"])


def draw(model, image, *arguments, **options):
    return restore(model, image, *arguments, steps=2, sampler="ddim", progress=False, **options)


# --- damage ---


def test_a_gray_picture_has_the_luma_in_every_channel():
    expected = 0.299 * FACE[0] + 0.587 * FACE[1] + 0.114 * FACE[2]
    assert all(torch.allclose(channel, expected, atol=1e-6) for channel in gray(FACE))
    torch.testing.assert_close(gray(gray(FACE)), gray(FACE))


def test_a_hole_is_a_rectangle_with_noise_of_the_seed():
    assert hole_of((16, 16), (0.0, 0.999, 0.0, 0.999)).sum() == 4 * 11  # a quarter of a side, and nearly three
    mask = hole_of((16, 16), (0.5, 0.5, 0.999, 0.0))[0]
    assert mask[8:, :8].all() and mask.sum() == 64
    x, noise = damaged(FACE, 5, ("hole",)), ops.noise(5, (3, 16, 16), step=0, stream=2)[0]
    new = (x != FACE).any(0)
    rows, columns = new.any(1), new.any(0)
    assert torch.equal(new, rows[:, None] & columns) and torch.equal(x[:, new], noise[:, new])


def test_a_jpeg_is_what_pillow_reads_again():
    pixels = images.to_uint8(FACE[None])[0]
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=10, subsampling=2)
    expected = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    np.testing.assert_array_equal(images.to_uint8(jpeg(FACE, 10)[None])[0], expected)


def test_a_damage_is_a_function_of_its_seed_and_each_kind_is_as_likely():
    flat = torch.zeros(3, 16, 16)  # neither luma nor a JPEG changes it much
    flat[0] = 0.5
    found = [damaged(flat, seed) for seed in range(90)]
    assert all(torch.equal(damaged(flat, seed), found[seed]) for seed in (0, 50))
    kinds = ["gray" if torch.equal(x, gray(flat)) else "hole" if x.abs().max() > 0.9 else "jpeg" for x in found]
    assert all(kinds.count(kind) > 15 for kind in ("gray", "hole", "jpeg"))
    data = Items(Faces(2, 16, transform=Damage()))
    batch = data.batch(torch.tensor([0, 1, 0]), torch.tensor([4, 4, 5]))
    seed = int(torch.randint(2**63 - 1, (), generator=torch.Generator().manual_seed(5)))
    assert torch.equal(batch.conditions["image"][2], damaged(batch.x_0[2], seed))  # that of the example
    with pytest.raises(ValueError, match="kinds: expected some of gray, hole, jpeg, got 'blur'"):
        damaged(FACE, 0, ("blur",))


# --- restoration ---


def test_a_picture_is_restored_n_times_by_what_the_network_is_given():
    face, knows = Faces(1, 8)[0]["x"], Knows()
    face = images.from_pixels(face)
    drawn = draw(knows.model(), face)
    assert drawn.shape == (4, 3, 8, 8)
    torch.testing.assert_close(drawn, face.expand(4, -1, -1, -1), rtol=0, atol=1e-5)
    assert draw(knows.model(), gray(face)[:1], 2).shape == (2, 3, 8, 8)
    assert torch.equal(knows.seen[-1]["image"][0], gray(face))  # one channel, as three
    assert draw(knows.model(), face, seeds=[3]).shape[0] == 1


def test_what_is_no_hole_stays_exactly_as_it_is():
    face, knows = images.from_pixels(Faces(1, 8)[0]["x"]), Knows()
    mask = hole_of((8, 8), (0.5, 0.5, 0.5, 0.5))
    drawn = draw(knows.model(), face, seeds=[6, 7], mask=mask)
    kept = (mask == 0).expand(2, 3, -1, -1)
    assert torch.equal(drawn[kept], face.expand(2, -1, -1, -1)[kept])
    noise = ops.noise(part_seeds(torch.tensor([6, 7]), 1), (3, 8, 8), step=0, stream=2)
    assert torch.equal(knows.seen[0]["image"], torch.where(kept, face, noise))  # as in training, by a seed of its own
    assert torch.equal(draw(knows.model(), face, seeds=[6, 7], mask=mask.bool()), drawn)
    soft = draw(knows.model(), face, seeds=[6], mask=0.5 * mask)
    assert torch.equal(soft[0, :, mask[0] == 0], face[:, mask[0] == 0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: restore(m, FACE), ValueError, r"image: expected the model's shape \(3, 8, 8\), got \(3, 16, 16\)"),
        (lambda m: restore(m, FACE[None]), TypeError, r"image: expected floats \[C, H, W\], got torch.float32 \(1, 3,"),
        (lambda m: restore(m, FACE[:, :8, :8], 2, seeds=[1]), ValueError, "seeds: expected 2, one for each picture"),
        (lambda m: restore(m, FACE[:, :8, :8], mask=torch.ones(2, 8, 8)), ValueError, "mask: expected shape"),
        (
            lambda m: restore(m, FACE[:, :8, :8], mask=torch.full((1, 8, 8), 2.0)),
            ValueError,
            "mask: expected values in",
        ),
        (
            lambda m: restore(m, 127.5 * (FACE[:, :8, :8] + 1)),
            ValueError,
            r"image: expected values in \[-1, 1\], got .* to 2\d\d",
        ),
        (lambda m: restore("fashion-mnist", FACE), ValueError, "model: expected one with the condition image"),
    ],
)
def test_bad_arguments_are_told_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call(Knows().model())


def test_the_recipe_trains_a_model_and_packs_it(tmp_path, monkeypatch):
    small = dict(channels=8, channel_mult=(1, 1), blocks=1, attention_levels=())
    monkeypatch.setitem(WIDTHS, 32, small)
    monkeypatch.setitem(recipe.SETTINGS, "batch_size", 2)
    measured = partial(recipe.measured, n=2, samples=2, steps=2, progress=False)
    monkeypatch.setattr(recipe, "Faces", lambda n=8, **options: Faces(n, **options))
    monkeypatch.setattr(recipe, "measured", lambda model: found.append(measured(model)) or found[-1])
    found = []
    with monkeypatch.context() as stopped:
        stopped.setattr(Trainer, "run", lambda trainer, folder: signal.SIGTERM)
        with pytest.raises(SystemExit, match="143"):
            recipe.train(tmp_path, 1)
    assert not found  # nothing is measured
    recipe.train(tmp_path, 1)
    recipe.pack(tmp_path)
    restored, coarse = found[0]
    assert 20 < coarse < 35 and restored < coarse  # untrained
    model = load(tmp_path / "palette.safetensors")
    assert model.name == "palette" and [c.name for c in model.conditions] == ["image"]
    monkeypatch.chdir(tmp_path)
    images.save_png(images.picture(FACE), "face.png")
    command = ["restore", "--model", "palette.safetensors", "face.png", "--n", "2", "--steps", "1", "--no-progress"]
    for hole in ([], ["--box", "8", "0", "20", "16"]):
        assert cli.main([*command, *hole]) == 0
        settings = images.read_settings("restored.png")
        assert settings["seeds"] == [0, 1] and settings["box"] == ([int(side) for side in hole[1:]] or None)
