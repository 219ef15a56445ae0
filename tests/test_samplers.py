"""Every sampler's table against closed forms: moments of Gaussian data, identities, and one another."""

import math
import re

import pytest
import torch
from oracles import (
    SCHEDULES,
    SPACINGS,
    Gaussian,
    ddim_moments,
    ddpm_moments,
    mp_alpha_bar,
    propagate,
    subsequences,
)
from oracles import one_thread as one_thread
from tolerances import ALGORITHM, TABLE

from diffkern import ops
from diffkern.samplers import PREDICTIONS, ddim, ddpm, fold_x0
from diffkern.schedule import Schedule

COLUMN = {name: i for i, name in enumerate(ops.COLUMNS)}
LINEAR = Schedule.linear()
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def optimal_variance(schedule: Schedule, timesteps: list[int], data: Gaussian) -> torch.Tensor:
    """v_prev beta / v: the variance of q(x_prev|x_t) where the data are Gaussian (Bao et al. 2022)."""
    s = schedule.respace(timesteps)
    return (data.variance(s.alpha_bar_prev) * s.betas / data.variance(s.alpha_bar)).flip(0)


def moments(table, schedule, timesteps, data, prediction="eps", **start) -> tuple[float, float]:
    return propagate(table, *data.out(schedule, timesteps, prediction), **start)


# --- known moments of Gaussian data ---


@pytest.mark.parametrize(
    ("variance", "std"), [("fixed_small", 0.496110080), ("fixed_large", 0.500751510), ("optimal", 0.5)]
)
def test_ddpm_has_the_known_moments(variance, std):
    data, timesteps = Gaussian(), LINEAR.timesteps()
    if variance == "optimal":
        variance = optimal_variance(LINEAR, timesteps, data)
    mean, var = moments(ddpm(LINEAR, timesteps, variance=variance), LINEAR, timesteps, data)
    assert mean == pytest.approx(0.299996973, abs=6e-10)
    assert math.sqrt(var) == pytest.approx(std, abs=6e-10)


@pytest.mark.parametrize(
    ("steps", "spacing", "mean", "std"),
    [
        (10, "trailing", 0.299295, 0.369954809),
        (50, "trailing", 0.299102, 0.471402673),
        (250, "trailing", 0.299058, 0.494085321),
        (1000, "trailing", 0.299050, 0.498495283),
        (10, "linspace", 0.299310824, 0.361611723),
    ],
)
def test_ddim_has_the_known_moments(steps, spacing, mean, std):
    timesteps = LINEAR.timesteps(steps, spacing)
    got_mean, var = moments(ddim(LINEAR, timesteps), LINEAR, timesteps, Gaussian())
    assert got_mean == pytest.approx(mean, abs=6e-7)
    assert math.sqrt(var) == pytest.approx(std, abs=6e-10)


# --- closed forms at 40 digits ---


# all steps, and few by every spacing
CHOICES = [(1000, "trailing"), *((steps, spacing) for steps in (1, 2, 10, 50) for spacing in SPACINGS)]
FAR = [(10, "trailing"), (50, "quadratic")]


@pytest.mark.parametrize(
    ("data", "steps", "spacing"),
    [
        *((Gaussian(), *choice) for choice in CHOICES),
        *((data, *choice) for data in (Gaussian(-0.7, 0.05), Gaussian(0.0, 1.0)) for choice in FAR),
    ],
    ids=str,
)
def test_moments_agree_with_their_closed_forms(data, steps, spacing):
    timesteps = LINEAR.timesteps(steps, spacing)
    alpha_bars = mp_alpha_bar(LINEAR, timesteps)
    explicit = {"optimal": optimal_variance(LINEAR, timesteps, data)}
    for variance in ("fixed_small", "fixed_large", "optimal"):
        table = ddpm(LINEAR, timesteps, variance=explicit.get(variance, variance))
        expected = tuple(map(float, ddpm_moments(data, alpha_bars, variance)))
        assert moments(table, LINEAR, timesteps, data) == pytest.approx(expected, abs=TABLE)
    for eta in (0.0, 0.3, 1.0):
        expected = tuple(map(float, ddim_moments(data, alpha_bars, eta)))
        assert moments(ddim(LINEAR, timesteps, eta=eta), LINEAR, timesteps, data) == pytest.approx(expected, abs=TABLE)


