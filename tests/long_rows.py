"""Tables of long rows, and the arguments that go with them."""

import torch
from levels import SEEDS, values
from torch import Tensor

from diffkern import ops

COLUMN = {name: i for i, name in enumerate(ops.LONG_COLUMNS)}
OPERANDS = ("out_uncond", "grad", "blend", "learned_variance", "history")


def long_rows(history: int = 0) -> tuple[Tensor, Tensor]:
    """A table of four rows that no sampler has, and its addresses.

    Row 1 draws no noise and does not blend, row 2 sums three noises, row 3 leaves out all that may be left out.
    """
    table = values((4, ops.long_columns(history)), seed=1)
    table[:, 20 + history :] = 0
    for name, column in dict(
        limit=[torch.inf, 1.0, 0.5, 2.0],
        sigma=[0.3, 0.0, 1.0, 0.7],
        log_var_min=[-9.0, -8.0, -7.0, -6.0],
        log_var_max=[-1.0, -2.0, -3.0, -4.0],
    ).items():
        table[:, COLUMN[name]] = torch.tensor(column)
    table[1, [COLUMN["b_0"], COLUMN["b_z"]]] = 0
    table[2, COLUMN["b_z"]] = 0
    table[3, [COLUMN[name] for name in ("p_g", "k_u", "k_g", "q_x", "q_o", "b_0", "b_z")]] = 0
    table[3, 20:] = 0
    return table, torch.tensor([[999, 1], [0, 0], [2**32 - 1, 3], [0, 1]])


def long_case(
    shape: tuple[int, ...] = (7, 3, 9, 13), dtype: torch.dtype = torch.float32, *, history: int = 0, with_: tuple = ()
) -> tuple[tuple, dict]:
    """Arguments of a reverse step by long rows with some of OPERANDS in it, all of order 1."""
    n, learned_variance = shape[0], "learned_variance" in with_
    out_shape = (n, 2 * shape[1], *shape[2:]) if learned_variance else shape
    table, address = long_rows(history)
    arguments = (
        values(shape, dtype, seed=1),
        values(out_shape, dtype, seed=2),
        table,
        torch.tensor([0, 1, 2, 3, 2, 0, 1])[:n] if n <= 7 else torch.arange(n) % 4,
        SEEDS.repeat(n // 7 + 1)[:n],
    )
    options = dict(address=address, learned_variance=learned_variance)
    options["history"] = [values(shape, dtype, seed=4 + j) for j in range(history)]
    if "out_uncond" in with_:
        options["out_uncond"] = values(out_shape, dtype, seed=3)
    if "grad" in with_:
        options["grad"] = values(shape, dtype, seed=11)
    if "blend" in with_:
        options["known"] = values(shape, dtype, seed=12)
        options["mask"] = torch.rand((1, 1, *shape[2:])[: len(shape)], generator=torch.Generator().manual_seed(13)).to(
            dtype
        )
    return arguments, options


def lengthened(table: Tensor, clip: bool, guidance: float) -> tuple[Tensor, Tensor]:
    """The long rows, and their addresses, that do what short ones do with these options."""
    history = table.shape[1] - len(ops.COLUMNS)
    short = {name: table[:, i] for i, name in enumerate(ops.COLUMNS)}
    long = torch.zeros(len(table), ops.long_columns(history))
    for name in COLUMN.keys() & short.keys():
        long[:, COLUMN[name]] = short[name]
    long[:, COLUMN["limit"]] = 1.0 if clip else torch.inf
    long[:, COLUMN["w"]] = guidance
    long[:, COLUMN["q_0"]] = 1.0
    long[:, 20 : 20 + history] = table[:, len(ops.COLUMNS) :]
    return long, torch.stack((short["t"].long(), torch.ones(len(table), dtype=torch.int64)), 1)


def raw_long_case(shape: tuple[int, ...], dtype: torch.dtype, history: int = 6, with_: tuple = OPERANDS) -> tuple:
    """The same as positional arguments of the raw op, which returns what is kept too."""
    arguments, options = long_case(shape, dtype, history=history, with_=with_)
    fields = (options.get("out_uncond"), 1.0, False, options["learned_variance"], options["history"], True)
    return (*arguments, *fields, *(options.get(name) for name in ("address", "grad", "known", "mask")))
