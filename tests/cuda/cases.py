"""One small case, with ragged tails, of each kernel and of each way in which its threads wait for each other."""

from collections.abc import Callable

import torch
from levels import rows, values
from long_rows import raw_long_case
from torch import Tensor

Ops = torch._ops._OpNamespace
Case = Callable[[Ops], tuple[Tensor, ...]]  # what the raw ops make of it
BF16, NHWC = torch.bfloat16, torch.channels_last


def elementwise(name: str) -> Case:
    def run(ops: Ops) -> tuple[Tensor, ...]:
        x, out = (values((3, 3, 31, 29), BF16, seed=seed) for seed in (0, 1))  # two blocks and a tail
        seeds, t, weights = torch.tensor([0, -1, 7]), torch.tensor([0, 1, 2]), torch.tensor([1.0, 2.0, 3.0])
        calls = {
            "noise": lambda: (ops.noise(seeds, [3, 31, 29], t, 1, BF16),),
            "q_sample": lambda: ops.q_sample(x, t, seeds, values((3, 2), seed=2), True),
            "reverse_step": lambda: ops.reverse_step(x, out, rows(), t, seeds, out, 2.0, True, False, [], True),
            "reverse_step by long rows": lambda: ops.reverse_step(*raw_long_case((3, 3, 31, 29), BF16)),
            "moments": lambda: (ops.moments(x, out),),
            "abs_quantile": lambda: (ops.abs_quantile(x, out, rows(), t, 0.7, out, 2.0),),
            "noise_loss": lambda: (ops.noise_loss(out, seeds, t, weights),),
            "noise_loss_backward": lambda: (ops.noise_loss_backward(weights, out, seeds, t, weights),),
        }
        return calls[name]()

    return run


def group_norm_silu(shape: tuple[int, ...], groups: int, layout: torch.memory_format) -> Case:
    def run(ops: Ops) -> tuple[Tensor, ...]:
        x, grad_y = (values(shape, seed=seed).to(memory_format=layout) for seed in (0, 1))
        weight, bias, add = (values(size, seed=2) for size in (shape[1:2], shape[1:2], shape[:2]))
        y, mean, rstd = ops.group_norm_silu(x, weight, bias, groups, 1e-5, None, add, x, True)
        gradients = ops.group_norm_silu_backward(grad_y, x, mean, rstd, weight, bias, groups, None, add, True)
        return y, mean, rstd, *gradients

    return run


def attention(tokens: int, d: int, dtype: torch.dtype) -> Case:
    def run(ops: Ops) -> tuple[Tensor, ...]:
        q, k, v, grad_out = (values((1, 1, tokens, d), dtype, seed=seed) for seed in range(4))
        out, lse = ops.attention(q, k, v, None)
        return out, lse, *ops.attention_backward(grad_out, q, k, v, out, lse, None)

    return run


CASES = {
    **{name: elementwise(name) for name in ("noise", "q_sample", "noise_loss", "noise_loss_backward")},
    **{name: elementwise(name) for name in ("reverse_step", "reverse_step by long rows", "moments", "abs_quantile")},
    "group norm, one chunk": group_norm_silu((2, 6, 5, 3), 3, torch.contiguous_format),
    "group norm, one chunk, channels_last": group_norm_silu((2, 32, 4, 4), 8, NHWC),
    "group norm, several chunks": group_norm_silu((1, 16, 50, 46), 2, torch.contiguous_format),
    "group norm, several chunks, channels_last": group_norm_silu((1, 16, 50, 46), 2, NHWC),
    "attention, a ring that holds its chunks": attention(133, 40, BF16),
    "attention, a warp a row": attention(69, 104, BF16),
    "attention, several warps a row": attention(69, 264, BF16),
    "attention in float32, a warp a row": attention(69, 40, torch.float32),
    "attention in float32, several warps a row": attention(69, 132, torch.float32),
    "attention without tensor cores": attention(69, 42, torch.float32),
}
