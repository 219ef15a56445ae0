"""Files that earlier versions wrote load the same, and seeds give the images and draws that they gave.

The answers are in ``tests/data``. They hold on every processor: noise and updates are float32 operations in a fixed
order (docs/noise.md), and float64 errors of the coefficients do not reach their float32 (``check_rounding``). Training
and the U-Net round differently on each: their results are compared within one process.
"""

import hashlib
import itertools
import json
import warnings
from collections.abc import Iterator
from typing import Any

import known_answers as known
import numpy as np
import pytest
import torch
from known_answers import CASES, CLASSES, COLUMNS, EPS_MODEL, PREDICTIONS, ROWS, RUN, SAMPLERS, SCHEDULES, V_MODEL
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import one_thread  # noqa: F401
from torch import Tensor

from diffkern import reference
from diffkern.model import Model, load, save
from diffkern.sampling import sample
from diffkern.schedule import Schedule
from diffkern.training import Trainer

ANSWERS = json.loads(known.JSON.read_text())
FILES = (EPS_MODEL, V_MODEL, RUN)


def description(path) -> dict[str, Any]:
    """Read what a file says of itself, as JSON holds it."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["diffkern"])


def assert_holds(now: Any, before: Any, where: str = "description") -> None:
    """Assert that ``now`` has all of ``before``: objects may have more keys."""
    if isinstance(before, dict):
        for key, value in before.items():
            assert key in now, f"{where}.{key}"
            assert_holds(now[key], value, f"{where}.{key}")
    else:
        assert now == before, where


def assert_same(now: dict[str, Tensor], before: dict[str, Tensor]) -> None:
    assert now.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(now[name], tensor.float()), name


def averaged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("ema."): tensor for name, tensor in tensors.items() if name.startswith("ema.")}


def resume(path=RUN) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other images than the run's
        return Trainer.resume(path, known.dataset())


# --- steps, coefficients, images ---


def test_each_spacing_visits_the_steps_that_it_did():
    assert known.timesteps() == ANSWERS["timesteps"]


def tables() -> Iterator[Any]:
    """Yield all, those as slow that the others cover: each schedule and each sampler meets every prediction."""
    numbered = map(enumerate, (SCHEDULES, SAMPLERS, PREDICTIONS))
    for (i, schedule), (j, sampler), (k, prediction) in itertools.product(*numbered):
        covering = (i + j + k) % len(PREDICTIONS) == 0
        yield pytest.param(schedule, sampler, prediction, marks=() if covering else pytest.mark.slow)


@pytest.mark.parametrize(("schedule", "sampler", "prediction"), list(tables()))
def test_a_sampler_s_float32_coefficients_are_what_they_were(schedule, sampler, prediction):
    hashes = known.hashes_of_tables(schedule, sampler, prediction)
    assert hashes == {
        name: ANSWERS["tables"][schedule][sampler][name] for name in (prediction, f"{prediction}, folded")
    }


def test_the_coefficients_of_forward_noising_are_what_they_were():
    assert known.q_tables() == ANSWERS["q_tables"]


def test_the_stored_coefficients_are_those_of_today():
    assert known.rows() == ANSWERS["rows"]


@pytest.mark.parametrize("case", CASES)
def test_a_seed_gives_the_image_that_it_gave(case):
    assert known.hashes_of_images(case) == ANSWERS["images"][case]
    assert known.digest(known.images(case)) == ANSWERS["images"][case]["images"], "without a callback"


@pytest.mark.parametrize("batch_size", [1, 3, 5, 16])
@pytest.mark.parametrize("case", ["ddpm learned, guided", "dpmpp_2m", "x_T torch.float32"])
def test_a_seed_gives_its_image_in_batches_of_any_size(case, batch_size):
    assert known.digest(known.images(case, batch_size=batch_size)) == ANSWERS["images"][case]["images"]


# --- model files ---


def test_the_files_are_those_that_were_written():
    for path in FILES:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == ANSWERS["files"]["sha256"][path.name], path


def test_a_model_file_loads_as_the_model_that_was_saved():
    model = load(EPS_MODEL)
    assert_same(model.network.state_dict(), load_file(EPS_MODEL))
    assert model.schedule == Schedule.linear()
    assert (model.prediction, model.shape, model.classes, model.name) == ("eps", (1, 8, 8), CLASSES, "shapes")


def test_a_model_file_of_half_precision_with_learned_variance_loads_as_the_model_that_was_saved():
    model, stored = load(V_MODEL), load_file(V_MODEL)
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert_same(model.network.state_dict(), stored)
    assert model.schedule == Schedule.cosine().respace(50)
    assert (model.prediction, model.shape, model.classes, model.name) == ("v", (1, 5, 7), None, "model")
    assert model.network.config["learned_variance"] is True


def test_a_checkpoint_loads_as_its_averaged_model():
    model = load(RUN)
    assert_same(model.network.state_dict(), averaged(load_file(RUN)))
    assert model.schedule == Schedule(known.BETAS)
    assert (model.prediction, model.shape, model.classes, model.name) == ("eps", (1, 8, 8), CLASSES, "trained")


@pytest.mark.parametrize("path", [EPS_MODEL, V_MODEL], ids=lambda path: path.stem)
def test_a_loaded_model_is_saved_with_all_that_its_file_says(path, tmp_path):
    save(load(path), tmp_path / path.name)
    assert_holds(description(tmp_path / path.name), description(path))
    assert_same(load_file(tmp_path / path.name), load_file(path))


def drawn(model: Model, row: dict[str, list], seeds: list[int], labels: Tensor | None, guidance: float, clip: bool):
    """Return x_0 and the x0_hat of each step, by the equations of docs/noise.md in the order written there."""
    coefficients = {name: torch.tensor(values) for name, values in row.items() if name != "t"}
    assert all(values.dtype == torch.float32 for values in coefficients.values())
    x, before, seen = reference.noise(seeds, model.shape, step=0, stream=0), torch.zeros(1), []
    for i, t in enumerate(row["t"]):
        c = {name: values[i] for name, values in coefficients.items()}
        times = torch.full((len(seeds),), t)
        o, *second_half = model(x, times, labels).split(len(x[0]), dim=1)
        if guidance != 1:
            u = model(x, times, torch.full_like(labels, -1))
            o = u + guidance * (o - u)
        x0_hat = c["p_x"] * x + c["p_o"] * o
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        x_next = c["k_x"] * x + c["k_o"] * o + c["k_0"] * x0_hat
        if "k_1" in c:
            x_next = x_next + c["k_1"] * before
        if c["sigma"] != 0:
            std = c["sigma"]
            for v in second_half:
                low, high = c["log_var_min"], c["log_var_max"]
                log_std = 0.5 * (low + (v + 1) * 0.5 * (high - low))
                std = std * torch.from_numpy(reference.exp(log_std.numpy()))
            x_next = x_next + std * reference.noise(seeds, model.shape, step=t, stream=1)
        x, before = x_next, x0_hat
        seen.append(x0_hat)
    return x, seen


@pytest.mark.parametrize(
    ("name", "guidance"), [("ddim", 1.0), ("ddim", 2.5), ("dpmpp_2m", 1.0), ("dpmpp_2m", 2.5), ("learned", 1.0)]
)
def test_a_model_file_samples_to_the_bit_as_its_stored_coefficients_say(name, guidance):
    path, options = ROWS[name]
    model, seeds, steps = load(path), [0, 1, 2**40, -3], []
    labels = None if model.classes is None else torch.tensor([0, 1, 2, -1 if guidance == 1 else 0])
    options = dict(options, seeds=seeds, labels=labels, guidance=guidance, engine=False, progress=False)
    got = sample(path, callback=steps.append, **options)
    with torch.no_grad():
        expected, x0_hats = drawn(model, ANSWERS["rows"][name], seeds, labels, guidance, clip=True)
    assert torch.equal(got, expected)
    assert [step.t for step in steps] == ANSWERS["rows"][name]["t"]
    assert all(torch.equal(step.x0_hat, x0_hat) for step, x0_hat in zip(steps, x0_hats, strict=True))
    assert torch.equal(sample(path, **options), got)


# --- a training run ---


def test_training_draws_what_it_drew():
    assert known.draws() == ANSWERS["draws"]


def test_a_resumed_run_has_the_state_of_its_checkpoint():
    trainer, counters = resume(), ANSWERS["files"]["counters"]
    assert_same(trainer.tensors(), load_file(RUN))
    assert {"steps": trainer.steps, "examples": trainer.examples} == {k: counters[k] for k in ("steps", "examples")}
    assert (trainer.unlogged.total, trainer.unlogged.count) == (counters["log"]["total"], counters["log"]["count"])
    weights = dict(trainer.network.named_parameters())
    assert {name for name, weight in weights.items() if not weight.requires_grad} == {"conv_in.weight"}
    moments = {name: trainer.optimizer.state[weight] for name, weight in weights.items() if weight.requires_grad}
    stored = load_file(RUN)
    for name, state in moments.items():
        assert state["step"] == counters["steps"]
        assert torch.equal(state["exp_avg"], stored[f"exp_avg.{name}"])
        assert torch.equal(state["exp_avg_sq"], stored[f"exp_avg_sq.{name}"])


def test_a_resumed_run_goes_on_with_the_examples_that_come_next():
    assert known.hashes_of_batch(resume()) == ANSWERS["files"]["batch"]


def test_a_resumed_run_saves_all_that_its_checkpoint_says(tmp_path):
    resume().save(tmp_path / "again.safetensors")
    assert_holds(description(tmp_path / "again.safetensors"), description(RUN))
    assert_same(load_file(tmp_path / "again.safetensors"), load_file(RUN))


def test_a_step_after_resuming_is_adam_of_the_stored_moments():
    """Loshchilov & Hutter 2019, algorithm 2, with the gradient of Algorithm 1 clipped to norm 1."""
    trainer, other, config = resume(), resume(), description(RUN)["training"]["config"]
    before = {name: weight.detach().clone() for name, weight in other.trained.items()}
    other.loss().backward()
    torch.nn.utils.clip_grad_norm_(other.network.parameters(), config["grad_clip"])
    trainer.step()
    (b1, b2), n, stored = config["betas"], description(RUN)["training"]["steps"] + 1, load_file(RUN)
    for name, weight in trainer.trained.items():
        gradient = other.trained[name].grad.double()
        m = b1 * stored[f"exp_avg.{name}"].double() + (1 - b1) * gradient
        v = b2 * stored[f"exp_avg_sq.{name}"].double() + (1 - b2) * gradient.square()
        expected = before[name] - config["lr"] * (m / (1 - b1**n)) / ((v / (1 - b2**n)).sqrt() + 1e-8)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-6, atol=1e-3 * config["lr"])


def test_coefficients_are_read_by_name_wherever_their_columns_are():
    row = torch.arange(len(reference.COLUMNS) + 1.0, dtype=torch.float64)
    got = known.coefficients(row[None])[0]
    assert got.tolist() == [*(reference.COLUMNS.index(name) for name in COLUMNS), len(reference.COLUMNS)]
    assert not np.signbit(known.rounded(np.array([[-0.0] * len(COLUMNS)]))).any()
