"""The command line: what it writes, what it says, and the status that it leaves with."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import one_thread  # noqa: F401

import diffkern
from diffkern import cli, training
from diffkern.cli import evaluate as evaluate_command
from diffkern.cli import main
from diffkern.cli import plot as plot_command
from diffkern.cli import sample as sample_command
from diffkern.cli import train as train_command
from diffkern.cli.options import named
from diffkern.constraints import Quantile
from diffkern.evaluate import Classifier, save_classifier
from diffkern.images import read_settings, to_uint8
from diffkern.model import Model, load, read, save
from diffkern.process import EDM
from diffkern.sampling import sample
from diffkern.schedule import Schedule
from diffkern.training import CHECKPOINT, objectives
from diffkern.training.runs import locked
from diffkern.training.times import LogitNormal
from diffkern.unet import UNet


def environment() -> dict[str, str]:
    """In which a child process finds the package that runs here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


QUIET = ["--no-progress"]
JUDGE = ["evaluate", "--model", "m.safetensors", "--data", "idx"]
TRAIN = [
    *("--batch-size", "4", "--warmup", "2", "--sample-every", "0", "--log-every", "2", "--size", "8"),
    *("--schedule", "linear", "--timesteps", "20", "--no-progress"),
    *("--network", json.dumps({key: value for key, value in tiny.NETWORK.items() if key != "in_channels"})),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's file."""
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    save(tiny.model(), path)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch, saved):
    """A working directory with a model in it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(saved, tmp_path)
    return tmp_path


def write_pictures(folder):
    for label in ("cats", "dogs"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (9, 8), (50 * i, 100, 20)).save(folder / label / f"{i}.png")


@pytest.fixture
def pictures(folder):
    write_pictures(folder / "pictures")
    return "pictures"


# --- sample ---


def test_sample_writes_a_labelled_grid_with_its_settings_inside(folder, capsys):
    assert main(["sample", "--model", "m.safetensors", "--n", "5", "--steps", "4", "--out", "s.png", *QUIET]) == 0
    assert capsys.readouterr().out == "s.png\n"
    settings = read_settings("s.png")
    versions = {"diffkern": diffkern.__version__, "torch": torch.__version__}
    assert settings["seeds"] == [0, 1, 2, 3, 4] and settings["labels"] == [0, 1, 2, 0, 1]
    assert (settings["sampler"], settings["steps"], settings["spacing"]) == ("unipc", 4, "trailing")
    assert settings["model"] == "m.safetensors" and settings["versions"] == versions
    with Image.open("s.png") as image:
        assert image.size == (3 * 68 + 4, 2 * (68 + 14) + 4)  # a column a class


def test_the_model_that_ships_and_fresh_seeds_that_are_told(folder, capsys):
    command = ["sample", "--n", "2", "--steps", "1", "--labels", "Bag", "--seeds"]
    drawn = []
    for _ in range(2):
        assert main([*command, "random", *QUIET]) == 0
        said, name = capsys.readouterr().out.splitlines()
        settings = read_settings(name)
        assert settings["model"] == "fashion-mnist" and said == "--seeds " + " ".join(map(str, settings["seeds"]))
        drawn += settings["seeds"]
    assert len(set(drawn)) == 4


def test_a_label_on_the_command_line_means_what_it_means_in_python(folder, capsys):
    model = dataclasses.replace(tiny.model(12), classes=tuple(sorted(map(str, range(12)))))  # 0, 1, 10, 11, 2 ...
    save(model, "numbers.safetensors")
    command = ["sample", "--model", "numbers.safetensors", "--n", "1", "--steps", "2", *QUIET]
    for text, label in (("1", 1), ("2", 4), ("-1", -1)):
        assert main([*command, f"--label={text}"]) == 0
        assert read_settings("samples.png")["labels"] == [label]
        options = dict(steps=2, sampler="ddim", progress=False)
        assert torch.equal(sample(model, 1, labels=text, **options), sample(model, 1, labels=label, **options))
    with pytest.raises(ValueError, match="^labels: expected none or one of 0 0, 1 1, 2 10, .*, got 'cow'") as error:
        sample(model, 1, labels="cow", progress=False)
    assert main([*command, "--label", "cow"]) == 2
    assert capsys.readouterr().err.endswith(f"diffkern: error: {error.value}\n")


def test_sample_writes_no_image_of_a_network_that_overflows(folder, capsys):
    model = tiny.model()
    torch.nn.init.constant_(model.network.conv_in.weight, 3e38)
    save(model, "overflow.safetensors")
    assert main(["sample", "--model", "overflow.safetensors", "--n", "2", "--steps", "2", *QUIET]) == 2
    assert capsys.readouterr().err == "diffkern: error: x: expected finite images, got NaN or infinity in 2 of 2\n"
    assert not (folder / "samples.png").exists()


def test_sample_draws_what_the_settings_in_the_png_say(folder):
    arguments = ["--seeds", "7", "20:22", "--labels", "class 2", "1", "none", "--guidance", "2", "--npz", "s.npz"]
    assert main(["sample", "--model", "m.safetensors", "--steps", "3", "--batch-size", "2", *arguments, *QUIET]) == 0
    settings = read_settings("samples.png")
    kept = ("seeds", "labels", "sampler", "steps", "spacing", "variance", "eta", "clip", "guidance", "batch_size")
    x = sample(settings["model"], progress=False, **{name: settings[name] for name in kept})
    with np.load("s.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["images"], to_uint8(x))
        assert arrays["seeds"].tolist() == [7, 20, 21] and arrays["labels"].tolist() == [2, 1, -1]
        assert json.loads(str(arrays["settings"])) == settings


KEPT = {
    "a quantile": (Quantile(0.5), [], {"quantile": 0.5}),
    "no clamp": (False, [], False),
    "no clamp, but asked for one": (False, ["--clip"], True),
    "a limit, but asked for none": (0.5, ["--no-clip"], False),
}


@pytest.mark.parametrize(("clip", "options", "recorded"), KEPT.values(), ids=KEPT)
def test_sample_clips_as_the_model_does_unless_told_otherwise(folder, clip, options, recorded):
    model = dataclasses.replace(tiny.model(), clip=clip)
    save(model, "kept.safetensors")
    command = ["sample", "--model", "kept.safetensors", "--n", "2", "--steps", "3", "--labels", "1", "--npz", "s.npz"]
    assert main([*command, *options, *QUIET]) == 0
    assert read_settings("samples.png")["clip"] == recorded
    used = recorded if options else clip
    x = sample(tiny.model(), 2, labels=1, steps=3, spacing="trailing", clip=used, progress=False)
    with np.load("s.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["images"], to_uint8(x))


@pytest.mark.parametrize(("options", "spacing"), [([], "quadratic"), (["--spacing", "linspace"], "linspace")])
def test_sample_spaces_steps_as_the_model_does_unless_told_otherwise(folder, options, spacing):
    save(dataclasses.replace(tiny.model(), spacing="quadratic"), "kept.safetensors")
    command = ["sample", "--model", "kept.safetensors", "--n", "2", "--steps", "8", "--labels", "1", "--npz", "s.npz"]
    assert main([*command, "--gif", "s.gif", *options, *QUIET]) == 0
    assert read_settings("samples.png")["spacing"] == spacing
    x = sample(tiny.model(), 2, labels=1, steps=8, spacing=spacing, progress=False)
    with np.load("s.npz", allow_pickle=False) as arrays, Image.open("s.gif") as gif:
        assert np.array_equal(arrays["images"], to_uint8(x))
        assert gif.n_frames == len(tiny.SCHEDULE.timesteps(8, spacing)) + 1


ALL = ["--steps", "20"]


@pytest.mark.parametrize(("steps", "sampler"), [([], "ddpm"), (ALL, "ddpm"), (["--steps", "19"], "unipc")])
def test_fewer_steps_than_all_mean_unipc(folder, steps, sampler):
    assert main(["sample", "--model", "m.safetensors", "--n", "1", *steps, *QUIET]) == 0
    assert read_settings("samples.png")["sampler"] == sampler


def test_an_unconditional_model_has_a_grid_without_labels(folder):
    save(tiny.model(classes=None), "u.safetensors")
    assert main(["sample", "--model", "u.safetensors", "--n", "4", "--steps", "2", *QUIET]) == 0
    with Image.open("samples.png") as image:
        assert image.size == (2 * 68 + 4, 2 * 68 + 4)
    assert read_settings("samples.png")["labels"] is None


def test_the_gif_runs_from_noise_to_the_result(folder):
    arguments = ["--n", "3", "--steps", "6", "--batch-size", "2", "--gif", "s.gif", "--columns", "3"]
    assert main(["sample", "--model", "m.safetensors", *arguments, *QUIET]) == 0
    with Image.open("s.gif") as gif, Image.open("samples.png") as result:
        assert gif.n_frames == 7  # x_t of every step, and the result
        gif.seek(6)
        assert np.array_equal(gif.convert("L"), result)


def test_a_long_gif_is_thinned(folder, monkeypatch):
    monkeypatch.setattr(sample_command, "GIF_FRAMES", 4)
    assert main(["sample", "--model", "m.safetensors", "--n", "1", "--steps", "10", "--gif", "s.gif", *QUIET]) == 0
    with Image.open("s.gif") as gif:
        assert gif.n_frames == 5


@pytest.mark.parametrize(
    ("options", "steps"), [([], 20), (["--sampler", "ddim"], 20), (["--spacing", "quadratic", "--steps", "8"], None)]
)
def test_no_more_frames_are_kept_than_are_shown(folder, monkeypatch, options, steps):
    monkeypatch.setattr(sample_command, "GIF_FRAMES", 4)
    films = []
    monkeypatch.setattr(sample_command.Film, "frames", lambda film, x: films.append(film) or [Image.new("L", (8, 8))])
    assert main(["sample", "--model", "m.safetensors", "--n", "1", "--gif", "s.gif", *options, *QUIET]) == 0
    steps = steps or len(tiny.SCHEDULE.timesteps(8, "quadratic"))
    assert list(films[0].taken) == list(range(steps))[:: math.ceil(steps / 4)]


# --- interpolate, inpaint ---


def test_interpolate_leads_from_one_seed_s_image_to_the_other_s(folder, capsys):
    command = ["interpolate", "3", "8", "--model", "m.safetensors", "--label", "class 1", "--n", "5", "--steps", "10"]
    assert main([*command, "--out", "i.png", "--gif", "i.gif", *QUIET]) == 0
    assert capsys.readouterr().out == "i.png\ni.gif\n"
    ends = sample(tiny.model(), seeds=[3, 8], labels=1, sampler="ddim", steps=10, progress=False)
    with Image.open("i.png") as drawn, Image.open("i.gif") as gif:
        assert gif.n_frames == 9
        for end, left in zip(to_uint8(ends), (4, 4 + 4 * 68), strict=True):
            assert np.array_equal(np.asarray(drawn)[4:68:8, left : left + 64 : 8], end[..., 0])


def test_interpolate_takes_images_and_mixes_them_at_a_fraction_of_the_run(folder):
    Image.new("L", (8, 8), 255).save("white.png")
    command = ["interpolate", "white.png", "3", "--model", "m.safetensors", "--n", "3", "--steps", "10"]
    assert main([*command, "--out", "i.png", *QUIET]) == 0
    assert main([*command, "--fraction", "0.2", "--out", "m.png", *QUIET]) == 0
    assert read_settings("m.png")["fraction"] == 0.2
    image = diffkern.interpolate(tiny.model(), torch.ones(1, 8, 8), 3, 3, fraction=0.2, steps=10, progress=False)
    with Image.open("m.png") as drawn:
        assert np.array_equal(np.asarray(drawn)[4:68:8, 4:68:8], to_uint8(image)[0, ..., 0])


@pytest.mark.parametrize("where", [["--box", "0", "0", "8", "4"], ["--mask", "mask.png"]], ids=["box", "mask"])
def test_inpaint_keeps_all_but_the_masked_part(folder, capsys, where):
    Image.new("L", (8, 8), 200).save("grey.png")
    mask = Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 8, 4))
    mask.save("mask.png")
    command = ["inpaint", "grey.png", "--model", "m.safetensors", *where, "--n", "2", "--steps", "5", "--seeds"]
    assert main([*command, "random", *QUIET]) == 0
    first = np.asarray(Image.open("inpainted.png"))
    said, name = capsys.readouterr().out.splitlines()
    assert name == "inpainted.png" and said.split()[1:] == [str(seed) for seed in read_settings(name)["seeds"]]
    for left in (4, 72, 140):
        assert (first[4 + 32 : 68, left : left + 64] == 200).all()
    assert (first[4 : 4 + 32, 72:136] != 200).any()
    assert main([*command, *said.split()[1:], *QUIET]) == 0  # the seeds that it told draw the same again
    assert np.array_equal(np.asarray(Image.open(name)), first)


def test_what_a_model_s_size_changes_of_an_image_is_told(folder, capsys):
    Image.new("RGB", (30, 20), (255, 0, 0)).save("red.png")
    Image.new("L", (8, 8), 200).save("grey.png")
    for name in ("red.png", "grey.png"):
        box = ["--box", "0", "0", "8", "8"]  # of the model's 8 x 8 pixels
        assert main(["inpaint", name, "--model", "m.safetensors", *box, "--n", "1", "--steps", "1", *QUIET]) == 0
    told = "image: red.png: 30 x 20 pixels become 8 x 8, its colours become gray, as the model has them\n"
    assert capsys.readouterr().err == told


# --- train, export ---


def test_train_resumes_where_it_was_and_export_ships_its_average(folder, pictures, capsys):
    assert main(["train", "--data", pictures, "--out", "run", "--steps", "2", *TRAIN]) == 0
    assert main(["train", "--data", pictures, "--out", "run", "--steps", "3", *TRAIN]) == 0
    assert "resuming run/checkpoint.safetensors at step 2" in capsys.readouterr().err
    assert main(["train", "--data", pictures, "--out", "whole", "--steps", "3", *TRAIN]) == 0
    (description, tensors), (_, whole) = read(f"run/{CHECKPOINT}"), read(f"whole/{CHECKPOINT}")
    assert all(torch.equal(tensor, whole[key]) for key, tensor in tensors.items())
    assert description["training"]["steps"] == 3 and description["classes"] == ["cats", "dogs"]

    assert main(["export", "run", "--out", "shipped.safetensors"]) == 0
    assert re.search(r"shipped.safetensors: \d+ parameters, 0.\d MB", capsys.readouterr().out)
    shipped = load("shipped.safetensors")
    assert shipped.name == "shipped" and shipped.classes == ("cats", "dogs")
    for key, tensor in shipped.network.state_dict().items():
        assert torch.equal(tensor, tensors[f"ema.{key}"].half().float())


def test_train_tells_what_it_read_and_what_it_left_out(folder, pictures, capsys):
    for name in (".ipynb_checkpoints/cat.png", "cats/0.txt", "dogs/1.heic"):
        (folder / pictures / name).parent.mkdir(exist_ok=True)
        (folder / pictures / name).write_bytes(b"")
    assert main(["train", "--data", pictures, "--out", "run", "--steps", "1", *TRAIN]) == 0
    assert capsys.readouterr().err == (
        "data: 6 images of 3x8x8, 2 classes (cats 3, dogs 3); "
        "left out: 2 files not images (.heic 1, .txt 1), 1 hidden folder\n"
        "warmup: 2 steps, more than the 1 of the run: the learning rate does not reach --lr\n"
    )


def test_a_process_is_named_or_written_out(folder, pictures, begun):
    command = ["train", "--data", pictures, "--size", "8", *SMALL, *QUIET]
    written = '{"kind": "edm", "sigma_data": 0.25}'
    for out, process, config in (
        ("a", "edm", {"kind": "edm", "sigma_data": 0.5, "t_min": 0.002, "t_max": 80.0}),
        ("b", written, {"kind": "edm", "sigma_data": 0.25, "t_min": 0.002, "t_max": 80.0}),
    ):
        assert main([*command, "--out", out, "--process", process]) == 0
        assert begun[-1].config.schedule == config and begun[-1].config.prediction == "edm"
        assert main([*command, "--out", out, "--process", process]) == 0  # what it is
    assert main([*command, "--out", "c", "--process", "flow", "--times", "logit_normal", "--times-std", "2"]) == 0
    assert begun[-1].task.noising.objective == objectives.flow(LogitNormal(0.0, 2.0))
    assert main(["sample", "--model", "a", "--n", "1", "--steps", "2", "--gif", "a.gif", *QUIET]) == 0


def test_the_loss_of_held_out_images_is_measured(folder, pictures, capsys):
    tiny.write_fashion_mnist(folder / "idx")
    small = [*TRAIN, "--validate-every", "1", "--steps", "2"]
    assert main(["train", "--data", pictures, "--validation", f"{pictures}/cats/..", "--out", "run", *small]) == 0
    data = "data: 6 images of 3x8x8, 2 classes (cats 3, dogs 3)\n"
    assert capsys.readouterr().err == f"{data}validation {data}"
    header, line = (folder / "run" / "log.csv").read_text().splitlines()
    assert header.endswith(",validation_loss") and float(line.split(",")[-1]) > 0
    assert main(["train", "--data", pictures, "--validation", "idx", "--out", "run", *small]) == 2
    message = r"validation: expected images of shape (3, 8, 8), got (1, 32, 32)"
    assert message in capsys.readouterr().err


def test_a_preset_is_the_recipe_and_options_change_it(folder, monkeypatch):
    tiny.write_fashion_mnist(folder / "idx")
    runs = []
    monkeypatch.setattr(training.Trainer, "run", lambda run, out, **options: runs.append(run))
    command = ["train", "--data", "idx", "--preset", "fashion-mnist", "--out", "run", "--lr", "1e-3", "--no-bf16"]
    assert main([*command, "--betas", "0.8", "0.9", "--network", '{"channels": 16}']) == 0
    config, preset = runs[0].config, training.PRESETS["fashion-mnist"]
    assert (config.lr, config.bf16, config.betas, config.steps) == (1e-3, False, (0.8, 0.9), preset.steps)
    assert config.network == {**preset.network, "channels": 16}
    assert runs[0].model.name == "fashion-mnist" and len(runs[0].model.classes) == 10


@pytest.fixture
def begun(monkeypatch):
    """The trainers that ``train`` has made, each of which stops before its first step with a checkpoint."""
    trainers = []

    def run(trainer, out, **options):
        trainers.append(trainer)
        os.makedirs(out, exist_ok=True)
        trainer.save(f"{out}/{CHECKPOINT}")

    monkeypatch.setattr(training.Trainer, "run", run)
    return trainers


def test_timesteps_alone_are_those_of_the_default_schedule(folder, pictures, begun):
    command = ["train", "--data", pictures, "--size", "8", *SMALL, *QUIET]
    for out, options, T in (("a", ["--timesteps", "200"], 200), ("b", ["--schedule", "cosine"], 1000)):
        assert main([*command, "--out", out, *options]) == 0
        assert begun[-1].model.schedule.config() == getattr(Schedule, ["linear", "cosine"][out == "b"])(T).config()


def test_a_run_is_resumed_without_saying_again_what_it_is(folder, pictures, begun, capsys):
    grey = '{"in_channels": 1, "channels": 8, "channel_mult": [1, 1], "blocks": 1}'
    command = ["train", "--data", pictures, "--out", "run", *QUIET]
    assert main([*command, "--size", "16", "--network", grey, "--timesteps", "20", "--seed", "3"]) == 0
    assert main([*command, "--lr", "1e-3"]) == 0
    assert begun[1].dataset.shape == (1, 16, 16) and begun[1].config.lr == 1e-3
    assert dataclasses.replace(begun[1].config, lr=begun[0].config.lr) == begun[0].config
    assert f"resuming run/{CHECKPOINT} at step 0, lr 0.0002 -> 0.001\n" in capsys.readouterr().err
    assert main([*command, "--size", "16", "--timesteps", "20", "--schedule", "linear"]) == 0  # what it is


ANOTHER_RUN = [
    (["--preset", "fashion-mnist"], "network: expected that of run/"),
    (["--network", '{"channels": 16}'], "network: expected that of run/"),
    (["--schedule", "cosine"], "schedule: expected that of run/"),
    (["--timesteps", "30"], "schedule: expected that of run/"),
    (["--seed", "1"], "seed: expected that of run/"),
    (["--size", "16"], "size: expected that of run/.*, 8, got 16"),
    (["--data", "pictures/cats"], "data: expected the classes"),
]


def test_what_would_make_it_another_run_is_refused(folder, pictures, begun, capsys):
    command = ["train", "--data", pictures, "--out", "run", *QUIET]
    assert main([*command, "--size", "8", *SMALL, "--timesteps", "20"]) == 0
    for options, message in ANOTHER_RUN:
        assert main([*command, *options]) == 2
        assert re.search(rf"^diffkern: error: {message}", capsys.readouterr().err, re.MULTILINE), message


def test_a_preset_is_applied_to_a_run_of_its_network(folder, pictures, begun):
    network = {**training.PRESETS["fashion-mnist"].network, "in_channels": 3}
    command = ["train", "--data", pictures, "--out", "run", "--size", "8", *QUIET]
    assert main([*command, "--network", json.dumps(network), "--batch-size", "4"]) == 0
    assert main([*command, "--preset", "fashion-mnist"]) == 0
    config = begun[1].config
    assert (config.lr, config.bf16, config.steps, config.batch_size) == (4e-4, True, 60_000, 4)


def test_a_warning_is_a_line(folder, pictures, begun, capsys):
    command = ["train", "--data", pictures, "--out", "run", *QUIET]
    assert main([*command, "--size", "8", *SMALL]) == 0
    os.remove("pictures/cats/0.png")
    assert main(command) == 0
    expected = f"diffkern: warning: data: expected the 6 images of the run of run/{CHECKPOINT}, got 5, and not"
    assert [line.startswith(expected) for line in capsys.readouterr().err.splitlines()].count(True) == 1


def test_a_second_run_in_a_folder_is_one_line(folder, pictures, capsys):
    os.mkdir("run")
    with locked("run"):
        assert main(["train", "--data", "not read", "--out", "run", *QUIET]) == 2
    message = "out: expected a folder that no other run writes to, got 'run', where one is at work"
    assert capsys.readouterr().err == f"diffkern: error: {message}\n"


def test_init_is_a_model_to_fine_tune(folder, pictures, begun, capsys):
    torch.manual_seed(1)
    network = UNet(**{**tiny.NETWORK, "in_channels": 3, "num_classes": 3})
    init = Model(network, tiny.SCHEDULE, "eps", (3, 8, 8), ("a", "b", "c"))
    save(init, "init.safetensors")
    assert main(["train", "--data", pictures, "--out", "run", "--init", "init.safetensors", "--lr", "1", *QUIET]) == 0
    (run,) = begun
    assert run.model.shape == (3, 8, 8) and run.model.classes == ("cats", "dogs") and run.config.lr == 1
    assert run.model.schedule.config() == init.schedule.config()
    assert {**run.network.config, "num_classes": 3} == init.network.config
    assert torch.equal(run.network.conv_in.weight, init.network.conv_in.weight)
    assert "init: 2 of 2 classes begin anew: cats, dogs\n" in capsys.readouterr().err
    assert main(["train", "--data", pictures, "--out", "gray", "--init", "m.safetensors", *QUIET]) == 0
    assert "init: m.safetensors draws gray images: colours of the data become gray\n" in capsys.readouterr().err


def test_a_run_in_this_folder_names_its_model_after_it(folder, pictures, begun):
    assert main(["train", "--data", pictures, "--out", ".", *TRAIN]) == 0
    assert begun[0].model.name == folder.name


def test_sigterm_saves_and_leaves_with_its_status(folder, pictures, monkeypatch, capsys):
    step = training.Trainer.step

    def terminated(trainer):
        if trainer.steps == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(trainer)

    ignoring = []  # what a process does that is about to leave; this one stays
    monkeypatch.setattr(train_command, "ignore_signals", lambda: ignoring.append(True))
    monkeypatch.setattr(training.Trainer, "step", terminated)
    assert main(["train", "--data", pictures, "--out", "run", "--steps", "9", *TRAIN]) == 128 + signal.SIGTERM
    assert ignoring == [True]
    assert read(f"run/{CHECKPOINT}")[0]["training"]["steps"] == 3
    told = f"diffkern: SIGTERM at step 3: saved run/{CHECKPOINT}; run again to resume\n"
    assert capsys.readouterr().err.endswith(told)


def test_a_diverging_run_is_an_error_of_one_line(folder, pictures, capsys):
    assert main(["train", "--data", pictures, "--out", "run", "--steps", "200", *TRAIN, "--lr", "1e30"]) == 2
    summary = r"data: 6 images of 3x8x8, 2 classes \(cats 3, dogs 3\)\n"
    error = r"diffkern: error: loss: expected a finite value, got .*\n"
    assert re.fullmatch(summary + error, capsys.readouterr().err)


# --- evaluate, doctor ---


@pytest.fixture
def judged(folder):
    """A working directory with a model of the classifier's shape, a classifier, and images to judge it by."""
    tiny.write_fashion_mnist(folder / "idx")
    torch.manual_seed(0)
    model = tiny.model(classes=10)
    model.shape = (1, 32, 32)
    save(model, "m.safetensors")
    save_classifier(Classifier(), "c.safetensors", 0.5)
    return folder


