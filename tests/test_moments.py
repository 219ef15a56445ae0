"""Sums over samples: against float64, and the same bits for any batch and any number of threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, values
from tolerances import LOSS

from diffkern import ops, reference


def assert_near(got: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Relative to the sums of the magnitudes."""
    assert got.dtype == torch.float64
    error = (got - reference.moments(a, b)).abs()
    assert (error <= LOSS * reference.moments(a.abs(), b.abs()) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (1023,), (1024,), (1025,), (3, 65, 67)])
def test_moments_are_the_sums_in_float64(shape, dtype):
    a, b = values((7, *shape), dtype), values((7, *shape), dtype, seed=1)
    assert_near(ops.moments(a, b), a, b)


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_moments_are_right_in_every_layout(shape, dtype, data):
    shape = (shape[0], *(max(1, size) for size in shape[1:]))
    a, b = (laid_out(values(shape, dtype, seed=seed), **data.draw(layouts(len(shape)))) for seed in (0, 1))
    assert_near(ops.moments(a, b), a, b)


def test_moments_give_the_deviation_of_a_guided_output():
    """std of u + w (c - u), from the sums of c and u alone."""
    c, u, w = values((4, 3, 32, 32)), values((4, 3, 32, 32), seed=1), 2.5
    sum_c, sum_u, cc, cu, uu = ops.moments(c, u).unbind(1)
    mean = (w * sum_c + (1 - w) * sum_u) / c[0].numel()
    variance = (w * w * cc + 2 * w * (1 - w) * cu + (1 - w) ** 2 * uu) / c[0].numel() - mean**2
    expected = (u + w * (c - u)).double().flatten(1).var(1, correction=0)
    torch.testing.assert_close(variance, expected, rtol=10 * LOSS, atol=0)


def test_moments_are_independent_of_batch_and_thread_count():
    a, b = values((14, 3, 61, 67)), values((14, 3, 61, 67), seed=1)
    batch = ops.moments(a, b)
    assert torch.equal(torch.cat([ops.moments(a[n : n + 5], b[n : n + 5]) for n in (0, 5, 10)]), batch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(ops.moments(a, b), batch)
    finally:
        torch.set_num_threads(threads)


def test_moments_pass_opcheck_and_refuse_to_cut_a_gradient():
    a, b = values((2, 3, 4, 5)), values((2, 3, 4, 5), seed=1)
    torch.library.opcheck(torch.ops.diffkern.moments.default, (a, b))
    with pytest.raises(RuntimeError, match="^b: expected no gradient through moments, .* which diffkern.torch_ops"):
        ops.moments(a, b.requires_grad_())
