"""An op's arguments: what came is checked, and made into what a kernel or a composite takes.

Errors name the argument, what was expected and what came.
"""

import operator
import reprlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .transforms import readable


def check_type(name: str, expected: str, kind: type | tuple[type, ...], value: object) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {reprlib.repr(value)}")


def check_types(expected: str, kind: type | tuple[type, ...], **options: object) -> None:
    for name, value in options.items():
        check_type(name, expected, kind, value)


def device_of(like: Tensor) -> torch.device | str:
    """A tensor's device. What is no tensor is refused later, with the other arguments."""
    return like.device if isinstance(like, Tensor) else "cpu"


def as_index(name: str, index: int | Tensor, device: torch.device | str) -> Tensor:
    if isinstance(index, Tensor):
        return index
    try:
        if isinstance(index, bool):
            raise TypeError
        index = operator.index(index)
    except TypeError:
        raise TypeError(f"{name}: expected an int or an int64 tensor, got {index!r}") from None
    if not -(2**63) <= index < 2**63:
        raise ValueError(f"{name}: expected an int of 64 bits, got {index}")
    return torch.tensor(index, dtype=torch.int64, device=device)


def as_device(device: torch.device | str | int) -> torch.device:
    try:
        return torch.empty(0, dtype=torch.uint8, device=device).device  # with its index
    except (AssertionError, RuntimeError, TypeError):
        raise RuntimeError(f"device: expected one that is here, got {device!r}") from None


def dense(
    name: str,
    tensor: Tensor | None,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor | None:
    """The tensor itself if it is of that dtype and layout, or else a copy that is."""
    if tensor is None or (dtype in (None, tensor.dtype) and tensor.is_contiguous(memory_format=memory_format)):
        return tensor
    if not torch.compiler.is_compiling():
        check_memory(name, tensor)
    return tensor.to(dtype or tensor.dtype).contiguous(memory_format=memory_format)


def check_memory(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose storage was freed, which torch would read. The kernels look for themselves."""
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:  # it stands for another tensor
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.itemsize
    if tensor.numel() and held < needed:
        raise RuntimeError(f"{name}: expected a storage of at least {needed} bytes, got {held}")


# --- for composites ----------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def check_shape(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise RuntimeError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def look_up(name: str, index: int | Tensor, table: Tensor, x: Tensor) -> Sequence[Tensor]:
    """The columns of each sample's row of the table, to be multiplied by x. Out of range as the kernels: see ops."""
    if isinstance(index, Tensor) and index.dtype != torch.int64:
        raise RuntimeError(f"{name}: expected int64, got {str(index.dtype).removeprefix('torch.')}")
    index, n = torch.as_tensor(index, dtype=torch.int64, device=table.device), x.shape[0]
    check_shape(name, index, (), (1,), (n,))
    index = index.reshape(-1)
    inside = (index >= 0) & (index < table.shape[0])
    if readable(inside) and not inside.all():
        raise RuntimeError(f"{name}: expected values in [0, {table.shape[0]}), got {index[~inside][0].item()}")
    rows = torch.where(inside[:, None], table[index.clamp(0, table.shape[0] - 1)], torch.nan).expand(n, -1)
    return rows.reshape(n, table.shape[1], *[1] * (x.ndim - 1)).unbind(1)
