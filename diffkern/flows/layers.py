"""Invertible layers: x [N, C, ...] -> z of the same shape, with ln |det dz/dx| [N].

Every layer keeps the shape, so that any layers follow one another and z has the shape of x. ``Squeezed`` and ``Half``
hold other layers; one within the other they are the multi-scale architecture.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BOUND = 3.0
"""Largest |ln scale| of an affine coupling: e^3, so that no step makes an inverse that overflows."""


class Layer(nn.Module, ABC):
    """A bijection of samples."""

    @abstractmethod
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, and ln |det dz/dx| [N]."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """Return x."""

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        """Set the parameters that start from data by the batch ``x``, and return its z."""
        return self(x)[0]


class Chain(Layer):
    """Layers, one after the other."""

    def __init__(self, *layers: Layer):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(len(x))
        for layer in self.layers:
            x, added = layer(x)
            log_det = log_det + added
        return x, log_det

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z)
        return z

    def initialize(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.initialize(x)
        return x


class ActNorm(Layer):
    """z = (x - mean) / std by channel, both learned (Kingma & Dhariwal 2018, section 3.1).

    ``initialize`` takes them from a batch, whose z has mean 0 and variance 1 in each channel. Before that z is x. One
    that has been trained stays as it is.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels, dtype=torch.float32, device="cpu"))
        self.log_std = nn.Parameter(torch.zeros(channels, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x - _by_channel(self.mean, x)) * _by_channel((-self.log_std).exp(), x)
        return z, (-_positions(x) * self.log_std.sum()).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return z * _by_channel(self.log_std.exp(), z) + _by_channel(self.mean, z)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> Tensor:
        if not (self.mean.any() or self.log_std.any()):
            values = x.transpose(0, 1).flatten(1).double()
            std = values.std(1, correction=0)
            self.mean.copy_(values.mean(1))
            self.log_std.copy_(torch.where(std > 1e-6, std, 1.0).log())  # a constant channel keeps its scale
        return self(x)[0]


class Permutation(Layer):
    """z = x with its channels in another order: channel i of z is channel ``order[i]`` of x."""

    def __init__(self, order: Sequence[int]):
        super().__init__()
        order = list(order)
        if sorted(order) != list(range(len(order))):
            raise ValueError(f"order: expected a permutation of 0..{len(order) - 1}, got {order}")
        self.register_buffer("order", torch.tensor(order, dtype=torch.int64, device="cpu"))

    @classmethod
    def reverse(cls, channels: int) -> "Permutation":
        return cls(range(channels - 1, -1, -1))

    @classmethod
    def random(cls, channels: int, seed: int) -> "Permutation":
        generator = torch.Generator("cpu").manual_seed(seed)
        return cls(torch.randperm(channels, dtype=torch.int64, device="cpu", generator=generator).tolist())

    def is_bijection(self) -> bool:
        """Whether ``order`` is a permutation: a file may say anything."""
        return sorted(self.order.tolist()) == list(range(len(self.order)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return z[:, self.order.argsort()]


class Linear(Layer):
    """z = W x at each position, a learned permutation: the invertible 1x1 convolution (Kingma & Dhariwal 2018, section
    3.2).

    W = P L (U + diag(s)): P a fixed permutation, L unit lower and U strictly upper triangular, |s| = e^log_s. So
    ln |det W| is the sum of log_s, times the number of positions.

    matrix  [C, C], the W to start from; None: the identity. Raises ValueError for one that is singular
    """

    def __init__(self, channels: int, matrix: Tensor | None = None):
        super().__init__()
        self.lower, self.upper = (nn.Parameter(_zeros(channels, channels)) for _ in range(2))
        self.log_s = nn.Parameter(_zeros(channels))
        self.register_buffer("sign", torch.ones(channels, dtype=torch.float32, device="cpu"))
        self.register_buffer("order", torch.tensor(list(range(channels)), dtype=torch.int64, device="cpu"))
        if matrix is not None:
            self._set(matrix)

    @torch.no_grad()
    def _set(self, matrix: Tensor) -> None:
        if matrix.shape != self.lower.shape:
            raise ValueError(f"matrix: expected shape {tuple(self.lower.shape)}, got {tuple(matrix.shape)}")
        P, L, U = torch.linalg.lu(matrix.double())
        s = U.diagonal()
        if not (s.isfinite() & (s != 0)).all():
            raise ValueError("matrix: expected one that is invertible, got a singular one")
        self.lower.copy_(L.tril(-1))
        self.upper.copy_(U.triu(1))
        self.log_s.copy_(s.abs().log())
        self.sign.copy_(s.sign())
        self.order.copy_(P.argmax(1))

    def is_bijection(self) -> bool:
        """Whether ``order`` is a permutation, and no sign 0: a file may say anything."""
        return sorted(self.order.tolist()) == list(range(len(self.order))) and bool((self.sign.abs() == 1).all())

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(s), [C, C]."""
        ones = torch.ones_like(self.log_s)
        return self.lower.tril(-1) + ones.diag(), self.upper.triu(1) + (self.sign * self.log_s.exp()).diag()

    def weight(self) -> Tensor:
        """W [C, C]."""
        L, U = self.factors()
        return (L @ U)[self.order]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _mixed(x, self.weight()), (_positions(x) * self.log_s.sum()).expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """By W^-1 in float64, rounded once."""
        L, U = (factor.double() for factor in self.factors())
        rows = torch.ones_like(self.log_s, dtype=torch.float64).diag()[self.order.argsort()]
        solved = torch.linalg.solve_triangular(L, rows, upper=False, unitriangular=True)
        return _mixed(z, torch.linalg.solve_triangular(U, solved, upper=True).to(z.dtype))


class Coupling(Layer):
    """Change the second half of the channels by what a network tells of the first: b -> b e^s + shift.

    channels  C; the first ceil(C / 2) stay as they are
    network   [N, ceil(C / 2), ...] -> [N, floor(C / 2), ...] shifts; twice as many channels with ``affine``: raw, shift
    affine    s = BOUND tanh(raw / BOUND) (Dinh et al. 2017, eqs. 4, 5); else s = 0 (Dinh et al. 2015)
    """

    def __init__(self, channels: int, network: nn.Module, affine: bool = True):
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels: expected at least 2, got {channels}")
        self.sizes = [channels - channels // 2, channels // 2]
        self.network, self.affine = network, affine

    def _told(self, a: Tensor) -> tuple[Tensor | None, Tensor]:
        """s, None for 0, and the shift."""
        if not self.affine:
            return None, self.network(a)
        raw, shift = self.network(a).chunk(2, 1)
        return BOUND * (raw / BOUND).tanh(), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.split(self.sizes, 1)
        s, shift = self._told(a)
        if s is None:
            return torch.cat((a, b + shift), 1), x.new_zeros(len(x))
        return torch.cat((a, b * s.exp() + shift), 1), s.flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        a, b = z.split(self.sizes, 1)
        s, shift = self._told(a)
        b = b - shift
        return torch.cat((a, b if s is None else b * (-s).exp()), 1)


class Squeezed(Layer):
    """Let ``inner`` see [N, 4 C, H / 2, W / 2]: squares of 2x2 pixels as channels (Dinh et al. 2017, section 3.6)."""

    def __init__(self, inner: Layer):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = self.inner(F.pixel_unshuffle(x, 2))
        return F.pixel_shuffle(z, 2), log_det

    def inverse(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(self.inner.inverse(F.pixel_unshuffle(z, 2)), 2)

    def initialize(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.inner.initialize(F.pixel_unshuffle(x, 2)), 2)


class Half(Layer):
    """Let ``inner`` change the first ceil(C / 2) channels; the others are part of z as they are (Dinh et al. 2017,
    eqs. 13 to 16)."""

    def __init__(self, inner: Layer):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = _halves(x)
        a, log_det = self.inner(a)
        return torch.cat((a, b), 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        a, b = _halves(z)
        return torch.cat((self.inner.inverse(a), b), 1)

    def initialize(self, x: Tensor) -> Tensor:
        a, b = _halves(x)
        return torch.cat((self.inner.initialize(a), b), 1)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values [C], to broadcast over x [N, C, ...]."""
    return values.view(-1, *[1] * (x.ndim - 2))


def _positions(x: Tensor) -> int:
    """How many there are in x [N, C, ...]: the pixels of an image, one of a vector."""
    return math.prod(x.shape[2:])


def _mixed(x: Tensor, weight: Tensor) -> Tensor:
    """``weight`` times the channels of x."""
    return F.linear(x.movedim(1, -1), weight).movedim(-1, 1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], 1)
