"""Learned diagonal and full covariances of the reverse step, on Gaussian data whose reverse step is known."""

import math

import numpy as np
import pytest
import torch
from gaussian import Normal
from torch.distributions import MultivariateNormal, kl_divergence

from diffkern import Guidance, Model, Schedule, covariance, nll, ops, sample
from diffkern.likelihood.bound import Bound
from diffkern.ops.diffusion_loss import composite
from diffkern.samplers import SAMPLERS, SPREAD, Sampler
from diffkern.training.objectives import Objective

# A variance of 1.5 takes the best one of a step beyond that of the forward step: no interpolation reaches it.
COVARIANCE = np.array([[1.5, 0.6, -0.2], [0.6, 0.5, 0.1], [-0.2, 0.1, 0.3]])
DATA = Normal(np.array([0.3, -0.2, 0.1]), COVARIANCE)
D = len(COVARIANCE)
SCHEDULE = Schedule.linear(1000).respace(12)
ROOT = torch.from_numpy(np.linalg.cholesky(COVARIANCE))
float64 = dict(dtype=torch.float64, device="cpu")


def best_covariances(schedule: Schedule) -> torch.Tensor:
    """The covariances of q(x_{t-1} | x_t), a normal: the posterior's and c1^2 Cov(x_0 | x_t), float64 [T, D, D]."""
    alpha_bar, noise = (table[:, None].numpy() for table in (schedule.alpha_bar, schedule.one_minus_alpha_bar))
    left = DATA.variances * noise / (alpha_bar * DATA.variances + noise)
    values = schedule.posterior_variance[:, None] + schedule.posterior_x0[:, None] ** 2 * torch.from_numpy(left)
    axes = torch.from_numpy(DATA.axes)
    return axes * values[:, None] @ axes.T


def exact_network(schedule: Schedule, variance: str):
    """The network that tells x0_hat, and the best covariance of that kind."""
    best, large = best_covariances(schedule), schedule.betas
    factors = torch.linalg.cholesky(best)
    lower = torch.tril_indices(D, D, -1)
    if variance == "full":
        variances = factors.diagonal(dim1=1, dim2=2).square()
        below = (factors / factors.diagonal(dim1=1, dim2=2)[:, :, None])[:, lower[0], lower[1]]
    else:
        variances, below = best.diagonal(dim1=1, dim2=2), torch.zeros(schedule.T, 0, **float64)
    told = torch.cat(((variances / large[:, None]).log() + 1, below), 1)

    def network(x, t, labels):
        x0_hat = DATA.denoise(x.double().numpy(), schedule.point(t[0].item()))  # all of a batch have one t
        return torch.cat((torch.from_numpy(x0_hat), told[t]), 1)

    return network


@pytest.fixture
def expectation(monkeypatch):
    """x_0 and seeds of some samples: the mean of a quadratic term over them is its expectation over x_0 and eps."""
    corners = torch.cat((torch.eye(2 * D, **float64), -torch.eye(2 * D, **float64))) * math.sqrt(2 * D)

    def noise(seeds, shape, **address):
        return corners[seeds, D:]

    def q_sample(x_0, t, seeds, table):
        alpha, sigma = (column[t][:, None].sqrt() for column in (SCHEDULE.alpha_bar, SCHEDULE.one_minus_alpha_bar))
        return alpha * x_0 + sigma * corners[seeds, D:]

    def with_noise(function):
        return lambda *arguments, **options: function(*arguments, noise=noise, **options)

    monkeypatch.setattr(ops, "q_sample", q_sample)
    monkeypatch.setattr(ops, "diffusion_loss", with_noise(composite))
    monkeypatch.setattr(covariance, "bound", with_noise(covariance.bound))
    return torch.from_numpy(DATA.mean) + corners[:, :D] @ ROOT.T, torch.arange(4 * D)


