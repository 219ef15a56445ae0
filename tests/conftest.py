"""The setup of all tests: how many threads, CPU levels in processes of their own, and which tests need what."""

import os
import signal
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads leave a busy machine's cores alone
import levels  # noqa: E402
import torch  # noqa: E402
from interpreted import ROOT as ROOT  # noqa: E402
from interpreted import Interpreter, load_interpreter, missing  # noqa: E402

# Small tensors gain nothing by more threads; a test of threads sets its own number and this one again.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // workers)))
# A shell that starts the tests in the background has them ignore Ctrl-C, and the tests of Ctrl-C with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The same examples in every run.
hypothesis.settings.register_profile("diffkern", derandomize=True, deadline=None)
hypothesis.settings.load_profile("diffkern")


@pytest.fixture
def at_every_level() -> Callable[..., dict[str, str]]:
    """:func:`levels.at_every_level`, by processes that all tests with this fixture share."""
    return levels.at_every_level


# --- CUDA: on a card, or interpreted ---


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda-backend",
        choices=("auto", "gpu", "ptxemu"),
        default="auto",
        help="what runs the tests of the CUDA kernels: a card, or the interpreter that DIFFKERN_PTXEMU names",
    )


def cuda_backend(config: pytest.Config) -> tuple[str | None, str]:
    """("gpu" or "ptxemu" or None, why none)."""
    wanted = config.getoption("--cuda-backend")
    if wanted != "ptxemu" and torch.cuda.is_available():
        from diffkern import _C

        return ("gpu", "") if _C.COMPILED_CUDA_ARCHITECTURES else (None, "diffkern was built without CUDA kernels")
    if wanted == "gpu":
        return None, "there is no CUDA device"
    if missing():
        return None, f"there is no CUDA device, and {missing()}"
    return "ptxemu", ""


@pytest.fixture(scope="session")
def cuda(request: pytest.FixtureRequest) -> SimpleNamespace:
    """``ops``: the raw ops (torch.ops.diffkern's, or their interpreted twins); ``device``: where their tensors live;
    ``interpreter``: None on a card."""
    from diffkern import _C  # noqa: F401  registers the ops that the interpreted ones are held against

    if cuda_backend(request.config)[0] == "gpu":
        return SimpleNamespace(ops=torch.ops.diffkern, device=torch.device("cuda"), interpreter=None)
    return SimpleNamespace(ops=load_interpreter().ops, device=torch.device("cpu"), interpreter=load_interpreter())


@pytest.fixture(autouse=True)
def without_complaint(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test of the CUDA kernels if the interpreter complained in it."""
    interpreter = request.node.get_closest_marker("cuda") and request.getfixturevalue("cuda").interpreter
    if not interpreter:
        yield
        return
    interpreter.clear()
    yield
    complaints = [report["text"] for report in interpreter.reports()]
    assert not complaints, "\n".join(complaints)


@pytest.fixture
def interpreter(cuda: SimpleNamespace) -> Interpreter:
    if cuda.interpreter is None:
        pytest.skip("a card tells neither its order nor its counts")
    return cuda.interpreter


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    backend, reason = cuda_backend(config)
    for item in items:
        is_cuda = item.get_closest_marker("cuda") is not None
        if backend is None and is_cuda:
            item.add_marker(pytest.mark.skip(reason=reason))
        if config.pluginmanager.hasplugin("xdist"):
            item.add_marker(pytest.mark.xdist_group(_worker_of(item, is_cuda)))
    items.sort(key=lambda item: "at_every_level" not in item.fixturenames)  # the longest group is not begun last


def _worker_of(item: pytest.Item, is_cuda: bool) -> str:
    """Which tests run in the same process: those of a file, and those that share what is costly to start."""
    if is_cuda:
        return "the interpreter"
    return "the levels" if "at_every_level" in item.fixturenames else item.path.stem


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    ran = sum("cuda" in report.keywords for report in reports if report.when == "call")
    backend, reason = cuda_backend(config)
    where = {None: f"not run: {reason}", "gpu": f"{ran} run on a card", "ptxemu": f"{ran} run, interpreted"}[backend]
    terminalreporter.write_line(f"tests of the CUDA kernels: {where}")
    if absent := [level for level in levels.ALL_LEVELS if level not in levels.LEVELS]:
        terminalreporter.write_line(f"CPU levels not run, which processor or build lack: {', '.join(absent)}")
