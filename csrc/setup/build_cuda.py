"""Which nvcc builds the CUDA kernels, if any, and for which cards.

The names of architectures are nvcc's: sm_80 is machine code for one, compute_80 is PTX, which the driver compiles for
any later one. Environment:

    DIFFKERN_CUDA                   ON: CUDA kernels or an error; OFF: none; unset: where an nvcc works, but in an
                                    editable install for a torch without CUDA only if architectures are named
    CUDACXX, CUDA_HOME, CUDA_PATH   where nvcc is, before PATH and /usr/local/cuda; CUDAHOSTCXX is its C++ compiler
    DIFFKERN_CUDA_ARCHITECTURES     for which cards, else TORCH_CUDA_ARCH_LIST; an editable build is for those that are
                                    there, without any it is PTX alone; any other build is for all
"""

import contextlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

OLDEST = 75  # the kernels use tensor cores from Turing on
CARDS = (75, 80, 86, 89, 90, 100, 120)
BOARDS = (87, 110)  # Jetson Orin and Thor, which do not run the code of cards; their processor is an aarch64
PORTABLE = ["compute_75", "compute_80"]  # for any card of OLDEST or later; the first start compiles it
GENERATIONS = {  # the names that TORCH_CUDA_ARCH_LIST may have
    "volta": "70",
    "turing": "75",
    "ampere": "80 86",
    "ada": "89",
    "hopper": "90",
    "blackwell": "100 120",
}
CHOICES = ("DIFFKERN_CUDA_ARCHITECTURES", "TORCH_CUDA_ARCH_LIST")  # of these, the first that is set
TRUE, FALSE = ("ON", "1", "TRUE", "YES"), ("OFF", "0", "FALSE", "NO")
SPELLINGS = "architectures of 75 or later as in '80;90', '8.0 8.9+PTX', 'sm_90a', 'compute_80', 'native' or 'all'"

# --- nvcc --------------------------------------------------------------------------------------------------------


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, the first that there is."""
    if compiler := os.environ.get("CUDACXX"):
        if found := shutil.which(compiler):
            return found
        raise ValueError(f"CUDACXX: expected a CUDA compiler, got {compiler!r}, which is no program")
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    folders = [os.path.join(home, "bin") for home in homes] + os.environ.get("PATH", os.defpath).split(os.pathsep)
    return shutil.which("nvcc", path=os.pathsep.join([*folders, "/usr/local/cuda/bin"]))


def complaint(nvcc: str) -> str | None:
    """The line in which that nvcc refuses to compile an empty kernel, or None."""
    host = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
    flags = shlex.split(os.environ.get("CUDAFLAGS", ""))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "empty.cu")
        source.write_text("__global__ void empty() {}\n")
        command = [nvcc, *host, *flags, "-std=c++17", "-c", source, "-o", source.with_suffix(".o")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return f"{nvcc}: {error.strerror}"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"error|fatal|unsupported", line, re.IGNORECASE)]
    return f"{nvcc}: {[*telling, *lines, f'exit status {done.returncode}'][0]}"


def usable_nvcc(wanted: str, torch_has_cuda: bool | None) -> tuple[str | None, str]:
    """(nvcc, "") or (None, why the CUDA kernels are left out).

    ``wanted``: DIFFKERN_CUDA, empty where it is not set. ValueError where the kernels cannot be left out: they were
    asked for, or the torch that they are for has CUDA and an nvcc is there that does not work.
    """
    if wanted.upper() not in ("", *TRUE, *FALSE):
        raise ValueError(f"DIFFKERN_CUDA: expected ON, OFF or nothing, got {wanted!r}")
    if wanted.upper() in FALSE:
        return None, f"DIFFKERN_CUDA={wanted}"
    nvcc = find_nvcc()
    if nvcc is None:
        absent = "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
        if wanted:
            raise ValueError(f"DIFFKERN_CUDA={wanted}: expected a CUDA compiler, got {absent}")
        return None, absent
    reason = complaint(nvcc)
    if reason is None:
        return nvcc, ""
    if wanted or torch_has_cuda:
        raise ValueError(refusal(reason))
    return None, reason


def asked_for() -> bool:
    """Does the environment ask for CUDA kernels, or have a say in them?"""
    return any(os.environ.get(variable, "").strip() for variable in ("DIFFKERN_CUDA", *CHOICES))


def refusal(reason: str) -> str:
    """Return the error that ends the build when nvcc does not work."""
    return f"expected an nvcc that compiles, got {reason}: choose another by CUDACXX, or set DIFFKERN_CUDA=OFF"


def known_architectures(nvcc: str) -> set[int]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return {int(number) for number in re.findall(r"sm_(\d+)", listed)}


# --- cards -------------------------------------------------------------------------------------------------------


def cards() -> list[int]:
    """The architectures of the cards in this machine."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if found := re.findall(r"^(\d+)\.(\d)\s*$", told, re.MULTILINE):
            return sorted({int(major + minor) for major, minor in found})
    with contextlib.suppress(ImportError, RuntimeError):
        import torch

        devices = range(torch.cuda.device_count())
        return sorted({10 * major + minor for major, minor in map(torch.cuda.get_device_capability, devices)})
    return []


