"""The U-Net by its first name: :mod:`diffkern.networks`."""

from .networks import *  # noqa: F403