@every_schedule
def test_moments_agree_with_their_closed_forms_on_every_subsequence(schedule):
    data = Gaussian()
    for timesteps in subsequences(schedule):
        alpha_bars = mp_alpha_bar(schedule, timesteps)
        for variance in ("fixed_small", "fixed_large"):
            expected = tuple(map(float, ddpm_moments(data, alpha_bars, variance)))
            got = moments(ddpm(schedule, timesteps, "v", variance), schedule, timesteps, data, "v")
            assert got == pytest.approx(expected, abs=TABLE)
        expected = tuple(map(float, ddim_moments(data, alpha_bars, 0.5)))
        got = moments(ddim(schedule, timesteps, "v", 0.5), schedule, timesteps, data, "v")
        assert got == pytest.approx(expected, abs=TABLE)


@every_schedule
@pytest.mark.parametrize("data", [Gaussian(), Gaussian(0.0, 1.0)], ids=str)
def test_optimal_variance_keeps_the_marginals_exactly(schedule, data):
    for timesteps in subsequences(schedule):
        table = ddpm(schedule, timesteps, "v", optimal_variance(schedule, timesteps, data))
        ab = schedule.alpha_bar[timesteps[0]].item()
        got = moments(table, schedule, timesteps, data, "v", mean=ab**0.5 * data.mean, variance=data.variance(ab))
        assert got == pytest.approx((data.mean, data.std**2), abs=TABLE)


@every_schedule
def test_noiseless_last_step_lands_on_a_point_mass(schedule):
    data = Gaussian(-0.4, 0.0)
    for timesteps in subsequences(schedule):
        for table in (
            ddpm(schedule, timesteps, "v"),
            ddpm(schedule, timesteps, "v", "fixed_large"),
            ddim(schedule, timesteps, "v"),
            ddim(schedule, timesteps, "v", 1.0),
        ):
            assert moments(table, schedule, timesteps, data, "v") == pytest.approx((-0.4, 0.0), abs=TABLE)


@every_schedule
def test_optimal_v_of_unit_gaussian_data_is_zero(schedule):
    timesteps = schedule.timesteps()
    gain, offset = Gaussian(0.0, 1.0).out(schedule, timesteps, "v")
    torch.testing.assert_close(torch.stack((gain, offset)), torch.zeros(2, schedule.T, dtype=torch.float64))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_ddim_with_zero_eps_only_scales(steps, spacing):
    timesteps = LINEAR.timesteps(steps, spacing)
    zero = torch.zeros(steps, dtype=torch.float64)
    mean, variance = propagate(ddim(LINEAR, timesteps), zero, zero, mean=1.0, variance=1.0)
    scale = LINEAR.alpha_bar[timesteps[0]].item() ** -0.5
    assert (mean, variance**0.5) == pytest.approx((scale, scale), rel=TABLE)


# --- identities and equivalences ---


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.25, 1.0])
def test_ddim_keeps_the_marginal_variance(schedule, eta):
    """d^2 + sigma^2 = 1 - ab_prev, where x_t = sqrt(1 - ab) eps becomes d eps; and x_0 keeps sqrt(ab_prev)."""
    for timesteps in subsequences(schedule):
        s, table = schedule.respace(timesteps), ddim(schedule, timesteps, "v", eta).flip(0)
        k_x, k_0, sigma = (table[:, COLUMN[name]] for name in ("k_x", "k_0", "sigma"))
        d = k_x * s.one_minus_alpha_bar.sqrt()
        torch.testing.assert_close(d.square() + sigma.square(), 1 - s.alpha_bar_prev, rtol=0, atol=TABLE)
        torch.testing.assert_close(k_0 + k_x * s.alpha_bar.sqrt(), s.alpha_bar_prev.sqrt(), rtol=TABLE, atol=0)


