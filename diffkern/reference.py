"""Every op once more in plain NumPy and PyTorch, with the same signature: what the kernels are held against.

The noise is the standard of ``docs/noise.md`` word for word: float32 additions, multiplications and square roots,
each rounded once, in the order written here. The kernels give these very bits.
"""
# ruff: noqa: F401

from .ops.abs_quantile import reference as abs_quantile
from .ops.attention import reference as attention
from .ops.conv2d import expand_taps_reference as expand_taps
from .ops.conv2d import pack_taps_reference as pack_taps
from .ops.conv2d import reference as conv2d
from .ops.conv2d import winograd
from .ops.conv3x3 import reference as conv3x3
from .ops.diffusion_loss import reference as diffusion_loss
from .ops.group_norm_silu import reference as group_norm_silu
from .ops.moments import reference as moments
from .ops.noise import cos_sin, normals, radius
from .ops.noise import reference as noise
from .ops.noise_loss import reference as noise_loss
from .ops.q_sample import reference as q_sample
from .ops.reverse_step import exp
from .ops.reverse_step import reference as reverse_step
from .ops.row import COLUMNS
from .philox import philox4x32
