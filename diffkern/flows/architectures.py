"""The flows of the papers: RealNVP for vectors, Glow for images."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..networks.blocks import Conv3x3
from ..networks.defaults import float32_on
from ..process import checked_int
from .flow import Flow, checked_shape
from .layers import ActNorm, Chain, Coupling, Half, Layer, Linear, Permutation, Squeezed

LARGEST = 2**12  # channels, width
MOST = 2**8  # layers of a kind, one after the other

PERMUTATIONS = ("linear", "reverse", "random")
Network = Callable[[int, int], nn.Module]  # (channels in, channels out) -> of a coupling


class RealNVP(Flow):
    """A flow of vectors by couplings with small MLPs (Dinh et al. 2017): untrained, it turns x and changes no density.

    shape        (D,), D >= 2
    couplings    how many; before each are an actnorm and a permutation
    width        of the MLPs' hidden layers
    depth        how many of these an MLP has
    waves        an MLP also sees cos and sin of 2^k times its inputs, k < waves: then it learns sharp steps sooner
    affine       couplings that scale and shift; False: that shift (NICE, Dinh et al. 2015)
    permutation  "linear": learned, from a random rotation; "reverse"; "random": fixed
    seed         of all that is random at first; None: nothing is, for weights to come

    Raises TypeError or ValueError for options of which none can be made.
    """

    def __init__(
        self,
        shape: Sequence[int] = (2,),
        *,
        couplings: int = 12,
        width: int = 64,
        depth: int = 2,
        waves: int = 0,
        affine: bool = True,
        permutation: str = "linear",
        seed: int | None = 0,
    ):
        shape = checked_shape(shape)
        if len(shape) != 1 or not 2 <= shape[0] <= LARGEST:
            raise ValueError(f"shape: expected (D,) with D in 2..{LARGEST}, got {shape}")
        _check(couplings=(couplings, 1, MOST), width=(width, 1, LARGEST), depth=(depth, 1, MOST), waves=(waves, 0, 16))
        _check_flag("affine", affine)
        if permutation not in PERMUTATIONS:
            raise ValueError(f"permutation: expected one of {', '.join(PERMUTATIONS)}, got {permutation!r}")
        with _seeded(seed):
            network = partial(MLP, width=width, depth=depth, waves=waves)
            layers = [
                layer
                for number in range(couplings)
                for layer in _step(shape[0], network, affine, permutation, seed, number)
            ]
            super().__init__(shape, [*layers, ActNorm(shape[0])])
        self.config = dict(shape=list(shape), couplings=couplings, width=width, depth=depth, waves=waves, affine=affine,
                           permutation=permutation, seed=seed)  # fmt: skip


class Glow(Flow):
    """A flow of images (Kingma & Dhariwal 2018): untrained, it turns the channels and changes no density.

    A level has squares of 2x2 pixels as channels, and ``steps`` of actnorm, invertible 1x1 convolution and coupling.
    Half of its channels go on to the next level; one more coupling first tells the other half's mean and scale from
    them.

    shape   (C, H, W), with H and W divisible by 2^levels
    levels  how many
    steps   of each
    width   channels of the couplings' networks: 3x3, 1x1 and 3x3 convolutions
    affine  couplings that scale and shift; False: that shift
    seed    of all that is random at first; None: nothing is, for weights to come

    Raises TypeError or ValueError for options of which none can be made.
    """

    def __init__(
        self,
        shape: Sequence[int],
        levels: int = 3,
        steps: int = 8,
        width: int = 64,
        *,
        affine: bool = True,
        seed: int | None = 0,
    ):
        shape = checked_shape(shape)
        _check(levels=(levels, 1, 16), steps=(steps, 1, MOST), width=(width, 1, LARGEST))
        _check_flag("affine", affine)
        if len(shape) != 3 or any(size % 2**levels for size in shape[1:]) or shape[0] * 2 ** (levels + 1) > LARGEST:
            expected = f"(C, H, W) with H and W divisible by {2**levels}, and at most {LARGEST} channels at the end"
            raise ValueError(f"shape: expected {expected}, got {shape}")
        with _seeded(seed):
            network = partial(_convolutions, width=width)

            def level(channels: int, left: int) -> Layer:
                c = 4 * channels
                layers = [
                    layer for number in range(steps) for layer in _step(c, network, affine, "linear", seed, number)
                ]
                if left > 1:
                    layers += [_coupling(c, network, True), Half(level(c // 2, left - 1))]
                return Squeezed(Chain(*layers, *([] if left > 1 else [ActNorm(c)])))

            super().__init__(shape, [level(shape[0], levels)])
        self.config = dict(shape=list(shape), levels=levels, steps=steps, width=width, affine=affine, seed=seed)


KINDS = {kind.__name__: kind for kind in (RealNVP, Glow)}
"""The flows that a file can describe."""


def _step(
    channels: int, network: Network, affine: bool, permutation: str, seed: int | None, number: int
) -> list[Layer]:
    """Actnorm, permutation and coupling."""
    if permutation == "linear":
        mixing = Linear(channels, None if seed is None else _rotation(channels))
    elif permutation == "reverse" or seed is None:
        mixing = Permutation.reverse(channels)
    else:
        mixing = Permutation.random(channels, seed + number)
    return [ActNorm(channels), mixing, _coupling(channels, network, affine)]


def _coupling(channels: int, network: Network, affine: bool) -> Coupling:
    return Coupling(channels, network(channels - channels // 2, channels // 2 * (2 if affine else 1)), affine)


def _rotation(channels: int) -> Tensor:
    """A random orthogonal matrix [C, C], float64."""
    return torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64, device="cpu")).Q


class MLP(nn.Sequential):
    """[N, inputs] -> [N, outputs]: zero at first, so that the coupling is the identity."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int, waves: int):
        sizes = [inputs * (1 + 2 * waves), *[width] * depth]
        hidden = [layer for pair in zip(sizes, sizes[1:], strict=False) for layer in (nn.Linear(*pair), nn.SiLU())]
        super().__init__(*hidden, _zero(nn.Linear(width, outputs)))
        self.waves = waves

    def forward(self, x: Tensor) -> Tensor:
        phases = [2.0**k * x for k in range(self.waves)]
        if phases:
            phase = torch.cat(phases, 1)
            x = torch.cat((x, phase.cos(), phase.sin()), 1)
        return super().forward(x)


def _convolutions(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """Zero at first, so that the coupling is the identity."""
    first, last = Conv3x3(inputs, width, 3, padding=1), _zero(Conv3x3(width, outputs, 3, padding=1))
    return nn.Sequential(first, nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), last)


def _zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from ``seed``, in float32 on the CPU, within the context; torch's generator is restored afterwards."""
    expected = "an int in [0, 2^63) or None"
    if seed is not None and not 0 <= checked_int("seed", seed, expected) < 2**63:
        raise ValueError(f"seed: expected {expected}, got {seed}")
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.default_generator.manual_seed(seed or 0)
        yield


def _check(**options: tuple[int, int, int]) -> None:
    """Check ``name=(value, low, high)``."""
    for name, (value, low, high) in options.items():
        expected = f"an int in {low}..{high}"
        if not low <= checked_int(name, value, expected) <= high:
            raise ValueError(f"{name}: expected {expected}, got {value}")


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
