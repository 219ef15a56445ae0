"""Launch shapes: pure functions of the sizes, which a grid must hold and which must cover the work."""

import pytest

from diffkern import _C

MAX_X, MAX_Y = 2**31 - 1, 65535  # of a grid, on every card


@pytest.mark.parametrize("samples", [1, 7, 65535, 65536, 10**6])
@pytest.mark.parametrize("elements", [1, 3, 1024, 3 * 32 * 32, 10**7, 2**40])
@pytest.mark.parametrize("element_size", [2, 4])
def test_an_elementwise_plan_fits_the_grid_and_wastes_at_most_a_block_a_sample(samples, elements, element_size):
    x, y, threads = _C.plan_elementwise(samples, elements, element_size)
    vector = 16 // element_size
    assert 1 <= x <= MAX_X and 1 <= y <= MAX_Y and threads <= 1024 and threads % 32 == 0
    assert y == min(samples, MAX_Y)
    assert (x - 1) * threads * vector < elements  # no block without work


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 4), "samples, elements: expected values > 0"),
        ((1, 0, 4), "samples, elements: expected values > 0"),
        ((1, 1, 8), "element_size: expected 2 or 4, got 8"),
    ],
)
def test_a_plan_of_nothing_is_refused(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        _C.plan_elementwise(*arguments)
