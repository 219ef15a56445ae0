"""Forward noising: x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps."""

import math

import levels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, digest, values
from tolerances import Q_SAMPLE

from diffkern import ops, reference
from diffkern.schedule import Schedule

SCHEDULE = Schedule.linear()
TABLE = SCHEDULE.q_table()


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert digest(got) == digest(expected)


def seeds_of(n: int) -> torch.Tensor:
    return levels.SEEDS.repeat(n // len(levels.SEEDS) + 1)[:n]


def test_q_sample_is_the_papers_equation_in_float64():
    x_0, t = values((6, 3, 16, 16)), torch.tensor([0, 1, 10, 500, 998, 999])
    x_t, eps = ops.q_sample(x_0, t, seeds_of(6), TABLE, return_eps=True)
    alpha_bar = SCHEDULE.alpha_bar[t].view(6, 1, 1, 1)
    exact = alpha_bar.sqrt() * x_0.double() + (1 - alpha_bar).sqrt() * eps.double()
    torch.testing.assert_close(x_t.double(), exact, rtol=0, atol=Q_SAMPLE)
    assert torch.equal(eps, ops.noise(seeds_of(6), x_0.shape[1:], step=t, stream=2))


@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    return_eps=st.booleans(),
    one_t=st.booleans(),
    address=st.sampled_from([None, 5, "each"]),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_q_sample_has_the_references_bits_in_every_layout(shape, dtype, return_eps, one_t, address, data):
    x_0 = laid_out(values(tuple(shape), dtype), **data.draw(layouts(len(shape))))
    n = shape[0]
    t = torch.tensor(7) if one_t else laid_out(torch.arange(n) * 37 % 1000, (0,), (2,), 1)
    options = dict(address=torch.arange(n) * 10**6 if address == "each" else address, return_eps=return_eps)
    got = ops.q_sample(x_0, t, seeds_of(n), TABLE, **options)
    expected = reference.q_sample(x_0.contiguous(), t.contiguous(), seeds_of(n), TABLE, **options)
    if not return_eps:
        got, expected = (got,), (expected,)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), data=st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_the_in_place_twin_gives_the_same_bits_and_writes_nothing_beside_them(shape, dtype, data):
    layout = data.draw(layouts(len(shape)))
    x_0 = laid_out(values(tuple(shape), dtype), **layout)
    seeds, t = seeds_of(shape[0]), torch.arange(shape[0])
    for address in (None, 12345):
        expected = laid_out(ops.q_sample(x_0, t, seeds, TABLE, address=address), **layout)
        assert ops.q_sample_(x_0, t, seeds, TABLE, address=address) is None
        whole = [tensor._base if tensor._base is not None else tensor for tensor in (x_0, expected)]
        assert_same_bits(*whole)


def test_the_noise_is_that_of_the_address_where_there_is_one():
    x_0, seeds, t, address = values((4, 3, 8, 8)), seeds_of(4), torch.arange(4), torch.tensor([2**32 - 1, 0, 3, 7])
    x_t, eps = ops.q_sample(x_0, t, seeds, TABLE, address=address, return_eps=True)
    assert_same_bits(eps, ops.noise(seeds, (3, 8, 8), step=address, stream=2))
    a, s = (column.view(4, 1, 1, 1) for column in TABLE[:4].unbind(1))
    assert_same_bits(x_t, a * x_0 + s * eps)
    assert_same_bits(ops.q_sample(x_0, t, seeds, TABLE, address=t), ops.q_sample(x_0, t, seeds, TABLE))


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", DTYPES)
def test_q_sample_keeps_the_memory_format_and_the_noise(memory_format, dtype):
    x_0 = values((4, 3, 33, 35), dtype)
    x_t = ops.q_sample(x_0.contiguous(memory_format=memory_format), 500, seeds_of(4), TABLE)
    assert x_t.is_contiguous(memory_format=memory_format)
    assert_same_bits(x_t, ops.q_sample(x_0, 500, seeds_of(4), TABLE))


def test_an_expanded_image_gets_different_noise_for_each_seed():
    x_0 = values((1, 3, 8, 8)).expand(5, 3, 8, 8)
    assert_same_bits(ops.q_sample(x_0, 9, seeds_of(5), TABLE), reference.q_sample(x_0, 9, seeds_of(5), TABLE))


def test_q_sample_is_independent_of_batch_and_threads():
    x_0, seeds, t = values((9, 3, 65, 67)), seeds_of(9), torch.arange(9) * 111
    batch = ops.q_sample(x_0, t, seeds, TABLE)
    one_by_one = [ops.q_sample(x_0[n : n + 1], t[n : n + 1], seeds[n : n + 1], TABLE) for n in range(9)]
    assert torch.equal(torch.cat(one_by_one), batch)
    threads = torch.get_num_threads()
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            assert torch.equal(ops.q_sample(x_0, t, seeds, TABLE), batch)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", range(10))
def test_low_precision_noising_at_the_first_steps_really_adds_noise(dtype, t):
    """Half-precision alpha_bar is 1 there (bf16: t = 0..9, fp16: 0 and 1), and add_noise then adds nothing."""
    x_0 = torch.zeros(1, 3, 64, 64, dtype=dtype)
    x_t = ops.q_sample(x_0, t, 1, TABLE).double()
    std = SCHEDULE.one_minus_alpha_bar[t].sqrt().item()
    assert abs(x_t.std().item() / std - 1) < 5 / math.sqrt(2 * x_t.numel())


def test_nan_and_infinity_pass_through_and_touch_nothing_else():
    x_0 = values((2, 3, 8, 8))
    clean = ops.q_sample(x_0, 500, seeds_of(2), TABLE)
    x_0[0, 0, 0, 0], x_0[1, 2, 7, 7], x_0[1, 0, 3, 3] = torch.nan, torch.inf, -torch.inf
    got = ops.q_sample(x_0, 500, seeds_of(2), TABLE)
    clean[0, 0, 0, 0], clean[1, 2, 7, 7], clean[1, 0, 3, 3] = torch.nan, torch.inf, -torch.inf
    assert_same_bits(got, clean)


# --- the dispatcher ---


def test_q_sample_compiles_without_a_graph_break():
    def noised(x_0, t, seeds):
        x_t, eps = ops.q_sample(x_0, t, seeds, TABLE, return_eps=True)
        y = x_0 + 0
        ops.q_sample_(y, t, seeds, TABLE)
        return x_t + eps, y

    arguments = values((2, 3, 8, 8)), torch.tensor([3, 4]), seeds_of(2)
    compiled = torch.compile(noised, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), noised(*arguments), rtol=0, atol=0)


def test_q_sample_refuses_to_cut_a_gradient_and_runs_without_one():
    x_0 = values((2, 3, 8, 8)).requires_grad_()
    for op in (ops.q_sample, ops.q_sample_):
        with pytest.raises(RuntimeError, match="^x_0: expected no gradient through q_sample"):
            op(x_0, 5, seeds_of(2), TABLE)
    with torch.no_grad():
        assert_same_bits(ops.q_sample(x_0, 5, seeds_of(2), TABLE), ops.q_sample(x_0.detach(), 5, seeds_of(2), TABLE))
