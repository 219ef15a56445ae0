"""Builds the kernels by CMake, for setup.py, and says in one line why a build failed.

Environment, beside what build_cuda.py reads:

    CXX, CXXFLAGS        the C++ compiler and its flags
    DIFFKERN_CPU_LEVELS  "all", "native", or some of the names in csrc/cpu/levels.def, beside baseline
    DIFFKERN_BUILD_DIR   a folder to build in (default: build, in the source)
    DIFFKERN_CMAKE_ARGS  arguments for CMake, quoted as in a shell
    MAX_JOBS             how many compilations run at a time
"""

import contextlib
import functools
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import build_cuda

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / os.path.expanduser(os.environ.get("DIFFKERN_BUILD_DIR") or "build")
KERNELS = BUILD / "kernels"  # knows no torch and no Python: every environment's build uses it
GENERATOR = "Ninja"

# An environment's own CMake and Ninja, if it is not activated.
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + os.pathsep + os.path.dirname(sys.executable)

# --- what a build needs ------------------------------------------------------------------------------------------


@functools.cache
def check() -> None:
    """End the build in one line where it cannot work: no C++ compiler, or no folder to write to."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise SystemExit(f"diffkern: expected a C++20 compiler, got no {compiler[0]!r}: install g++, or set CXX")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cpp")
        source.write_text("#include <bit>\nint main() { return std::popcount(0u); }\n")
        flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), "-std=c++20"]
        command = [*compiler, *flags, source, "-o", source.with_suffix("")]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        reason = first_error(done.stderr + done.stdout) or f"exit status {done.returncode}"
        raise SystemExit(f"diffkern: expected a C++20 compiler, got {' '.join(compiler)!r}, which says: {reason}")
    try:
        BUILD.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=BUILD).close()
    except OSError as error:
        told = f"{BUILD}: {error.strerror}: choose another folder by DIFFKERN_BUILD_DIR"
        raise SystemExit(f"diffkern: expected a build folder that can be written, got {told}") from None


# --- the kernels -------------------------------------------------------------------------------------------------


def build(default: str, torch_has_cuda: bool | None) -> dict[str, str]:
    """Configure and build the kernels, for "all" machines or the "native" one where no variable says otherwise.

    ``torch_has_cuda``: None if there is no torch yet. A native build for a torch without CUDA leaves the CUDA kernels
    out, which that torch cannot run, unless a variable asks for them.
    Returns what build-info.json then holds, lists with semicolons: "library", its path; "cpu_levels";
    "cuda_library_dirs"; "cuda_architectures", as in "sm_80;compute_80", or nothing; "cuda_left_out", or why.
    """
    try:
        if default == "native" and torch_has_cuda is False and not build_cuda.asked_for():
            nvcc, left_out = None, "this torch has no CUDA"
        else:
            nvcc, left_out = build_cuda.usable_nvcc(os.environ.get("DIFFKERN_CUDA", ""), torch_has_cuda)
        architectures = build_cuda.chosen_architectures(nvcc, default) if nvcc else []
        levels = chosen_levels(os.environ.get("DIFFKERN_CPU_LEVELS") or default, processor_flags())
        extra = shlex.split(os.environ.get("DIFFKERN_CMAKE_ARGS", ""))
    except ValueError as error:
        raise SystemExit(f"diffkern: {error}") from None
    forget_other_circumstances(nvcc)

    options = {"CMAKE_MAKE_PROGRAM": shutil.which("ninja"), "DIFFKERN_CPU_LEVELS": ";".join(levels)}
    if nvcc:
        options["DIFFKERN_CUDA_ARCHITECTURES"] = ";".join(architectures)
        left_out = configure(options | {"DIFFKERN_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc}, extra)
        if left_out and (os.environ.get("DIFFKERN_CUDA") or torch_has_cuda):
            raise SystemExit(f"diffkern: {build_cuda.refusal(left_out)}")
    if left_out and (reason := configure(options | {"DIFFKERN_CUDA": "OFF"}, extra)):
        raise SystemExit(f"diffkern: CMake could not configure the kernels: {reason}")

    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    if reason := why_failed(lambda: subprocess.check_call(["cmake", "--build", KERNELS, *jobs])):
        raise SystemExit(f"diffkern: the kernels did not compile: {reason}")
    print(f"diffkern: CUDA kernels: {f'left out: {left_out}' if left_out else ' '.join(architectures)}")
    info = json.loads((KERNELS / "cmake-info.json").read_text()) | {"cuda_left_out": left_out}
    told = KERNELS / "build-info.json"
    if not told.exists() or json.loads(told.read_text()) != info:  # the binding depends on it
        told.write_text(json.dumps(info, indent=1))
    return info


# Each level of csrc/cpu/levels.def, with what Linux calls the instructions that it adds to the one before.
LEVELS = {
    name: set(cpuinfo.split())
    for name, cpuinfo in re.findall(
        r'^DIFFKERN_LEVEL\((\w+), \w+, "[^"]*",\s*"([^"]*)"', (ROOT / "csrc/cpu/levels.def").read_text(), re.MULTILINE
    )
}


def chosen_levels(wanted: str, flags: set[str]) -> list[str]:
    """The CPU levels to build beside baseline. "native" are those of a processor with these flags, if it tells any.

    ValueError for a name that is no level. A level brings those before it, whose kernels it shares.
    """
    names = list(LEVELS)
    if wanted == "native" and flags:
        return list(itertools.takewhile(lambda name: LEVELS[name] <= flags, names))
    if wanted in ("native", "all"):
        return ["all"]
    words = [word for word in re.split(r"[;,\s]+", wanted) if word and word != "baseline"]
    for word in words:
        if word not in names:
            raise ValueError(f"DIFFKERN_CPU_LEVELS: expected all, native or some of {' '.join(names)}, got {word!r}")
    return names[: max((names.index(word) + 1 for word in words), default=0)]


def processor_flags() -> set[str]:
    """The instruction sets of this processor, as Linux names them; none on others than x86-64."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def configure(options: dict[str, str], extra: list[str]) -> str:
    """Run CMake; why it failed, or nothing."""
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    command = ["cmake", "-G", GENERATOR, "-S", ROOT, "-B", KERNELS, *arguments, *extra]
    return why_failed(lambda: subprocess.check_call(command))


