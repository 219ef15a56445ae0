"""Convolution with all that a U-Net adds to it, against float64: every shape, option, CPU level and thread count."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts
from levels import values
from tolerances import CONV
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops, reference

TILES = [None, 2, 4]  # the kernels: direct, Winograd's F(2x2, 3x3) and F(4x4, 3x3)

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
OPTIONS = [
    dict(zip(("bias", "skip", "add", "residual", "upsample"), chosen, strict=True))
    for chosen in itertools.product((False, True), repeat=5)
]


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
) -> Tensor:
    """The definition, in float64."""
    x = x.double() if skip is None else torch.cat((x, skip), dim=1).double()
    if upsample:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    height, width = (-(-size // stride) for size in x.shape[2:])
    side = weight.shape[-1]
    y = F.conv2d(F.pad(x, (padding, side, padding, side)), weight.double(), stride=stride)[:, :, :height, :width]
    y = y if bias is None else y + bias.double()[:, None, None]
    y = y if add is None else y + add.double()[:, :, None, None]
    return y if residual is None else y + residual.double()


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


def conv2d(x: Tensor, weight: Tensor, tile: int | None = None, **options) -> Tensor:
    return ops.conv2d(x, ops.pack_conv(weight, tile=tile), out_channels=len(weight), **options)


def assert_exact(x: Tensor, weight: Tensor, tile: int | None = None, **options) -> None:
    """Within float32 arithmetic: a small multiple of its rounding of what is added up."""
    y = conv2d(x, weight, tile, **options)
    expected = exact(x, weight, **options)
    magnitudes = {name: o.abs() if isinstance(o, Tensor) else o for name, o in options.items()}
    size = exact(x.abs(), weight.abs(), **magnitudes)
    assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    assert y.shape == expected.shape
    if y.numel():
        assert (y.double() - expected).abs().max() <= CONV[tile] * size.max()


# --- the definition ---


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conv2d_is_its_definition_with_every_option(shape, tile):
    for options in OPTIONS:
        x, weight, options = arguments(*shape, **options)
        assert_exact(x, weight, tile, **options)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_strides_kernels_and_paddings_are_the_definitions(shape):
    for side, stride, padding, upsample in itertools.product((1, 3), (1, 2, 3), (0, 1, 2), (False, True)):
        x, weight, options = arguments(
            *shape, side=side, stride=stride, padding=padding, upsample=upsample, bias=True, residual=True
        )
        assert_exact(x, weight, **options)


def test_it_is_torchs_convolution():
    x, weight, options = arguments(2, 20, 30, 8, 10, bias=True)
    bias = options["bias"]
    for stride in (1, 2):
        expected = F.conv2d(x.double(), weight.double(), bias.double(), stride=stride, padding=1)
        torch.testing.assert_close(conv2d(x, weight, bias=bias, stride=stride).double(), expected, rtol=0, atol=1e-5)


@given(
    sizes=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 70), st.integers(0, 9), st.integers(0, 9)),
    options=st.sampled_from(OPTIONS),
    tile=st.sampled_from(TILES),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_conv2d_takes_every_size_and_layout(sizes, options, tile, data):
    x, weight, options = arguments(*sizes, **options)
    x = laid_out(x, **data.draw(layouts(4)))
    for name in ("skip", "residual"):
        if name in options:
            options[name] = laid_out(options[name], **data.draw(layouts(4)))
    if "add" in options:
        options["add"] = laid_out(options["add"], **data.draw(layouts(2)))
    assert_exact(x, weight, tile, **options)


@pytest.mark.parametrize("tile", TILES)
def test_nothing_is_read_outside_a_sample(tile):
    x, weight, options = arguments(3, 5, 20, 6, 6, skip=True)
    alone = conv2d(x[1:2], weight, tile, **options | dict(skip=options["skip"][1:2]))
    x[::2], options["skip"][::2] = torch.nan, torch.inf
    assert torch.equal(conv2d(x, weight, tile, **options)[1:2], alone)


@pytest.mark.parametrize("tile", TILES)
def test_the_output_may_be_its_own_residual_and_add_a_row_of_a_table(tile):
    x, weight, options = arguments(2, 30, 40, 6, 7, residual=True)
    packed, table = ops.pack_conv(weight, tile=tile), values((9, 40), seed=6)
    expected = ops.conv2d(x, packed, out_channels=40, residual=options["residual"], add=table[3].expand(2, -1))
    x, y = (image.contiguous(memory_format=torch.channels_last) for image in (x, options["residual"]))
    torch.ops.diffkern.conv2d_out(y, x, None, packed, None, table[3].expand(2, -1), y, 1, 1, False)
    assert torch.equal(y, expected)
    torch.ops.diffkern.conv2d_out(y, x, None, packed, None, table[::4][:2], None, 1, 1, False)
    assert torch.equal(y, ops.conv2d(x, packed, out_channels=40, add=table[[0, 4]]))


# --- the same bits ---


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(5, 48, 70, 12, 10), (3, 130, 200, 4, 4), (2, 3, 16, 33, 40)], ids=str)
def test_the_bits_depend_on_no_thread_count_and_no_batch(shape, tile):
    x, weight, options = arguments(*shape, bias=True, skip=True, add=True, residual=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = conv2d(x, weight, tile, **options)
        for count in range(2, 9):
            torch.set_num_threads(count)
            assert torch.equal(conv2d(x, weight, tile, **options), expected)
    finally:
        torch.set_num_threads(threads)
    for of in (slice(0, 1), slice(1, None)):
        part = options | {name: options[name][of] for name in ("skip", "add", "residual")}
        assert torch.equal(conv2d(x[of], weight, tile, **part), expected[of])


AT_A_LEVEL = """
from test_conv2d import OPTIONS, SHAPES, TILES, arguments, assert_exact
from diffkern import _C

