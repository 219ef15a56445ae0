"""The installation: its versions, its kernels, and checks against known answers."""

import functools
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _C, __version__, ops, reference
from .engine import optimize
from .networks import UNet
from .networks.defaults import float32_on
from .ops.example import Example, examples_of, modules


def main() -> int:
    """Print it all; the exit status: 0 if every check holds, else 1."""
    print("\n".join(f"{name:<10} {value}" for name, value in facts()))
    print(f"\n{'op':<18}" + "".join(f"{device:<18}" for device in ("cpu", "cuda")))
    for op in examples():
        print(f"{op:<18}{cpu_backend(op):<18}{cuda_backend(op):<18}")
    print("\nself-check")
    failures = 0
    for name, check in checks():
        error = _error(check)
        failures += error is not None
        print(f"  {name:<64} {'ok' if error is None else 'FAILED: ' + error}")
    print(f"\n{'all is well' if failures == 0 else f'broken: {failures} of the checks failed'}")
    return int(failures > 0)


# --- what there is -----------------------------------------------------------------------------------------------


def facts() -> Iterator[tuple[str, str]]:
    yield "diffkern", f"{__version__}, {Path(__file__).parent}"
    yield "Python", f"{platform.python_version()}, {sys.platform} {platform.machine()}"
    yield "torch", f"{torch.__version__}, " + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA")
    yield "compiler", _C.COMPILER
    yield "CPU", f"{_processor()}: level {cpu_level()}, {torch.get_num_threads()} threads"
    yield "CUDA code", " ".join(architectures()) or f"left out: {_C.CUDA_LEFT_OUT}"
    for device in _cuda_devices():
        properties = torch.cuda.get_device_properties(device)
        yield str(device), f"{properties.name}, sm_{properties.major}{properties.minor}"
    if not _cuda_devices():
        yield "devices", "cpu"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def cpu_level() -> str:
    """The instruction set that the kernels run with, or what is wrong with DIFFKERN_CPU_LEVEL."""
    try:
        return _C.cpu_level()
    except ValueError as error:
        return f"? ({error})"


def architectures() -> list[str]:
    """List what the CUDA kernels were compiled to: sm_80 is code for one kind of card, compute_80 PTX for all later."""
    return [name for name in _C.COMPILED_CUDA_ARCHITECTURES.split(";") if name]


@functools.cache
def _cuda_devices() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def cpu_backend(op: str) -> str:
    return "native" if _has_kernel(op, "CPU") else "missing"


def cuda_backend(op: str) -> str:
    if not _has_kernel(op, "CUDA"):
        return "missing"
    if not architectures():
        return "not built"
    return "native" if _cuda_devices() else "native (no card)"


def _has_kernel(op: str, key: str) -> bool:
    """Has the registered op of that name a kernel? One that writes into given memory has ``_out`` in its name."""
    names = [name for name in (op, f"{op}_out") if hasattr(torch.ops.diffkern, name)]
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(f"diffkern::{name}", key) for name in names)


# --- does it work ------------------------------------------------------------------------------------------------

Check = Callable[[], bool]

