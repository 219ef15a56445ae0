"""Several processes train the network that one alone would."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_cli import TRAIN, environment
from test_cli import folder as folder
from test_cli import pictures as pictures
from test_cli import saved as saved
from tolerances import PARALLEL

from diffkern import parallel
from diffkern.model import load, read
from diffkern.training import CHECKPOINT

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def train(pictures: str, out: str, *options: str, processes: int = 1) -> list[str]:
    launcher = TORCHRUN if processes > 1 else []
    command = ["-m", "diffkern", "train", "--data", pictures, "--out", out, *TRAIN, "--threads", "1", *options]
    return [sys.executable, *launcher, *command]


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(train(*arguments, **options), env=environment(), capture_output=True, text=True, timeout=300)


def wait_for_steps(launcher: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


@pytest.mark.slow
def test_two_processes_in_two_parts_train_the_network_of_one_which_resumes_what_they_began(folder, pictures):
    for out, runs in {"one": [("4", 1, "1")], "both": [("2", 2, "2"), ("4", 1, "1")]}.items():
        for steps, processes, parts in runs:
            done = run(pictures, out, "--steps", steps, "--accumulate", parts, processes=processes)
            assert done.returncode == 0, done.stderr
    logs = [np.loadtxt(f"{out}/log.csv", delimiter=",", skiprows=1, usecols=(0, 1)) for out in ("one", "both")]
    assert logs[0][:, 0].tolist() == [2, 4]
    np.testing.assert_allclose(logs[1], logs[0], rtol=0, atol=2e-6)  # losses of order 1, written with six digits
    states = [read(f"{out}/{CHECKPOINT}")[0]["training"] for out in ("one", "both")]
    assert states[0] == states[1]
    x_t, t, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 9]), None
    one, both = (load(f"{out}/{CHECKPOINT}").network(x_t, t, labels) for out in ("one", "both"))
    assert one.abs().max() > 0
    torch.testing.assert_close(both, one, rtol=0, atol=PARALLEL * one.abs().max().item())


def test_a_signal_to_one_process_ends_all_with_a_checkpoint(folder, pictures):
    command = train(pictures, "run", "--steps", "1000000", processes=2)
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as launcher:
        try:
            wait_for_steps(launcher, folder / "run" / "log.csv")
            os.kill(children(launcher.pid)[-1], signal.SIGTERM)
            _, message = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    steps = read(f"run/{CHECKPOINT}")[0]["training"]["steps"]
    assert message.count(f"diffkern: SIGTERM at step {steps}: saved run/{CHECKPOINT}; run again to resume") == 1


@pytest.mark.slow
def test_signals_to_all_processes_and_their_launcher_end_in_a_checkpoint(folder, pictures):
    """As a scheduler sends them; the launcher then sends its processes another one."""
    network = {**tiny.NETWORK, "in_channels": 3, "channels": 96, "groups": 32}  # a checkpoint that takes its time
    command = train(pictures, "run", "--steps", "1000000", "--network", json.dumps(network), processes=2)
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as launcher:
        try:
            wait_for_steps(launcher, folder / "run" / "log.csv")
            for process in (*children(launcher.pid), launcher.pid):
                os.kill(process, signal.SIGTERM)
            _, message = launcher.communicate(timeout=120)
        finally:
            launcher.kill()
    steps = read(f"run/{CHECKPOINT}")[0]["training"]["steps"]
    assert message.count(f"diffkern: SIGTERM at step {steps}: saved run/{CHECKPOINT}; run again to resume") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_that_see_other_pictures_leave_with_one_line(monkeypatch, rank):
    pictures = ["10 images", "5 images"]
    monkeypatch.setattr(parallel, "rank", lambda: rank)
    monkeypatch.setattr(parallel, "_gathered", lambda value: [True, True] if value is True else pictures)
    with pytest.raises((ValueError, SystemExit)) as leaving:
        parallel.check_same("data", pictures[rank])
    expected = "data: expected the same in every process, got 10 images in process 0, 5 images in 1"
    assert str(leaving.value) == (expected if rank == 0 else "2")


@pytest.mark.parametrize("number", ["", "two", "0", "-1"])
def test_a_number_of_processes_that_is_none_is_told(monkeypatch, number):
    monkeypatch.setenv("WORLD_SIZE", number)
    with pytest.raises(ValueError, match=f"^WORLD_SIZE: expected .* int >= 1, got '{number}'$"), parallel.joined("cpu"):
        pass


def test_a_card_needs_the_number_of_its_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="^LOCAL_RANK: expected .* int >= 0, got None$"), parallel.joined("cuda"):
        pass


@pytest.mark.slow
def test_processes_must_share_a_batch_evenly(folder, pictures):
    done = run(pictures, "run", "--steps", "1", "--batch-size", "5", processes=2)
    assert done.returncode != 0 and "batch_size: expected a multiple of the 2 processes, got 5" in done.stderr
