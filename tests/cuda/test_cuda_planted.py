"""The checks see: a kernel without one of its waits or bounds is complained of, and by its right name."""

import contextlib
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import pytest
from cases import CASES
from planted import compiled, planted

pytestmark = pytest.mark.cuda


class Bug(NamedTuple):
    case: str
    kernels: str  # a file of csrc
    change: tuple[str, str, str]  # in which file, what, into what
    complaint: str


HELD, WARP_ROWS = "attention, a ring that holds its chunks", "attention, a warp a row"
SEVERAL, SIMT = "attention, several warps a row", "attention without tensor cores"
RACE, EARLY = r"race between warps \(.*shared\)", "cp.async destination in flight"
UNWRITTEN, OUTSIDE = "uninitialised shared read", "global memory out of bounds"

BUGS = {
    # bounds
    "a vector's tail written past the end": Bug(
        "noise, bfloat16",
        "ops/noise/cuda.cu",
        ("cuda/elements.cuh", "i < kVector<T> && first + i < end; ++i) *address", "i < kVector<T>; ++i) *address"),
        OUTSIDE,
    ),
    "a vector's tail read past the end": Bug(
        "q_sample, bfloat16, eps",
        "ops/q_sample/cuda.cu",
        ("cuda/elements.cuh", "i < kVector<T> && first + i < end; ++i) packed", "i < kVector<T>; ++i) packed"),
        OUTSIDE,
    ),
    "a last chunk of pixels taken for a whole one": Bug(
        "group norm, several chunks",
        "ops/group_norm_silu/cuda.cu",
        (
            "ops/group_norm_silu/cuda.cuh",
            "int(::min(int64_t(plan.chunk_pixels), p.pixels - tile.first_pixel));",
            "plan.chunk_pixels;",
        ),
        OUTSIDE,
    ),
    "tokens fetched past the last": Bug(
        HELD, "ops/attention/cuda.cu", ("ops/attention/cuda.cuh", "wide && first + row < rows.count;", "wide;"), OUTSIDE
    ),
    "channels fetched past the last": Bug(
        WARP_ROWS,
        "ops/attention/cuda.cu",
        ("ops/attention/cuda.cuh", "wide = offset < channels;", "wide = true;"),
        OUTSIDE,
    ),
    "rows written past the last": Bug(
        HELD, "ops/attention/cuda.cu", ("ops/attention/cuda.cuh", "if (first + row >= rows.count) break;", ""), OUTSIDE
    ),
    "tokens staged past the last": Bug(
        SIMT,
        "ops/attention/cuda_any.cu",
        ("ops/attention/cuda_any.cu", "first + token < rows.count && channel", "channel"),
        OUTSIDE,
    ),
    # asynchronous copies, and ldmatrix of what they bring
    "a chunk read before its copy is there": Bug(
        HELD, "ops/attention/cuda.cu", ("ops/attention/cuda.cuh", "    wait_for_copies<kAhead - 1>();\n", ""), EARLY
    ),
    "a chunk waited for one copy too late": Bug(
        SEVERAL,
        "ops/attention/cuda.cu",
        ("ops/attention/cuda.cuh", "wait_for_copies<kAhead - 1>();", "wait_for_copies<kAhead>();"),
        EARLY,
    ),
    "a chunk read before the others' copies are there": Bug(
        HELD,
        "ops/attention/cuda.cu",
        ("ops/attention/cuda.cuh", "1>();\n    __syncthreads();\n", "1>();\n"),
        f"{RACE}|{EARLY}",
    ),
    "a chunk overwritten while it is read": Bug(
        WARP_ROWS,
        "ops/attention/cuda.cu",
        ("ops/attention/plan.h", "held ? 2 + kAhead : 1 + kAhead", "kAhead"),
        f"{RACE}|{EARLY}",
    ),
    # shared memory between warps
    "probabilities read before the other warps put theirs": Bug(
        SEVERAL,
        "ops/attention/cuda.cu",
        (
            "ops/attention/cuda.cuh",
            "put<T, Tiling>(exchange, s);\n    __syncthreads();\n",
            "put<T, Tiling>(exchange, s);\n",
        ),
        RACE,
    ),
    "maxima combined before the other warps put theirs": Bug(
        SEVERAL,
        "ops/attention/cuda.cu",
        (
            "ops/attention/cuda.cu",
            "if constexpr (Tiling::column_warps > 1) {\n    __syncthreads();\n",
            "if constexpr (Tiling::column_warps > 1) {\n",
        ),
        RACE,
    ),
    "rows written before they are put": Bug(
        HELD,
        "ops/attention/cuda.cu",
        (
            "ops/attention/cuda.cuh",
            "int channels) {\n  __syncthreads();\n  for",
            "int channels) {\n  for",
        ),
        RACE,
    ),
    "gradients put over operands that are still read": Bug(
        HELD,
        "ops/attention/cuda_backward.cu",
        ("ops/attention/cuda_backward.cu", "  __syncthreads();  // a and b are no longer read\n", ""),
        r"race within a warp \(write after read, shared",
    ),
    "statistics of half of the queries": Bug(
        HELD,
        "ops/attention/cuda_backward.cu",
        (
            "ops/attention/cuda_backward.cu",
            "channel == 0 && threadIdx.x < kTokens)",
            "channel == 0 && threadIdx.x < kTokens / 2)",
        ),
        UNWRITTEN,
    ),
    "operands read before they are staged": Bug(
        SIMT,
        "ops/attention/cuda_any.cu",
        (
            "ops/attention/cuda_any.cu",
            "first_token, channel, channels);\n    __syncthreads();\n",
            "first_token, channel, channels);\n",
        ),
        RACE,
    ),
    "operands staged while the last are read": Bug(
        SIMT,
        "ops/attention/cuda_any.cu",
        ("ops/attention/cuda_any.cu", "__syncthreads();\n    stage<kDepth>(work", "stage<kDepth>(work"),
        RACE,
    ),
    "warps' sums added before they are there": Bug(
        "noise_loss, bfloat16, weights",
        "ops/diffusion_loss/cuda.cu",
        ("ops/diffusion_loss/cuda.cu", "= value;\n  __syncthreads();\n", "= value;\n"),
        RACE,
    ),
    "a tree of sums that does not wait for its branches": Bug(
        "group norm, one chunk, channels_last",
        "ops/group_norm_silu/cuda.cu",
        ("ops/group_norm_silu/cuda.cuh", "rows > 1;) {\n        __syncthreads();\n", "rows > 1;) {\n"),
        RACE,
    ),
    "channels' sums used before they are there": Bug(
        "group norm, one chunk",
        "ops/group_norm_silu/cuda.cu",
        ("ops/group_norm_silu/cuda.cuh", "  });\n  __syncthreads();\n}\n\n// Calls done", "  });\n}\n\n// Calls done"),
        RACE,
    ),
    "coefficients used before they are there": Bug(
        "group norm, one chunk",
        "ops/group_norm_silu/cuda.cu",
        ("ops/group_norm_silu/cuda.cu", "__syncthreads();\n      normalise", "normalise"),
        RACE,
    ),
    # global memory between blocks and launches
    "a chunk's sums that nobody wrote": Bug(
        "group norm, several chunks",
        "ops/group_norm_silu/cuda.cu",
        (
            "ops/group_norm_silu/cuda.cu",
            "if (phase == Phase::sums) {\n      if (g < tile.groups) {",
            "if (phase == Phase::sums) {\n      if (g + 1 < tile.groups) {",
        ),
        "uninitialised global read",
    ),
    "chunks that write each other's sums": Bug(
        "group norm, several chunks, channels_last",
        "ops/group_norm_silu/cuda.cu",
        ("ops/group_norm_silu/cuda.cu", "(group * plan.chunks + tile.chunk) * 2;", "group * plan.chunks * 2;"),
        r"race between blocks \(write after write, global\)",
    ),
    # shuffles
    "a shuffle without the lanes that have no element": Bug(
        "noise_loss, bfloat16, weights",
        "ops/diffusion_loss/cuda.cu",
        (
            "ops/diffusion_loss/cuda.cu",
            "value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);",
            "if (value != 0) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);",
        ),
        "deadlock",
    ),
}

