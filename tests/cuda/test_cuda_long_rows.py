"""Steps by long rows, and the reductions of a step, by the CUDA kernels are the CPU's."""

import pytest
import torch
from layouts import LAYOUTS
from levels import DTYPES, digest, values
from long_rows import OPERANDS, raw_long_case
from torch import Tensor

from diffkern import ops

pytestmark = pytest.mark.cuda

CPU = torch.ops.diffkern
# aligned vectors; an odd size; less than a vector; several chunks and a tail
SHAPES = ((3, 8, 8), (3, 7, 5), (1, 1, 1), (2, 40, 33))


def same_bits(ours: Tensor, theirs: Tensor) -> None:
    ours = ours.cpu()
    assert ours.shape == theirs.shape and ours.stride() == theirs.stride()
    bits = torch.int32 if ours.dtype == torch.float32 else torch.int16
    torch.testing.assert_close(ours.view(bits), theirs.view(bits), rtol=0, atol=0)


def to_device(cuda, argument):
    if isinstance(argument, Tensor):
        return argument.to(cuda.device)
    return [to_device(cuda, a) for a in argument] if isinstance(argument, list) else argument


@pytest.fixture
def on(cuda):
    """Runs an op on the CPU and by its CUDA kernel, and returns both results, each as a tuple."""

    def run(name: str, *arguments) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        results = (
            getattr(cuda.ops, name)(*(to_device(cuda, a) for a in arguments)),
            getattr(CPU, name)(*arguments),
        )
        return tuple(r if isinstance(r, tuple) else (r,) for r in results)

    return run


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_", [(), OPERANDS[:1], OPERANDS[1:2], OPERANDS[2:3], OPERANDS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_by_long_rows_is_the_cpus(on, dtype, with_, layout):
    for shape in SHAPES:
        x, out, table, _, seeds, uncond, *fields = raw_long_case((4, *shape), dtype, 6 if with_ else 0, with_)
        x, out = (LAYOUTS[layout](tensor) for tensor in (x, out))
        ours, theirs = on("reverse_step", x, out, table, torch.arange(4), seeds, uncond, *fields)
        for a, b in zip(ours, theirs, strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_row_without_a_call_is_the_cpus(on, dtype):
    x, _, *rest = raw_long_case((4, 3, 8, 8), dtype, 2, OPERANDS[1:3])
    ours, theirs = on("reverse_step", x, None, *rest)
    for a, b in zip(ours, theirs, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_may_take_the_place_of_any_slot(cuda, dtype):
    for slot in range(3):
        arguments = [to_device(cuda, a) for a in raw_long_case((4, 3, 5, 7), dtype, 3, OPERANDS[:3])]
        expected = cuda.ops.reverse_step(*arguments)
        x, history = arguments[0], arguments[9]
        cuda.ops.reverse_step_(*arguments[:10], None, *arguments[11:], history[slot])
        for ours, theirs in zip((x, history[slot]), expected, strict=True):
            same_bits(ours, theirs)


@pytest.mark.parametrize("entry", [(-1, 1), (2**32, 1), (5, 0), (5, 7), (5, -1), (2**62, 2**62), None])
def test_noise_without_an_address_gives_nan_in_its_sample_alone(cuda, entry):
    x, out, table, _, seeds, *fields = raw_long_case((4, 3, 8, 8), torch.float32, 0, OPERANDS[2:3])
    if entry is None:
        fields[6] = None
    else:
        fields[6][2] = torch.tensor(entry)
    arguments = [to_device(cuda, a) for a in (x, out, table, torch.tensor([0, 1, 2, 3]), seeds, *fields)]
    x_next, kept = cuda.ops.reverse_step(*arguments)
    assert kept.isfinite().all() and x_next[1].isfinite().all() and x_next[2].isnan().all()
    assert x_next[[0, 3]].isnan().all() if entry is None else x_next[[0, 3]].isfinite().all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_the_cpus(on, shape, dtype, layout):
    (ours,), (theirs,) = on(
        "moments", LAYOUTS[layout](values((3, *shape), dtype, seed=3)), values((3, *shape), dtype, seed=4)
    )
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.0, 0.3, 0.995, 1.0])
def test_quantiles_of_predictions_are_the_cpus(on, q, dtype, layout):
    for shape in SHAPES:
        x, out, table, step, _, uncond, *fields = raw_long_case((4, *shape), dtype, 1, OPERANDS)
        x, out = (LAYOUTS[layout](tensor) for tensor in (x, out))
        x[1, 0, 0, 0] = torch.nan if shape == SHAPES[0] else 1.0
        (ours,), (theirs,) = on("abs_quantile", x, out, table, step, q, uncond, 1.0, fields[6], True)
        assert digest(ours.cpu()) == digest(theirs)


def test_a_quantile_by_a_row_outside_the_table_is_nan(cuda):
    x, out = (values((3, 3, 8, 8), seed=seed).to(cuda.device) for seed in (3, 4))
    table, step = values((10, len(ops.COLUMNS))).to(cuda.device), torch.tensor([0, 10, -1]).to(cuda.device)
    assert cuda.ops.abs_quantile(x, out, table, step, 0.5).isnan().tolist() == [False, True, True]
