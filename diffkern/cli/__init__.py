"""The command line."""

from .sample import main

__all__ = ["main"]
