"""Networks by native kernels, from their graphs, for inference on a CPU."""

from .optimized import dtype_of, is_optimized, optimize, unwrapped

__all__ = ["dtype_of", "is_optimized", "optimize", "unwrapped"]
