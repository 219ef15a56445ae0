"""The figures of the theory: they are drawn, what trains learns, and numbers are those of the papers."""

import math

import pytest
import torch
from tiny import one_thread  # noqa: F401

from diffkern import nll, sample
from diffkern.show import swiss_roll


def bound(model, x) -> float:
    """In nats."""
    return nll(model, x, levels=None, batch_size=len(x), progress=False).bits.mean().item() * 2 * math.log(2)


@pytest.mark.parametrize("variance", ["diagonal", "full"])
def test_some_steps_lower_the_bound(variance):
    x = swiss_roll.swiss_roll(100, torch.Generator().manual_seed(1))
    first, then = (bound(swiss_roll.train(variance, steps, batch_size=64), x) for steps in (1, 60))
    assert then < first - 0.3


def test_the_example_prints_a_row_for_each_covariance(capsys):
    found = swiss_roll.main(["--steps", "1", "--n", "50"])
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| diagonal", "| full", "| data"]
    assert set(found) == {"diagonal", "full"} and all(map(math.isfinite, found.values()))


@pytest.mark.slow
def test_a_full_covariance_has_the_better_bound_and_samples_lie_on_the_roll():
    x = swiss_roll.swiss_roll(4000, torch.Generator().manual_seed(1))
    gaussian = torch.linalg.slogdet(2 * math.pi * math.e * x.double().T.cov()).logabsdet.item() / 2
    models = {variance: swiss_roll.train(variance, 2000) for variance in ("diagonal", "full")}
    bounds = {variance: bound(model, x) for variance, model in models.items()}
    assert bounds["full"] < bounds["diagonal"] - 0.1 < gaussian - 1.5
    drawn = sample(models["full"], 4000, clip=False, batch_size=4000, progress=False)
    assert swiss_roll.distances(drawn).median() < 2 * swiss_roll.distances(x).median()
