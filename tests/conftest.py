"""What all tests share: how many threads, CPU levels in processes of their own, and which tests need what."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: waiting threads leave a busy machine's cores alone
import torch  # noqa: E402

ROOT = Path(__file__).parents[1]

# Small tensors gain nothing by more threads; a test of threads sets its own number and this one again.
torch.set_num_threads(min(2, os.cpu_count() or 1))
# The same examples in every run.
hypothesis.settings.register_profile("diffkern", derandomize=True, deadline=None)
hypothesis.settings.load_profile("diffkern")


@pytest.fixture
def run_at_level() -> Callable[[str, str], subprocess.CompletedProcess]:
    """``run(level, program)``: Python code in a process whose kernels are those of that CPU level."""

    def run(level: str, program: str) -> subprocess.CompletedProcess:
        environment = os.environ | {"DIFFKERN_CPU_LEVEL": level, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        if "this processor does not have it" in done.stdout + done.stderr:
            pytest.skip(f"this processor has no {level}")
        return done

    return run


# --- CUDA ---


def _why_no_cuda() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    from diffkern import _C

    return None if _C.COMPILED_CUDA_ARCHITECTURES else "diffkern was built without CUDA kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _why_no_cuda()
    for item in items:
        if reason and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter) -> None:
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])]
    ran = sum("cuda" in report.keywords for report in reports)
    reason = _why_no_cuda()
    where = f"not run, {reason}" if reason else f"{ran} run on {torch.cuda.get_device_name()}"
    terminalreporter.write_line(f"tests on a CUDA device: {where}")
