"""How far a result may be from its oracle, and why. What is not here must be equal, bit for bit."""

import torch

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
GROUP_NORM = 2e-6  # statistics in double, then three roundings and silu
ATTENTION = 3e-6  # relative to the largest value: what a few hundred additions may lose
ATTENTION_TERMS = {1: 2e-2, 2: 3e-5, 3: ATTENTION}  # the same by numbers of so many terms: of 8, 16 and 24 bits
CONV = {"direct": 8 * 2**-24, "taps": 32 * 2**-24, "matrices": 32 * 2**-24}  # of the sum of the products' magnitudes,
# by how the weight is packed: Winograd's algorithm adds up values that are larger than their sum
UNET = 3e-5  # relative to the largest value: a network of a hundred sums, torch's on one side
ENGINE = 6e-6  # relative to the largest value: the engine's network against float64
ENGINE_HIGH = 6e-5  # the same by factors of 16 bits, where products may be made so
SAMPLE = 1e-5  # images in [-1, 1], from a network that is an exact affine map
SAMPLE_ENGINE = 2e-4  # images in [-1, 1], whose networks differ by UNET in every step
PARALLEL = 1e-4  # relative to the largest value: a few steps of Adam, by gradients that were summed in another order
