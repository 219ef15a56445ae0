"""A launch that fails raises by its op's name and leaves nothing behind; a launcher knows what was compiled."""

import contextlib
import ctypes
import re

import pytest
import torch
from levels import DTYPES, values
from planted import real, register

pytestmark = pytest.mark.cuda

SEEDS = torch.tensor([3])
INVALID = 1  # cudaErrorInvalidValue


def test_a_group_norm_that_fails_to_launch_says_so_and_the_next_op_is_fine(interpreter):
    x, ones = values((1, 8, 4, 4)), torch.ones(8)
    file = "ops/group_norm_silu/cuda.cu"
    ptx = real(interpreter)[file]
    too_large = re.sub(r"(\.shared \.align \d+ \.b8 \w*rstd\w*)\[\d+\]", r"\1[200000]", ptx)
    assert too_large != ptx
    register(interpreter, file, too_large)
    try:
        with pytest.raises(RuntimeError, match="^group_norm_silu: expected its CUDA kernels to launch, got: "):
            interpreter.ops.group_norm_silu(x, ones, ones, 2, 1e-5, None, None, None, True)
    finally:
        register(interpreter, file, ptx)
    assert interpreter.runtime.cudaPeekAtLastError() == 0
    assert interpreter.ops.noise(SEEDS, [8], torch.tensor(0), 0, torch.float32).isfinite().all()


def test_a_launch_is_not_blamed_for_an_error_before_it(interpreter):
    assert interpreter.runtime.cudaFree(ctypes.c_void_p(1)) == INVALID
    assert interpreter.ops.noise(SEEDS, [8], torch.tensor(0), 0, torch.float32).isfinite().all()
    assert interpreter.runtime.cudaGetLastError() == INVALID  # it is whoever's it was


@contextlib.contextmanager
def compiled_for(interpreter, architecture):
    """As the runtime tells it of kernels."""
    told = ctypes.c_int.in_dll(interpreter.binding, "diffkern_ptx")
    before, told.value = told.value, architecture
    try:
        yield
    finally:
        told.value = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_code_for_sm_75_has_no_products_that_sm_75_has_not(interpreter, capfd, dtype):
    """Not on newer cards either, which a build for sm_75 alone runs on. Its own are not in this module."""
    q, k, v = (values((1, 1, 9, 16), dtype, seed=seed) for seed in range(3))
    with compiled_for(interpreter, 75):
        if dtype != torch.float16:
            out, _ = interpreter.ops.attention(q, k, v, None)
            exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
            torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-6 if dtype == torch.float32 else 2e-2)
            return
        with pytest.raises(RuntimeError, match="^attention: expected its CUDA kernels to launch, got: "):
            interpreter.ops.attention(q, k, v, None)
    assert [report["kind"] for report in interpreter.reports()] == ["trap"]
    interpreter.clear()
    capfd.readouterr()
