"""PEP 517 backend: setuptools', with the torch of the environment that the package is being installed into.

pip hides that environment from a build, so that a build that asks for "torch" gets one of its own, which may be another
than the package will run with. The search for it leaves out the variables by which pip hides it. If a torch is found,
the package is built against its headers and keeps it; if there is none, the pinned one is asked for, to build and to
run. The binding keeps to LibTorch's stable ABI: a build with one torch runs with every later one.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import build_kernels

OLDEST = (2, 10)  # whose stable ABI has all that the bindings use
PINNED = "2.13.0"

_PROBE = """
import json, sys
path = [entry for entry in sys.path if entry]
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    print("null")
else:
    print(json.dumps([torch.__version__, getattr(torch.version, "cuda", None), path]))
"""


class Torch(NamedTuple):
    version: str
    cuda: str | None  # the version of CUDA that it was built with
    path: list[str]  # sys.path of its environment


@functools.cache
def target_torch() -> Torch | None:
    """The torch that the package will run with, or None. An older or broken one ends the build, in one line."""
    probe = subprocess.run([sys.executable, "-c", _PROBE], env=_user_environment(), capture_output=True, text=True)
    if probe.returncode != 0:
        reason = (probe.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"diffkern: expected a torch that imports, got {reason!r}: {_install()} --force-reinstall")
    found = json.loads(probe.stdout.splitlines()[-1])
    if found is None:
        return None
    torch = Torch(*found)
    if _is_old(torch.version):
        raise SystemExit(f"diffkern: expected torch {_oldest()} or later, got {torch.version}: {_install()}")
    return torch


def _user_environment() -> dict[str, str]:
    """This environment, with the user's variables of Python in the place of those by which pip isolates a build.

    pip has replaced them in its own environment and in this process's. Linux keeps those that pip was started with.
    """
    replaced = ("PYTHONPATH", "PYTHONNOUSERSITE")
    users = dict(os.environ)
    if {"_PYPROJECT_HOOKS_BUILD_BACKEND", "PEP517_BUILD_BACKEND"} & set(os.environ):  # a front end runs this
        started_with = Path(f"/proc/{os.getppid()}/environ")
        entries = os.fsdecode(started_with.read_bytes()).split("\0") if os.access(started_with, os.R_OK) else []
        users = dict(entry.split("=", 1) for entry in entries if "=" in entry)
    kept = {name: value for name, value in os.environ.items() if name not in replaced}
    return kept | {name: users[name] for name in replaced if name in users}


def torch_requirement() -> str:
    return f"torch>={_oldest()}" if target_torch() else f"torch=={PINNED}"


def _is_old(version: str) -> bool:
    """As pip orders versions: 2.10.0a0 comes before 2.10. A version without numbers is somebody's own build."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?(a|b|rc|\.dev)?", version)
    if match is None:
        return False
    major, minor, patch = (int(number or 0) for number in match.groups()[:3])
    return (major, minor, patch, match[4] is None) < (*OLDEST, 0, True)


def _oldest() -> str:
    return ".".join(map(str, OLDEST))


def _install() -> str:
    return f"run {sys.executable} -m pip install torch=={PINNED}"


# --- what a build without isolation lacks ------------------------------------------------------------------------


def check_tools() -> None:
    """End the build in one line where this environment lacks tools that pip's isolation would have brought."""
    text = Path(__file__).parents[2].joinpath("pyproject.toml").read_text()
    needed = re.findall(r'"([^"]+)"', re.search(r"^requires = \[(.*)\]", text, re.MULTILINE)[1])
    if lacking := [requirement for requirement in needed if not _is_met(requirement)]:
        install = f"{sys.executable} -m pip install {' '.join(map(repr, needed))}"
        raise SystemExit(f"diffkern: build tools: expected {', '.join(lacking)}, got none or older ones: run {install}")


def _is_met(requirement: str) -> bool:
    name, _, version = requirement.partition(">=")
    if name in ("cmake", "ninja"):  # any kind of installation; CMakeLists.txt looks at the version
        return shutil.which(name) is not None
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return [int(n) for n in re.findall(r"\d+", found)] >= [int(n) for n in re.findall(r"\d+", version)]


# --- the hooks ---------------------------------------------------------------------------------------------------


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    check_tools()
    return [] if target_torch() else [torch_requirement()]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def _hook(name: str, builds: bool = False):
    """setuptools' hook of that name; one that ``builds`` can import the target's torch, after what the build brings."""

    def hook(*args, **kwargs):
        check_tools()
        if builds:
            build_kernels.check()
            if torch := target_torch():
                sys.path += [entry for entry in torch.path if entry not in sys.path]
            elif importlib.util.find_spec("torch") is None:
                raise SystemExit(f"diffkern: expected torch to build against, got none: {_install()}")
        from setuptools import build_meta  # not at the top: check_tools says it better where there is none

        return getattr(build_meta, name)(*args, **kwargs)

    return hook


prepare_metadata_for_build_wheel = _hook("prepare_metadata_for_build_wheel")
prepare_metadata_for_build_editable = _hook("prepare_metadata_for_build_editable")
build_sdist = _hook("build_sdist")
build_wheel = _hook("build_wheel", builds=True)
build_editable = _hook("build_editable", builds=True)