FEATURES, CURVES = ["--features", "c.safetensors"], ["--curves", "ddim", "--calls", "1", "--n", "2"]


def test_evaluate_prints_its_tables_and_keeps_its_classifier(judged, capsys):
    os.remove("c.safetensors")
    command = [*JUDGE, *FEATURES, "--n", "8", "--steps", "ddpm:2", "ddim:1", "--loss-n", "3"]
    assert main([*command, *QUIET]) == 0
    first, told = capsys.readouterr()
    classes = ", ".join(f"{label} 2" for label in range(10))
    data = f"data: 20 images of 1x32x32, 10 classes ({classes})\n"
    assert told == f"training {data}held-out {data}"
    assert "Held-out loss of 3 images at each part of t" in first
    number, floor = r"\d+\.\d{3}", r"\| held-out images \|  \| 8 \| "
    assert re.search(rf"{floor}({number} \| ){{5}} \| [\d.]+% \([\d.]+%\.\.[\d.]+%\) \|  \| [\d.]+% \|  \|", first)
    assert re.search(
        rf"\| ddpm \| 2 \| 8 \| ({number} \| ){{5}} \| [^|]+% [^|]+ \| {number} \| [\d.]+% \| {number} \|", first
    )
    assert re.search(r"\| ddim \| 1 \| 8 \| ", first) and "mostly bias" in first
    assert main([*command, *QUIET]) == 0
    timeless = re.compile(r"\| [\d.]+ \|\n")  # the last column is a time
    assert timeless.sub("|\n", capsys.readouterr().out) == timeless.sub("|\n", first)


