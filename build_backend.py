"""PEP 517 backend: setuptools', with the torch of the environment that the package is being installed into.

pip hides that environment from a build, so that a build that asks for "torch" gets one of its own, which may be another
than the package will run with. ``python -E`` ignores the variable by which pip hides it. Where a torch is found, the
package is built against its headers and keeps it; where there is none, the pinned one is asked for, to build and to
run. The binding keeps to LibTorch's stable ABI: what is built with one torch runs with every later one.
"""

import functools
import importlib.util
import json
import re
import subprocess
import sys
from typing import Any, NamedTuple

from setuptools import build_meta

OLDEST = (2, 10)  # whose stable ABI has all that csrc/bindings uses
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
    print(json.dumps([torch.__version__, path]))
"""


class Torch(NamedTuple):
    version: str
    path: list[str]  # sys.path of its environment


@functools.cache
def target_torch() -> Torch | None:
    """The torch that the package will run with, or None. An older or broken one ends the build, in one line."""
    probe = subprocess.run([sys.executable, "-E", "-c", _PROBE], capture_output=True, text=True)
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


def torch_requirement() -> str:
    return f"torch>={_oldest()}" if target_torch() else f"torch=={PINNED}"


def _is_old(version: str) -> bool:
    """As pip orders versions: 2.10.0a0 comes before 2.10."""
    numbers, preliminary = re.match(r"(\d+\.\d+\.\d+)(a|b|rc|\.dev)?", version).groups()
    major, minor, patch = map(int, numbers.split("."))
    return (major, minor, patch, preliminary is None) < (*OLDEST, 0, True)


def _oldest() -> str:
    return ".".join(map(str, OLDEST))


def _install() -> str:
    return f"run {sys.executable} -m pip install torch=={PINNED}"


# --- the hooks ---------------------------------------------------------------------------------------------------


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [] if target_torch() else [torch_requirement()]


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


def _with_torch(hook):
    """``hook``, able to import the target's torch; what the build brings itself comes first."""

    @functools.wraps(hook)
    def with_torch(*args, **kwargs):
        if torch := target_torch():
            sys.path += [entry for entry in torch.path if entry not in sys.path]
        elif importlib.util.find_spec("torch") is None:
            raise SystemExit(f"diffkern: expected torch to build against, got none: {_install()}")
        return hook(*args, **kwargs)

    return with_torch


prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
build_sdist = build_meta.build_sdist
build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)
