"""Training a network of one's own, on data of one's own: any module, any map-style dataset, any shape."""

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401
from torch import Tensor, nn

from diffkern import load, sample, save
from diffkern.codec import Codec
from diffkern.conditions import Condition
from diffkern.data import EXAMPLE_STREAM, Dataset, Items
from diffkern.io.files import read
from diffkern.model import Model
from diffkern.philox import words
from diffkern.process import EDM, Process, RectifiedFlow
from diffkern.training import CHECKPOINT, Config, Trainer, new_model
from diffkern.training.draws import step_seed


class Small(nn.Module):
    """A network of points [N, 3], with a tied weight, a BatchNorm, dropout, and a condition."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.read, self.mix = nn.Linear(3, 8), nn.Linear(8, 8)
        self.again = self.mix  # one weight of two names
        self.time, self.label, self.side = nn.Linear(1, 8), nn.Embedding(3, 8), nn.Linear(2, 8)
        self.norm, self.drop, self.write = nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 3)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None, side: Tensor | None = None) -> Tensor:
        h = self.read(x) + self.time(t[:, None].float())
        if labels is not None:
            h = h + self.label(labels % 3)
        if side is not None:
            h = h + self.side(side)
        return self.write(self.drop(self.again(torch.tanh(self.norm(self.mix(h))))))


class Wide(nn.Linear):
    """Eight outputs where three are right."""

    def __init__(self):
        super().__init__(3, 8)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return super().forward(x)


class Points(torch.utils.data.Dataset):
    """Nine points in three dimensions, by what an item is."""

    def __init__(self, item):
        self.x, self.item = torch.linspace(-1, 1, 27).view(9, 3), item

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return self.item(self.x[i], i)


PLAIN = Points(lambda x, i: x)
CONFIG = dict(steps=4, batch_size=4, warmup=0, lr=1e-2, log_every=2, sample_every=1)


def model(dropout: float = 0.0, process=None, **changes) -> Model:
    torch.manual_seed(0)
    process = process or EDM()
    return Model(Small(dropout), process, process.prediction, (3,), clip=False, **changes)


def take(run: Trainer, steps: int) -> list[float]:
    return [run.step() for _ in range(steps)]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


# --- the network ---


def test_a_run_writes_resumes_to_the_bit_and_its_model_loads_and_samples(tmp_path):
    whole, first = (Trainer(model(0.5), PLAIN, Config(**CONFIG)) for _ in range(2))
    losses = take(whole, 4)
    assert take(first, 2) == losses[:2]
    first.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=model(0.5))
    assert again.config == first.config and take(again, 2) == losses[2:]
    assert_equal(again.tensors(), whole.tensors())
    names = again.tensors()
    assert "network.mix.weight" in names and "network.again.weight" not in names
    assert names["network.norm.num_batches_tracked"] == names["ema.norm.num_batches_tracked"] == 4

    again = Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=model(0.5), steps=6)
    assert again.run(tmp_path, progress=False) is None
    assert sorted(os.listdir(tmp_path)) == [".lock", CHECKPOINT, "log.csv", "loss.png"]  # points are no images
    loaded = load(tmp_path, into=model())
    assert loaded.name == "model" and not loaded.network.training
    points = [sample(m, 2, steps=3, progress=False) for m in (loaded, again.model)]
    assert torch.equal(*points) and points[0].isfinite().all()


def test_a_model_is_saved_with_the_types_of_its_buffers_and_loads_into_another_of_its_kind(tmp_path):
    trained = Trainer(model(), PLAIN, Config(**CONFIG))
    take(trained, 2)
    save(trained.model, tmp_path / "m", dtype=torch.float16)
    loaded = load(tmp_path / "m", into=model())
    assert loaded.network.norm.num_batches_tracked == 2
    torch.testing.assert_close(loaded.network.mix.weight, trained.model.network.mix.weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match=r"into: expected a Model that has what .* hold, network \(Small\), got None"):
        load(tmp_path / "m")
    with pytest.raises(TypeError, match="into: expected a Model, got Small"):
        load(tmp_path / "m", into=model().network)
    with pytest.raises(ValueError, match="into: expected prediction edm, got v"):
        load(tmp_path / "m", into=replace(model(), prediction="v"))
    with pytest.raises(ValueError, match="into: expected schedule .*edm.*, got .*flow"):
        load(tmp_path / "m", into=replace(model(process=RectifiedFlow()), prediction="edm"))
    with pytest.raises(ValueError, match="expected the tensors of its network, got 2 missing"):
        wider = model()
        wider.network.more = nn.Linear(1, 1)
        load(tmp_path / "m", into=wider)
    with pytest.raises(TypeError, match="into: expected a Model, got Small"):
        load(tmp_path / "m", into=model().network)


def test_a_unets_checkpoint_goes_on_in_a_network_that_the_caller_has_made(tmp_path):
    data, config = tiny.dataset(), tiny.config()
    run = Trainer(tiny.model(), data, config)
    take(run, 1)
    run.save(tmp_path / CHECKPOINT)
    mine = tiny.model()
    again = Trainer.resume(tmp_path / CHECKPOINT, data, into=mine)
    assert again.network is mine.network
    assert_equal(again.tensors(), run.tensors())


def test_training_changes_the_network_in_no_other_way():
    mine = model()
    mine.network.read.requires_grad_(False)
    mine.network.norm.eval()
    before = {key: tensor.clone() for key, tensor in mine.network.state_dict().items()}
    flags = {name: module.training for name, module in mine.network.named_modules()}
    run = Trainer(mine, PLAIN, Config(**CONFIG))
    assert run.network is mine.network
    take(run, 2)
    assert {name: module.training for name, module in mine.network.named_modules()} == flags
    assert {n for n, p in mine.network.named_parameters() if not p.requires_grad} == {"read.weight", "read.bias"}
    after = mine.network.state_dict()
    same = {key for key in before if torch.equal(before[key], after[key])}
    frozen = {"read.weight", "read.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    unused = {"label.weight", "side.weight", "side.bias"}
    assert same == frozen | unused and all("hook" not in key or not value for key, value in vars(mine.network).items())


def test_a_trainer_that_refuses_leaves_the_network_as_it_was():
    mine = model()
    mine.network.eval().requires_grad_(False)
    for changes in (dict(steps=5 * 10**18), dict(objective="vlb"), dict(times="importance"), dict(flip=True)):
        with pytest.raises(ValueError):
            Trainer(mine, PLAIN, Config(**CONFIG | changes))
    edm = replace(model(), schedule=tiny.SCHEDULE)
    edm.network.eval().requires_grad_(False)
    with pytest.raises(ValueError, match="times: expected t in"):
        Trainer(edm, PLAIN, Config(**CONFIG | dict(objective="edm")))
    for network in (mine.network, edm.network):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_resumption_that_is_refused_leaves_the_network_as_it_was(tmp_path):
    run = Trainer(model(), PLAIN, Config(**CONFIG))
    take(run, 2)
    run.save(tmp_path / CHECKPOINT)
    mine = model()
    mine.network.eval().requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in mine.network.state_dict().items()}
    refused = (dict(seed=1), dict(steps=1), dict(flip=True), dict(batch_size=3, accumulate=2), dict(snapshot_every=1))
    for changes in refused:
        with pytest.raises(ValueError, match="expected"):
            Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=mine, **changes)
    with pytest.raises(ValueError, match="data: expected items of shape"):
        Trainer.resume(tmp_path / CHECKPOINT, torch.zeros(4, 2), into=mine)
    assert_equal(mine.network.state_dict(), before)
    assert not any(module.training for module in mine.network.modules())
    assert not any(parameter.requires_grad for parameter in mine.network.parameters())


class LoRA(nn.Module):
    """A frozen layer with an adapter of rank 2 beside it (Hu et al. 2022), which begins as zero."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(x))


