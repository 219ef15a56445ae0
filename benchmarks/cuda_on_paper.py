"""Traffic, arithmetic and registers of the CUDA kernels: counted by an interpreter of their PTX, never timed.

``python -m benchmarks.cuda_on_paper`` prints a table, ``--markdown`` writes it to docs/cuda_on_paper.md. It wants nvcc,
the interpreter's folder in DIFFKERN_PTXEMU, and diffkern built with its CUDA kernels, for what ptxas said of them.

moved      bytes of the distinct 32-byte sectors that an op reads, and of those that it writes: what passes between DRAM
           and an L2 cache that holds the op's tensors, as the keys and values that each block reads again
/ min      those, over the bytes of the op's tensors: each input once, each output once
requested  bytes of all sectors that warps ask the caches for, the same sector as often as it is asked for
sectors    those, over the fewest that hold the bytes of each request
conflicts  passes over the banks of shared memory beyond the fewest
mma        products issued, over those that the arithmetic needs: of attention 2 of tokens x tokens x d forward, and 7
           backward, where delta, dk with dv, and dq are made without atomics (with atomics one kernel would need 5);
           thrice as many of float32, by 3xTF32
issued     thousands of PTX instructions of warps, of which an SM begins 4 a clock: they bound noise more than bytes do
warps/SM   what registers and shared memory leave room for
us         the longer of moved / bandwidth and mma / peak rate, from the makers' data sheets: no run can be shorter
"""

import argparse
import functools
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import _C
from diffkern.ops.row import LONG_COLUMNS
from diffkern.samplers import SAMPLERS
from diffkern.schedule import Schedule

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90)  # whose PTX is interpreted; a card of sm_89 runs what sm_80 runs


class Card(NamedTuple):
    """By the maker's public data sheet: bytes a second of DRAM, dense bfloat16 operations a second, float32 sums."""

    architecture: int
    bandwidth: float
    flops: float


CARDS = {  # H100 SXM; A100 40 GB; GeForce RTX 4090
    "H100": Card(90, 3.35e12, 989e12),
    "A100": Card(80, 1.555e12, 312e12),
    "RTX 4090": Card(89, 1.008e12, 165e12),
}


class Multiprocessor(NamedTuple):
    """CUDA C++ Programming Guide, "Technical Specifications"; each has 65536 registers and 32 blocks at most."""

    threads: int
    shared_bytes: int


MULTIPROCESSORS = {
    80: Multiprocessor(2048, 164 << 10),
    89: Multiprocessor(1536, 100 << 10),
    90: Multiprocessor(2048, 228 << 10),
}


class Kernel(NamedTuple):
    """One launch of an op: its name in what ptxas said (a pattern), and its plan."""

    label: str
    pattern: str
    launch: _C.Launch


class Case(NamedTuple):
    op: str
    shape: str
    run: Callable[[Any], object]  # of the raw ops, on CPU tensors
    inputs: int  # bytes
    outputs: int
    kernels: tuple[Kernel, ...]
    flops: int = 0  # of matrix products
    dtype: torch.dtype = torch.bfloat16  # of these


# --- cases ---

MANGLED = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}


