"""Schedules against mpmath, known values and the identities of the forward process."""

import json
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from oracles import SCHEDULES, SPACINGS, subsequences
from oracles import one_thread as one_thread
from tolerances import TABLE

from diffkern import ops
from diffkern.schedule import Schedule

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def equal(got: torch.Tensor, expected, tolerance: float = TABLE) -> None:
    """Relatively, element by element."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=0)


# --- tables ---


def test_linear_schedule_has_the_known_values():
    s = Schedule.linear()
    equal(s.alpha_bar[999], 4.0358297653756833e-5)
    equal(s.alpha_bar[999].rsqrt(), 157.410457252, 1e-11)
    equal(s.posterior_x0[1], 0.54529149951027, 1e-13)
    equal(s.posterior_xt[1], 0.45470849899057, 1e-13)
    equal(s.posterior_variance[1], 5.4531876613e-5, 1e-10)
    equal(s.posterior_variance[500], 0.010051335778910)
    equal(s.posterior_variance[999], 0.019999983526561)
    equal(s.posterior_log_variance[0], -9.816725135, 1e-10)
    assert s.posterior_log_variance[0] == s.posterior_log_variance[1]


def mp_betas(kind: str, T: int, first: float, second: float) -> list[mpf]:
    first, second = mpf(first), mpf(second)
    at = [mpf(t) / max(T - 1, 1) for t in range(T)]
    if kind == "linear":
        return [first + u * (second - first) for u in at]
    if kind == "scaled_linear":
        return [(mp.sqrt(first) + u * (mp.sqrt(second) - mp.sqrt(first))) ** 2 for u in at]
    if kind == "sigmoid":
        return [first + (second - first) / (1 + mp.exp(6 - 12 * u)) for u in at]
    f = [mp.cos((mpf(t) / T + first) / (1 + first) * mp.pi / 2) ** 2 for t in range(T + 1)]
    return [min(1 - b / a, second) for a, b in zip(f, f[1:], strict=False)]


@pytest.mark.parametrize("T", [1, 2, 37, 1000])
@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("sigmoid", 1e-4, 0.02), ("cosine", 0.008, 0.999)],
)
def test_schedule_agrees_with_mpmath(kind, first, second, T):
    schedule = getattr(Schedule, kind)(T, first, second)
    betas = mp_betas(kind, T, first, second)
    alpha_bar, prev, tables = mpf(1), mpf(1), []
    for beta in betas:
        prev, alpha_bar = alpha_bar, alpha_bar * (1 - beta)
        c1 = mp.sqrt(prev) * beta / (1 - alpha_bar)
        c2 = mp.sqrt(1 - beta) * (1 - prev) / (1 - alpha_bar)
        tables.append((beta, 1 - beta, alpha_bar, prev, 1 - alpha_bar, beta * (1 - prev) / (1 - alpha_bar), c1, c2))
    expected = torch.tensor([[float(value) for value in row] for row in tables], dtype=torch.float64).T
    for got, column in zip(
        (
            schedule.betas,
            schedule.alphas,
            schedule.alpha_bar,
            schedule.alpha_bar_prev,
            schedule.one_minus_alpha_bar,
            schedule.posterior_variance,
            schedule.posterior_x0,
            schedule.posterior_xt,
        ),
        expected,
        strict=True,
    ):
        assert got.dtype == torch.float64 and got.shape == (T,)
        equal(got, column)


@every_schedule
def test_identities_of_the_posterior_hold_on_every_subsequence(schedule):
    for timesteps in subsequences(schedule):
        s = schedule.respace(timesteps)
        equal(s.posterior_x0 + s.posterior_xt * s.alpha_bar.sqrt(), s.alpha_bar_prev.sqrt())
        left = s.posterior_xt.square() * s.one_minus_alpha_bar + s.posterior_variance
        torch.testing.assert_close(left, 1 - s.alpha_bar_prev, rtol=0, atol=TABLE)


@every_schedule
def test_t_forward_steps_are_one_jump(schedule):
    gain, variance = 1.0, 0.0
    for t, (alpha, beta) in enumerate(zip(schedule.alphas.tolist(), schedule.betas.tolist(), strict=True)):
        gain, variance = gain * alpha**0.5, alpha * variance + beta
        assert gain**2 == pytest.approx(schedule.alpha_bar[t].item(), rel=TABLE)
        assert variance == pytest.approx(schedule.one_minus_alpha_bar[t].item(), rel=TABLE)


def test_float32_table_keeps_the_first_steps_where_float32_arithmetic_does_not():
    schedule = Schedule.linear()
    exact = schedule.one_minus_alpha_bar[0].item()
    naive = 1 - (1 - schedule.betas.float()).cumprod(0)
    assert abs(naive[0].item() / exact - 1) > 1e-4
    assert schedule.q_table()[0, 1].item() ** 2 == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(("dtype", "lost"), [(torch.bfloat16, 10), (torch.float16, 2)])
def test_low_precision_images_get_their_noise_at_the_first_steps(dtype, lost):
    schedule = Schedule.linear()
    half = schedule.alpha_bar.to(dtype)
    assert (half[:lost] == 1).all() and half[lost] < 1  # the trap: here that table would add no noise
    seeds = torch.arange(10)
    x_t = ops.q_sample(torch.zeros(10, 3, 32, 32, dtype=dtype), torch.arange(10), seeds, schedule.q_table())
    assert x_t.dtype == dtype
    std = x_t.double().flatten(1).std(1)
    torch.testing.assert_close(std, schedule.one_minus_alpha_bar[:10].sqrt(), rtol=0.05, atol=0)


@every_schedule
def test_q_table_is_float32_rounded_once(schedule):
    table = schedule.q_table("cpu")
    assert table.dtype == torch.float32 and table.shape == (schedule.T, 2)
    assert torch.equal(table[:, 0], schedule.alpha_bar.sqrt().float())
    assert torch.equal(table[:, 1], schedule.one_minus_alpha_bar.sqrt().float())


def test_terminal_beta_of_one_is_a_terminal_snr_of_zero():
    s = Schedule([0.1, 0.2, 1.0])
    assert s.alpha_bar[2] == 0 and s.one_minus_alpha_bar[2] == 1
    assert s.posterior_xt[2] == 0 and s.posterior_x0[2] == pytest.approx(0.72**0.5, rel=TABLE)


def test_a_rescaled_schedule_ends_without_signal_and_begins_as_before():
    """Lin et al. 2024, algorithm 1: sqrt(alpha_bar) is an affine function of what it was."""
    old = Schedule.scaled_linear()
    new = old.rescaled()
    assert new.alpha_bar[-1] == 0 and new.betas[-1] == 1
    equal(new.alpha_bar[0], old.alpha_bar[0])
    root, rescaled = old.alpha_bar.sqrt(), new.alpha_bar.sqrt()
    equal(rescaled[:-1] / (root[:-1] - root[-1]), (rescaled[0] / (root[0] - root[-1])).expand(999), 1e-12)
    assert Schedule.from_config(json.loads(json.dumps(new.config()))) == new


def test_from_alpha_bar_is_the_schedule_with_that_alpha_bar():
    equal(Schedule.from_alpha_bar(Schedule.cosine(50).alpha_bar).betas, Schedule.cosine(50).betas, 1e-11)
    for wrong in ([0.9, 0.9], [0.5, 0.6], [1.0, 0.5], [0.5, 0.0, 0.0], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="^alpha_bar: expected numbers that fall from below 1"):
            Schedule.from_alpha_bar(wrong)


# --- fewer steps ---


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("trailing", 10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("leading", 10, [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("linspace", 10, [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
        ("quadratic", 10, [999, 789, 604, 444, 308, 197, 111, 49, 12, 0]),
        ("trailing", 1, [999]),
        ("leading", 1, [0]),
        ("linspace", 1, [999]),
        ("quadratic", 1, [999]),
    ],
)
def test_spacing_has_the_known_steps(spacing, steps, expected):
    assert Schedule.linear().timesteps(steps, spacing) == expected


@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_number_of_steps_is_strictly_decreasing_and_in_range(spacing):
    schedule = Schedule.linear()
    for N in range(1, 1001):
        timesteps = schedule.timesteps(N, spacing)
        assert len(timesteps) == N and timesteps[-1] >= 0 and timesteps[0] <= 999
        assert all(a > b for a, b in zip(timesteps, timesteps[1:], strict=False))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_previous_step_is_the_next_one_listed(spacing):
    schedule = Schedule.linear()
    for N in (*range(1, 21), *range(21, 1001, 49)):
        timesteps = schedule.timesteps(N, spacing)
        s = schedule.respace(timesteps)
        visited = schedule.alpha_bar[timesteps]
        previous = torch.cat((visited[1:], torch.ones(1, dtype=torch.float64)))
        assert torch.allclose(s.alpha_bar.flip(0), visited, rtol=TABLE, atol=0)
        assert torch.allclose(s.alpha_bar_prev.flip(0), previous, rtol=TABLE, atol=0)


@settings(deadline=None, derandomize=True)
@given(T=st.integers(1, 5000), data=st.data())
def test_spacings_are_the_nearest_integers_to_their_fractions(T, data):
    N = data.draw(st.integers(1, T))
    half = Fraction(1, 2)
    schedule = Schedule(np.full(T, 1e-3))
    for i, t in enumerate(schedule.timesteps(N, "trailing")):
        assert abs(t - (Fraction(T * (N - i), N) - 1)) <= half
    for i, t in enumerate(reversed(schedule.timesteps(N, "leading"))):
        assert t == i * (T // N)
    if N > 1:
        for i, t in enumerate(reversed(schedule.timesteps(N, "linspace"))):
            assert abs(t - Fraction((T - 1) * i, N - 1)) <= half
        for i, t in enumerate(reversed(schedule.timesteps(N, "quadratic"))):
            assert t == i or (t > i and abs(t - (T - 1) * Fraction(i, N - 1) ** 2) <= half)


def test_trailing_is_right_where_float_arithmetic_is_not():
    schedule = Schedule.linear()
    wrong = []
    for N in range(1, 1001):
        if len(np.round(np.arange(1000, 0, -1000 / N)) - 1) != N:
            wrong.append(N)
            assert len(schedule.timesteps(N, "trailing")) == N
    assert len(wrong) == 62 and wrong[:3] == [61, 103, 121]


def test_all_steps_are_visited_when_none_are_asked_for():
    schedule = Schedule.cosine(50)
    for spacing in SPACINGS:
        assert schedule.timesteps(spacing=spacing) == list(range(49, -1, -1))


@pytest.mark.parametrize("steps", [[7, 3, 0], (7, 3, 0), np.array([7, 3, 0]), torch.tensor([7, 3, 0])])
def test_explicit_steps_are_taken_as_they_are(steps):
    assert Schedule.linear(8).timesteps(steps) == [7, 3, 0]


@every_schedule
def test_respacing_to_all_steps_changes_nothing(schedule):
    s = schedule.respace(schedule.timesteps())
    equal(s.betas, schedule.betas)
    assert torch.equal(s.alpha_bar, schedule.alpha_bar)
    assert torch.equal(s.one_minus_alpha_bar, schedule.one_minus_alpha_bar)


# --- the object ---


@every_schedule
def test_config_rebuilds_the_schedule_through_json(schedule):
    for s in (schedule, schedule.respace([schedule.T - 1]), schedule.respace(schedule.T).respace([0])):
        again = Schedule.from_config(json.loads(json.dumps(s.config())))
        assert again == s and torch.equal(again.alpha_bar, s.alpha_bar) and repr(again) == repr(s)


def test_schedules_are_equal_by_their_numbers():
    assert Schedule.linear(10) == Schedule(Schedule.linear(10).betas)
    assert Schedule.linear(10) != Schedule.linear(11)
    assert Schedule.linear(10) != "linear"
    assert len(Schedule.linear(10)) == Schedule.linear(10).T == 10


def test_schedule_is_frozen_and_keeps_its_own_copy_of_betas():
    betas = torch.full((4,), 0.1, dtype=torch.float64)
    schedule = Schedule(betas)
    betas[0] = 0.9
    assert schedule.betas[0] == 0.1
    with pytest.raises(FrozenInstanceError):
        schedule.betas = betas


def test_repr_says_how_the_schedule_was_made():
    assert repr(Schedule.cosine(10)) == "Schedule.cosine(T=10, s=0.008, max_beta=0.999)"
    assert repr(Schedule.linear(3).respace([2, 0])).endswith(".respace([2, 0])")
    assert repr(Schedule([0.1, 0.2])) == "Schedule(<2 betas>)"


BAD = [
    (lambda: Schedule([]), ValueError, "betas: expected a 1-d sequence of at least one number, got shape (0,)"),
    (lambda: Schedule([[0.1]]), ValueError, "betas: expected a 1-d sequence of at least one number, got shape (1, 1)"),
    (lambda: Schedule(0.1), ValueError, "betas: expected a 1-d sequence of at least one number, got shape ()"),
    (lambda: Schedule("linear"), TypeError, "betas: expected numbers, got str"),
    (lambda: Schedule(None), TypeError, "betas: expected numbers, got NoneType"),
    (lambda: Schedule([0.1, "a"]), TypeError, "betas: expected numbers, got list"),
    (lambda: Schedule([0.1, 0.0]), ValueError, "betas: expected numbers in (0, 1), the last at most 1, got 0.0 at"),
    (lambda: Schedule([-0.1, 0.5]), ValueError, "the last at most 1, got -0.1 at index 0"),
    (lambda: Schedule([0.1, 1.0, 0.1]), ValueError, "the last at most 1, got 1.0 at index 1"),
    (lambda: Schedule([0.1, 1.5]), ValueError, "the last at most 1, got 1.5 at index 1"),
    (lambda: Schedule([0.1, float("nan")]), ValueError, "the last at most 1, got nan at index 1"),
    (lambda: Schedule.linear(0), ValueError, "T: expected an int >= 1, got 0"),
    (lambda: Schedule.cosine(-5), ValueError, "T: expected an int >= 1, got -5"),
    (lambda: Schedule.linear(10.0), TypeError, "T: expected an int >= 1, got 10.0"),
    (lambda: Schedule.sigmoid(True), TypeError, "T: expected an int >= 1, got True"),
    (lambda: Schedule.linear(10, 0.0), ValueError, "beta_start: expected a number in (0, 1), got 0.0"),
    (lambda: Schedule.linear(10, "a"), TypeError, "beta_start: expected a number in (0, 1), got 'a'"),
    (lambda: Schedule.linear(10, 0.2, 0.1), ValueError, "beta_end: expected a number in [beta_start, 1) = [0.2, 1)"),
    (lambda: Schedule.scaled_linear(10, -1.0), ValueError, "beta_start: expected a number in (0, 1), got -1.0"),
    (lambda: Schedule.scaled_linear(10, 0.1, 1.0), ValueError, "beta_end: expected a number in [beta_start, 1)"),
    (lambda: Schedule.sigmoid(10, float("nan")), ValueError, "beta_start: expected a number in (0, 1), got nan"),
    (lambda: Schedule.cosine(10, -0.1), ValueError, "s: expected a number >= 0, got -0.1"),
    (lambda: Schedule.cosine(10, float("inf")), ValueError, "s: expected a number >= 0, got inf"),
    (lambda: Schedule.cosine(10, 0.008, 1.0), ValueError, "max_beta: expected a number in (0, 1), got 1.0"),
    (lambda: Schedule.cosine(10, 0.008, None), TypeError, "max_beta: expected a number in (0, 1), got None"),
    (lambda: Schedule.linear(10).timesteps(0), ValueError, "steps: expected 1 to 10, the length of the schedule, got"),
    (lambda: Schedule.linear(10).timesteps(11), ValueError, "steps: expected 1 to 10, the length of the schedule, got"),
    (lambda: Schedule.linear(10).timesteps(2.0), TypeError, "steps: expected an int in 1..10 or a decreasing sequence"),
    (lambda: Schedule.linear(10).timesteps("10"), TypeError, "steps: expected an int in 1..10 or a decreasing"),
    (lambda: Schedule.linear(10).timesteps([]), ValueError, "steps: expected at least one step, got none"),
    (
        lambda: Schedule.linear(10).timesteps([3, 3]),
        ValueError,
        "steps: expected strictly decreasing steps, got [3,",
    ),
    (
        lambda: Schedule.linear(10).timesteps([0, 9]),
        ValueError,
        "steps: expected strictly decreasing steps, got [0,",
    ),
    (lambda: Schedule.linear(10).timesteps([10, 0]), ValueError, "steps: expected steps in 0..9, got 10 to 0"),
    (lambda: Schedule.linear(10).timesteps([9, -1]), ValueError, "steps: expected steps in 0..9, got 9 to -1"),
    (lambda: Schedule.linear(10).timesteps([9.0]), TypeError, "steps: expected ints, got 9.0"),
    (lambda: Schedule.linear(10).timesteps(5, "even"), ValueError, "spacing: expected one of ['karras', 'lambda'"),
    (lambda: Schedule.linear(10).respace([0, 5]), ValueError, "steps: expected strictly decreasing steps, got [0, 5]"),
    (lambda: Schedule.from_config({}), ValueError, "config: expected a kind among ['alpha_bar', 'cosine', 'custom',"),
    (lambda: Schedule.from_config({"kind": "warp"}), ValueError, "'sigmoid'], got 'warp'"),
    (lambda: Schedule.from_config("linear"), TypeError, "config: expected a dict, got str"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_schedule_refuses_what_does_not_fit(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
