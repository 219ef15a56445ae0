"""Objectives: the rows of a loss from a schedule, and how t is drawn."""

import math

import numpy as np
import pytest
import torch
from levels import values
from scipy import stats
from tolerances import LOSS, TABLE

from diffkern import ops
from diffkern.ops import LOSS_COLUMNS
from diffkern.schedule import Schedule
from diffkern.training import objectives, times
from diffkern.training.objectives import P2, ErrorOf, Likelihood, MinSNR, Objective

SCHEDULES = {
    "linear": Schedule.linear(),
    "cosine": Schedule.cosine(),
    "respaced": Schedule.linear().respace(7),
    "one step": Schedule([0.3]),
}
PREDICTIONS = ("eps", "x0", "v", "score", "flow", "edm", "mu")


def columns(table: torch.Tensor) -> dict[str, np.ndarray]:
    return dict(zip(LOSS_COLUMNS, table.double().numpy().T, strict=True))


# --- rows ---


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_levels_of_a_schedule_are_its_posterior(name):
    schedule = SCHEDULES[name]
    at = objectives.levels_of(schedule, variance="learned")
    first = torch.arange(schedule.T) == 0
    for got, expected in (
        (at.alpha, schedule.alpha_bar.sqrt()),
        (at.sigma, schedule.one_minus_alpha_bar.sqrt()),
        (at.c1, schedule.posterior_x0),
        (at.c2, schedule.posterior_xt),
        (np.exp(at.log_var_min), schedule.posterior_log_variance.exp()),
        (np.exp(at.log_var_max), schedule.betas),
        (at.first, first.double()),
    ):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-9, atol=TABLE)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_networks_target_is_the_output_from_which_x_0_follows(prediction):
    """p_x (a x_0 + s eps) + p_o (y_x x_0 + y_e eps) is x_0 for every x_0 and eps."""
    schedule = Schedule.linear(100)
    row = columns(Objective(prediction).table(schedule))
    of_x_0 = row["p_x"] * row["a"] + row["p_o"] * row["y_x"]
    of_eps = row["p_x"] * row["s"] + row["p_o"] * row["y_e"]
    scale = np.abs(row["p_x"]) + np.abs(row["p_o"])
    np.testing.assert_allclose(of_x_0, 1, atol=2e-7 * scale.max())
    np.testing.assert_allclose(of_eps, 0, atol=2e-7 * scale.max())


WEIGHTS = [MinSNR(5), MinSNR(0.5), P2(), P2(0.3, 0.5), ErrorOf("edm", 0.5), ErrorOf("flow"), ErrorOf("v"), Likelihood()]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_makes_the_same_loss_whatever_is_predicted(weight):
    """An output's error is that of the x_0 that follows from it, over p_o."""
    for schedule in (Schedule.linear(), Schedule.cosine(100)):
        at = objectives.levels_of(schedule)
        for prediction in PREDICTIONS[:-1]:
            row = columns(Objective(prediction, weight).table(schedule))
            np.testing.assert_allclose(row["weight"] / row["p_o"] ** 2, weight(at), rtol=1e-6)


def test_weights_are_the_papers():
    schedule = Schedule.linear()
    at = objectives.levels_of(schedule)
    snr = (schedule.alpha_bar / schedule.one_minus_alpha_bar).numpy()
    beta, alpha, rest = (table.numpy() for table in (schedule.betas, schedule.alphas, schedule.one_minus_alpha_bar))

    def of(prediction: str, weight: objectives.Weight) -> np.ndarray:
        return columns(Objective(prediction, weight).rows(at))["weight"]

    small = schedule.posterior_log_variance.exp().numpy()
    for got, expected in (
        (of("eps", MinSNR(5)), np.minimum(snr, 5) / snr),  # Hang et al. 2023, section 3.4
        (of("v", MinSNR(5)), np.minimum(snr, 5) / (snr + 1)),
        (of("x0", MinSNR(5)), np.minimum(snr, 5)),
        (of("eps", P2(1, 0.5)), 1 / np.sqrt(1 + snr)),  # Choi et al. 2022, eq. 8
        (of("eps", Likelihood()), beta**2 / (2 * small * alpha * rest)),  # Ho et al. 2020, eq. 12
        (of("flow", ErrorOf("flow")), np.ones(1000)),
        (of("x0", ErrorOf("eps")), snr),  # Salimans & Ho 2022, section 4
        (of("x0", ErrorOf("v")), snr + 1),
        (of("v", ErrorOf("x0")), 1 / (snr + 1)),
        (of("eps", 1.0), np.ones(1000)),
    ):
        np.testing.assert_allclose(got, expected, rtol=2e-6)
    sigma = np.geomspace(0.002, 80, 50)
    edm = objectives.edm(0.7).rows(objectives.levels(1 + 0 * sigma, sigma))
    row, variance = columns(edm), sigma**2 + 0.7**2
    np.testing.assert_allclose(row["p_x"], 0.7**2 / variance, rtol=1e-6)  # Karras et al. 2022, table 1
    np.testing.assert_allclose(row["p_o"], 0.7 * sigma / np.sqrt(variance), rtol=1e-6)
    by_weight = Objective("edm", ErrorOf("edm", 0.7), constants={"sigma_data": 0.7})
    by_weight = by_weight.rows(objectives.levels(1 + 0 * sigma, sigma))
    np.testing.assert_allclose(columns(by_weight)["weight"], row["weight"], rtol=1e-6)


