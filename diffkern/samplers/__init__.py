"""Samplers: each its paper's algorithm, about ten lines, in the files of this folder.

``SAMPLERS`` holds all of them by name. A new one is a function ``(m, grid, **options) -> m.program(x)`` with
``@sampler()`` in one of the files, or anywhere::

    @sampler()
    def euler(m, grid):
        x = m.start()
        for s, t in m.steps():                                   # from the point s to the point t
            d = m.eps(x, s)                                      # calls the network on x at s
            x = (x / s.alpha + d * (t.rho - s.rho)) * t.alpha
        return m.program(x)
"""

from ..prediction import PREDICTIONS as PREDICTIONS
from . import adams_bashforth, ancestral, dpm_solver, ode, stochastic, uni_pc  # noqa: F401  each registers its samplers
from .ancestral import LEARNED as LEARNED
from .ancestral import SPREAD as SPREAD
from .ancestral import UNBOUNDED as UNBOUNDED
from .ancestral import VARIANCES as VARIANCES
from .registry import SAMPLERS as SAMPLERS
from .registry import Sampler as Sampler
from .registry import sampler as sampler
from .tables import fold_x0 as fold_x0


def __getattr__(name: str) -> Sampler:
    if name in SAMPLERS:
        return SAMPLERS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def default_sampler(steps: int | None, T: int | None, eta: float | None = None) -> str:
    """ddpm for all of a schedule's T steps (None); for fewer ddim with ``eta``, unipc, which is more exact, without."""
    if eta or eta is not None and (T is None or steps not in (None, T)):
        return "ddim"
    return "ddpm" if T is not None and steps in (None, T) else "unipc"
