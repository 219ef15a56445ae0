"""The U-Net by its first name: :mod:`diffkern.networks.unet`."""

from .networks.unet import *  # noqa: F403
