"""Products of bfloat16, summed in float32, on a CPU: of bfloat16 numbers and of numbers that are sums of such terms,
against float64; and the engine that is made of them."""

import dataclasses
import itertools

import pytest
import torch
from networks import CONFIGS, config_of, inputs, with_random_weights
from test_conv2d import GEOMETRIES, OPTIONS, PAIRS, SHAPES, additions, arguments, exact, size_of
from tolerances import ATTENTION, ATTENTION_TERMS, ROUNDING, split, summed
from torch import Tensor

import diffkern
from diffkern import UNet, ops, optimize, reference, sample

WIDE = [(1, 40, 33, 2, 70), (1, 33, 64, 3, 129), (9, 40, 300, 4, 4), (3, 600, 40, 8, 8), (20, 5, 5, 1, 1)]
WHOLE = [(2, 64, 40, 16, 16), (1, 96, 300, 3, 64), (3, 32, 5, 8, 8), (1, 640, 33, 4, 4)]  # blocks of 32 channels


def rounded(tensors: dict, *names: str) -> dict:
    return tensors | {name: tensors[name].bfloat16() for name in names if name in tensors}


def assert_exact(x: Tensor, weight: Tensor, *dtypes: torch.dtype, pack=ops.pack_conv, **options) -> None:
    """Check the result for inputs rounded to bf16: sums within float32 arithmetic, then one rounding of the output."""
    x, weight, options = x.bfloat16(), weight.bfloat16(), rounded(options, "skip", "residual")
    expected, packed = exact(x, weight, **options), pack(weight, terms=1)
    bound = summed(additions(weight)) * size_of(x, weight, **options).max()
    for dtype in dtypes:
        given = {name: o.to(dtype) if name in ("skip", "residual") else o for name, o in options.items()}
        y = ops.conv2d(x.to(dtype), packed, **given)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last) and y.shape == expected.shape
        rounding = ROUNDING[dtype] * expected.abs() if dtype == torch.bfloat16 else 0
        assert ((y.double() - expected).abs() <= bound + rounding).all(), dtype


def some(options: list[dict], every: int, shape: tuple[int, ...]) -> list[dict]:
    """Every so many of them, others for another shape."""
    return options[sum(shape) % every :: every]


def assert_exact_by_terms(x: Tensor, weight: Tensor, *counts: int, pack=ops.pack_conv, **options) -> None:
    """Three terms are a float, two are within 2^-16 of it, and one is the nearest bfloat16; twice, for two factors."""
    expected, size = exact(x, weight, **options), size_of(x, weight, **options).max()
    for terms in counts:
        y = ops.conv2d(x, pack(weight, terms=terms), **options)
        assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
        assert ((y.double() - expected).abs() <= split(terms, additions(weight)) * size).all(), terms


# --- the convolution ---


BOTH, TERMS = (torch.float32, torch.bfloat16), (1, 2, 3)


@pytest.mark.parametrize("shape", SHAPES + WIDE + WHOLE, ids=str)
def test_conv2d_is_its_definition_with_every_option(shape):
    for options in OPTIONS if shape == SHAPES[1] else PAIRS:
        x, weight, options = arguments(*shape, **options)
        assert_exact(x, weight, *BOTH, **options)


@pytest.mark.parametrize("shape", SHAPES + WIDE + WHOLE, ids=str)
def test_strides_kernels_and_paddings_are_the_definitions(shape):
    for geometry in GEOMETRIES:
        x, weight, options = arguments(*shape, bias=True, residual=True, **geometry)
        assert_exact(x, weight, torch.bfloat16, **options)


UPSAMPLING = [
    dict(zip(("bias", "skip", "add", "residual"), bits, strict=True), upsample=True)
    for bits in ((False,) * 4, (True,) * 4, (False, True, False, True))
]


def coarse(weight: Tensor) -> Tensor:
    """Whose sums of four are bfloat16 too."""
    return (weight * 8).round() / 8


@pytest.mark.parametrize("shape", SHAPES + WIDE[:4] + WHOLE, ids=str)
def test_upsampling_by_quarters_is_the_convolution_of_the_doubled_image(shape):
    for options in UPSAMPLING:
        x, weight, options = arguments(*shape, **options)
        assert_exact(x, coarse(weight), *BOTH, pack=ops.pack_upsampling, **options)


def in_terms(x: Tensor, terms: int) -> Tensor:
    """[terms, *x.shape], each the nearest bfloat16 to what those before it leave."""
    parts = []
    for _ in range(terms):
        parts.append(x.bfloat16())
        x = x - parts[-1].to(x.dtype)
    return torch.stack(parts)


