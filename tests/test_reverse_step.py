"""The reverse step: one kernel for every sampler, against float64 and, bit for bit, against the reference."""

import math

import levels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, digest, values
from tolerances import REVERSE_STEP, REVERSE_STEP_X0, SAME_STEP

from diffkern import ops, reference, samplers
from diffkern.schedule import Schedule

COLUMN = {name: i for i, name in enumerate(ops.COLUMNS)}
STEP = torch.tensor([0, 1, 2, 1, 0, 2, 2])  # row 1 has no noise


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert digest(got) == digest(expected)


def case(
    shape: tuple[int, ...] = (7, 3, 9, 13),
    dtype: torch.dtype = torch.float32,
    *,
    history: int = 0,
    guided: bool = False,
    learned_variance: bool = False,
    **options,
) -> tuple[tuple, dict]:
    """Arguments of a reverse step with these things in it, all of order 1."""
    n = shape[0]
    out_shape = (n, 2 * shape[1], *shape[2:]) if learned_variance else shape
    arguments = (
        values(shape, dtype, seed=1),
        values(out_shape, dtype, seed=2),
        levels.rows(history),
        STEP.repeat(n // 7 + 1)[:n],
        levels.SEEDS.repeat(n // 7 + 1)[:n],
    )
    options |= dict(
        learned_variance=learned_variance, history=[values(shape, dtype, seed=4 + j) for j in range(history)]
    )
    if guided:
        options |= dict(out_uncond=values(out_shape, dtype, seed=3), guidance=options.get("guidance", 2.5))
    return arguments, options


def exact(
    x, out, table, step, seeds, *, out_uncond=None, guidance=1.0, clip=False, learned_variance=False, history=()
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_next, x0_hat) by the docstring's equations, sample by sample in float64; the noise is given."""
    x_next, x0_hat = [], []
    for n, row in enumerate(table[step.expand(len(x))].double()):
        p_x, p_o, k_x, k_o, k_0, sigma, log_var_min, log_var_max, t, *k_h = row.tolist()
        channels = x.shape[1]
        o, second_half = out[n, :channels].double(), out[n, channels:].double()
        if out_uncond is not None:
            u = out_uncond[n, :channels].double()
            o = u + guidance * (o - u)
        x0 = p_x * x[n].double() + p_o * o
        if clip:
            x0 = x0.clamp(-1, 1)
        mean = k_x * x[n].double() + k_o * o + k_0 * x0 + sum(k * h[n].double() for k, h in zip(k_h, history))  # noqa: B905
        if learned_variance:
            v = (second_half + 1) / 2
            sigma = sigma * (v * log_var_max + (1 - v) * log_var_min).exp().sqrt()
        z = reference.noise(seeds[n].item(), x.shape[1:], step=int(t), stream=1)[0].double()
        x_next.append(mean + sigma * z)
        x0_hat.append(x0)
    return torch.stack(x_next), torch.stack(x0_hat)


OPTIONS = [
    pytest.param(dict(), id="plain"),
    pytest.param(dict(clip=True), id="clip"),
    pytest.param(dict(guided=True), id="guided"),
    pytest.param(dict(guided=True, guidance=0.0), id="unconditional"),
    pytest.param(dict(learned_variance=True), id="learned_variance"),
    pytest.param(dict(guided=True, learned_variance=True, clip=True), id="guided_learned_variance_clip"),
    *(pytest.param(dict(history=count), id=f"history_{count}") for count in (1, 2, 3, 4)),
    pytest.param(dict(history=4, guided=True, learned_variance=True, clip=True), id="everything"),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_reverse_step_is_its_equation_in_float64(options):
    arguments, options = case(**options)
    x_next, x0_hat = ops.reverse_step(*arguments, **options, return_x0=True)
    expected_x_next, expected_x0_hat = exact(*arguments, **options)
    torch.testing.assert_close(x_next.double(), expected_x_next, **REVERSE_STEP)
    torch.testing.assert_close(x0_hat.double(), expected_x0_hat, **REVERSE_STEP_X0)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reverse_step_has_the_references_bits(options, dtype):
    arguments, options = case((7, 3, 37, 41), dtype, **options)
    for got, expected in zip(
        ops.reverse_step(*arguments, **options, return_x0=True),
        reference.reverse_step(*arguments, **options, return_x0=True),
        strict=True,
    ):
        assert_same_bits(got, expected)


@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    guided=st.booleans(),
    learned_variance=st.booleans(),
    clip=st.booleans(),
    history=st.integers(0, 4),
    one_row=st.booleans(),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_reverse_step_and_its_twin_have_the_references_bits_in_every_layout(
    shape, dtype, guided, learned_variance, clip, history, one_row, data
):
    (x, out, table, step, seeds), options = case(
        tuple(shape),
        dtype,
        guided=guided,
        learned_variance=learned_variance and len(shape) > 1,
        clip=clip,
        history=history,
    )
    if one_row:
        step = torch.tensor(2)
    expected = reference.reverse_step(x, out, table, step, seeds, **options, return_x0=True)

    def somewhere(tensor: torch.Tensor) -> torch.Tensor:
        return laid_out(tensor, **data.draw(layouts(len(shape))))

    x, out, options["history"] = somewhere(x), somewhere(out), [somewhere(h) for h in options["history"]]
    if guided:
        options["out_uncond"] = somewhere(options["out_uncond"])
    if not one_row:
        step = laid_out(step, (0,), (3,), 1)
    for got, wanted in zip(
        ops.reverse_step(x, out, table, step, seeds, **options, return_x0=True), expected, strict=True
    ):
        assert_same_bits(got, wanted)
    x0_hat = somewhere(torch.zeros_like(x))
    assert ops.reverse_step_(x, out, table, step, seeds, **options, x0_hat=x0_hat) is None
    assert_same_bits(x, expected[0])
    assert_same_bits(x0_hat, expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_in_place_twin_writes_nothing_beside_its_tensor(dtype):
    (x, out, table, step, seeds), _ = case((7, 3, 9, 13), dtype)
    layout = dict(order=(2, 0, 3, 1), steps=(2, 3, 1, 2), offset=3)
    expected = laid_out(ops.reverse_step(x, out, table, step, seeds), **layout)
    x = laid_out(x, **layout)
    ops.reverse_step_(x, out, table, step, seeds)
    assert_same_bits(x._base, expected._base)


# --- samplers are rows ---


def test_algorithm_2_as_printed_is_a_row():
    """Ho et al. 2020: x_{t-1} = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t) + sigma_t z."""
    schedule = Schedule.linear()
    timesteps = [999, 500, 1, 0]
    table = samplers.fold_x0(samplers.ddpm(schedule, range(999, -1, -1), variance="fixed_large")).float()
    x, eps = values((4, 3, 8, 8), seed=1), values((4, 3, 8, 8), seed=2)
    t = torch.tensor(timesteps)
    beta, alpha, alpha_bar = (
        column[t].view(4, 1, 1, 1) for column in (schedule.betas, schedule.alphas, schedule.alpha_bar)
    )
    z = ops.noise([1, 2, 3, 4], (3, 8, 8), step=t, stream=1).double()
    noisy = (t > 0).view(4, 1, 1, 1)
    expected = (x.double() - beta / (1 - alpha_bar).sqrt() * eps.double()) / alpha.sqrt() + noisy * beta.sqrt() * z
    got = ops.reverse_step(x, eps, table, 999 - t, [1, 2, 3, 4])
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=SAME_STEP)


def test_learned_variance_interpolates_the_papers_log_variances():
    """Nichol & Dhariwal 2021, eq. 15: the ends v = 1 and v = 0 are beta and beta_tilde."""
    schedule = Schedule.linear()
    table = samplers.ddpm(schedule, range(999, -1, -1), variance="learned").float()
    x, eps, seeds = values((2, 3, 8, 8), seed=1), values((2, 3, 8, 8), seed=2), torch.tensor([5, 6])
    for second_half, variance in ((1.0, "fixed_large"), (-1.0, "fixed_small")):
        fixed = samplers.ddpm(schedule, range(999, -1, -1), variance=variance).float()
        out = torch.cat((eps, torch.full_like(eps, second_half)), 1)
        for step in (0, 500, 998, 999):
            got = ops.reverse_step(x, out, table, step, seeds, learned_variance=True)
            torch.testing.assert_close(got, ops.reverse_step(x, eps, fixed, step, seeds), rtol=0, atol=SAME_STEP)


def test_guidance_of_one_is_the_conditional_output_and_of_zero_the_unconditional():
    (x, out, table, step, seeds), options = case(guided=True)
    uncond = options["out_uncond"]
    for guidance, alone in ((1.0, out), (0.0, uncond)):
        got = ops.reverse_step(x, out, table, step, seeds, out_uncond=uncond, guidance=guidance)
        torch.testing.assert_close(got, ops.reverse_step(x, alone, table, step, seeds), **REVERSE_STEP_X0)


def test_a_row_without_sigma_draws_no_noise():
    (x, out, table, _, seeds), _ = case()
    got = ops.reverse_step(x, out, table, 1, seeds)
    assert torch.equal(got, ops.reverse_step(x, out, table, 1, seeds + 1))
    table[1, COLUMN["t"]] = 77.0
    assert torch.equal(got, ops.reverse_step(x, out, table, 1, seeds))
    infinite = values((7, 6, 9, 13), seed=2)
    infinite[:, 3:] = torch.inf  # the variance it does not use
    got = ops.reverse_step(x, infinite, table, 1, seeds, learned_variance=True)
    assert torch.equal(got, ops.reverse_step(x, infinite[:, :3], table, 1, seeds))


def test_the_noise_is_that_of_the_rows_t_in_stream_1():
    (x, out, table, step, seeds), _ = case()
    table[:, : COLUMN["sigma"]] = 0
    table[:, COLUMN["sigma"]] = 1
    t = table[step, COLUMN["t"]].long()
    assert torch.equal(ops.reverse_step(x, out, table, step, seeds), ops.noise(seeds, x.shape[1:], step=t, stream=1))


def test_clip_bounds_x0_hat_and_nothing_else():
    arguments, _ = case(clip=True)
    x_next, x0_hat = ops.reverse_step(*arguments, clip=True, return_x0=True)
    assert x0_hat.min() == -1 and x0_hat.max() == 1 and x_next.abs().max() > 1
    _, free = ops.reverse_step(*arguments, return_x0=True)
    assert torch.equal(x0_hat, free.clamp(-1, 1)) and free.abs().max() > 1


# --- the same bits everywhere ---


def test_reverse_step_is_independent_of_batch():
    (x, out, table, step, seeds), options = case((14, 3, 31, 37), guided=True, learned_variance=True)
    batch = ops.reverse_step(x, out, table, step, seeds, **options)
    for split in (1, 5):
        uncond = options["out_uncond"].split(split)
        parts = [
            ops.reverse_step(a, b, table, c, d, **options | dict(out_uncond=u))
            for a, b, c, d, u in zip(*(tensor.split(split) for tensor in (x, out, step, seeds)), uncond, strict=True)
        ]
        assert torch.equal(torch.cat(parts), batch)


def test_reverse_step_is_independent_of_the_thread_count():
    arguments, options = case((14, 3, 61, 67), guided=True, learned_variance=True, history=2)
    threads = torch.get_num_threads()
    try:
        got = []
        for count in range(1, 9):
            torch.set_num_threads(count)
            got.append(ops.reverse_step(*arguments, **options))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x_next, got[0]) for x_next in got)


def test_reverse_step_keeps_the_memory_format():
    (x, out, table, step, seeds), _ = case()
    x = x.contiguous(memory_format=torch.channels_last)
    x_next = ops.reverse_step(x, out, table, step, seeds)
    assert x_next.is_contiguous(memory_format=torch.channels_last)


# --- aliases, NaN and infinity ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_x_may_be_the_networks_output_itself(dtype):
    (x, _, table, step, seeds), _ = case(dtype=dtype)
    expected = ops.reverse_step(x, x.clone(), table, step, seeds)
    assert_same_bits(ops.reverse_step(x, x, table, step, seeds), expected)
    ops.reverse_step_(x, x, table, step, seeds)
    assert_same_bits(x, expected)


def test_x_may_be_the_first_half_of_a_learned_variance_output():
    (_, out, table, step, seeds), options = case(learned_variance=True)
    expected = ops.reverse_step(out[:, :3].clone(), out.clone(), table, step, seeds, **options)
    variance = out[:, 3:].clone()
    ops.reverse_step_(out[:, :3], out, table, step, seeds, **options)
    assert torch.equal(out[:, :3], expected) and torch.equal(out[:, 3:], variance)


def test_x_and_x0_hat_may_be_the_halves_of_one_tensor():
    """As a network takes them that is conditioned on its own prediction."""
    (x, out, table, step, seeds), options = case(history=1)
    both = torch.cat((x, options["history"][0]), 1)
    expected = ops.reverse_step(x, out, table, step, seeds, **options, return_x0=True)
    ops.reverse_step_(both[:, :3], out, table, step, seeds, history=[both[:, 3:]], x0_hat=both[:, 3:])
    assert torch.equal(both, torch.cat(expected, 1))


OVERLAPS = {
    "the next channel": (lambda m: dict(x=m[:, 1:4], out=m[:, :3]), "out: expected the memory of x or other memory"),
    "the channel before": (lambda m: dict(x=m[:, :3], out=m[:, 1:4]), "out: expected the memory of x or other memory"),
    "the next row": (lambda m: dict(x=m[:1, :3, 1:], out=m[:1, :3, :-1]), "out: expected the memory of x"),
    "the next sample": (lambda m: dict(x=m[1:, :3], out=m[:-1, :3]), "out: expected the memory of x or other memory"),
    "other strides": (lambda m: dict(x=m[:, :3], out=m[:, :3].mT), "out: expected the memory of x or other memory"),
    "out_uncond": (lambda m: dict(x=m[:, 1:4], out_uncond=m[:, :3]), "out_uncond: expected the memory of x or"),
    "history": (lambda m: dict(x=m[:, 1:4], history=[m[:, :3]]), "history: expected the memory of x or other memory"),
    "x0_hat on out": (lambda m: dict(x0_hat=m[:, 1:4], out=m[:, :3]), "out: expected the memory of x0_hat or other"),
    "x0_hat on x": (lambda m: dict(x0_hat=m[:, :3], x=m[:, :3]), "x0_hat: expected other memory than x's"),
}


@pytest.mark.parametrize(("views", "message"), OVERLAPS.values(), ids=OVERLAPS)
def test_a_target_that_overlaps_an_input_is_refused_and_left_as_it_was(views, message):
    memory = values((3, 6, 9, 9))
    given, before = views(memory), memory.clone()
    like = next(iter(given.values()))
    arguments = dict(x=like.clone(), out=like.clone(), table=levels.rows(len(given.get("history", []))), step=1) | given
    with pytest.raises(RuntimeError, match=f"^{message}.*, got some of it$"):
        ops.reverse_step_(**arguments, seeds=range(len(like)))
    assert torch.equal(memory, before)


def test_x0_hat_may_take_the_place_of_the_output_or_of_the_history():
    (x, out, table, step, seeds), options = case(history=1)
    x_next, x0_hat = ops.reverse_step(x, out, table, step, seeds, **options, return_x0=True)
    for place in (out, options["history"][0]):
        inputs = [tensor.clone() for tensor in (x, out, options["history"][0])]
        target = inputs[1] if place is out else inputs[2]
        ops.reverse_step_(inputs[0], inputs[1], table, step, seeds, history=[inputs[2]], x0_hat=target)
        assert torch.equal(inputs[0], x_next) and torch.equal(target, x0_hat)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_visible_and_where_they_are(dtype, value, clip):
    (x, out, table, step, seeds), _ = case(dtype=dtype)
    clean = ops.reverse_step(x, out, table, step, seeds, clip=clip)
    x[0, 0, 0, 0] = out[3, 2, 8, 12] = out[5, 1, 2, 3] = value
    got, x0_hat = ops.reverse_step(x, out, table, step, seeds, clip=clip, return_x0=True)
    expected = reference.reverse_step(x, out, table, step, seeds, clip=clip, return_x0=True)
    assert_same_bits(got, expected[0])
    assert_same_bits(x0_hat, expected[1])
    assert not got[0, 0, 0, 0].isfinite() and not got[3, 2, 8, 12].isfinite()
    if math.isnan(value):
        assert x0_hat[0, 0, 0, 0].isnan()  # a clamp does not hide it
    touched = torch.zeros_like(x, dtype=torch.bool)
    touched[0, 0, 0, 0] = touched[3, 2, 8, 12] = touched[5, 1, 2, 3] = True
    assert torch.equal(got[~touched], clean[~touched])


def test_exp_of_the_standard_is_within_the_stated_ulps_of_float64():
    x = np.concatenate((np.linspace(-87.3, 88.3, 2_000_003), np.geomspace(1e-30, 1, 1000), [0])).astype(np.float32)
    correct = np.exp(x.astype(np.float64))
    got = reference.exp(x)
    assert (np.abs(got - correct) / np.ldexp(1.0, np.frexp(correct)[1] - 24)).max() < 0.989
    edges = np.array([-np.inf, -88, 88.5, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(reference.exp(edges), [0, 0, np.inf, np.inf, np.nan])


# --- the dispatcher ---


def test_reverse_step_compiles_without_a_graph_break():
    (x, out, table, step, seeds), options = case(guided=True, history=1, clip=True)

    def step_twice(x, out, step, seeds):
        y, x0_hat = ops.reverse_step(x, out, table, step, seeds, **options, return_x0=True)
        y, other = y + 0, torch.zeros_like(x0_hat)
        ops.reverse_step_(y, out, table, step, seeds, **options, x0_hat=other)
        return y, x0_hat, other

    compiled = torch.compile(step_twice, backend="aot_eager", fullgraph=True)
    got, expected = compiled(x, out, step, seeds), step_twice(x, out, step, seeds)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["x", "out", "out_uncond", "history", "x0_hat"])
def test_reverse_step_refuses_to_cut_a_gradient_and_runs_without_one(name):
    (x, out, table, step, seeds), options = case(guided=True, history=1)
    tensors = dict(x=x, out=out, out_uncond=options["out_uncond"], history=options["history"][0])
    tensors["x0_hat"] = torch.empty_like(x)
    tensors[name].requires_grad_()
    history, x0_hat = [tensors.pop("history")], tensors.pop("x0_hat")
    arguments = dict(**tensors, table=table, step=step, seeds=seeds, guidance=2.0, history=history)
    if name != "x0_hat":
        with pytest.raises(RuntimeError, match=f"^{name}: expected no gradient through reverse_step"):
            ops.reverse_step(**arguments)
    with pytest.raises(RuntimeError, match=f"^{name}: expected no gradient through reverse_step_"):
        ops.reverse_step_(**arguments, x0_hat=x0_hat)
    with torch.no_grad():
        ops.reverse_step_(**arguments, x0_hat=x0_hat)
