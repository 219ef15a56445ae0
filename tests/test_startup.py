"""The command is told from every other process."""

import sys
from pathlib import Path

import pytest

from diffkern import startup

BIN = str(Path(sys.executable).parent)
PROCESSES = {  # sys.argv while the package is imported, the options of Python, is it the command?
    "program": ([f"{BIN}/diffkern", "sample"], [f"{BIN}/diffkern", "sample"], True),
    "module": (["-m", "train"], ["-u", "-m", "diffkern", "train"], True),
    "other module": (["-m", "diffkern"], ["-m", "pytest", "diffkern"], False),
    "another program of that name": (["/home/me/diffkern"], ["/home/me/diffkern"], False),
    "an argument that looks like the module": (["train.py", "-m", "diffkern"], ["train.py", "-m", "diffkern"], False),
    "code": (["-c"], ["-c", "import diffkern"], False),
    "prompt": ([""], [], False),
    "embedded": ([], [], False),
}


@pytest.mark.parametrize(("argv", "options", "expected"), PROCESSES.values(), ids=PROCESSES)
def test_only_the_installed_program_and_the_module_are_the_command(monkeypatch, argv, options, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", ["python", *options])
    assert startup.is_command() == expected