def with_adapters() -> Model:
    """Adapters around two layers, by hand, of a network that is frozen but for them."""
    mine = model()
    mine.network.requires_grad_(False)
    mine.network.read, mine.network.write = LoRA(mine.network.read), LoRA(mine.network.write)
    return mine


def with_peft_s_adapters() -> Model:
    peft = pytest.importorskip("peft")
    mine = model()
    config = peft.LoraConfig(r=2, target_modules=["read", "write"])
    return replace(mine, network=peft.inject_adapter_in_model(config, mine.network))


@pytest.mark.parametrize("made", [with_adapters, with_peft_s_adapters], ids=["hand", "peft"])
def test_adapters_are_trained_alone_and_resumed_to_the_bit(tmp_path, made):
    run, adapters = Trainer(made(), PLAIN, Config(**CONFIG)), {"down", "up", "lora_A", "lora_B"}
    assert len(run.trained) == 4 and all(adapters & {*name.split(".")} for name in run.trained)
    before = {name: parameter.clone() for name, parameter in run.network.named_parameters()}
    losses = take(run, 2)
    run.save(tmp_path / CHECKPOINT)
    changed = {name for name, parameter in run.network.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == run.trained.keys()
    whole = Trainer(made(), PLAIN, Config(**CONFIG))
    assert take(whole, 2) == losses
    again = Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=made())
    assert again.trained.keys() == run.trained.keys() and take(again, 1) == take(whole, 1)
    assert_equal(again.tensors(), whole.tensors())


