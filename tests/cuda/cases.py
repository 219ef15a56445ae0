"""One small case, with ragged tails, of each kernel and of each way in which its threads wait for each other."""

from collections.abc import Callable

import torch
from calls import cuda_examples, fullest, name_of, results
from levels import values
from torch import Tensor

from diffkern.ops.example import Example

Ops = torch._ops._OpNamespace
Case = Callable[[Ops], tuple[Tensor, ...]]  # what the raw ops make of it
BF16, NHWC = torch.bfloat16, torch.channels_last


def case_of(example: Example) -> Case:
    return lambda ops: tuple(results(getattr(ops, example.op), example.registered_arguments()))


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


EXAMPLES = [e for examples in cuda_examples(n=3, c=3, h=31, w=29).values() for e in examples if "bfloat16" in e.name]
CASES = {
    # images of two blocks and a tail
    **{name_of(example): case_of(example) for example in fullest(EXAMPLES) if not example.op.endswith("_")},
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
