"""Averages of any width after the fact: profiles, their least squares, snapshots of a run."""

import os
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from test_own_network import CONFIG, PLAIN, assert_equal, model, take
from tiny import one_thread  # noqa: F401

from diffkern import load
from diffkern.cli import main
from diffkern.io.files import read
from diffkern.training import CHECKPOINT, Config, Trainer, ema, new_model, post_hoc_ema

STDS = (0.05, 0.1)
KEPT = CONFIG | dict(steps=24, snapshot_every=3, checkpoint_every=1000, log_every=1000)


def profile(std: float, end: int, steps: int) -> np.ndarray:
    """The weight of each step 1..steps in the average at ``end``: what tau^gamma has between step - 1 and step."""
    power = ema.exponent(std) + 1
    tau = np.minimum(np.arange(steps + 1.0), end) / end
    return np.diff(tau**power)


# --- profiles ---


def test_exponents_are_the_paper_s_and_give_their_widths():
    assert [ema.exponent(std) for std in STDS] == pytest.approx([16.97, 6.94], abs=5e-3)
    for std in (0.01, 0.05, 0.1, 0.2, 0.28):
        weights, tau = profile(std, 100_000, 100_000), np.arange(100_000) / 100_000
        mean = weights @ tau
        assert np.sqrt(weights @ (tau - mean) ** 2) == pytest.approx(std, rel=1e-4)


@pytest.mark.parametrize("std", STDS)
def test_the_recursion_gives_each_step_its_part_of_the_profile(std):
    weights = np.zeros(50)
    for step in range(1, 51):
        weights *= ema.power_decay(ema.exponent(std), step)
        weights[step - 1] = 1 - ema.power_decay(ema.exponent(std), step)
    np.testing.assert_allclose(weights, profile(std, 50, 50), rtol=1e-12, atol=1e-16)


def test_inner_products_are_the_integrals_of_the_profiles():
    """Gauss-Legendre quadrature of 20 points is exact for powers up to 39."""
    x, w = np.polynomial.legendre.leggauss(20)
    for a, g, b, h in ((5, 3, 5, 3), (5, 3, 7, 16), (9, 0, 2, 7), (7, 16, 5, 3)):
        tau, half = min(a, b) * (x + 1) / 2, min(a, b) / 2
        p, q = ((k + 1) * (tau / end) ** k / end for end, k in ((a, g), (b, h)))
        assert ema.inner_products(a, g, b, h) == pytest.approx(half * w @ (p * q), rel=1e-12)


# --- least squares ---


def test_an_average_that_is_there_is_found_as_itself():
    found, error = ema.coefficients([4, 4, 8, 8], [16.0, 7.0] * 2, 8, 7.0)
    assert found == pytest.approx([0, 0, 0, 1], abs=1e-9) and error < 1e-6


