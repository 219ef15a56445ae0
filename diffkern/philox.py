"""Philox4x32-10 in NumPy: the words that all noise and all random choices are made of."""

import numpy as np


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): uint32 counter [..., 4] and key [..., 2] -> uint32 words [..., 4]."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, np.uint64), -1, 0)
    k0, k1 = np.moveaxis(np.asarray(key, np.uint64), -1, 0)
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> shift) ^ c1 ^ k0, p1 & low, (p0 >> shift) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1).astype(np.uint32)


def words(index: np.ndarray, step: int, stream: int, seed: int) -> np.ndarray:
    """Four Philox words for each 64-bit index [N], as uint64 [N, 4]: counter (index, step, stream), key ``seed``."""
    index = np.asarray(index, np.uint64)
    counter = np.empty((len(index), 4), np.uint32)
    counter[:, 0], counter[:, 1] = index & np.uint64(0xFFFFFFFF), index >> np.uint64(32)
    counter[:, 2], counter[:, 3] = step, stream
    key = np.array((seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF), np.uint32)
    return philox4x32(counter, key).astype(np.uint64)
