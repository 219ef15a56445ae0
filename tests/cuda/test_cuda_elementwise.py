"""Noise and updates by the CUDA kernels are the CPU's bits."""

import pytest
import torch
from levels import digest
from long_rows import OPERANDS, raw_long_case
from torch import Tensor

pytestmark = pytest.mark.cuda

CPU = torch.ops.diffkern
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# aligned vectors; an odd size; less than a vector; several chunks and a tail
SHAPES = ((3, 8, 8), (3, 7, 5), (1, 1, 1), (2, 40, 33))
N, ROWS = 3, 10


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


def seeds_and_steps() -> tuple[Tensor, Tensor]:
    return torch.tensor([0, -1, 2**62 + 12345]), torch.tensor([0, 5, ROWS - 1])


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    return laid_out_as(layout, torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def laid_out_as(layout: str, x: Tensor) -> Tensor:
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    if layout == "unaligned":  # a step of one element past an aligned start
        return torch.cat([x.flatten(), x.new_zeros(1)]).roll(1)[1:].view(x.shape)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x


def table(history: int = 0) -> Tensor:
    rows = torch.rand(ROWS, 9 + history, generator=torch.Generator().manual_seed(1))
    rows[:, 8] = torch.arange(ROWS) * 100  # t
    rows[-1, 5] = 0  # sigma: the last row adds no noise
    return rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_noise_is_the_cpus(on, shape, dtype):
    seeds, step = seeds_and_steps()
    ours, theirs = on("noise", seeds, list(shape), step, 1, dtype)
    same_bits(*ours, *theirs)


def test_a_million_normals_are_the_cpus(on):
    ours, theirs = on("noise", torch.tensor([31337]), [1 << 20], torch.tensor(999), 0, torch.float32)
    same_bits(*ours, *theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_noising_is_the_cpus(on, shape, dtype, layout):
    seeds, t = seeds_and_steps()
    q_table = torch.rand(ROWS, 2, generator=torch.Generator().manual_seed(2))
    ours, theirs = on("q_sample", random(shape, dtype, 3, layout), t, seeds, q_table, True)
    for a, b in zip(ours, theirs, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned", "transposed"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reverse_step_is_the_cpus(on, dtype, learned, guided, layout):
    for shape in SHAPES:
        seeds, step = seeds_and_steps()
        twice = (2 * shape[0], *shape[1:]) if learned else shape
        x, out, uncond = random(shape, dtype, 3, layout), random(twice, dtype, 4, layout), random(twice, dtype, 5)
        history = [random(shape, dtype, 6), random(shape, dtype, 7, layout)]
        ours, theirs = on(
            "reverse_step", x, out, table(2), step, seeds, uncond if guided else None, 2.5, True, learned, history, True
        )
        for a, b in zip(ours, theirs, strict=True):
            same_bits(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned", "transposed"])
@pytest.mark.parametrize("with_", [(), OPERANDS[:1], OPERANDS[1:2], OPERANDS[2:3], OPERANDS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_by_long_rows_is_the_cpus(on, dtype, with_, layout):
    for shape in SHAPES:
        x, out, table, _, seeds, uncond, *fields = raw_long_case((4, *shape), dtype, 6 if with_ else 0, with_)
        x, out = (laid_out_as(layout, tensor) for tensor in (x, out))
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


def test_one_row_serves_all_samples(on):
    seeds, _ = seeds_and_steps()
    x, out = random((3, 8, 8), torch.float32, 3), random((3, 8, 8), torch.float32, 4)
    ours, theirs = on("reverse_step", x, out, table(), torch.tensor(4), seeds, None, 1.0, False, False, [], False)
    same_bits(ours[0], theirs[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_x0_hat_may_take_the_place_of_the_history(cuda, dtype):
    seeds, step = seeds_and_steps()
    x, out, before = (random((3, 5, 7), dtype, seed).to(cuda.device) for seed in (3, 4, 5))
    arguments = [a.to(cuda.device) for a in (table(1), step, seeds)]
    expected = cuda.ops.reverse_step(x, out, *arguments, None, 1.0, True, False, [before], True)
    cuda.ops.reverse_step_(x, out, *arguments, None, 1.0, True, False, [before], before)
    for ours, theirs in zip((x, before), expected, strict=True):
        same_bits(ours, theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_x_may_lie_in_the_first_half_of_an_output_with_learned_variance(cuda, dtype, layout):
    seeds, step = seeds_and_steps()
    out = random((6, 5, 7), dtype, 4, layout).to(cuda.device)
    arguments = [a.to(cuda.device) for a in (table(), step, seeds)]
    expected, _ = cuda.ops.reverse_step(out[:, :3], out, *arguments, None, 1.0, True, True, [], True)
    rest = out[:, 3:].clone()
    cuda.ops.reverse_step_(out[:, :3], out, *arguments, None, 1.0, True, True, [], None)
    assert torch.equal(out[:, :3], expected) and torch.equal(out[:, 3:], rest)


def test_a_row_outside_the_table_gives_nan_in_its_sample_alone(cuda):
    seeds, _ = seeds_and_steps()
    x, out = random((3, 8, 8), torch.float32, 3), random((3, 8, 8), torch.float32, 4)
    step = torch.tensor([0, ROWS, -1])
    arguments = [a.to(cuda.device) for a in (x, out, table(), step, seeds)]
    x_next, x0_hat = cuda.ops.reverse_step(*arguments, None, 1.0, True, False, [], True)
    for result in (x_next, x0_hat):
        assert result[0].isfinite().all() and result[1:].isnan().all()


def test_a_step_that_is_no_word_gives_nan_in_its_sample_alone(cuda):
    seeds, _ = seeds_and_steps()
    out, step = random((3, 8, 8), torch.float32, 3).to(cuda.device), torch.tensor([2**32 - 1, 2**32, -1])
    seeds, step = seeds.to(cuda.device), step.to(cuda.device)
    z = cuda.ops.noise(seeds, [3, 8, 8], step, 1, torch.float32)
    for result in (z, cuda.ops.noise_loss(out, seeds, step, None)):
        assert result[0].isfinite().all() and result[1:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_noise_loss_and_its_gradient_are_the_cpus(on, shape, dtype):
    seeds, t = seeds_and_steps()
    out, weights, grad = random(shape, dtype, 3), torch.tensor([1.0, 0.5, 2.0]), torch.tensor([1.0, -2.0, 0.25])
    (ours,), (theirs,) = on("noise_loss", out, seeds, t, weights)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-6, atol=1e-7)  # float32 sums in another order
    ours, theirs = on("noise_loss_backward", grad, out, seeds, t, weights)
    same_bits(*ours, *theirs)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_the_cpus(on, shape, dtype, layout):
    (ours,), (theirs,) = on("moments", random(shape, dtype, 3, layout), random(shape, dtype, 4))
    torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-5, atol=1e-4)  # float32 sums in another order


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "unaligned"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q", [0.0, 0.3, 0.995, 1.0])
def test_quantiles_of_predictions_are_the_cpus(on, q, dtype, layout):
    for shape in SHAPES:
        x, out, table, step, _, uncond, *fields = raw_long_case((4, *shape), dtype, 1, OPERANDS)
        x, out = (laid_out_as(layout, tensor) for tensor in (x, out))
        x[1, 0, 0, 0] = torch.nan if shape == SHAPES[0] else 1.0
        (ours,), (theirs,) = on("abs_quantile", x, out, table, step, q, uncond, 1.0, fields[6], True)
        assert digest(ours.cpu()) == digest(theirs)


def test_a_quantile_by_a_row_outside_the_table_is_nan(cuda):
    x, out = random((3, 8, 8), torch.float32, 3).to(cuda.device), random((3, 8, 8), torch.float32, 4).to(cuda.device)
    step = torch.tensor([0, ROWS, -1]).to(cuda.device)
    assert cuda.ops.abs_quantile(x, out, table().to(cuda.device), step, 0.5).isnan().tolist() == [False, True, True]


def test_an_empty_batch_launches_nothing(on):
    empty = torch.empty(0, 3, 8, 8)
    none = torch.empty(0, dtype=torch.int64)
    ours, theirs = on("reverse_step", empty, empty, table(), none, none, None, 1.0, True, False, [], True)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