def expected_bits(variance: str, expectation) -> float:
    x_0, seeds = expectation
    network = exact_network(SCHEDULE, variance)
    bound = Bound.of(Model(network, SCHEDULE, "x0", (D,)), None, None, variance, False)
    prior, t, data, _ = bound.terms(lambda x, t: network(x, t, None), x_0, seeds, lambda: None)
    return (prior + t.sum(1) + data).mean().item()


def test_the_bound_with_the_best_full_covariance_is_exact(expectation):
    """It is the entropy of the data, and how far q(x_T) is from the prior: no step of the chain loses anything."""
    entropy = MultivariateNormal(torch.from_numpy(DATA.mean), torch.from_numpy(COVARIANCE)).entropy()
    last, noise = SCHEDULE.alpha_bar[-1], SCHEDULE.one_minus_alpha_bar[-1]
    at_T = MultivariateNormal(
        last.sqrt() * torch.from_numpy(DATA.mean), last * torch.from_numpy(COVARIANCE) + noise * torch.eye(D)
    )
    prior = MultivariateNormal(torch.zeros(D, **float64), torch.eye(D, **float64))
    exact = ((entropy + kl_divergence(at_T, prior)) / (D * math.log(2))).item()
    assert expected_bits("full", expectation) == pytest.approx(exact, abs=2e-6)


def test_the_best_diagonal_covariance_loses_what_the_dimensions_share(expectation):
    best = best_covariances(SCHEDULE)
    lost = best.diagonal(dim1=1, dim2=2).log().sum(1) - torch.linalg.slogdet(best).logabsdet
    lost = lost.sum().item() / (2 * D * math.log(2))
    full, diagonal = (expected_bits(variance, expectation) for variance in ("full", "diagonal"))
    assert diagonal - full == pytest.approx(lost, abs=3e-6) and lost > 0.05


def outputs(n: int = 7, dimensions: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(n, covariance.channels((dimensions,)), generator=generator)
    return out, torch.rand(n, dimensions, generator=generator) * 2 - 1


def table(variance: str = "full") -> torch.Tensor:
    return Objective("v").table(SCHEDULE, variance=variance, first="density")


STEPS = torch.tensor([0, 1, 5, 11, 0, 3, 7])
SEEDS = torch.arange(7)


@pytest.mark.parametrize("clip", [True, False])
def test_a_term_is_the_divergence_of_two_normals_of_torch(clip):
    out, x_0 = outputs()
    found = covariance.bound(out, x_0, SEEDS, STEPS, table(), clip=clip)
    out, x_0 = out.double(), x_0.double()
    for n, t in enumerate(STEPS.tolist()):
        alpha, sigma = SCHEDULE.alpha_bar[t].sqrt(), SCHEDULE.one_minus_alpha_bar[t].sqrt()
        x_t = alpha * x_0[n] + sigma * ops.noise(SEEDS[n : n + 1], (D,), step=t, stream=2)[0].double()
        x0_hat = alpha * x_t - sigma * out[n, :D]
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        std = (SCHEDULE.betas[t] * (out[n, D : 2 * D] - 1).exp()).sqrt()
        C = torch.eye(D, **float64)
        C[1, 0], C[2, 0], C[2, 1] = out[n, 2 * D :]
        c1, c2, posterior = SCHEDULE.posterior_x0[t], SCHEDULE.posterior_xt[t], SCHEDULE.posterior_variance[t]
        p = MultivariateNormal(c1 * x0_hat + c2 * x_t, scale_tril=std[:, None] * C)
        if t:
            q = MultivariateNormal(c1 * x_0[n] + c2 * x_t, posterior * torch.eye(D, **float64))
            nats = kl_divergence(q, p)
        else:
            nats = -p.log_prob(x_0[n])
        assert found[n].item() == pytest.approx(nats.item() / (D * math.log(2)), rel=2e-5)


def test_without_correlations_a_full_covariance_is_a_diagonal_one():
    out, x_0 = outputs()
    out[:, 2 * D :] = 0
    options = dict(learned_variance=True, bound=True, address=9, clip=True)
    one = ops.diffusion_loss(out[:, : 2 * D].contiguous(), x_0, SEEDS, STEPS, table("diagonal"), **options)[:, 1]
    other = covariance.bound(out, x_0, SEEDS, STEPS, table(), address=9, clip=True)
    torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-6)
    assert other.dtype == torch.float32


