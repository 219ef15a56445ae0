"""Group norm, SiLU and what a U-Net adds to them, beside torch's separate ops: forward, and forward with backward."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern import ops

SHAPES = [(16, 128, 32, 32), (1, 128, 32, 32), (16, 256, 8, 8), (4, 64, 128, 128)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
GROUPS = 32


def inputs(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    return x, *torch.randn(2, shape[1], generator=generator)


def title(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> str:
    layout = "NHWC" if memory_format == torch.channels_last else "NCHW"
    return f"{list(shape)} {str(dtype).removeprefix('torch.')} {layout}"


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_silu(compare, shape, dtype, memory_format):
    x, weight, bias = inputs(shape, dtype, memory_format)
    own_weight, own_bias = weight.to(dtype), bias.to(dtype)
    with torch.inference_mode():
        compare(
            f"group_norm_silu {title(shape, dtype, memory_format)}",
            lambda: ops.group_norm_silu(x, weight, bias, GROUPS),
            {"torch": lambda: F.silu(F.group_norm(x, GROUPS, own_weight, own_bias))},
            tolerance=TOLERANCE[dtype],
            elements=x.numel(),
            bytes=2 * x.nbytes,
        )


@pytest.mark.parametrize("shape", SHAPES[:1])
def test_with_time_and_residual(compare, shape):
    """The second half of a residual block: the time embedding before the norm, scale and shift after it."""
    x, weight, bias = inputs(shape, torch.float32, torch.channels_last)
    residual = x.flip(0)
    add, scale, shift = torch.randn(3, *shape[:2], generator=torch.Generator().manual_seed(1))
    scale_shift = torch.cat((scale, shift), dim=1)

    def separate() -> Tensor:
        y = F.group_norm(x + add[:, :, None, None], GROUPS, weight, bias)
        return F.silu(y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]) + residual

    with torch.inference_mode():
        compare(
            f"group_norm_silu, every option, {title(shape, torch.float32, torch.channels_last)}",
            lambda: ops.group_norm_silu(x, weight, bias, GROUPS, scale_shift=scale_shift, add=add, residual=residual),
            {"torch": separate},
            tolerance=TOLERANCE[torch.float32],
            elements=x.numel(),
            bytes=3 * x.nbytes,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(compare, dtype):
    shape = SHAPES[0]
    x, weight, bias = inputs(shape, dtype, torch.channels_last)
    grad_y = x.flip(0)
    own = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    peers = [x, *(tensor.detach().to(dtype).requires_grad_() for tensor in (weight, bias))]

    def ours() -> Tensor:
        return torch.autograd.grad(ops.group_norm_silu(*own, GROUPS), own, grad_y)[0]

    def torchs() -> Tensor:
        return torch.autograd.grad(F.silu(F.group_norm(x, GROUPS, *peers[1:])), peers, grad_y)[0]

    compare(
        f"group_norm_silu and its gradient {title(shape, dtype, torch.channels_last)}",
        ours,
        {"torch": torchs},
        tolerance=5 * TOLERANCE[dtype],
        elements=x.numel(),
        bytes=5 * x.nbytes,
    )
