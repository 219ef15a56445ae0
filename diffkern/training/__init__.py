"""Training."""

from .trainer import *  # noqa: F403