def all_architectures(known: set[int], machine: str | None = None) -> list[str]:
    """Return the architectures that this nvcc knows of all that this kind of machine may have."""
    boards = BOARDS if (machine or platform.machine()) == "aarch64" else ()
    return [f"sm_{number}" for number in sorted((*CARDS, *boards)) if number in known]


def native_architectures(known: set[int]) -> list[str]:
    """Return the architectures of this machine's cards, or the nearest that this nvcc knows; PTX without a card."""
    near = {max((n for n in known if n <= card), default=0) for card in cards() if card >= OLDEST}
    exact = [f"sm_{number}" for number in sorted(near) if number >= OLDEST]
    return exact or PORTABLE


def read_architectures(text: str, variable: str, known: set[int]) -> list[str]:
    """The architectures of a text in any usual spelling, sorted, and PTX of the newest: ["sm_80", "compute_80"].

    ValueError for what is no architecture, is older than OLDEST, or is not among those ``known`` by nvcc. A
    TORCH_CUDA_ARCH_LIST may name older ones beside others, since it is not for this package alone.
    """
    found: set[str] = set()
    too_old = []
    for word in filter(None, re.split(r"[;,\s]+", text.strip())):
        for name in _names(word, known):
            if name is None:
                raise ValueError(f"{variable}: expected {SPELLINGS}, got {word!r}")
            if _number(name) < OLDEST:
                too_old.append(word)
            elif _number(name) not in known:
                listed = " ".join(map(str, sorted(known)))
                raise ValueError(f"{variable}: expected architectures that nvcc knows ({listed}), got {word!r}")
            else:
                found.add(name)
    if not found or (too_old and variable != "TORCH_CUDA_ARCH_LIST"):
        raise ValueError(f"{variable}: expected {SPELLINGS}, got {[*too_old, text][0]!r}")
    found.add(f"compute_{max(map(_number, found))}")
    return sorted(found, key=lambda name: (name.startswith("compute"), _number(name), name))


def _names(word: str, known: set[int]) -> list[str | None]:
    """The architectures that a word of the list stands for; [None] for no such word."""
    name, plus, ptx = word.lower().partition("+")
    if plus and ptx != "ptx":
        return [None]
    if name in ("all", "native"):
        return all_architectures(known) if name == "all" else native_architectures(known)
    if name in GENERATIONS:
        numbers = GENERATIONS[name].split()
        return [f"sm_{number}" for number in numbers] + [f"compute_{numbers[-1]}"] * bool(plus)
    match = re.fullmatch(r"(sm_|compute_)?(\d{2,3}|\d{1,2}\.\d)([af]?)(-real|-virtual)?", name)
    if not match or (match[1] and match[4]):
        return [None]
    number = match[2].replace(".", "")
    if match[1] == "compute_" or match[4] == "-virtual":
        return [f"compute_{number}{match[3]}"]
    return [f"sm_{number}{match[3]}"] + [f"compute_{number}"] * bool(plus)


def _number(name: str) -> int:
    return int(re.search(r"\d+", name)[0])


def chosen_architectures(nvcc: str, default: str) -> list[str]:
    """Return the architectures of DIFFKERN_CUDA_ARCHITECTURES, else of TORCH_CUDA_ARCH_LIST, else of the default."""
    known = known_architectures(nvcc)
    for variable in CHOICES:
        if text := os.environ.get(variable, "").strip():
            return read_architectures(text, variable, known)
    return read_architectures(default, "default", known)
