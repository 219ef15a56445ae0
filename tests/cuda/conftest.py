"""What the interpreter saw is part of every test of the CUDA kernels: a complaint fails it."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from interpreted import Interpreter


@pytest.fixture(autouse=True)
def without_complaint(cuda: SimpleNamespace) -> Iterator[None]:
    if cuda.interpreter is None:
        yield
        return
    cuda.interpreter.clear()
    yield
    complaints = [report["text"] for report in cuda.interpreter.reports()]
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def interpreter(cuda: SimpleNamespace) -> Interpreter:
    if cuda.interpreter is None:
        pytest.skip("a card tells neither its order nor its counts")
    return cuda.interpreter