PHILOX = (  # counter, key, words: Random123's known answers
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
NOISE = (  # step, stream, Random123's words for (0, 0, step, stream) under key 0, their normals
    (0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", "0x1.fb7666p-1 -0x1.d96d5ep-1 -0x1.3c373ep-1 -0x1.eda362p-2"),
    (1, 0, "844515e1 f08d6eaa 0f19c053 83f875f0", "0x1.114d96p+0 -0x1.b38d6ap-2 -0x1.2f19bep+1 -0x1.da1b0ap-3"),
    (0, 1, "2dce73e5 1348e23f fcf8e0ec a287aadb", "0x1.a6b396p+0 0x1.b0f872p-1 -0x1.a23224p-4 -0x1.d9a53cp-4"),
)


def checks() -> Iterator[tuple[str, Check]]:
    """Yield the facts that must hold and their checks, for every device."""
    yield "Philox has Random123's known answers", _philox_is_known
    yield "DIFFKERN_CPU_LEVEL, if set, names a level of this processor", lambda: bool(_C.cpu_level())
    for device in (torch.device("cpu"), *(_cuda_devices() if architectures() else [])):
        yield f"{device}: noise has its known answers", functools.partial(_noise_is_known, device)
        for op, calls in examples().items():
            if _has_kernel(op, device.type.upper()):
                differentiable = hasattr(torch.ops.diffkern, f"{op}_backward")
                exact = all(example.tolerance == 0 for example in calls)
                subject = f"{op} and its gradients" if differentiable else op
                agree = "agree with" if differentiable else "has the bits of" if exact else "agrees with"
                yield f"{device}: {subject} {agree} the reference", functools.partial(_agrees, device, op)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        name = str(dtype).removeprefix("torch.")
        yield f"cpu: optimize in {name} agrees with its network", functools.partial(_optimizes, dtype, tolerance)


def _words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint32)


def _philox_is_known() -> bool:
    return all((reference.philox4x32(_words(c), _words(k)) == _words(expected)).all() for c, k, expected in PHILOX)


def _noise_is_known(device: torch.device) -> bool:
    def normals(step: int, stream: int) -> list[float]:
        return ops.noise(0, (4,), step=step, stream=stream, device=device)[0].tolist()

    return all(normals(step, stream) == [float.fromhex(z) for z in known.split()] for step, stream, _, known in NOISE)


@functools.cache
def examples() -> dict[str, list[Example]]:
    """Return the examples of each op that there is a reference for."""
    files = {op: module for op, module in modules().items() if hasattr(module, "reference")}
    return {op: [example for example in examples_of(module) if example.op == op] for op, module in files.items()}


def _agrees(device: torch.device, op: str) -> bool:
    """Are the results those of the reference, and in float32 the gradients, if the kernel has them?"""
    return all(_results_agree(device, example) and _gradients_agree(device, example) for example in examples()[op])


def _results_agree(device: torch.device, example: Example) -> bool:
    got = _called(getattr(ops, example.op), _moved(example.arguments, device))
    expected = _called(getattr(reference, example.op), example.arguments)
    return all(_close(*results, example.tolerance) for results in zip(got, expected, strict=True))


def _gradients_agree(device: torch.device, example: Example) -> bool:
    names = [name for name in example.differentiable if isinstance(example.arguments.get(name), Tensor)]
    single = all(example.arguments[name].dtype == torch.float32 for name in names)
    if not (names and single and hasattr(torch.ops.diffkern, f"{example.op}_backward")):
        return True
    gradients = []
    for function, there in ((getattr(ops, example.op), device), (getattr(reference, example.op), torch.device("cpu"))):
        leaves = {name: example.arguments[name].to(there).detach().requires_grad_() for name in names}
        y = function(**_moved(example.arguments, there) | leaves)
        gradients.append([gradient.cpu() for gradient in torch.autograd.grad(y.square().mean(), [*leaves.values()])])
    return all(_near(got, expected, 1e-4) for got, expected in zip(*gradients, strict=True))


def _moved(value: Any, device: torch.device) -> Any:
    """The same with each tensor on the device."""
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, device) for one in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _called(function: Callable, arguments: dict[str, Any]) -> list[Tensor]:
    results = function(**arguments)
    return [tensor.cpu() for tensor in (results if isinstance(results, tuple) else (results,))]


def _close(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    return got.dtype == expected.dtype and torch.allclose(got, expected, rtol=tolerance, atol=tolerance)


def _optimizes(dtype: torch.dtype, tolerance: float) -> bool:
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.default_generator.manual_seed(0)
        network = UNet(1, channels=32, channel_mult=(1, 2), blocks=1, groups=8, num_classes=2)
        network.eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim > 1:  # some of them start at zero, and would hide what comes before
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        x_t, t, labels = _normal((2, 1, 16, 16), torch.default_generator), _int64(999, 0), _int64(1, -1)
    return _near(optimize(network, dtype=dtype)(x_t, t, labels), network(x_t, t, labels), tolerance)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _int64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def _near(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Within ``tolerance`` of the largest value."""
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def _error(check: Check) -> str | None:
    """None where the check holds; a check that raises has failed too."""
    try:
        return None if check() else "another result"
    except Exception as error:  # whatever it is, it belongs into the report
        return str(error).strip().partition("\n")[0] or type(error).__name__