def blocked(x: Tensor, terms: int = 1) -> Tensor:
    """[N, C, H, W] -> [N, C / 32, terms, H + 2, W + 2, 32], with zeros around it."""
    padded = torch.nn.functional.pad(in_terms(x, terms), (1, 1, 1, 1))
    return padded.unflatten(2, (-1, 32)).permute(1, 2, 0, 4, 5, 3).contiguous()


@pytest.mark.parametrize("shape", SHAPES + WIDE + WHOLE, ids=str)
def test_the_error_of_a_convolution_shrinks_by_2_to_the_minus_8_with_each_term(shape):
    for options in some(PAIRS, 3, shape):
        x, weight, options = arguments(*shape, **options)
        assert_exact_by_terms(x, weight, *TERMS, **options)
    for side, stride in itertools.product((1, 3), (1, 2)):
        x, weight, options = arguments(*shape, side=side, stride=stride, bias=True, skip=True, residual=True)
        assert_exact_by_terms(x, weight, *TERMS, **options)
    x, weight, options = arguments(*shape, **UPSAMPLING[1])
    assert_exact_by_terms(x, weight, *TERMS, pack=ops.pack_upsampling, **options)


def test_three_terms_are_exact_far_from_one_and_between_near_and_far():
    x, weight, _ = arguments(2, 64, 40, 8, 8)
    for scale in (2.0**-60, 2.0**60):
        assert_exact_by_terms(x * scale, weight, 3)
        assert_exact_by_terms(x, weight * scale, 3)
    wide = x * 2.0 ** torch.arange(-16, 16).repeat(2)[:, None, None]  # each channel by itself must be exact
    alone = torch.eye(64)[:, :, None, None]
    y = ops.conv2d(wide, ops.pack_conv(alone, terms=3), padding=0)
    assert torch.equal(y, wide)


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_a_blocked_image_gives_the_bits_of_the_image(shape, terms):
    cases = [(3, dict(stride=stride, padding=padding)) for stride in (1, 2) for padding in (0, 1)]
    for side, options in [*cases, (1, dict(padding=0)), (3, dict(upsample=True, padding=1))]:
        x, weight, options = arguments(*shape, side=side, bias=True, residual=True, **options)
        if terms == 1:
            x, options = x.bfloat16(), rounded(options, "residual")
        packs = [ops.pack_conv, ops.pack_upsampling] if options["upsample"] else [ops.pack_conv]
        for packed in (pack(weight, terms=terms) for pack in packs):
            expected = ops.conv2d(x, packed, **options)
            y = torch.empty_like(expected)
            last = options["residual"].contiguous(memory_format=torch.channels_last)
            torch.ops.diffkern.conv2d_out(
                y,
                blocked(x, terms),
                None,
                packed.tensor,
                packed.in_channels,
                packed.out_channels,
                options["bias"],
                None,
                last,
                options["stride"],
                options["padding"],
                options["upsample"],
            )
            assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "dtype, terms", [(torch.bfloat16, 1), (torch.float32, 1), (torch.float32, 2), (torch.float32, 3)]
)
@pytest.mark.parametrize("shape", [(2, 64, 0, 6, 10), (3, 32, 96, 8, 8), (1, 320, 320, 4, 4)], ids=str)
def test_the_norm_writes_a_blocked_image_with_the_same_bits(shape, dtype, terms):
    n, c, behind, h, w = shape
    draw = torch.Generator().manual_seed(5)
    x, skip = (
        torch.randn(n, k, h, w, generator=draw).to(dtype).contiguous(memory_format=torch.channels_last)
        for k in (c, behind)
    )
    weight, bias = torch.randn(2, c + behind, generator=draw)
    expected = torch.empty(n, c + behind, h, w, dtype=dtype).contiguous(memory_format=torch.channels_last)
    y = torch.full_like(blocked(expected, terms), torch.nan)
    for out in (expected, y):
        torch.ops.diffkern.group_norm_silu_out(out, x, skip if behind else None, weight, bias, 16, 1e-5, None, True)
    assert torch.equal(y, blocked(expected, terms))


