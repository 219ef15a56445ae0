"""The CUDA kernels, on a card or interpreted: the fixture ``cuda`` holds what runs them.

Without a card, csrc/bindings.cpp is built once more with kernels in PTX alone, over a CUDA runtime that interprets them
and checks every access (DIFFKERN_PTXEMU names its folder). Its ops take CPU tensors and go through the very launchers.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, cuda_backend

import diffkern  # noqa: F401  registers the ops that the interpreted ones are held against

CHECKS = "race"  # data races in shared memory; accesses out of bounds and unwaited copies are always looked for


@pytest.fixture(scope="session")
def cuda(request: pytest.FixtureRequest) -> SimpleNamespace:
    """``ops``: the raw ops (torch.ops.diffkern's, or their interpreted twins); ``device``: where their tensors live."""
    backend, reason = cuda_backend(request.config)
    if backend is None:
        pytest.skip(reason)
    if backend == "gpu":
        return SimpleNamespace(ops=torch.ops.diffkern, device=torch.device("cuda"), name=backend)
    load_interpreted(Path(os.environ["DIFFKERN_PTXEMU"]))
    return SimpleNamespace(ops=torch.ops.diffkern_emulated, device=torch.device("cpu"), name=backend)


def load_interpreted(ptxemu: Path) -> None:
    build = ROOT / "build" / "emulated"
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", build],
        cwd=ROOT,
        env=os.environ | {"DIFFKERN_CUDART": "shared"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    os.environ["PTXEMU_CHECK"] = CHECKS
    ctypes.CDLL(ptxemu / "cudart" / "libcudart.so.13", mode=ctypes.RTLD_GLOBAL)  # before a real one is looked for
    (module,) = (build / "diffkern").glob("_C_emulated.*.so")
    spec = importlib.util.spec_from_file_location("_C_emulated", module)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
