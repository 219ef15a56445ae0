"""The training description of a checkpoint is checked before a trainer is made of it."""

import dataclasses
import json

import pytest
import tiny
from safetensors.torch import save_file
from tiny import one_thread  # noqa: F401

from diffkern.io.description import checked_training
from diffkern.io.files import read
from diffkern.training import CHECKPOINT, PRESETS, Config, Trainer, new_model


def state(config=None, **changes):
    """The "training" part of a file, with changes to it and to its config; ... takes a key out."""
    part = {"config": dataclasses.asdict(tiny.config()) | (config or {}), "steps": 3, "examples": 12, **changes}
    part = {key: value for key, value in part.items() if value is not ...}
    if isinstance(part.get("config"), dict):
        part["config"] = {key: value for key, value in part["config"].items() if value is not ...}
    return json.loads(json.dumps(part))


@pytest.mark.parametrize("config", [tiny.config(), Config(), *PRESETS.values()])
def test_a_run_s_settings_come_back_as_they_were(config):
    part = json.loads(json.dumps({"config": dataclasses.asdict(config), "steps": 0, "examples": 2**62 - 1}))
    again = checked_training({"training": part}, "f", Config)
    assert json.dumps(dataclasses.asdict(again)) == json.dumps(dataclasses.asdict(config))


def test_settings_that_a_newer_version_added_have_their_defaults():
    part = state({"log_every": ..., "flip": ...})
    assert checked_training({"training": part}, "f", Config).log_every == Config().log_every


BAD = {
    "null": (None, "training: expected an object, got None"),
    "number": (5, "training: expected an object, got 5"),
    "list": ([], r"training: expected an object, got \[\]"),
    "empty": ({}, "training: expected 'config', got"),
    "no steps": (state(steps=...), "training: expected 'steps', got config, examples"),
    "no examples": (state(examples=...), "training: expected 'examples', got"),
    "config null": (state(config=None) | {"config": None}, "config: expected an object, got None"),
    "no network": (state({"network": ...}), "config: expected 'network', got"),
    "no seed": (state({"seed": ...}), "config: expected 'seed', got"),
    "newer option": (
        state({"new_option": 1}),
        r"config: expected .*, got also 'new_option' \(written by a newer diffkern\?\)",
    ),
    "examples 2^63": (state(examples=2**63), r"examples: expected an int in 0..2\^62 - 1, got 92233"),
    "examples 2^62": (state(examples=2**62), "examples: expected an int"),
    "examples -7": (state(examples=-7), "examples: expected an int"),
    "steps 10^30": (state(steps=10**30), "steps: expected an int"),
    "steps -5": (state(steps=-5), "steps: expected an int"),
    "steps text": (state(steps="5"), "steps: expected an int in .*, got '5'"),
    "steps true": (state(steps=True), "steps: expected an int"),
    "steps float": (state(steps=5.0), "steps: expected an int"),
    "batch size huge": (state({"batch_size": 2**62}), r"batch_size: expected an int below 2\^62, got"),
    "batch size text": (state({"batch_size": "4"}), "batch_size: expected int, got '4'"),
    "flag 1": (state({"flip": 1}), "flip: expected bool, got 1"),
    "rate text": (state({"lr": "fast"}), "lr: expected float, got 'fast'"),
    "rate huge": (state({"lr": 10**400}), r"lr: expected an int below 2\^62, got"),
    "betas null": (state({"betas": None}), "betas: expected tuple"),
    "betas text": (state({"betas": ["a", "b"]}), "betas: expected two numbers"),
    "network list": (state({"network": [1]}), r"network: expected dict, got \[1\]"),
    "rate 0": (state({"lr": 0}), "lr: expected a number > 0, got 0"),
}


@pytest.mark.parametrize(("part", "message"), BAD.values(), ids=BAD)
def test_a_training_part_that_no_run_wrote_says_why(part, message):
    with pytest.raises(ValueError, match=f"^f: {message}"):
        checked_training({"training": part}, "f", Config)


def run() -> Trainer:
    config = tiny.config()
    return Trainer(new_model(tiny.dataset(), config), tiny.dataset(), config)


@pytest.mark.parametrize("name", ["empty", "examples 2^63", "steps -5", "newer option", "null"])
def test_a_checkpoint_whose_training_is_bad_is_refused_by_its_name(tmp_path, name):
    path = tmp_path / CHECKPOINT
    run().save(path)
    description, tensors = read(path)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(tensors, path, metadata={"diffkern": json.dumps(description | {"training": BAD[name][0]})})
    with pytest.raises(ValueError, match=f"^{path}: .*{BAD[name][1]}"):
        Trainer.resume(path, tiny.dataset())
