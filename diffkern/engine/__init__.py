"""Networks by native kernels, from their graphs, for inference on a CPU."""

from .backend import diffkern
from .explain import Explanation, explain
from .optimized import dtype_of, is_optimized, optimize, unwrapped

__all__ = ["Explanation", "diffkern", "dtype_of", "explain", "is_optimized", "optimize", "unwrapped"]
