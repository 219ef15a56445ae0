"""The build and its packages: only the instructions asked for, against the torch that is there, with all files."""

import importlib.util
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from forks import python
from levels import LEVELS

import diffkern
from diffkern import _C

KERNELS, BACKEND = ROOT / "build" / "kernels", ROOT / "csrc" / "setup"
PYPROJECT = (ROOT / "pyproject.toml").read_text()
on_x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="levels are x86_64's")


def objects(target: str) -> list[Path]:
    found = sorted((KERNELS / "CMakeFiles" / f"diffkern_{target}.dir").rglob("*.o"))
    assert found, f"expected objects in {KERNELS}: run make test, or python setup.py build_ext --inplace"
    return found


def output(*command: str | os.PathLike, **options) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


# --- the kernels ---


def needs(program: str):
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"there is no {program}")


BUILT = json.loads((KERNELS / "build-info.json").read_text())["cpu_levels"].split(";")


def test_the_levels_of_this_processor_are_built():
    sys.path.insert(0, str(BACKEND))
    import build_kernels

    sys.path.remove(str(BACKEND))
    native = build_kernels.chosen_levels("native", build_kernels.processor_flags())
    assert native == ["all"] or {*native, "baseline"} <= set(LEVELS)


@needs("nm")
@pytest.mark.parametrize("level", BUILT)
def test_a_level_shares_no_symbol_with_another(level):
    """The linker keeps one of several weak definitions: perhaps the one with AVX-512, for every processor."""
    defined = re.findall(r"^[0-9a-f]+ (\w) (.*)$", output("nm", "-C", "--defined-only", *objects(level)), re.MULTILINE)
    assert any(f"{level}::conv_bf16(" in name for _, name in defined)
    assert [name for kind, name in defined if kind in "WVu"] == []
    shared = [name for kind, name in defined if kind.isupper() and f"diffkern::cpu::{level}::" not in name]
    assert shared == []


@on_x86
@needs("objdump")
@pytest.mark.parametrize(
    ("level", "beyond"),
    [
        ("baseline", r"%[yz]mm|%xmm(1[6-9]|2\d|3[01])|%k[0-7]|\tv[a-z]"),
        ("avx2", r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]"),
    ],
)
def test_a_level_has_no_instruction_beyond_it(level, beyond):
    if level not in BUILT:
        pytest.skip(f"this build has no {level}")
    code = output("objdump", "-d", "--no-show-raw-insn", *objects(level))
    assert "mulps" in code
    assert [line for line in code.splitlines() if re.search(beyond, line)][:5] == []


