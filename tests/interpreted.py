"""The CUDA kernels without a card: the bindings built once more, with kernels in PTX alone, over a CUDA runtime
that interprets them and checks every access. Its ops take CPU tensors and go through the very launchers.

Environment: PTXEMU_SM is the architecture of the interpreted card (80 unless given), DIFFKERN_TEST_PTX the one that the
kernels are compiled for (80 unless given), which may be older.
"""

import contextlib
import ctypes
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
COMPILED_FOR, BUILT = "DIFFKERN_TEST_PTX", "DIFFKERN_TEST_BUILT"

# Data races in shared and in global memory, and reads of memory that nobody wrote. That accesses are in bounds and
# copies waited for is always looked at; copies arrive as late as they may.
DEFAULTS = {"race": 1, "race_global": 1, "init": 1, "seed": 0, "stats": 0, "max_steps": 0}


class Interpreter:
    """``ops``: torch.ops.diffkern_emulated. What the interpreter complained of and counted, and its options."""

    def __init__(self, folder: Path):
        """Build and load the ops over the runtime in that folder of a built ptxemu."""
        self.module = build()
        self.runtime = ctypes.CDLL(str(folder / "cudart" / "libcudart.so.13"), mode=ctypes.RTLD_GLOBAL)
        self.runtime.ptx_runtime_device.restype = ctypes.c_void_p
        for name in ("ptx_reports", "ptx_stats", "ptx_error"):
            getattr(self.runtime, name).restype = ctypes.c_char_p
        self.device = ctypes.c_void_p(self.runtime.ptx_runtime_device())
        self.binding = ctypes.CDLL(str(self.module))
        self.ops = torch.ops.diffkern_emulated
        self.set(**DEFAULTS)

    def set(self, **options: float) -> None:
        for name, value in options.items():
            wrong = self.runtime.ptx_option(self.device, name.encode(), ctypes.c_double(value))
            assert not wrong, self.runtime.ptx_error()

    @contextlib.contextmanager
    def options(self, **options: float) -> Iterator[None]:
        """Set ptxemu's options within the context: ``seed`` shuffles warps and blocks, ``stats=1`` counts."""
        self.set(**options)
        try:
            yield
        finally:
            self.set(**DEFAULTS)

    @contextlib.contextmanager
    def graph(self, *tensors: torch.Tensor) -> Iterator[Callable[..., None]]:
        """Record the block's ops instead of running them. Each call of the yielded function replays them, on these
        tensors and on those that it is called with: results, which did not exist before.
        """
        stream, graph, recorded = (ctypes.c_void_p() for _ in range(3))

        def replay(*results: torch.Tensor) -> None:
            for tensor in (*tensors, *results):
                arguments = [ctypes.c_uint64(tensor.data_ptr()), ctypes.c_uint64(tensor.nbytes), b"a tensor", 1, 0]
                self.runtime.ptx_memory_add(self.device, *arguments)
            assert self.runtime.cudaGraphLaunch(recorded, stream) == 0, self.reports()
            for tensor in (*tensors, *results):  # others may get the memory, and lend it in other pieces
                self.runtime.ptx_memory_remove(self.device, ctypes.c_uint64(tensor.data_ptr()))

        assert self.runtime.cudaStreamCreate(ctypes.byref(stream)) == 0
        assert self.runtime.cudaStreamBeginCapture(stream, 0) == 0
        self.binding.diffkern_set_stream(stream)
        try:
            yield replay
        finally:
            self.binding.diffkern_set_stream(ctypes.c_void_p())
            assert self.runtime.cudaStreamEndCapture(stream, ctypes.byref(graph)) == 0
            assert self.runtime.cudaGraphInstantiate(ctypes.byref(recorded), graph, ctypes.c_uint64(0)) == 0

    def reports(self) -> list[dict]:
        """The complaints since ``clear``: each a kind, a text, a kernel and a line of the source."""
        return json.loads(self.runtime.ptx_reports(self.device))

    def stats(self) -> dict:
        """The counts since ``clear``: of instructions by name, and of distinct bytes by the last op."""
        return json.loads(self.runtime.ptx_stats(self.device))

    def clear(self) -> None:
        self.runtime.ptx_clear(self.device)
        self.runtime.cudaDeviceReset()  # a fault stops all launches after it


def architecture() -> int:
    """Return the architecture of this process's kernels."""
    return int(os.environ.get(COMPILED_FOR, 80))


def build(compiled_for: int | None = None) -> Path:
    """The module with the kernels of that architecture (this process's). Made once: what has not changed is kept, and
    processes that this one starts know of it.
    """
    compiled_for = compiled_for or architecture()
    folder, known = ROOT / "build" / "emulated" / str(compiled_for), os.environ.get(BUILT, "").split()
    if str(compiled_for) not in known:
        environment = os.environ | {"PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}
        values = {"TORCH": Path(torch.__file__).parent, "ARCHITECTURE": compiled_for, "CMAKE_BUILD_TYPE": "None"}
        configure = ["cmake", "-G", "Ninja", "-S", ROOT / "tests" / "emulated", "-B", folder]
        configure += [f"-D{name}={value}" for name, value in values.items()]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:  # another process of this run may want the same
            fcntl.flock(lock, fcntl.LOCK_EX)
            for command in (configure, ["cmake", "--build", folder]):
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        os.environ[BUILT] = " ".join([*known, str(compiled_for)])
    return folder / "libdiffkern_emulated.so"


def missing() -> str:
    """Return what the interpreter lacks here, or nothing."""
    if shutil.which("nvcc") is None:
        return "there is no nvcc"
    if not Path(os.environ.get("DIFFKERN_PTXEMU", "/nowhere"), "cudart", "libcudart.so.13").exists():
        return "DIFFKERN_PTXEMU does not name the folder of a built ptxemu"
    return ""


@functools.cache  # a process registers the ops once
def load_interpreter() -> Interpreter:
    return Interpreter(Path(os.environ["DIFFKERN_PTXEMU"]))


if __name__ == "__main__" and not missing():  # before pytest, so that no test waits for it
    print(f"CUDA kernels for the interpreter: {build().relative_to(ROOT)}")
