"""The examples of the ops, called: publicly, as registered ops, on any device."""

import dataclasses
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.ops.example import Example, all_examples

CPU = torch.device("cpu")


def name_of(example: Example) -> str:
    return f"{example.op}, {example.name}"


def public_examples() -> list[Example]:
    """Return the examples that are calls of a public function."""
    return [example for example in all_examples() if isinstance(getattr(ops, example.op, None), FunctionType)]


def cuda_examples(**sizes: int) -> dict[str, list[Example]]:
    """Return the examples of each registered op that has a CUDA kernel."""
    found: dict[str, list[Example]] = {}
    for example in all_examples(**sizes):
        op = example.registered()
        if op and not example.cpu_only and torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CUDA"):
            found.setdefault(example.op, []).append(example)
    return found


def fullest(examples: Iterable[Example]) -> list[Example]:
    """Return the examples of each op, but for those with fewer arguments than another, and of equals the last."""
    found = {(example.op, frozenset(example.arguments)): example for example in examples}
    return [e for (op, names), e in found.items() if not any(op == other and names < more for other, more in found)]


def moved(value: Any, device: torch.device = CPU) -> Any:
    """Return the same in memory of its own on the device, with the same strides."""
    if isinstance(value, ops.PackedConv):
        return dataclasses.replace(value, tensor=moved(value.tensor, device))
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        copies = {key: moved(one, device) for key, one in items}
        return copies if isinstance(value, dict) else [*copies.values()]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def results(op: Callable, arguments: dict[str, Any], device: torch.device = CPU) -> list[Tensor]:
    """Return the tensors that the function or op returns; of one that returns nothing, all those that it was given."""
    given = moved(arguments, device)
    returned = op(**given)
    found = returned if isinstance(returned, tuple) else [getattr(returned, "tensor", returned)]
    return [tensor for tensor in (given.values() if returned is None else found) if isinstance(tensor, Tensor)]
