"""The training loss with its noise made again in the kernel: value, gradient, and the same bits for any split."""

import levels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, digest, values
from tolerances import LOSS, ROUNDING

from diffkern import ops

T = torch.tensor([0, 999, 500, 2**32 - 1, 1, 7, 42])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, -1.0, 1e-3, 30.0])


def exact(out: torch.Tensor, seeds: torch.Tensor, t: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """loss_n = weight_n mean((out - eps)^2) in float64, which torch differentiates."""
    eps = ops.noise(seeds, out.shape[1:], step=t, stream=2).double()
    loss = (out.double() - eps).square().unsqueeze(-1).flatten(1).mean(1)
    return loss if weights is None else loss * weights.double()


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (1023,), (1024,), (1025,), (3, 65, 67)])
def test_noise_loss_is_its_equation_in_float64(shape, dtype, weights):
    out = values((7, *shape), dtype)
    loss = ops.noise_loss(out, levels.SEEDS, T, weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact(out, levels.SEEDS, T, weights), rtol=LOSS, atol=0)


@given(shape=shapes(), dtype=st.sampled_from(DTYPES), one_t=st.booleans(), weighted=st.booleans(), data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_value_and_gradient_are_right_in_every_layout(shape, dtype, one_t, weighted, data):
    shape = [shape[0], *(max(1, size) for size in shape[1:])]
    n = shape[0]
    seeds, weights = torch.arange(n), values((n,), seed=1) if weighted else None
    t = torch.tensor(3) if one_t else torch.arange(n) * 99
    out = laid_out(values(tuple(shape), dtype), **data.draw(layouts(len(shape)))).requires_grad_()
    loss, expected = ops.noise_loss(out, seeds, t, weights), exact(out, seeds, t, weights)
    torch.testing.assert_close(loss.double(), expected, rtol=LOSS, atol=1e-12)
    incoming = values((n,), seed=2)
    (got,) = torch.autograd.grad(loss, out, incoming)
    (wanted,) = torch.autograd.grad(expected, out, incoming.double())
    assert got.dtype == dtype and got.shape == out.shape
    tolerance = LOSS if dtype == torch.float32 else 2 * ROUNDING[dtype]
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-7)