class Halves(nn.Module):
    """The mean of two numbers, and a variance of each."""

    def __init__(self):
        super().__init__()
        self.write = nn.Linear(2, 4)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.write(x)


@pytest.mark.parametrize("variance", ["learned", "diagonal"])
def test_a_network_of_ones_own_learns_its_variance_by_the_bound(variance):
    mine = Model(Halves(), tiny.SCHEDULE, "eps", (2,), clip=False, variance=variance)
    run = Trainer(mine, torch.linspace(-1, 1, 18).view(9, 2), Config(**CONFIG | dict(objective="vlb")))
    before = mine.network.write.bias.detach().clone()
    assert all(math.isfinite(loss) for loss in take(run, 2))
    assert (mine.network.write.bias != before).all()
    assert sample(run.model, 2, sampler="ddpm", steps=3, progress=False).isfinite().all()
    with pytest.raises(ValueError, match="objective: expected one of hybrid, vlb with a network of a learned variance"):
        Trainer(mine, torch.zeros(9, 2), Config(**CONFIG | dict(objective="simple")))


class Labelled(nn.Module):
    """A network of images that needs labels, of which nobody says how many there are."""

    def __init__(self):
        super().__init__()
        self.label, self.seen = nn.Embedding(3, 64), []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        self.seen.append(labels)
        return self.label(labels).view(-1, 1, 8, 8)


def test_samples_of_labels_without_names_have_those_of_the_first_items(tmp_path):
    mine, data = Model(Labelled(), EDM(), "edm", (1, 8, 8)), tiny.dataset()
    pairs = list(zip(data.images, data.labels.tolist(), strict=True))
    run = Trainer(mine, pairs, Config(**CONFIG | dict(label_dropout=0.0)))
    run.model.network.seen.clear()
    run.grid(n=12, steps=1)
    assert run.model.network.seen[0].tolist() == [*range(3), *range(3), *range(3), 0, 0, 1]


@dataclass(frozen=True)
class Circle(Process):
    """x_t = cos(t) x_0 + sin(t) eps: a process that diffkern has not."""

    t_max: float = 1.5

    def alpha(self, t):
        return np.cos(t)

    def sigma(self, t):
        return np.sin(t)


@pytest.mark.parametrize("network", [Small, None], ids=["own", "unet"])
def test_a_process_of_ones_own_is_trained_and_comes_back_by_into(tmp_path, network):
    def made(process: Process) -> Model:
        if network is None:
            return Model(tiny.model(classes=None).network, process, "v", (1, 8, 8))
        return replace(model(process=process), prediction="v")

    data = PLAIN if network else tiny.dataset(classes=None)
    whole, first = (Trainer(made(Circle()), data, Config(**CONFIG)) for _ in range(2))
    losses = take(whole, 2)
    assert take(first, 1) == losses[:1]
    first.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, data, into=made(Circle()))
    assert take(again, 1) == losses[1:] and again.config == whole.config
    loaded = load(tmp_path, into=made(Circle()))
    assert loaded.schedule == Circle() and sample(loaded, 2, steps=2, progress=False).isfinite().all()
    with pytest.raises(ValueError, match=r"into: expected a Model .*, .*schedule \(Circle\(t_max=1.5\)\).*, got None"):
        load(tmp_path)
    with pytest.raises(ValueError, match="into: expected own .*t_max=1.5.*, got .*t_max=1.4"):
        load(tmp_path, into=made(Circle(t_max=1.4)))
    with pytest.raises(ValueError, match="into: expected schedule {}, got .*edm"):
        load(tmp_path, into=replace(made(EDM()), prediction="v"))


# --- the data ---