def test_a_blocked_image_that_is_none_is_named():
    x, weight, _ = arguments(1, 32, 32, 4, 4)
    last = x.bfloat16().contiguous(memory_format=torch.channels_last)
    good = dict(y=torch.empty_like(last), x=blocked(last), skip=None, packed=ops.pack_conv(weight, terms=1).tensor)
    good |= dict(in_channels=32, out_channels=32)
    good |= dict(bias=None, add=None, residual=None, stride=1, padding=1, upsample=False)
    for change, message in [
        (
            dict(x=good["x"][..., :16]),
            r"x: expected \[N, C / 32, 1, H \+ 2, W \+ 2, 32\], got shape \(1, 1, 1, 6, 6, 16\)",
        ),
        (dict(x=good["x"].float()), "x: expected bfloat16, got float32"),
        (
            dict(packed=ops.pack_conv(weight, terms=2).tensor),
            r"x: expected \[N, C / 32, 2, H \+ 2, W \+ 2, 32\], got shape",
        ),
        (dict(packed=ops.pack_conv(weight).tensor), "x: expected float32, got bfloat16"),
        (dict(in_channels=31), "x: expected 31 channels, got 32"),
        (dict(x=good["x"].transpose(3, 4)), "x: expected a contiguous tensor"),
        (dict(skip=last), "skip: expected none beside a blocked x"),
    ]:
        with pytest.raises(RuntimeError, match="^" + message):
            torch.ops.diffkern.conv2d_out(**(good | change))
    norm = dict(y=blocked(last), x=last, skip=None, weight=torch.ones(32), bias=torch.zeros(32), groups=8, eps=1e-5)
    norm |= dict(scale_shift=None, silu=True)
    few = last[:, :24].contiguous(memory_format=torch.channels_last)
    for change, message in [
        (
            dict(y=norm["y"][:, :, :, 1:].contiguous()),
            r"y: expected shape \(1, 1, 1, 6, 6, 32\), got \(1, 1, 1, 5, 6, 32\)",
        ),
        (dict(y=blocked(last, 2)), r"y: expected shape \(1, 1, 1, 6, 6, 32\), got \(1, 1, 2, 6, 6, 32\)"),
        (dict(x=last.half()), "x: expected float32 or bfloat16 for a blocked y, got float16"),
        (
            dict(x=few, skip=last[:, 24:].contiguous(memory_format=torch.channels_last)),
            "x, skip: expected whole blocks",
        ),
    ]:
        with pytest.raises(RuntimeError, match="^" + message):
            torch.ops.diffkern.group_norm_silu_out(**(norm | change))


def test_nothing_is_read_outside_a_sample_or_behind_its_channels():
    x, weight, options = arguments(3, 5, 20, 6, 6, skip=True)
    x, skip, packed = x.bfloat16(), options["skip"].bfloat16(), ops.pack_conv(weight, terms=1)
    alone = ops.conv2d(x[1:2], packed, skip=skip[1:2])
    x[::2], skip[::2] = torch.nan, torch.inf
    y = ops.conv2d(x, packed, skip=skip)
    assert torch.equal(y[1:2], alone) and not y[::2].isfinite().any()


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("shape", [(5, 48, 70, 12, 10), (9, 130, 300, 4, 4), (2, 3, 16, 33, 40)], ids=str)
def test_the_bits_depend_on_no_thread_count_and_no_batch(shape, terms):
    x, weight, options = arguments(*shape, bias=True, skip=True, add=True, residual=True)
    packed = ops.pack_conv(weight, terms=terms)
    if terms == 1:
        x, options = x.bfloat16(), rounded(options, "skip", "residual")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.conv2d(x, packed, **options)
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert torch.equal(ops.conv2d(x, packed, **options), expected)
    finally:
        torch.set_num_threads(threads)
    for of in (slice(0, 1), slice(1, None)):
        part = options | {name: options[name][of] for name in ("skip", "add", "residual")}
        assert torch.equal(ops.conv2d(x[of], packed, **part), expected[of])


@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_the_reference_is_the_definition_with_packed_weights(shape):
    for options in PAIRS:
        x, weight, options = arguments(*shape, **options)
        wide = {k: o.double() if isinstance(o, Tensor) else o for k, o in options.items()}
        for terms, same in ((1, weight.bfloat16()), (2, in_terms(weight, 2).double().sum(dim=0)), (3, weight)):
            y = reference.conv2d(x.double(), ops.pack_conv(weight, terms=terms), **wide)
            torch.testing.assert_close(y, exact(x, same, **options), rtol=1e-11, atol=1e-11)
    for options in UPSAMPLING:
        x, weight, options = arguments(*shape, **options)
        weight, wide = coarse(weight), {k: o.double() if isinstance(o, Tensor) else o for k, o in options.items()}
        y = reference.conv2d(x.double(), ops.pack_upsampling(weight, terms=1), **wide)
        torch.testing.assert_close(y, exact(x, weight, **options), rtol=1e-11, atol=1e-11)


