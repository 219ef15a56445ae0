"""What is this installation, and does it work?"""

import functools
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import _C, __version__, ops, reference
from .engine import optimize
from .networks import UNet
from .networks.defaults import float32_on

OPS = ("noise", "q_sample", "reverse_step", "noise_loss", "group_norm_silu", "attention")


def main() -> int:
    """Print it all; the exit status: 0 if every check holds, else 1."""
    print("\n".join(f"{name:<10} {value}" for name, value in facts()))
    print(f"\n{'op':<18}" + "".join(f"{device:<18}" for device in ("cpu", "cuda")))
    for op in OPS:
        print(f"{op:<18}{cpu_backend(op):<18}{cuda_backend(op):<18}")
    print("\nself-check")
    failures = 0
    for name, check in checks():
        error = _error(check)
        failures += error is not None
        print(f"  {name:<60} {'ok' if error is None else 'FAILED: ' + error}")
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
    registered = hasattr(torch.ops.diffkern, op)
    return registered and torch._C._dispatch_has_kernel_for_dispatch_key(f"diffkern::{op}", key)


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
    """What must hold, for every device that there is."""
    yield "Philox has Random123's known answers", _philox_is_known
    yield "DIFFKERN_CPU_LEVEL, if set, names a level of this processor", lambda: bool(_C.cpu_level())
    for device in (torch.device("cpu"), *(_cuda_devices() if architectures() else [])):
        yield f"{device}: noise has its known answers", functools.partial(_noise_is_known, device)
        for op, cases in examples().items():
            what = "agrees with its reference" if op in INEXACT else "has the bits of its reference"
            yield f"{device}: {op} {what}", functools.partial(_agrees, device, op, cases)
    yield "cpu: conv3x3 and its gradients agree with torch's", _convolves
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


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INEXACT = {  # sums, whose order is the kernel's own: relative and absolute tolerance
    "noise_loss": (1e-5, 1e-5, 1e-5),
    "group_norm_silu": (1e-5, 4e-2, 4e-3),
    "attention": (1e-5, 4e-2, 4e-3),
}


@functools.cache
def examples() -> dict[str, list[tuple[list, dict]]]:
    """For each op its arguments, in each of DTYPES: sizes that no vector register divides."""
    cases: dict[str, list[tuple[list, dict]]] = {op: [] for op in OPS}
    generator = torch.Generator().manual_seed(0)
    seeds, t, step = (_int64(*values) for values in ((0, 31337, -1), (999, 0, 500), (0, 1, 2)))
    for dtype in DTYPES:

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return _normal(shape, generator).to(dtype)

        def table(*shape: int) -> Tensor:
            return normal(*shape, dtype=torch.float32)

        x, out = normal(3, 2, 7, 11), normal(3, 4, 7, 11)
        rows = table(3, len(ops.COLUMNS))
        rows[:, ops.COLUMNS.index("t")] = t
        options = dict(out_uncond=out.flip(0), guidance=3.0, learned_variance=True, clip=True)
        cases["noise"].append(([seeds, (2, 7, 11)], dict(step=t, stream=2, dtype=dtype)))
        cases["q_sample"].append(([x, t, seeds, table(1000, 2)], {}))
        cases["reverse_step"].append(([x, out, rows, step, seeds], options))
        cases["noise_loss"].append(([x, seeds, t], {}))
        cases["group_norm_silu"].append(([out, table(4), table(4), 2], dict(residual=out)))
        cases["attention"].append(([normal(2, 3, 35, 16) for _ in "qkv"], {}))
    return cases


def _agrees(device: torch.device, op: str, cases: list[tuple[list, dict]]) -> bool:
    def there(value):
        return value.to(device) if isinstance(value, Tensor) else value

    for (args, options), tolerance in zip(cases, INEXACT.get(op, (0.0, 0.0, 0.0)), strict=True):
        got = getattr(ops, op)(*map(there, args), **{name: there(value) for name, value in options.items()}).cpu()
        expected = getattr(reference, op)(*args, **options)
        if got.dtype != expected.dtype or not torch.allclose(got, expected, rtol=tolerance, atol=tolerance):
            return False
    return True


def _convolves() -> bool:
    generator = torch.Generator().manual_seed(0)
    arguments = [_normal(shape, generator) for shape in ((2, 35, 9, 6), (33, 35, 3, 3), (33,))]
    results = []
    for convolution in (ops.conv3x3, functools.partial(F.conv2d, padding=1)):
        leaves = [tensor.clone().requires_grad_() for tensor in arguments]
        y = convolution(*leaves)
        results.append((y, *torch.autograd.grad(y.square().mean(), leaves)))
    return all(_near(got, expected, 1e-4) for got, expected in zip(*results, strict=True))


def _optimizes(dtype: torch.dtype, tolerance: float) -> bool:
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.manual_seed(0)
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