@pytest.mark.parametrize(
    ("item", "labels"),
    [
        (lambda x, i: x.double(), None),
        (lambda x, i: x.numpy(), None),
        (lambda x, i: (x, i % 3), [0, 1, 2, 0]),
        (lambda x, i: [x, torch.tensor(i % 3)], [0, 1, 2, 0]),
        (lambda x, i: {"x": x, "label": np.int32(i % 3)}, [0, 1, 2, 0]),
    ],
    ids=["double", "numpy", "tuple", "list", "dict"],
)
def test_items_of_many_kinds_are_read(item, labels):
    batch = Items(Points(item)).batch(torch.arange(4))
    assert torch.equal(batch.x_0, PLAIN.x[:4]) and batch.x_0.dtype == torch.float32
    assert (batch.labels if labels is None else batch.labels.tolist()) == labels


def test_items_of_bytes_are_pixels():
    images = tiny.dataset().images
    assert torch.equal(Items(images).batch(torch.arange(3)).x_0, Dataset(images).x_0(torch.arange(3)))


def test_images_of_ones_own_train_as_the_dataset_of_them():
    data, config = tiny.dataset(), tiny.config()
    pairs = list(zip(data.images, data.labels.tolist(), strict=True))
    runs = [Trainer(tiny.model(), given, config) for given in (data, pairs)]
    assert take(runs[0], 2) == take(runs[1], 2)
    assert_equal(runs[0].tensors(), runs[1].tensors())


def test_what_an_item_draws_is_drawn_again_by_a_run_that_resumes(tmp_path):
    def noisy() -> Points:
        return Points(lambda x, i: x + 0.1 * torch.randn(3))

    mine, other, third = model(), model(), model()
    before = torch.get_rng_state()
    whole, first = (Trainer(m, noisy(), Config(**CONFIG)) for m in (mine, other))
    losses = take(whole, 3)
    take(first, 2)
    assert torch.equal(torch.get_rng_state(), before)
    first.save(tmp_path / CHECKPOINT)
    torch.manual_seed(5)
    assert take(Trainer.resume(tmp_path / CHECKPOINT, noisy(), into=third), 1) == losses[2:]
    parts = Trainer(model(), noisy(), Config(**CONFIG | dict(accumulate=2)))
    again = Trainer(model(), noisy(), Config(**CONFIG))
    assert torch.equal(torch.cat([parts.batch(part)[0] for part in (0, 1)]), again.batch()[0])  # whatever the batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_processes_that_read_ahead_change_no_bit(tmp_path, accumulate):
    def noisy(x, i):
        return {"x": x + 0.1 * torch.randn(3), "label": i % 3}

    config = Config(**CONFIG | dict(steps=3, accumulate=accumulate))
    runs = [Trainer(model(0.5), Points(noisy), replace(config, workers=workers)) for workers in (0, 2)]
    assert torch.equal(runs[1].batch()[0], runs[1].batch()[0])  # the same again starts anew
    for run, folder in zip(runs, "ab", strict=True):
        assert run.run(tmp_path / folder, progress=False) is None
    assert_equal(runs[1].tensors(), runs[0].tensors())


def test_latents_of_four_channels_train_a_unet_and_are_drawn_unclipped(tmp_path):
    latents = 3 * torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    network = {key: value for key, value in tiny.NETWORK.items() if key != "in_channels"}
    config = tiny.config(network=network, schedule={"kind": "flow"}, sample_every=1)
    run = Trainer(replace(new_model(latents, config), clip=False), latents, config)
    run.run(tmp_path, progress=False)
    assert not list(tmp_path.glob("samples*"))  # there is no picture of four channels
    drawn = load(tmp_path)
    assert drawn.shape == (4, 8, 8) and drawn.clip is False
    assert sample(drawn, 4, steps=2, progress=False).abs().max() > 1


def test_floats_of_pixels_are_warned_of_and_pixels_and_latents_are_not(recwarn):
    pixels = tiny.dataset(classes=None).images
    mine = tiny.model(classes=None)
    Trainer(mine, pixels, tiny.config())
    Trainer(replace(mine, clip=False), 3 * torch.randn(2, 1, 8, 8), tiny.config())
    assert not recwarn.list
    Trainer(mine, pixels.float(), tiny.config())
    (told,) = recwarn.list
    largest = int(pixels[0].max())
    assert "data: expected floats in [-1, 1], or pixels as uint8" in str(told.message)
    assert f"got floats up to {largest} in item 0" in str(told.message) and told.filename == __file__


