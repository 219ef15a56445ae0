"""A build's choices and messages: the C++ compiler, the nvcc, the cards, when to begin anew, the first error."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BUILD_FOLDER = ROOT / "csrc" / "setup"
sys.path.insert(0, str(BUILD_FOLDER))
import build_cuda  # noqa: E402
import build_kernels  # noqa: E402

sys.path.pop(0)
KNOWN = {75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}  # by nvcc 13.0


@pytest.fixture(autouse=True)
def without_choices(monkeypatch):
    """The variables that a developer may have set."""
    for name in list(os.environ):
        if name.startswith(("CUDA", "DIFFKERN_", "TORCH_CUDA")) or name in ("CXX", "CXXFLAGS"):
            monkeypatch.delenv(name)


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


LISTS = "printf 'sm_75\\nsm_80\\nsm_90\\n'"
GOOD_NVCC = f'case "$1" in --list-gpu-code) {LISTS};; --version) echo release 13.0;; esac'
BROKEN_NVCC = 'echo "host_config.h:143:2: error: #error -- unsupported GNU version!" >&2; exit 1'


# --- architectures ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", "sm_80 compute_80"),
        ("sm_80", "sm_80 compute_80"),
        ("90a", "sm_90a compute_90"),
        ("9.0a", "sm_90a compute_90"),
        ("80,90", "sm_80 sm_90 compute_90"),
        ("90;80", "sm_80 sm_90 compute_90"),
        (" 8.6 7.5 ", "sm_75 sm_86 compute_86"),
        ("8.9+PTX", "sm_89 compute_89"),
        ("8.0+PTX;9.0", "sm_80 sm_90 compute_80 compute_90"),
        ("80-real;90-virtual", "sm_80 compute_90"),
        ("compute_80", "compute_80"),
        ("10.0;12.0", "sm_100 sm_120 compute_120"),
        ("Ampere;Hopper+PTX", "sm_80 sm_86 sm_90 compute_90"),
    ],
)
def test_architectures_are_read_in_every_usual_spelling(text, expected):
    assert build_cuda.read_architectures(text, "DIFFKERN_CUDA_ARCHITECTURES", KNOWN) == expected.split()


@pytest.mark.parametrize(
    "text", ["8", "sm80", "80+ptx80", "fast", "sm_80-real", "70", "8.0;7.0", "999", ";", "80 -real"]
)
def test_what_is_no_architecture_is_refused_with_what_is_expected(text):
    with pytest.raises(ValueError, match=r"^DIFFKERN_CUDA_ARCHITECTURES: expected architectures .*80.*, got '.*'$"):
        build_cuda.read_architectures(text, "DIFFKERN_CUDA_ARCHITECTURES", KNOWN)


def test_a_list_for_every_torch_extension_may_name_older_cards():
    names = build_cuda.read_architectures("6.0 7.0 7.5 8.0+PTX", "TORCH_CUDA_ARCH_LIST", KNOWN)
    assert names == ["sm_75", "sm_80", "compute_80"]
    with pytest.raises(ValueError, match="TORCH_CUDA_ARCH_LIST: .* got '7.0'"):
        build_cuda.read_architectures("7.0", "TORCH_CUDA_ARCH_LIST", KNOWN)


@pytest.mark.parametrize(
    ("machine", "known", "expected"),
    [
        ("x86_64", KNOWN, "75 80 86 89 90 100 120"),
        ("aarch64", KNOWN, "75 80 86 87 89 90 100 110 120"),
        ("x86_64", {75, 80, 86}, "75 80 86"),
    ],
)
def test_all_architectures_are_those_of_the_machine_that_nvcc_knows(machine, known, expected):
    """Boards with Orin (8.7) or Thor (11.0) have aarch64 processors, and no other machine has them."""
    assert build_cuda.all_architectures(known, machine) == [f"sm_{number}" for number in expected.split()]


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ([], "compute_75 compute_80"),
        ([70], "compute_75 compute_80"),
        ([80, 89], "sm_80 sm_89 compute_89"),
        ([130], "sm_121 compute_121"),
    ],
    ids=["none", "too old", "two", "newer than nvcc"],
)
def test_native_architectures_are_those_of_the_cards_or_ptx_alone(monkeypatch, cards, expected):
    monkeypatch.setattr(build_cuda, "cards", lambda: cards)
    assert build_cuda.read_architectures("native", "default", KNOWN) == expected.split()


ZEN_3, ZEN_4 = {"avx2", "fma", "f16c"}, build_kernels.LEVELS["avx2"] | build_kernels.LEVELS["avx512"] | {"avx512_bf16"}


@pytest.mark.parametrize(
    ("wanted", "flags", "levels"),
    [
        ("all", ZEN_3, "all"),
        ("native", ZEN_3, "avx2"),
        ("native", ZEN_4, "avx2 avx512 avx512_bf16"),
        ("native", ZEN_4 | {"amx_tile", "amx_bf16"}, "avx2 avx512 avx512_bf16 avx512_amx"),
        ("native", {"sse2"}, ""),
        ("native", set(), "all"),
        ("baseline", ZEN_4, ""),
        ("avx512;baseline", ZEN_3, "avx2 avx512"),
    ],
)
def test_the_levels_of_a_build_are_those_asked_for_and_those_before_them(wanted, flags, levels):
    assert build_kernels.chosen_levels(wanted, flags) == levels.split()


def test_a_level_that_is_none_is_named():
    with pytest.raises(ValueError, match="^DIFFKERN_CPU_LEVELS: expected all, native or some of avx2 .*, got 'sse9'$"):
        build_kernels.chosen_levels("avx2 sse9", ZEN_3)


def test_cards_are_asked_of_nvidia_smi(monkeypatch, tmp_path):
    program(tmp_path / "nvidia-smi", "printf '9.0\\n9.0\\n8.9\\n'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert build_cuda.cards() == [89, 90]


def test_the_own_variable_comes_before_torchs_and_torchs_before_the_default(monkeypatch, tmp_path):
    nvcc = str(program(tmp_path / "nvcc", GOOD_NVCC))
    assert build_cuda.chosen_architectures(nvcc, "75") == ["sm_75", "compute_75"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert build_cuda.chosen_architectures(nvcc, "75") == ["sm_80", "compute_80"]
    monkeypatch.setenv("DIFFKERN_CUDA_ARCHITECTURES", "90")
    assert build_cuda.chosen_architectures(nvcc, "75") == ["sm_90", "compute_90"]


# --- nvcc ---


def test_nvcc_is_found_by_cudacxx_then_the_homes_then_path(monkeypatch, tmp_path):
    nvcc = {name: program(tmp_path / name / "bin" / "nvcc", "") for name in ("cxx", "home", "path", "on_path")}
    monkeypatch.setenv("PATH", str(nvcc["on_path"].parent))
    assert build_cuda.find_nvcc() == str(nvcc["on_path"])
    for variable, value, name in (
        ("CUDA_PATH", tmp_path / "path", "path"),
        ("CUDA_HOME", tmp_path / "home", "home"),
        ("CUDACXX", nvcc["cxx"], "cxx"),
    ):
        monkeypatch.setenv(variable, str(value))
        assert build_cuda.find_nvcc() == str(nvcc[name])


def test_a_home_without_nvcc_is_passed_over(monkeypatch, tmp_path):
    nvcc = program(tmp_path / "bin" / "nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(nvcc.parent))
    assert build_cuda.find_nvcc() == str(nvcc)


def test_a_cudacxx_that_is_no_program_is_refused(monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    with pytest.raises(ValueError, match="^CUDACXX: expected a CUDA compiler, got '/nowhere/nvcc'"):
        build_cuda.find_nvcc()


@pytest.mark.parametrize(("wanted", "torch_has_cuda"), [("ON", False), ("", True)], ids=["asked for", "CUDA torch"])
def test_a_broken_nvcc_ends_a_build_that_wants_cuda_with_its_own_line(monkeypatch, tmp_path, wanted, torch_has_cuda):
    monkeypatch.setenv("CUDACXX", str(program(tmp_path / "nvcc", BROKEN_NVCC)))
    with pytest.raises(ValueError, match="unsupported GNU version!: .* DIFFKERN_CUDA=OFF$"):
        build_cuda.usable_nvcc(wanted, torch_has_cuda)


def test_a_broken_nvcc_is_left_out_of_a_build_that_does_not_ask_and_the_reason_is_kept(monkeypatch, tmp_path):
    nvcc = program(tmp_path / "nvcc", BROKEN_NVCC)
    monkeypatch.setenv("CUDACXX", str(nvcc))
    reason = f"{nvcc}: host_config.h:143:2: error: #error -- unsupported GNU version!"
    assert build_cuda.usable_nvcc("", torch_has_cuda=False) == (None, reason)


def test_a_build_without_any_nvcc_leaves_cuda_out_unless_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(build_cuda, "find_nvcc", lambda: None)
    absent = "no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda"
    assert build_cuda.usable_nvcc("", torch_has_cuda=True) == (None, absent)
    with pytest.raises(ValueError, match=f"DIFFKERN_CUDA=ON: expected a CUDA compiler, got {absent}"):
        build_cuda.usable_nvcc("ON", torch_has_cuda=False)


def test_cuda_is_left_out_by_request_before_nvcc_is_looked_for(monkeypatch):
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    for off in ("OFF", "off", "0"):
        assert build_cuda.usable_nvcc(off, torch_has_cuda=True) == (None, f"DIFFKERN_CUDA={off}")
    with pytest.raises(ValueError, match="DIFFKERN_CUDA: expected ON, OFF or nothing, got 'maybe'"):
        build_cuda.usable_nvcc("maybe", torch_has_cuda=False)


def test_a_native_build_for_a_torch_without_cuda_leaves_it_out_unless_a_variable_asks(monkeypatch, tmp_path):
    cmake = program(tmp_path / "bin" / "cmake", "")
    monkeypatch.setenv("PATH", str(cmake.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDACXX", str(program(tmp_path / "nvcc", GOOD_NVCC)))
    monkeypatch.setattr(build_kernels, "KERNELS", tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cmake-info.json").write_text(json.dumps({"cuda_architectures": ""}))
    for variable in ("DIFFKERN_CUDA", *build_cuda.CHOICES):
        monkeypatch.delenv(variable, raising=False)
    assert build_kernels.build("native", torch_has_cuda=False)["cuda_left_out"] == "this torch has no CUDA"
    for default, torch_has_cuda in (("all", False), ("native", None), ("native", True)):
        assert build_kernels.build(default, torch_has_cuda)["cuda_left_out"] == ""
    for variable, value in (("DIFFKERN_CUDA", "ON"), ("DIFFKERN_CUDA_ARCHITECTURES", "80")):
        with monkeypatch.context() as asking:
            asking.setenv(variable, value)
            assert build_kernels.build("native", torch_has_cuda=False)["cuda_left_out"] == ""


# --- a build folder and its circumstances ---


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Path:
    """A configured build folder, with something built in it."""
    monkeypatch.setattr(build_kernels, "KERNELS", tmp_path / "kernels")
    build_kernels.forget_other_circumstances(None)
    for name in ("CMakeCache.txt", "built"):
        (tmp_path / "kernels" / name).touch()
    return tmp_path / "kernels"


def test_the_same_circumstances_keep_what_is_built(folder, capsys):
    build_kernels.forget_other_circumstances(None)
    assert (folder / "built").exists() and capsys.readouterr().out == ""


@pytest.mark.parametrize("changed", ["CXX", "CXXFLAGS", "CUDAFLAGS", "DIFFKERN_CMAKE_ARGS", "source", "generator"])
def test_other_circumstances_begin_anew_and_say_so_in_one_line(monkeypatch, folder, capsys, changed):
    if changed == "source":
        monkeypatch.setattr(build_kernels, "ROOT", Path("/elsewhere"))
    elif changed == "generator":
        monkeypatch.setattr(build_kernels, "GENERATOR", "Unix Makefiles")
    else:
        monkeypatch.setenv(changed, "/bin/echo" if changed == "CXX" else "-g")
    build_kernels.forget_other_circumstances(None)
    assert not (folder / "built").exists()
    assert capsys.readouterr().out == f"diffkern: building all kernels anew, since something changed: {changed}\n"


def test_another_version_of_nvcc_begins_anew_and_a_build_without_it_does_not(folder, tmp_path):
    nvcc = program(tmp_path / "nvcc", "echo release 13.0")
    build_kernels.forget_other_circumstances(str(nvcc))
    (folder / "CMakeCache.txt").touch()
    (folder / "built").touch()
    build_kernels.forget_other_circumstances(None)
    build_kernels.forget_other_circumstances(str(nvcc))
    assert (folder / "built").exists()
    program(nvcc, "echo release 13.1")
    build_kernels.forget_other_circumstances(str(nvcc))
    assert not (folder / "built").exists()


# --- what is said when it fails ---


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (
            "[1/2] c++ -Werror=format -c a.cpp\nFAILED: a.o\na.cpp: In function 'f':\n"
            "a.cpp:3:1: error: 'x' was not declared\nb.cpp:1:1: error: later\nninja: build stopped: subcommand failed.",
            "a.cpp:3:1: error: 'x' was not declared",
        ),
        ("x.cu(7): error: identifier is undefined\n1 error detected", "x.cu(7): error: identifier is undefined"),
        (
            "[1/2]\nnvcc fatal   : Unsupported gpu 'compute_1'\nninja: stop",
            "nvcc fatal   : Unsupported gpu 'compute_1'",
        ),
        ("c++: fatal error: Killed signal\ncompilation terminated.", "c++: fatal error: Killed signal"),
        ("a.o: undefined reference to `f'\ncollect2: error: ld", "a.o: undefined reference to `f'"),
        (
            "CMake Error at CMakeLists.txt:4 (project):\n  The CMAKE_CXX_COMPILER:\n\n    none\n",
            "The CMAKE_CXX_COMPILER:",
        ),
        ("all went well", ""),
    ],
)
def test_the_first_error_of_a_build_is_found(output, line):
    assert build_kernels.first_error(output) == line


def test_a_failing_command_is_shown_and_its_first_error_returned(capfd):
    def fail() -> None:
        print("before", flush=True)
        subprocess.check_call(["sh", "-c", "echo a.cpp:1:1: error: no such thing >&2; exit 3"])

    assert build_kernels.why_failed(fail) == "a.cpp:1:1: error: no such thing"
    assert capfd.readouterr().out == "before\na.cpp:1:1: error: no such thing\n"
    assert build_kernels.why_failed(lambda: None) == ""


def checked(**environment: str) -> subprocess.CompletedProcess:
    program = f"import sys; sys.path.insert(0, {str(BUILD_FOLDER)!r}); import build_kernels; build_kernels.check()"
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def test_a_build_without_a_compiler_says_so_in_its_only_line():
    told = checked(CXX="/nowhere/c++").stderr
    assert told == "diffkern: expected a C++20 compiler, got no '/nowhere/c++': install g++, or set CXX\n"


def test_a_compiler_that_fails_is_quoted(tmp_path):
    compiler = program(tmp_path / "c++", "echo 'c++: error: unrecognized option -std=c++20' >&2; exit 1")
    told = checked(CXX=str(compiler)).stderr
    assert re.fullmatch(r"diffkern: expected a C\+\+20 compiler, got '.*', which says: c\+\+: error: unrec.*\n", told)


def test_a_build_folder_that_cannot_be_written_names_the_variable_for_another():
    told = checked(DIFFKERN_BUILD_DIR="/proc/nowhere").stderr
    expected = "diffkern: expected a build folder that can be written, got /proc/nowhere: "
    assert told.startswith(expected) and told.endswith(": choose another folder by DIFFKERN_BUILD_DIR\n")


def test_a_cmake_argument_may_have_spaces(monkeypatch, tmp_path):
    """They are quoted as in a shell."""
    told = tmp_path / "arguments"
    cmake = program(tmp_path / "bin" / "cmake", f'printf "%s\\n" "$@" >>{told}')
    monkeypatch.setenv("PATH", str(cmake.parent), prepend=os.pathsep)
    monkeypatch.setattr(build_kernels, "KERNELS", tmp_path / "kernels")
    monkeypatch.setenv("DIFFKERN_CUDA", "OFF")
    monkeypatch.setenv("DIFFKERN_CMAKE_ARGS", "-DCMAKE_CXX_FLAGS='-O2 -g' -DX=1")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cmake-info.json").write_text(json.dumps({"cuda_architectures": ""}))
    assert build_kernels.build("all", torch_has_cuda=False)["cuda_left_out"] == "DIFFKERN_CUDA=OFF"
    assert {"-DCMAKE_CXX_FLAGS=-O2 -g", "-DX=1", "-DDIFFKERN_CUDA=OFF"} <= set(told.read_text().splitlines())


def test_an_nvcc_that_cmake_refuses_is_left_out_with_cmakes_reason(monkeypatch, tmp_path):
    refuses = 'case "$*" in *CUDA=ON*) printf "CMake Error at a:1 (b):\\n  No such nvcc.\\n" >&2; exit 1;; esac'
    cmake = program(tmp_path / "bin" / "cmake", refuses)
    monkeypatch.setenv("PATH", str(cmake.parent), prepend=os.pathsep)
    monkeypatch.setenv("CUDACXX", str(program(tmp_path / "nvcc", GOOD_NVCC)))
    monkeypatch.setattr(build_kernels, "KERNELS", tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "cmake-info.json").write_text(json.dumps({"cuda_architectures": ""}))
    assert build_kernels.build("all", torch_has_cuda=False)["cuda_left_out"] == "No such nvcc."
    assert json.loads((tmp_path / "kernels" / "build-info.json").read_text())["cuda_left_out"] == "No such nvcc."
    with pytest.raises(SystemExit, match="^diffkern: expected an nvcc that compiles, got No such nvcc.: "):
        build_kernels.build("all", torch_has_cuda=True)
