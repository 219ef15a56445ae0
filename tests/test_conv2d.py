"""Convolution with all that a U-Net adds to it, against float64: every shape, option, CPU level and thread count."""

import dataclasses
import functools
import itertools
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts
from levels import WIDTHS, values
from tolerances import summed, winograd
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops, reference

PACKINGS = ["direct", "taps", "matrices"]  # the latter two by Winograd's F(4x4, 3x3)

# samples, channels, out channels, height, width: tiles, blocks and chains half full, exactly full and overfull
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 9),
    (1, 64, 64, 8, 8),
    (3, 130, 70, 5, 6),
    (1, 17, 130, 11, 3),
    (1, 128, 3, 16, 16),
    (5, 32, 33, 4, 4),
    (1, 3, 128, 10, 13),
    (2, 129, 16, 1, 7),
    (2, 9, 70, 21, 33),
]
NAMES = ("bias", "skip", "add", "residual", "upsample")
OPTIONS = [dict(zip(NAMES, chosen, strict=True)) for chosen in itertools.product((False, True), repeat=5)]
# None, all, and each three neighbours of the five: any two options are met together, and each without the other.
PAIRS = [OPTIONS[0], OPTIONS[-1]]
PAIRS += [{name: (NAMES.index(name) - first) % 5 < 3 for name in NAMES} for first in range(5)]
# Every stride with every padding, and each of both with upsampling and without; a kernel of one pixel takes no padding.
GEOMETRIES = [
    dict(side=3, stride=stride, padding=padding, upsample=(stride + padding) % 2 == 0)
    for stride, padding in itertools.product((1, 2, 3, 4), (0, 1, 2))
]
GEOMETRIES += [dict(side=1, stride=s, upsample=upsample) for s, upsample in itertools.product((1, 2), (False, True))]
GEOMETRIES += [dict(side=1, stride=4)]


