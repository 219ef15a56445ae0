"""A hash of weights, which tells whether one of them was written to.

There is the registered op alone, ``fingerprint(hash, weights, exact)``. It writes to ``hash``, int64 [1], and reads
every number of the float32 tensors ``weights`` if exact, else 16 of each (:mod:`diffkern.watch`).
"""

from collections.abc import Iterator

import torch

from .example import Example, normal, steps
from .registration import same_device


@torch.library.register_fake("diffkern::fingerprint")
def _(hash, weights, exact):
    for weight in weights:
        same_device(hash, weights=weight)


# --- examples ----------------------------------------------------------------------------------------------------


def examples(n: int = 2, c: int = 3, k: int = 5, h: int = 4, w: int = 4) -> Iterator[Example]:
    """See :mod:`diffkern.ops.example`."""
    for name, exact in (("every number", True), ("16 of each", False)):
        weights = [normal(n, c, h, w, seed=1), normal(k, c, 3, 3, seed=2, last=True)]
        yield Example("fingerprint", name, dict(hash=steps(1), weights=weights, exact=exact))
