"""Attention: softmax(q k^T scale) v, against float64, in every layout, on every level, its gradients too."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts
from levels import DTYPES, values
from tolerances import ATTENTION, ROUNDING
from torch import Tensor

from diffkern import ops


def qkv(n: int, heads: int, queries: int, keys: int, d: int, dtype=torch.float32, scale: float = 1.0) -> list[Tensor]:
    """As a U-Net has them: in memory [N, tokens, heads, d]."""
    tokens = (queries, keys, keys)
    return [values((n, t, heads, d), dtype, scale, seed).transpose(1, 2) for seed, t in enumerate(tokens)]


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """The definition, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1) @ v


def assert_near(got: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within float32 arithmetic and one rounding to the dtype."""
    assert got.dtype == dtype and got.shape == expected.shape
    if expected.numel():
        bound = (ATTENTION + (ROUNDING[dtype] if dtype != torch.float32 else 0)) * expected.abs().max()
        assert (got.double() - expected).abs().max() <= bound + 1e-30


def gradients(out: Tensor, inputs: list[Tensor], grad_out: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad_out)


def assert_gradients_are_exact(inputs: list[Tensor], grad_out: Tensor, scale: float | None = None) -> None:
    inputs = [x.detach().requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    got = gradients(ops.attention(*inputs, scale=scale), inputs, grad_out)
    expected = gradients(exact(*wide, scale=scale), wide, grad_out.double())
    size = max(float(g.abs().max()) for g in expected)  # of the three together: dq and dk vanish where one key rules
    for a, b, x in zip(got, expected, inputs, strict=True):
        # half precision: the saved output is rounded, and with it delta = rowsum(grad_out out)
        rounding = 0 if x.dtype == torch.float32 else 2 * ROUNDING[x.dtype]
        assert a.dtype == x.dtype and a.shape == x.shape
        assert (a.double() - b).abs().max() <= (2 * ATTENTION + rounding) * size


# --- the definition ---

# tokens and widths with registers, tiles and blocks half full, exactly full and overfull
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 1, 16, 16, 512),
    (1, 1, 100, 300, 520),
    (1, 1, 1000, 130, 3),
    (1, 2, 256, 256, 32),
    (1, 2, 65, 1000, 8),
    (2, 1, 64, 128, 256),
    (2, 3, 63, 7, 33),
    (3, 2, 7, 63, 5),
    (2, 1, 129, 257, 257),
    (1, 1, 70, 1030, 16),
    (2, 1, 256, 256, 256),
    (1, 2, 157, 300, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_its_definition_in_float64(shape, dtype):
    inputs = qkv(*shape, dtype)
    assert_near(ops.attention(*inputs), exact(*inputs), dtype)
    assert_near(ops.attention(*inputs, scale=-0.37), exact(*inputs, scale=-0.37), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_are_those_of_the_definition_in_float64(shape, dtype):
    n, heads, queries, _, d = shape
    assert_gradients_are_exact(qkv(*shape, dtype), values((n, heads, queries, d), dtype, seed=3))


def test_gradients_are_the_slopes_of_the_output():
    """By differences of our own forward pass along a direction, in float32: without another backward to agree with."""
    inputs = [x.requires_grad_() for x in qkv(1, 2, 19, 70, 12)]
    weight = values((1, 2, 19, 12), seed=3)
    for x in inputs:
        direction = values(x.shape, seed=4)
        (slope,) = gradients(ops.attention(*inputs), [x], weight)

        def along(step: float, x=x, direction=direction) -> float:
            moved = [(y + step * direction if y is x else y).detach() for y in inputs]
            return float((ops.attention(*moved).double() * weight).sum())

        h = 2.0**-7
        fourth_order = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        assert float((slope.double() * direction).sum()) == pytest.approx(fourth_order, rel=2e-4, abs=2e-4)


@given(
    shape=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(1, 80), st.integers(1, 150), st.integers(1, 70)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.0, 0.125, -0.25]),
    data=st.data(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_attention_takes_every_layout(shape, dtype, scale, data):
    inputs = [laid_out(x, **data.draw(layouts(4))) for x in qkv(*shape, dtype)]
    grad_out = laid_out(values(tuple(inputs[0].shape), dtype, seed=3), **data.draw(layouts(4)))
    assert_near(ops.attention(*inputs, scale=scale), exact(*inputs, scale=scale), dtype)
    if 0 not in shape:
        assert_gradients_are_exact(inputs, grad_out, scale)


def test_the_output_lies_as_the_projection_reads_it():
    for dtype in DTYPES:
        inputs = [x.contiguous() for x in qkv(2, 3, 5, 4, 6, dtype)]
        assert ops.attention(*inputs).transpose(1, 2).is_contiguous()


def test_expanded_inputs_and_gradients_are_taken():
    q, k, v = qkv(2, 2, 20, 33, 10)
    one_key = k[:1, :1, :1].expand_as(k)
    assert_near(ops.attention(q, one_key, v), v.double().mean(2, keepdim=True).expand_as(q))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    (summed,) = gradients(ops.attention(*inputs), [v], torch.ones(()).expand(q.shape))
    (dense,) = gradients(ops.attention(*inputs), [v], torch.ones(q.shape))
    assert torch.equal(summed, dense)
    ops.attention(*inputs).sum().backward()
    assert torch.equal(v.grad, dense)


def test_only_the_gradients_asked_for_are_given():
    q, k, v = qkv(1, 1, 9, 9, 9)
    ops.attention(q, k.requires_grad_(), v).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    assert not ops.attention(q, k.detach(), v).requires_grad


@pytest.mark.parametrize("shape", [(0, 2, 5, 5, 4), (2, 0, 5, 5, 4)], ids=str)
def test_an_empty_batch_gives_an_empty_batch(shape):
    inputs = [x.requires_grad_() for x in qkv(*shape)]
    out = ops.attention(*inputs)
    assert out.shape == inputs[0].shape
    assert [g.shape for g in gradients(out, inputs, out.detach())] == [x.shape for x in inputs]


# --- numbers at the edge ---


def test_large_scores_do_not_overflow_and_the_largest_key_takes_all():
    d = 16
    k = torch.zeros(1, 1, 300, d)
    k[..., 0] = torch.arange(300.0)
    q = torch.full((1, 1, 5, d), 0.0)
    q[..., 0] = torch.tensor([1e30, -1e30, 1e4, 1e6, -1e5])
    v = values((1, 1, 300, d))
    out = ops.attention(q, k, v, scale=1.0)
    assert torch.equal(out[0, 0, [0, 2, 3]], v[0, 0, [299, 299, 299]])
    assert torch.equal(out[0, 0, [1, 4]], v[0, 0, [0, 0]])


def test_where_one_key_takes_all_the_gradient_is_its_values():
    d = 16
    k, q, v = torch.zeros(1, 1, 300, d), torch.zeros(1, 1, 5, d), values((1, 1, 300, d))
    k[..., 0], q[..., 0] = torch.linspace(-1, 1, 300), 1e6
    inputs, grad_out = [x.requires_grad_() for x in (q, k, v)], values((1, 1, 5, d), seed=5)
    grad_q, grad_k, grad_v = gradients(ops.attention(*inputs), inputs, grad_out)
    assert_near(grad_v[:, :, 299:], grad_out.double().sum(2, keepdim=True))
    assert not grad_v[:, :, :299].any() and not grad_k[:, :, :299].any()
    assert grad_q.abs().max() <= 1e-5 and grad_k.abs().max() <= 1e-5 * 1e6  # by a rounding of 0, times k or q


def test_a_later_block_of_keys_may_hold_a_much_larger_score():
    """The sums so far then shrink to nothing; and where it is a little larger, by the right factor."""
    q, k, v = qkv(1, 1, 40, 400, 8)
    for factor in (3.0, 100.0):
        growing = k * torch.linspace(0, factor, 400)[:, None]
        assert_near(ops.attention(q, growing, v), exact(q, growing, v))


def test_nan_reaches_the_rows_that_read_it_and_no_other():
    q, k, v = qkv(2, 2, 70, 140, 20)
    q[0, 0, 3, 5] = k[1, 0, 139, 0] = v[0, 1, 130, 7] = torch.nan
    nan = ops.attention(q, k, v).isnan()
    expected = torch.zeros_like(nan)
    expected[0, 0, 3] = expected[1, 0] = expected[0, 1, :, 7] = True
    assert torch.equal(nan, expected)


def test_an_infinite_score_is_nan_as_in_torch():
    q, k, v = qkv(1, 1, 3, 9, 4)
    k[0, 0, 2] = torch.inf * q[0, 0, 1].sign()
    nan = ops.attention(q, k, v).isnan()
    assert nan[0, 0, 1].all()
    assert torch.equal(nan, torch.nn.functional.scaled_dot_product_attention(q, k, v).isnan())


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_equal_keys_give_the_mean(value):
    q, _, v = qkv(1, 1, 4, 1000, 3)
    assert_near(ops.attention(q, torch.full_like(v, value), v), v.double().mean(2, keepdim=True).expand_as(q))


# --- the same bits ---


@pytest.mark.parametrize("shape", [(3, 2, 150, 700, 40), (3, 1, 200, 256, 64), (2, 1, 40, 190, 64)], ids=str)
def test_the_bits_depend_on_no_thread_count_and_no_batch(shape):
    q, k, v = qkv(*shape)
    grad_out = values(tuple(q.shape), seed=3)

    def bits(of: slice) -> list[Tensor]:
        inputs = [x[of].detach().requires_grad_() for x in (q, k, v)]
        out = ops.attention(*inputs)
        return [out.detach(), *gradients(out, inputs, grad_out[of])]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = bits(slice(None))
        for count in (2, 3, 4, 16):
            torch.set_num_threads(count)
            for of in (slice(None), slice(0, 1), slice(1, None)):
                for got, whole in zip(bits(of), expected, strict=True):
                    assert torch.equal(got, whole[of])
    finally:
        torch.set_num_threads(threads)


def test_each_head_and_each_query_stands_alone():
    q, k, v = qkv(2, 3, 90, 200, 24)
    whole = ops.attention(q, k, v)
    assert torch.equal(ops.attention(q[:, 1:2], k[:, 1:2], v[:, 1:2]), whole[:, 1:2])
    assert torch.equal(ops.attention(q[:, :, 70:71], k, v), whole[:, :, 70:71])


AT_A_LEVEL = """
import torch
from test_attention import SHAPES, assert_gradients_are_exact, assert_near, exact, qkv, values
from diffkern import ops

for n, heads, queries, keys, d in SHAPES:
    inputs = qkv(n, heads, queries, keys, d)
    assert_near(ops.attention(*inputs), exact(*inputs))
    assert_gradients_are_exact(inputs, values((n, heads, queries, d), seed=3))
"""


def test_each_cpu_level_is_exact(at_every_level):
    at_every_level(AT_A_LEVEL)


# --- through the dispatcher ---


def test_the_second_result_is_the_log_of_the_softmaxs_sum():
    for queries, d in ((70, 16), (300, 32)):
        q, k, v = qkv(2, 2, queries, 300, d, scale=3.0)
        _, lse = torch.ops.diffkern.attention(q, k, v, 0.5)
        expected = (q.double() @ k.double().mT * 0.5).logsumexp(-1)
        assert lse.dtype == torch.float32 and not lse.requires_grad
        torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)


Q, K, V = qkv(2, 2, 6, 7, 4)
OUT, LSE = Q, torch.zeros(2, 2, 6)
_backward = torch.ops.diffkern.attention_backward

BAD = {
    "q without heads": (lambda: ops.attention(Q[0], K, V), RuntimeError, "q: expected [N, heads, tokens, d], got"),
    "q with five dimensions": (lambda: ops.attention(Q[None], K, V), RuntimeError, "q: expected [N, heads, tokens, d]"),
    "k without heads": (lambda: ops.attention(Q, K[0], V), RuntimeError, "k: expected [N, heads, tokens, d], got"),
    "k of another batch": (lambda: ops.attention(Q, K[:1], V), RuntimeError, "k: expected shape (2, 2, 7, 4), got"),
    "k of other heads": (lambda: ops.attention(Q, K[:, :1], V), RuntimeError, "k: expected shape (2, 2, 7, 4), got"),
    "k of another width": (lambda: ops.attention(Q, K[..., :3], V), RuntimeError, "k: expected shape (2, 2, 7, 4)"),
    "v of other tokens": (lambda: ops.attention(Q, K, V[:, :, :6]), RuntimeError, "v: expected shape (2, 2, 7, 4)"),
    "v of another width": (lambda: ops.attention(Q, K, V[..., :3]), RuntimeError, "v: expected shape (2, 2, 7, 4)"),
    "v with three dimensions": (lambda: ops.attention(Q, K, V[0]), RuntimeError, "v: expected shape (2, 2, 7, 4), got"),
    "q in float64": (
        lambda: ops.attention(Q.double(), K, V),
        RuntimeError,
        "q: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
    ),
    "q in integers": (lambda: ops.attention(Q.long(), K, V), RuntimeError, "q: expected float32, bfloat16 or float16"),
    "k in another dtype": (
        lambda: ops.attention(Q, K.bfloat16(), V),
        RuntimeError,
        "k: expected float32, got bfloat16",
    ),
    "v in another dtype": (lambda: ops.attention(Q, K, V.half()), RuntimeError, "v: expected float32, got float16"),
    "no queries": (lambda: ops.attention(Q[:, :, :0], K, V), RuntimeError, "q: expected at least one token and one"),
    "no keys": (lambda: ops.attention(Q, K[:, :, :0], V[:, :, :0]), RuntimeError, "k: expected at least one token"),
    "no channels": (
        lambda: ops.attention(Q[..., :0], K[..., :0], V[..., :0]),
        RuntimeError,
        "q: expected at least one token and one channel, got shape (2, 2, 6, 0)",
    ),
    "scale not a number": (lambda: ops.attention(Q, K, V, scale="1"), TypeError, "scale: expected a finite number"),
    "scale NaN": (lambda: ops.attention(Q, K, V, scale=math.nan), ValueError, "scale: expected a finite number"),
    "scale infinite": (lambda: ops.attention(Q, K, V, scale=math.inf), ValueError, "scale: expected a finite number"),
    "q not a tensor": (lambda: ops.attention([1.0], K, V), TypeError, "q: expected a tensor, got list"),
    "k not a tensor": (lambda: ops.attention(Q, None, V), TypeError, "k: expected a tensor, got NoneType"),
    "gradient of another shape": (
        lambda: _backward(OUT[:1], Q, K, V, OUT, LSE, None),
        RuntimeError,
        "grad_out: expected shape (2, 2, 6, 4), got (1, 2, 6, 4)",
    ),
    "output of another shape": (
        lambda: _backward(OUT, Q, K, V, OUT[..., :3], LSE, None),
        RuntimeError,
        "out: expected shape (2, 2, 6, 4), got (2, 2, 6, 3)",
    ),
    "lse in half precision": (
        lambda: _backward(OUT, Q, K, V, OUT, LSE.half(), None),
        RuntimeError,
        "lse: expected float32, got float16",
    ),
    "lse of other queries": (
        lambda: _backward(OUT, Q, K, V, OUT, LSE[..., :5], None),
        RuntimeError,
        "lse: expected shape (2, 2, 6), got (2, 2, 5)",
    ),
    "lse not contiguous": (
        lambda: _backward(OUT, Q, K, V, OUT, LSE.mT.contiguous().mT, None),
        RuntimeError,
        "lse: expected a contiguous tensor",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_a_bad_input_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


# --- into given memory ---


def heads(*shape: int, seed: int) -> Tensor:
    """[N, heads, tokens, d] as a projection leaves it."""
    n, count, tokens, d = shape
    return values((n, tokens, count, d), seed=seed).transpose(1, 2)


def test_attention_out_has_the_ops_bits():
    q, k, v = (heads(2, 3, 70, 24, seed=seed) for seed in range(3))
    out = torch.full((2, 70, 3, 24), torch.nan).transpose(1, 2)
    torch.ops.diffkern.attention_out(out, q, k, v, None, None)
    assert torch.equal(out, ops.attention(q, k, v))


def test_attention_out_copies_nothing_and_says_so():
    q, k, v, out = (heads(1, 2, 5, 8, seed=seed) for seed in range(4))
    apart = torch.zeros(1, 2, 8, 5).transpose(2, 3)
    for name, arguments in (("q", (out, apart, k, v)), ("v", (out, q, k, apart)), ("out", (apart, q, k, v))):
        message = f"^{name}: expected the channels of a token together, got a stride of 5"
        with pytest.raises(RuntimeError, match=message):
            torch.ops.diffkern.attention_out(*arguments, None, None)
    low = [tensor.half() for tensor in (out, q, k, v)]
    with pytest.raises(RuntimeError, match="^q: expected float32, got float16"):
        torch.ops.diffkern.attention_out(*low, None, None)
