"""A CUDA graph of a step replays it at each row of the table: nothing that changes is an argument of a launch."""

import pytest
import torch
from levels import rows, values
from torch import nn

from diffkern import noise, sample
from diffkern.schedule import Schedule

pytestmark = pytest.mark.cuda


def test_a_replayed_step_is_the_step_launched_at_each_row(interpreter):
    ops, table, seeds = interpreter.ops, rows(), torch.tensor([3, 4])
    expected, out = (values((2, 3, 5, 7), seed=seed) for seed in (0, 1))
    x, row, drawn = expected.clone(), torch.tensor(0), []
    with interpreter.graph(x, out, table, row, seeds) as replay:
        ops.reverse_step_(x, out, table, row, seeds, None, 1.0, True, False, [], None)
    assert torch.equal(x, expected)  # recorded, not run
    for index in range(len(table)):
        replay()
        row += 1
        ops.reverse_step_(expected, out, table, torch.tensor(index), seeds, None, 1.0, True, False, [], None)
        assert torch.equal(x, expected)
        drawn.append(x.clone())
    assert not torch.equal(drawn[0], drawn[1])


def test_replayed_noise_is_that_of_the_step_in_memory(interpreter):
    seeds, step = torch.tensor([3, 4]), torch.tensor(0)
    with interpreter.graph(seeds, step) as replay:
        z = interpreter.ops.noise(seeds, [3, 5, 7], step, 1, torch.float32)
    for t in (0, 7, 999):
        step.fill_(t)
        replay(z)
        assert torch.equal(z, noise(seeds, (3, 5, 7), step=t, stream=1))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x_t, t, labels):
        return self.conv(x_t) * (t.float() / 1000).cos()[:, None, None, None]


if torch.cuda.is_available():  # torch captures graphs on a card only

    def test_sampling_by_a_graph_is_sampling(cuda):
        options = dict(
            schedule=Schedule.linear(), prediction="eps", shape=(3, 8, 8), steps=20, batch_size=2, progress=False
        )
        network = Network().to(cuda.device)
        for sampler in ("ddpm", "ddim"):
            by_graph = sample(network, 5, sampler=sampler, cuda_graph=True, **options)
            assert torch.equal(by_graph, sample(network, 5, sampler=sampler, **options))
