"""Predictions: what a network's output stands for. Each is a target y_x x_0 + y_e eps, and everything follows from it.

    out    = y_x x_0 + y_e eps                 what the network is trained on
    x0_hat = p_x x_t + p_o out                 (p_x, p_o) solve it for x_0, with x_t = alpha x_0 + sigma eps

A new prediction is one line in :data:`PREDICTIONS`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .process import Point, Process

Pair = tuple[NDArray, NDArray]


def _edm(alpha: NDArray, sigma: NDArray, sigma_data: float = 0.5, **_: Any) -> Pair:
    variance = sigma**2 + (alpha * sigma_data) ** 2
    c_skip, c_out = alpha * sigma_data**2 / variance, sigma * sigma_data / np.sqrt(variance)
    return (1 - c_skip * alpha) / c_out, -c_skip * sigma / c_out


def _mu(alpha: NDArray, sigma: NDArray, posterior: Pair, **_: Any) -> Pair:
    c1, c2 = posterior
    return c1 + c2 * alpha, c2 * sigma


PREDICTIONS: dict[str, Callable[..., Pair]] = {
    "eps": lambda alpha, sigma, **_: (0 * sigma, 1 + 0 * sigma),  # Ho et al. 2020
    "x0": lambda alpha, sigma, **_: (1 + 0 * sigma, 0 * sigma),
    "v": lambda alpha, sigma, **_: (-sigma, alpha),  # Salimans & Ho 2022, appendix D
    "score": lambda alpha, sigma, **_: (0 * sigma, -1 / sigma),  # Song et al. 2021b
    "flow": lambda alpha, sigma, **_: (-1 + 0 * sigma, 1 + 0 * sigma),  # Lipman et al. 2023
    "edm": _edm,  # F of x0_hat = c_skip x + c_out F (Karras et al. 2022, table 1)
    "mu": _mu,  # the mean of q(x_{t-1} | x_t, x_0) (Ho et al. 2020, eq. 8)
}


def target(prediction: str, alpha: ArrayLike, sigma: ArrayLike, **constants: Any) -> Pair:
    """(y_x, y_e) of ``prediction`` at alpha and sigma > 0, float64.

    constants: ``sigma_data`` of "edm"; ``posterior`` of "mu", (c1, c2) of its mean c1 x_0 + c2 x_t
    """
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    return PREDICTIONS[prediction](np.asarray(alpha, float), np.asarray(sigma, float), **constants)


def head(prediction: str, alpha: ArrayLike, sigma: ArrayLike, **constants: Any) -> Pair:
    """(p_x, p_o) of ``prediction`` at alpha and sigma > 0, float64: infinite where x_0 cannot be told from out."""
    y_x, y_e = target(prediction, alpha, sigma, **constants)
    determinant = sigma * y_x - alpha * y_e
    with np.errstate(divide="ignore"):
        return -y_e / determinant, sigma / determinant


def head_at(prediction: str, point: Point, process: Process) -> tuple[float, float]:
    """(p_x, p_o) at a point, as numbers. Raises ValueError where float32 does not hold them."""
    p_x, p_o = head(prediction, point.alpha, point.sigma, **process.head_constants(prediction, point))
    if not max(abs(p_x), abs(p_o)) <= np.finfo(np.float32).max:
        raise ValueError(
            f"prediction: expected 'v', 'x0' or 'flow' where alpha falls to {point.alpha:.3g} "
            f"(x_0 cannot be told from noise alone), got {prediction!r}"
        )
    return float(p_x), float(p_o)