def test_the_likelihoods_weight_is_the_bounds_own():
    """With a fixed variance, the bound's terms differ between two outputs as the weighted squares do; in nats."""
    schedule = Schedule.linear(50)
    objective, n = Objective("eps", Likelihood(), vlb=1.0), 49
    table, seeds, step = objective.table(schedule, variance="fixed_small"), torch.arange(n), torch.arange(1, 50)
    x_0, outputs = values((n, 64), seed=1), [values((n, 64), seed=seed) for seed in (2, 3)]
    losses = [ops.diffusion_loss(out, x_0, seeds, step, table, bound=True).double() for out in outputs]
    difference = losses[0] - losses[1]
    scale = losses[0].abs().max()
    torch.testing.assert_close(difference[:, 1] * math.log(2), difference[:, 0], rtol=1e-4, atol=1e-6 * scale.item())


def test_a_learned_variance_lies_between_the_two_fixed_ones():
    schedule = Schedule.cosine(20)
    small, large, learned = (
        columns(Objective().table(schedule, variance=name)) for name in ("fixed_small", "fixed_large", "learned")
    )
    assert (learned["log_var_min"] == small["log_var_max"]).all()
    assert (learned["log_var_max"] == large["log_var_max"]).all()
    given = columns(Objective().table(schedule, variance=np.full(20, 0.25)))
    assert (given["log_var_max"] == np.float32(math.log(0.25))).all()


def test_hybrid_is_the_simple_loss_and_a_thousandth_of_the_whole_bound():
    schedule = Schedule.linear(100)
    table = objectives.hybrid().table(schedule, variance="learned")
    out, x_0, t = values((7, 6, 5, 4)), values((7, 3, 5, 4), seed=1).clamp(-1, 1), torch.arange(7)
    seeds, weights = torch.arange(7), values((7,), seed=2)
    terms = ops.diffusion_loss(out, x_0, seeds, t, table, learned_variance=True, bound=True)
    eps = ops.noise(seeds, (3, 5, 4), step=t, stream=2)
    simple = (out[:, :3] - eps).square().flatten(1).mean(1)
    got = objectives.hybrid().loss(out, x_0, seeds, t, table, terms=100, weights=weights, learned_variance=True)
    torch.testing.assert_close(got, weights * (simple + 100 / 1000 * terms[:, 1]), rtol=1e-5, atol=1e-6)
    leaf = out.clone().requires_grad_()
    objectives.hybrid().loss(leaf, x_0, seeds, t, table, terms=100, learned_variance=True).sum().backward()
    mean = out[:, :3].clone().requires_grad_()
    objectives.simple().loss(mean, x_0, seeds, t, table).sum().backward()
    assert torch.equal(leaf.grad[:, :3], mean.grad) and leaf.grad[:, 3:].any()


def test_the_bound_alone_trains_the_mean_too():
    schedule = Schedule.linear(10)
    objective = objectives.vlb()
    table = objective.table(schedule)
    out, x_0 = values((4, 3, 5)).requires_grad_(), values((4, 3, 5), seed=1)
    seeds, t = torch.arange(4), torch.tensor([9, 3, 1, 0])
    loss = objective.loss(out, x_0, seeds, t, table, terms=10)
    terms = ops.diffusion_loss(out.detach(), x_0, seeds, t, table, bound=True)
    torch.testing.assert_close(loss, 10 * terms[:, 1], rtol=LOSS, atol=0)
    assert (torch.autograd.grad(loss.sum(), out)[0] != 0).all()


