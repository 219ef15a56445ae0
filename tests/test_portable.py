"""The code for processors other than x86-64, compiled on this one: every kernel, and noise with the same bits."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from interpreted import ROOT
from levels import ALL_LEVELS

from diffkern import ops

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")

CSRC = ROOT / "csrc"
SOURCES = sorted(path for pattern in ("cpu/*.cpp", "ops/**/cpu*.cpp") for path in CSRC.glob(pattern))


def compile_portably(*arguments: str | Path) -> None:
    flags = re.search(r"set\(cpu_flags (.*?)\)", (ROOT / "CMakeLists.txt").read_text(), re.DOTALL)[1].split()
    definitions = ["-DDIFFKERN_PORTABLE", "-DDIFFKERN_CPU_LEVEL=baseline", f"-I{CSRC}"]
    definitions += [f"-DDIFFKERN_BUILT_{level}=0" for level in ALL_LEVELS if level != "baseline"]
    done = subprocess.run(
        ["g++", "-std=gnu++20", *flags, *definitions, "-Werror", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: str(source.relative_to(CSRC)))
def test_a_source_compiles_without_intrinsics(source):
    compile_portably("-fsyntax-only", source)


NOISE = """
#include <cstdio>

#include "cpu/kernels.h"

int main() {
  static float z[2][777];
  const int64_t seeds[] = {5, -1}, step = 31;
  diffkern::NoiseParams params{};
  params.z = {z, diffkern::DType::f32, 1, 777, {777}, {1}};
  params.samples = 2, params.elements = 777, params.seeds = seeds, params.step = &step, params.stream = 1;
  diffkern::cpu::baseline::noise(params, 0, 2);
  return std::fwrite(z, sizeof z, 1, stdout) != 1;
}
"""


def test_noise_without_intrinsics_has_the_bits_of_the_noise_here(tmp_path):
    (tmp_path / "main.cpp").write_text(NOISE)
    program = tmp_path / "noise"
    compile_portably("-O1", tmp_path / "main.cpp", CSRC / "ops/noise/cpu.cpp", "-o", program)
    words = subprocess.run([program], capture_output=True, check=True).stdout
    z = torch.from_numpy(np.frombuffer(words, np.float32).reshape(2, 777).copy())
    assert torch.equal(z, ops.noise([5, -1], (777,), step=31, stream=1))


def test_noise_has_no_undefined_behaviour(tmp_path):
    """A quarter of all phases would overflow a signed integer."""
    (tmp_path / "main.cpp").write_text(NOISE)
    program, sanitizer = tmp_path / "noise", ["-fsanitize=undefined", "-fno-sanitize-recover=all"]
    try:
        compile_portably("-O0", *sanitizer, tmp_path / "main.cpp", CSRC / "ops/noise/cpu.cpp", "-o", program)
    except AssertionError as error:
        if "ubsan" not in str(error):
            raise
        pytest.skip("there is no libubsan")
    done = subprocess.run([program], capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
