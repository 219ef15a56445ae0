"""The public names of the package, and the kernels that they need."""

import torch

from . import __version__

if torch.__version__ < "2.10":
    raise ImportError(f"diffkern: expected torch 2.10 or later, got {torch.__version__}: run pip install torch==2.13.0")
try:
    from .ops import attention, diffusion_loss, group_norm_silu, noise, noise_loss, q_sample, reverse_step
    from .ops.transforms import torch_ops
except (AttributeError, ImportError, RuntimeError) as error:  # absent, or older than ops
    from .unbuilt import explain

    raise ImportError(explain(error)) from None

from .cascade import Cascade
from .constraints import From, Inpaint, Quantile
from .engine import explain, optimize
from .guidance import Guidance, PiGDM
from .image_to_image import restore, upscale
from .likelihood import Nll, nll
from .model import Model, load, save
from .process import EDM, VE, VP, RectifiedFlow, SubVP
from .runtime import Run
from .sampling import encode, interpolate, sample
from .schedule import Schedule
from .unclip import similarity, vary
from .unet import UNet

__all__ = [
    "Cascade",
    "EDM",
    "From",
    "Guidance",
    "Inpaint",
    "Model",
    "Nll",
    "PiGDM",
    "Quantile",
    "RectifiedFlow",
    "Run",
    "Schedule",
    "SubVP",
    "UNet",
    "VE",
    "VP",
    "__version__",
    "attention",
    "diffusion_loss",
    "encode",
    "explain",
    "group_norm_silu",
    "interpolate",
    "load",
    "nll",
    "noise",
    "noise_loss",
    "optimize",
    "q_sample",
    "restore",
    "reverse_step",
    "sample",
    "save",
    "similarity",
    "torch_ops",
    "upscale",
    "vary",
]
