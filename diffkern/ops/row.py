"""A row of the table that says what a sampler does in one step: its columns, in one form whichever its length.

The kernels read a row by csrc/math/row.h.
"""

import math
from types import SimpleNamespace

import torch
from torch import Tensor

from .arguments import look_up
from .transforms import readable

COLUMNS = ("p_x", "p_o", "k_x", "k_o", "k_0", "sigma", "log_var_min", "log_var_max", "t")
"""The columns of a short row of the coefficient table; one for each of the history's tensors follows."""

LONG_COLUMNS = (
    *("p_x", "p_o", "p_g", "limit"),
    *("k_x", "k_o", "k_u", "k_0"),
    *("k_g", "sigma", "log_var_min", "log_var_max"),
    *("w", "q_x", "q_o", "q_0"),
    *("b_0", "b_z", "unused_0", "unused_1"),
)
"""The columns of a long row; one for each of the history's tensors follows, and zeros up to a multiple of 4."""

MAX_HISTORY = 6


def long_columns(history: int) -> int:
    """The number of columns of long rows with that many slots of history: 20, 24 or 28."""
    return len(LONG_COLUMNS) + -(-history // 4) * 4


def has_long_rows(table: Tensor) -> bool:
    return table.ndim == 2 and table.shape[1] >= len(LONG_COLUMNS)


def of_x0(table: Tensor) -> Tensor:
    """Long rows like these whose x_next is x0_hat, and which draw no noise."""
    rows = torch.zeros_like(table)
    seen = [LONG_COLUMNS.index(name) for name in ("p_x", "p_o", "p_g", "limit", "w")]
    rows[:, seen] = table[:, seen]
    rows[:, LONG_COLUMNS.index("k_0")] = 1
    return rows


def read_rows(step: int | Tensor, table: Tensor, x: Tensor, clip: bool, guidance: float) -> SimpleNamespace:
    """Each sample's row in one form, short or long: LONG_COLUMNS by name, k_j, and t of a short one."""
    columns = look_up("step", step, table, x)
    if has_long_rows(table):
        names, absent = LONG_COLUMNS, {}
    else:
        names, absent = COLUMNS, dict(p_g=0, k_u=0, k_g=0, q_x=0, q_o=0, q_0=1, b_0=0, b_z=0)
        absent = {name: table.new_full((), value) for name, value in absent.items()}
        absent |= dict(limit=1.0 if clip else math.inf, w=guidance)
    return SimpleNamespace(**absent, **dict(zip(names, columns, strict=False)), k_j=columns[len(names) :])


def addresses(row: SimpleNamespace, step: int | Tensor, address: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor]:
    """(address, count) of each sample's noise, int64 [N]. A count of 0 says that no address is valid."""
    if hasattr(row, "t"):
        t = row.t.detach().flatten().long()
        return t, torch.ones_like(t)
    draws = ((row.sigma != 0) | (row.b_z != 0)).detach().flatten()
    index = torch.as_tensor(step, dtype=torch.int64, device=draws.device).reshape(-1)
    if address is None:
        first = count = torch.zeros_like(draws, dtype=torch.int64)
    else:
        first, count = address[index.clamp(0, address.shape[0] - 1)].expand(x.shape[0], 2).unbind(1)
    valid = (count >= 1) & (count <= first + 1) & (first < 2**32)
    wrong = draws & ~valid
    if readable(wrong) and wrong.any():
        n = int(wrong.nonzero()[0])
        number = int(index.expand(x.shape[0])[n])
        if address is None:
            raise RuntimeError(f"address: expected a tensor, for row {number} draws noise, got None")
        raise RuntimeError(
            f"address: expected 1 <= count <= address + 1 and address < 2^32, got count {int(count[n])} and address "
            f"{int(first[n])} in row {number}"
        )
    return torch.where(draws & valid, first, 0), torch.where(draws & valid, count, 0)