def exact(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 1,
    skip: Tensor | None = None,
    add: Tensor | None = None,
    residual: Tensor | None = None,
    upsample: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The definition, in float64."""
    x = x.to(dtype) if skip is None else torch.cat((x, skip), dim=1).to(dtype)
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    height, width = (-(-size // stride) for size in x.shape[2:])
    side = weight.shape[-1]
    y = F.conv2d(F.pad(x, (padding, side, padding, side)), weight.to(dtype), stride=stride)[:, :, :height, :width]
    y = y if bias is None else y + bias.to(dtype)[:, None, None]
    y = y if add is None else y + add.to(dtype)[:, :, None, None]
    return y if residual is None else y + residual.to(dtype)


def size_of(x: Tensor, weight: Tensor, **options) -> Tensor:
    """Return what the result would be if nothing cancelled. float32 is enough for a bound."""
    options = {name: o.abs() if isinstance(o, Tensor) else o for name, o in options.items()}
    return exact(x.abs(), weight.abs(), dtype=torch.float32, **options)


def arguments(
    n: int,
    c: int,
    k: int,
    h: int,
    w: int,
    *,
    side: int = 3,
    bias: bool = False,
    skip: bool = False,
    add: bool = False,
    residual: bool = False,
    stride: int = 1,
    upsample: bool = False,
    padding: int = 1,
) -> tuple[Tensor, Tensor, dict]:
    """x, weight and the options, tensors for those that are asked for."""
    behind = (c + 1) // 2 if skip else 0
    out_size = [-(-size * (2 if upsample else 1) // stride) for size in (h, w)]
    options = dict(stride=stride, padding=padding if side == 3 else 0, upsample=upsample)
    if bias:
        options["bias"] = values((k,), seed=2)
    if skip:
        options["skip"] = values((n, behind, h, w), seed=3)
    if add:
        options["add"] = values((n, k), seed=4)
    if residual:
        options["residual"] = values((n, k, *out_size), seed=5)
    scale = (c * side * side) ** -0.5
    return values((n, c, h, w)), values((k, c + behind, side, side), scale=scale, seed=1), options


def pack(weight: Tensor, packing: str, by: ModuleType = ops) -> ops.PackedConv:
    if packing == "direct":
        return ops.pack_conv(weight)
    taps = by.pack_taps(weight)
    return taps if packing == "taps" else by.expand_taps(taps)


def conv2d(x: Tensor, weight: Tensor, packing: str = "direct", **options) -> Tensor:
    return ops.conv2d(x, pack(weight, packing), **options)


def additions(weight: Tensor) -> int:
    """Count what is added up for an output: products, bias, add and residual."""
    return weight[0].numel() + 3


def assert_exact(x: Tensor, weight: Tensor, *packings: str, **options) -> None:
    """Within float32 arithmetic."""
    expected, size = exact(x, weight, **options), size_of(x, weight, **options)
    for packing in packings:
        y = conv2d(x, weight, packing, **options)
        assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
        assert y.shape == expected.shape
        if y.numel():
            bound = summed(additions(weight)) if packing == "direct" else winograd(weight.shape[1])
            assert (y.double() - expected).abs().max() <= bound * size.max(), packing


# --- the definition ---


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d_is_its_definition_with_every_option(shape):
    for options in OPTIONS if shape == SHAPES[1] else PAIRS:
        x, weight, options = arguments(*shape, **options)
        assert_exact(x, weight, *PACKINGS, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_kernels_and_paddings_are_the_definitions(shape):
    for geometry in GEOMETRIES:
        x, weight, options = arguments(*shape, bias=True, residual=True, **geometry)
        assert_exact(x, weight, "direct", **options)


def test_it_is_torchs_convolution():
    x, weight, options = arguments(2, 20, 30, 8, 10, bias=True)
    bias = options["bias"]
    for stride in (1, 2):
        expected = F.conv2d(x.double(), weight.double(), bias.double(), stride=stride, padding=1)
        torch.testing.assert_close(conv2d(x, weight, bias=bias, stride=stride).double(), expected, rtol=0, atol=1e-5)


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)),
    options=st.sampled_from(OPTIONS),
    packing=st.sampled_from(PACKINGS),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_conv2d_takes_every_size_and_layout(sizes, options, packing, data):
    x, weight, options = arguments(*sizes, **options)
    x = laid_out(x, **data.draw(layouts(4)))
    for name in ("skip", "residual"):
        if name in options:
            options[name] = laid_out(options[name], **data.draw(layouts(4)))
    if "add" in options:
        options["add"] = laid_out(options["add"], **data.draw(layouts(2)))
    assert_exact(x, weight, packing, **options)


@pytest.mark.parametrize("packing", PACKINGS)
def test_nothing_is_read_outside_a_sample(packing):
    x, weight, options = arguments(3, 5, 20, 6, 6, skip=True)
    alone = conv2d(x[1:2], weight, packing, **options | dict(skip=options["skip"][1:2]))
    x[::2], options["skip"][::2] = torch.nan, torch.inf
    assert torch.equal(conv2d(x, weight, packing, **options)[1:2], alone)


@pytest.mark.parametrize("packing", PACKINGS)
def test_the_output_may_be_its_own_residual_and_add_a_row_of_a_table(packing):
    x, weight, options = arguments(2, 30, 40, 6, 7, residual=True)
    packed, table = pack(weight, packing), values((9, 40), seed=6)
    expected = ops.conv2d(x, packed, residual=options["residual"], add=table[3].expand(2, -1))
    x, y = (image.contiguous(memory_format=torch.channels_last) for image in (x, options["residual"]))
    weight = packed.tensor, packed.in_channels, packed.out_channels
    torch.ops.diffkern.conv2d_out(y, x, None, *weight, None, table[3].expand(2, -1), y, 1, 1, False)
    assert torch.equal(y, expected)
    torch.ops.diffkern.conv2d_out(y, x, None, *weight, None, table[::4][:2], None, 1, 1, False)
    assert torch.equal(y, ops.conv2d(x, packed, add=table[[0, 4]]))


# --- the same bits ---


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", [(5, 48, 70, 12, 10), (3, 130, 200, 4, 4), (2, 3, 16, 33, 40)], ids=str)
def test_the_bits_depend_on_no_thread_count_and_no_batch(shape, packing):
    x, weight, options = arguments(*shape, bias=True, skip=True, add=True, residual=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = conv2d(x, weight, packing, **options)
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert torch.equal(conv2d(x, weight, packing, **options), expected)
    finally:
        torch.set_num_threads(threads)
    for of in (slice(0, 1), slice(1, None)):
        part = options | {name: options[name][of] for name in ("skip", "add", "residual")}
        assert torch.equal(conv2d(x[of], weight, packing, **part), expected[of])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_taps_and_the_matrices_made_of_them_give_the_same_bits(shape):
    for options in PAIRS:
        assert_same_bits(*arguments(*shape, **options))


def assert_same_bits(x: Tensor, weight: Tensor, options: dict) -> None:
    assert torch.equal(conv2d(x, weight, "taps", **options), conv2d(x, weight, "matrices", **options))


def test_the_matrices_made_of_taps_are_winograds():
    taps = ops.pack_taps(values((70, 5, 3, 3)))
    wide = dataclasses.replace(taps, tensor=taps.tensor.double())
    matrices, expected = ops.expand_taps(taps).tensor, reference.expand_taps(wide).tensor
    assert matrices.shape == expected.shape
    assert (matrices.double() - expected).abs().max() <= 4 * 2**-24 * expected.abs().max()


AT_A_LEVEL = """
from test_conv2d import PACKINGS, PAIRS, SHAPES, arguments, assert_exact, assert_same_bits

for shape in SHAPES:
    for options in PAIRS[1::2]:
        x, weight, options = arguments(*shape, **options)
        assert_exact(x, weight, *PACKINGS, **options)
    assert_same_bits(*arguments(*shape, skip=True, upsample=True))
    for side in (1, 3):
        x, weight, options = arguments(*shape, side=side, stride=2, padding=0)
        assert_exact(x, weight, "direct", **options)
"""


def test_each_cpu_level_is_exact(at_every_level):
    at_every_level(AT_A_LEVEL, WIDTHS)


# --- packed weights ---


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_the_reference_is_the_definition_with_packed_weights_of_every_kind(shape, packing):
    """In float64, where Winograd's polynomials lose nothing that counts: so its matrices are right, all three."""
    for options in PAIRS:
        x, weight, options = arguments(*shape, **options)
        wide = {name: o.double() if isinstance(o, Tensor) else o for name, o in options.items()}
        packed = pack(weight.double(), packing, by=reference)
        y = reference.conv2d(x.double(), packed, **wide)
        torch.testing.assert_close(y, exact(x, weight, **options), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("packing", "matrices", "columns"), [("direct", 9, 64), ("matrices", 36, 64)])
def test_packed_weights_are_whole_blocks_of_columns_with_zeros_behind(packing, matrices, columns):
    packed = pack(values((70, 5, 3, 3)), packing).tensor
    assert packed.shape == (matrices, -(-70 // columns), 5, columns) and packed.is_contiguous()
    assert packed.data_ptr() % 64 == 0
    beyond = packed.transpose(1, 2).flatten(2)[:, :, 70:]
    assert beyond.shape[2] and not beyond.any() and packed[:, :, :, :6].abs().min() > 0


PACKS = {
    "direct": ops.pack_conv,
    **{f"{terms} terms": functools.partial(ops.pack_conv, terms=terms) for terms in (1, 2, 3)},
    "upsampling": functools.partial(ops.pack_upsampling, terms=3),
    "taps": ops.pack_taps,
    "matrices": lambda weight: ops.expand_taps(ops.pack_taps(weight)),
}


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_a_packed_weight_takes_images_of_its_own_channels_and_no_others(pack):
    packed, upsample = pack(values((33, 31, 3, 3))), pack is PACKS["upsampling"]
    assert (packed.in_channels, packed.out_channels, packed.kernel) == (31, 33, 3)
    x = values((1, 31, 8, 8))
    assert ops.conv2d(x, packed, upsample=upsample).shape[1] == 33
    for channels in (7, 30, 32):
        with pytest.raises(RuntimeError, match=f"^x: expected 31 channels, got {channels}$"):
            ops.conv2d(values((1, channels, 8, 8)), packed, upsample=upsample)
    with pytest.raises(RuntimeError, match="^x, skip: expected 31 channels together, got 31 and 1$"):
        ops.conv2d(x, packed, skip=x[:, :1], upsample=upsample)
    with pytest.raises(RuntimeError, match=r"^residual: expected shape \(1, 33, .*, got \(1, 34, "):
        ops.conv2d(x, packed, residual=values((1, 34, *[16 if upsample else 8] * 2)), upsample=upsample)
    with pytest.raises(RuntimeError, match="^out_channels: expected 33, those of packed, got 34$"):
        ops.conv2d(x, packed, out_channels=34, upsample=upsample)


def test_a_stride_beyond_the_image_is_its_first_pixel():
    x, weight, _ = arguments(2, 5, 7, 4, 6)
    for terms in (None, 3):
        packed = ops.pack_conv(weight, terms=terms)
        for stride in (6, 2**62, 2**63 - 1):
            y = ops.conv2d(x, packed, stride=stride)
            assert torch.equal(y, ops.conv2d(x, packed)[:, :, :1, :1])


def test_few_columns_are_packed_one_a_block():
    weight = values((3, 5, 3, 3))
    assert torch.equal(ops.pack_conv(weight).tensor, weight.permute(2, 3, 0, 1).reshape(9, 3, 5, 1))


# --- through the dispatcher ---


def test_it_compiles_into_a_graph():
    x, weight, options = arguments(2, 6, 9, 4, 5, bias=True)
    packed = ops.pack_conv(weight)
    compiled = torch.compile(lambda x: ops.conv2d(x, packed, options["bias"]) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), conv2d(x, weight, **options) + 1)


def test_no_gradient_is_cut_silently():
    x, weight, _ = arguments(1, 2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="x: expected no gradient through conv2d, got a tensor that requires grad"):
        conv2d(x.requires_grad_(), weight)
    with torch.no_grad():
        conv2d(x, weight)