assert _C.cpu_level() == "{level}"
for shape in SHAPES:
    for tile in TILES:
        for options in OPTIONS[::5]:
            x, weight, options = arguments(*shape, **options)
            assert_exact(x, weight, tile, **options)
    for side in (1, 3):
        x, weight, options = arguments(*shape, side=side, stride=2, padding=0)
        assert_exact(x, weight, **options)
print("exact")
"""


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_each_cpu_level_is_exact(run_at_level, level):
    done = run_at_level(level, AT_A_LEVEL.format(level=level))
    assert done.stdout == "exact\n", done.stderr


# --- packed weights ---


@pytest.mark.parametrize("tile", [None, 2, 4])
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_the_reference_is_the_definition_with_packed_weights_of_every_kind(shape, tile):
    """In float64, where Winograd's polynomials lose nothing that counts: so its matrices are right, all three."""
    for options in OPTIONS:
        x, weight, options = arguments(*shape, **options)
        wide = {name: o.double() if isinstance(o, Tensor) else o for name, o in options.items()}
        packed = ops.pack_conv(weight.double(), tile=tile)
        y = reference.conv2d(x.double(), packed, out_channels=len(weight), **wide)
        torch.testing.assert_close(y, exact(x, weight, **options), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("tile", "matrices", "columns"), [(None, 9, 64), (2, 16, 64), (4, 36, 64)])
def test_packed_weights_are_whole_blocks_of_columns_with_zeros_behind(tile, matrices, columns):
    packed = ops.pack_conv(values((70, 5, 3, 3)), tile=tile)
    assert packed.shape == (matrices, -(-70 // columns), 5, columns) and packed.is_contiguous()
    assert packed.data_ptr() % 64 == 0
    beyond = packed.transpose(1, 2).flatten(2)[:, :, 70:]
    assert beyond.shape[2] and not beyond.any() and packed[:, :, :, :6].abs().min() > 0


def test_few_columns_are_packed_one_a_block():
    weight = values((3, 5, 3, 3))
    assert torch.equal(ops.pack_conv(weight), weight.permute(2, 3, 0, 1).reshape(9, 3, 5, 1))


# --- through the dispatcher ---


@pytest.mark.parametrize("tile", TILES)
def test_conv2d_out_passes_opcheck(tile):
    x, weight, options = arguments(2, 6, 9, 4, 5, bias=True, skip=True, add=True, residual=True)
    packed = ops.pack_conv(weight, tile=tile)
    last = [image.contiguous(memory_format=torch.channels_last) for image in (x, options["skip"], options["residual"])]
    for skip, bias, add, residual in ((last[1], options["bias"], options["add"], last[2]), (None,) * 4):
        given = packed if skip is not None else ops.pack_conv(weight[:, :6], tile=tile)
        y = torch.empty_like(last[2])
        torch.library.opcheck(
            torch.ops.diffkern.conv2d_out.default, (y, last[0], skip, given, bias, add, residual, 1, 1, False)
        )


def test_it_compiles_into_a_graph():
    x, weight, options = arguments(2, 6, 9, 4, 5, bias=True)
    packed = ops.pack_conv(weight)
    compiled = torch.compile(
        lambda x: ops.conv2d(x, packed, options["bias"], out_channels=9) + 1, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), conv2d(x, weight, **options) + 1)


def test_no_gradient_is_cut_silently():
    x, weight, _ = arguments(1, 2, 3, 4, 4)
    with pytest.raises(RuntimeError, match="x: expected no gradient through conv2d, got a tensor that requires grad"):
        conv2d(x.requires_grad_(), weight)
    with torch.no_grad():
        conv2d(x, weight)