@pytest.mark.parametrize(("std", "most"), [(0.03, 3e-2), (0.07, 3e-3), (0.13, 4e-3), (0.25, 7e-2)])
def test_any_width_is_the_directly_tracked_average_within_the_error_that_is_told(std, most):
    """In float64, weights of a random walk. By Cauchy-Schwarz the averages differ by at most the error of the profile
    times the distances of the weights from any constant, because coefficients have the sum 1."""
    steps, every, random = 1000, 50, np.random.default_rng(0)
    weights = 100 + random.standard_normal((steps, 8)).cumsum(0)
    ends = np.repeat(np.arange(every, steps + 1, every), 2)
    tracked = [profile(width, end, steps) @ weights for end, width in zip(ends, STDS * (steps // every), strict=True)]
    gamma = ema.exponent(std)
    found, error = ema.coefficients(ends, [ema.exponent(width) for width in STDS] * (steps // every), steps, gamma)
    direct = weights[0]
    for step in range(1, steps + 1):
        direct = direct + (1 - ema.power_decay(gamma, step)) * (weights[step - 1] - direct)
    norm = np.sqrt(ema.inner_products(steps, gamma, steps, gamma))
    bound = error * norm * np.linalg.norm(weights - direct, axis=0)
    assert error < most and found.sum() == pytest.approx(1, abs=1e-9)
    assert (abs(found @ np.stack(tracked) - direct) <= bound + 1e-9).all()


# --- runs ---


def test_a_run_s_average_of_another_width_is_the_one_of_its_history(tmp_path):
    run, history = Trainer(model(), PLAIN, Config(**KEPT)), []
    step = run.step
    run.step = lambda: (step(), history.append(run.network.read.weight.detach().double().clone()))[0]
    run.run(tmp_path, progress=False)
    assert sorted(ema.snapshots(tmp_path)) == list(range(3, 25, 3))
    moved = torch.stack(history).std(0).mean()
    for std in (0.05, 0.07, 0.15):
        expected = sum(w * weight for w, weight in zip(profile(std, 24, 24), history, strict=True))
        found = post_hoc_ema(tmp_path, std, into=model())
        assert found.averages == 16 and found.error < 0.04
        assert (found.model.network.read.weight - expected).abs().max() < 0.02 * moved + 5e-4  # and half precision
        assert (found.model.network.norm.running_mean == run.network.norm.running_mean).all()
    plain = load(tmp_path, into=model()).network.read.weight
    assert torch.equal(plain, run.model.network.read.weight) and (plain - expected).abs().max() > 0.1 * moved


def test_snapshots_change_no_bit_of_the_run_and_are_those_of_the_run_that_is_resumed(tmp_path):
    config = Config(**KEPT | dict(steps=6, snapshot_every=2))
    plain, whole, first = (Trainer(model(), PLAIN, c) for c in (replace(config, snapshot_every=0), config, config))
    for run, folder in ((plain, "plain"), (whole, "whole")):
        run.run(tmp_path / folder, progress=False)
    assert_equal(plain.tensors(), {key: whole.tensors()[key] for key in plain.tensors()})
    take(first, 3)
    (tmp_path / "parts").mkdir()
    first.save(tmp_path / "parts" / CHECKPOINT)
    first.powers.write_snapshot(tmp_path / "parts", 2)  # of another step 2: it stays, as a run finds it
    first.powers.write_snapshot(tmp_path / "parts", 9)  # later than the checkpoint: it goes
    Trainer.resume(tmp_path / "parts" / CHECKPOINT, PLAIN, into=model()).run(tmp_path / "parts", progress=False)
    parts, files = tmp_path / "parts", sorted(os.listdir(tmp_path / "whole"))
    assert sorted(os.listdir(parts)) == files
    for name in ("ema-0000004.safetensors", "ema-0000006.safetensors", CHECKPOINT):
        assert_equal(read(parts / name)[1], read(tmp_path / "whole" / name)[1])
    with pytest.raises(ValueError, match="snapshot_every: expected an int >= 1, as .* has, got 0"):
        Trainer.resume(parts / CHECKPOINT, PLAIN, into=model(), snapshot_every=0)
    with pytest.raises(ValueError, match=r"ema_profiles: expected that of .*, \(0.05, 0.1\), got \(0.1, 0.2\)"):
        Trainer.resume(parts / CHECKPOINT, PLAIN, into=model(), ema_profiles=(0.1, 0.2))


def test_export_makes_the_average_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = new_model(tiny.dataset(), tiny.config())
    network.network.conv_in.requires_grad_(False)
    run = Trainer(network, tiny.dataset(), tiny.config(steps=2, snapshot_every=1))
    run.run("run", progress=False)
    export = ["export", "run", "--out", "m.safetensors", "--dtype", "float32", "--ema"]
    assert main([*export, "0.1"]) == 0
    assert "ema 0.1: from 4 averages, whose profile differs by 0.00%" in capsys.readouterr().err
    got, tracked = load("m.safetensors").network.state_dict(), run.powers.averages[0.1]
    for name, tensor in run.network.state_dict().items():
        torch.testing.assert_close(got[name], tracked.get(name, tensor), rtol=1e-6, atol=1e-7)
    assert main([*export, "0.3"]) == 2
    assert "std: expected a number in (0, 0.28], got 0.3" in capsys.readouterr().err
    other = Trainer(new_model(tiny.dataset(), tiny.config()), tiny.dataset(), tiny.config(snapshot_every=1))
    other.powers.write_snapshot(tmp_path / "run", 1)  # of another run, whose first layer is not frozen
    assert main([*export, "0.1"]) == 2
    assert (
        "run/ema-0000001.safetensors: expected the tensors of the averages of its run, got" in capsys.readouterr().err
    )
    other.save("plain.safetensors")
    assert main(["export", "plain.safetensors", "--out", "m.safetensors", "--ema", "0.1"]) == 2
    assert "expected a run with snapshots of its averages, got one of 0 steps" in capsys.readouterr().err