# One of each kind, whose files compile in a few seconds.
QUICK = (
    "a vector's tail written past the end",
    "a chunk read before its copy is there",
    "warps' sums added before they are there",
    "a shuffle without the lanes that have no element",
)
STEPS = 200_000  # of a launch, of its warps: enough to go wrong


@pytest.fixture(scope="module")
def ptx(request) -> Iterator[dict[str, Future[str]]]:
    """The PTX of the bugs that will be asked for: compiled while others are looked for."""
    asked = [item.callspec.params["bug"] for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {bug: pool.submit(compiled, BUGS[bug].kernels, BUGS[bug].change) for bug in asked}


@pytest.mark.parametrize("bug", [bug if bug in QUICK else pytest.param(bug, marks=pytest.mark.slow) for bug in BUGS])
def test_a_planted_bug_is_found(interpreter, ptx, capfd, bug):
    case, kernels, _, complaint = BUGS[bug]
    plant, limit = planted(interpreter, kernels, ptx[bug].result()), interpreter.options(max_steps=STEPS)
    with plant, limit, contextlib.suppress(RuntimeError):  # of a launch that was given up, for a reason that is printed
        CASES[case](interpreter.ops)
    complaints = [report["kind"] for report in interpreter.reports()] + capfd.readouterr().err.splitlines()
    interpreter.clear()
    assert any(re.search(complaint, text) for text in complaints), complaints
    CASES[case](interpreter.ops)  # the real kernels are back, and of them nothing is said
