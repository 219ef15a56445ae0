"""Palette (Saharia et al. 2022): one network that colours gray pictures, fills holes and mends coarse JPEGs."""

from .damage import Damage, damaged

__all__ = ["Damage", "damaged"]
