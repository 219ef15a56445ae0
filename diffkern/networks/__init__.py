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
from .unet import UNet

__all__ = [
    "AttentionBlock",
    "Conv3x3",
    "Downsample",
    "HalfUNet",
    "Level",
    "MidBlock",
    "ResBlock",
    "TimestepEmbedding",
    "UNet",
    "Upsample",
    "from_diffusers",
    "group_norm_silu",
    "timestep_embedding",
]
