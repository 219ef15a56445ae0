"""Kernels with one line changed, in place of the real ones: what the checks must find.

The source is compiled anew and registered with the runtime under the functions by which the launchers know their
kernels, as the code that nvcc makes for the host does it: ops and launchers stay what they are.
"""

import contextlib
import ctypes
import functools
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from interpreted import ROOT, Interpreter

# Code that is not compiled to find a bug: in these files, the kernels of other dtypes than that of the bug's cases.
LEFT_OUT = {
    "ops/attention/cuda.cu": r"    case TensorCores::(f16_turing|f16|tf32): .*\n",
    "ops/attention/cuda_backward.cu": r"    case TensorCores::(f16_turing|f16|tf32): .*\n",
    "ops/group_norm_silu/cuda.cuh": r"    case DType::bf16: .*\n",
}


def compiled(file: str, change: tuple[str, str, str]) -> str:
    """The PTX of csrc/``file``; change is (a file of csrc, a text that is in it once, what stands there instead)."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = shutil.copytree(ROOT / "csrc", Path(folder, "csrc"))
        changed, old, new = change
        source = (csrc / changed).read_text()
        assert source.count(old) == 1, f"{changed}: expected this once, found it {source.count(old)} times: {old}"
        (csrc / changed).write_text(source.replace(old, new))
        for shortened, left_out in LEFT_OUT.items():
            (csrc / shortened).write_text(re.sub(left_out, "", (csrc / shortened).read_text()))
        ptx = Path(folder, "kernels.ptx")
        command = ["nvcc", "-std=c++17", "-O3", "-arch=compute_80", f"-I{csrc}", "--ptx", csrc / file, "-o", ptx]
        subprocess.run(command, check=True, capture_output=True)
        return ptx.read_text()


UNIT = r"_ZN8diffkern4cuda\d+_GLOBAL__N__([0-9a-f]+_\d+_\w+?_cu_[0-9a-f]{8})"  # the anonymous namespace of one file


@functools.cache
def real(interpreter: Interpreter) -> dict[str, str]:
    """The PTX of each CUDA file, by its path in csrc, as it lies in the module."""
    objects = interpreter.module.parent.rglob("*.cu.o")
    return {f"ops/{path.parent.name}/{path.stem}": ptx_of(path) for path in objects}


def ptx_of(path: Path) -> str:
    (text,) = re.findall(rb"\.version [0-9.]+\n\.target [^\0]+", path.read_bytes())
    return text.decode()


def name_of(symbol: str) -> str | None:
    """The mangled name of a kernel without its namespace, the same for host and device and wherever it is compiled."""
    found = re.match(rf"{UNIT}L?(\d+\w+)$", symbol)
    return found and found[2]


@functools.cache
def host_functions(interpreter: Interpreter, file: str) -> dict[str, int]:
    """The addresses by which the module launches the kernels of csrc/``file``."""
    (unit,) = set(re.findall(rf"\.entry {UNIT}", real(interpreter)[file]))
    lines = subprocess.run(["nm", interpreter.module], check=True, capture_output=True, text=True).stdout.splitlines()
    offsets = {symbol: int(offset, 16) for offset, _, symbol in (line.split() for line in lines if line[0] != " ")}
    anchor = "diffkern_set_stream"
    loaded = ctypes.cast(getattr(interpreter.binding, anchor), ctypes.c_void_p).value
    own = {name_of(symbol): offset for symbol, offset in offsets.items() if f"__{unit}" in symbol}
    return {name: loaded - offsets[anchor] + offset for name, offset in own.items() if name}


def register(interpreter: Interpreter, file: str, ptx: str) -> None:
    """From now on the launchers of csrc/``file`` launch the kernels of this text."""
    text = ptx.encode()
    ptx_of_sm_80 = struct.pack("<HHIQIIIIQQQQ", 1, 0, 64, len(text), 0, 0, 0, 80, 0, 0, 0, len(text)) + text
    binary = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(ptx_of_sm_80)) + ptx_of_sm_80
    wrapper = struct.pack("<IIQQ", 0x466243B1, 1, ctypes.cast(binary, ctypes.c_void_p).value, 0)
    runtime = interpreter.runtime
    runtime.__cudaRegisterFatBinary.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(runtime.__cudaRegisterFatBinary(wrapper))
    kernels = re.findall(r"\.entry (\w+)", ptx)
    assert kernels
    for kernel in kernels:
        function = ctypes.c_void_p(host_functions(interpreter, file)[name_of(kernel)])
        runtime.__cudaRegisterFunction(handle, function, kernel.encode(), kernel.encode(), -1, *[None] * 5)


@contextlib.contextmanager
def planted(interpreter: Interpreter, file: str, ptx: str) -> Iterator[None]:
    """Use that PTX for the kernels of csrc/``file`` within the context."""
    register(interpreter, file, ptx)
    try:
        yield
    finally:
        register(interpreter, file, real(interpreter)[file])
