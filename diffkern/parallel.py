"""Several processes that train as one, as ``torchrun`` starts them. Alone, a process is the first of one."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch import distributed as dist


@contextmanager
def joined(device: torch.device | str | None) -> Iterator[torch.device | str | None]:
    """Within, the processes of ``torchrun`` are joined. Gives this one's device: for "cuda", a card of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield device
        return
    on_cuda = device is not None and torch.device(device).type == "cuda"
    if on_cuda and torch.device(device).index is None:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield device
    finally:
        gc.collect()  # what averages gradients holds itself and the group, whose threads must end before the process
        dist.destroy_process_group()


def rank() -> int:
    """Of this process, 0 for the first, which writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def averaging(network: nn.Module) -> nn.Module:
    """The network, its gradients averaged over the processes while they are computed."""
    return nn.parallel.DistributedDataParallel(network) if world() > 1 else network


def mean(value: Tensor) -> Tensor:
    """Over the processes, the same in each."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


def largest(value: int, device: torch.device) -> int:
    """Of the processes' values, the same in each."""
    if world() == 1:
        return value
    values = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)