@every_schedule
@every_prediction
def test_ddim_with_eta_one_is_ancestral_sampling_with_fixed_small_variance(schedule, prediction):
    for timesteps in subsequences(schedule):
        a, b = ddim(schedule, timesteps, prediction, 1.0), ddpm(schedule, timesteps, prediction)
        torch.testing.assert_close(a, b, rtol=TABLE, atol=TABLE)


@every_schedule
def test_without_clipping_ddpm_is_algorithm_2_as_printed(schedule):
    """x_{t-1} = (x_t - beta_t / sqrt(1 - ab_t) eps) / sqrt(alpha_t) + sigma_t z"""
    for timesteps in subsequences(schedule):
        s = schedule.respace(timesteps)
        posterior = ddpm(schedule, timesteps).flip(0)
        literal = fold_x0(posterior)
        expected = {
            "k_x": 1 / s.alphas.sqrt(),
            "k_o": -s.betas / s.one_minus_alpha_bar.sqrt() / s.alphas.sqrt(),
            "k_0": torch.zeros(s.T, dtype=torch.float64),
        }
        for name, column in expected.items():
            torch.testing.assert_close(literal[:, COLUMN[name]], column, rtol=ALGORITHM, atol=0)
        kept = [COLUMN[name] for name in ops.COLUMNS if name not in expected]
        assert torch.equal(literal[:, kept], posterior[:, kept])


@every_schedule
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_eps_x0_v_and_score_heads_agree(schedule, make):
    data, x = Gaussian(), 0.7
    for timesteps in subsequences(schedule):
        results = []
        for prediction in ("eps", "x0", "v", "score"):
            table = make(schedule, timesteps, prediction)
            p_x, p_o, k_x, k_o, k_0 = table[:, :5].unbind(1)
            gain, offset = data.out(schedule, timesteps, prediction)
            x0_hat = p_x * x + p_o * (gain * x + offset)
            results.append(torch.stack((x0_hat, k_x * x + k_o * (gain * x + offset) + k_0 * x0_hat)))
            folded = fold_x0(table)
            results.append(torch.stack((x0_hat, folded[:, 2] * x + folded[:, 3] * (gain * x + offset))))
        exact = data.x_0(x, schedule.alpha_bar[timesteps])
        # 1 / sqrt(ab) amplifies float64's own rounding; v and x0 do not know it
        worst = TABLE + 2e-16 / schedule.alpha_bar[timesteps].min().sqrt().item()
        for result in results:
            torch.testing.assert_close(result, results[2], rtol=worst, atol=worst)
            torch.testing.assert_close(result[0], exact, rtol=worst, atol=worst)


@every_schedule
def test_learned_variance_spans_from_beta_tilde_to_beta(schedule):
    for timesteps in subsequences(schedule):
        s, table = schedule.respace(timesteps), ddpm(schedule, timesteps, "v", "learned").flip(0)
        assert table[0, COLUMN["sigma"]] == 0 and (table[1:, COLUMN["sigma"]] == 1).all()
        low, high = table[:, COLUMN["log_var_min"]].exp(), table[:, COLUMN["log_var_max"]].exp()
        torch.testing.assert_close(low[1:], s.posterior_variance[1:], rtol=TABLE, atol=0)
        torch.testing.assert_close(high, s.betas, rtol=TABLE, atol=0)
        assert table.isfinite().all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_any_number_of_steps_gives_a_finite_table_with_a_noiseless_end(spacing):
    for N in (1, 2, 3, 4, 5, 7, 10, 31, 50, 333, 999):
        timesteps = LINEAR.timesteps(N, spacing)
        for table in (ddpm(LINEAR, timesteps, variance="fixed_large"), ddim(LINEAR, timesteps, eta=0.5)):
            assert table.shape == (N, len(ops.COLUMNS)) and table.dtype == torch.float64
            assert table.float().isfinite().all()
            assert table[:, COLUMN["t"]].tolist() == timesteps
            assert (table[:-1, COLUMN["sigma"]] > 0).all() and table[-1, COLUMN["sigma"]] == 0
            # the last x_prev is x0_hat itself, so that clipped images are in [-1, 1] to the bit
            assert table[-1, COLUMN["k_x"]] == 0 and table.float()[-1, COLUMN["k_0"]] == 1


