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
from .half_unet import HalfUNet
from .mlp import ResidualMLP
from .unet import UNet

ARCHITECTURES = {"UNet": UNet, "ResidualMLP": ResidualMLP}
"""The networks that a model file can describe, by name; each has a ``config`` of its options."""

__all__ = [
    "ARCHITECTURES",
    "AttentionBlock",
    "Conv3x3",
    "Downsample",
    "HalfUNet",
    "Level",
    "MidBlock",
    "ResBlock",
    "ResidualMLP",
    "TimestepEmbedding",
    "UNet",
    "Upsample",
    "from_diffusers",
    "group_norm_silu",
    "timestep_embedding",
]