def test_the_bound_has_the_gradient_of_its_differences():
    out, x_0 = outputs()
    out = (out.double() / 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda o: covariance.bound(o, x_0, SEEDS, STEPS, table()), out)


def network_of(channels: int):
    weights = torch.randn(D, channels, generator=torch.Generator().manual_seed(3)) / 2
    return lambda x, t, labels: torch.tanh(x @ weights + t[:, None] / 1000 + (0 if labels is None else labels[:, None]))


@pytest.mark.parametrize("noise", ["step", "path"])
@pytest.mark.parametrize("variance", ["diagonal", "full"])
def test_samples_are_those_of_the_chain_written_out(variance, noise):
    """With guidance: the covariance is that of the output with its condition."""
    schedule, steps, seeds = Schedule.linear(1000), [990, 600, 200, 10], torch.arange(5)
    channels = covariance.channels((D,)) if variance == "full" else 2 * D
    network = network_of(channels)
    model = Model(network, schedule, "v", (D,), classes=("a", "b"), variance=variance)
    options = dict(labels=1, guidance=Guidance(1.5), noise=noise, clip=False)
    found = sample(model, seeds=seeds, sampler="ddpm", steps=steps, progress=False, batch_size=3, **options)

    program = SAMPLERS["ddpm"].trace(schedule.grid(steps, path=noise == "path"), "v", variance=variance)
    addresses = program.addresses().tolist()
    x = ops.noise(seeds, (D,), step=0, stream=0).double()
    for (s, t), (address, count) in zip(program.grid.steps, addresses, strict=True):
        given, null = (network(x.float(), torch.full((5,), int(s.time)), torch.full((5,), c)).double() for c in (1, -1))
        v = null[:, :D] + 1.5 * (given - null)[:, :D]
        x0_hat, removed = s.alpha * x - s.sigma * v, schedule.removed(s, t)
        z = sum(ops.noise(seeds, (D,), step=address - i, stream=1).double() for i in range(count)) / math.sqrt(count)
        if variance == "full":
            C = torch.eye(D, **float64).repeat(5, 1, 1)
            C[:, 1, 0], C[:, 2, 0], C[:, 2, 1] = given[:, 2 * D :].T
            z = (C @ z[..., None])[..., 0]
        std = s.sigma * math.sqrt(removed) * ((given[:, D : 2 * D] - 1) / 2).exp()
        x = x0_hat * t.alpha * removed + x * (s.alpha / t.alpha * (t.sigma / s.sigma) ** 2) + std * z
    torch.testing.assert_close(found.double(), x, rtol=1e-5, atol=1e-5)


def test_the_best_full_covariance_draws_the_data_s_own():
    model = Model(exact_network(SCHEDULE, "full"), SCHEDULE, "x0", (D,), variance="full")
    drawn = sample(model, 2000, clip=False, progress=False, batch_size=2000).double()
    error = drawn.T.cov() - torch.from_numpy(COVARIANCE)
    assert error.abs().max() < 5 * 1.5 * math.sqrt(2 / 2000)
    whitened = torch.linalg.solve_triangular(ROOT, (drawn - torch.from_numpy(DATA.mean)).T, upper=False)
    assert (whitened.T @ torch.ones(D, **float64)).var().item() == pytest.approx(D, rel=5 * math.sqrt(2 / 2000))


def test_a_network_that_tells_a_covariance_serves_samplers_without_one():
    network = network_of(covariance.channels((D,)))
    arguments = dict(seeds=range(4), steps=5, clip=False, schedule=SCHEDULE, prediction="v", progress=False)
    for variance, channels in (("fixed_small", D), ("diagonal", 2 * D)):
        options = dict(sampler="ddpm", variance=variance, shape=(D,))
        narrow = sample(lambda x, t, labels, c=channels: network(x, t, labels)[:, :c], **arguments, **options)
        assert torch.equal(sample(network, **arguments, **options), narrow)


