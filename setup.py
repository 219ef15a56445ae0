"""Builds diffkern._C: CMake makes the kernels, torch's BuildExtension the files that know torch.

Environment: DIFFKERN_CUDA=OFF leaves the CUDA kernels out, DIFFKERN_CUDA_ARCHITECTURES="80;90" chooses for which cards
they are (default: all), DIFFKERN_CMAKE_ARGS goes to CMake, MAX_JOBS bounds the parallel compilations.
DIFFKERN_CUDART=shared builds diffkern._C_emulated instead, for tests of the CUDA half without a card.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

import build_backend

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:  # enough for metadata and an sdist
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

if sys.platform == "win32":
    raise SystemExit("diffkern: expected Linux, got Windows, where it neither builds nor runs: use WSL")

ROOT = Path(__file__).parent.resolve()
EMULATED = os.environ.get("DIFFKERN_CUDART", "static") == "shared"
KERNELS = (
    ROOT / "build" / ("kernels-emulated" if EMULATED else "kernels")
)  # knows no torch and no Python: every environment's build uses it
STABLE_ABI = "0x{:02x}{:02x}{:012x}".format(*build_backend.OLDEST, 0)  # the oldest torch that can load the module


class BuildKernels(BuildExtension):
    """Builds the kernels first, then the binding, linked against them."""

    def build_extensions(self) -> None:
        import pybind11

        built = build_kernels()
        (extension,) = self.extensions
        extension.include_dirs.append(pybind11.get_include())
        extension.extra_objects = [built["library"]]
        extension.depends += [built["library"], str(KERNELS / "build-info.json")]
        extension.define_macros.append(("DIFFKERN_CUDA_ARCHITECTURES", f'"{built["cuda_architectures"]}"'))
        if built["cuda_architectures"]:
            extension.define_macros.append(("DIFFKERN_CUDA", None))
            extension.library_dirs += built["cuda_library_dirs"].split(";")
            runtime = ["-lcudart"] if EMULATED else ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
            extension.extra_link_args += runtime
        if EMULATED:
            extension.define_macros.append(("DIFFKERN_EMULATED_CUDA", None))
        super().build_extensions()


def build_kernels() -> dict[str, str]:
    """Configure and build by CMake; what CMakeLists.txt says of the result."""
    options = {
        "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),  # an isolated build's is another each time
        "DIFFKERN_CUDA": os.environ.get("DIFFKERN_CUDA", "ON"),
        "DIFFKERN_CUDA_ARCHITECTURES": os.environ.get("DIFFKERN_CUDA_ARCHITECTURES", "all"),
        "DIFFKERN_EMULATED": "ON" if EMULATED else "OFF",
    }
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    arguments += os.environ.get("DIFFKERN_CMAKE_ARGS", "").split()
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    subprocess.check_call(["cmake", "-G", "Ninja", "-S", ROOT, "-B", KERNELS, *arguments])
    subprocess.check_call(["cmake", "--build", KERNELS, *jobs])
    return json.loads((KERNELS / "build-info.json").read_text())


setup(
    install_requires=[build_backend.torch_requirement(), "numpy", "safetensors", "tqdm", "pillow>=10.1"],
    ext_modules=[
        CppExtension(
            "diffkern._C_emulated" if EMULATED else "diffkern._C",
            sorted(str(source.relative_to(ROOT)) for source in ROOT.glob("csrc/bindings/*.cpp")),
            depends=sorted(str(header.relative_to(ROOT)) for header in ROOT.glob("csrc/**/*.h")),
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
