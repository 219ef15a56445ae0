"""Model files: what is saved is what is loaded, and what is no model says so."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401

from diffkern import model as models
from diffkern.engine import optimize
from diffkern.model import Model, load, read, save
from diffkern.unet import UNet

X = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
T = torch.tensor([3, 17])
LABELS = torch.tensor([2, -1])


def test_a_saved_model_loads_the_same(tmp_path):
    model = tiny.model()
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert torch.equal(loaded(X, T, LABELS), model(X, T, LABELS))
    assert loaded.schedule == model.schedule
    assert (loaded.prediction, loaded.shape, loaded.classes) == ("eps", (1, 8, 8), model.classes)
    assert loaded.name == "tiny"
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimized_model_saves_as_the_model_itself(tmp_path, dtype):
    save(tiny.model(), tmp_path / "m.safetensors")
    save(optimize(tiny.model(), dtype=dtype), tmp_path / "optimized.safetensors")
    assert (tmp_path / "optimized.safetensors").read_bytes() == (tmp_path / "m.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_as_their_rounded_float32(tmp_path, dtype):
    model = tiny.model()
    save(model, tmp_path / "m.safetensors", dtype=dtype)
    assert {tensor.dtype for tensor in load_file(tmp_path / "m.safetensors").values()} == {dtype}
    loaded = load(tmp_path / "m.safetensors").network.state_dict()
    for key, tensor in model.network.state_dict().items():
        assert loaded[key].dtype == torch.float32
        assert torch.equal(loaded[key], tensor.to(dtype).float())


def test_loading_keeps_the_memory_format_of_the_network(tmp_path):
    save(tiny.model(), tmp_path / "m.safetensors")
    fresh = tiny.model().network.state_dict()
    for key, tensor in load(tmp_path / "m.safetensors").network.state_dict().items():
        assert tensor.stride() == fresh[key].stride()


def test_an_unconditional_model_with_learned_variance_round_trips(tmp_path):
    network = UNet(**tiny.NETWORK, learned_variance=True)
    model = Model(network, tiny.SCHEDULE, "v", (1, 8, 8), None)
    save(model, tmp_path / "m.safetensors")
    loaded = load(tmp_path / "m.safetensors")
    assert (loaded.classes, loaded.prediction) == (None, "v")
    assert loaded(X, T).shape == (2, 2, 8, 8)


def test_a_models_default_variance_is_its_own_or_learned_or_small():
    fixed, learned = tiny.model(), tiny.model(learned_variance=True)
    assert (fixed.default_variance, learned.default_variance) == ("fixed_small", "learned")
    for model in (fixed, learned):
        assert dataclasses.replace(model, variance="fixed_large").default_variance == "fixed_large"


def test_a_file_that_tells_of_its_variance_beside_its_network_loads(tmp_path):
    assert torch.equal(load(saved(tmp_path, learned_variance=False))(X, T, LABELS), tiny.model()(X, T, LABELS))


def test_a_shipped_model_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", tmp_path)
    save(tiny.model(), tmp_path / "tiny.safetensors")
    assert models.shipped() == ["tiny"]
    assert load("tiny").name == "tiny"
    with pytest.raises(FileNotFoundError, match=r"model: expected a shipped model \(tiny\) or .*, got 'fashion'"):
        load("fashion")


def test_a_class_is_meant_by_its_name_or_by_its_number():
    model = tiny.model()
    model.classes = ("Cat", "0", "7")
    assert [model.label(text) for text in ("CAT", "0", "1", "2", "7", "None", "-1")] == [0, 1, 1, 2, 2, -1, -1]
    for text in ("3", "-2", "cow", ""):
        with pytest.raises(ValueError, match="labels: expected none or one of 0 Cat, 1 0, 2 7, got '"):
            model.label(text)


@pytest.mark.parametrize("classes", [("a", "b", "A"), ("None", "b", "c"), ("a", "", "")])
def test_classes_that_no_name_tells_apart_are_refused(classes):
    network = tiny.model().network
    with pytest.raises(ValueError, match="classes: expected names other than none that differ by more than case, got"):
        Model(network, tiny.SCHEDULE, "eps", (1, 8, 8), classes)


def test_a_run_s_folder_is_the_model_in_it(tmp_path):
    save(tiny.model(), tmp_path / "checkpoint.safetensors")
    for folder in (tmp_path, f"{tmp_path}/"):
        assert torch.equal(load(folder)(X, T, LABELS), tiny.model()(X, T, LABELS))


def test_a_name_that_is_a_shipped_model_and_a_path_says_how_to_say_either(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "MODELS", tmp_path / "models")
    (tmp_path / "models").mkdir()
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    save(dataclasses.replace(tiny.model(), name="shipped"), tmp_path / "models" / "tiny.safetensors")
    save(dataclasses.replace(tiny.model(), name="mine"), tmp_path / "tiny" / "checkpoint.safetensors")
    with pytest.raises(ValueError, match="^model: expected one model, got 'tiny', .*: say ./tiny for .*") as error:
        load("tiny")
    assert str(tmp_path / "models" / "tiny.safetensors") in str(error.value)
    assert [load(name).name for name in ("./tiny", Path("tiny"), "models/tiny.safetensors")] == [
        "mine",
        "mine",
        "shipped",
    ]


def test_loading_and_saving_leave_torch_s_generator_alone(tmp_path):
    model = tiny.model()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    save(model, tmp_path / "m.safetensors")
    load(tmp_path / "m.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


def test_loaded_weights_are_float32_whatever_torch_s_default_is(tmp_path):
    save(tiny.model(), tmp_path / "m.safetensors")
    torch.set_default_dtype(torch.float64)
    try:
        assert {tensor.dtype for tensor in load(tmp_path / "m.safetensors").network.state_dict().values()} == {
            torch.float32
        }
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_shows_itself_and_leaves_out_what_it_has_not():
    model = tiny.model()
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    assert (
        repr(model)
        == f"""\