def test_nll_measures_each_sample_with_its_own_covariance():
    x, seeds = outputs(5)[1], torch.arange(5)
    model = Model(network_of(covariance.channels((D,))), SCHEDULE, "v", (D,), variance="full")
    found = nll(model, x, seeds=seeds, levels=None, batch_size=2, progress=False)
    total = torch.zeros(5, **float64)
    for t in range(SCHEDULE.T):
        x_t = ops.q_sample(x, t, seeds, SCHEDULE.q_table())
        total += covariance.bound(model.network(x_t, torch.full((5,), t), None), x, seeds, t, table()).double()
    alpha_bar, noise = SCHEDULE.alpha_bar[-1], SCHEDULE.one_minus_alpha_bar[-1]
    exact = (alpha_bar * (x.double().square() - 1) - noise.log()).mean(1) / (2 * math.log(2))
    torch.testing.assert_close(found.bits - total, exact, rtol=1e-6, atol=1e-6)


def test_the_two_halves_span_the_same_spread_as_the_table():
    levels = table("diagonal")
    assert torch.allclose(levels[:, 10] - levels[:, 9], torch.tensor(SPREAD))
    torch.testing.assert_close(levels[:, 10].double().exp(), SCHEDULE.betas, rtol=1e-6, atol=0)


def test_a_noise_is_correlated_by_the_call_before_it():
    def noise_first(m, grid):
        x = m.start()
        for s, _ in m.steps():
            x = m(x + m.z(s, log_var=(0.0, 1.0), correlated=True), s)
        return m.program(x)

    with pytest.raises(ValueError, match="^sampler: expected a call of the network before a noise that it correlates"):
        Sampler(noise_first).trace(SCHEDULE.grid(2))


WIDE = dict(schedule=SCHEDULE, prediction="v", progress=False)
NOT_HERE = "variance: expected another one than 'full', which is for samples of shape (D,) with D <= 16, for those of "
BAD = {
    "sample": (
        lambda: sample(network_of(D), 2, shape=(17,), variance="full", sampler="ddpm", **WIDE),
        NOT_HERE + "shape (17,), got 'full'",
    ),
    "image": (lambda: Model(network_of(D), SCHEDULE, "v", (1, 4, 4), variance="full"), NOT_HERE + "shape (1, 4, 4)"),
    "nll": (lambda: nll(network_of(D), torch.zeros(2, 20), variance="full", levels=None, **WIDE), NOT_HERE),
    "levels": (
        lambda: nll(network_of(D), torch.zeros(2, D), variance="full", **WIDE),
        "levels: expected None with variance 'full', got 256",
    ),
    "output": (
        lambda: sample(network_of(2 * D), 2, shape=(D,), variance="full", sampler="ddpm", **WIDE),
        "model: expected an output of shape (2, 9), got (2, 6)",
    ),
    "bound": (
        lambda: covariance.bound(torch.zeros(7, 6), torch.zeros(7, D), SEEDS, STEPS, table()),
        "out: expected shape (7, 9), got (7, 6)",
    ),
    "bins": (
        lambda: covariance.bound(*outputs(), SEEDS, STEPS, Objective("v").table(SCHEDULE, variance="full")),
        "table: expected first='density' with a full covariance, got 'bins'",
    ),
    "short table": (
        lambda: SAMPLERS["ddpm"](Schedule.linear(), [900, 3], "v", "full"),
        "variance: expected one without correlations in a short table, got 'full'",
    ),
    "mean form": (
        lambda: sample(
            network_of(9),
            *(2,),
            **dict(shape=(D,), variance="full", sampler="ddpm", labels=0, **WIDE),
            guidance=Guidance(classifier=lambda x, t, labels: x, form="mean"),
        ),
        "form: expected 'score' with a sampler that draws no independent noise, got 'mean'",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
