"""Cascades (Ho et al. 2022): a model of small pictures, and models that enlarge what it draws."""

from .system import Cascade

__all__ = ["Cascade"]