def test_conditions_reach_the_network_and_are_dropped_with_the_labels(tmp_path):
    side = Condition("side", (2,), null=7.0)
    data = Points(lambda x, i: {"x": x, "label": i % 3, "side": torch.tensor([i, -i])})
    mine = model(conditions=(side,))
    run = Trainer(mine, data, Config(**CONFIG | dict(batch_size=64, label_dropout=0.5)))
    _, labels, draws, conditions = run.batch()
    index = run.index(np.arange(64)).float()
    given = torch.where(draws.null[:, None], 7.0, torch.stack((index, -index), 1))
    assert torch.equal(conditions["side"], given) and torch.equal(labels == -1, draws.null) and draws.null.any()
    seen = []
    mine.network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["side"]), with_kwargs=True)
    run.step()
    assert torch.equal(seen[0], given)
    run.save(tmp_path / CHECKPOINT)
    with pytest.raises(ValueError, match=r"network \(Small\), side \(Condition\), got None"):
        load(tmp_path / CHECKPOINT)
    again = load(tmp_path / CHECKPOINT, into=model(conditions=(side,)))
    assert sample(again, 2, side=torch.zeros(2), steps=2, progress=False).shape == (2, 3)


def test_a_codec_encodes_what_is_trained_on():
    codec = Codec(encode=lambda images: images[:, :3, 0, 0], scale=0.5)
    mine = replace(model(), codec=codec)
    images = torch.linspace(-1, 1, 9 * 12).view(9, 3, 2, 2)
    run = Trainer(mine, images, Config(**CONFIG))
    assert torch.equal(run.batch()[0], 0.5 * images[run.index(np.arange(4)), :, 0, 0])
    assert math.isfinite(run.step())


# --- a step in parts, held-out data, checkpoints that stay ---


def test_a_step_in_parts_is_the_step_of_all():
    config = tiny.config(batch_size=4, label_dropout=0.5)
    runs = [Trainer(tiny.model(), tiny.dataset(), replace(config, accumulate=parts)) for parts in (1, 2, 4)]
    losses = [take(run, 2) for run in runs]
    expected = runs[0].tensors()
    for run, loss in zip(runs[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-5) and run.examples == runs[0].examples
        for key, tensor in run.tensors().items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-3, atol=2e-5)


def test_parts_of_a_step_have_dropout_of_their_own():
    masks = []
    mine = model(0.5)
    mine.network.drop.register_forward_hook(lambda module, args, out: masks.append(out == 0))
    run = Trainer(mine, PLAIN, Config(**CONFIG | dict(batch_size=8, accumulate=2)))
    run.step()
    assert len(masks) == 2 and not torch.equal(*masks)


def test_steps_and_processes_of_a_run_have_seeds_of_their_own():
    places = [(seed, step, rank) for seed in (-1, 0, 1, 2**63) for step in range(5) for rank in range(3)]
    seeds = [step_seed(*place) for place in places]
    assert len({seed % 2**32 for seed in seeds}) == len(places)  # all that torch's generator of a CPU takes
    assert all(0 <= seed < 2**63 for seed in seeds)
    low, high, *_ = words(np.array([4]), 3, EXAMPLE_STREAM, 7)[0].tolist()
    assert step_seed(7, 4, 1) == low | high % 2**31 << 32


def test_dropout_of_a_run_is_that_of_no_other_seed_a_step_later():
    masks = []

    def dropped(seed: int, steps: int) -> Tensor:
        mine = model(0.5)
        mine.network.drop.register_forward_hook(lambda module, args, out: masks.append(out == 0))
        take(Trainer(mine, PLAIN, Config(**CONFIG | dict(seed=seed))), steps)
        return masks[-1]

    assert not torch.equal(dropped(seed=0, steps=2), dropped(seed=1, steps=1))


def test_modules_in_eval_mode_stay_so_in_a_run_that_resumes(tmp_path):
    whole = model(0.5)
    whole.network.drop.eval()
    whole.network.norm.eval()
    whole = Trainer(whole, PLAIN, Config(**CONFIG))
    take(whole, 2)
    whole.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=model(0.5))
    assert [name for name, module in again.network.named_modules() if not module.training] == ["norm", "drop"]
    assert take(again, 2) == take(whole, 2)


