"""Builds diffkern._C: CMake makes the kernels, torch's BuildExtension the one file that knows torch."""

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest that the built module can be loaded by


class BuildKernels(BuildExtension):
    """Builds the kernels first, then the binding, linked against them."""

    def build_extensions(self) -> None:
        build = Path(self.build_temp).resolve() / "kernels"
        options = os.environ.get("DIFFKERN_CMAKE_ARGS", "").split()
        if "DIFFKERN_CUDA" in os.environ:
            options.append(f"-DDIFFKERN_CUDA={os.environ['DIFFKERN_CUDA']}")
        subprocess.check_call(["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, *options])
        jobs = [] if "MAX_JOBS" not in os.environ else ["-j", os.environ["MAX_JOBS"]]
        subprocess.check_call(["cmake", "--build", build, *jobs])

        nvcc, architectures, library_dirs = (build / "build-info.txt").read_text().splitlines()[:3]
        (extension,) = self.extensions
        library = build / "libdiffkern_kernels.a"
        extension.extra_objects = [str(library)]
        extension.depends = [str(library)]
        extension.define_macros.append(("DIFFKERN_CUDA_ARCHITECTURES", f'"{architectures}"'))
        if nvcc:
            extension.define_macros.append(("DIFFKERN_CUDA", None))
            extension.library_dirs += library_dirs.split(";")
            extension.extra_link_args += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "diffkern._C",
            ["csrc/bindings.cpp"],
            include_dirs=[pybind11.get_include()],
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=["-std=c++20", "-O2", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
