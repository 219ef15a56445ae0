"""Launch plans: pure functions of the sizes, which a card must hold and which must cover the work once."""

import itertools

import pytest

from diffkern import _C

MAX_X, MAX_Y = 2**31 - 1, 65535  # of a grid, on every card
# Bytes of shared memory that a block can have (CUDA C++ Programming Guide, "Technical Specifications").
SHARED_BYTES = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
DECLARED = 1024  # more than group norm's kernels declare beside what their plan asks for


def assert_a_card_can_launch(launch: _C.Launch, shared_bytes: int = min(SHARED_BYTES.values())) -> None:
    assert 1 <= launch.grid_x <= MAX_X and 1 <= launch.grid_y <= MAX_Y
    assert 32 <= launch.threads <= 1024 and launch.threads % 32 == 0
    assert 0 <= launch.shared_bytes <= shared_bytes


def covers(part: int, parts: int, whole: int) -> bool:
    """Whether so many parts are enough, and one less is not."""
    return (parts - 1) * part < whole <= parts * part


@pytest.mark.parametrize("samples", [1, 7, 65535, 65536, 10**6])
@pytest.mark.parametrize("elements", [1, 3, 1024, 3 * 32 * 32, 10**7, 2**40])
@pytest.mark.parametrize("element_size", [2, 4])
def test_an_elementwise_plan_fits_the_grid_and_wastes_at_most_a_block_a_sample(samples, elements, element_size):
    launch = _C.plan_elementwise(samples, elements, element_size)
    assert_a_card_can_launch(launch)
    assert launch.grid_y == min(samples, MAX_Y)
    assert (launch.grid_x - 1) * launch.threads * 16 // element_size < elements  # no block without work


@pytest.mark.parametrize("samples", [1, 65536])
@pytest.mark.parametrize("elements", [1, 1024, 1025, 10**9])
def test_a_plan_of_sums_has_a_block_a_chunk_as_long_as_there_are_so_many(samples, elements):
    launch = _C.plan_sums(samples, elements)
    assert_a_card_can_launch(launch)
    assert launch.grid_x == MAX_Y or covers(1024, launch.grid_x, elements)
    assert launch.grid_y == min(samples, MAX_Y)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element_size", [2, 4])
def test_a_plan_of_group_norm_covers_channels_and_pixels_once_in_shared_memory_of_any_card(element_size, channels_last):
    widths, groups, pixels = (1, 2, 3, 4, 7, 16, 40, 512), (1, 2, 5, 8, 32), (1, 5, 64, 1023, 32 * 32, 1024 * 1024)
    for width, count, image in itertools.product(widths, groups, pixels):
        launches, (set_groups, set_channels, chunk_pixels, vector) = _C.plan_group_norm_silu(
            3, width * count, count, image, element_size, channels_last
        )
        for launch in launches:
            assert_a_card_can_launch(launch, min(SHARED_BYTES.values()) - DECLARED)
        assert set_channels == set_groups * width and 1 <= set_groups <= min(count, 16)
        chunks = -(-image // chunk_pixels)
        assert launches[0].grid_x == -(-count // set_groups) * chunks and launches[0].grid_y == 3
        assert [launch.kernel for launch in launches] == (["whole"] if chunks == 1 else ["sums", "rest"])
        assert chunk_pixels * set_channels * element_size < launches[0].shared_bytes
        along = set_channels if channels_last else image  # in memory, where a thread reads 16 bytes or one element
        assert vector == 1 or (vector == 16 // element_size and along % vector == 0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("element_size", [2, 4])
def test_every_card_has_the_shared_memory_for_group_norm_of_every_width(element_size, channels_last):
    """Up to the 512 channels of a group that ``diffkern.ops`` promises."""
    card = min(SHARED_BYTES.values()) - DECLARED
    for width, groups, pixels in itertools.product(range(1, 513), (1, 2, 3, 4, 8, 32), (16, 4096)):
        (launch, *_), _ = _C.plan_group_norm_silu(1, width * groups, groups, pixels, element_size, channels_last)
        assert launch.shared_bytes <= card, (width, groups, pixels)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("architecture", SHARED_BYTES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_plan_of_attention_covers_the_tokens_once_in_the_shared_memory_of_its_card(dtype, architecture, backward):
    for d, queries, keys in itertools.product(
        (8, 32, 40, 64, 72, 128, 136, 256, 264, 512, 1000), (1, 65, 1024), (3, 100)
    ):
        plan = _C.plan_attention(6, queries, keys, d, dtype, architecture, backward)
        names = [launch.kernel for launch, _ in plan]
        assert names in ([["delta", "dk, dv", "dq"], ["delta", "dk", "dv", "dq"]] if backward else [["out"]])
        for launch, rows in plan:
            assert_a_card_can_launch(launch, SHARED_BYTES[architecture])
            if launch.kernel == "delta":
                assert covers(rows, launch.grid_x, 6 * queries)
            else:
                assert launch.grid_x % 6 == 0
                assert covers(
                    rows,
                    launch.grid_x // 6,
                    keys if launch.kernel.startswith("dk") or "dv" in launch.kernel else queries,
                )
            assert launch.grid_y == 1 or covers(512, launch.grid_y, d)


def test_tensor_cores_are_taken_where_the_card_has_them_for_the_rows():
    """Their blocks want shared memory that the launch must ask for; the others' is declared."""

    def on_tensor_cores(dtype: str, architecture: int, d: int) -> bool:
        ((launch, _),) = _C.plan_attention(1, 64, 64, d, dtype, architecture, False)
        return launch.shared_bytes > 0

    assert on_tensor_cores("float16", 75, 64) and not on_tensor_cores("bfloat16", 75, 64)
    assert on_tensor_cores("float16", 80, 512) and on_tensor_cores("bfloat16", 90, 512)
    assert on_tensor_cores("float32", 80, 252) and not on_tensor_cores("float32", 75, 64)
    for dtype, d in (("float32", 62), ("float32", 260), ("bfloat16", 60), ("bfloat16", 520)):
        assert not on_tensor_cores(dtype, 90, d)


@pytest.mark.parametrize(
    ("plan", "arguments", "message"),
    [
        (_C.plan_elementwise, (0, 1, 4), "samples, elements: expected values > 0"),
        (_C.plan_elementwise, (1, 0, 4), "samples, elements: expected values > 0"),
        (_C.plan_elementwise, (1, 1, 8), "element_size: expected 2 or 4, got 8"),
        (_C.plan_sums, (1, 0), "samples, elements: expected values > 0"),
        (_C.plan_group_norm_silu, (1, 6, 4, 1, 4, False), "groups: expected a divisor of the 6 channels, got 4"),
        (_C.plan_group_norm_silu, (1, 6, 2, 0, 4, False), "samples, channels, pixels: expected values > 0"),
        (_C.plan_group_norm_silu, (1, 1026, 2, 1, 4, False), "groups: expected at most 512 channels each, got 513"),
        (_C.plan_attention, (1, 0, 1, 8, "float32", 80, False), "expected values > 0"),
        (_C.plan_elementwise, (1, 2**63 - 1, 4), "samples, elements: expected values > 0 whose product is at most"),
        (_C.plan_sums, (2**32, 2**32), "samples, elements: expected values > 0 whose product is at most"),
        (_C.plan_attention, (2**31, 2**31, 1, 8, "float32", 80, True), "whose product is at most"),
        (_C.plan_attention, (1, 1, 1, 8, "float64", 80, False), "dtype: expected 'float32'"),
    ],
)
def test_a_plan_of_nothing_or_of_more_than_fits_is_refused(plan, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        plan(*arguments)