def test_the_held_out_loss_is_the_averaged_networks_on_the_same_draws_each_time(tmp_path):
    held_out = Points(lambda x, i: x / 2)
    run = Trainer(model(), PLAIN, Config(**CONFIG | dict(steps=6, validate_every=3, ema=0.0)), validation=held_out)
    before = run.validate()
    assert run.validate() == before
    run.run(tmp_path, progress=False)
    assert run.validate() != before
    lines = [line.split(",") for line in (tmp_path / "log.csv").read_text().splitlines()[1:]]
    assert [(line[0], line[4] != "") for line in lines] == [("2", False), ("4", True), ("6", True)]
    assert float(lines[-1][4]) == pytest.approx(run.validate(), abs=1e-6)
    again = Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=model(), validation=held_out, batch_size=2)
    assert again.validate() == pytest.approx(run.validate(), rel=1e-5)  # whatever the batch
    assert take(again, 1) == take(Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=model(), batch_size=2), 1)


def test_checkpoints_stay_as_often_as_asked_for(tmp_path):
    Trainer(model(), PLAIN, Config(**CONFIG | dict(steps=5, keep_every=2))).run(tmp_path, progress=False)
    kept = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert kept == ["checkpoint-0000002.safetensors", "checkpoint-0000004.safetensors", CHECKPOINT]
    assert [read(tmp_path / name)[0]["training"]["steps"] for name in kept] == [2, 4, 5]
    again = Trainer.resume(tmp_path / kept[0], PLAIN, into=model())
    take(again, 3)
    assert_equal(again.tensors(), Trainer.resume(tmp_path / CHECKPOINT, PLAIN, into=model()).tensors())


# --- what does not fit ---