Model(
  network=<UNet of {parameters:,} parameters, float32 on cpu>,
  schedule=Schedule.linear(T=20, beta_start=0.001, beta_end=0.3),
  prediction='eps',
  shape=(1, 8, 8),
  classes=<3: class 0, class 1, class 2>,
  name='tiny',
)"""
    )
    assert "on cpu, with a learned variance>" in repr(tiny.model(learned_variance=True))
    bare = Model(lambda x_t, t, labels: x_t, tiny.SCHEDULE, shape=(2,), variance="fixed_large")
    assert "  network=<function>,\n" in repr(bare) and repr(bare).endswith("  variance='fixed_large',\n)")


def test_a_model_with_weights_that_are_not_made_yet_shows_itself():
    lazy = torch.nn.LazyLinear(3)
    assert "network=<LazyLinear>" in repr(Model(lazy, tiny.SCHEDULE, shape=(3,)))


def test_a_network_without_parameters_is_on_the_cpu():
    assert Model(torch.nn.Identity(), tiny.SCHEDULE).device == torch.device("cpu")


class Wrapped(torch.nn.Module):
    """As adapters wrap a layer: its parameters get other names."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.adapter = base_layer, torch.nn.Linear(base_layer.in_features, 2)


def test_a_network_with_wrapped_layers_is_not_saved_as_it_could_not_be_loaded(tmp_path):
    model = tiny.model()
    attention = model.network.mid_block.attentions[0]
    attention.to_q = Wrapped(attention.to_q)
    expected = (
        r"^model: expected the tensors of a UNet of its config \(merge .*\), got 2 missing .*to_q.* and 4 unexpected "
    )
    with pytest.raises(ValueError, match=expected):
        save(model, tmp_path / "m.safetensors")
    assert os.listdir(tmp_path) == []


def test_what_no_file_can_describe_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="^model: name: expected text, got 3$"):
        save(dataclasses.replace(tiny.model(), name=3), tmp_path / "m.safetensors")


def saved(tmp_path, *, tensors=None, **changes):
    """A model file with some of its description or its tensors changed."""
    path = tmp_path / "m.safetensors"
    save(tiny.model(), path)
    description, stored = read(path)
    description |= changes
    description = {key: value for key, value in description.items() if value is not ...}
    stored = tensors(stored) if tensors else stored
    save_file(stored, path, metadata={"diffkern": json.dumps(description)})
    return path


def without(key):
    return lambda stored: {name: tensor for name, tensor in stored.items() if name != key}


def respaced(times):
    config = {"kind": "linear", "T": 4}
    for _ in range(times):
        config = {"kind": "respaced", "schedule": config, "timesteps": [3, 0]}
    return config


