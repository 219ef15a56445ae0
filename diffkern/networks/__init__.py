"""Networks: the U-Net, its blocks, diffusers' networks as ours, and the modes in which networks are made and run."""

from .blocks import (
    AttentionBlock,
    Conv3x3,
    Downsample,
    Level,
    MidBlock,
    ResBlock,
    TimestepEmbedding,
    Upsample,
    group_norm_silu,
    timestep_embedding,
)
from .diffusers import from_diffusers
from .edm2 import EDM2UNet
from .half_unet import HalfUNet
from .mlp import ResidualMLP
from .ncsnpp import NCSNpp
from .rms_unet import RMSUNet
from .unet import UNet

ARCHITECTURES = {architecture.__name__: architecture for architecture in (UNet, NCSNpp, EDM2UNet, RMSUNet, ResidualMLP)}
"""The networks that a model file can describe, by name; each has a ``config`` of its options."""

__all__ = [
    "ARCHITECTURES",
    "AttentionBlock",
    "Conv3x3",
    "Downsample",
    "EDM2UNet",
    "HalfUNet",
    "Level",
    "MidBlock",
    "NCSNpp",
    "RMSUNet",
    "ResBlock",
    "ResidualMLP",
    "TimestepEmbedding",
    "UNet",
    "Upsample",
    "from_diffusers",
    "group_norm_silu",
    "timestep_embedding",
]
