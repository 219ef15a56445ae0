"""Noise and updates by the CUDA kernels: what they may overlap, and rows and steps that are out of range."""

import pytest
import torch
from layouts import LAYOUTS
from levels import loss_rows
from torch import Tensor

pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, ROWS = 3, 10


def seeds_and_steps() -> tuple[Tensor, Tensor]:
    return torch.tensor([0, -1, 2**62 + 12345]), torch.tensor([0, 5, ROWS - 1])


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](torch.randn(N, *shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def table(history: int = 0) -> Tensor:
    rows = torch.rand(ROWS, 9 + history, generator=torch.Generator().manual_seed(1))
    rows[:, 8] = torch.arange(ROWS) * 100  # t
    rows[-1, 5] = 0  # sigma: the last row adds no noise
    return rows


def test_a_million_normals_are_the_cpus(cuda):
    seeds, step = torch.tensor([31337]), torch.tensor(999)
    z = cuda.ops.noise(seeds.to(cuda.device), [1 << 20], step.to(cuda.device), 0, torch.float32)
    assert torch.equal(z.cpu(), torch.ops.diffkern.noise(seeds, [1 << 20], step, 0, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_x0_hat_may_take_the_place_of_the_history(cuda, dtype):
    seeds, step = seeds_and_steps()
    x, out, before = (random((3, 5, 7), dtype, seed).to(cuda.device) for seed in (3, 4, 5))
    arguments = [a.to(cuda.device) for a in (table(1), step, seeds)]
    expected = cuda.ops.reverse_step(x, out, *arguments, None, 1.0, True, False, [before], True)
    cuda.ops.reverse_step_(x, out, *arguments, None, 1.0, True, False, [before], before)
    for ours, theirs in zip((x, before), expected, strict=True):
        assert torch.equal(ours, theirs)


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
    row, rows = torch.zeros(3, dtype=torch.int64, device=cuda.device), loss_rows(y_x=0).to(cuda.device)
    of_address = cuda.ops.diffusion_loss(out, None, seeds, row, rows, step, None, False, False, True, False)
    for result in (z, cuda.ops.noise_loss(out, seeds, step, None), of_address):
        assert result[0].isfinite().all() and result[1:].isnan().all()


def test_a_loss_outside_its_table_or_without_its_image_is_nan(cuda):
    seeds, _ = seeds_and_steps()
    out, seeds, rows = (tensor.to(cuda.device) for tensor in (random((3, 8, 8), torch.float32, 3), seeds, loss_rows()))
    step = torch.tensor([0, len(rows), -1], device=cuda.device)
    loss = cuda.ops.diffusion_loss(out, out, seeds, step, rows, None, None, False, True, True, False)
    assert loss[0].isfinite().all() and loss[1:].isnan().all()
    loss = cuda.ops.diffusion_loss(out, None, seeds, step[:1], rows, None, None, False, False, True, False)
    assert loss.isnan().all()