def test_the_bound_of_a_batchs_own_table_has_the_terms_of_its_whole_grid():
    """Rows for two of ten steps count as they do in the table of all ten."""
    schedule, objective = Schedule.linear(10), objectives.vlb()
    at, t = objectives.levels_of(schedule), np.array([7, 2])
    points = np.append(1.0, at.alpha), np.append(0.0, at.sigma)
    previous = tuple(column[t] for column in points)
    table = objective.rows(objectives.levels(at.alpha[t], at.sigma[t], previous))
    out, x_0, seeds = values((2, 3, 5)), values((2, 3, 5), seed=1), torch.arange(2)
    t = torch.from_numpy(t)
    expected = objective.loss(out, x_0, seeds, t, objective.table(schedule), terms=10)
    got = objective.loss(out, x_0, seeds, torch.arange(2), table, terms=10, address=t)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)


def test_a_flows_batch_has_a_table_of_its_own():
    """In continuous time: a row for each example, one address for all, and the error of the velocity eps - x_0."""
    objective, x_0, seeds = objectives.flow(), values((5, 2, 3)), torch.arange(5)
    t = objective.t(np.arange(5, dtype=np.uint64) << np.uint64(29))
    table, step = objective.rows(objectives.levels(1 - t, t)), torch.arange(5)
    x_t = ops.q_sample(x_0, step, seeds, table[:, :2].contiguous(), address=0)
    eps = ops.noise(seeds, (2, 3), step=0, stream=2)
    a, s = (torch.from_numpy(column).float().view(5, 1, 1) for column in (1 - t, t))
    torch.testing.assert_close(x_t, a * x_0 + s * eps)
    loss = objective.loss(x_t, x_0, seeds, step, table, address=0)
    torch.testing.assert_close(loss, (x_t - (eps - x_0)).square().flatten(1).mean(1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Objective("z").table(Schedule.linear(5)),
            ValueError,
            "prediction: expected one of .*, got 'z'",
        ),
        (
            lambda: Objective().table(Schedule.linear(5), variance="small"),
            ValueError,
            "variance: expected one of .* or variances, got 'small'",
        ),
        (
            lambda: Objective().table(Schedule.linear(5), first="pixels"),
            ValueError,
            r"first: expected one of \('bins', 'density'\), got 'pixels'",
        ),
        (
            lambda: objectives.hybrid().rows(objectives.levels([0.6], [0.8])),
            ValueError,
            r"previous: expected the \(alpha, sigma\) that each step reaches, for the bound, got None",
        ),
        (
            lambda: objectives.likelihood().rows(objectives.levels([0.6], [0.8])),
            ValueError,
            r"previous: expected the \(alpha, sigma\) that each step reaches, for the weight of the bound, got None",
        ),
        (
            lambda: objectives.vlb().loss(*4 * [torch.zeros(1)], torch.zeros(1, 12)),
            TypeError,
            "terms: expected an int >= 1, the terms of the bound, got None",
        ),
        (
            lambda: objectives.vlb().loss(*4 * [torch.zeros(1)], torch.zeros(1, 12), terms=0),
            ValueError,
            "terms: expected an int >= 1, the terms of the bound, got 0",
        ),
        (lambda: times.steps(times.LogNormal(), WORDS, 5), ValueError, r"times: expected t in \[0, 1\], got LogNormal"),
        (lambda: objectives.levels([1.0], [0.0]), ValueError, "sigma: expected numbers > 0, got 0.0"),
        (
            lambda: Objective("eps").table(Schedule([0.5, 1.0])),
            ValueError,
            "prediction: expected one with a finite row at alpha 0, sigma 1, got 'eps'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_terminal_snr_of_zero_may_be_trained_by_v():
    row = columns(Objective("v").table(Schedule([0.5, 1.0])))
    assert (row["y_x"][1], row["y_e"][1], row["p_x"][1], row["p_o"][1]) == (-1, 0, 0, -1)


# --- how t is drawn ---

WORDS = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint64)


def test_uniform_steps_are_those_of_the_integer_product():
    assert times.steps(times.Uniform(), WORDS, 1000).tolist() == [int(word) * 1000 >> 32 for word in WORDS]
    assert times.steps(times.Uniform(), np.array([0, 2**32 - 1], np.uint64), 7).tolist() == [0, 6]


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (times.Uniform(0.2, 0.9), stats.uniform(0.2, 0.7)),
        (times.LogNormal(), stats.lognorm(1.2, scale=math.exp(-1.2))),
    ],
)
def test_times_have_their_distribution(draw, distribution):
    assert stats.kstest(draw(WORDS), distribution.cdf).pvalue > 0.01


