"""Several processes that train as one, as ``torchrun`` starts them. Alone, a process is the first of one."""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


@contextmanager
def joined(device: torch.device | str | None) -> Iterator[torch.device | str | None]:
    """Within, the processes of ``torchrun`` are joined. Gives this one's device: for "cuda", a card of its own."""
    if _environment("WORLD_SIZE", "the number of processes", low=1, default=1) == 1:
        yield device
        return
    device = own_card(device)
    on_cuda = device is not None and torch.device(device).type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        yield device
    finally:
        gc.collect()  # what averages gradients holds itself and the group, whose threads must end before the process
        dist.destroy_process_group()


def own_card(device: torch.device | str | None) -> torch.device | str | None:
    """For "cuda" under ``torchrun`` the card of this process; else ``device``."""
    several = _environment("WORLD_SIZE", "the number of processes", low=1, default=1) > 1
    if not several or device is None or torch.device(device).type != "cuda" or torch.device(device).index is not None:
        return device
    return f"cuda:{_environment('LOCAL_RANK', 'the number of this process on its machine', low=0)}"


def _environment(name: str, meaning: str, low: int, default: int | None = None) -> int:
    """A number that ``torchrun`` has put into the environment."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal() or int(text) < low:
        raise ValueError(f"{name}: expected {meaning} from torchrun, an int >= {low}, got {text!r}")
    return int(text)


def rank() -> int:
    """Return the rank of this process: 0 for the first, which writes the files."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def averaging(network: nn.Module) -> nn.Module:
    """The network, its gradients averaged over the processes while they are computed."""
    return nn.parallel.DistributedDataParallel(network) if world() > 1 else network


def apart(network: nn.Module) -> AbstractContextManager[Any]:
    """Within, what :func:`averaging` gave leaves gradients as they are: more are to be added to them."""
    return network.no_sync() if isinstance(network, nn.parallel.DistributedDataParallel) else nullcontext()


def mean(value: Tensor) -> Tensor:
    """Over the processes, the same in each."""
    if world() > 1:
        dist.all_reduce(value)
        value /= world()
    return value


def joined_rows(value: Tensor) -> Tensor:
    """The rows of all processes by rank, the same in each; all have as many."""
    if world() == 1:
        return value
    values = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(values, value)
    return torch.cat(values)


def largest(value: int, device: torch.device) -> int:
    """Return the largest of the processes' values, the same in each."""
    if world() == 1:
        return value
    values = torch.tensor(value, dtype=torch.int64, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


@contextmanager
def together() -> Iterator[None]:
    """If the block raises in some of the processes, end all of them: the first that failed raises its error, and the
    others SystemExit. Every process must come here; the block itself holds nothing that they wait for each other in."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    failed = _gathered(error is not None)
    if not any(failed):
        return
    if error is not None and failed.index(True) == rank():
        raise error
    raise SystemExit(2)


def check_same(name: str, value: str | None) -> None:
    """Raise ValueError in the first process and SystemExit in the others unless all have the same ``value``."""
    values = _gathered(value)
    odd = [(rank, other) for rank, other in enumerate(values) if other != values[0]]
    with together():
        if odd:
            raise ValueError(
                f"{name}: expected the same in every process, got {values[0]} in process 0, {odd[0][1]} in {odd[0][0]}"
            )


def _gathered(value: Any) -> list:
    """Return the values of all processes, by rank."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values
