"""The picture of a run's loss."""

import math

import numpy as np
import pytest

from diffkern.training.plot import BOTTOM, COLOURS, HEIGHT, LEFT, RIGHT, TOP, WIDTH, loss_plot, ticks
from diffkern.training.runs import CURVES


def inside(image, name: str) -> np.ndarray:
    """(x, y) of the pixels that have the colour of a curve, between the axes."""
    pixels = np.array(image)[TOP : HEIGHT - BOTTOM + 1, LEFT : WIDTH - RIGHT + 1]
    y, x = np.nonzero((pixels == COLOURS[list(CURVES).index(name)]).all(2))
    return np.stack((x / (WIDTH - RIGHT - LEFT), 1 - y / (HEIGHT - BOTTOM - TOP)), 1)


def test_a_curve_lies_where_its_logarithms_are():
    curve = [(100 * k, 0.01 * 2.0 ** (10 - k)) for k in range(11)]  # a straight line from corner to corner
    points = inside(loss_plot({"training": curve, "validation": []}), "training")
    np.testing.assert_allclose(points[:, 0], 1 - points[:, 1], atol=0.01)
    assert points[:, 0].min() < 0.01 and points[:, 0].max() > 0.99


def test_curves_share_their_axes_and_losses_below_zero_have_a_linear_one():
    curves = {"training": [(0, -1.0), (10, 0.0)], "validation": [(5, 1.0), (10, 1.0)]}
    image = loss_plot(curves)
    training, validation = inside(image, "training"), inside(image, "validation")
    np.testing.assert_allclose(training[:, 1], training[:, 0] / 2, atol=0.01)
    assert (validation[:, 1] > 0.99).all() and validation[:, 0].min() == pytest.approx(0.5, abs=0.01)


def test_one_point_is_a_picture_and_none_is_an_error():
    assert len(inside(loss_plot({"training": [(7, 0.3)], "validation": []}), "training"))
    with pytest.raises(ValueError, match="^curves: expected at least one finite point, got none$"):
        loss_plot({"training": [], "validation": []})


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.nan])
def test_a_loss_that_is_not_finite_is_left_out_of_the_picture(loss):
    curve = [(0, 1.0), (10, 2.0)]
    expected = loss_plot({"training": curve, "validation": [(10, 3.0)]})
    got = loss_plot({"training": curve, "validation": [(5, loss), (10, 3.0), (20, loss)]})
    assert np.array_equal(np.array(got), np.array(expected))
    assert len(inside(loss_plot({"training": curve, "validation": [(10, loss)]}), "training"))


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 100_000, False, [0, 20_000, 40_000, 60_000, 80_000, 100_000]),
        (-0.3, 0.31, False, [-0.2, 0.0, 0.2]),
        (0.013, 0.9, True, [0.02, 0.05, 0.1, 0.2, 0.5]),
        (0.02, 0.03, True, [0.02, 0.022, 0.024, 0.026, 0.028, 0.03]),
        (1e-9, 1.0, True, [1e-8, 1e-6, 1e-4, 1e-2, 1.0]),
        (3, 3, False, [3]),
    ],
)
def test_ticks_are_few_round_numbers(low, high, log, expected):
    assert ticks(low, high, log=log) == pytest.approx(expected)
