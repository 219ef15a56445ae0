"""Counts that the kernels were designed for: bytes, sectors, bank conflicts, products, warps that a card holds."""

import functools
import re

import pytest
import torch
from interpreted import ROOT, load_interpreter
from levels import values
from long_rows import OPERANDS as EVERY
from long_rows import raw_long_case

from benchmarks import cuda_on_paper

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("interpreter")]

with_registers = pytest.mark.skipif(bool(cuda_on_paper.missing()), reason=cuda_on_paper.missing())
slow = [pytest.param(architecture, marks=pytest.mark.slow) for architecture in cuda_on_paper.ARCHITECTURES]
architectures, with_few = (pytest.mark.parametrize("architecture", chosen) for chosen in (slow, ["a few", *slow]))
MINOR = 0.02  # of an op's sectors: what is below it, as the sums of chunks, may be read as it comes
FEW = (
    ("reverse_step", "float32 [16, 3, 64, 64]"),
    ("group_norm_silu", "bfloat16 [4, 128, 32, 32] channels_last"),
    ("attention", "bfloat16 [1, 1, 256, 64]"),
    ("attention backward", "bfloat16 [1, 1, 256, 64]"),
)


@functools.cache
def counts(architecture: int | str) -> list[tuple[cuda_on_paper.Case, dict]]:
    if architecture == "a few":  # of this process's architecture
        few = [case for case in cuda_on_paper.cases(80) if (case.op, case.shape) in FEW]
        assert len(few) == len(FEW)
        return [(case, cuda_on_paper.count(case, load_interpreter())) for case in few]
    return list(zip(cuda_on_paper.cases(architecture), cuda_on_paper.counted()[architecture], strict=True))


@with_few
def test_an_op_moves_its_tensors_once(architecture):
    """Distinct bytes: K and V, which each block of queries reads, come from L2 but for the first time."""
    for case, counted in counts(architecture):
        assert 1 <= counted["moved"] / (case.inputs + case.outputs) < 1.01, (case.op, case.shape)


@with_few
def test_every_request_of_a_warp_takes_as_few_sectors_as_its_bytes(architecture):
    for case, counted in counts(architecture):
        total = sum(asked for asked, _ in counted["sectors"].values())
        for instruction, (asked, fewest) in counted["sectors"].items():
            assert asked == fewest or asked < MINOR * total, (case.op, case.shape, instruction)


# Beside x and what it becomes: which tensors of x's size a row reads or writes, and how many.
OPERANDS = {
    "out": 1,
    "nothing": 0,
    "out, out_uncond": 2,
    "out, grad": 2,
    "out, history": 1 + 4,
    "out, kept": 2,
    "out, known, mask": 2 + 1 / 3,
    "out, out_uncond, grad, history, kept, known, mask": 1 + 1 + 1 + 4 + 1 + 1 + 1 / 3,
}


@pytest.mark.parametrize("operands", OPERANDS)
def test_a_step_by_a_long_row_moves_what_the_row_uses_once(operands):
    shape = (16, 3, 64, 64)
    x, out, table, _, seeds, uncond, *options, address, grad, known, _ = raw_long_case(
        shape, torch.float32, 6, EVERY[:3]
    )
    table[0, 22:24] = 0  # two of the six slots
    mask, step, there = values((16, 1, 64, 64)), torch.tensor(0), operands.split(", ")
    options[3] = options[3] if "history" in there else []
    options[4] = "kept" in there
    tensors = dict(out=out, out_uncond=uncond, address=address, grad=grad, known=known, mask=mask)
    out, uncond, *rest = (tensor if name in (*there, "address") else None for name, tensor in tensors.items())
    small = 8 * 16 + 8 + 4 * 28 + 16  # seeds, step, row, address
    of_x = x.numel() * 4
    case = cuda_on_paper.Case(
        "reverse_step",
        operands,
        lambda ops: ops.reverse_step(x, out, table, step, seeds, uncond, *options, *rest),
        round((2 + OPERANDS[operands]) * of_x) + small,
        0,
        (),
    )
    counted = cuda_on_paper.count(case, load_interpreter())
    assert 1 <= counted["moved"] / case.inputs < 1.01
    total = sum(asked for asked, _ in counted["sectors"].values())
    for instruction, (asked, fewest) in counted["sectors"].items():
        assert asked == fewest or asked < MINOR * total, instruction


@with_few
def test_every_shared_access_takes_as_few_passes_as_its_bytes(architecture):
    loaded = 0
    for case, counted in counts(architecture):
        for instruction, (passes, fewest) in counted["passes"].items():
            assert passes == fewest, (case.op, case.shape, instruction)
            loaded += "ldmatrix" in instruction
    assert loaded > 0


@with_few
def test_attention_issues_no_product_that_the_arithmetic_does_not_need(architecture):
    on_full_tiles = [(case, counted) for case, counted in counts(architecture) if case.flops]
    assert len(on_full_tiles) == (2 if architecture == "a few" else 14)
    for case, counted in on_full_tiles:
        assert 1 <= counted["flops"] / case.flops <= 1.05, (case.op, case.shape)


@with_registers
@architectures
def test_a_multiprocessor_holds_as_many_warps_as_the_plan_of_attention_says(architecture):
    """The table in csrc/ops/attention/plan.h."""
    text = (ROOT / "csrc" / "ops" / "attention" / "plan.h").read_text()

    def held(d: int, tokens: int, kernel: str, dtype: torch.dtype = torch.bfloat16) -> int:
        cases = cuda_on_paper.attention_cases(tokens, d, dtype, architecture)
        (found,) = (k for case in cases for k in case.kernels if k.label == kernel)
        return cuda_on_paper.resources_of(found, architecture).warps(architecture, found.launch)

    for line, kernel, tokens in (("forward", "", 256), ("dk, dv", "dk, dv", 256), ("dq", "dq", 256)):
        numbers = r" +(\d+) +(\d+) +(\d+) +(\d+)(?: +the last (\d+) on sm_90)?"
        *row, last = re.search(rf"^//     {line}{numbers}", text, re.MULTILINE).groups()
        if last and architecture == 90:
            row[-1] = last
        assert [held(d, tokens, kernel) for d in (64, 128, 256, 512)] == [int(warps) for warps in row], line
    few = re.search(r"(\d+) and (\d+) where there are 64 queries or fewer", text).groups()
    assert [held(d, 64, "") for d in (64, 128)] == [int(warps) for warps in few]
    few, many = re.search(rf"sm_{architecture}(?: holds)? (\d+) to (\d+)", text).groups()
    of_float32 = [held(d, 256, kernel, torch.float32) for d in (64, 128, 256) for kernel in ("", "dk, dv", "dq")]
    assert (min(of_float32), max(of_float32)) == (int(few), int(many))


@with_registers
@architectures
def test_a_multiprocessor_holds_two_blocks_of_group_norm(architecture):
    for case in cuda_on_paper.cases(architecture):
        for kernel in case.kernels:
            resources = cuda_on_paper.resources_of(kernel, architecture)
            assert resources.spilled == 0
            if case.op.startswith("group_norm"):
                assert resources.warps(architecture, kernel.launch) >= 2 * kernel.launch.threads // 32
