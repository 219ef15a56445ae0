"""Quantiles of predictions: torch.quantile's, and the reference's bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, digest, values
from long_rows import COLUMN, long_case

from diffkern import ops, reference


def case(shape: tuple[int, ...] = (7, 3, 9, 13), dtype: torch.dtype = torch.float32, with_: tuple = ()):
    """(x, out, table, step) and the options of long rows."""
    (x, out, table, step, _), options = long_case(shape, dtype, history=2, with_=with_)
    names = ("out_uncond", "grad", "learned_variance")
    return (x, out, table, step), {name: options[name] for name in names if name in options}


def unclamped(x, out, table, step, **options) -> torch.Tensor:
    """x0_hat without its limit, as the step returns it."""
    table = table.clone()
    table[:, COLUMN["limit"]] = torch.inf
    table[:, [COLUMN[name] for name in ("sigma", "q_x", "q_o")]] = 0
    table[:, COLUMN["q_0"]] = 1
    return ops.reverse_step(x, out, table, step, torch.arange(len(x)), **options, return_kept=True)[1]


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("with_", [(), ("out_uncond", "grad", "learned_variance")])
@pytest.mark.parametrize("shape", [(1,), (3, 9, 13), (1024,), (3, 37, 41)])
def test_abs_quantile_is_torchs_quantile_of_the_steps_prediction(q, with_, shape):
    if len(shape) == 1:
        with_ = tuple(name for name in with_ if name != "learned_variance")
    arguments, options = case((7, *shape), with_=with_)
    expected = torch.quantile(unclamped(*arguments, **options).abs().flatten(1).double(), q, dim=1)
    got = ops.abs_quantile(*arguments, q, **options)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    with_=st.sets(st.sampled_from(("out_uncond", "grad", "learned_variance"))),
    q=st.floats(0, 1),
    without_out=st.booleans(),
    data=st.data(),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_abs_quantile_has_the_references_bits_in_every_layout(shape, dtype, with_, q, without_out, data):
    shape = (shape[0], *(max(1, size) for size in shape[1:]))
    if len(shape) < 2:
        with_ = with_ - {"learned_variance"}
    (x, out, table, step), options = case(shape, dtype, tuple(with_))
    if without_out and not with_ & {"learned_variance", "out_uncond"}:
        out = None
    expected = reference.abs_quantile(x, out, table, step, q, **options)

    def somewhere(tensor: torch.Tensor) -> torch.Tensor:
        return laid_out(tensor, **data.draw(layouts(len(shape))))

    x, out = somewhere(x), None if out is None else somewhere(out)
    options |= {name: somewhere(options[name]) for name in ("out_uncond", "grad") if name in options}
    assert digest(ops.abs_quantile(x, out, table, step, q, **options)) == digest(expected)


def test_equal_elements_and_infinities_are_ordered_as_numbers():
    x, table = torch.tensor([[0.0, -0.0, 2.0, -2.0, 2.0], [math.inf, -math.inf, 1.0, -3.0, 1e-45]]), torch.zeros(1, 20)
    table[0, COLUMN["p_x"]] = 1
    got = [ops.abs_quantile(x, None, table, 0, q).tolist() for q in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert [first for first, _ in got] == [0, 0, 1, 2, 2, 2]
    assert [second for _, second in got] == [torch.tensor(1e-45).item(), 1, 2, 3, math.inf, math.inf]


def test_a_nan_makes_the_quantile_of_its_sample_nan():
    arguments, _ = case()
    arguments[0][2, 1, 4, 4] = math.nan
    assert ops.abs_quantile(*arguments, 0.1).isnan().tolist() == [n == 2 for n in range(7)]


def test_thresholding_by_a_row_for_each_sample_is_that_of_the_paper():
    """Saharia et al. 2022, section 2.3: x0_hat / s within [-1, 1], s the quantile or 1."""
    (x, out, table, step), options = case(with_=("out_uncond",))
    s = ops.abs_quantile(x, out, table, step, 0.9, **options).clamp(min=1)
    x0 = unclamped(x, out, table, step, **options)
    rows = table[step].clone()
    rows[:, [COLUMN["p_x"], COLUMN["p_o"]]] /= s[:, None]
    rows[:, [COLUMN[name] for name in ("sigma", "q_x", "q_o", "b_0", "b_z")]] = 0
    rows[:, COLUMN["limit"]] = rows[:, COLUMN["q_0"]] = 1
    _, got = ops.reverse_step(x, out, rows, torch.arange(7), torch.arange(7), **options, return_kept=True)
    expected = (x0 / s.view(-1, 1, 1, 1)).clamp(-1, 1)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-6)


def test_abs_quantile_takes_short_rows_of_any_history_and_their_guidance():
    x, out, uncond = (values((7, 3, 9, 13), seed=seed) for seed in range(3))
    table, seeds = values((3, 11), seed=3), torch.arange(7)
    table[:, ops.COLUMNS.index("sigma")] = 0
    options = dict(out_uncond=uncond, guidance=2.5)
    _, x0 = ops.reverse_step(x, out, table, 1, seeds, **options, history=[x, x], return_x0=True)
    expected = torch.quantile(x0.abs().flatten(1), 0.5, dim=1)
    torch.testing.assert_close(ops.abs_quantile(x, out, table, 1, 0.5, **options), expected, rtol=1e-6, atol=0)


def test_abs_quantile_passes_opcheck_and_refuses_to_cut_a_gradient():
    (x, out, table, step), options = case((2, 3, 4, 5), with_=("out_uncond", "grad"))
    arguments = (x, out, table, step, 0.9, options["out_uncond"], 1.0, options["grad"], False)
    torch.library.opcheck(torch.ops.diffkern.abs_quantile.default, arguments)
    with pytest.raises(
        RuntimeError, match="^x: expected no gradient through abs_quantile, .* which diffkern.torch_ops"
    ):
        ops.abs_quantile(x.requires_grad_(), out, table, step, 0.9)
