"""Training on every process: the rows that a batch gets, the loss that an exact network has, and runs that resume."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from scipy.integrate import quad
from scipy.stats import norm
from tiny import one_thread  # noqa: F401

from diffkern import load, ops, sample
from diffkern.data import Dataset
from diffkern.ops import LOSS_COLUMNS
from diffkern.prediction import target
from diffkern.process import EDM, VE, VP, Process, RectifiedFlow, SubVP
from diffkern.schedule import Schedule
from diffkern.training import CHECKPOINT, Trainer, new_model, objectives
from diffkern.training.noising import Noising
from diffkern.training.times import LogitNormal, LogNormal, Uniform, at

PROCESSES = {"vp": VP(), "sub_vp": SubVP(), "ve": VE(), "edm": EDM(), "flow": RectifiedFlow()}
TOLD = {  # the time that a network is told, undone
    "vp": lambda told: told / 999,
    "sub_vp": lambda told: told / 999,
    "ve": lambda told: (told - math.log(0.01)) / math.log(5000),
    "edm": lambda told: np.exp(4 * told),
    "flow": lambda told: told,
}
VARIANCE = 0.25  # of the data, N(0, 1/4)


def noising(objective: objectives.Objective, process: Process) -> Noising:
    return Noising(objective, process, "fixed_small", torch.device("cpu"))


# --- the loss of the exact network, which is the smallest that there is ---


@pytest.mark.parametrize(
    ("objective", "floor"),
    [
        (objectives.simple("eps"), 0.173053406084),
        (objectives.simple("v"), 0.379790054563),
        (objectives.simple("x0"), 0.206736648479),
        (objectives.min_snr(5, "eps"), 0.096940876396),
        (objectives.min_snr(5, "v"), 0.096940876396),
        (objectives.dsm("score"), 0.173053406084),
        (objectives.edm(), 1.0),
    ],
    ids=["eps", "v", "x0", "min_snr eps", "min_snr v", "dsm", "edm"],
)
def test_the_floor_of_a_schedules_loss(objective, floor):
    """The variance of the target given x_t, of Gaussian data: closed, and weighted, over all time steps."""
    row = dict(zip(LOSS_COLUMNS, objective.table(Schedule.linear()).double().T, strict=True))
    a, s, y_x, y_e = (row[name] for name in ("a", "s", "y_x", "y_e"))
    variance = (y_x * s - y_e * a) ** 2 * VARIANCE / (VARIANCE * a**2 + s**2)
    assert (row["weight"] * variance).mean().item() == pytest.approx(floor, rel=2e-6)


def of_x_0(a: float, s: float) -> float:
    return VARIANCE * s**2 / (VARIANCE * a**2 + s**2)


def vp(t: float) -> tuple[float, float]:
    a = math.exp(-(t**2) * 19.9 / 4 - t * 0.1 / 2)
    return a, math.sqrt(1 - a**2)


def sub_vp(t: float) -> tuple[float, float]:
    return vp(t)[0], 1 - vp(t)[0] ** 2


def ve(t: float) -> tuple[float, float]:
    return 1.0, 0.01 * 5000**t


def mean(function, density=lambda t: 1.0, low: float = 0.0, high: float = 1.0) -> float:
    return quad(lambda t: function(t) * density(t), low, high, epsabs=1e-10, limit=200)[0]


def score(levels, weight=lambda t, s: s**2):
    """The weighted variance of the score given x_t: alpha^2 / sigma^4 of that of x_0."""
    return lambda t: weight(t, levels(t)[1]) * levels(t)[0] ** 2 / levels(t)[1] ** 4 * of_x_0(*levels(t))


def beta(t: float) -> float:
    return 0.1 + 19.9 * t


FLOORS = {  # process, objective, and the mean of its floor over t, by its paper's formula
    "vp": ("vp", objectives.dsm("eps"), lambda: mean(score(vp), low=1e-3) / 0.999),
    "vp score": ("vp", objectives.dsm("score"), lambda: mean(score(vp), low=1e-3) / 0.999),
    "vp likelihood": (
        "vp",
        objectives.likelihood("score"),
        lambda: mean(score(vp, lambda t, s: beta(t) / 2), low=1e-3) / 0.999,
    ),
    "sub-vp": ("sub_vp", objectives.dsm("eps"), lambda: mean(score(sub_vp), low=1e-3) / 0.999),
    "ve": ("ve", objectives.dsm("eps"), lambda: mean(score(ve))),
    "ve likelihood": (
        "ve",
        objectives.likelihood("eps"),
        lambda: mean(score(ve, lambda t, s: s**2 * math.log(5000))),  # g^2 / 2 = sigma dsigma/dt
    ),
    "edm": ("edm", objectives.edm(), lambda: 1.0),  # F has variance 1 whatever x is
    "edm v": ("edm", objectives.edm(prediction="v"), lambda: 1.0),
    "flow": ("flow", objectives.flow(), lambda: mean(lambda t: of_x_0(1 - t, t) / t**2)),
    "flow logit-normal": (
        "flow",
        objectives.flow(LogitNormal()),
        lambda: mean(lambda t: of_x_0(1 - t, t) / t**2, lambda t: norm.pdf(math.log(t / (1 - t))) / (t * (1 - t))),
    ),
    "flow eps": ("flow", objectives.simple("eps"), lambda: mean(lambda t: of_x_0(1 - t, t) * (1 - t) ** 2 / t**2)),
}


@pytest.mark.parametrize("name", FLOORS)
def test_the_exact_network_has_the_loss_of_the_papers_integral(name):
    """It sees only what a network sees: c_in x_t, and what it is told of t."""
    kind, objective, floor = FLOORS[name]
    process, n = PROCESSES[kind], 4096
    words = ((np.arange(n) + 0.5) * 2.0**32 / n).astype(np.uint64)  # a rule of midpoints over t
    here = noising(objective, process).at(torch.from_numpy(at(objective.t, words, process)))
    x_0, seeds = math.sqrt(VARIANCE) * ops.noise(torch.arange(n), (32,), step=1, stream=9), torch.arange(n)
    x_in = ops.q_sample(x_0, here.step, seeds, here.q_table, address=here.address).double()

    t = TOLD[kind](here.t.double().numpy())
    a, s = (np.broadcast_to(f(t), t.shape) for f in (process.alpha, process.sigma))
    x = x_in / torch.from_numpy(1 / np.sqrt(s**2 + 0.25) if kind == "edm" else np.ones(n))[:, None]
    y_x, y_e = target(objective.prediction, a, s)
    slope = (y_x * a * VARIANCE + y_e * s) / (a**2 * VARIANCE + s**2)
    out = (torch.from_numpy(slope)[:, None] * x).float()
    losses = noising(objective, process).loss(out, x_0, seeds, here).double()
    assert losses.mean().item() == pytest.approx(floor(), rel=0.05 if "likelihood" in name else 0.015)


def test_a_batch_has_the_levels_of_its_times():
    t = torch.tensor([0.002, 0.5, 80.0, 200.0], dtype=torch.float64)
    here = noising(objectives.edm(), EDM(sigma_data=0.25)).at(t)
    c_in = 1 / (t**2 + 0.25**2).sqrt()
    torch.testing.assert_close(here.q_table.double(), torch.stack((c_in, c_in * t), 1), rtol=1e-6, atol=0)
    torch.testing.assert_close(here.t.double(), t.log() / 4, rtol=1e-6, atol=0)
    row = dict(zip(LOSS_COLUMNS, here.table.double().T, strict=True))
    torch.testing.assert_close(row["weight"], torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(row["p_x"], 0.0625 * c_in**2, rtol=1e-6, atol=0)
    assert here.step.tolist() == [0, 1, 2, 3] and here.address == 0 and here.t.dtype == torch.float32


# --- how real times are drawn ---

WORDS = np.random.default_rng(0).integers(0, 2**32, 1000, dtype=np.uint64)


@pytest.mark.parametrize("times", [Uniform(), LogitNormal()])
@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
def test_times_lie_on_the_process_as_on_the_unit_line(times, process):
    t = at(times, WORDS, process)
    np.testing.assert_allclose((t - process.t_min) / (process.t_max - process.t_min), times(WORDS), atol=1e-12)


@pytest.mark.parametrize("process", [VP(), VE(), RectifiedFlow()], ids=["vp", "ve", "flow"])
def test_log_normal_times_are_those_of_sigma_over_alpha(process):
    t, rho = at(LogNormal(0.1, 0.7), WORDS[:50], process), LogNormal(0.1, 0.7)(WORDS[:50])
    np.testing.assert_allclose(process.sigma(t) / process.alpha(t), rho, rtol=1e-9)


def test_log_normal_times_of_edm_are_sigma_itself_whatever_its_range():
    t = at(LogNormal(), WORDS, EDM(t_min=0.1, t_max=1.0))
    np.testing.assert_allclose(t, LogNormal()(WORDS), rtol=1e-12)


# --- runs ---


def trainer(kind: str, data: Dataset | None = None, **changes) -> Trainer:
    data, config = data or tiny.dataset(), tiny.config(schedule={"kind": kind}, **changes)
    return Trainer(new_model(data, config), data, config)


def take(run: Trainer, steps: int) -> list[float]:
    return [run.step() for _ in range(steps)]


@pytest.mark.parametrize(("kind", "process"), PROCESSES.items())
def test_a_process_is_trained_as_its_paper_does_unless_told_otherwise(kind, process):
    run = trainer(kind)
    prediction, objective = dict(edm=("edm", "edm"), flow=("flow", "flow")).get(kind, ("eps", "dsm"))
    assert (run.model.prediction, run.config.prediction, run.config.objective) == (prediction, prediction, objective)
    assert run.model.schedule == process and run.config.schedule == process.config()
    other = trainer(kind, prediction="v", objective="min_snr", times="logit_normal", times_std=0.5)
    assert other.task.noising.objective == objectives.Objective("v", objectives.MinSNR(5), LogitNormal(0.0, 0.5))


@pytest.mark.parametrize("prediction", ["eps", "score"])
def test_a_prediction_that_no_sample_can_start_from_is_refused_before_the_first_step(prediction):
    message = f"prediction: expected .*(where alpha falls to 0|a finite row at alpha 0).*, got '{prediction}'"
    for schedule in ({"kind": "flow"}, tiny.SCHEDULE.rescaled().config()):
        data, config = tiny.dataset(), tiny.config(schedule=schedule, prediction=prediction)
        with pytest.raises(ValueError, match=message):
            Trainer(new_model(data, config), data, config)
        assert Trainer(new_model(data, replace(config, prediction="x0")), data, replace(config, prediction="x0"))


@pytest.mark.parametrize("kind", PROCESSES)
def test_training_lowers_the_loss_of_the_same_draws(kind):
    flat = torch.linspace(0, 255, 10).to(torch.uint8)[:, None, None, None].expand(10, 1, 8, 8)
    run = trainer(kind, Dataset(flat.contiguous()), lr=1e-2, warmup=0)
    before = run.loss().item()
    take(run, 12)
    run.examples = 0
    assert run.loss().item() < 0.9 * before


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_run_resumes_to_the_bit_and_its_model_samples(tmp_path, kind):
    whole, half = (trainer(kind, warmup=0, lr=1e-2) for _ in range(2))
    losses = take(whole, 4)
    assert take(half, 2) == losses[:2]
    half.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(), schedule={"kind": kind})
    assert again.config == half.config and take(again, 2) == losses[2:]
    expected = whole.tensors()
    for key, tensor in again.tensors().items():
        assert torch.equal(tensor, expected[key]), key
    with pytest.raises(ValueError, match=f"schedule: expected that of .*, .*{kind}.*, got .*linear"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(), schedule=Schedule.linear().config())
    with pytest.raises(ValueError, match="times: expected that of .*, None, got uniform"):
        Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset(), times="uniform")

    again.save(tmp_path / CHECKPOINT)
    model = load(tmp_path)
    assert model.schedule == PROCESSES[kind] and model.prediction == whole.model.prediction
    images = [sample(m, 2, labels=0, steps=3, progress=False) for m in (model, whole.model)]
    assert torch.equal(*images) and images[0].isfinite().all() and images[0].std() > 0


SHORT = Schedule.linear(3, 0.05, 0.5).config()


def important(**changes) -> Trainer:
    network = {**tiny.NETWORK, "channel_mult": [1], "attention_levels": [], "learned_variance": True}
    options = dict(schedule=SHORT, times="importance", objective="vlb", network=network, batch_size=24)
    data, config = tiny.dataset(), tiny.config(**options | changes)
    return Trainer(new_model(data, config), data, config)


def test_steps_are_drawn_by_importance_once_each_has_its_terms():
    run = important()
    assert (run.batch()[2].weights == 1).all()
    take(run, 3)
    assert (run.task.importance.counts >= 10).all() and run.task.importance.counts.sum() == 72
    draws, p = run.batch()[2], run.task.importance.probabilities()
    assert p.max() > 1.2 * p.min()
    torch.testing.assert_close(draws.weights.double(), torch.from_numpy(1 / (3 * p[draws.t])), rtol=1e-6, atol=0)
    losses = run.task.losses(run.network, run.batch()).detach()
    assert run.loss().item() == pytest.approx((losses * draws.weights).mean().item(), rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_run_by_importance_resumes_to_the_bit(tmp_path, parts):
    whole, half = important(accumulate=parts), important(accumulate=parts)
    losses = take(whole, 5)
    take(half, 3)
    half.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, tiny.dataset())
    assert take(again, 2) == losses[3:]
    expected = whole.tensors()
    assert "importance.history" in expected
    for key, tensor in again.tensors().items():
        assert torch.equal(tensor, expected[key]), key
    assert load(tmp_path / CHECKPOINT).schedule.T == 3


def test_importance_is_refused_without_time_steps():
    with pytest.raises(ValueError, match="^times: expected uniform, .* without time steps, got 'importance'$"):
        trainer("flow", times="importance")
