"""Models that are given a picture beside x_t: upsamplers, cascades of them, their noise, their file, their recipe."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image
from test_unclip import filled, tiny
from tiny import one_thread  # noqa: F401
from torch.nn import functional as F

from diffkern import (
    Cascade,
    Guidance,
    Model,
    Schedule,
    UNet,
    cli,
    images,
    interpolate,
    load,
    ops,
    sample,
    save,
    upscale,
)
from diffkern.cascade import pictures, recipe
from diffkern.cascade.pictures import LowResolution
from diffkern.conditions import Condition
from diffkern.data import Dataset, Items
from diffkern.datasets.faces import Faces
from diffkern.evaluate.distortion import psnr
from diffkern.image_to_image import augmented, resized
from diffkern.io.files import CHECKPOINT, read, write
from diffkern.system import part_seeds
from diffkern.training import Config, Trainer

SCHEDULE = Schedule.cosine(40)
SMALL = dict(channels=8, channel_mult=(1, 1), blocks=1, attention_levels=(), groups=4)


def upsampler(size: int = 16, noised: bool = True) -> Model:
    torch.manual_seed(size)
    conditions = {"image": (3, size, size), **({"augmentation": ()} if noised else {})}
    network = filled(UNet(3, **SMALL, conditions=conditions))
    return Model(network, SCHEDULE, "v", (3, size, size), name=f"to {size}")


def base(size: int = 4, **options) -> Model:
    torch.manual_seed(0)
    return Model(filled(UNet(3, **SMALL, **options)), SCHEDULE, "v", (3, size, size), name="base")


def by_class(*names: str, size: int = 4) -> Model:
    model = base() if size == 4 else upsampler(size)
    network = UNet(3, **SMALL, num_classes=len(names), conditions=model.network.config["conditions"])
    return replace(model, network=network, classes=names)


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    return Cascade(base(num_classes=2), (upsampler(8), upsampler(16)), steps=2, augmentation=10, name="tiny")


PLAIN = dict(progress=False, engine=False)  # the engine would be packed for each of these networks


def draw(model, *arguments, **options):
    return sample(model, *arguments, **PLAIN, **options)


class Knows:
    """A network that takes the picture it is given for x_0, and keeps what it got."""

    def __init__(self):
        self.seen = []

    def __call__(self, x_t, t, labels, **conditions):
        self.seen.append(conditions)
        return conditions["image"]

    def model(self, *names: Condition) -> Model:
        return Model(self, SCHEDULE, "x0", (3, 8, 8), conditions=(Condition("image", (3, 8, 8)), *names))


SMALL_ONES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1


# --- the picture that a network is given ---


def test_a_picture_is_noised_by_the_first_time_steps_of_the_schedule():
    x, seeds = SMALL_ONES, torch.tensor([3, 4, 5])
    assert torch.equal(augmented(x, 0, seeds, SCHEDULE), x)
    z, alpha_bar = ops.noise(seeds, x.shape[1:], step=7, stream=2), SCHEDULE.alpha_bar[6]
    expected = alpha_bar.sqrt() * x.double() + (1 - alpha_bar).sqrt() * z.double()
    torch.testing.assert_close(augmented(x, 7, seeds, SCHEDULE).double(), expected, rtol=0, atol=1e-6)
    levels = torch.tensor([0, 7, 40])
    alone = [augmented(x[i : i + 1], int(levels[i]), seeds[i : i + 1], SCHEDULE) for i in range(3)]
    assert torch.equal(augmented(x, levels, seeds, SCHEDULE), torch.cat(alone))


def test_an_upsampler_gets_the_picture_enlarged_and_noised_by_a_seed_of_its_own():
    knows, seeds = Knows(), torch.tensor([7, 8, 9])
    large = resized(SMALL_ONES, (8, 8))
    drawn = upscale(knows.model(), SMALL_ONES, seeds=seeds, steps=3, sampler="ddim", **PLAIN)
    torch.testing.assert_close(drawn, large, rtol=0, atol=1e-5)  # x_0 is all that it is given
    knows = Knows()
    upscale(knows.model(Condition("augmentation", ())), SMALL_ONES, seeds=seeds, steps=1, augmentation=9, **PLAIN)
    noise_seeds = part_seeds(part_seeds(seeds, 1), 1)  # of the picture of part 1
    assert torch.equal(knows.seen[0]["image"], augmented(large, 9, noise_seeds, SCHEDULE))
    assert knows.seen[0]["augmentation"].tolist() == [9] * 3
    one = upscale(knows.model(), SMALL_ONES[:1, :1], steps=1, **PLAIN)  # a gray one
    assert one.shape == (1, 3, 8, 8)


def test_conditions_of_a_network_of_ones_own_are_shapes_by_name():
    shapes, knows = {"image": (3, 8, 8), "augmentation": ()}, Knows()
    mine = Model(knows, SCHEDULE, "x0", (3, 8, 8), conditions=shapes)
    assert mine.conditions == (Condition("image", (3, 8, 8), null=0.0), Condition("augmentation", ()))
    assert replace(mine, name="again").conditions == mine.conditions
    upscale(mine, SMALL_ONES, steps=1, augmentation=3, **PLAIN)
    assert knows.seen[0]["augmentation"].tolist() == [3] * 3


def test_pictures_are_resized_as_torch_does_and_clamped():
    x = SMALL_ONES * 2
    expected = F.interpolate(x, (8, 8), mode="bicubic").clamp(-1, 1)
    assert torch.equal(resized(x, (8, 8)), expected) and resized(x, (4, 4)) is x


def test_an_item_has_the_picture_that_upscale_would_give():
    schedule, index = Schedule.cosine(1000), torch.zeros(100, dtype=torch.int64)
    data = Items(Faces(1, 8, transform=LowResolution(2, schedule)))
    batch, again = data.batch(index, torch.arange(100)), data.batch(index[:2], torch.arange(2))
    assert torch.equal(batch.conditions["image"][:2], again.conditions["image"])  # a function of an example's seed
    level = batch.conditions["augmentation"]
    assert level.min() >= 0 and level.max() <= pictures.MOST and abs(level.float().mean() - 150) < 35
    plain = Faces(1, 8, transform=LowResolution(2))[0]
    assert torch.equal(plain["image"][None], resized(F.avg_pool2d(batch.x_0[:1], 2), (8, 8)))
    alpha_bar = torch.cat((torch.ones(1).double(), schedule.alpha_bar))[level]
    z = (batch.conditions["image"] - alpha_bar.sqrt().view(-1, 1, 1, 1) * plain["image"]).flatten(1)
    assert (z.square().mean(1) / (1 - alpha_bar))[level > 0].mean() == pytest.approx(1, abs=0.03)


def test_photos_of_a_folder_train_an_upsampler():
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    photos = Dataset(pixels, torch.arange(4) % 2, ("disc", "square"))
    data = Items(photos, transform=LowResolution(2))
    assert data.names == ("x", "image") and data.fingerprint == photos.fingerprint
    item, x = LowResolution(2)(photos[3]), images.from_pixels(pixels[3])
    for other in (pixels[3], (pixels[3], 1), x):  # a label is left out, and floats are as they are
        assert torch.equal(LowResolution(2)(other)["image"], item["image"])
    assert [photos[i]["label"] for i in range(4)] == [0, 1, 0, 1] and photos[0].keys() == {"x", "label"}
    batch = Trainer(upsampler(8, noised=False), data, Config(steps=1, batch_size=2, label_dropout=0.0)).batch()
    assert torch.equal(batch.conditions["image"], resized(F.avg_pool2d(batch.x_0, 2), (8, 8)))
    with pytest.raises(TypeError, match=r"x: expected a picture \[C, H, W\] as a tensor in an item, got None"):
        LowResolution(2)({"image": pixels[0]})


# --- a cascade ---


def test_a_cascade_enlarges_what_its_base_draws(cascade):
    x = draw(cascade, 2, labels=[0, 1])
    small = draw(cascade.base, 2, labels=[0, 1], steps=2)
    assert x.shape == (2, 3, 16, 16) and torch.equal(x, upscale(cascade, small, **PLAIN))
    between = upscale(cascade.upsamplers[0], small, steps=2, augmentation=10, **PLAIN)
    assert torch.equal(x, upscale(cascade, between, **PLAIN))  # by the second alone


def test_a_picture_depends_on_its_seed_alone(cascade):
    x, state = draw(cascade, seeds=[5, 6], labels=0, batch_size=2), torch.get_rng_state()
    assert torch.equal(draw(cascade, seeds=[6, 9], labels=0, batch_size=2)[0], x[1])
    assert not torch.equal(x[0], x[1]) and torch.equal(state, torch.get_rng_state())
    for change in (dict(augmentation=0), dict(augmentation=30), dict(steps=3), dict(guidance=3.0)):
        assert not torch.equal(draw(cascade, seeds=[5, 6], labels=0, batch_size=2, **change), x), change
    assert torch.equal(draw(cascade, seeds=[5, 6], labels=0, batch_size=2, augmentation=10, steps=2), x)


def test_options_go_to_the_parts_that_they_concern(cascade):
    steps = []
    start = dict(x_T=torch.randn(2, 3, 4, 4))
    given = upscale(cascade, draw(cascade.base, 2, steps=2, sampler="ddim", **start), sampler="ddim", **PLAIN)
    drawn = draw(cascade, 2, sampler="ddim", callback=lambda step: steps.append(tuple(step.x_t.shape)), **start)
    assert torch.equal(drawn, given) and steps == [(2, 3, 16, 16)] * 2
    shapes = {"image": (3, 8, 8)}
    by_class = Model(filled(UNet(3, **SMALL, num_classes=2, conditions=shapes)), SCHEDULE, "v", (3, 8, 8))
    found = draw(Cascade(cascade.base, (by_class,), steps=1), 1, labels=1)
    image = {"image": resized(draw(cascade.base, 1, labels=1, steps=1), (8, 8))}
    assert torch.equal(found, draw(by_class, seeds=part_seeds(torch.arange(1), 1), labels=1, steps=1, **image))


def test_frames_between_two_share_the_noise_of_one_seed(cascade):
    frames = interpolate(cascade, 3, 4, 3, labels=0, **PLAIN)
    ends = interpolate(cascade.base, 3, 4, 3, labels=0, steps=2, **PLAIN)
    assert torch.equal(frames, upscale(cascade, ends, seeds=[0] * 3, **PLAIN))
    picture = torch.rand(3, 16, 16) * 2 - 1
    assert interpolate(cascade, picture, 4, 2, labels=0, **PLAIN).shape == (2, 3, 16, 16)


BAD = {
    "level": (lambda c: draw(c, 1, augmentation=41), ValueError, r"augmentation: expected .* in 0\.\.40, got 41"),
    "negative": (lambda c: draw(c, 1, augmentation=-1), ValueError, "augmentation: expected an int >= 0, got -1"),
    "not noised": (
        lambda c: upscale(upsampler(8, noised=False), SMALL_ONES, augmentation=3),
        ValueError,
        "augmentation: expected None, as no model is given noised pictures, got 3",
    ),
    "large": (
        lambda c: upscale(c, torch.zeros(1, 3, 16, 16)),
        ValueError,
        r"small: expected pictures smaller than the model's \(8 x 8, 16 x 16\), got 16 x 16",
    ),
    "one": (lambda c: upscale(c, torch.zeros(3, 4, 4)), TypeError, r"small: expected floats \[N, C, H, W\], got"),
    "bytes": (lambda c: upscale(c, torch.zeros(1, 3, 4, 4).byte()), TypeError, "small: .*, got torch.uint8"),
    "pixels": (
        lambda c: upscale(c, torch.full((1, 3, 4, 4), 100.0)),
        ValueError,
        r"small: expected values in \[-1, 1\], got 100 to 100",
    ),
    "proportions": (
        lambda c: upscale(c, torch.zeros(1, 3, 7, 5)),
        ValueError,
        "small: expected pictures with the proportions of the model's, got 7 x 5 to 8 x 8",
    ),
    "channels": (lambda c: upscale(c, torch.zeros(1, 2, 4, 4)), ValueError, "small: expected 1 or 3 channels, got 2"),
    "seeds": (lambda c: upscale(c, SMALL_ONES, seeds=[1]), ValueError, "seeds: expected 3, one for each .*, got 1"),
    "model": (lambda c: upscale(c.base, SMALL_ONES), ValueError, "model: expected .* image .*, got base with none"),
    "conditions": (lambda c: replace(c.base, conditions=["image"]), TypeError, "conditions: expected Conditions, or"),
    "condition": (lambda c: replace(c.base, conditions={"image": 3}), TypeError, "conditions: image: expected "),
    "without condition": (
        lambda c: upscale(replace(c.upsamplers[0], network=Knows(), conditions=()), SMALL_ONES),
        ValueError,
        r'with none; a network of your own: Model\(\.\.\., conditions={"image": \(3, 8, 8\)}\)',
    ),
    "name": (lambda c: upscale(lambda x, t: x, SMALL_ONES), TypeError, "model: expected a Model, or the name"),
    "misspelt": (lambda c: draw(c, 1, augmentaton=3), TypeError, "augmentaton: expected augmentation, an option of"),
    "option": (lambda c: draw(c, 1, prompt="cat"), TypeError, "prompt: expected"),
    "a lone upsampler": (lambda c: Cascade(c.base, c.upsamplers[0]), TypeError, "upsamplers: .* of Models, got Model"),
    "a name": (lambda c: Cascade("run", c.upsamplers), TypeError, r"base: expected a Model, got 'run' \(load reads it"),
    "names": (lambda c: Cascade(c.base, ["up"]), TypeError, "upsamplers: expected a Model, got 'up'"),
    "none": (lambda c: Cascade(c.base, ()), ValueError, "upsamplers: expected 1 to 15 models, got 0"),
    "order": (lambda c: Cascade(c.base, c.upsamplers[::-1]), ValueError, r"model: .* larger than \(3, 16, 16\), got"),
    "classes": (
        lambda c: Cascade(by_class("disc", "square"), [by_class("square", "disc", size=8)]),
        ValueError,
        r"model: expected one with the classes of base, \('disc', 'square'\), got to 8 with \('square', 'disc'\)",
    ),
    "number of classes": (
        lambda c: Cascade(c.base, [by_class("a", "b", "c", size=8)]),
        ValueError,
        "model: expected one with the classes of base, 2, got to 8 with 3",
    ),
    "classes of a worse network": (
        lambda c: draw(by_class("a", "b"), 1, labels="a", guidance=Guidance(2.0, network=by_class("b", "a"))),
        ValueError,
        r"network: expected one with the classes of base, \('a', 'b'\), got base with \('b', 'a'\)",
    ),
    "stretched": (
        lambda c: Cascade(replace(c.base, shape=(3, 4, 2)), c.upsamplers),
        ValueError,
        r"model: expected one of pictures with the proportions of \(3, 4, 2\), got to 8 of \(3, 8, 8\)",
    ),
    "shape": (
        lambda c: Cascade(c.base, (replace(upsampler(8), shape=(3, 16, 16)),)),
        ValueError,
        r"model: expected one with the condition image of the shape of its samples, \(3, 16, 16\), got to 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_by_name(cascade, name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(cascade)


def test_a_file_holds_a_cascade_and_the_commands_draw_from_it(cascade, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save(cascade, "tiny.safetensors")
    loaded = load("tiny.safetensors")
    assert (loaded.name, loaded.steps, loaded.augmentation) == ("tiny", 2, 10)
    assert torch.equal(draw("tiny.safetensors", 2), draw(cascade, 2))
    small = SMALL_ONES.clone()
    assert torch.equal(upscale("tiny.safetensors", small, **PLAIN), upscale(cascade, small, **PLAIN))
    assert cli.main(["sample", "--model", "tiny.safetensors", "--n", "2", "-o", "augmentation=5", "--no-progress"]) == 0
    told = json.loads(Image.open("samples.png").text[images.KEY])
    assert told["augmentation"] == 5 and told["steps"] == 2
    images.save_png(images.picture(small[0]), "small.png")
    command = ["upscale", "--model", "tiny.safetensors", "small.png", "--n", "2", "--steps", "1", "--no-progress"]
    assert cli.main(command) == 0 and Image.open("upscaled.png").size[0] == 2 * 64 + 3 * images.GAP
    assert cli.main([*command, "--size", "16"]) == 2
    assert "image: expected fewer pixels a side than the 16 of the model, got --size 16" in capsys.readouterr().err
    images.save_png(images.picture(torch.zeros(3, 20, 20)), "large.png")
    assert cli.main(["upscale", "--model", "tiny.safetensors", "large.png"]) == 2
    assert "of the model, got 20 pixels a side, which --size can shrink" in capsys.readouterr().err
    assert cli.main(["upscale", "small.png"]) == 2
    assert "the following arguments are required: --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d | {"augmentation": -1}, "augmentation: expected an int >= 0, got -1"),
        (lambda d: d | {"augmentation": None}, "augmentation: expected a number, got None"),
        (lambda d: {k: v for k, v in d.items() if k != "base"}, "base: expected an object, got None"),
        (lambda d: d | {"upsampler_1": d["base"]}, "expected the tensors of its network"),
        (lambda d: {k: v for k, v in d.items() if "upsampler" not in k}, "upsamplers: expected 1 to 15 models, got 0"),
    ],
)
def test_a_damaged_file_is_refused(cascade, tmp_path, change, message):
    path = tmp_path / "tiny.safetensors"
    save(cascade, path)
    description, tensors = read(path)
    write(path, change(description), tensors)
    with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
        load(path)


def test_unclip_enlarges_what_its_decoder_draws(tmp_path):
    plain = tiny((3, 8, 8))
    large = replace(plain, upsampler=upsampler(16), augmentation=10)
    save(large, tmp_path / "large.safetensors")
    for system in (large, load(tmp_path / "large.safetensors")):
        x = draw(system, 2, prompt="red cat", batch_size=2)
        assert x.shape == (2, 3, 16, 16)
    enlarged = sample(plain, 2, prompt="red cat", batch_size=2, **PLAIN)
    mine = large.drawn
    seeds = part_seeds(torch.arange(2), 2)
    picture = augmented(resized(enlarged, (16, 16)), 10, part_seeds(seeds, 1), SCHEDULE)
    expected = draw(mine, seeds=seeds, image=picture, augmentation=10, steps=3, batch_size=2)
    assert torch.equal(draw(large, 2, prompt="red cat", batch_size=2), expected)
    with pytest.raises(ValueError, match="augmentation: expected None, as no model is given noised pictures, got 5"):
        draw(plain, 1, augmentation=5)
    with pytest.raises(ValueError, match=r"model: expected one of pictures larger than \(3, 8, 8\), got to 8"):
        replace(plain, upsampler=upsampler(8))


# --- the recipe ---


def test_the_recipe_trains_a_part_and_packs_all(tmp_path, monkeypatch, capsys):
    small = dict(channels=8, channel_mult=(1, 1), blocks=1, attention_levels=())
    monkeypatch.setattr(recipe, "WIDTHS", dict.fromkeys(recipe.WIDTHS, small))
    monkeypatch.setattr(recipe, "Faces", partial(Faces, 8))
    monkeypatch.setattr(recipe, "measured", lambda model: (1.0, 2.0))
    data, make, settings = recipe.PARTS["sr32"]
    monkeypatch.setitem(recipe.PARTS, "sr32", (data, make, settings | {"batch_size": 2}))
    recipe.train_part("sr32", tmp_path, 1)
    assert capsys.readouterr().out == "sr32: PSNR of held-out faces 1.00 dB, of bicubic interpolation 2.00 dB\n"
    for part in ("base", "sr64"):
        (tmp_path / part).mkdir()
        save(recipe.PARTS[part][1](), tmp_path / part / CHECKPOINT)
    packed = recipe.pack(tmp_path)
    assert [model.shape[1] for model in packed.models().values()] == [16, 32, 64]
    assert load(tmp_path / "faces.safetensors").name == "faces" and recipe._part_of(packed, "sr64-plain").shape[1] == 64
    with_noise, without = (recipe.PARTS[part][1]().conditions for part in ("sr32", "sr32-plain"))
    assert [c.name for c in with_noise] == ["image", "augmentation"] and [c.name for c in without] == ["image"]


def test_the_psnr_of_what_an_upsampler_is_given_is_that_of_bicubic_interpolation():
    noise = torch.full((1, 3, 4, 4), 0.02)
    assert psnr(noise, torch.zeros_like(noise)) == pytest.approx(40.0) and psnr(noise, noise) == math.inf
    drawn, bicubic = recipe.measured(Knows().model(), n=2, samples=2, steps=2, sampler="ddim", **PLAIN)
    assert drawn == pytest.approx(bicubic, abs=1e-3) and 15 < bicubic < 35