def test_the_logit_of_a_logit_normal_time_is_normal():
    t = times.LogitNormal(0.5, 2.0)(WORDS)
    assert stats.kstest(np.log(t / (1 - t)), stats.norm(0.5, 2.0).cdf).pvalue > 0.01
    assert t.min() > 0 and t.max() < 1
    steps = times.steps(times.LogitNormal(0.5, 2.0), WORDS, 50)
    assert steps.tolist() == np.floor(50 * t).astype(int).tolist()


@pytest.mark.parametrize("draw", [times.Uniform(), times.LogitNormal(), times.LogNormal()])
def test_no_word_draws_the_end_of_the_line(draw):
    t = draw(np.array([0, 1, 2**32 - 2, 2**32 - 1], np.uint64))
    assert np.isfinite(t).all() and (t > 0).all() and (np.diff(t) > 0).all()


def filled(scale: np.ndarray, rounds: int = 10) -> times.Importance:
    importance = times.Importance(len(scale))
    generator = np.random.default_rng(1)
    for _ in range(rounds):
        steps = torch.from_numpy(generator.permutation(len(scale)))
        importance.update(steps, torch.from_numpy(scale * generator.uniform(0.5, 1.5, len(scale)))[steps])
    return importance


def test_importance_is_uniform_until_each_step_has_its_terms():
    importance = filled(np.arange(1.0, 9.0), rounds=9)
    t, weights = importance(WORDS)
    assert (importance.probabilities() == 1 / 8).all() and (weights == 1).all()
    assert t.tolist() == times.steps(times.Uniform(), WORDS, 8).tolist()


def test_importance_draws_by_the_root_of_the_mean_square_of_the_last_terms():
    scale = np.array([1.0, 2.0, 0.0, 5.0])
    importance = filled(scale, rounds=25)
    p = importance.history.square().mean(1).sqrt().numpy()
    expected = 0.999 * p / p.sum() + 0.001 / 4
    np.testing.assert_allclose(importance.probabilities(), expected, rtol=TABLE)
    t, weights = importance(WORDS)
    counts = np.bincount(t.numpy(), minlength=4)
    assert stats.chisquare(counts, expected * len(WORDS)).pvalue > 0.01
    np.testing.assert_allclose(weights.numpy(), 1 / (4 * expected[t.numpy()]), rtol=1e-6)


def test_importance_keeps_the_last_terms_in_the_order_in_which_they_came():
    importance = times.Importance(2, length=3)
    for term in range(5):
        importance.update(torch.tensor([1]), torch.tensor([float(term)]))
    importance.update(torch.tensor([0, 0]), torch.tensor([7.0, 8.0]))
    assert sorted(importance.history[1].tolist()) == [2, 3, 4] and importance.history[0].tolist() == [7, 8, 0]
    assert importance.counts.tolist() == [2, 5]


def test_weighted_losses_have_the_mean_of_uniform_ones():
    """E_p[L_t / (T p_t)] = mean of L_t, exactly."""
    importance = filled(np.array([1.0, 3.0, 0.2]))
    p, losses = importance.probabilities(), np.array([0.3, -1.0, 5.0])
    assert (p * losses / (3 * p)).sum() == pytest.approx(losses.mean())


def test_importance_resumes_to_the_bit_from_its_tensors():
    whole, first = filled(np.arange(1.0, 6.0), 12), filled(np.arange(1.0, 6.0), 12)
    resumed = times.Importance(5)
    for name, tensor in resumed.tensors().items():
        tensor.copy_(first.tensors()[name])
    for importance in (whole, resumed):
        importance.update(torch.tensor([3, 3, 0]), torch.tensor([9.0, 1.0, 4.0]))
    for got, expected in zip(resumed(WORDS), whole(WORDS), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(T=0), ValueError, "T: expected an int >= 1, got 0"),
        (dict(T=1.5), TypeError, "T: expected an int >= 1, got 1.5"),
        (dict(T=5, length=0), ValueError, "length: expected an int >= 1, got 0"),
        (dict(T=5, uniform=2.0), ValueError, r"uniform: expected a number in \[0, 1\], got 2.0"),
    ],
)
def test_importance_refuses_what_has_no_history(arguments, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        times.Importance(**arguments)
