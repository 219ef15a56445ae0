"""Likelihood: the bits a dimension that a model needs to tell a sample, by the variational bound or by the ODE.

    bound  -log2 p(x_0) <= L_T + sum_t L_t + L_0                                             (Ho et al. 2020, eq. 5)
    ode    -log2 p(x_0)  = -log2 N(x_T; 0, prior_std^2) - int div(dx/dt) dt / ln 2           (Song et al. 2021b, eq. 39)

L_T has a closed form. L_t is the divergence of the model's step from the posterior q(x_{t-1} | x_t, x_0). L_0 tells the
levels of the sample from x_1. The network gets float32 and a term of the bound is ``ops.diffusion_loss``; sums, the
state of the ODE and its volume are float64.
"""

from .draws import LIKELIHOOD_STREAM as LIKELIHOOD_STREAM
from .measure import Nll as Nll
from .measure import nll as nll
