"""What is compiled for other architectures than sm_80 is run too, each in a process of its own."""

import functools
import os
import subprocess
import sys

import pytest
from interpreted import ROOT

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("interpreter")]


ARCHITECTURES = (75, 90)


@functools.cache
def outputs() -> dict[int, str]:
    """What pytest said of some tests of attention on each; all at once."""
    tests = ["tests/cuda/test_cuda_attention.py", "-k", "as_near_to_float64 and float16"]  # bfloat16 too
    processes = {
        architecture: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--cuda-backend=ptxemu", *tests],
            cwd=ROOT,
            env=os.environ | {"PTXEMU_SM": str(architecture)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for architecture in ARCHITECTURES
    }
    return {architecture: process.communicate()[0] for architecture, process in processes.items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_is_right_on_other_architectures(architecture):
    """sm_75 has no asynchronous copies, products half as deep, and none of bfloat16."""
    output = outputs()[architecture]
    assert "22 passed" in output and "22 run, interpreted" in output, output[-4000:]
