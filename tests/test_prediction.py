"""Predictions: target and head undo each other, and are the papers' formulas."""

import numpy as np
import pytest

from diffkern.prediction import PREDICTIONS, head, target
from diffkern.schedule import Schedule

CONSTANTS = {"edm": {"sigma_data": 0.5}, "mu": {"posterior": (0.3, 0.6)}}
ALPHA, SIGMA = np.array([0.9, 0.5, 1.0, 0.01]), np.array([0.2, 0.9, 3.0, 0.99])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_head_finds_the_image_in_its_target(prediction):
    constants = CONSTANTS.get(prediction, {})
    x_0, eps = 0.7, -1.3
    (y_x, y_e), (p_x, p_o) = (f(prediction, ALPHA, SIGMA, **constants) for f in (target, head))
    assert p_x * (ALPHA * x_0 + SIGMA * eps) + p_o * (y_x * x_0 + y_e * eps) == pytest.approx(x_0, rel=1e-11)


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("eps", (1 / ALPHA, -SIGMA / ALPHA)),
        ("x0", (0 * ALPHA, 1 + 0 * ALPHA)),
        ("v", (ALPHA / (ALPHA**2 + SIGMA**2), -SIGMA / (ALPHA**2 + SIGMA**2))),
        ("score", (1 / ALPHA, SIGMA**2 / ALPHA)),
        ("flow", (1 / (ALPHA + SIGMA), -SIGMA / (ALPHA + SIGMA))),
        ("mu", (-0.6 / 0.3 + 0 * ALPHA, 1 / 0.3 + 0 * ALPHA)),
    ],
)
def test_heads_are_the_known_ones(prediction, expected):
    p_x, p_o = head(prediction, ALPHA, SIGMA, **CONSTANTS.get(prediction, {}))
    assert p_x == pytest.approx(expected[0], rel=1e-14) and p_o == pytest.approx(expected[1], rel=1e-14)


def test_the_head_of_edm_is_c_skip_and_c_out():
    sigma = np.array([0.002, 0.5, 80.0])
    p_x, p_o = head("edm", np.ones(3), sigma, sigma_data=0.5)
    assert p_x == pytest.approx(0.25 / (sigma**2 + 0.25), rel=1e-10)
    assert p_o == pytest.approx(sigma * 0.5 / np.sqrt(sigma**2 + 0.25), rel=1e-10)


def test_mu_is_the_mean_of_the_posterior():
    schedule = Schedule.linear()
    point = schedule.point(400)
    y_x, y_e = target("mu", point.alpha, point.sigma, **schedule.head_constants("mu", point))
    c1, c2 = schedule.posterior_x0[400].item(), schedule.posterior_xt[400].item()
    assert y_x == pytest.approx(c1 + c2 * point.alpha) and y_e == pytest.approx(c2 * point.sigma)


def test_an_unknown_prediction_is_refused_by_name():
    with pytest.raises(ValueError, match="prediction: expected one of eps, x0, .*, got 'noise'"):
        target("noise", 1.0, 1.0)
