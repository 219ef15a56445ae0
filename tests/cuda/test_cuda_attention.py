"""Attention by the CUDA kernels, against float64 and against torch's own at the same precision."""

import pytest
import torch
from levels import DTYPES, values
from torch import Tensor

pytestmark = pytest.mark.cuda

# Limits relative to torch's own error, both root mean squares: one rounding can move the largest error by a factor.
FORWARD, BACKWARD = 1.5, 2.0
NAMES = ("out", "lse", "dq", "dk", "dv")

# (N, heads, queries, keys, d): every tiling of the plan, its tiles half full, exactly full and overfull
SHAPES = [
    (1, 2, 1, 1, 8),
    (2, 3, 7, 5, 16),
    (1, 2, 64, 64, 64),
    (1, 2, 130, 65, 40),
    (1, 1, 64, 130, 128),
    (1, 1, 129, 70, 72),
    (1, 1, 65, 100, 256),
    (1, 1, 33, 66, 512),
    (1, 1, 40, 30, 328),
    (1, 1, 20, 70, 13),  # no 16-byte pieces
    (1, 1, 9, 5, 520),  # wider than a warp can hold
]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """q, k, v and grad_out, in memory [N, tokens, heads, d] as a U-Net has them."""
    n, heads, queries, keys, d = shape
    tokens = (queries, keys, keys, queries)
    return [values((n, t, heads, d), dtype, scale, seed).transpose(1, 2) for seed, t in enumerate(tokens)]


@pytest.fixture
def attention(cuda):
    """(out, lse, dq, dk, dv) of q, k, v and grad_out."""

    def run(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float | None = None) -> tuple[Tensor, ...]:
        q, k, v, grad_out = (x.to(cuda.device) for x in (q, k, v, grad_out))
        out, lse = cuda.ops.attention(q, k, v, scale)
        gradients = cuda.ops.attention_backward(grad_out, q, k, v, out, lse, scale)
        return tuple(x.cpu() for x in (out, lse, *gradients))

    return run


def exact(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float | None = None) -> tuple[Tensor, ...]:
    """The definition, in float64."""
    q, k, v = (x.double().detach().requires_grad_() for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = scores.softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), grad_out.double())
    return (out.detach(), scores.logsumexp(-1).detach(), *gradients)


def by_torch(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, scale: float | None = None) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).square().mean().sqrt())


def assert_as_near_as_torch(got: tuple[Tensor, ...], arguments: list[Tensor], scale: float | None = None) -> None:
    expected, theirs = exact(*arguments, scale), by_torch(*arguments, scale)
    torch.testing.assert_close(got[1].double(), expected[1], rtol=2e-6, atol=2e-6)
    for name, ours, peer, truth in zip(
        ("out", "dq", "dk", "dv"), (got[0], *got[2:]), theirs, (expected[0], *expected[2:]), strict=True
    ):
        assert ours.dtype == arguments[0].dtype and ours.shape == truth.shape, name
        bound = (FORWARD if name == "out" else BACKWARD) * error(peer, truth)
        assert error(ours, truth) <= bound + 3e-7 * float(truth.abs().max() + 1), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradients_are_as_near_to_float64_as_torchs(attention, shape, dtype):
    arguments = inputs(shape, dtype)
    assert_as_near_as_torch(attention(*arguments), arguments)


@pytest.mark.parametrize("scale", [-0.37, 0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale_is_the_definitions(attention, dtype, scale):
    arguments = inputs((1, 2, 70, 40, 32), dtype)
    assert_as_near_as_torch(attention(*arguments, scale), arguments, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_thousands_do_not_overflow(attention, dtype):
    arguments = inputs((1, 1, 65, 65, 64), dtype, scale=20.0)
    out, lse, *gradients = attention(*arguments)
    expected = exact(*arguments)
    assert expected[1].max() > 500
    assert all(torch.isfinite(x).all() for x in (out, lse, *gradients))
    assert error(out, expected[0]) <= FORWARD * error(by_torch(*arguments)[0], expected[0]) + 1e-5


@pytest.mark.parametrize("d", [64, 42])  # with tensor cores and without
def test_scores_of_ten_thousands_cost_the_gradients_nothing(attention, d):
    """They are exact: sums of products of small integers, times a power of two. One of a row is far above the rest."""
    q, k, v, grad_out = inputs((1, 1, 33, 35, d), torch.float32, scale=128.0)
    q, k = q.round(), k.round()
    expected = exact(q, k, v, grad_out, 0.125)
    assert expected[1].max() > 1e4
    dv = attention(q, k, v, grad_out, 0.125)[4]
    assert (dv.double() - expected[4]).abs().max() <= 5e-6 * expected[4].abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_lie_in_memory_as_the_projections_have_them(attention, dtype):
    out, _, dq, dk, dv = attention(*inputs((2, 3, 17, 9, 16), dtype))
    for x in (out, dq, dk, dv):
        assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [24, 72])
def test_strides_change_no_bit(attention, dtype, d):
    """[N, heads, tokens, d], a projection of q, k and v in one, an expanded head: the same values, the same bits."""
    arguments = inputs((2, 2, 18, 18, d), dtype)
    expected = attention(*arguments)
    packed = torch.stack([x.transpose(1, 2) for x in arguments], 2)  # [N, tokens, 4, heads, d]
    for laid_out in ([x.contiguous() for x in arguments], [x.transpose(1, 2) for x in packed.unbind(2)]):
        for name, ours, theirs in zip(NAMES, attention(*laid_out), expected, strict=True):
            assert torch.equal(ours, theirs), name
    shared = [x[:, :1].expand(-1, 2, -1, -1) for x in arguments]
    for name, ours in zip(NAMES, attention(*shared), strict=True):
        assert torch.equal(ours[:, 0], expected[NAMES.index(name)][:, 0]) and torch.equal(ours[:, 1], ours[:, 0]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_rows_are_right_too(attention, dtype):
    arguments = inputs((1, 2, 66, 35, 24), dtype)
    unaligned = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in arguments]
    assert unaligned[0].data_ptr() % 16 != 0
    assert_as_near_as_torch(attention(*unaligned), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_lies_around_the_tokens_is_never_used(attention, dtype):
    """NaN beyond the last token and beyond the last channel."""
    arguments = inputs((1, 1, 67, 67, 40), dtype)
    walled = [torch.nn.functional.pad(x, (0, 24, 0, 61), value=torch.nan)[:, :, :67, :40] for x in arguments]
    for name, ours, theirs in zip(NAMES, attention(*walled), attention(*arguments), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 256])
def test_a_samples_bits_depend_neither_on_its_batch_nor_on_the_run(attention, dtype, d):
    arguments = inputs((2, 1, 20, 30, d), dtype)
    together = attention(*arguments)
    for name, again, first in zip(NAMES, attention(*arguments), together, strict=True):
        assert torch.equal(again, first), name
    for name, alone, both in zip(NAMES, attention(*(x[1:2] for x in arguments)), together, strict=True):
        assert torch.equal(alone, both[1:2]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_empty_batch_is_empty(attention, dtype):
    out, lse, dq, dk, dv = attention(*inputs((0, 2, 5, 6, 16), dtype))
    assert out.shape == dq.shape == (0, 2, 5, 16) and lse.shape == (0, 2, 5) and dk.shape == dv.shape == (0, 2, 6, 16)