def test_the_gradient_is_the_slope_of_the_loss():
    """Central differences are exact for a quadratic, up to float32's rounding of the loss."""
    out, direction = values((7, 3, 5, 7)).requires_grad_(), values((7, 3, 5, 7), seed=1)
    step = 0.25
    with torch.no_grad():
        ahead, behind = (ops.noise_loss(out + s * direction, levels.SEEDS, T, WEIGHTS) for s in (step, -step))
    (gradient,) = torch.autograd.grad(ops.noise_loss(out, levels.SEEDS, T, WEIGHTS).sum(), out)
    slope = (ahead.double() - behind.double()) / (2 * step)
    along = (gradient.double() * direction.double()).flatten(1).sum(1)
    torch.testing.assert_close(along, slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_has_the_bits_of_its_closed_form(dtype):
    """2 w_n g_n / elements, rounded once, times (out - eps)."""
    out, incoming = values((7, 3, 37, 41), dtype).requires_grad_(), values((7,), seed=2)
    (got,) = torch.autograd.grad(ops.noise_loss(out, levels.SEEDS, T, WEIGHTS), out, incoming)
    eps = ops.noise(levels.SEEDS, out.shape[1:], step=T, stream=2)
    slope = (2.0 / (3 * 37 * 41) * WEIGHTS.double() * incoming.double()).float().view(7, 1, 1, 1)
    assert digest(got) == digest((slope * (out.detach().float() - eps)).to(dtype))


def test_an_expanded_incoming_gradient_is_the_same_as_a_dense_one():
    out = values((7, 3, 5, 7)).requires_grad_()
    (of_sum,) = torch.autograd.grad(ops.noise_loss(out, levels.SEEDS, T).sum(), out)  # an expanded 1
    (of_ones,) = torch.autograd.grad(ops.noise_loss(out, levels.SEEDS, T), out, torch.ones(7))
    (of_mean,) = torch.autograd.grad(ops.noise_loss(out, levels.SEEDS, T).mean(), out)
    assert torch.equal(of_sum, of_ones)
    torch.testing.assert_close(of_mean, of_sum / 7)


def test_the_loss_of_the_noise_itself_is_zero_and_so_is_its_gradient():
    eps = ops.noise(levels.SEEDS, (3, 33, 35), step=T, stream=2).requires_grad_()
    loss = ops.noise_loss(eps, levels.SEEDS, T)
    assert torch.equal(loss, torch.zeros(7))
    assert torch.equal(torch.autograd.grad(loss.sum(), eps)[0], torch.zeros_like(eps))


def test_loss_and_gradient_are_independent_of_batch_and_threads():
    out, incoming = values((7, 3, 65, 67)).requires_grad_(), values((7,), seed=2)

    def of(samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        part = out[samples].detach().requires_grad_()
        loss = ops.noise_loss(part, levels.SEEDS[samples], T[samples], WEIGHTS[samples])
        return loss.detach(), torch.autograd.grad(loss, part, incoming[samples])[0]

    loss, gradient = of(slice(None))
    for n in range(7):
        for got, expected in zip(of(slice(n, n + 1)), (loss[n : n + 1], gradient[n : n + 1]), strict=True):
            assert torch.equal(got, expected)
    threads = torch.get_num_threads()
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            assert all(torch.equal(*pair) for pair in zip(of(slice(None)), (loss, gradient), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_every_cpu_level_has_the_same_gradient_bits_and_loss(at_every_level):
    answers = list(levels.answers_at_every_level().values())
    for answer in answers:
        assert answer["noise_loss gradient"] == answers[0]["noise_loss gradient"]
        assert answer["noise_loss"] == pytest.approx(answers[0]["noise_loss"], rel=LOSS)


def test_a_network_that_sees_half_of_each_noise_has_a_quarter_of_its_loss():
    """E (eps / 2 - eps)^2 = 1/4: five standard deviations of its mean over many elements."""
    eps = ops.noise(torch.arange(64), (3, 64, 64), step=9, stream=2)
    loss = ops.noise_loss(eps / 2, torch.arange(64), 9).double().mean()
    assert abs(loss - 0.25) < 5 * 0.25 * (2 / eps.numel()) ** 0.5


def test_nan_and_infinity_reach_the_loss_of_their_sample_alone():
    out = values((7, 3, 33, 35))
    clean = ops.noise_loss(out, levels.SEEDS, T)
    out[1, 0, 0, 0], out[4, 2, 32, 34] = torch.nan, torch.inf
    loss = ops.noise_loss(out, levels.SEEDS, T)
    assert loss[1].isnan() and loss[4] == torch.inf
    others = [0, 2, 3, 5, 6]
    assert torch.equal(loss[others], clean[others])


# --- the dispatcher ---


def test_noise_loss_compiles_and_differentiates_without_a_graph_break():
    def objective(out):
        return (ops.noise_loss(out * 2, levels.SEEDS, T, WEIGHTS) * torch.arange(7)).sum()

    out = values((7, 3, 5, 7)).requires_grad_()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(out), objective(out), rtol=0, atol=0)
    gradients = [torch.autograd.grad(loss(out), out)[0] for loss in (compiled, objective)]
    assert torch.equal(*gradients)


def test_noise_loss_refuses_a_gradient_that_it_does_not_have():
    out = values((7, 3, 5, 7)).requires_grad_()
    with pytest.raises(RuntimeError, match="^weights: expected no gradient through noise_loss"):
        ops.noise_loss(out, levels.SEEDS, T, WEIGHTS.clone().requires_grad_())
    loss = ops.noise_loss(out, levels.SEEDS, T).sum()
    with pytest.raises(RuntimeError, match="^create_graph: expected False, for noise_loss"):
        torch.autograd.grad(loss, out, create_graph=True)