def forget_other_circumstances(nvcc: str | None) -> None:
    """Remove the folder of the kernels where it was made for other compilers, flags or sources: CMake keeps those."""
    record = KERNELS / "circumstances.json"
    then = json.loads(record.read_text()) if record.exists() else {}
    now = circumstances(nvcc)
    if nvcc is None and "nvcc" in then:  # it is not used this time, but may be the next
        now["nvcc"] = then["nvcc"]
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if (KERNELS / "CMakeCache.txt").exists() and changed:
        print(f"diffkern: building all kernels anew, since something changed: {', '.join(changed)}", flush=True)
        shutil.rmtree(KERNELS)
    KERNELS.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(now, indent=1))


def circumstances(nvcc: str | None) -> dict[str, str]:
    """Return the settings that CMake reads once and caches, or does not see."""
    variables = ("CXXFLAGS", "CUDAFLAGS", "CUDAHOSTCXX", "DIFFKERN_CMAKE_ARGS")
    known = {"source": str(ROOT), "generator": GENERATOR, "CXX": _program(os.environ.get("CXX") or "c++")}
    if nvcc:
        known["nvcc"] = _program(nvcc)
    return known | {name: os.environ[name] for name in variables if os.environ.get(name)}


def _program(command: str) -> str:
    """Which program that is, and its version."""
    words = shlex.split(command)
    version = subprocess.run([*words, "--version"], capture_output=True, text=True, errors="replace").stdout
    return f"{shutil.which(words[0])}\n{version.strip()}"


# --- why a build failed ------------------------------------------------------------------------------------------


def why_failed(build: Callable[[], None]) -> str:
    """Run ``build``; the first error of its output, which is shown too, if it failed, or nothing."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        try:
            with _copied(log):
                build()
        except Exception as error:  # setuptools, torch and subprocess have each their own
            return first_error(log.read_text(errors="replace")) or str(error) or repr(error)
    return ""


@contextlib.contextmanager
def _copied(log: Path) -> Iterator[None]:
    """Keep in ``log`` too what this process and its children print."""
    with subprocess.Popen(["tee", log], stdin=subprocess.PIPE) as tee:
        own = os.dup(1), os.dup(2)
        sys.stdout.flush()
        for descriptor in (1, 2):
            os.dup2(tee.stdin.fileno(), descriptor)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), own, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def first_error(output: str) -> str:
    """The line of a build's output that says what is wrong: the compiler's first error, else CMake's, or nothing."""
    compilers = r"\berror(?: #\d+)?: |\bfatal +: |: (?:undefined reference|multiple definition)|\bld: cannot find "
    if match := re.search(rf"^.*(?:{compilers}).*$", output, re.MULTILINE):
        return match[0].strip()
    if match := re.search(r"^CMake Error.*:\n+(.+(?:\n +\S.*)*)|^CMake Error: (.+)$", output, re.MULTILINE):
        return " ".join((match[1] or match[2]).split())
    return ""
