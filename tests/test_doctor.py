"""The doctor tells what is there, finds what works to be well, and what does not to be broken."""

import contextlib
import io
import math
import re
from typing import Any

import pytest
import torch
from forks import python

import diffkern
from diffkern import doctor, ops, reference
from diffkern.engine.optimized import Runner


@pytest.fixture
def verdict(capsys):
    """Runs the doctor: (exit status, what it printed)."""

    def run() -> tuple[int, str]:
        return doctor.main(), capsys.readouterr().out

    return run


@pytest.fixture
def but_the_engine(monkeypatch):
    """For faults that the engine has no part in: its checks record networks, which takes longer than all others."""
    monkeypatch.setattr(doctor, "_optimizes", lambda dtype, tolerance: True)


@pytest.fixture(scope="module")
def healthy() -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return doctor.main(), printed.getvalue()


def test_this_installation_is_well(healthy):
    status, text = healthy
    assert status == 0 and text.endswith("all is well\n")
    assert "FAILED" not in text
    for fact in (torch.__version__, diffkern.__version__, f"{torch.get_num_threads()} threads"):
        assert fact in text


def test_every_public_op_is_reported_and_checked(healthy):
    assert {name for name in diffkern.__all__ if hasattr(ops, name)} <= set(doctor.examples())
    _, text = healthy
    for op in doctor.examples():
        assert re.search(rf"^{op} +native ", text, re.MULTILINE)
        assert re.search(rf"^  cpu: {op} .* ok$", text, re.MULTILINE)


@pytest.mark.parametrize("op", doctor.examples())
def test_a_result_that_is_off_is_found(monkeypatch, verdict, but_the_engine, op):
    right, exact = getattr(ops, op), not any(example.tolerance for example in doctor.examples()[op])

    def wrong(*args, **options):
        result = right(*args, **options)
        if not exact:
            return result * 1.1
        return torch.nextafter(result.float(), torch.tensor(torch.inf)).to(result.dtype)  # one bit, where it is float32

    monkeypatch.setattr(ops, op, wrong)
    status, text = verdict()
    assert status == 1
    failed = re.findall(r"^  (.*?) +FAILED: another result$", text, re.MULTILINE)
    assert any(f"cpu: {op} " in name for name in failed)
    assert all(name.startswith(f"cpu: {op} ") for name in failed)
    assert text.endswith(f"broken: {len(failed)} of the checks failed\n")


def test_an_op_that_raises_is_reported_and_the_rest_still_checked(monkeypatch, verdict, but_the_engine):
    def broken(*args, **options):
        raise RuntimeError("x: expected this, got that\nand more")

    monkeypatch.setattr(ops, "q_sample", broken)
    status, text = verdict()
    assert status == 1 and text.count("FAILED") == 1
    assert re.search(r"cpu: q_sample .* FAILED: x: expected this, got that\n", text)


def test_a_wrong_philox_is_found(monkeypatch, verdict, but_the_engine):
    monkeypatch.setattr(reference, "philox4x32", lambda counter, key: counter)
    status, text = verdict()
    assert status == 1 and "Random123's known answers" in text


def test_each_level_is_well(at_every_level):
    printed = at_every_level("from diffkern.doctor import main; assert main() == 0")
    for level, text in printed.items():
        assert f"level {level}, " in text


def test_an_unknown_level_is_named():
    done = python(
        "import os; os.environ['DIFFKERN_CPU_LEVEL'] = 'avx1024'\n"
        "from diffkern.doctor import main; raise SystemExit(main())"
    )
    assert done.returncode == 1
    levels = "baseline, avx2, avx512, avx512_bf16 or avx512_amx"
    assert f"FAILED: DIFFKERN_CPU_LEVEL: expected {levels}, got 'avx1024'" in done.stdout


def test_the_known_noise_is_box_mullers():
    """From Random123's words, in float64."""
    for _, _, words, known in doctor.NOISE:
        w = [int(word, 16) for word in words.split()]
        for i in (0, 2):
            r, phase = math.sqrt(-2 * math.log((w[i] + 0.5) / 2**32)), 2 * math.pi * w[i + 1] / 2**32
            for z, exact in zip(known.split()[i : i + 2], (r * math.cos(phase), r * math.sin(phase)), strict=True):
                assert float.fromhex(z) == pytest.approx(exact, rel=0, abs=1e-6)


@pytest.mark.parametrize(
    ("compiled", "devices", "native"),
    [
        ("", 0, "not built"),
        ("sm_80;compute_80", 0, "native (no card)"),
        ("compute_75;compute_80", 1, "native"),
        ("", 1, "not built"),
    ],
)
def test_cuda_ops_are_native_where_there_is_a_kernel(monkeypatch, compiled, devices, native):
    monkeypatch.setattr(doctor._C, "COMPILED_CUDA_ARCHITECTURES", compiled)
    monkeypatch.setattr(doctor, "_cuda_devices", lambda: [torch.device("cuda", i) for i in range(devices)])
    assert doctor.cuda_backend("noise") == native


@pytest.mark.parametrize(
    ("compiled", "left_out", "fact"),
    [
        ("sm_80;sm_90a;compute_90", "", "sm_80 sm_90a compute_90"),
        ("", "nvcc: unsupported GNU version", "left out: nvcc: unsupported GNU version"),
    ],
)
def test_the_cuda_code_is_told_or_why_there_is_none(monkeypatch, compiled, left_out, fact):
    monkeypatch.setattr(doctor._C, "COMPILED_CUDA_ARCHITECTURES", compiled)
    monkeypatch.setattr(doctor._C, "CUDA_LEFT_OUT", left_out)
    assert dict(doctor.facts())["CUDA code"] == fact


def test_an_op_without_a_kernel_is_missing(monkeypatch):
    assert [doctor.cpu_backend(op) for op in ("noise", "conv2d", "noise_backward")] == ["native", "native", "missing"]
    assert doctor.cuda_backend("noise_backward") == "missing"


def test_a_convolution_with_a_wrong_gradient_is_found(monkeypatch, verdict, but_the_engine):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, weight):
            return weight.clone()

        @staticmethod
        def backward(ctx, gradient):
            return 1.01 * gradient

    right = ops.conv3x3
    monkeypatch.setattr(ops, "conv3x3", lambda x, weight, bias: right(x, Wrong.apply(weight), bias))
    status, text = verdict()
    assert status == 1 and text.count("FAILED") == 1
    assert re.search(r"cpu: conv3x3 and its gradients agree with the reference +FAILED: another result\n", text)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_that_is_off_is_found(monkeypatch, verdict, dtype):
    right = Runner.__call__

    def wrong(self: Runner, *arguments: Any) -> Any:
        out = right(self, *arguments)
        return out if dtype not in str(self.dtype) else out.roll(1, -1)

    monkeypatch.setattr(Runner, "__call__", wrong)
    status, text = verdict()
    assert status == 1 and text.count("FAILED") == 1
    assert re.search(rf"cpu: optimize in {dtype} agrees with its network +FAILED: another result\n", text)
