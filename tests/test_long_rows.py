"""The reverse step by long rows, against float64, the reference and short rows, and each of its parts alone."""

import math

import levels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, SEEDS, digest, values
from long_rows import COLUMN, OPERANDS, lengthened, long_case, long_rows
from tolerances import REVERSE_STEP, REVERSE_STEP_X0, SAME_STEP

from diffkern import ops, reference

SOME = [pytest.param((), 0, id="none"), *(pytest.param((name,), 0, id=name) for name in OPERANDS[:-1])]
SOME += [pytest.param((), count, id=f"history_{count}") for count in range(1, 7)]
SOME += [pytest.param(OPERANDS, 6, id="everything"), pytest.param(OPERANDS[:3], 3, id="fixed variance")]


def assert_same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and digest(a) == digest(b)


def exact(x, out, table, step, seeds, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """(x_next, kept) by the docstring's equations, sample by sample in float64; the noise is given."""
    x_next, kept = [], []
    for n, number in enumerate(step.expand(len(x)).tolist()):
        columns = table[number].double().tolist()
        row = dict(zip(ops.LONG_COLUMNS, columns, strict=False))
        address, count = options["address"][number].tolist()
        x_n, g, u, var, std = x[n].double(), 0.0, 0.0, 1.0, row["sigma"]
        o, second_half = torch.zeros_like(x_n), None
        if out is None:
            row |= dict(p_o=0.0, k_o=0.0, q_o=0.0)
        else:
            o, second_half = out[n, : x.shape[1]].double(), out[n, x.shape[1] :].double()
        if options.get("out_uncond") is not None:
            u = options["out_uncond"][n, : x.shape[1]].double()
            o = u + row["w"] * (o - u)
        if options.get("grad") is not None:
            g = options["grad"][n].double()
        if options["learned_variance"]:
            v = (second_half + 1) / 2
            std = std * (v * row["log_var_max"] + (1 - v) * row["log_var_min"]).exp().sqrt()
            var = std**2
        x0 = (row["p_x"] * x_n + row["p_o"] * o + row["p_g"] * g).clamp(-row["limit"], row["limit"])
        kept.append(row["q_x"] * x_n + row["q_o"] * o + row["q_0"] * x0)
        new = row["k_x"] * x_n + row["k_o"] * o + row["k_u"] * u + row["k_0"] * x0 + row["k_g"] * var * g
        new = new + sum(k * h[n].double() for k, h in zip(columns[20:], options["history"], strict=False))
        for i in range(count):
            new = new + std * reference.noise(seeds[n].item(), x.shape[1:], step=address - i, stream=1)[0].double()
        if options.get("mask") is not None and (row["b_0"] or row["b_z"]):
            m = options["mask"].expand_as(x)[n].double()
            z = reference.noise(seeds[n].item(), x.shape[1:], step=address, stream=6)[0].double()
            new = m * new + (1 - m) * (row["b_0"] * options["known"][n].double() + row["b_z"] * z)
        x_next.append(new)
    return torch.stack(x_next), torch.stack(kept)


@pytest.mark.parametrize(("with_", "history"), SOME)
def test_a_long_row_is_its_equation_in_float64(with_, history):
    arguments, options = long_case(history=history, with_=with_)
    x_next, kept = ops.reverse_step(*arguments, **options, return_kept=True)
    expected_x_next, expected_kept = exact(*arguments, **options)
    torch.testing.assert_close(x_next.double(), expected_x_next, **REVERSE_STEP)
    torch.testing.assert_close(kept.double(), expected_kept, **REVERSE_STEP_X0)


@pytest.mark.parametrize(("with_", "history"), SOME)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_has_the_references_bits(with_, history, dtype):
    arguments, options = long_case((7, 3, 37, 41), dtype, history=history, with_=with_)
    assert_same_bits(
        ops.reverse_step(*arguments, **options, return_kept=True),
        reference.reverse_step(*arguments, **options, return_kept=True),
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("history", [0, 2])
def test_the_long_form_of_a_short_row_has_its_bits(clip, guidance, learned_variance, history):
    x, out, uncond = (values((7, c, 9, 13), seed=c) for c in (3, 6, 6))
    out, uncond = (tensor[:, : 6 if learned_variance else 3] for tensor in (out, uncond))
    table, step = levels.rows(history), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    options = dict(history=[values(x.shape, seed=7 + j) for j in range(history)], learned_variance=learned_variance)
    options |= dict(out_uncond=None if guidance is None else uncond)
    weight = 1.0 if guidance is None else guidance
    expected = ops.reverse_step(x, out, table, step, SEEDS, **options, clip=clip, guidance=weight, return_x0=True)
    long, address = lengthened(table, clip, weight)
    assert_same_bits(
        ops.reverse_step(x, out, long, step, SEEDS, **options, address=address, return_kept=True), expected
    )


@given(
    shape=shapes(),
    dtype=st.sampled_from(DTYPES),
    with_=st.sets(st.sampled_from(OPERANDS[:-1])),
    history=st.integers(0, 6),
    one_row=st.sampled_from([None, 0, 1, 2, 3]),
    without_out=st.booleans(),
    mask_sizes=st.lists(st.booleans(), min_size=5, max_size=5),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_long_rows_and_their_twin_have_the_references_bits_in_every_layout(
    shape, dtype, with_, history, one_row, without_out, mask_sizes, data
):
    if len(shape) < 2:
        with_ = with_ - {"learned_variance"}
    (x, out, table, step, seeds), options = long_case(tuple(shape), dtype, history=history, with_=tuple(with_))
    if one_row is not None:
        step = torch.tensor(one_row)
    if without_out and not with_ & {"learned_variance", "out_uncond"}:
        out = None
    if "mask" in options:
        sizes = [1 if one else size for one, size in zip(mask_sizes, shape, strict=False)]
        options["mask"] = values(tuple(sizes), dtype, seed=13).abs()
    expected = reference.reverse_step(x, out, table, step, seeds, **options, return_kept=True)

    def somewhere(tensor: torch.Tensor) -> torch.Tensor:
        return laid_out(tensor, **data.draw(layouts(len(shape))))

    x, out = somewhere(x), None if out is None else somewhere(out)
    for name, value in options.items():
        if name == "history":
            options[name] = [somewhere(h) for h in value]
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            options[name] = somewhere(value)
    assert_same_bits(ops.reverse_step(x, out, table, step, seeds, **options, return_kept=True), expected)
    kept = somewhere(torch.zeros_like(x))
    assert ops.reverse_step_(x, out, table, step, seeds, **options, kept=kept) is None
    assert_same_bits((x, kept), expected)


# --- its parts ---


def test_the_noise_of_a_row_is_the_sum_at_its_descending_addresses():
    (x, out, _, step, seeds), _ = long_case()
    table, address = torch.zeros(1, 20), torch.tensor([[70_000, 5]])
    table[0, COLUMN["sigma"]] = 1
    z = ops.noise(seeds, x.shape[1:], step=70_000, stream=1)
    for i in range(1, 5):
        z = z + ops.noise(seeds, x.shape[1:], step=70_000 - i, stream=1)
    assert torch.equal(ops.reverse_step(x, out, table, 0, seeds, address=address), z)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_a_coefficient_of_0_leaves_out_may_hold_anything(value):
    arguments, options = long_case(history=6, with_=OPERANDS[:3])
    x, out, table, _, seeds = arguments
    expected = ops.reverse_step(x, out, table, 3, seeds, **options, return_kept=True)
    options |= dict(history=[torch.full_like(x, value)] * 6, grad=torch.full_like(x, value))
    options |= dict(known=torch.full_like(x, value), mask=torch.full_like(x, value))
    assert_same_bits(ops.reverse_step(x, out, table, 3, seeds, **options, return_kept=True), expected)
    reference_bits = reference.reverse_step(x, out, table, 3, seeds, **options, return_kept=True)
    assert_same_bits(reference_bits, expected)


def test_a_row_without_a_call_uses_no_coefficient_of_the_output():
    (x, _, table, _, seeds), options = long_case(history=2, with_=("grad", "blend"))
    expected = ops.reverse_step(x, None, table, 2, seeds, **options, return_kept=True)
    table[:, [COLUMN[name] for name in ("p_o", "k_o", "q_o")]] = 0
    got = ops.reverse_step(x, torch.zeros_like(x), table, 2, seeds, **options, return_kept=True)
    assert_same_bits(got, expected)
    row = table[2]
    x0 = row[COLUMN["p_x"]] * x + row[COLUMN["p_g"]] * options["grad"]
    limit = row[COLUMN["limit"]].item()
    kept = row[COLUMN["q_x"]] * x + row[COLUMN["q_0"]] * x0.clamp(-limit, limit)
    torch.testing.assert_close(expected[1], kept, **REVERSE_STEP_X0)


def test_kept_may_take_the_place_of_any_slot_of_the_history():
    (x, out, table, step, seeds), options = long_case(history=3, with_=OPERANDS[:3])
    expected = ops.reverse_step(x, out, table, step, seeds, **options, return_kept=True)
    for slot in range(3):
        target, history = x.clone(), [h.clone() for h in options["history"]]
        ops.reverse_step_(target, out, table, step, seeds, **options | dict(history=history), kept=history[slot])
        assert_same_bits((target, history[slot]), expected)


def test_a_table_may_have_more_slots_than_the_history_has_tensors():
    (x, out, table, step, seeds), options = long_case(history=2)
    wide, _ = long_rows(6)
    wide[:, :22] = table[:, :22]
    assert_same_bits(
        (ops.reverse_step(x, out, wide, step, seeds, **options),),
        (ops.reverse_step(x, out, table, step, seeds, **options),),
    )


def test_the_mask_keeps_the_step_where_it_is_1_and_the_noised_image_where_it_is_0():
    (x, out, table, _, seeds), options = long_case(with_=("blend",))
    free = {name: value for name, value in options.items() if name not in ("known", "mask")}
    mask = (torch.arange(13) % 2).float().view(1, 1, 1, 13)
    got = ops.reverse_step(x, out, table, 0, seeds, **options | dict(mask=mask))
    b_0, b_z = (table[0, COLUMN[name]] for name in ("b_0", "b_z"))
    noisy = b_0 * options["known"] + b_z * ops.noise(seeds, x.shape[1:], step=999, stream=6)
    assert torch.equal(got[..., 1::2], ops.reverse_step(x, out, table, 0, seeds, **free)[..., 1::2])
    assert torch.equal(got[..., ::2], noisy[..., ::2])


def test_a_row_whose_b_0_and_b_z_are_0_does_not_blend():
    (x, out, table, _, seeds), options = long_case(with_=("blend",))
    free = {name: value for name, value in options.items() if name not in ("known", "mask")}
    assert_same_bits(
        (ops.reverse_step(x, out, table, 1, seeds, **options),), (ops.reverse_step(x, out, table, 1, seeds, **free),)
    )


def test_the_gradient_in_x0_hat_makes_the_prediction_the_conditions():
    """For two Gaussian classes the exact score and the exact classifier add up to the exact score of a class.

    x_0 is N(m_c, v) with c = +-1 and p(c) = 1/2. ln p(c | x_t) has the gradient (1 - tanh) a m / w towards c = 1.
    """
    a, s, m, v = 0.6, 0.8, 1.0, 0.25
    x = values((7, 3, 9, 13), seed=1).double()
    w = a * a * v + s * s

    def x0_of(mean: torch.Tensor | float) -> torch.Tensor:  # E[x_0 | x_t] of one class, or of a mean of means
        return mean + a * v / w * (x - a * mean)

    lean = torch.tanh(a * m * x / w)
    eps = (x - a * x0_of(m * lean)) / s
    grad = (1 - lean) * a * m / w
    table = torch.zeros(1, 20)
    for name, value in dict(p_x=1 / a, p_o=-s / a, p_g=s * s / a, limit=torch.inf, q_0=1.0).items():
        table[0, COLUMN[name]] = value
    _, x0 = ops.reverse_step(x.float(), eps.float(), table, 0, SEEDS, grad=grad.float(), return_kept=True)
    torch.testing.assert_close(x0.double(), x0_of(m), rtol=0, atol=5 * SAME_STEP)


def test_a_learned_variance_scales_the_gradient_of_the_mean():
    """mu + Sigma g (Dhariwal & Nichol 2021, algorithm 1): nothing where the row has no noise."""
    (x, out, table, _, seeds), options = long_case(with_=("learned_variance", "grad"))
    without = {name: value for name, value in options.items() if name != "grad"}
    table[:, COLUMN["p_g"]] = 0
    got = ops.reverse_step(x, out, table, 1, seeds, **options)
    assert_same_bits((got,), (ops.reverse_step(x, out, table, 1, seeds, **without),))
    row = dict(zip(ops.LONG_COLUMNS, table[0].double().tolist(), strict=False))
    v = (out[:, 3:].double() + 1) / 2
    variance = row["sigma"] ** 2 * (v * row["log_var_max"] + (1 - v) * row["log_var_min"]).exp()
    expected = ops.reverse_step(x, out, table, 0, seeds, **without) + row["k_g"] * variance * options["grad"]
    got = ops.reverse_step(x, out, table, 0, seeds, **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)  # exponents of order 10


# --- independence and the dispatcher ---


def test_long_rows_have_the_references_bits_at_every_level(at_every_level):
    program = """
import levels, long_rows
from diffkern import ops

for dtype in levels.DTYPES:
    arguments, options = long_rows.long_case((7, 3, 5, 23), dtype, history=6, with_=long_rows.OPERANDS)
    for result in ops.reverse_step(*arguments, **options, return_kept=True):
        print(levels.digest(result))
"""
    expected = []
    for dtype in DTYPES:
        arguments, options = long_case((7, 3, 5, 23), dtype, history=6, with_=OPERANDS)
        expected += map(digest, reference.reverse_step(*arguments, **options, return_kept=True))
    for level, printed in at_every_level(program, levels.WIDTHS).items():
        assert printed.split() == expected, level


def test_long_rows_are_independent_of_batch_and_thread_count():
    (x, out, table, step, seeds), options = long_case((14, 3, 61, 67), history=2, with_=OPERANDS)
    batch = ops.reverse_step(x, out, table, step, seeds, **options)
    parts = [
        ops.reverse_step(
            x[n : n + 5],
            out[n : n + 5],
            table,
            step[n : n + 5],
            seeds[n : n + 5],
            **options
            | {name: options[name][n : n + 5] for name in ("out_uncond", "grad", "known")}
            | dict(history=[h[n : n + 5] for h in options["history"]]),
        )
        for n in range(0, 14, 5)
    ]
    assert torch.equal(torch.cat(parts), batch)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            assert torch.equal(ops.reverse_step(x, out, table, step, seeds, **options), batch)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("with_", [(), OPERANDS])
def test_long_rows_pass_opcheck(with_):
    (x, out, table, step, seeds), options = long_case((2, 3, 4, 5), history=2 if with_ else 0, with_=with_)
    fields = (options.get("out_uncond"), 1.0, False, options["learned_variance"], options["history"])
    operands = tuple(options.get(name) for name in ("address", "grad", "known", "mask"))
    native = torch.ops.diffkern
    torch.library.opcheck(native.reverse_step.default, (x, out, table, step, seeds, *fields, True, *operands))
    for kept in (None, torch.empty_like(x)):
        arguments = (x, out, table, step, seeds, *fields, None, *operands, kept)
        torch.library.opcheck(native.reverse_step_.default, arguments)


def test_long_rows_compile_without_a_graph_break():
    (x, out, table, step, seeds), options = long_case(history=1, with_=OPERANDS[:3])

    def step_twice(x, out, step, seeds):
        y, kept = ops.reverse_step(x, out, table, step, seeds, **options, return_kept=True)
        y, other = y + 0, torch.zeros_like(kept)
        ops.reverse_step_(y, None, table, step, seeds, address=options["address"], kept=other)
        return y, kept, other

    compiled = torch.compile(step_twice, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, out, step, seeds), step_twice(x, out, step, seeds), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["grad", "known", "mask", "kept"])
def test_long_rows_refuse_to_cut_a_gradient(name):
    (x, out, table, step, seeds), options = long_case(with_=("grad", "blend"))
    options["kept"] = torch.empty_like(x)
    options[name].requires_grad_()
    with pytest.raises(RuntimeError, match=f"^{name}: expected no gradient through reverse_step_"):
        ops.reverse_step_(x, out, table, step, seeds, **options)
    with torch.no_grad():
        ops.reverse_step_(x, out, table, step, seeds, **options)


def test_long_rows_on_the_meta_device_have_shapes_and_no_values():
    arguments, options = long_case(dtype=torch.bfloat16, history=1, with_=OPERANDS[:3])

    def meta(value):
        return [*map(meta, value)] if isinstance(value, list) else value.to("meta") if hasattr(value, "to") else value

    arguments, options = [meta(a) for a in arguments], {name: meta(value) for name, value in options.items()}
    for result in ops.reverse_step(*arguments, **options, return_kept=True):
        assert result.device.type == "meta" and result.shape == (7, 3, 9, 13) and result.dtype == torch.bfloat16
