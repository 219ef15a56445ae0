"""Builds diffkern._C: CMake makes the kernels, torch's BuildExtension the files that know torch.

csrc/setup/ names the variables that choose what is built.
"""

import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent / "csrc" / "setup"))
import build_backend  # noqa: E402
import build_kernels  # noqa: E402

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ModuleNotFoundError:  # enough for metadata and an sdist
    from setuptools import Extension as CppExtension
    from setuptools.command.build_ext import build_ext as BuildExtension

if sys.platform == "win32":
    raise SystemExit("diffkern: expected Linux, got Windows, where it neither builds nor runs: use WSL")

ROOT, BUILD = build_kernels.ROOT, build_kernels.BUILD
BINDINGS = "csrc/bindings/*.cpp", "csrc/ops/*/bind.cpp"  # an op beside its kernels
STABLE_ABI = "0x{:02x}{:02x}{:012x}".format(*build_backend.OLDEST, 0)  # the oldest torch that can load the module


class BuildKernels(BuildExtension):
    """Builds the kernels first, then the binding, linked against them."""

    def run(self) -> None:
        build_kernels.check()
        self.for_this_machine = self.inplace or self.editable_mode  # setuptools hides the former while it builds
        super().run()

    def build_extensions(self) -> None:
        import pybind11

        torch = build_backend.target_torch()
        built = build_kernels.build(
            default="native" if self.for_this_machine else "all",
            torch_has_cuda=torch and bool(torch.cuda),
        )
        (extension,) = self.extensions
        extension.depends += extension.sources
        extension.sources = unity_sources(extension.sources)
        extension.include_dirs.append(pybind11.get_include())
        extension.extra_objects = [built["library"]]
        extension.depends += [built["library"], str(build_kernels.KERNELS / "build-info.json")]
        for name in ("cuda_architectures", "cuda_left_out"):
            extension.define_macros.append((f"DIFFKERN_{name.upper()}", quoted(built[name])))
        if built["cuda_architectures"]:
            extension.define_macros.append(("DIFFKERN_CUDA", None))
            extension.library_dirs += built["cuda_library_dirs"].split(";")
            extension.extra_link_args += ["-lcudart_static", "-lpthread", "-ldl", "-lrt"]
        if reason := build_kernels.why_failed(super().build_extensions):
            raise SystemExit(f"diffkern: the binding did not compile: {reason}")


def unity_sources(sources: list[str]) -> list[str]:
    """Write two files that include the sources, of the ops and of the module: headers are most of what is compiled."""
    files = {name: BUILD / "bindings" / f"{name}.cpp" for name in ("ops", "module")}
    includes: dict[str, list[str]] = {name: [] for name in files}
    for source in sources:
        path = ROOT / source
        name = "module" if "pybind11" in path.read_text() else "ops"
        includes[name].append(f'#include "{path}"\n')
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(includes[name])
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
    return [str(file) for file in files.values()]


def quoted(text: str) -> str:
    """A string literal of C++ that goes through a shell and Ninja unharmed."""
    plain = text.replace('"', "'").replace("\\", "/").replace("$", "").encode("ascii", "replace").decode()
    return f'"{plain}"'


options = {"build": {"build_base": str(BUILD)}}
if BUILD != ROOT / "build":  # the source may be read-only: nothing is written there
    BUILD.mkdir(parents=True, exist_ok=True)
    options["egg_info"] = {"egg_base": str(BUILD)}

setup(
    install_requires=[build_backend.torch_requirement(), "numpy", "safetensors", "tqdm", "pillow>=10.1"],
    ext_modules=[
        CppExtension(
            "diffkern._C",
            sorted(str(path.relative_to(ROOT)) for folder in BINDINGS for path in ROOT.glob(folder)),
            include_dirs=[str(ROOT / "csrc")],
            depends=sorted(str(header.relative_to(ROOT)) for header in ROOT.glob("csrc/**/*.h")),
            define_macros=[("TORCH_TARGET_VERSION", STABLE_ABI)],
            extra_compile_args=["-std=c++20", "-O2", "-g0", "-fvisibility=hidden", "-Wall"],
            extra_link_args=["-Wl,--exclude-libs,ALL"] if sys.platform == "linux" else [],
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options=options,
)
