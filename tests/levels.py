"""The same ops on every CPU level: each level runs in a process of its own and answers with a digest of every result.

Run as a program it prints one level's answers as JSON: `DIFFKERN_CPU_LEVEL=avx2 python levels.py`.
"""

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

LEVELS = ("baseline", "avx2", "avx512")
SEEDS = torch.tensor([0, 1, -1, 31337, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# registers and chunks half full, exactly full and overfull; then more than one thread's work
SIZES = (*range(1, 34), 63, 64, 65, 127, 192, 199, 1023, 1024, 1025, 3 * 1024 + 7, 70_001)


def digest(tensor: Tensor) -> str:
    """Of the bits; every NaN counts as the same."""
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


def results(ops: ModuleType) -> Iterator[tuple[str, Tensor]]:
    """What must have the same bits on every level, and in ``diffkern.reference``."""
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
    """Of the level that this process runs."""
    from diffkern import _C, ops

    level = _C.cpu_level()
    out = values((7, 3, 5, 23), seed=4).requires_grad_()
    loss = ops.noise_loss(out, SEEDS, torch.arange(7), values((7,), seed=5))
    (gradient,) = torch.autograd.grad(loss, out, values((7,), seed=6))
    return {
        "level": level,
        "digests": {name: digest(result) for name, result in results(ops)},
        "noise_loss": loss.tolist(),
        "noise_loss gradient": digest(gradient),
        "radius": _C.word_hash("radius"),
        "angle": _C.word_hash("angle"),
    }


@functools.cache
def every_level() -> dict[str, dict]:
    """The answers of each level that this processor has; all at once, about 20 s on two cores."""
    processes = {
        level: subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"DIFFKERN_CPU_LEVEL": level, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for level in LEVELS
    }
    collected = {}
    for level, process in processes.items():
        stdout, stderr = process.communicate()
        if process.returncode == 0:
            collected[level] = json.loads(stdout)
        elif "this processor does not have it" not in stderr:
            raise RuntimeError(f"level {level}: {stderr}")
    return collected


if __name__ == "__main__":
    json.dump(answers(), sys.stdout)
