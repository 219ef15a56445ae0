"""The network's forward pass by the engine, beside the other engines on the same weights (``engines.py``)."""

from collections.abc import Callable

import peers
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffkern import optimize
from diffkern.unet import UNet

NETWORKS = {
    "small": dict(in_channels=1, channels=32, channel_mult=(1, 2, 4), attention_levels=(2,), groups=8, norm_eps=1e-5),
    "ddpm-cifar10": dict(),
}


def with_random_weights(unet: UNet) -> UNet:
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return unet.eval().requires_grad_(False)


def case(name: str, n: int) -> tuple[UNet, nn.Module, Tensor, Tensor, Tensor, int]:
    """The network, diffusers' twin of it, x, t, what the twin makes of them, and the operations that this takes."""
    unet = with_random_weights(UNet(**NETWORKS[name]))
    twin = peers.diffusers_unet(unet)
    x = torch.randn(n, unet.config["in_channels"], 32, 32, generator=torch.Generator().manual_seed(1))
    t = torch.full((n,), 500)
    with FlopCounterMode(display=False) as counter:
        expected = twin(x, t).sample
    return unet, twin, x, t, expected, counter.get_total_flops()


CASES = [
    ("small", 1),
    ("small", 16),
    ("ddpm-cifar10", 1),
    pytest.param("ddpm-cifar10", 16, marks=pytest.mark.large),
]


@pytest.mark.parametrize(("name", "n"), CASES)
def test_unet(compare, other_engines, name, n):
    unet, twin, x, t, expected, flops = case(name, n)
    scale = expected.abs().max()
    engine = optimize(unet)

    def close(ours: list[Tensor], others: list[Tensor]) -> None:
        assert (others[0] - ours[0]).abs().max() < 1e-4 * scale

    others = other_engines(twin, x, t)
    low = {name: others.pop(name) for name in list(others) if "bf16" in name}  # not held to float32's error
    compare(
        f"unet {name}, {n} x 32x32",
        torch.inference_mode()(lambda: engine(x, t)),
        others,
        unchecked=low,
        same=close,
        flops=flops,
    )


@pytest.mark.parametrize(("name", "n"), CASES)
def test_unet_at_high_precision(compare, other_engines, name, n):
    """By factors of 16 bits, beside our own 24 and those who have 8."""
    unet, twin, x, t, expected, flops = case(name, n)
    engine = optimize(unet)

    def at(precision: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            torch.set_float32_matmul_precision(precision)
            return engine(x, t)

        return torch.inference_mode()(call)

    def close(ours: list[Tensor], others: list[Tensor]) -> None:
        for result, bound in ((ours[0], 5e-5), (others[0], 0.1)):
            assert (result - expected).norm() < bound * expected.norm()

    others = {name: call for name, call in other_engines(twin, x, t).items() if name == "torch" or "bf16" in name}
    try:
        compare(
            f"unet {name}, high precision, {n} x 32x32",
            at("high"),
            {"highest": at("highest"), **others},
            same=close,
            flops=flops,
        )
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("name", "n"), CASES)
def test_unet_in_bfloat16(compare, other_engines, name, n):
    """Beside those who compute in bfloat16 too, and our own float32."""
    unet, twin, x, t, expected, flops = case(name, n)
    engine, exact = optimize(unet, dtype=torch.bfloat16), optimize(unet)

    def close(ours: list[Tensor], others: list[Tensor]) -> None:
        for result, bound in ((ours[0], 0.02), (others[0], 0.1)):
            assert (result - expected).norm() < bound * expected.norm()

    low = {name: call for name, call in other_engines(twin, x, t).items() if "bf16" in name}
    compare(
        f"unet {name}, bfloat16, {n} x 32x32",
        torch.inference_mode()(lambda: engine(x, t)),
        {"float32": torch.inference_mode()(lambda: exact(x, t)), **low},
        same=close,
        flops=flops,
        dtype=torch.bfloat16,
    )
