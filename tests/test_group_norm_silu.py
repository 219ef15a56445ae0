"""Group norm, scale-shift, SiLU and a residual in one op: against float64, in every layout, on every level."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts
from levels import DTYPES, values
from tolerances import GROUP_NORM, ROUNDING
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops, reference

FORMATS = [torch.contiguous_format, torch.channels_last]

# samples, channels, groups, height, width: registers, tiles, blocks and runs half full, exactly full and overfull
SHAPES = [
    (2, 128, 32, 8, 8),
    (1, 96, 32, 5, 7),
    (3, 12, 4, 3, 3),
    (1, 64, 32, 17, 19),
    (2, 40, 4, 9, 16),
    (1, 256, 1, 4, 4),
    (1, 20, 4, 33, 31),
    (2, 32, 32, 16, 16),
    (1, 200, 200, 3, 2),
    (2, 6, 3, 1, 2),
    (1, 8, 2, 23, 25),
    (1, 35, 5, 1, 1),
]


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    eps: float = 1e-5,
    scale_shift: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """The definition, in float64."""
    per_channel = (slice(None), slice(None), *[None] * (x.ndim - 2))
    x = x.double() if add is None else x.double() + add.double()[per_channel]
    slabs = x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    centered = slabs - slabs.mean(2, keepdim=True)
    z = (centered / (centered.square().mean(2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    z = z * weight.double()[per_channel[1:]] + bias.double()[per_channel[1:]]
    if scale_shift is not None:
        scale, shift = scale_shift.double()[per_channel].chunk(2, dim=1)
        z = z * (1 + scale) + shift
    y = z * torch.sigmoid(z) if silu else z
    return y if residual is None else y + residual.double()


def arguments(n: int, c: int, groups: int, *pixels: int, dtype=torch.float32, mean: float = 0.0, **options):
    """x, weight, bias, groups and as many of the options as are asked for; all with values of order 1."""
    x = (values((n, c, *pixels)) + mean).to(dtype)
    tensors = {
        "scale_shift": values((n, 2 * c), scale=0.7, seed=3),
        "add": values((n, c), seed=4),
        "residual": values((n, c, *pixels), dtype, seed=5),
    }
    chosen = {name: tensors.get(name, value) for name, value in options.items() if value is not None}
    return (x, values((c,), seed=1), values((c,), seed=2), groups), chosen


OPTIONS = [
    dict(zip(("scale_shift", "add", "residual", "silu"), chosen, strict=True))
    for chosen in itertools.product((None, True), (None, True), (None, True), (True, False))
]


def assert_near(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    """Within float32 arithmetic and one rounding to the dtype."""
    assert got.shape == expected.shape
    if expected.numel():
        bound = (factor * GROUP_NORM + ROUNDING[got.dtype]) * (1 + expected.abs())
        assert ((got.double() - expected).abs() <= bound).all(), (got.double() - expected).abs().max()


# --- the definition ---


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_silu_is_its_definition_with_every_option(shape, dtype, memory_format):
    for options in OPTIONS:
        (x, *parameters), chosen = arguments(*shape, dtype=dtype, **options)
        x = x.contiguous(memory_format=memory_format)
        y = ops.group_norm_silu(x, *parameters, **chosen)
        assert y.dtype == dtype and y.is_contiguous(memory_format=memory_format)
        assert_near(y, exact(x, *parameters, **chosen), factor=3)


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 7), st.integers(1, 9), st.integers(0, 9), st.integers(0, 9)),
    dtype=st.sampled_from(DTYPES),
    options=st.sampled_from(OPTIONS),
    data=st.data(),
)
@settings(max_examples=150)
def test_group_norm_silu_is_its_definition_in_every_layout(sizes, dtype, options, data):
    n, groups, width, *pixels = sizes
    (x, *parameters), chosen = arguments(n, groups * width, groups, *pixels, dtype=dtype, **options)
    expected = exact(x, *parameters, **chosen, eps=1e-2)
    x = laid_out(x, **data.draw(layouts(4)))
    if "residual" in chosen:
        chosen["residual"] = laid_out(chosen["residual"], **data.draw(layouts(4)))
    assert_near(ops.group_norm_silu(x, *parameters, **chosen, eps=1e-2), expected, factor=3)


@pytest.mark.parametrize("pixels", [(), (7,), (3, 4, 5)])
def test_an_image_may_have_any_number_of_dimensions(pixels):
    (x, *parameters), chosen = arguments(3, 12, 2, *pixels, add=True, scale_shift=True)
    assert_near(ops.group_norm_silu(x, *parameters, **chosen), exact(x, *parameters, **chosen))


def test_the_plain_twin_has_the_same_definition():
    for options in OPTIONS:
        positional, chosen = arguments(2, 24, 4, 5, 6, **options)
        assert_near(reference.group_norm_silu(*positional, **chosen), exact(*positional, **chosen))


def test_it_is_torchs_group_norm_and_silu():
    x, weight, bias, groups = arguments(2, 64, 32, 9, 9)[0]
    torch.testing.assert_close(
        ops.group_norm_silu(x, weight, bias, groups, eps=1e-6),
        F.silu(F.group_norm(x, groups, weight, bias, eps=1e-6)),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("mean", [1e2, -1e4, 1e6])
@pytest.mark.parametrize("shape", [(1, 64, 16, 33, 31), (1, 64, 16, 2, 3), (1, 12, 4, 60, 61)])
def test_a_mean_far_from_zero_costs_no_accuracy(shape, mean, memory_format):
    (x, *parameters), chosen = arguments(*shape, mean=mean, silu=False)
    x = x.contiguous(memory_format=memory_format)
    assert_near(ops.group_norm_silu(x, *parameters, **chosen), exact(x, *parameters, **chosen), factor=3)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(("row", "column"), [(0, 0), (15, 25), (62, 64)])
def test_one_pixel_far_from_all_others_costs_no_accuracy(row, column, memory_format):
    (x, *parameters), _ = arguments(1, 16, 4, 63, 65)
    x = x.contiguous(memory_format=memory_format)
    x[:, :, row, column] = 3e4
    expected = exact(x, *parameters, silu=False)
    got = ops.group_norm_silu(x, *parameters, silu=False)
    assert ((got - expected).abs() <= 5e-6 * (1 + expected.abs())).all()


def test_silu_holds_over_all_magnitudes():
    """A group of two opposite values normalises to -1 and 1, so that the weight sets silu's argument."""
    z = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([1e-30, 1e3, 1e6, 1e20])))
    x = torch.tensor([-1.0, 1.0]).expand(1, len(z), 2).contiguous()
    y = ops.group_norm_silu(x, z, torch.zeros_like(z), len(z), eps=0.0)
    expected = x.double() * z.double()[:, None] * torch.sigmoid(x.double() * z.double()[:, None])
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-7)


