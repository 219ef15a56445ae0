"""How far a result may be from its oracle, and why. Everything else must be equal, bit for bit.

Bounds of sums follow from how many numbers are added, so that they hold for every kernel, whatever its order.
"""

import math

import torch

from diffkern import reference

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half a unit in the last place of a value of order 1: what storing a result costs."""

# float64 against float64
TABLE = 1e-12  # a schedule's or a sampler's coefficients, in another order of operations
ALGORITHM = 1e-11  # the same sum by another algorithm (Winograd's): a few hundred additions

# float32 against float64; of values of order 1 unless it says otherwise
Q_SAMPLE = 1e-6  # two products and a sum
REVERSE_STEP = dict(rtol=1e-6, atol=2e-5)  # x_next, where coefficients and deviations are of order 10
REVERSE_STEP_X0 = dict(rtol=1e-6, atol=5e-6)  # the same row's x0_hat, which has no noise
SAME_STEP = 2e-6  # the same step by other coefficients: another rounding of each
LOSS = 1e-6  # relative: a mean of squares, whose rounding errors average out
BOUND = 1e-5  # and that plus an absolute error: a mean of the bound's terms, where e^log_var is of order 10
BIN = 2e-6  # relative, and absolute where it is below 1: one bin's term, in nats
GROUP_NORM = 2e-6  # statistics in double, then three roundings and silu
ATTENTION = 3e-6  # relative to the largest value: what a few hundred additions may lose
ATTENTION_TERMS = {1: 2e-2, 2: 3e-5, 3: ATTENTION}  # the same by numbers of so many terms: of 8, 16 and 24 bits
UNET = 3e-5  # relative to the largest value: a network of a hundred sums, torch's on one side
ENGINE = 6e-6  # relative to the largest value: the engine's network against float64
ENGINE_HIGH = 6e-5  # the same by factors of 16 bits, where products may be made so
SAMPLE = 1e-5  # images in [-1, 1], from a network that is an exact affine map
SAMPLE_ENGINE = 2e-4  # images in [-1, 1], whose networks differ by UNET in every step
PARALLEL = 1e-4  # relative to the largest value: a few steps of Adam, by gradients that were summed in another order


# --- sums of products, relative to the sum of their magnitudes ---

UNIT = 2**-24  # float32's unit roundoff
PRODUCTS = {1: 1, 2: 3, 3: 6}  # of bfloat16 parts that are made of two factors with so many parts each
LEFT_OUT = {1: 2.1 * 2**-8, 2: 2.1 * 2**-16, 3: 0.0}  # by rounding two factors to so many parts


def summed(additions: int) -> float:
    """Bound a float32 sum's error, whatever its order.

    An addition is off by at most UNIT of a partial sum, and no partial sum exceeds the sum of the magnitudes. Errors of
    random sign with variance UNIT^2 / 3 add up to UNIT sqrt(additions / 3) (Higham & Mary 2019). The bound is 3.5 times
    that, and two roundings for the product and the result.
    """
    return (2 * math.sqrt(additions) + 2) * UNIT


def split(parts: int, depth: int) -> float:
    """Bound a sum of ``depth`` products of factors that are split into bfloat16 parts."""
    return LEFT_OUT[parts] + summed(PRODUCTS[parts] * depth)


def winograd(depth: int) -> float:
    """Bound F(4x4, 3x3) or its adjoint: sums of ``depth`` products between transforms of 12 additions a side."""
    return GROWTH * (summed(depth) + 3 * summed(12))


def _growth() -> float:
    """Return how much larger than 9 products of unit size an output's 36 Winograd products are, root mean square."""
    A_T, G, B_T = (matrix.square() for matrix in reference.winograd(4, torch.zeros((), dtype=torch.float64)))
    weight, tile = G @ torch.ones(3, 3, dtype=torch.float64) @ G.T, B_T @ torch.ones(6, 6, dtype=torch.float64) @ B_T.T
    return float((A_T @ (weight * tile) @ A_T.T).max().sqrt()) / 9


GROWTH = _growth()  # 3.75; the adjoint's is 2.26
