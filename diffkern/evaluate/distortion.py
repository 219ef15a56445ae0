"""The peak signal-to-noise ratio of pictures."""

import math

from torch import Tensor


def psnr(x: Tensor, reference: Tensor) -> float:
    """The PSNR of pictures [N, ...] in [-1, 1], in dB: 10 log10(2^2 / MSE), with the mean over all of them."""
    if x.shape != reference.shape:
        raise ValueError(f"reference: expected shape {tuple(x.shape)}, got {tuple(reference.shape)}")
    error = (x.double() - reference.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)