BAD_FILES = {
    "format": (dict(format=2), "expected a model of format 1, got format 2"),
    "no format": (dict(format=...), "expected a model of format 1, got format None"),
    "no network": (dict(network=...), "expected 'network' in the model's description"),
    "no schedule": (dict(schedule=...), "expected 'schedule' in the model's description"),
    "unknown option": (
        dict(network={"width": 3}),
        r"network: expected what .* knows, got also 'width' \(written by a ne",
    ),
    "bad groups": (dict(network={**tiny.NETWORK, "groups": 3}), "groups: expected a divisor of every width"),
    "bad schedule": (dict(schedule={"kind": "square"}), "schedule: expected a kind among"),
    "bad prediction": (dict(prediction="noise"), "prediction: expected one of eps, x0, v, .*, got 'noise'"),
    "bad shape": (dict(shape=[8, 8]), r"shape: expected three positive sizes \(C, H, W\), got \[8, 8\]"),
    "no classes": (dict(network=tiny.NETWORK, classes=None), "got 0 missing .* and 1 unexpected .*class_embedding"),
    "other classes": (dict(classes=["a", "b"]), "classes: expected names for the network's num_classes, 3, got 2"),
    "other channels": (dict(shape=[3, 8, 8]), r"shape: expected the network's 1 channels, got \(3, 8, 8\)"),
    "missing tensor": (dict(tensors=without("conv_in.bias")), r"got 1 missing \['conv_in.bias'\]"),
    "other shape": (
        dict(tensors=lambda stored: stored | {"conv_in.bias": torch.zeros(9)}),
        r"conv_in.bias: expected shape \(8,\), got \(9,\)",
    ),
    "format true": (dict(format=True), "expected a model of format 1, got format True"),
    "newer format": (dict(format=2), r"got format 2 \(written by a newer diffkern\?\)"),
    "newer key": (dict(codec="vae"), r"got also 'codec' \(written by a newer diffkern\?\)"),
    "name null": (dict(name=None), "name: expected text, got None"),
    "prefix 5": (dict(prefix=5), "prefix: expected text, got 5"),
    "prefix null": (dict(prefix=None), "prefix: expected text, got None"),
    "prediction list": (dict(prediction=["eps"]), "prediction: expected text, got"),
    "classes 5": (dict(classes=5), "classes: expected a list of names or null, got 5"),
    "classes numbers": (dict(classes=[1, 2, 3]), "classes: expected names, got"),
    "shape true": (dict(shape=[True, 8, 8]), "shape: expected three positive sizes"),
    "shape text": (dict(shape="188"), "shape: expected three positive sizes"),
    "shape huge": (dict(shape=[1, 10**6, 10**6]), "shape: expected at most 268435456 values an image"),
    "shape long": (dict(shape=[10**6] * 10**5), "shape: expected three positive sizes"),
    "network null": (dict(network=None), "network: expected an object, got None"),
    "network list": (dict(network=[1]), r"network: expected an object, got \[1\]"),
    "option text": (
        dict(network={**tiny.NETWORK, "channels": "8"}),
        "channels: expected a number below 2147483648, got",
    ),
    "option float": (dict(network={**tiny.NETWORK, "blocks": 1.5}), "blocks: expected an int >= 1, got 1.5"),
    "option flag": (dict(network={**tiny.NETWORK, "scale_shift": 1}), "scale_shift: expected a bool, got 1"),
    "option huge": (dict(network={**tiny.NETWORK, "channels": 2**63}), "channels: expected a number below"),
    "option infinite": (dict(network={**tiny.NETWORK, "norm_eps": float("inf")}), "norm_eps: expected a number below"),
    "levels": (
        dict(network={**tiny.NETWORK, "channel_mult": [1] * 99}),
        "channel_mult: expected a list of at most 32 i",
    ),
    "blocks": (
        dict(network={**tiny.NETWORK, "blocks": 10**6}),
        "blocks: expected a network of the file's .* tensors, got",
    ),
    "product": (
        dict(network={**tiny.NETWORK, "channels": 2**30, "channel_mult": [2**30], "attention_levels": []}),
        "Storage size calculation overflowed",
    ),
    "schedule null": (dict(schedule=None), "schedule: expected a kind among .*, got None"),
    "schedule list": (dict(schedule={"kind": []}), "schedule: expected a kind among"),
    "schedule option": (dict(schedule={"kind": "linear", "power": 2}), "schedule: expected what .*, got also 'power'"),
    "schedule T": (dict(schedule={"kind": "linear", "T": 10**12}), "T: expected at most 1048576, got 1000000000000"),
    "schedule text": (dict(schedule={"kind": "linear", "T": "9"}), "T: expected an int >= 1, got '9'"),
    "schedule betas": (dict(schedule={"kind": "custom", "betas": [10**400]}), "int too large|betas"),
    "schedule none": (dict(schedule={"kind": "custom"}), "betas"),
    "schedule deep": (
        dict(schedule=respaced(100)),
        "schedule: expected at most 8 schedules, one respaced from another",
    ),
    "bool weights": (
        dict(tensors=lambda s: {k: t.bool() for k, t in s.items()}),
        "expected a type like torch.float32, got torch.bool",
    ),
    "int weights": (
        dict(tensors=lambda s: {k: t.int() for k, t in s.items()}),
        "expected a type like torch.float32, got torch.int32",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_model_says_why(tmp_path, changes, message):
    path = saved(tmp_path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(("option", "value"), [("channels", 4096), ("blocks", 10**6), ("num_classes", 10**8)])
def test_a_size_that_a_file_claims_takes_no_memory_before_its_tensors_have_it(tmp_path, monkeypatch, option, value):
    path = saved(tmp_path, network={**tiny.NETWORK, "num_classes": 3, option: value}, classes=None)
    monkeypatch.setattr(torch, "empty_strided", lambda *args, **options: pytest.fail("memory was taken"))
    if option == "blocks":
        monkeypatch.setattr(models, "UNet", lambda **options: pytest.fail("a network was made"))
    with pytest.raises(ValueError, match="m.safetensors: .*expected"):
        load(path)


def test_a_corrupt_file_is_refused_wherever_it_was_cut(tmp_path):
    path = tmp_path / "m.safetensors"
    save(tiny.model(), path)
    content = path.read_bytes()
    for length in (0, 4, 100, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="expected a safetensors file, got"):
            load(path)


def test_a_stranger_s_safetensors_file_is_refused(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="expected a file written by diffkern"):
        load(tmp_path / "w.safetensors")


def overflowing():
    model = tiny.model()
    model.network.conv_in.bias.data[0] = 1e6
    return model


BAD_CALLS = {
    "load a number": (lambda tmp: load(3), TypeError, "model: expected a name or a path, got int"),
    "load nothing": (lambda tmp: load(tmp / "none"), FileNotFoundError, "or an existing file, got '.*none'"),
    "load a folder": (
        lambda tmp: load(tmp),
        ValueError,
        "expected a file, got a directory without checkpoint.safetensors",
    ),
    "save a network": (
        lambda tmp: save(tiny.model().network, tmp / "m"),
        TypeError,
        "model: expected a Model, got UNet",
    ),
    "save doubles": (lambda tmp: save(tiny.model(), tmp / "m", dtype=torch.float64), ValueError, "dtype: expected"),
    "save an overflow": (
        lambda tmp: save(overflowing(), tmp / "m", dtype=torch.float16),
        ValueError,
        "model: expected weights that are finite in torch.float16, got others in conv_in.bias",
    ),
    "save a function": (
        lambda tmp: save(Model(lambda x, t, labels: x, tiny.SCHEDULE), tmp / "m"),
        TypeError,
        "network: expected a torch.nn.Module to describe, got function",
    ),
    "no module": (
        lambda tmp: Model(5, tiny.SCHEDULE),
        TypeError,
        "network: expected a torch.nn.Module or a .*, got int",
    ),
    "no schedule": (
        lambda tmp: Model(torch.nn.Linear(1, 1), [0.1]),
        TypeError,
        "schedule: expected a Schedule or another process, got list",
    ),
    "numbered classes": (
        lambda tmp: Model(torch.nn.Linear(1, 1), tiny.SCHEDULE, classes=(0, 1)),
        TypeError,
        "classes: expected names, got",
    ),
    "classes of none": (
        lambda tmp: Model(UNet(**tiny.NETWORK), tiny.SCHEDULE, "eps", (1, 8, 8), ("a", "b")),
        ValueError,
        "classes: expected names for the network's num_classes, None, got 2",
    ),
    "channels of an engine": (
        lambda tmp: Model(optimize(UNet(**tiny.NETWORK)), tiny.SCHEDULE, "eps", (3, 8, 8)),
        ValueError,
        "shape: expected the network's 1 channels, got",
    ),
    "no device": (lambda tmp: models.checked_device("gpu"), ValueError, "device: expected cpu or cuda, got 'gpu'"),
    "other device": (lambda tmp: models.checked_device("meta"), ValueError, "device: expected one of cpu.*, got meta"),
    "absent device": (
        lambda tmp: models.checked_device("cuda:99"),
        ValueError,
        "device: expected one of cpu.*, got cuda:99",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_argument_says_what_was_expected(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)