def repeated(packed: ops.PackedConv, *times: int) -> ops.PackedConv:
    return dataclasses.replace(packed, tensor=packed.tensor.repeat(*times, *[1] * (packed.tensor.ndim - len(times))))


def test_the_dtypes_that_do_not_go_together_are_named():
    x, weight, _ = arguments(1, 4, 5, 6, 6)
    with pytest.raises(RuntimeError, match="^x: expected float32, got bfloat16"):
        ops.conv2d(x.bfloat16(), ops.pack_conv(weight))
    with pytest.raises(RuntimeError, match="^x: expected float32 or bfloat16, got float16"):
        ops.conv2d(x.half(), ops.pack_conv(weight, terms=1))
    with pytest.raises(RuntimeError, match=r"^packed: expected shape \(1, 1, 9, 1, 2, 16, 16, 2\), got \(2, 1"):
        ops.conv2d(x, repeated(ops.pack_conv(weight, terms=1), 2))
    for terms in (2, 3):
        with pytest.raises(RuntimeError, match="^x: expected float32, got bfloat16"):
            ops.conv2d(x.bfloat16(), ops.pack_conv(weight, terms=terms))
    for pack in (ops.pack_conv, ops.pack_upsampling):
        with pytest.raises(ValueError, match="^terms: expected 1, 2 or 3, got 4"):
            pack(weight, terms=4)
        with pytest.raises(TypeError, match="^terms: expected an int, got '2'"):
            pack(weight, terms="2")
    with pytest.raises(RuntimeError, match="^packed: expected 1 to 3 terms, got 4"):
        ops.conv2d(x, repeated(ops.pack_conv(weight, terms=2), 1, 1, 1, 2))
    with pytest.raises(RuntimeError, match=r"^weight: expected \[K, C, 3, 3\], got shape \(5, 4, 1, 1\)"):
        ops.pack_upsampling(weight[:, :, :1, :1], terms=1)
    with pytest.raises(
        RuntimeError, match="^upsample, stride, padding: expected True, 1 and 1 with 4 matrices, got False"
    ):
        ops.conv2d(x, ops.pack_upsampling(weight, terms=1))


# --- attention ---


