"""The same networks by native kernels."""

from .unet import *  # noqa: F403
from .unet import _compiled  # noqa: F401
