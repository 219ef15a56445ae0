"""Conditions, beside x_t, t and labels: numbers, vectors and images, by name."""

import copy
import inspect
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from test_unclip import filled
from tiny import one_thread  # noqa: F401
from tolerances import ENGINE

from diffkern import Model, Run, Schedule, UNet, images, optimize, sample, torch_ops
from diffkern.arguments import DESCRIBED
from diffkern.conditions import Condition
from diffkern.networks.conditioning import TAKEN
from diffkern.training import Config, Trainer

SHAPES = {"image": (3, 8, 8), "augmentation": ()}
"""A picture beside x_t, and its noise level beside t."""


def network(**changes) -> UNet:
    torch.manual_seed(0)
    options = dict(channels=8, channel_mult=(1, 1), blocks=1, attention_levels=(), groups=4, conditions=SHAPES)
    return filled(UNet(3, **options | changes)).requires_grad_(False)


def given(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return dict(image=torch.randn(n, 3, 8, 8, generator=generator), augmentation=torch.arange(n) * 30.0)


def test_the_engine_is_the_network_with_a_picture_and_a_second_noise_level():
    wide = network(channels=16, groups=8)
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 5, 900])
    with torch_ops():
        exact = copy.deepcopy(wide).double()(x.double(), t, **{k: v.double() for k, v in given(3).items()})
    engine = optimize(wide)
    error = (engine(x, t, **given(3)) - exact).abs().max() / exact.abs().max()
    assert error < ENGINE
    alone = [engine(x[i : i + 1], t[i : i + 1], **{k: v[i : i + 1] for k, v in given(3).items()}) for i in range(3)]
    assert torch.equal(torch.cat(alone), engine(x, t, **given(3)))


def test_guidance_takes_away_the_picture_and_keeps_the_noise_level():
    model = Model(network(), Schedule.linear(20), shape=(3, 8, 8))
    draw = dict(steps=2, clip=False, progress=False)
    plain, free = (sample(model, 2, **draw | given(2) | change) for change in ({}, dict(image=torch.zeros(3, 8, 8))))
    assert torch.equal(sample(model, 2, guidance=0.0, **draw, **given(2)), free) and not torch.equal(plain, free)
    none = {name: value for name, value in given(2).items() if name != "image"}
    assert torch.equal(sample(model, 2, **draw, **none), free)
    with pytest.raises(ValueError, match="augmentation: expected a value, for the network has none"):
        sample(model, 2, **draw, image=given(2)["image"])


def test_bytes_of_an_image_are_pixels_and_a_number_is_one_for_all():
    image, level = Condition("image", (3, 8, 8)), Condition("level", ())
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(image.batch(pixels, 2), images.from_pixels(pixels))
    assert level.batch(50, 3).tolist() == [50.0] * 3 and level.batch(0.5, 1).tolist() == [0.5]
    with pytest.raises(TypeError, match="level: expected a tensor, got bool"):
        level.batch(True, 3)
    with pytest.raises(TypeError, match="image: expected a tensor, got int"):
        image.batch(0, 3)


def test_training_drops_and_mirrors_a_picture_with_its_sample_and_shows_what_it_makes_of_pictures():
    pixels = torch.randint(256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    items = [{"x": x, "image": x, "augmentation": float(i)} for i, x in enumerate(pixels)]
    config = Config(batch_size=64, label_dropout=0.5, flip=True)
    run = Trainer(Model(network(), Schedule.linear(20), shape=(3, 8, 8)), items, config)
    x_0, _, draws, conditions = run.batch()
    assert torch.equal(conditions["image"], torch.where(draws.null[:, None, None, None], 0.0, x_0))
    assert torch.equal(conditions["augmentation"], run.index(np.arange(64)).float())
    assert draws.null.any() and draws.flip.any()
    seen = []
    run.model.network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    run.grid(n=3, steps=1)
    assert seen[0]["augmentation"][:3].tolist() == [0, 1, 2]
    assert torch.equal(seen[0]["image"][:3], images.from_pixels(pixels[:3]))


def test_no_condition_has_the_name_of_an_argument_of_sample():
    known = {*inspect.signature(sample).parameters, *(field.name for field in fields(Run)), *DESCRIBED}
    assert known - {"options"} | {"x_t", "t", "x_T", "spacing"} == TAKEN


def test_conditions_enter_by_their_shape():
    """A number, a vector and an image change the output; each is checked by name."""
    torch.manual_seed(0)
    shapes = {"level": (), "z": (5,), "low": (2, 8, 8)}
    net = filled(UNet(3, channels=8, channel_mult=(1, 1), blocks=1, attention_levels=(), groups=4, conditions=shapes))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    given = dict(level=torch.tensor([1.0, 2.0]), z=torch.randn(2, 5), low=torch.randn(2, 2, 8, 8))
    out = net(x, t, **given)
    for name, value in given.items():
        assert not torch.allclose(out, net(x, t, **given | {name: value + 1}), atol=1e-4), name
        with pytest.raises(TypeError, match=f"{name}: expected a tensor, got NoneType"):
            net(x, t, **{other: given[other] for other in given if other != name})
    with pytest.raises(ValueError, match=r"z: expected shape \(2, 5\), got \(2, 4\)"):
        net(x, t, **given | {"z": torch.zeros(2, 4)})
    with pytest.raises(TypeError, match="other: expected one of the network's conditions"):
        net(x, t, **given, other=x)
    model = Model(net, Schedule.linear(10), shape=(3, 8, 8))
    assert [condition.null for condition in model.conditions] == [None, 0.0, 0.0]  # a number has none
    assert "own" not in model.description()
    changed = replace(model, conditions=(*model.conditions[::2], Condition("z", (5,), null=1.0)))
    assert changed.description()["own"] == {"z": "Condition"}  # which no file can hold
    drawn = sample(model, 2, steps=2, progress=False, guidance=2.0, **given)
    assert drawn.shape == x.shape and drawn.isfinite().all()


@pytest.mark.parametrize(
    ("conditions", "error", "message"),
    [
        ([("z", (5,))], TypeError, "conditions: expected a shape by name"),
        ({"t": ()}, ValueError, "conditions: expected names that no argument of sample and no module has, got 't'"),
        ({"type": (4,)}, ValueError, "no module has, got 'type'"),
        ({"progress": ()}, ValueError, "no module has, got 'progress'"),
        ({"z": 5}, TypeError, r"conditions: expected \(\), \(D,\) or \(C, H, W\) of positive ints as z, got 5"),
        ({"z": (5, 5)}, ValueError, "as z, got"),
        ({"z": (0,)}, ValueError, "as z, got"),
    ],
)
def test_conditions_that_are_none_are_refused(conditions, error, message):
    with pytest.raises(error, match=message):
        UNet(3, channels=32, conditions=conditions)
