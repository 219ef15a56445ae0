"""The changes that docs/how-to.md shows fit this version, and the tests that they add pass with them."""

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT

from diffkern.samplers import SAMPLERS

CHANGE = re.compile(r"```diff\n--- a/(\S+)\n\+\+\+ b/\1\n(.*?)```", re.DOTALL)
PAGE = (ROOT / "docs" / "how-to.md").read_text()


def changes(section: str) -> dict[str, str]:
    """By file: its text with the changes of that section of the page."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)
    found = {path: (ROOT / path).read_text() for path, _ in CHANGE.findall(text)}
    for path, hunks in CHANGE.findall(text):
        for hunk in re.split(r"^@@ .*\n", hunks, flags=re.MULTILINE)[1:]:
            before, after = (
                "".join(line[1:] for line in hunk.splitlines(True) if line[0] in kept) for kept in (" -", " +")
            )
            assert found[path].count(before) == 1, f"{path} has not this once:\n{before}"
            found[path] = found[path].replace(before, after)
    return found


@pytest.fixture
def load(monkeypatch):
    """Load a module from a file, under a name, until the end of the test."""

    def load(name: str, path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, path)
        made = importlib.util.module_from_spec(spec)
        parent, _, child = name.rpartition(".")
        if parent:  # it takes the place of one of the package
            importlib.import_module(name)
            monkeypatch.setattr(sys.modules[parent], child, made)
        monkeypatch.setitem(sys.modules, name, made)
        spec.loader.exec_module(made)
        return made

    before = dict(SAMPLERS)
    yield load
    SAMPLERS.clear()
    SAMPLERS.update(before)


def cases(function: Callable) -> dict[str, dict[str, Any]]:
    """The arguments that a test is called with, of its parametrizations."""
    marks = [mark for mark in getattr(function, "pytestmark", ()) if mark.name == "parametrize"]
    found: list[dict[str, Any]] = [{}]
    for mark in marks:
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
        rows = [row if len(names) > 1 else (row,) for row in mark.args[1]]
        found = [case | dict(zip(names, row, strict=True)) for case in found for row in rows]
    return {re.sub(" at 0x[0-9a-f]+", "", repr(case)): case for case in found}


def added(old: ModuleType, new: ModuleType) -> Iterator[tuple[str, Callable, dict[str, Any]]]:
    """The tests that are new or changed, and the new cases of others."""
    for name, function in vars(new).items():
        if name.startswith("test_"):
            before = getattr(old, name, None)
            same = before is not None and inspect.getsource(before) == inspect.getsource(function)
            known = cases(before) if same else {}
            yield from ((name, function, case) for key, case in cases(function).items() if key not in known)


ADDED = {
    "A sampler": {
        "test_a_program_is_its_sampler_on_other_schedules_too": 2,
        "test_a_solver_converges_with_its_order": 1,
    },
    "A process": {
        "test_alpha_and_sigma_are_those_of_the_papers": 1,
        "test_derivatives_are_those_of_differences": 1,
        "test_the_sde_keeps_the_marginals": 1,
        "test_time_undoes_lambda": 1,
    },
    "A loss": {"test_weights_are_the_papers": 1},
}


@pytest.mark.parametrize("section, tests", ADDED.items(), ids=ADDED)
def test_a_change_is_one_file_and_its_test_and_the_tests_that_it_adds_pass(section, tests, load, tmp_path):
    changed = changes(section)
    (source,) = (path for path in changed if path.startswith("diffkern/"))
    (test,) = (path for path in changed if path.startswith("tests/"))
    assert changed.keys() - {source, test} <= {"docs/systems.md"}
    for path, text in changed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    old = load("before_the_change", ROOT / test)
    load(source.removesuffix(".py").replace("/", "."), tmp_path / source)
    if section == "A process":
        load("diffkern.schedule", ROOT / "diffkern" / "schedule.py")  # which reads the names of processes from files
    new = load("after_the_change", tmp_path / test)
    ran: dict[str, int] = {}
    for name, function, case in added(old, new):
        function(**case)
        ran[name] = ran.get(name, 0) + 1
    assert tests.items() <= ran.items()