def test_a_group_without_variance_is_the_bias():
    bias = values((6,))
    y = ops.group_norm_silu(torch.full((2, 6, 4, 4), 7.7), torch.ones(6), bias, 3)
    torch.testing.assert_close(y, F.silu(bias)[None, :, None, None].expand_as(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_spoil_their_group_and_no_other(value, memory_format):
    x, *parameters = arguments(2, 40, 10, 5, 5)[0]
    x = x.contiguous(memory_format=memory_format)
    clean = ops.group_norm_silu(x, *parameters)
    x[1, 17, 2, 3] = value
    y = ops.group_norm_silu(x, *parameters)
    assert y[1, 16:20].isnan().all()
    y[1, 16:20], clean[1, 16:20] = 0, 0
    assert torch.equal(y, clean)


# --- bits ---


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 96, 32, 17, 19), (7, 320, 32, 6, 5)])
def test_the_bits_depend_neither_on_the_batch_nor_on_the_threads(shape, dtype, memory_format):
    (x, weight, bias, groups), chosen = arguments(*shape, dtype=dtype, scale_shift=True, residual=True, add=True)
    x = x.contiguous(memory_format=memory_format)
    grad_y = values(x.shape, dtype, seed=9)

    def run(samples: slice) -> list[Tensor]:
        leaf = x[samples].clone(memory_format=torch.preserve_format).requires_grad_()
        own = {name: tensor[samples].clone().requires_grad_() for name, tensor in chosen.items()}
        y = ops.group_norm_silu(leaf, weight, bias, groups, **own)
        return [y, *torch.autograd.grad(y, [leaf, *own.values()], grad_y[samples])]

    whole = run(slice(None))
    samples = [run(slice(n, n + 1)) for n in range(len(x))]
    for one_by_one, together in zip(zip(*samples, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(one_by_one), together)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            for again, first in zip(run(slice(None)), whole, strict=True):
                assert torch.equal(again, first)
    finally:
        torch.set_num_threads(threads)


AT_A_LEVEL = """
import torch
import test_group_norm_silu as tests
for shape in tests.SHAPES[:6]:
    for memory_format in tests.FORMATS:
        for dtype in tests.DTYPES:
            tests.test_group_norm_silu_is_its_definition_with_every_option(shape, dtype, memory_format)
        tests.assert_gradients_are_exact(shape, memory_format, torch.float32, tests.OPTIONS[0])
tests.test_silu_holds_over_all_magnitudes()
"""


def test_each_cpu_level_is_exact(at_every_level):
    at_every_level(AT_A_LEVEL)


# --- gradients ---


def assert_gradients_are_exact(shape, memory_format, dtype, options) -> None:
    (x, weight, bias, groups), chosen = arguments(*shape, dtype=dtype, **options)
    tensors = {"x": x.contiguous(memory_format=memory_format), "weight": weight, "bias": bias}
    tensors |= {name: tensor for name, tensor in chosen.items() if isinstance(tensor, Tensor)}
    silu, grad_y = chosen["silu"], values(x.shape, dtype, seed=9)

    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    y = ops.group_norm_silu(**leaves, groups=groups, silu=silu, eps=1e-3)
    got = torch.autograd.grad(y, list(leaves.values()), grad_y)
    expected = torch.autograd.grad(
        exact(**wide, groups=groups, silu=silu, eps=1e-3), list(wide.values()), grad_y.double()
    )
    for (name, leaf), a, b in zip(leaves.items(), got, expected, strict=True):
        assert a.dtype == leaf.dtype and a.shape == leaf.shape
        size = b.abs().max() + 1e-2
        if name == "add":  # the sum of what nearly cancels
            size = expected[0].flatten(2).abs().sum(2).max() + 1e-2
        rounding = ROUNDING[dtype] if name in ("x", "add") else 0  # grad_x is rounded, and grad_add sums it
        assert (a.double() - b).abs().max() <= (1e-5 + rounding) * size, name


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradients_are_those_of_the_definition(shape, dtype, memory_format):
    for options in OPTIONS:
        assert_gradients_are_exact(shape, memory_format, dtype, options)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_an_expanded_incoming_gradient_is_read_as_it_stands(memory_format):
    x, *parameters = arguments(2, 12, 4, 5, 6)[0]
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y = ops.group_norm_silu(x, *parameters)
    (expanded,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (dense,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(expanded, dense)


@pytest.mark.parametrize("pixels", [(), (7,)])
def test_gradients_reach_images_of_any_number_of_dimensions(pixels):
    (x, weight, bias, groups), chosen = arguments(3, 12, 2, *pixels, add=True)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, chosen["add"])]
    wide = [tensor.double().requires_grad_() for tensor in (x, weight, bias, chosen["add"])]
    got = torch.autograd.grad(ops.group_norm_silu(*leaves[:3], groups, add=leaves[3]).sum(), leaves)
    expected = torch.autograd.grad(exact(*wide[:3], groups, add=wide[3]).sum(), wide)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_half_precision_parameters_get_half_precision_gradients():
    x, weight, bias, groups = arguments(2, 12, 4, 5, 6, dtype=torch.bfloat16)[0]
    weight, bias = (tensor.bfloat16().requires_grad_() for tensor in (weight, bias))
    y = ops.group_norm_silu(x, weight, bias, groups)
    assert_near(y, exact(x, weight, bias, groups).detach())
    assert all(g.dtype == torch.bfloat16 for g in torch.autograd.grad(y.sum(), [weight, bias]))


def test_a_second_derivative_is_refused():
    x, *parameters = arguments(2, 12, 4, 5, 6)[0]
    y = ops.group_norm_silu(x.requires_grad_(), *parameters)
    with pytest.raises(RuntimeError, match="create_graph: expected False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (2, 8, 0, 4)])
def test_an_empty_image_gives_an_empty_result_and_zero_gradients(shape):
    x, weight, bias = torch.empty(shape, requires_grad=True), torch.ones(8), torch.ones(8)
    y = ops.group_norm_silu(x, weight.requires_grad_(), bias.requires_grad_(), 4)
    assert y.shape == shape
    gradients = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert gradients[0].shape == shape
    assert torch.equal(gradients[1], torch.zeros(8)) and torch.equal(gradients[2], torch.zeros(8))


# --- the dispatcher ---


def test_a_permuted_image_comes_out_as_the_compiler_expects():
    x, *parameters = arguments(2, 12, 4, 3, 5)[0]
    x = laid_out(x, order=(2, 0, 3, 1), steps=(1, 1, 1, 1), offset=0)
    torch.library.opcheck(
        torch.ops.diffkern.group_norm_silu.default,
        (x, *parameters, 1e-5, None, None, None, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_group_norm_silu_compiles_without_a_graph_break():
    (x, *parameters), chosen = arguments(2, 12, 4, 3, 5, scale_shift=True, residual=True, add=True)

    def normed(x, **chosen):
        return ops.group_norm_silu(x + 0, *parameters, **chosen)

    compiled = torch.compile(normed, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, **chosen), normed(x, **chosen))


# --- bad inputs ---

X, WEIGHT, BIAS, GROUPS = arguments(2, 12, 4, 3, 5)[0]
MEAN = torch.zeros(2, 4)
_backward = torch.ops.diffkern.group_norm_silu_backward


def norm(x=X, weight=WEIGHT, bias=BIAS, groups=GROUPS, **options):
    return ops.group_norm_silu(x, weight, bias, groups, **options)


def backward(grad_y=X, mean=MEAN, rstd=MEAN, scale_shift=None):
    return _backward(grad_y, X, mean, rstd, WEIGHT, BIAS, GROUPS, scale_shift, None, True)


BAD = {
    "one dimension": (lambda: norm(X[0, 0, 0]), RuntimeError, "x: expected [N, C, ...], got shape (5,)"),
    "no channels": (lambda: norm(X[:, :0]), RuntimeError, "x: expected at least one channel, got shape (2, 0, 3, 5)"),
    "float64": (
        lambda: norm(X.double()),
        RuntimeError,
        "x: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
    ),
    "integers": (lambda: norm(X.long()), RuntimeError, "x: expected float32, bfloat16 or float16, got int64"),
    "x not a tensor": (lambda: norm([1.0]), TypeError, "x: expected a tensor, got list"),
    "weight not a tensor": (lambda: norm(weight=None), TypeError, "weight: expected a tensor, got NoneType"),
    "bias not a tensor": (lambda: norm(bias=1.0), TypeError, "bias: expected a tensor, got float"),
    "residual not a tensor": (lambda: norm(residual=1), TypeError, "residual: expected a tensor or None, got int"),
    "weight too long": (
        lambda: norm(weight=torch.ones(13)),
        RuntimeError,
        "weight: expected shape (12,), got (13,)",
    ),
    "weight of two dimensions": (
        lambda: norm(weight=torch.ones(12, 1)),
        RuntimeError,
        "weight: expected shape (12,), got (12, 1)",
    ),
    "bias too short": (lambda: norm(bias=torch.ones(4)), RuntimeError, "bias: expected shape (12,), got (4,)"),
    "groups no divisor": (
        lambda: norm(groups=5),
        RuntimeError,
        "groups: expected a divisor of the 12 channels, got 5",
    ),
    "no groups": (lambda: norm(groups=0), RuntimeError, "groups: expected a divisor of the 12 channels, got 0"),
    "groups negative": (lambda: norm(groups=-4), RuntimeError, "groups: expected a divisor of the 12 channels"),
    "groups a fraction": (lambda: norm(groups=4.0), TypeError, "groups: expected an int, got 4.0"),
    "groups a bool": (lambda: norm(groups=True), TypeError, "groups: expected an int, got True"),
    "eps negative": (lambda: norm(eps=-1e-5), ValueError, "eps: expected a finite number of at least 0, got -1e-05"),
    "eps NaN": (lambda: norm(eps=float("nan")), ValueError, "eps: expected a finite number of at least 0, got nan"),
    "eps text": (lambda: norm(eps="1"), TypeError, "eps: expected a number, got '1'"),
    "scale without shift": (
        lambda: norm(scale_shift=torch.ones(2, 12)),
        RuntimeError,
        "scale_shift: expected shape (2, 24), got (2, 12)",
    ),
    "scale_shift of one sample": (
        lambda: norm(scale_shift=torch.ones(1, 24)),
        RuntimeError,
        "scale_shift: expected shape (2, 24), got (1, 24)",
    ),
    "add with pixels": (
        lambda: norm(add=torch.ones(2, 12, 1, 1)),
        RuntimeError,
        "add: expected shape (2, 12), got (2, 12, 1, 1)",
    ),
    "add of other channels": (
        lambda: norm(add=torch.ones(2, 24)),
        RuntimeError,
        "add: expected shape (2, 12), got (2, 24)",
    ),
    "residual of another shape": (
        lambda: norm(residual=X[:1]),
        RuntimeError,
        "residual: expected shape (2, 12, 3, 5), got (1, 12, 3, 5)",
    ),
    "residual of another dtype": (
        lambda: norm(residual=X.half()),
        RuntimeError,
        "residual: expected float32, got float16",
    ),
    "gradient of another shape": (
        lambda: backward(grad_y=X[:, :6]),
        RuntimeError,
        "grad_y: expected shape (2, 12, 3, 5), got (2, 6, 3, 5)",
    ),
    "gradient of another dtype": (
        lambda: backward(grad_y=X.bfloat16()),
        RuntimeError,
        "grad_y: expected float32, got bfloat16",
    ),
    "mean of each channel": (
        lambda: backward(mean=torch.zeros(2, 12)),
        RuntimeError,
        "mean: expected shape (2, 4), got (2, 12)",
    ),
    "rstd not contiguous": (
        lambda: backward(rstd=torch.zeros(4, 2).T),
        RuntimeError,
        "rstd: expected a contiguous tensor",
    ),
    "scale_shift in half precision": (
        lambda: backward(scale_shift=torch.zeros(2, 24).half()),
        RuntimeError,
        "scale_shift: expected float32, got float16",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_a_bad_input_is_named(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert message in str(raised.value)


# --- into given memory, from two sources ---


def norm_out(x: Tensor, skip: Tensor | None, *parameters, eps: float = 1e-5, scale_shift=None, silu=True) -> Tensor:
    images = [None if image is None else image.contiguous(memory_format=torch.channels_last) for image in (x, skip)]
    n, c, h, w = x.shape
    y = torch.full((n, h, w, c + (0 if skip is None else skip.shape[1])), torch.nan).permute(0, 3, 1, 2)
    torch.ops.diffkern.group_norm_silu_out(y, *images, *parameters, eps, scale_shift, silu)
    return y


@pytest.mark.parametrize("shape", SHAPES[:-1])  # one pixel would be summed up as a contiguous image
def test_group_norm_silu_out_has_the_ops_bits(shape):
    for options in (dict(), dict(scale_shift=True), dict(silu=False)):
        (x, *parameters), chosen = arguments(*shape, **options)
        x = x.contiguous(memory_format=torch.channels_last)
        chosen = {key: value for key, value in chosen.items() if key in ("scale_shift", "silu")}
        assert torch.equal(norm_out(x, None, *parameters, **chosen), ops.group_norm_silu(x, *parameters, **chosen))


@pytest.mark.parametrize("own", [1, 7, 16, 33, 64, 80, 95])
def test_two_sources_are_one_image_also_where_a_group_straddles_them(own):
    (x, *parameters), _ = arguments(3, 96, 8, 9, 7)
    y = norm_out(x[:, :own], x[:, own:], *parameters)
    assert ((y - exact(x, *parameters)).abs() <= GROUP_NORM * (4 + y.abs())).all()
    for n in range(3):
        assert torch.equal(norm_out(x[n : n + 1, :own], x[n : n + 1, own:], *parameters), y[n : n + 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(y=torch.zeros(2, 12, 3, 5)), "y: expected channels_last memory, got strides (180, 15, 5, 1)"),
        (dict(y=torch.zeros(2, 11, 3, 5)), "y: expected shape (2, 12, 3, 5), got (2, 11, 3, 5)"),
        (dict(x=torch.zeros(2, 12, 3, 5)), "x: expected channels_last memory, got strides (180, 15, 5, 1)"),
        (dict(skip=torch.zeros(2, 4, 4, 5)), "skip: expected shape (2, 4, 3, 5), got (2, 4, 4, 5)"),
        (dict(weight=torch.zeros(11)), "weight: expected shape (12,), got (11,)"),
        (dict(scale_shift=torch.zeros(2, 12)), "scale_shift: expected shape (2, 24), got (2, 12)"),
        (dict(groups=5), "groups: expected a divisor of the 12 channels, got 5"),
    ],
)
def test_what_does_not_fit_into_the_given_memory_raises(change, message):
    image = torch.zeros(2, 12, 3, 5).contiguous(memory_format=torch.channels_last)
    good = dict(y=image.clone(), x=image, skip=None, weight=torch.ones(12), bias=torch.ones(12), groups=4, eps=1e-5)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.diffkern.group_norm_silu_out(**(good | dict(scale_shift=None, silu=True) | change))
    assert str(raised.value) == message