def test_explicit_variances_are_taken_as_they_are():
    variance = torch.tensor([0.25, 0.0, 4.0])
    assert ddpm(LINEAR, [999, 500, 3], variance=variance)[:, COLUMN["sigma"]].tolist() == [0.5, 0.0, 2.0]


# --- a terminal SNR of zero ---

ZERO_SNR = Schedule([0.1, 0.5, 1.0])


@pytest.mark.parametrize("prediction", ["eps", "score"])
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_zero_terminal_snr_refuses_eps_and_asks_for_v_or_x0(make, prediction):
    message = f"prediction: expected 'v', 'x0' or 'flow' where alpha falls to 0 .*, got '{prediction}'"
    with pytest.raises(ValueError, match=message):
        make(ZERO_SNR, [2, 1, 0], prediction)
    assert make(ZERO_SNR, [1, 0], prediction).isfinite().all()  # where the last step is not visited
    with pytest.raises(ValueError, match="falls to 2.87e-42"):  # 1 / sqrt(ab) is no float32
        make(Schedule([1 - 2**-46] * 6), [5, 0], prediction)


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("make", [ddpm, ddim])
def test_zero_terminal_snr_is_sampled_through_v_and_x0(make, prediction):
    data, timesteps = Gaussian(), [2, 1, 0]
    table = make(ZERO_SNR, timesteps, prediction)
    closed = ddpm_moments if make is ddpm else ddim_moments
    expected = closed(data, mp_alpha_bar(ZERO_SNR, timesteps), "fixed_small" if make is ddpm else 0.0)
    for t in (table, fold_x0(table)):
        got = moments(t, ZERO_SNR, timesteps, data, prediction)
        assert got == pytest.approx(tuple(map(float, expected)), abs=TABLE)


BAD = [
    (lambda: ddpm(LINEAR, [5, 0], "noise"), ValueError, "prediction: expected one of eps, x0, v, score, flow, edm, mu"),
    (
        lambda: ddim(LINEAR, [5, 0], None),
        ValueError,
        "prediction: expected one of eps, x0, v, score, flow, edm, mu, got None",
    ),
    (lambda: ddpm(LINEAR, [5, 0], variance="small"), ValueError, "variance: expected one of ('fixed_small',"),
    (lambda: ddpm(LINEAR, [5, 0], variance=None), ValueError, "or a tensor of variances, got None"),
    (lambda: ddpm(LINEAR, [5, 0], variance=torch.ones(3)), ValueError, "variance: expected shape (2,), one for each"),
    (lambda: ddpm(LINEAR, [5, 0], variance=-torch.ones(2)), ValueError, "variance: expected finite variances >= 0"),
    (lambda: ddpm(LINEAR, [5, 0], variance=torch.tensor([1, torch.nan])), ValueError, "variance: expected finite"),
    (lambda: ddim(LINEAR, [5, 0], eta=-0.1), ValueError, "eta: expected a number in [0, 1], got -0.1"),
    (lambda: ddim(LINEAR, [5, 0], eta=1.5), ValueError, "eta: expected a number in [0, 1], got 1.5"),
    (lambda: ddim(LINEAR, [5, 0], eta=float("nan")), ValueError, "eta: expected a number in [0, 1], got nan"),
    (lambda: ddim(LINEAR, [5, 0], eta="1"), TypeError, "eta: expected a number in [0, 1], got '1'"),
    (lambda: ddpm(LINEAR, [0, 5]), ValueError, "steps: expected strictly decreasing steps, got [0, 5]"),
    (lambda: ddim(LINEAR, [1000, 5]), ValueError, "steps: expected steps in 0..999, got 1000 to 5"),
    (lambda: ddim(LINEAR, []), ValueError, "steps: expected at least one step, got none"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_samplers_refuse_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
