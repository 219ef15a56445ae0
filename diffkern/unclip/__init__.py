"""unCLIP (Ramesh et al. 2022): from words to the embedding of a picture, and from that to pictures."""

from .clip import CLIP
from .system import UnCLIP, similarity, vary

__all__ = ["CLIP", "UnCLIP", "similarity", "vary"]