def heads(n: int, count: int, queries: int, keys: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v as a projection lays them out, side by side, with scores of some size."""
    tokens = torch.randn(n, max(queries, keys), 3, count, d, generator=torch.Generator().manual_seed(6)).to(dtype)
    q, k, v = tokens.permute(2, 0, 3, 1, 4)
    return [2 * q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]]


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, terms: int | None = 1) -> Tensor:
    out = torch.full_like(q.transpose(1, 2), torch.nan, memory_format=torch.contiguous_format).transpose(1, 2)
    torch.ops.diffkern.attention_out(out, q, k, v, scale, terms)
    return out


def assert_attention_is_exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    """Within the rounding of the probabilities and of the result."""
    expected = reference.attention(*(tensor.double() for tensor in (q, k, v)), scale=scale)
    bound = (
        ROUNDING[torch.bfloat16]
        * (expected.abs() + reference.attention(q.double(), k.double(), v.double().abs(), scale=scale))
        + ATTENTION
    )
    assert ((attend(q, k, v, scale).double() - expected).abs() <= bound).all()


def assert_attention_is_exact_by_terms(q: Tensor, k: Tensor, v: Tensor, terms: int, scale: float | None = None) -> None:
    """A score is off by no more than its terms leave out, and a probability by a factor of e to twice that."""
    out, (q, k, v) = attend(q, k, v, scale, terms), (tensor.double() for tensor in (q, k, v))
    of_score, of_sum = split(terms, q.shape[-1]), split(terms, k.shape[-2])
    score = (q.abs() @ k.abs().mT).amax(-1, keepdim=True) * (q.shape[-1] ** -0.5 if scale is None else abs(scale))
    bound = (torch.expm1(2 * of_score * score) + of_sum) * reference.attention(q, k, v.abs(), scale=scale)
    error = (out.double() - reference.attention(q, k, v, scale=scale)).abs()
    assert out.dtype == torch.float32 and (error <= bound).all()


ATTENTIONS = [
    (2, 1, 256, 256, 256),
    (1, 3, 64, 64, 32),
    (2, 2, 77, 130, 64),
    (1, 1, 1, 1, 32),
    (1, 2, 150, 33, 96),
    (1, 1, 300, 257, 64),
]


@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_attention_is_its_definition(shape):
    q, k, v = heads(*shape)
    for scale in (None, 0.5, -0.25):
        assert_attention_is_exact(q, k, v, scale)


@pytest.mark.parametrize("terms", [1, 2, 3])
@pytest.mark.parametrize("shape", ATTENTIONS, ids=str)
def test_the_error_of_attention_shrinks_by_2_to_the_minus_8_with_each_term(shape, terms):
    q, k, v = heads(*shape, torch.float32)
    for scale in (None, 0.5, -0.25):
        assert_attention_is_exact_by_terms(q, k, v, terms, scale)
    expected = reference.attention(q.double(), k.double(), v.double())
    assert (attend(q, k, v, None, terms) - expected).abs().max() <= ATTENTION_TERMS[terms] * expected.abs().max()


def test_attention_of_bfloat16_numbers_is_that_of_floats_of_one_term():
    q, k, v = heads(2, 2, 77, 130, 64)
    assert torch.equal(attend(q, k, v), attend(q.float(), k.float(), v.float()).bfloat16())


def test_a_nan_reaches_the_rows_that_read_it_and_no_other():
    q, k, v = heads(2, 2, 150, 140, 32, torch.float32)
    q[0, 0, 3, 5] = k[1, 0, 139, 0] = v[0, 1, 130, 7] = torch.nan
    expected = torch.zeros(q.shape, dtype=torch.bool)
    expected[0, 0, 3] = expected[1, 0] = expected[0, 1, :, 7] = True
    for terms in (1, 2, 3):
        assert torch.equal(attend(q, k, v, None, terms).isnan(), expected)


def test_attention_holds_where_scores_grow_and_shrink_by_thousands():
    q, k, v = heads(1, 2, 64, 300, 64)
    for slope in (-1, 1):
        steep = (k.float() * 200 * torch.linspace(0, slope, 300)[:, None]).bfloat16()
        assert_attention_is_exact(q, steep, v)
        for terms in (2, 3):
            assert_attention_is_exact_by_terms(q.float(), k.float() * 200 * slope, v.float(), terms)
            assert_attention_is_exact_by_terms(q.float(), steep.float(), v.float(), terms)


@pytest.mark.parametrize("terms", [None, 1, 2, 3])
@pytest.mark.parametrize("shape", [(3, 2, 200, 150, 64), (2, 1, 300, 70, 32), (2, 1, 40, 300, 160)], ids=str)
def test_attentions_bits_depend_on_no_thread_count_and_no_batch(shape, terms):
    q, k, v = heads(*shape, torch.bfloat16 if terms == 1 else torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = attend(q, k, v, None, terms)
        for count in (2, 3, 5, 16):
            torch.set_num_threads(count)
            for of in (slice(None), slice(0, 1), slice(1, None)):
                assert torch.equal(attend(q[of], k[of], v[of], None, terms), expected[of])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("d", [16, 288])
def test_attention_names_the_heads_that_it_does_not_take(d):
    for terms, dtype in ((1, torch.bfloat16), (3, torch.float32)):
        with pytest.raises(RuntimeError, match=f"^q: expected a multiple of 32 channels, .* got {d}"):
            attend(*heads(1, 1, 4, 4, d, dtype), None, terms)


@pytest.mark.parametrize(
    "terms, dtype, message",
    [
        (0, torch.float32, "terms: expected 1 to 3, got 0"),
        (4, torch.float32, "terms: expected 1 to 3, got 4"),
        (None, torch.bfloat16, "q: expected float32, got bfloat16"),
        (1, torch.float16, "q: expected float32 or bfloat16, got float16"),
        (2, torch.bfloat16, "q: expected float32, got bfloat16"),
        (3, torch.bfloat16, "q: expected float32, got bfloat16"),
    ],
)
def test_attention_names_the_terms_and_dtypes_that_do_not_go_together(terms, dtype, message):
    with pytest.raises(RuntimeError, match="^" + message):
        attend(*heads(1, 1, 4, 4, 32, dtype), None, terms)


# --- on every level ---


AT_A_LEVEL = """
import torch
from test_bf16 import ATTENTIONS, BOTH, UPSAMPLING, WHOLE, WIDE
from test_bf16 import assert_attention_is_exact, assert_attention_is_exact_by_terms
from test_bf16 import assert_exact, assert_exact_by_terms, coarse, heads, some
from test_conv2d import PAIRS, SHAPES, arguments
from diffkern import ops

for shape in ATTENTIONS:
    assert_attention_is_exact(*heads(*shape))
    for terms in (1, 2, 3):
        assert_attention_is_exact_by_terms(*heads(*shape, torch.float32), terms)
for shape in WHOLE:
    x, weight, options = arguments(*shape, **UPSAMPLING[1])
    assert_exact(x, coarse(weight), torch.bfloat16, pack=ops.pack_upsampling, **options)
for shape in SHAPES + WIDE + WHOLE:
    for options in some(PAIRS, 3, shape):
        x, weight, options = arguments(*shape, **options)
        assert_exact(x, weight, *BOTH, **options)
    for side in (1, 3):
        x, weight, options = arguments(*shape, side=side, stride=2, padding=0)
        assert_exact(x, weight, torch.float32, **options)
    x, weight, options = arguments(*shape, bias=True, skip=True, add=True, residual=True)
    assert_exact_by_terms(x, weight, 2, 3, **options)
"""


def test_each_cpu_level_is_exact(at_every_level):
    at_every_level(AT_A_LEVEL)


# --- the engine ---


def network_of(name: str) -> UNet:
    return with_random_weights(UNet(**config_of(name))).eval().requires_grad_(False)


def deviation(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).square().mean() / expected.square().mean()).sqrt().item()


# By these go blocks, resampling, heads, classes and learned variance of every kind.
COVERING = ("ddpm_cifar10", "heads", "one_level_without_attention", "improved_ddpm")


@pytest.mark.parametrize(
    "name", [name if name in COVERING else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]
)
def test_the_engine_is_as_near_to_float32_as_autocast(name):
    network = network_of(name)
    x, t, labels = inputs(network)
    expected = network(x, t, labels)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = network(x, t, labels).float()
    engine = optimize(network, dtype=torch.bfloat16)
    for _ in range(2):  # recorded, then replayed
        y = engine(x, t, labels)
        assert y.dtype == torch.float32
        assert 1e-4 < deviation(y, expected) < 1.1 * deviation(autocast, expected) + 1e-3


@pytest.mark.parametrize("name", ["ddpm_cifar10", "improved_ddpm"])
def test_a_sample_has_the_same_bits_in_any_batch(name):
    network = network_of(name)
    engine = optimize(network, dtype=torch.bfloat16)
    x = torch.randn(4, network.config["in_channels"], 16, 16, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([0, 999, 5, 5])
    whole = engine(x, t)
    for sizes in ([1] * 4, [1, 3]):
        parts = [engine(*part) for part in zip(x.split(sizes), t.split(sizes), strict=True)]
        assert torch.equal(torch.cat(parts), whole)


def test_an_engine_of_another_dtype_is_another_engine_on_the_same_network():
    network = network_of("plain")
    x, t, _ = inputs(network)
    engine, exact_engine = optimize(network, dtype=torch.bfloat16), optimize(network)
    assert optimize(engine, dtype=torch.bfloat16) is engine
    assert torch.equal(optimize(engine)(x, t), exact_engine(x, t))
    assert torch.equal(optimize(exact_engine, dtype=torch.bfloat16)(x, t), engine(x, t))
    assert not torch.equal(engine(x, t), exact_engine(x, t))


def test_changed_weights_are_noticed():
    network = network_of("plain")
    x, t, _ = inputs(network)
    engine = optimize(network, dtype=torch.bfloat16)
    before = engine(x, t)
    network.conv_out.bias.add_(1)
    torch.testing.assert_close(engine(x, t), before + 1)


def test_a_gradient_is_autocasts():
    network = with_random_weights(UNet(**config_of("plain")))
    x, t, _ = inputs(network)
    y = optimize(network, dtype=torch.bfloat16)(x, t)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(y, network(x, t).float())
    y.square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_sample_runs_the_engine_in_bfloat16():
    model = diffkern.load("fashion-mnist")
    options = dict(seeds=[1], labels=[3], sampler="ddim", steps=2, progress=False)
    expected = sample(model, **options)
    images = sample(model, dtype=torch.bfloat16, **options)
    autocast = sample(model, dtype=torch.bfloat16, engine=False, **options)
    assert torch.equal(images, sample(optimize(model, dtype=torch.bfloat16), **options))
    assert 1e-4 < deviation(images, expected) < 1.5 * deviation(autocast, expected)
