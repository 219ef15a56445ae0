"""UniPC (Zhao et al. 2023): a predictor and a corrector of any order in lambda, for one network call a step."""

import math
from typing import Any, NamedTuple

import numpy as np

from ..process import Grid, Point
from .options import one_of
from .registry import sampler


class _Earlier(NamedTuple):
    x0: Any
    at: Point


@sampler()
def unipc(
    m: Any, grid: Grid, order: int = 2, variant: str = "B2", corrector: bool = True, lower_final: bool = True
) -> Any:
    """Zhao et al. 2023, algorithms 5 to 8, on predictions of x_0.

    order        1 to 4, of the predictor
    variant      "B1", B(h) = h, or "B2", B(h) = e^h - 1
    corrector    correct each state by the prediction that was made on it
    lower_final  lower orders in the last steps
    """
    one_of("order", order, (1, 2, 3, 4))
    one_of("variant", variant, ("B1", "B2"))
    x, past, start, p = m.start(), [], None, 0
    for i, (s, t) in enumerate(m.steps()):
        x0 = m(x, s)
        if corrector and start is not None:
            x = _update(start, past[:p], s, variant, x0)
        past = [_Earlier(x0, s), *past][:order]
        past = past[:1] + [earlier for earlier in past[1:] if math.isfinite(earlier.at.lam)]
        p = min(order, len(past), len(grid) - i if lower_final else order)
        if math.isfinite(s.to(t)):
            start = x
            x = _update(x, past[:p], t, variant)
        else:
            start = None
            x = x * (t.sigma / s.sigma) + x0 * t.alpha
    return m.program(x)


def _update(x: Any, past: list[_Earlier], t: Point, variant: str, reached: Any = None) -> Any:
    """x at t from x at past[0], by the x0_hats there and before; the corrector has ``reached``, that of t, too."""
    (x0, s), *earlier = past
    h = s.to(t)
    nodes = [(e.at.lam - s.lam) / h for e in earlier]
    slopes = [(e.x0 - x0) / node for e, node in zip(earlier, nodes, strict=True)]
    if reached is not None:
        nodes, slopes = [*nodes, 1.0], [*slopes, reached - x0]
    grown = math.expm1(-h)
    x = x * (t.sigma / s.sigma) - x0 * (t.alpha * grown)
    if not slopes:
        return x
    scale = -h if variant == "B1" else grown
    rights, phi, factorial = [], grown / -h - 1, 1.0
    for k in range(1, len(nodes) + 1):
        rights.append(phi * factorial / scale)
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    weights = [0.5] if len(nodes) == 1 else np.linalg.solve(np.vander(nodes, increasing=True).T, rights)
    for weight, slope in zip(weights, slopes, strict=True):
        x = x - slope * (t.alpha * scale * float(weight))
    return x
