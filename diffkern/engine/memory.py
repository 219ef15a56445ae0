"""Memory for the values of a graph: a value's bytes are another's after its last use.

Values are stood for by tensors on the meta device. Views of one share its storage there, as they will share its bytes.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest register


@dataclasses.dataclass
class _Life:
    bytes: int
    first: int  # the step that writes it
    last: int  # the last that reads it
    offset: int = 0


def storage_of(value: Tensor) -> int:
    """Return the identity of a value's storage, which its views share."""
    return value.untyped_storage()._cdata


class Memory:
    """The bytes of all values, by when they are written and read."""

    def __init__(self) -> None:
        self._lives: dict[int, _Life] = {}
        self._values: list[Tensor] = []  # which keep their storages apart

    def new(self, shape: Sequence[int], dtype: torch.dtype, step: int, *, last: bool = False) -> Tensor:
        """A value that ``step`` writes; ``last``: in channels_last order."""
        layout = torch.channels_last if last and len(shape) == 4 else torch.contiguous_format
        value = torch.empty(tuple(shape), dtype=dtype, device="meta", memory_format=layout)
        self._lives[storage_of(value)] = _Life(max(1, value.numel() * dtype.itemsize), step, step)
        self._values.append(value)
        return value

    def use(self, values: Iterable[Tensor], step: int) -> None:
        for value in values:
            life = self._lives[storage_of(value)]
            life.last = max(life.last, step)

    def place(self) -> None:
        """Give every value its offset, the largest first, at the lowest where it meets no other while both live."""
        placed: list[_Life] = []
        for life in sorted(self._lives.values(), key=lambda life: -life.bytes):
            offset = 0
            for other in placed:  # in the order of their offsets
                if other.first <= life.last and life.first <= other.last:
                    if offset + life.bytes <= other.offset:
                        break
                    offset = max(offset, -(-(other.offset + other.bytes) // ALIGNMENT) * ALIGNMENT)
            life.offset = offset
            placed.append(life)
            placed.sort(key=lambda life: life.offset)
        self.bytes = max((life.offset + life.bytes for life in placed), default=0)
        self._pool = torch.empty(self.bytes, dtype=torch.uint8, device="cpu")

    @property
    def alive(self) -> int:
        """The most bytes that live at once: what no plan could do without."""
        steps = {life.first for life in self._lives.values()}
        return max(
            (sum(life.bytes for life in self._lives.values() if life.first <= step <= life.last) for step in steps),
            default=0,
        )

    def tensor(self, value: Tensor) -> Tensor:
        """The value in its memory."""
        life = self._lives[storage_of(value)]
        base = self._pool[life.offset : life.offset + life.bytes].view(value.dtype)
        return base.as_strided(value.shape, value.stride(), base.storage_offset() + value.storage_offset())