SIDE = Condition("side", (2,), null=0.0)
BAD = {
    "no parameters": (
        lambda: Trainer(replace(model(), network=nn.Identity()), PLAIN, Config(**CONFIG)),
        ValueError,
        "network: expected one with parameters, got none",
    ),
    "function": (
        lambda: Trainer(replace(model(), network=lambda x, t, labels: x), PLAIN, Config(**CONFIG)),
        TypeError,
        "network: expected a torch.nn.Module that can be trained, got function",
    ),
    "stream": (
        lambda: Trainer(model(), iter([]), Config(**CONFIG)),
        TypeError,
        "data: expected a map-style dataset, with a length and items, got list_iterator",
    ),
    "empty": (lambda: Trainer(model(), [], Config(**CONFIG)), ValueError, "data: expected at least one item, got none"),
    "shape": (
        lambda: Trainer(model(), torch.zeros(4, 2), Config(**CONFIG)),
        ValueError,
        r"data: expected items of shape \(3,\), got \(2,\)",
    ),
    "validation": (
        lambda: Trainer(model(), PLAIN, Config(**CONFIG), validation=torch.zeros(4, 2)),
        ValueError,
        r"validation: expected items of shape \(3,\), got \(2,\)",
    ),
    "no validation": (
        lambda: Trainer(model(), PLAIN, Config(**CONFIG)).validate(),
        ValueError,
        "validation: expected held-out data, got None",
    ),
    "text": (lambda: Items(["a"]).shape, TypeError, "x: expected a tensor, an array or a number in item 0, got str"),
    "integers": (
        lambda: Items([torch.arange(3)]).shape,
        TypeError,
        "x: expected uint8 pixels or floats in item 0, got torch.int64",
    ),
    "uneven": (
        lambda: Items([torch.zeros(3), torch.zeros(2)]).batch(torch.arange(2)),
        ValueError,
        r"x: expected shape \(3,\) in item 1, as in item 0, got \(2,\)",
    ),
    "no labels": (
        lambda: Trainer(tiny.model(), list(tiny.dataset().images), tiny.config()),
        ValueError,
        "data: expected items with labels of 3 classes, got items without labels",
    ),
    "no labels of images": (
        lambda: Trainer(replace(tiny.model(), classes=None), tiny.dataset(classes=None), tiny.config()),
        ValueError,
        "data: expected images with labels of 3 classes, got images without labels",
    ),
    "misspelt": (
        lambda: Trainer(model(), Points(lambda x, i: {"x": x, "lable": 0}), Config(**CONFIG)),
        ValueError,
        "item 0: expected x, and perhaps label, got x, lable",
    ),
    "misspelt condition": (
        lambda: Trainer(model(conditions=(SIDE,)), Points(lambda x, i: {"x": x, "sides": x[:2]}), Config(**CONFIG)),
        ValueError,
        "item 0: expected x, and perhaps label, side, got x, sides",
    ),
    "more than the first": (
        lambda: Items([{"x": torch.zeros(3)}, {"x": torch.zeros(3), "label": 1}]).batch(torch.tensor([1])),
        ValueError,
        "item 1: expected x, as item 0 has, got x, label",
    ),
    "less than the first": (
        lambda: Items([(torch.zeros(3), 1), torch.zeros(3)]).batch(torch.arange(2)),
        ValueError,
        "item 1: expected x, label, as item 0 has, got x",
    ),
    "no x": (lambda: Items([{"label": 1}]).shape, ValueError, "item 0: expected x, and perhaps label, got label"),
    "no parts": (lambda: Items([()]).shape, ValueError, r"item 0: expected x or \(x, label\), got 0 parts"),
    "three parts": (
        lambda: Items([(torch.zeros(3), 1, 2)]).shape,
        ValueError,
        r"item 0: expected x or \(x, label\), got 3 parts",
    ),
    "splits": (lambda: Items({"train": PLAIN}), TypeError, "data: expected items 0..0, got a dict of train"),
    "real label": (
        lambda: Items([(torch.zeros(3), 0.7)]).shape,
        TypeError,
        "label: expected an int in item 0, got 0.7",
    ),
    "several labels": (
        lambda: Items([(torch.zeros(3), [1, 2])]).shape,
        TypeError,
        r"label: expected an int in item 0, got \[1, 2\]",
    ),
    "flip": (
        lambda: Trainer(model(), PLAIN, Config(**CONFIG | dict(flip=True))),
        ValueError,
        r"flip: expected False of what is no image \(C, H, W\), got True with shape \(3,\)",
    ),
    "full": (
        lambda: Trainer(model(variance="full"), PLAIN, Config(**CONFIG)),
        ValueError,
        "variance: expected another one .*diffkern.covariance.*, got 'full'",
    ),
    "classes": (
        lambda: Trainer(tiny.model(classes=None), tiny.dataset(), tiny.config()),
        ValueError,
        r"data: expected the classes None, got \(.*\); Model\(\.\.\., classes=dataset.classes\) names those of a net",
    ),
    "no labels of a network": (
        lambda: Trainer(replace(model(), network=nn.Bilinear(3, 3, 3)), PLAIN, Config(**CONFIG)),
        TypeError,
        r"model: expected a network that is called as network\(x_t, t, labels\), got Bilinear\(input1",
    ),
    "no condition": (
        lambda: Trainer(model(conditions=(SIDE,)), PLAIN, Config(**CONFIG)),
        ValueError,
        "data: expected items with the model's conditions, side, got items of x$",
    ),
    "no condition of held-out items": (
        lambda: Trainer(
            model(conditions=(SIDE,)),
            Points(lambda x, i: {"x": x, "side": x[:2]}),
            Config(**CONFIG),
            validation=PLAIN,
        ),
        ValueError,
        "validation: expected items with the model's conditions, side, got items of x$",
    ),
    "no condition of images": (
        lambda: Trainer(replace(tiny.model(), conditions=(SIDE,)), tiny.dataset(), tiny.config()),
        ValueError,
        "data: expected images with the model's conditions, side, got images alone",
    ),
    "output": (
        lambda: Trainer(replace(model(), network=Wide()), PLAIN, Config(**CONFIG)).step(),
        ValueError,
        r"model: expected an output of shape \(4, 3\), got \(4, 8\)",
    ),
    "parts": (
        lambda: Trainer(model(), PLAIN, Config(**CONFIG | dict(batch_size=4, accumulate=3))),
        ValueError,
        "batch_size: expected a multiple of the 1 processes times 3 parts, got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


# --- the page ---


@pytest.mark.slow
def test_the_example_of_the_page_learns_its_circle(tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Points" in block]
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict = {}
    exec(block, names)
    radius = names["points"].norm(dim=1)
    assert radius.mean().item() == pytest.approx(1, abs=0.1) and radius.std() < 0.2
    angles = torch.atan2(*names["points"].unbind(1))
    assert (torch.histc(angles, 4, -math.pi, math.pi) > 10).all()  # of 100, all around
    assert names["trainer"].steps == 300 and names["trainer"].config.steps == 400
