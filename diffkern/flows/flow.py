"""A flow: invertible layers before a standard normal, whose density is known exactly."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..arguments import check_x_T, samples_of
from ..likelihood.draws import check_levels, dequantized, offset
from ..process import checked_count, checked_float, checked_int
from ..sampling import turn
from .layers import Chain, Layer

BATCH = 64  # samples: rounding depends on this, and not on how many are asked for
FORMAT = 1  # of a file's description
_DEFAULT = torch.empty(0, dtype=torch.float32, device="cpu")


class Flow(Chain):
    """z = f(x) with z ~ N(0, I), so that ln p(x) = ln N(f(x); 0, I) + ln |det df/dx| (Dinh et al. 2017, eq. 3).

    A flow is a layer: called with x it returns (z, log_det). Parameters are float32; ``double()`` makes them float64.
    The methods below cast x to their dtype. ``config`` is what :func:`save` writes: None of a flow of layers of one's
    own.

    shape   of a sample: (D,) of a vector, (C, H, W) of an image
    layers  in the order from x to z
    """

    config: dict[str, Any] | None = None

    def __init__(self, shape: Sequence[int], layers: Sequence[Layer] = ()):
        super().__init__(*layers)
        self.shape = checked_shape(shape)

    @property
    def _like(self) -> dict[str, Any]:
        """dtype and device of the parameters; float32 on the CPU where there are none."""
        like = next(self.parameters(), _DEFAULT)
        return dict(dtype=like.dtype, device=like.device)

    @property
    def device(self) -> torch.device:
        """The device of the parameters; the CPU where there are none."""
        return self._like["device"]

    def log_prob(self, x: Tensor) -> Tensor:
        """Return ln p(x) in nats, [N], of x [N, ...], with gradients. Raises TypeError or ValueError for another x."""
        z, log_det = self(self._checked("x", x))
        return log_normal(z) + log_det

    @torch.no_grad()
    def sample(
        self, n: int | None = None, *, seeds: Any = None, temperature: float = 1.0, batch_size: int = BATCH
    ) -> Tensor:
        """Draw n samples [n, ...]: z = temperature * noise, decoded.

        seeds        one for each sample; None: 0..n-1. z is the addressed noise (seed, step 0, stream 0), as x_T is. x
                     has the same bits in any company, with the same ``batch_size`` on the same machine
        temperature  deviation of z, >= 0: below 1 samples are more likely and less diverse (Kingma & Dhariwal 2018)
        batch_size   samples that are decoded at a time; the last batch is filled up

        Raises TypeError or ValueError for other arguments.
        """
        n, seeds, _ = samples_of(n, seeds, None, None, None)
        temperature = checked_float("temperature", temperature, "a number >= 0", lambda value: value >= 0)
        found = []
        for rows in _batches(n, batch_size):
            z = ops.noise(seeds[rows], self.shape, step=0, stream=0, device=self.device)
            found.append(self.inverse(temperature * z.to(self._like["dtype"])))
        return torch.cat(found)[:n]

    def encode(self, x: Tensor) -> Tensor:
        """Return z [N, ...] of x [N, ...], with gradients."""
        return self(self._checked("x", x))[0]

    def decode(self, z: Tensor) -> Tensor:
        """Return x [N, ...] of z [N, ...], with gradients."""
        return self.inverse(self._checked("z", z))

    def _checked(self, name: str, x: Tensor) -> Tensor:
        """x as the layers take it. Raises TypeError or ValueError for another x."""
        check_x_T(x, self.shape, name)
        return x.to(**self._like)

    @torch.no_grad()
    def interpolate(self, a: Tensor | int, b: Tensor | int, n: int = 9) -> Tensor:
        """Return n samples [n, ...] from ``a`` to ``b``, by turning from one's z to the other's (spherically).

        a, b  samples [...], or the seeds of two. Raises TypeError or ValueError for something else
        """
        checked_count("n", n, 2)
        ends = [self._latent(name, end) for name, end in (("a", a), ("b", b))]
        return self.decode(turn(*ends, torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")))

    def _latent(self, name: str, end: Tensor | int) -> Tensor:
        if isinstance(end, Tensor):
            return self(self._checked(name, end[None]))[0][0]
        checked_int(name, end, "a sample or a seed")
        return ops.noise([end], self.shape, step=0, stream=0, device=self.device)[0].to(self._like["dtype"])

    @torch.no_grad()
    def bits(self, x: Tensor, levels: int | None = 256, seeds: Any = None, batch_size: int = BATCH) -> Tensor:
        """Return -log2 p(x) / D, bits a dimension: float64 [N].

        levels  how many values a dimension of x can have, equally spaced in [-1, 1]. Uniform noise within the level is
                added (Theis et al. 2016, section 3.1), which ``diffkern.nll(..., "ode")`` adds too, for the same seeds.
                None: x is continuous, and the bits are those of its density
        seeds   one for each sample; None: 0..N-1

        Raises TypeError or ValueError for other arguments.
        """
        check_x_T(x, self.shape, "x")
        check_levels(x, levels)
        n, seeds, _ = samples_of(len(x), seeds, None, None, None)
        found = []
        for rows in _batches(n, batch_size):
            y = dequantized(x[rows.to(x.device)], seeds[rows].to(x.device), levels)
            found.append(self.log_prob(y).double().cpu())
        return bits_of(torch.cat(found)[:n], self.shape, levels)

    def description(self) -> dict[str, Any]:
        """All but the weights, as JSON holds it. Raises TypeError for a flow of layers of one's own."""
        if self.config is None:
            raise TypeError(f"flow: expected a RealNVP or a Glow to describe, got {type(self).__name__}")
        return {"flow": FORMAT, "kind": type(self).__name__, "config": self.config, "prefix": ""}


def log_normal(z: Tensor) -> Tensor:
    """ln N(z; 0, I), [N], of z [N, ...]."""
    return -(z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2


def bits_of(log_p: Tensor, shape: Sequence[int], levels: int | None) -> Tensor:
    """-log2 p(x) / D, bits a dimension, of ln p(x) in nats; of a level's share where ``levels`` is not None."""
    return offset(levels) - log_p / (math.prod(shape) * math.log(2))


def checked_shape(shape: Any) -> tuple[int, ...]:
    """``shape`` as ints >= 1. Raises TypeError or ValueError."""
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape: expected sizes, as (C, H, W), got {shape!r}")
    sizes = tuple(checked_count("shape", size) for size in shape)
    if not sizes:
        raise ValueError("shape: expected at least one size, got ()")
    return sizes


def _batches(n: int, batch_size: int) -> Iterator[Tensor]:
    """Rows of 0..n-1, ``batch_size`` at a time; the last one fills up the last batch."""
    checked_count("batch_size", batch_size)
    for first in range(0, n, batch_size):
        yield torch.arange(first, first + batch_size, dtype=torch.int64, device="cpu").clamp_(max=n - 1)