@pytest.fixture
def rows_of_pixels(folder):
    """A file of TorchScript: means of rows as features."""

    class Rows(torch.nn.Module):
        def forward(self, x):
            return x.mean((1, 3))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export
        torch.jit.trace(Rows(), torch.zeros(2, 3, 8, 8)).save("rows.pt")
    return "rows.pt"


def write_noise(folder, n, seed):
    for label in ("a", "b"):
        os.makedirs(f"{folder}/{label}")
        for i in range(n):
            pixels = np.random.default_rng([seed, i, ord(label)]).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{label}/{i}.png")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_evaluate_measures_a_folder_of_images_and_a_model_by_any_features(folder, rows_of_pixels, capsys):
    for seed, name in enumerate(("real", "others", "mine")):
        write_noise(name, 6, seed)
    command = ["evaluate", "--data", "real", "--validation", "others", "--features", rows_of_pixels, *QUIET]
    assert main([*command, "--model", "mine", "--json", "e.json", "--cache", "kept"]) == 0
    out = capsys.readouterr().out
    assert (
        re.search(r"\| held-out images \|  \| 12 \| .*\n\| images \|  \| 12 \| ", out) and "label agreement" not in out
    )
    found = json.loads((folder / "e.json").read_text())
    assert [row["n"] for row in found["rows"]] == [12, 12] and found["held_out_loss"] is None
    resize = "the shorter side to 8 (Lanczos), the centre cut out"
    assert found["protocol"]["data"]["resize"] == found["protocol"]["samples"][0]["resize"] == resize
    assert found["protocol"]["features"]["sha256"] == hashlib.sha256((folder / "rows.pt").read_bytes()).hexdigest()
    assert (folder / "kept").is_dir()
    network = UNet(**tiny.NETWORK | {"in_channels": 3})
    save(Model(network, EDM(), "edm", (3, 8, 8)), "edm.safetensors")
    drawn = ["--model", "edm.safetensors", "--steps", "heun:3", "--n", "20", "--measures", "distance", "copying"]
    assert main([*command, *drawn]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\n\| edm( \| [\d.e+-]+){11} \|\n", out) and re.search(r"\n\| eps( \| [\d.e+-]+){11} \|\n", out)
    assert "guidance 1.0" in out and "seeds 0..19" in out
    assert re.search(
        r"\| heun \| 3 \| 20 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|\n\nNo floor: expected 20 held-out images", out
    )


def test_evaluate_prints_the_bound_of_test_and_training_images(judged, capsys):
    assert main([*JUDGE, "--nll", "3", "--nll-steps", "4", "--batch-size", "2", *QUIET]) == 0
    header, _, *rows = capsys.readouterr().out.splitlines()[2:]
    assert header.startswith("| images | n | prior | 0..1 | 2..3 |") and header.endswith("| 18..19 | L_0 | sum | +- |")
    assert len(rows) == 2
    for row, name in zip(rows, ("test", "training"), strict=True):
        split, n, *terms, total, error = (cell.strip() for cell in row.strip("|").split("|"))
        assert (split, n) == (name, "3") and float(error) > 0
        assert float(total) == pytest.approx(sum(map(float, terms)), abs=1e-3)


def test_evaluate_compares_samplers_over_network_calls(judged, capsys):
    command = [*JUDGE, "--curves", "ddim", "heun", "ddpm", "--calls", "2", "9", "--n", "2", "--batch-size", "2"]
    assert main([*command, *FEATURES, *QUIET]) == 0
    limit, distance = (table.splitlines() for table in capsys.readouterr().out.split("\n\n")[1::2])
    assert limit[0] == distance[0] == "| sampler | 2 calls | 9 calls |"
    cells = {row.split(" | ")[0][2:]: row.strip("| ").split(" | ")[1:] for row in limit[2:]}
    assert cells["ddpm"] == [] and list(cells) == ["ddim", "heun", "ddpm"]  # it draws noise: there is no limit
    for name in ("ddim", "heun"):
        few, many = map(float, cells[name])
        assert 0 < many < few
    assert [len(row.split("|")) for row in distance[2:]] == [5] * 3
    assert all(float(cell) >= 0 for row in distance[2:] for cell in row.strip("| ").split(" | ")[1:])


def without_matplotlib(name):
    return None if name == "matplotlib" else find_spec(name)


@pytest.mark.parametrize(
    "what", [["--curves", "ddim", "--calls", "1", "--n", "2", *FEATURES], ["--nll", "1", "--nll-steps", "3"]]
)
def test_without_matplotlib_evaluate_prints_its_tables_alone(judged, capsys, monkeypatch, what):
    monkeypatch.setattr(plot_command, "find_spec", without_matplotlib)
    assert main([*JUDGE, *what, "--plot", "p.png", *QUIET]) == 0
    out, told = capsys.readouterr()
    assert "| --- |" in out
    assert told.startswith("plot: matplotlib is not installed, the tables are all: pip install matplotlib\n")
    assert not (judged / "p.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", [[*CURVES, *FEATURES], ["--nll", "1"]])
def test_evaluate_draws_its_tables_with_matplotlib(judged, what):
    pytest.importorskip("matplotlib")
    assert main([*JUDGE, *what, "--plot", "p.png", *QUIET]) == 0
    panels = len(Image.open(judged / "p.png").getcolors(1 << 24)) > 100 and Image.open(judged / "p.png").width // 500
    assert panels == (2 if "--curves" in what else 1)


def test_the_bound_over_t_is_the_mean_of_each_part_of_the_steps():
    terms = torch.tensor([0.0, 8.0, 4.0, 2.0, 1.0, 0.0, 0.5])
    assert evaluate_command._over_t(terms, None) == [(t, terms[t].item()) for t in range(1, 7)]
    assert evaluate_command._over_t(terms, 3) == [(1.5, 6.0), (3.5, 1.5), (5.5, 0.25)]


def test_classifier_trains_one_where_there_is_none_and_it_guides(folder, capsys):
    tiny.write_fashion_mnist(folder / "idx")
    model = tiny.model(classes=10)
    model.shape, model.classes = (1, 32, 32), tuple(map(str, range(10)))  # those of IDX files
    save(model, "clothes.safetensors")
    command = ["classifier", "--classifier", "c.safetensors", "--data", "idx", *QUIET]
    recipe = ["--model", "clothes.safetensors", "--examples", "6", "--batch-size", "3"]
    assert main([*command, *recipe, "--n", "8"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("Accuracy on 8 test images at the time step t\n\n| t | 0 | 2 | 4 |")
    assert re.search(r"\n\| accuracy( \| [\d.]+%){11} \|\n$", first)
    for option, value in (("lr", "0.1"), ("batch-size", "3"), ("seed", "0"), ("examples", "6"), ("model", "m")):
        refused = f"{option.replace('-', '_')}: expected none for c.safetensors, which is trained already, got {value}"
        assert main([*command, f"--{option}", value]) == 2 and refused in capsys.readouterr().err
    assert main([*command, "--n", "8"]) == 0 and capsys.readouterr().out == first
    guided = ["--guide", "c.safetensors", "--guidance", "3", *QUIET]
    options = ["--model", "clothes.safetensors", "--n", "2", "--steps", "1"]
    assert main(["sample", *options, *guided, "--npz", "guided.npz"]) == 0
    settings = read_settings("samples.png")
    assert (settings["guide"], settings["guidance"]) == ("c.safetensors", 3)
    assert main(["sample", *options, "--guidance", "0", "--npz", "free.npz", *QUIET]) == 0
    assert not np.array_equal(np.load("guided.npz")["images"], np.load("free.npz")["images"])
    save_classifier(Classifier(), "features.safetensors", 0.5)
    evaluated = ["evaluate", "--model", "clothes.safetensors", "--data", "idx", "--n", "4", "--steps", "ddim:1"]
    assert main([*evaluated, "--features", "features.safetensors", "--loss-n", "2", *guided]) == 0
    assert "| ddim | 1 | 4 |" in capsys.readouterr().out


def test_a_classifier_needs_a_model_of_time_steps_and_says_so_before_it_reads_data(folder, capsys):
    model = tiny.model()
    save(Model(model.network, EDM(), "edm", model.shape, model.classes), "edm.safetensors")
    assert main(["classifier", "--classifier", "c.safetensors", "--data", "nowhere", "--model", "edm.safetensors"]) == 2
    assert "schedule: expected one of time steps, got EDM(" in capsys.readouterr().err


def test_doctor_gives_its_own_status(monkeypatch):
    import diffkern.doctor

    for status in (0, 1):
        monkeypatch.setattr(diffkern.doctor, "main", lambda status=status: status)
        assert main(["doctor"]) == status


# --- leaving ---


def test_ctrl_c_leaves_with_130(folder, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_command, "sample", interrupted)
    assert main(["sample", "--model", "m.safetensors", *QUIET]) == 130
    assert capsys.readouterr().err == "diffkern: interrupted\n"


def test_the_command_alone_shows_its_help_with_examples(capsys):
    assert main([]) == 0
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert alone == capsys.readouterr().out and "\nexamples:\n  diffkern sample --steps 20 " in alone
    for name in cli.COMMANDS:
        assert f"    {name}" in alone


def test_help_and_version_leave_with_0(capsys):
    for arguments in (["--help"], ["--version"], *([command, "--help"] for command in ("sample", "train", "evaluate"))):
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        assert leaving.value.code == 0
    assert "--label-dropout" in capsys.readouterr().out


def torch_that(tmp_path, does: str) -> dict[str, str]:
    """The environment of a child process whose module torch ``does`` this alone."""
    (tmp_path / "torch.py").write_text(does)
    return environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def test_ctrl_c_during_the_import_of_torch_leaves_with_130_and_one_line(tmp_path):
    env = torch_that(tmp_path, "import signal; signal.raise_signal(signal.SIGINT)")
    command = [sys.executable, "-m", "diffkern", "sample", "--model", "fashion-mnist"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert (done.returncode, done.stderr) == (130, "diffkern: interrupted\n")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_no_torch(tmp_path, option):
    env = torch_that(tmp_path, "raise SystemExit('torch was imported')")
    done = subprocess.run(
        [sys.executable, "-m", "diffkern", option], capture_output=True, text=True, env=env, timeout=120
    )
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "diffkern", "draw"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("diffkern: error: argument COMMAND: invalid choice: 'draw'")


SAMPLE = ["sample", "--model", "m.safetensors", "--n", "2", "--steps", "2"]
FIT = ["train", "--data", "pictures", "--out", "run"]
BETWEEN, HOLE = (["interpolate", "--model", "m.safetensors"], ["inpaint", "--model", "m.safetensors", "m.safetensors"])
SMALL = ["--network", '{"channels": 8, "channel_mult": [1, 1, 1], "blocks": 1}']
BAD_COMMANDS = {
    "no such command": (["draw"], "argument COMMAND: invalid choice: 'draw'"),
    "no such option": ([*SAMPLE, "--colour"], "unrecognized arguments: --colour"),
    "an abbreviation": ([*SAMPLE, "--guid", "2"], "unrecognized arguments: --guid 2"),
    "no such model": (["sample", "--model", "cats"], r"model: expected a shipped model \(.*\) or an existing"),
    "a broken model": (["sample", "--model", "broken.safetensors"], "broken.safetensors: expected a safetensors file"),
    "a folder": (["sample", "--model", "."], "expected a file, got a directory"),
    "n 0": ([*SAMPLE, "--n", "0"], "argument --n: expected at least 1, got 0"),
    "n text": ([*SAMPLE, "--n", "many"], "argument --n: invalid count value: 'many'"),
    "n and seeds": ([*SAMPLE, "--seeds", "1"], "n: expected 1, one for each of --seeds, got 2"),
    "seed text": ([*SAMPLE, "--seeds", "one"], "seeds: expected integers, ranges a:b or random, got 'one'"),
    "seed range": ([*SAMPLE, "--seeds", "1:"], "seeds: expected integers, ranges a:b or random, got '1:'"),
    "empty range": ([*SAMPLE, "--seeds", "3:3"], "seeds: expected at least one, got none in 3:3"),
    "seed too large": ([*SAMPLE, "--n", "1", "--seeds", str(2**64)], "seeds: expected .* got 18446744073709551616"),
    "label": ([*SAMPLE, "--label", "cat"], "labels: expected none or one of 0 class 0, .*, got 'cat'"),
    "label number": ([*SAMPLE, "--label", "3"], "labels: expected none or one of .*, got '3'"),
    "labels too many": ([*SAMPLE, "--labels", "0", "1", "2"], "labels: expected 1 or 2, one for each image, got 3"),
    "no classes": (["sample", "--model", "u.safetensors", "--label", "0"], "labels: expected none, this model has no"),
    "steps too many": ([*SAMPLE, "--steps", "21"], "steps: expected 1 to 20, the length of the schedule, got 21"),
    "sampler": ([*SAMPLE, "--sampler", "plms"], "argument --sampler: invalid choice: 'plms'"),
    "spacing": ([*SAMPLE, "--spacing", "even"], "argument --spacing: invalid choice: 'even'"),
    "eta": ([*SAMPLE, "--eta", "2"], "eta: expected"),
    "eta of ddpm": ([*SAMPLE, "--sampler", "ddpm", "--eta", "1"], "eta: expected 0, its default, with sampler 'ddpm'"),
    "guidance": ([*SAMPLE, "--guidance", "nan"], "guidance: expected a finite number, got nan"),
    "no labels to guide": (["sample", "--model", "u.safetensors", "--guidance", "2"], "guidance: expected 1 without"),
    "dtype": ([*SAMPLE, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "device": ([*SAMPLE, "--device", "gpu"], "device: expected cpu or cuda, got 'gpu'"),
    "threads": ([*SAMPLE, "--threads", "0"], "argument --threads: expected at least 1, got 0"),
    "threads too many": ([*SAMPLE, "--threads", "100000"], "argument --threads: expected at most 1024, got 100000"),
    "batch size": ([*SAMPLE, "--batch-size", "0"], "argument --batch-size: expected at least 1, got 0"),
    "out suffix": ([*SAMPLE, "--out", "s.jpg"], "out: expected a file name that ends in .png, got 's.jpg'"),
    "gif suffix": ([*SAMPLE, "--gif", "s.png"], "gif: expected a file name that ends in .gif, got 's.png'"),
    "npz suffix": ([*SAMPLE, "--npz", "s"], "npz: expected a file name that ends in .npz, got 's'"),
    "out folder": ([*SAMPLE, "--out", "no/s.png"], "out: expected a file in an existing folder, got 'no/s.png'"),
    "no data": (["train", "--data", "no", "--out", "run"], "data: expected 'fashion-mnist', .* or an existing"),
    "no pictures": (["train", "--data", "empty", "--out", "run"], r"empty: expected images \(.*\), got none"),
    "broken idx": (["train", "--data", "idx", "--out", "run"], "idx: expected train-labels-idx1-ubyte or .*gz, got"),
    "out is a file": (["train", "--data", "no", "--out", "m.safetensors"], "out: expected a folder to write to, got"),
    "levels and size": ([*FIT, "--size", "30", *SMALL], "size: expected a multiple of 4 for .* 3 levels, got .* 30"),
    "init and network": ([*FIT, "--init", "u.safetensors", "--network", '{"channels": 16}'], "init: tiny: .*shape"),
    "no such init": ([*FIT, "--init", "cats"], r"model: expected a shipped model \(.*\) or an existing"),
    "preset": ([*FIT, "--preset", "cifar"], "argument --preset: invalid choice: 'cifar'"),
    "lr": ([*FIT, "--lr", "-1"], "lr: expected a number > 0, got -1.0"),
    "ema": ([*FIT, "--ema", "1"], r"ema: expected a number in \[0, 1\), got 1.0"),
    "steps": ([*FIT, "--steps", "0"], "steps: expected an int >= 1, got 0"),
    "betas": ([*FIT, "--betas", "0.9"], "argument --betas: expected 2 arguments"),
    "process": ([*FIT, "--process", "square"], "process: expected one of linear, .*, flow, or a JSON object, got 'squ"),
    "process arguments": ([*FIT, "--process", '{"kind": "ve", "sigma": 1}'], "arguments of 've', .*, got 'sigma'"),
    "two processes": (
        [*FIT, "--process", "cosine", "--schedule", "linear"],
        "argument --process/--schedule: expected one value, got cosine and linear",
    ),
    "timesteps of edm": (
        [*FIT, "--process", "edm", "--timesteps", "9"],
        "timesteps: expected a schedule of betas that has a T, as linear, got one of kind 'edm'",
    ),
    "lr schedule": ([*FIT, "--lr-schedule", "step"], "argument --lr-schedule: invalid choice: 'step'"),
    "network text": ([*FIT, "--network", "big"], r"network: expected a JSON object, got 'big' \(Expecting value"),
    "network list": ([*FIT, "--network", "[1]"], r"network: expected a JSON object, got '\[1\]'"),
    "network option": ([*FIT, "--network", '{"chanels": 1}'], "network: expected options of a UNet, .*, got 'chanels'"),
    "a foreign checkpoint": (["train", "--data", "pictures", "--out", "foreign"], "expected a training checkpoint"),
    "export nothing": (["export", "none", "--out", "m.safetensors"], "model: expected a shipped model"),
    "export suffix": (["export", "m.safetensors", "--out", "m.pt"], "out: expected a file name that ends in .safeten"),
    "export folder": (["export", "m.safetensors", "--out", "no/m.safetensors"], "out: expected a file in an existing"),
    "an end that is no file": ([*BETWEEN, "3", "cat.png"], "ends: expected an image file, got 'cat.png'"),
    "an end that is no image": ([*BETWEEN, "m.safetensors", "3"], "ends: expected an image file, got 'm.safet.*: a"),
    "one image between": ([*BETWEEN, "3", "4", "--n", "1"], "n: expected an int >= 2, got 1"),
    "no mask": (HOLE, "one of the arguments --mask --box is required"),
    "a box outside": ([*HOLE, "--box", "0", "0", "9", "8"], r"box: expected 0 <= left < right <= 8, .* \[0, 0, 9, 8"),
    "an empty box": ([*HOLE, "--box", "4", "0", "4", "8"], "box: expected 0 <= left < right <= 8, .*"),
    "evaluate steps": ([*JUDGE, "--steps", "50"], "steps: expected SAMPLER:STEPS with .*, got '50'"),
    "evaluate sampler": ([*JUDGE, "--steps", "plms:5"], "steps: expected SAMPLER:STEPS with .*, got 'plms:5'"),
    "evaluate nll steps": ([*JUDGE, "--nll-steps", "5"], "nll-steps: expected none without --nll, got 5"),
    "evaluate both": ([*JUDGE, "--curves", "--nll", "2"], "nll: expected none with --curves, got 2"),
    "evaluate calls": ([*JUDGE, "--calls", "5", "9"], "calls: expected none without --curves, got 5 9"),
    "evaluate curves": ([*JUDGE, "--curves", "plms"], "curves: expected samplers among .*, got 'plms'"),
    "evaluate plot": ([*JUDGE, "--plot", "p.png"], "plot: expected none without --curves or --nll, got p.png"),
    "evaluate picture": ([*JUDGE, "--nll", "--plot", "p.pdf"], "plot: expected a file name that ends in .png, got 'p."),
    "evaluate curves of steps": ([*JUDGE, "--curves", "--steps", "ddim:3"], "steps: expected none with --curves, got"),
    "evaluate nll of guided": ([*JUDGE, "--nll", "--guidance", "3"], "guidance: expected none with --nll, got 3.0"),
    "evaluate nll of samples": ([*JUDGE, "--nll", "--n", "3"], "n: expected none with --nll, got 3"),
    "evaluate json of curves": ([*JUDGE, "--curves", "--json", "e.json"], "json: expected none with --curves, got e"),
    "evaluate size of a model": ([*JUDGE, "--size", "8"], "size: expected none without a folder of images, got 8"),
    "evaluate steps of images": (
        ["evaluate", "--model", "pictures", "--steps", "ddim:2"],
        "steps: expected none with a folder of images, got ddim:2",
    ),
    "evaluate no features": (
        ["evaluate", "--model", "m.safetensors", "--data", "pictures"],
        "features: expected inception:.* for data other than Fashion-MNIST .*, got none",
    ),
    "evaluate 0 steps": ([*JUDGE, "--steps", "ddim:0"], "steps: expected SAMPLER:STEPS with .*, got 'ddim:0'"),
}  # fmt: skip


@pytest.fixture(scope="module")
def misfits(tmp_path_factory, saved):
    """A folder of things that a command finds something wrong with."""
    folder = tmp_path_factory.mktemp("misfits")
    shutil.copy(saved, folder)
    write_pictures(folder / "pictures")
    save(tiny.model(classes=None), folder / "u.safetensors")
    (folder / "broken.safetensors").write_bytes(b"{}")
    for name in ("empty", "idx", "foreign"):
        (folder / name).mkdir()
    (folder / "idx" / "train-images-idx3-ubyte").write_bytes(tiny.idx(np.zeros((2, 28, 28))))
    shutil.copy(saved, folder / "foreign" / CHECKPOINT)
    return folder


@pytest.mark.parametrize(("arguments", "message"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_line_and_status_2_and_writes_nothing(misfits, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(misfits)
    before = sorted(misfits.rglob("[!.]*"))  # without locks
    assert main([*arguments, *QUIET] if arguments[:1] != ["export"] else arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"diffkern: error: .*{message}.*\n", captured.err)
    assert captured.out == ""
    assert sorted(misfits.rglob("[!.]*")) == before


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-m", "diffkern"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# --- options of samplers and of checkpoints ---


def test_an_option_is_written_as_json_or_python_writes_it():
    tokens = ["a=false", "b=False", "c=null", "d=None", "e=[1, 2]", "f=(1, 2)", "g=1e-3", "h=linear", "i=", "j='4'"]
    values = [False, False, None, None, [1, 2], (1, 2), 1e-3, "linear", "", "4"]
    assert named(tokens) == dict(zip("abcdefghij", values, strict=True))
    for token in ("a", "=1", "a b=1"):
        with pytest.raises(ValueError, match=f"option: expected NAME=VALUE, got '{token}'"):
            named([token])