def short(dtype: torch.dtype) -> str:
    return str(dtype)[6:]


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def elementwise_cases(shape: tuple[int, ...], dtype: torch.dtype) -> Iterable[Case]:
    n, elements, size = shape[0], math.prod(shape[1:]), dtype.itemsize
    x, seeds, t, table = values(*shape, dtype=dtype), torch.arange(n), torch.arange(n) % 10, values(10, 9).abs()
    of_one, of_t = n * elements * size, 16 * n  # of a tensor like x; of seeds and t
    plan, title = _C.plan_elementwise(n, elements, size), f"{short(dtype)} {list(shape)}"

    def case(op: str, kernel: str, run: Callable[[Any], object], inputs: int, outputs: int) -> Case:
        return Case(op, title, run, inputs, outputs, (Kernel("", f"{kernel}I{MANGLED[dtype]}", plan),))

    step = torch.tensor(3)
    yield case("noise", "noise_kernel", lambda ops: ops.noise(seeds, shape[1:], t, 0, dtype), of_t, of_one)
    q_table = table[:, :2].contiguous()
    yield case(
        "q_sample",
        "q_sample_kernel",
        lambda ops: ops.q_sample(x, t, seeds, q_table, None, False),
        of_one + of_t + 80,
        of_one,
    )
    yield case(
        "reverse_step",
        "reverse_step_kernel",
        lambda ops: ops.reverse_step(x, x.clone(), table, step, seeds, None, 1.0, True, False, [], False),
        2 * of_one + 8 * n + 8 + 36,
        of_one,
    )._replace(kernels=(Kernel("", f"reverse_step_kernelI{MANGLED[dtype]}Lb0ELb0E", plan),))
    unipc = SAMPLERS["unipc"].trace(Schedule.linear().grid(10), "eps", order=2).fold()
    rows, addresses = unipc.table().float(), unipc.addresses()
    history = [x.clone() for _ in range(unipc.slots)]
    assert (rows[step, len(LONG_COLUMNS) :][: len(history)] != 0).all()
    yield case(
        "reverse_step, long row",
        "reverse_step_kernel",
        lambda ops: ops.reverse_step(
            x, x.clone(), rows, step, seeds, None, 1.0, False, False, history, True, addresses
        ),
        (2 + len(history)) * of_one + 8 * n + 8 + 4 * rows.shape[1],
        2 * of_one,
    )._replace(kernels=(Kernel("", f"reverse_step_kernelI{MANGLED[dtype]}Lb0ELb0E", plan),))
    yield from loss_cases(x, seeds, t, title)


def loss_cases(x: Tensor, seeds: Tensor, t: Tensor, title: str) -> Iterable[Case]:
    """The error of eps, and the hybrid loss: that and the bound's term of a learned variance."""
    n, elements, size = len(x), math.prod(x.shape[1:]), x.element_size()
    of_one, of_t, grad = n * elements * size, 16 * n, values(n, 2)
    both, rows = torch.cat((x, x.flip(0)), 1), values(10, 12)
    rows[:, 11] = 0  # no bins
    hybrid = (both, x.clone(), seeds, t, rows, None, None, True, True, True, False)
    of_hybrid = 3 * of_one + of_t + 480

    def kernels(name: str, bound: int, launch: object) -> tuple[Kernel, ...]:
        total = Kernel("total", "^diffusion_loss/.*12total_kernel", _C.plan_elementwise(1, n, 4))
        pattern = f"^diffusion_loss/.*{name}_kernelI{MANGLED[x.dtype]}LN.*KindE{2 * bound}E"
        return (Kernel("partial", pattern, launch), total) if name == "partial" else (Kernel("", pattern, launch),)

    forward, backward = _C.plan_sums(n, elements), _C.plan_elementwise(n, elements, size)
    for bound, op, options, backward_options, inputs, output in (
        (0, "noise_loss", (x, seeds, t, None), (grad[:, 0].contiguous(), x, seeds, t, None), of_one + of_t, of_one),
        (1, "diffusion_loss", hybrid, (grad, *hybrid), of_hybrid, 2 * of_one),
    ):
        losses = 4 * n * (1 + bound)
        run = functools.partial(lambda op, options, ops: getattr(ops, op)(*options), op, options)
        yield Case(op, title, run, inputs, losses, kernels("partial", bound, forward))
        run = functools.partial(lambda op, options, ops: getattr(ops, op)(*options), f"{op}_backward", backward_options)
        yield Case(f"{op} backward", title, run, inputs + losses, output, kernels("backward", bound, backward))


