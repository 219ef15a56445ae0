"""The command line's files and streams: what cannot be written or held is one line before the work, not after."""

import io
import os
import re
import sys
from pathlib import Path

import pytest
import tiny
import torch
from tiny import one_thread  # noqa: F401

from diffkern import evaluate
from diffkern.cli import evaluate as evaluate_command
from diffkern.cli import export as export_command
from diffkern.cli import main
from diffkern.cli import sample as sample_command
from diffkern.evaluate import Classifier
from diffkern.images import read_settings
from diffkern.io.files import read, write
from diffkern.model import Model, load, save
from diffkern.training import CHECKPOINT, Trainer, new_model
from diffkern.unet import UNet

SAMPLE = ["sample", "--model", "m.safetensors", "--n", "2", "--steps", "2"]
QUIET = ["--no-progress"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model, and a run with its checkpoint."""
    monkeypatch.chdir(tmp_path)
    save(tiny.model(), "m.safetensors")
    return tmp_path


@pytest.fixture
def run(folder):
    os.mkdir("run")
    config = tiny.config()
    Trainer(new_model(tiny.dataset(), config), tiny.dataset(), config).save(f"run/{CHECKPOINT}")
    return "run"


@pytest.fixture
def without_work(monkeypatch):
    """The test fails if anything is sampled, saved or trained."""
    for module, name in (
        (sample_command, "sample"),
        (export_command, "save"),
        (evaluate, "train_classifier"),
        (evaluate_command, "load_dataset"),
    ):
        monkeypatch.setattr(module, name, lambda *arguments, **options: pytest.fail("the work began"))


def error_of(arguments, capsys) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("diffkern: error: ") and captured.err.count("\n") == 1
    return captured.err.removeprefix("diffkern: error: ").strip()


LONG = "n" * 252
SYSTEM = "No such file or directory|Permission denied|Operation not permitted|Read-only file system"  # says /proc
UNWRITABLE = {
    "out": ([*SAMPLE, "--out", "/proc/s.png"], "/proc/s.png", SYSTEM),
    "gif": ([*SAMPLE, "--gif", "/proc/s.gif"], "/proc/s.gif", SYSTEM),
    "npz": ([*SAMPLE, "--npz", "/proc/s.npz"], "/proc/s.npz", SYSTEM),
    "long": ([*SAMPLE, "--out", f"{LONG}.png"], f"{LONG}.png", "File name too long"),
    "a folder": ([*SAMPLE, "--out", "folder.png"], "folder.png", "a directory"),
    "export": (["export", "m.safetensors", "--out", "/proc/m.safetensors"], "/proc/m.safetensors", SYSTEM),
    "features": (["evaluate", "--model", "m.safetensors", "--features", "/proc/c.safetensors"], "/proc/c", SYSTEM),
    "json": (["evaluate", "--model", "m.safetensors", "--json", "/proc/e.json"], "/proc/e.json", SYSTEM),
}


@pytest.mark.parametrize(("arguments", "path", "reason"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_an_output_that_cannot_be_written_is_known_before_the_work(
    folder, without_work, capsys, arguments, path, reason
):
    os.mkdir("folder.png")
    assert re.match(f"{path}.*: expected to be writable, got ({reason})$", error_of(arguments, capsys))
    assert sorted(os.listdir()) == ["folder.png", "m.safetensors"]


TOO_LARGE = {
    "seeds": (["--seeds", "0:200000000"], r"seeds: expected at most \d+, which fill memory, got 200000000"),
    "more seeds": (["--seeds", "5", f"0:{10**30}"], r"seeds: expected at most \d+, which fill memory, got 10+1"),
    "n": (["--n", "1000000000"], r"n: expected at most \d+, which fill memory, got 1000000000"),
    "scale": (["--n", "1", "--scale", "100000"], r"scale: expected a grid of at most \d+ pixels, got .* by 100000"),
    "scale 2000": (["--n", "1", "--scale", "2000"], r"scale: expected a grid of at most \d+ pixels, got .* by 2000"),
    "grid": (["--n", "1000000"], r"n: expected grids that memory holds, got 1000000 images in 1 of"),
    "frames": (
        ["--n", "1000000", "--steps", "20", "--gif", "s.gif"],
        f"n: expected at most {2**30 // ((12 + 20) * 64)}, which fill memory, got 1000000",
    ),
    "gif": (
        ["--n", "2000", "--columns", "1000", "--gif", "s.gif"],
        "frames: expected at most 65535 pixels a side, got",
    ),
}


@pytest.mark.parametrize(("options", "message"), TOO_LARGE.values(), ids=TOO_LARGE)
def test_more_than_memory_or_a_file_holds_is_one_line_before_the_work(
    folder, without_work, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(sample_command, "_memory", lambda: 2**30)
    assert re.match(message, error_of(["sample", "--model", "m.safetensors", "--steps", "2", *options], capsys))


def test_images_that_no_png_holds_are_not_drawn(folder, without_work, capsys):
    save(Model(UNet(**{**tiny.NETWORK, "in_channels": 4}), tiny.SCHEDULE, "eps", (4, 8, 8)), "latent.safetensors")
    message = error_of(["sample", "--model", "latent.safetensors"], capsys)
    assert message == "model: expected one of images of 1 or 3 channels, got (4, 8, 8)"


def test_seeds_of_a_range_are_those_of_its_numbers(folder):
    seeds = [2**63 - 1, 2**63, 2**64 - 1, 0, 1, 2, -5]
    arguments = ["--seeds", f"{2**63 - 1}:{2**63 + 1}", str(2**64 - 1), "0:3", "4:1", "-5"]
    assert main(["sample", "--model", "m.safetensors", "--steps", "2", *arguments, *QUIET]) == 0
    assert read_settings("samples.png")["seeds"] == seeds


def test_memory_is_at_most_the_machine_s():
    assert 2**20 < sample_command._memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate"), OverflowError("int too large")])
def test_memory_that_is_not_there_is_one_line(folder, capsys, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(sample_command, "sample", fail)
    assert error_of(SAMPLE, capsys) == (str(error) or "MemoryError")


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "--model", "pipe"],
        ["export", "pipe", "--out", "x.safetensors"],
        ["evaluate", "--model", "pipe"],
        ["evaluate", "--model", "m.safetensors", "--features", "pipe"],
    ],
)
def test_a_pipe_is_no_model_and_nobody_waits_for_it(folder, capsys, arguments):
    os.mkfifo("pipe")
    assert error_of(arguments, capsys) == "pipe: expected a file, got a pipe"


# --- models and runs ---


def test_a_run_s_folder_is_sampled_and_exported(run):
    assert main(["sample", "--model", run, "--n", "2", "--steps", "2", *QUIET]) == 0
    assert main(["export", run, "--out", "shipped.safetensors", "--dtype", "float32"]) == 0
    exported, trained = (load(path).network.state_dict() for path in ("shipped.safetensors", run))
    assert all(torch.equal(tensor, trained[key]) for key, tensor in exported.items())


def link(source):
    os.symlink(source, "link.safetensors")
    return "link.safetensors"


@pytest.mark.parametrize(
    ("source", "out", "message"),
    [
        ("run", lambda: f"run/{CHECKPOINT}", "out: expected another file than the one to export"),
        (f"run/{CHECKPOINT}", lambda: link(f"run/{CHECKPOINT}"), "out: expected another file than the one to export"),
        ("m.safetensors", lambda: "./m.safetensors", "out: expected another file than the one to export"),
        ("m.safetensors", lambda: f"run/{CHECKPOINT}", "out: expected no training checkpoint to be overwritten"),
    ],
)
def test_an_export_overwrites_neither_its_input_nor_a_run(run, capsys, source, out, message):
    before = [path.read_bytes() for path in (Path("m.safetensors"), Path("run", CHECKPOINT))]
    assert error_of(["export", source, "--out", out()], capsys).startswith(message)
    assert [path.read_bytes() for path in (Path("m.safetensors"), Path("run", CHECKPOINT))] == before


def test_an_export_overwrites_an_older_one(run):
    for dtype in ("float32", "float16"):
        assert main(["export", run, "--out", "shipped.safetensors", "--dtype", dtype]) == 0
    assert {tensor.dtype for tensor in read("shipped.safetensors")[1].values()} == {torch.float16}


def test_an_evaluation_reads_its_classifier_before_its_images(folder, without_work, capsys):
    write("c.safetensors", {"classifier": 1}, {"w": torch.zeros(1)})
    arguments = ["evaluate", "--model", "m.safetensors", "--features", "c.safetensors"]
    assert error_of(arguments, capsys) == "c.safetensors: accuracy: expected a share, got None"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "1"], "n: expected an int >= 2, got 1"),
        (["--n", "4", "--steps", "ddim:2", "ddpm:21"], "steps: expected 1 to 20, the length of the schedule, got 21"),
    ],
)
def test_an_evaluation_that_cannot_end_trains_no_classifier(folder, monkeypatch, capsys, options, message):
    for name in ("train_classifier", "held_out_loss"):
        monkeypatch.setattr(evaluate, name, lambda *arguments, **options: pytest.fail("the work began"))
    tiny.write_fashion_mnist(folder / "idx")
    model = tiny.model()
    model.shape = (1, 32, 32)
    save(model, "m.safetensors")
    command = ["evaluate", "--model", "m.safetensors", "--data", "idx", "--features", "new.safetensors", *options]
    assert error_of(command, capsys) == message


def test_a_new_classifier_has_the_classes_of_its_data(folder, monkeypatch):
    def untrained(train, **options):
        return Classifier(classes=len(train.classes)).eval()

    monkeypatch.setattr(evaluate, "train_classifier", untrained)
    arrays = tiny.write_fashion_mnist(folder / "idx")
    for name in arrays:
        if "labels" in name:
            (folder / "idx" / name).write_bytes(tiny.idx(arrays[name] + 6))  # 16 classes
    model = tiny.model(classes=None)
    model.shape = (1, 32, 32)
    save(model, "m.safetensors")
    command = ["evaluate", "--model", "m.safetensors", "--data", "idx", "--features", "new.safetensors", *QUIET]
    assert main([*command, "--n", "4", "--steps", "ddim:1", "--loss-n", "2"]) == 0
    assert evaluate.load_classifier("new.safetensors")[0].out.out_features == 16


def test_classes_in_any_script_have_a_grid(folder):
    model = tiny.model()
    model.classes = ("\u732b", "two\nlines", "\U0001f431")
    save(model, "names.safetensors")
    assert main(["sample", "--model", "names.safetensors", "--n", "3", "--steps", "2", *QUIET]) == 0
    assert read_settings("samples.png")["classes"] == list(model.classes)


# --- streams ---


def test_a_name_that_stdout_cannot_encode_is_escaped(folder, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main([*SAMPLE, "--out", "\u00e9.png", *QUIET]) == 0
    assert written.getvalue() == b"\\xe9.png\n" and os.path.exists("\u00e9.png")
    assert sys.stdout.errors == "strict"  # again


def test_a_message_that_stderr_cannot_encode_is_escaped(folder, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["sample", "--model", "\u00e9"]) == 2
    assert b"got '\\xe9'\n" in written.getvalue()


@pytest.mark.parametrize(("arguments", "status"), [(SAMPLE, 0), ([*SAMPLE, "--labels", "cow"], 2)])
@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_closed_streams_change_no_status(folder, monkeypatch, arguments, status, closed):
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    assert main(arguments) == status  # with a progress bar
    assert all(getattr(sys, name) is None for name in closed)
    assert os.path.exists("samples.png") == (status == 0)


@pytest.mark.parametrize(("name", "arguments"), [("stdout", SAMPLE), ("stderr", [*SAMPLE, "--labels", "cow"])])
def test_a_full_disk_behind_a_stream_is_status_2_and_no_traceback(folder, monkeypatch, name, arguments):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, name, full)
        assert main([*arguments, *QUIET]) == 2
        full.flush()  # as the exit does
