"""The CUDA kernels without a card: csrc/bindings.cpp built once more, with kernels in PTX alone, over a CUDA runtime
that interprets them and checks every access. Its ops take CPU tensors and go through the very launchers.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
CHECKS = "race"  # data races in shared memory; accesses out of bounds and unwaited copies are always looked for


def load_interpreted(ptxemu: Path):
    """Build and load the ops, over the runtime in that folder: torch.ops.diffkern_emulated."""
    build, tools = ROOT / "build" / "emulated", str(Path(sys.executable).parent)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", build],
        cwd=ROOT,
        env=os.environ | {"DIFFKERN_CUDART": "shared", "PATH": tools + os.pathsep + os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    os.environ["PTXEMU_CHECK"] = CHECKS
    ctypes.CDLL(ptxemu / "cudart" / "libcudart.so.13", mode=ctypes.RTLD_GLOBAL)  # before a real one is looked for
    (module,) = (build / "diffkern").glob("_C_emulated.*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", module)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return torch.ops.diffkern_emulated
