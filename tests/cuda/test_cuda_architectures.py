"""Kernels compiled for other architectures than sm_80 are run too, each in a process of its own."""

import os
import subprocess
import sys

import pytest
from interpreted import COMPILED_FOR, ROOT, build

pytestmark = [pytest.mark.cuda, pytest.mark.slow, pytest.mark.usefixtures("interpreter")]

NEAR, SCALES = "as_near_to_float64 and float16", "any_scale"  # the former bfloat16 too


@pytest.mark.parametrize(
    ("compiled_for", "card", "tests", "passed"),
    [(75, 75, NEAR, 22), (90, 90, NEAR, 22), (75, 80, SCALES, 9), (75, 90, SCALES, 9)],
)
def test_attention_is_right_on_other_architectures(compiled_for, card, tests, passed):
    """sm_75 has no asynchronous copies, products half as deep, and none of bfloat16. Newer cards may run its code."""
    build(compiled_for)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--cuda-backend=ptxemu"]
    done = subprocess.run(
        [*command, "tests/cuda/test_cuda_attention.py", "-k", tests],
        cwd=ROOT,
        env=os.environ | {"PTXEMU_SM": str(card), COMPILED_FOR: str(compiled_for)},
        capture_output=True,
        text=True,
    )
    assert f"{passed} passed" in done.stdout and f"{passed} run, interpreted" in done.stdout, done.stdout[-4000:]