def group_norm_cases(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> Iterable[Case]:
    n, channels, pixels = *shape[:2], math.prod(shape[2:])
    x = values(*shape, dtype=dtype).to(memory_format=torch.channels_last)
    weight, bias, mean, rstd = (
        torch.ones(channels),
        torch.zeros(channels),
        torch.zeros(n, groups),
        torch.ones(n, groups),
    )
    launches, (*_, vector) = _C.plan_group_norm_silu(n, channels, groups, pixels, dtype.itemsize, True)
    of_x, of_channels, of_groups = x.numel() * dtype.itemsize, 4 * channels, 4 * n * groups

    def kernels(name: str) -> tuple[Kernel, ...]:
        pattern = f"^group_norm_silu/.*{name}I{MANGLED[dtype]}Li{vector}ELb1E"
        return tuple(Kernel(launch.kernel, pattern, launch) for launch in launches)

    title = f"{short(dtype)} {list(shape)} channels_last"
    yield Case(
        "group_norm_silu",
        title,
        lambda ops: ops.group_norm_silu(x, weight, bias, groups, 1e-5, None, None, None, True),
        of_x + 2 * of_channels,
        of_x + 2 * of_groups,
        kernels("14forward_kernel"),
    )
    yield Case(
        "group_norm_silu backward",
        title,
        lambda ops: ops.group_norm_silu_backward(x, x.clone(), mean, rstd, weight, bias, groups, None, None, True),
        2 * of_x + 2 * of_channels + 2 * of_groups,
        of_x + 2 * n * of_channels,
        kernels("15backward_kernel"),
    )


def attention_cases(tokens: int, d: int, dtype: torch.dtype, architecture: int) -> Iterable[Case]:
    q, k, v, out, grad_out = (values(1, tokens, 1, d, dtype=dtype).transpose(1, 2) for _ in range(5))
    lse = torch.zeros(1, 1, tokens)
    of_q, product = tokens * d * dtype.itemsize, 2 * tokens * tokens * d * (3 if dtype == torch.float32 else 1)

    def kernels(backward: bool) -> tuple[Kernel, ...]:
        found = []
        width = next(w for w in (64, 128, 256, 512) if d <= w)
        for launch, rows in _C.plan_attention(1, tokens, tokens, d, short(dtype), architecture, backward):
            name = {"out": "attention_kernel", "delta": "12delta_kernel"}.get(
                launch.kernel, "attention_backward_kernel"
            )
            tiling = "" if launch.kernel == "delta" else f"NS0_6TilingILi{width}E{tiling_of(launch, rows, dtype)}"
            end = {"dk, dv": "Lb0ELb1EEE", "dq": "Lb0ELb0EEE", "out": "Lb0EEE"}.get(launch.kernel, "")
            found.append(Kernel(launch.kernel if backward else "", f"{name}I{MANGLED[dtype]}{tiling}{end}", launch))
        return tuple(found)

    title = f"{short(dtype)} [1, 1, {tokens}, {d}]"
    yield Case(
        "attention",
        title,
        lambda ops: ops.attention(q, k, v, None),
        3 * of_q,
        of_q + 4 * tokens,
        kernels(False),
        2 * product,
        dtype,
    )
    yield Case(
        "attention backward",
        title,
        lambda ops: ops.attention_backward(grad_out, q, k, v, out, lse, None),
        5 * of_q + 4 * tokens,
        3 * of_q,
        kernels(True),
        7 * product,
        dtype,
    )


def tiling_of(launch: _C.Launch, rows: int, dtype: torch.dtype) -> str:
    """The mangled template arguments after the width: row warps, column warps, tiles of 16 rows, operands, bytes."""
    warps = launch.threads // 32
    ways = [(r, c, t) for r in (1, 2, 4, 8) for c in (1, 2, 4) for t in (1, 2) if r * c == warps and 16 * t * r == rows]
    return "(" + "|".join(f"Li{r}ELi{c}ELi{t}E" for r, c, t in ways) + rf")Li\dELi{dtype.itemsize}EEE"


def cases(architecture: int) -> list[Case]:
    found: list[Case] = []
    for dtype in (torch.float32, torch.bfloat16):
        found += elementwise_cases((16, 3, 64, 64), dtype)
    found += group_norm_cases((4, 128, 32, 32), 32, torch.bfloat16)
    found += group_norm_cases((1, 128, 64, 64), 32, torch.bfloat16)
    for tokens, d in ((256, 64), (256, 256), (256, 512), (1024, 64), (1024, 256)):
        found += attention_cases(tokens, d, torch.bfloat16, architecture)
    for d in (64, 256):
        found += attention_cases(256, d, torch.float32, architecture)
    return found


# --- counting ---


def count(case: Case, interpreter: Any) -> dict[str, Any]:
    """Count one run of the op."""
    interpreter.clear()
    with interpreter.options(stats=1, race=0, race_global=0, init=0):
        case.run(interpreter.ops)
        stats = interpreter.stats()
    interpreter.clear()
    ops = stats["ops"]
    in_memory = {name: op for name, op in ops.items() if op["sectors"]}
    products = {
        name: op["warps"] * 2 * 16 * 8 * int(name.split("m16n8k")[1].split(".")[0])
        for name, op in ops.items()
        if name.startswith("mma.")
    }
    return {
        "moved": stats["footprint_read"] + stats["footprint_written"],
        "requested": 32 * sum(op["sectors"] for op in in_memory.values()),
        # asked for and fewest; lanes that want the same bytes, as of a seed, share a sector
        "sectors": {name: (op["sectors"], min(op["sectors"], op["ideal_sectors"])) for name, op in in_memory.items()},
        "passes": {name: (op["passes"], op["ideal_passes"]) for name, op in ops.items() if op["passes"]},
        "flops": sum(products.values()),
        "instructions": stats["warp_insts"],
    }


@functools.cache
def counted() -> dict[int, list[dict[str, Any]]]:
    """Count the cases of each architecture: a process interprets one architecture, and all run at once."""
    from tests import interpreted

    command = [sys.executable, "-m", "benchmarks.cuda_on_paper", "--count"]
    for architecture in ARCHITECTURES:
        interpreted.build(architecture)
    processes = {
        architecture: subprocess.Popen(
            [*command, str(architecture)],
            cwd=ROOT,
            env=os.environ | {"PTXEMU_SM": str(architecture), interpreted.COMPILED_FOR: str(architecture)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for architecture in ARCHITECTURES
    }
    return {architecture: json.loads(process.communicate()[0]) for architecture, process in processes.items()}


# --- what ptxas said ---


class Resources(NamedTuple):
    registers: int
    spilled: int  # bytes
    declared: int  # bytes of shared memory

    def warps(self, architecture: int, launch: _C.Launch) -> int:
        """Warps that one multiprocessor holds at a time."""
        sm, warps = MULTIPROCESSORS[architecture], launch.threads // 32
        of_a_warp = -(-self.registers * 32 // 256) * 256
        of_a_block = launch.shared_bytes + self.declared + 1024  # which the system takes
        return warps * min(32, sm.threads // launch.threads, 65536 // of_a_warp // warps, sm.shared_bytes // of_a_block)


@functools.cache
def resources() -> dict[tuple[int, str], Resources]:
    """The registers by (architecture, op/mangled name)."""
    found = {}
    for report in (ROOT / "build" / "kernels").rglob("*.cu.o.ptxas"):
        for entry in report.read_text().split("Compiling entry function ")[1:]:
            name, architecture = re.match(r"'(\w+)' for 'sm_(\d+)'", entry).groups()
            spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", entry)
            shared = re.search(r"Used \d+ registers.*?(\d+) bytes smem", entry)
            found[int(architecture), f"{report.parent.name}/{name}"] = Resources(
                int(re.search(r"Used (\d+) registers", entry)[1]),
                sum(int(number) for pair in spills for number in pair),
                int(shared[1]) if shared else 0,
            )
    return found


def resources_of(kernel: Kernel, architecture: int) -> Resources:
    (found,) = (r for (a, name), r in resources().items() if a == architecture and re.search(kernel.pattern, name))
    return found


# --- the table ---


def bound(case: Case, counts: dict[str, Any], card: Card) -> float:
    """Seconds."""
    flops = counts["flops"] * (2 if case.dtype == torch.float32 else 1)  # tensor cores do half as many of TF32
    return max(counts["moved"] / card.bandwidth, flops / card.flops)


HEAD = ("op", "shape", "sm", "moved KB", "/ min", "requested KB", "sectors", "conflicts", "mma", "issued") + (
    "registers",
    "spills",
    "shared KB",
    "warps/SM",
)


def row(case: Case, counts: dict[str, Any], architecture: int) -> tuple[str, ...]:
    static = [resources_of(kernel, architecture) for kernel in case.kernels]

    def each(numbers: Iterable[object]) -> str:
        return " ".join(dict.fromkeys(map(str, numbers)) if len(case.kernels) < 2 else map(str, numbers))

    asked, fewest = (sum(pair[i] for pair in counts["sectors"].values()) for i in (0, 1))
    return (
        case.op,
        case.shape,
        str(architecture),
        f"{counts['moved'] / 1e3:.1f}",
        f"{counts['moved'] / (case.inputs + case.outputs):.3f}",
        f"{counts['requested'] / 1e3:.1f}",
        f"{asked / fewest:.2f}",
        str(sum(passes - ideal for passes, ideal in counts["passes"].values())),
        f"{counts['flops'] / case.flops:.2f}" if case.flops else "",
        f"{counts['instructions'] / 1e3:.0f}",
        each(r.registers for r in static),
        each(r.spilled for r in static),
        each(round((r.declared + k.launch.shared_bytes) / 1e3, 1) for r, k in zip(static, case.kernels, strict=True)),
        each(r.warps(architecture, k.launch) for r, k in zip(static, case.kernels, strict=True)),
        *(f"{bound(case, counts, card) * 1e6:.2f}" for card in CARDS.values()),
    )


def missing() -> str:
    """Name what is missing, or nothing."""
    from tests.interpreted import missing

    if missing():
        return missing()
    wanted = {card.architecture for card in CARDS.values()} | set(ARCHITECTURES)
    if not wanted <= {architecture for architecture, _ in resources()}:
        return (
            f"build/kernels holds no reports of ptxas for {sorted(wanted)}: build with DIFFKERN_CUDA_ARCHITECTURES=all"
        )
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_on_paper", description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", action="store_true", help="write docs/cuda_on_paper.md")
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)  # by a process for one architecture
    arguments = parser.parse_args()
    if arguments.count:  # which needs no report of ptxas
        from tests.interpreted import load_interpreter

        json.dump([count(case, load_interpreter()) for case in cases(arguments.count)], sys.stdout)
        return
    if missing():
        sys.exit(f"cuda_on_paper: {missing()}")
    head = (*HEAD, *(f"{name} us" for name in CARDS))
    rows = [
        row(case, counts, architecture)
        for architecture in ARCHITECTURES
        for case, counts in zip(cases(architecture), counted()[architecture], strict=True)
    ]
    if arguments.markdown:
        table = "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *rows))
        (ROOT / "docs" / "cuda_on_paper.md").write_text(
            PAGE.format(definitions=__doc__.split("\n\n")[2].strip(), table=table)
        )
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


PAGE = """# The CUDA kernels on paper

Counted, never timed: `python -m benchmarks.cuda_on_paper --markdown` wrote this page without a card, by an interpreter
of the kernels' PTX and from what ptxas said. The times are lower bounds, and no speed is claimed.

```
{definitions}
```

Several numbers in a cell are the op's kernels, in the order of their launches. The RTX 4090 runs what sm_80 runs.

{table}"""


if __name__ == "__main__":
    main()