@pytest.mark.skipif("sm_" not in _C.COMPILED_CUDA_ARCHITECTURES, reason="built without machine code for any card")
@pytest.mark.parametrize("source", sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/ops/*/cuda*.cu")))
def test_no_cuda_kernel_spills_registers(source):
    """By what ptxas said (-Xptxas -v) of each kernel for each architecture."""
    (found,) = (path for path in objects("cuda") if path.match(f"{source}.o"))
    text = found.with_name(f"{found.name}.ptxas").read_text()
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", text)
    architectures = set(re.findall(r"sm_(\w+)", _C.COMPILED_CUDA_ARCHITECTURES))
    assert {architecture for _, architecture in compiled} == architectures
    for architecture in architectures:
        assert sum(a == architecture for _, a in compiled) == len(compiled) / len(architectures)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(spills) >= len(compiled)
    assert max(int(count) for pair in spills for count in pair) == 0


# --- the backend: which torch? ---


ABSENT = "raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')"


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """``environment(torch)``: the backend, in an environment whose torch is that source."""

    def make(torch: str = ABSENT):
        (tmp_path / "site" / "torch").mkdir(parents=True)
        (tmp_path / "site" / "torch" / "__init__.py").write_text(torch)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        return backend()

    return make


def backend():
    """build_backend, with nothing in its caches."""
    spec = importlib.util.spec_from_file_location("build_backend", BACKEND / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BACKEND))
    spec.loader.exec_module(module)
    sys.path.remove(str(BACKEND))
    return module


def version(text: str, cuda: str | None = None) -> str:
    return f"import types; __version__ = {text!r}; version = types.SimpleNamespace(cuda={cuda!r})"


@pytest.mark.parametrize("torch", ["2.10.0", "2.11.0+cu128", "2.11.0a0+b55", "2.100.0", "3.0.0", "2.13", "main"])
def test_a_torch_that_is_there_is_built_against_and_kept(environment, torch):
    backend = environment(version(torch))
    assert backend.target_torch().version == torch
    assert backend.get_requires_for_build_editable() == backend.get_requires_for_build_wheel() == []
    assert backend.torch_requirement() == "torch>=2.10"


def test_a_build_knows_whether_its_torch_has_cuda(environment):
    assert environment(version("2.13.0", cuda="13.0")).target_torch().cuda == "13.0"


def test_without_a_torch_the_pinned_one_builds_and_runs(environment):
    backend = environment()
    assert backend.target_torch() is None
    assert backend.get_requires_for_build_editable() == backend.get_requires_for_build_wheel() == ["torch==2.13.0"]
    assert backend.torch_requirement() == "torch==2.13.0"


@pytest.mark.parametrize("torch", ["1.13.1", "2.9", "2.10.0a0+b55", "2.10.0rc1", "2.10a0"])
def test_an_older_torch_is_refused_in_one_line(environment, torch):
    backend = environment(version(torch))
    with pytest.raises(SystemExit) as refusal:
        backend.get_requires_for_build_editable()
    assert re.fullmatch(
        rf"diffkern: expected torch 2.10 or later, got {re.escape(torch)}: run \S+ -m pip install torch==2.13.0",
        str(refusal.value),
    )


def test_a_torch_that_does_not_import_is_refused_in_one_line(environment):
    backend = environment("raise ImportError('libcudart.so.13: cannot open shared object file')")
    with pytest.raises(
        SystemExit, match=r"^diffkern: expected a torch that imports, got .*libcudart.*: run \S+ -m pip"
    ):
        backend.build_wheel("nowhere")


@pytest.mark.parametrize("place", ["site-packages", "PYTHONPATH"])
def test_the_torch_is_seen_through_build_isolation(tmp_path, monkeypatch, place):
    """pip's isolation is a sitecustomize on PYTHONPATH, in the place of the user's, that takes site-packages away."""
    venv.create(tmp_path / "venv", symlinks=True)
    own = tmp_path / "venv" / "bin" / "python"
    site = Path(output(own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    folders = {"site-packages": site, "PYTHONPATH": tmp_path / "modules", "isolated": tmp_path / "isolated"}
    for folder, number in ((place, "2.12.0"), ("isolated", "1.0.0")):
        (folders[folder] / "torch").mkdir(parents=True)
        (folders[folder] / "torch" / "__init__.py").write_text(version(number))
    (folders["isolated"] / "sitecustomize.py").write_text(
        "import sys; sys.path = [p for p in sys.path if 'site-' not in p]"
    )
    front_end = f"""
import os, subprocess, sys
os.environ.update(PYTHONPATH={str(folders["isolated"])!r}, PYTHONNOUSERSITE="1", PEP517_BUILD_BACKEND="build_backend")
program = "import sys; sys.path.insert(0, {str(BACKEND)!r}); import build_backend; print(*build_backend.target_torch())"
raise SystemExit(subprocess.call([sys.executable, "-c", program]))
"""
    told = output(own, "-c", front_end, env=os.environ | {"PYTHONPATH": str(folders["PYTHONPATH"])})
    assert told.startswith("2.12.0 ") and str(folders[place]) in told and str(folders["isolated"]) not in told


def test_what_a_torch_prints_when_imported_does_no_harm(environment):
    assert environment("print('hello')\n" + version("2.12.0")).torch_requirement() == "torch>=2.10"


@pytest.fixture
def hooks(monkeypatch):
    """``hooks(backend)``: its hooks end in a list of sys.path, and nothing that a build needs is looked at."""

    def make(backend):
        monkeypatch.setattr(backend, "check_tools", lambda: None)
        monkeypatch.setattr(backend.build_kernels, "check", lambda: None)
        monkeypatch.setattr("setuptools.build_meta.build_wheel", lambda folder: list(sys.path))
        return backend

    return make


def test_a_build_can_import_the_torch_that_it_found(environment, hooks, monkeypatch):
    backend = hooks(environment(version("2.12.0")))
    monkeypatch.setattr(sys, "path", ["/first", *sys.path])
    built = backend.build_wheel("nowhere")
    assert built[0] == "/first" and set(backend.target_torch().path) < set(built)


def test_a_build_without_isolation_and_torch_says_what_to_run(environment, hooks, monkeypatch):
    backend = hooks(environment())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    expected = r"^diffkern: expected torch to build against, got none: run \S+ -m pip install"
    with pytest.raises(SystemExit, match=expected):
        backend.build_wheel("nowhere")


def test_a_build_without_isolation_and_tools_says_what_to_install():
    """In one line: setuptools itself may be what is not there."""
    program = "import sys; sys.path[:0] = ['csrc/setup']; import build_backend as backend"
    command = [sys.executable, "-I", "-S", "-c", f"{program}; backend.prepare_metadata_for_build_wheel('.')"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (needed,) = re.findall(r"^requires = \[(.*)\]", PYPROJECT, re.MULTILINE)
    install = needed.replace('"', "'").replace(",", "")
    lacking = r"diffkern: build tools: expected setuptools>=77, (.*, )?pybind11>=3, got none or older ones"
    assert done.returncode == 1
    assert re.fullmatch(rf"{lacking}: run \S+ -m pip install {re.escape(install)}\n", done.stderr)


@pytest.mark.parametrize(("found", "met"), [("76.1", False), ("77", True), ("77.0.3", True), ("100.0.0", True)])
def test_a_tool_that_is_too_old_is_lacking(environment, monkeypatch, found, met):
    backend = environment()
    monkeypatch.setattr(backend.metadata, "version", lambda name: found)
    assert backend._is_met("setuptools>=77") is met


def test_the_oldest_torch_is_the_same_everywhere(environment):
    backend = environment()
    assert f'torch.__version__ < "{backend._oldest()}"' in (ROOT / "diffkern" / "public.py").read_text()
    assert f"torch=={backend.PINNED}" in (ROOT / "diffkern" / "public.py").read_text()
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= backend.OLDEST


def test_windows_ends_the_build_in_one_line():
    program = f"""
import runpy, sys
import setuptools, torch
sys.platform, sys.path[:0] = "win32", [{str(ROOT)!r}]
runpy.run_path({str(ROOT / "setup.py")!r})
"""
    done = python(program)
    assert done.returncode == 1
    assert done.stderr == "diffkern: expected Linux, got Windows, where it neither builds nor runs: use WSL\n"


# --- import ---


def test_the_package_has_its_public_names_and_no_others():
    names = {
        *("noise", "q_sample", "reverse_step", "noise_loss", "diffusion_loss", "group_norm_silu", "attention"),
        *("Schedule", "VP", "SubVP", "VE", "EDM", "RectifiedFlow"),
        *("UNet", "Model", "load", "save", "optimize", "explain", "torch_ops", "similarity", "vary"),
        *("Cascade", "upscale", "restore"),
        *("sample", "encode", "interpolate", "Run", "Guidance", "PiGDM", "From", "Inpaint", "Quantile", "nll", "Nll"),
    }
    assert set(diffkern.__all__) == names | {"__version__"}
    modules = {module.name for module in pkgutil.iter_modules(diffkern.__path__)} | {"metadata"}
    assert {name for name in vars(diffkern) if not name.startswith("_")} - modules == names - modules


def test_the_version_is_that_of_pyproject():
    (expected,) = re.findall(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)
    try:
        metadata.version("diffkern")
    except metadata.PackageNotFoundError:
        expected = "0+uninstalled"
    assert diffkern.__version__ == expected


def test_importing_the_package_imports_nothing_heavy_but_torch():
    done = python("import sys, diffkern; print(*sorted({name.split('.')[0] for name in sys.modules}))")
    assert done.returncode == 0, done.stderr
    assert {"torch", "numpy", "diffkern"} <= (loaded := set(done.stdout.split()))
    assert loaded & {"PIL", "scipy", "diffusers", "setuptools", "pytest", "pybind11", "matplotlib"} == set()


def last_line(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_an_older_torch_at_import_gives_a_line_that_says_what_to_run():
    program = "import torch; torch.__version__ = torch.torch_version.TorchVersion('2.9.1+cpu'); import diffkern"
    expected = "ImportError: diffkern: expected torch 2.10 or later, got 2.9.1+cpu: run pip install torch==2.13.0"
    assert last_line(python(program)) == expected


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [("None", "import of diffkern._C halted.*"), ("types.ModuleType('_C')", r"operator diffkern::\w+ does not exist")],
    ids=["missing", "older than ops"],
)
def test_kernels_that_are_not_there_give_a_line_that_says_what_to_run(kernels, reason):
    line = last_line(python(f"import sys, types; sys.modules['diffkern._C'] = {kernels}; import diffkern"))
    told = rf"ImportError: diffkern: the kernels are not built, or not anew \({reason}\): run pip install -e \. in .*"
    assert re.fullmatch(told, line)


def test_python_in_the_source_folder_says_that_the_source_hides_the_package(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    for folder in (source, site):
        (folder / "diffkern").mkdir(parents=True)
    for name in ("__init__.py", "public.py", "startup.py", "unbuilt.py"):
        shutil.copy(ROOT / "diffkern" / name, source / "diffkern")
    (site / "torch.py").write_text(version("2.13.0"))
    (source / "setup.py").touch()

    def told() -> str:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source), str(site)])}
        command = [sys.executable, "-c", "import diffkern"]
        return last_line(subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True))

    (site / "diffkern" / "_C.cpython.so").touch()
    assert told() == (
        f"ImportError: diffkern: {source}/diffkern is the source, where nothing is built, and hides the package in "
        f"{site}/diffkern: start Python in another folder, or run pip install -e . in the source"
    )


# --- what is shipped ---


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree, in which nothing is built."""
    copy = tmp_path_factory.mktemp("tree") / "diffkern"
    ignored = shutil.ignore_patterns(".git", ".venv*", "build", "runs", "*.so", "__pycache__", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


def without_torch(tree: Path, program: str) -> str:
    """Run the program in the tree, with the backend and without torch; return what it prints."""
    head = f"""
import sys
sys.path.insert(0, {str(tree / "csrc" / "setup")!r})
sys.modules["torch"] = None
import build_backend
build_backend.target_torch = lambda: None
"""
    return output(sys.executable, "-c", head + program, cwd=tree)


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    return tree.parent / without_torch(tree, "print(build_backend.build_sdist('..'))").splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    """Made around the kernels that are built already."""
    (tree / "setup.cfg").write_text("[build]\nbuild_lib = built\n")
    (tree / "built" / "diffkern").mkdir(parents=True)
    shutil.copy(_C.__file__, tree / "built" / "diffkern")
    arguments = ["setup.py", "build_py", "bdist_wheel", "--skip-build", "--dist-dir", "../wheel"]
    without_torch(tree, f"import runpy; sys.argv = {arguments}; runpy.run_path('setup.py', run_name='__main__')")
    (made,) = (tree.parent / "wheel").glob("diffkern-*.whl")
    return made


def files(*folders: str) -> set[str]:
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in (".pyc", ".so")}


def test_an_sdist_has_all_that_a_build_and_its_tests_need(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = files("csrc", "diffkern", "tests", "benchmarks", "docs") | {
        *("pyproject.toml", "setup.py", "CMakeLists.txt", "Makefile", ".ci/run"),
        *("LICENSE", "README.md"),
    }
    assert needed - names == set()
    assert {name for name in names if name.endswith((".so", ".pyc"))} == set()


def test_every_module_imports_from_a_wheel(wheel, tmp_path):
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    program = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.path.insert(0, {str(tmp_path / 'site')!r})"
    program += """
import importlib, pkgutil
import diffkern
names = [module.name for module in pkgutil.walk_packages(diffkern.__path__, "diffkern.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(diffkern.__file__, *names)
"""
    done = python(program)
    assert done.returncode == 0, done.stderr
    place, *names = done.stdout.split()
    assert Path(place) == tmp_path / "site" / "diffkern" / "__init__.py"
    sources = [path.relative_to(ROOT).with_suffix("").parts for path in (ROOT / "diffkern").rglob("*.py")]
    modules = {".".join(parts).removesuffix(".__init__") for parts in sources}
    assert modules - {"diffkern"} <= set(names)
    with zipfile.ZipFile(wheel) as archive:
        assert files("diffkern") - set(archive.namelist()) == set()


@pytest.mark.slow
def test_a_wheel_of_the_sdist_works_in_an_environment_of_its_own(sdist, tmp_path):
    """Through pip's build isolation, against this environment's torch; installed beside nothing else of ours."""
    env = os.environ | {"DIFFKERN_CUDA": "OFF"}
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    output(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, env=env)
    (wheel,) = tmp_path.glob("diffkern-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (description,) = [archive.read(name).decode() for name in names if name.endswith("/METADATA")]
    assert files("diffkern") - names == set()
    assert "Requires-Dist: torch>=2.10\n" in description
    venv.create(tmp_path / "venv", symlinks=True)
    own = tmp_path / "venv" / "bin" / "python"
    site = Path(output(own, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    shutil.unpack_archive(wheel, site, "zip")
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]))
    report = output(own, "-m", "diffkern", "doctor", cwd=tmp_path)
    assert f"{site}/diffkern\n" in report and report.endswith("all is well\n")
