"""The same ops on every CPU level: each level has a process of its own, which answers with a digest of every result.

Run as a program it is such a process: `DIFFKERN_CPU_LEVEL=avx2 python levels.py`.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from diffkern import _C
from diffkern.ops import LOSS_COLUMNS

TABLE = Path(__file__).parents[1] / "csrc" / "cpu" / "levels.def"
ALL_LEVELS = ("baseline", *re.findall(r"^DIFFKERN_LEVEL\((\w+),", TABLE.read_text(), re.MULTILINE))
LEVELS = tuple(reversed(_C.cpu_levels()))
"""The levels that this processor has: tests run at each of them, and say at their end which ones they could not run."""
WIDTHS = ALL_LEVELS[:3]
"""The levels that differ in their registers' width. Later ones have kernels of their own for split products only."""

SEEDS = torch.tensor([0, 1, -1, 31337, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# registers and chunks half full, exactly full and overfull; then more than one thread's work
SIZES = (*range(1, 34), 63, 64, 65, 127, 192, 199, 1023, 1024, 1025, 3 * 1024 + 7, 70_001)


def digest(tensor: Tensor) -> str:
    """Return a hash of the bits; every NaN counts as the same."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor).contiguous()
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, scale: float = 1.5, seed: int = 0) -> Tensor:
    """Numbers of order ``scale`` that no op of ours made."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def rows(history: int = 0, sigma: float = 0.3) -> Tensor:
    """A table [3, 9 + history] of coefficients that no sampler has: its middle row is without noise."""
    table = values((3, 9 + history), seed=1)
    table[:, 5] = torch.tensor([sigma, 0.0, 1.0])
    table[:, 6:8] = torch.tensor([-9.0, -1.0])
    table[:, 8] = torch.tensor([999.0, 500.0, 3.0])
    return table


def loss_rows(**columns: float) -> Tensor:
    """A table [4, 12] of a loss that no schedule has, but for ``columns``: KL, a bin, a density, and KL again."""
    table = values((4, 12), scale=1.0, seed=1)
    table[:, 8:11] = torch.tensor([[-3.0, -4.0, -1.0], [-2.0, -2.5, -2.0], [-4.0, -4.0, 0.0], [-1.0, -3.0, -1.5]])
    table[:, 11] = torch.tensor([0.0, 1.0, 2.0, 0.0])
    for name, value in columns.items():
        table[:, LOSS_COLUMNS.index(name)] = value
    return table


def results(ops: ModuleType) -> Iterator[tuple[str, Tensor]]:
    """Results that must have the same bits on every level, and in ``diffkern.reference``."""
    for size in SIZES:
        yield f"noise {size}", ops.noise(SEEDS[:3], (size,), step=size, stream=1)
    table = values((10, 2), seed=2)
    x = {dtype: values((7, 3, 5, 23), dtype, seed=3) for dtype in DTYPES}
    for dtype in DTYPES:
        yield f"noise {dtype}", ops.noise(SEEDS, (3, 501), step=2**32 - 1, stream=2**32 - 1, dtype=dtype)
        for t in (torch.tensor(9), torch.arange(7)):
            for name, result in zip(
                ("x_t", "eps"), ops.q_sample(x[dtype], t, SEEDS, table, return_eps=True), strict=True
            ):
                yield f"q_sample {dtype} {t.shape} {name}", result
        out, uncond = (values((7, 6, 5, 23), dtype, seed=seed) for seed in (4, 5))
        for learned_variance in (False, True):
            channels = 6 if learned_variance else 3
            for options in (dict(), dict(clip=True), dict(out_uncond=uncond[:, :channels], guidance=3.7)):
                for history in (0, 4):
                    result = ops.reverse_step(
                        x[dtype],
                        out[:, :channels],
                        rows(history),
                        torch.tensor([0, 1, 2, 0, 1, 2, 0]),
                        SEEDS,
                        history=[values((7, 3, 5, 23), dtype, seed=6 + j) for j in range(history)],
                        learned_variance=learned_variance,
                        return_x0=True,
                        **options,
                    )
                    case = f"reverse_step {dtype} {learned_variance} {sorted(options)} {history}"
                    yield from zip((f"{case} x_next", f"{case} x0_hat"), result, strict=True)


def answers() -> dict[str, object]:
    """The answers of the level that this process runs."""
    from diffkern import ops

    level = _C.cpu_level()
    out = values((7, 3, 5, 23), seed=4).requires_grad_()
    loss = ops.noise_loss(out, SEEDS, torch.arange(7), values((7,), seed=5))
    (gradient,) = torch.autograd.grad(loss, out, values((7,), seed=6))
    out, x_0 = values((7, 6, 5, 23), seed=4).requires_grad_(), values((7, 3, 5, 23), seed=3).clamp(-1, 1)
    options = dict(learned_variance=True, bound=True, stop_mean=False, weights=values((7,), seed=5))
    losses = ops.diffusion_loss(out, x_0, SEEDS, torch.arange(7) % 4, loss_rows(), **options)
    (of_losses,) = torch.autograd.grad(losses, out, values((7, 2), seed=6))
    return {
        "level": level,
        "digests": {name: digest(result) for name, result in results(ops)},
        "noise_loss": loss.tolist(),
        "noise_loss gradient": digest(gradient),
        "diffusion_loss": losses.tolist(),
        "diffusion_loss gradient": digest(of_losses),
    }


class LevelProcess:
    """A Python process whose kernels are those of one level. It runs programs one after the other."""

    def __init__(self, level: str):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"DIFFKERN_CPU_LEVEL": level, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, program: str) -> None:
        self._process.stdin.write(json.dumps(program) + "\n")
        self._process.stdin.flush()

    def finish(self) -> SimpleNamespace:
        """Return what the program printed, and its traceback, "" if it ended well."""
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process of a level ended with status {self._process.wait()}")
        return SimpleNamespace(**json.loads(answer))


@functools.cache
def process_of(level: str) -> LevelProcess:
    return LevelProcess(level)


def serve() -> None:
    """Answer each line of stdin, a program, by a line of stdout: JSON of ``printed`` and ``error``."""
    assert _C.cpu_level() == os.environ["DIFFKERN_CPU_LEVEL"]
    torch.set_num_threads(min(2, os.cpu_count() or 1))  # the levels run side by side
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        printed, error = io.StringIO(), ""
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(json.loads(line), "<program>", "exec"), {"__name__": "program"})
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps({"printed": printed.getvalue(), "error": error}), file=answers, flush=True)


def at_every_level(program: str, among: Sequence[str] = ALL_LEVELS) -> dict[str, str]:
    """Run the program at each of these levels that this processor has, side by side. Return what each printed."""
    here = [level for level in LEVELS if level in among]
    try:
        for level in here:
            process_of(level).start(program)
        answers = {level: process_of(level).finish() for level in here}
    except (OSError, RuntimeError):  # answers that nobody read would be taken for the next program's
        process_of.cache_clear()
        raise
    for level, answer in answers.items():
        assert not answer.error, f"level {level}: {answer.error}"
    return {level: answer.printed for level, answer in answers.items()}


@functools.cache
def answers_at_every_level() -> dict[str, dict]:
    program = "import json, levels; print(json.dumps(levels.answers()))"
    return {level: json.loads(printed) for level, printed in at_every_level(program, WIDTHS).items()}


if __name__ == "__main__":
    serve()
