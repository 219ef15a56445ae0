"""Bits a dimension of Gaussian data under its exact network, against closed forms; each term against its definition."""

import math
import sys

import numpy as np
import pytest
import torch
from gaussian import Normal
from tiny import model as tiny_model
from tiny import one_thread  # noqa: F401
from torch.distributions import Normal as Distribution
from torch.distributions import kl_divergence

from diffkern import EDM, VE, VP, Model, RectifiedFlow, Schedule, SubVP, nll, ops
from diffkern.codec import Codec
from diffkern.conditions import Condition
from diffkern.likelihood.bound import Bound
from diffkern.likelihood.draws import signs, uniform
from diffkern.likelihood.ode import velocity
from diffkern.ops.diffusion_loss import composite
from diffkern.prediction import head_at, target

MEAN, VARIANCE = 0.3, 0.25
LINEAR = Schedule.linear()
ENTROPY = math.log2(2 * math.pi * math.e * VARIANCE) / 2

# --- the bound: data N(MEAN, VARIANCE) in one dimension ---

BOUNDS = {  # of the linear schedule respaced to N steps, by an independent implementation in float64
    "optimal": {N: 1.047098205623 for N in (5, 10, 20, 50, 1000)},
    "fixed_large": {
        5: 1.280939729742,
        10: 1.182351740253,
        20: 1.120642775561,
        50: 1.077846654232,
        1000: 1.048673996612,
    },
    "fixed_small": {
        5: 1.191535046355,
        10: 1.348469985406,
        20: 1.839575349348,
        50: 2.248947098038,
        1000: 1.869327520367,
    },
}
TERMS = {  # for N = 5: L_T, L_4, ..., L_1, L_0
    "optimal": [
        *(9.898789178671083e-06, 0.00026938479493109464, 0.004498493111425987),
        *(0.03767572143347674, 0.241915730373086, 0.7627289771212115),
    ],
    "fixed_large": [
        *(9.898789178671083e-06, 0.0002698366182369423, 0.004620524378044774),
        *(0.044299158118099424, 0.32555835711565045, 0.9061819547225114),
    ],
    "fixed_small": [
        *(9.898789178671083e-06, 0.00026943510161402877, 0.004512549146671153),
        *(0.03867697163250802, 0.28742286892132557, 0.8606433227638214),
    ],
}


def gain(schedule: Schedule) -> torch.Tensor:
    """x0_hat = MEAN + gain (x_t - alpha MEAN), float64 [T]."""
    alpha, noise = schedule.alpha_bar.sqrt(), schedule.one_minus_alpha_bar
    return alpha * VARIANCE / (schedule.alpha_bar * VARIANCE + noise)


def optimal_variance(schedule: Schedule) -> torch.Tensor:
    """The variance of p(x_{t-1} | x_t): the posterior's, and c1^2 times what is left open about x_0."""
    error = VARIANCE * (1 - gain(schedule) * schedule.alpha_bar.sqrt())
    return schedule.posterior_variance + schedule.posterior_x0.square() * error


def exact_network(schedule: Schedule, prediction: str = "eps"):
    def network(x, t, labels):
        column = lambda table: table[t].view(-1, *[1] * (x.ndim - 1))  # noqa: E731
        alpha, sigma = column(schedule.alpha_bar.sqrt()), column(schedule.one_minus_alpha_bar.sqrt())
        x0 = MEAN + column(gain(schedule)) * (x.double() - alpha * MEAN)
        y_x, y_e = target(prediction, alpha.numpy(), sigma.numpy())
        return torch.as_tensor(y_x) * x0 + torch.as_tensor(y_e) * (x.double() - alpha * x0) / sigma

    return network


@pytest.fixture
def expectation(monkeypatch):
    """x_0 and seeds of four samples: the mean of a quadratic term over them is its expectation over x_0 and eps."""

    def noise(seeds, shape, **address):
        return torch.where(seeds < 2, -1.0, 1.0).double()[:, None]

    def q_sample(x_0, t, seeds, table):
        alpha, sigma = (table[t][:, None] for table in tables)
        return alpha * x_0 + sigma * noise(seeds, (1,))

    def diffusion_loss(out, x_0, *arguments, **options):
        return composite(out, x_0, *arguments, noise=noise, **options)

    def begin(schedule):
        tables[:] = [schedule.alpha_bar.sqrt(), schedule.one_minus_alpha_bar.sqrt()]
        sides = torch.tensor([-1.0, 1.0, -1.0, 1.0], dtype=torch.float64, device="cpu")
        return (MEAN + math.sqrt(VARIANCE) * sides)[:, None], torch.arange(4)

    tables: list[torch.Tensor] = []
    monkeypatch.setattr(ops, "q_sample", q_sample)
    monkeypatch.setattr(ops, "diffusion_loss", diffusion_loss)
    return begin


def expected_terms(schedule, variance, begin, prediction="eps", network=None):
    """L_T, L_{T-1}, ..., L_1, L_0."""
    x_0, seeds = begin(schedule)
    network = network or exact_network(schedule, prediction)
    variance = optimal_variance(schedule) if variance == "optimal" else variance
    bound = Bound.of(Model(network, schedule, prediction, (1,)), None, None, variance, False)
    prior, t, data, calls = bound.terms(lambda x, t: network(x, t, None), x_0, seeds, lambda: None)
    assert calls == schedule.T
    return [prior.mean().item(), *t.mean(0)[1:].flip(0).tolist(), data.mean().item()]


@pytest.mark.parametrize("variance", BOUNDS)
def test_the_bound_of_an_exact_network_is_the_closed_form(variance, expectation):
    for N, exact in BOUNDS[variance].items():
        terms = expected_terms(LINEAR.respace(N), variance, expectation)
        assert sum(terms) == pytest.approx(exact, abs=3e-6)
    assert exact >= ENTROPY


@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "score", "flow"])
def test_each_term_is_the_closed_form_with_every_prediction(prediction, expectation):
    for variance, exact in TERMS.items():
        terms = expected_terms(LINEAR.respace(5), variance, expectation, prediction)
        assert terms == pytest.approx(exact, rel=1e-6, abs=1e-10)


def test_a_network_that_has_learned_the_optimal_variance_has_the_optimal_bound(expectation):
    schedule = LINEAR.respace(10)
    small, large = schedule.posterior_log_variance, schedule.betas.log()
    part = 2 * (optimal_variance(schedule).log() - small) / (large - small) - 1
    mean = exact_network(schedule)
    network = lambda x, t, labels: torch.cat((mean(x, t, labels), part[t][:, None]), 1)  # noqa: E731
    terms = expected_terms(schedule, "learned", expectation, network=network)
    assert sum(terms) == pytest.approx(BOUNDS["optimal"][10], abs=1e-6)


def linear_network(x, t, labels):
    return 0.5 * x + 0.01 * torch.as_tensor(0 if labels is None else labels).view(-1, *[1] * (x.ndim - 1))


SHAPE = (2, 3, 3)
SHORT = Schedule.linear(8, 1e-3, 0.3)


def pixels(n: int = 5, shape: tuple[int, ...] = SHAPE, levels: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, levels, (n, *shape), generator=generator) * (2 / (levels - 1)) - 1


def measure(x=None, *arguments, network=linear_network, **options):
    described = dict(schedule=SHORT, prediction="eps", progress=False)
    return nll(network, pixels() if x is None else x, *arguments, **described | options)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_every_term_is_the_divergence_of_two_normals_of_torch(variance, clip):
    x, seeds, T = pixels(), torch.arange(10, 15), SHORT.T
    found = measure(x, seeds=seeds, variance=variance, clip=clip)
    alpha, sigma = SHORT.alpha_bar.sqrt(), SHORT.one_minus_alpha_bar.sqrt()
    mean_of = lambda nats: nats.flatten(1).mean(1) / math.log(2)  # noqa: E731
    prior = mean_of(kl_divergence(Distribution(alpha[-1] * x.double(), sigma[-1]), Distribution(0.0, 1.0)))
    total = prior.clone()
    for t in range(T):
        x_t = ops.q_sample(x, t, seeds, SHORT.q_table())
        x0_hat = (x_t.double() - sigma[t] * linear_network(x_t, None, None).double()) / alpha[t]
        x0_hat = x0_hat.clamp(-1, 1) if clip else x0_hat
        std = SHORT.posterior_variance[max(t, 1)].sqrt() if variance == "fixed_small" else SHORT.betas[t].sqrt()
        if t:
            q, p = (SHORT.posterior_x0[t] * a + SHORT.posterior_xt[t] * x_t.double() for a in (x.double(), x0_hat))
            bits = mean_of(kl_divergence(Distribution(q, SHORT.posterior_variance[t].sqrt()), Distribution(p, std)))
            assert found.terms["t"][t].item() == pytest.approx(bits.mean().item(), rel=1e-5)
        else:
            low, high = (Distribution(x0_hat, std).cdf(x.double() + side / 255) for side in (-1, 1))
            bits = mean_of(-torch.log(torch.where(x > 0.999, 1, high) - torch.where(x < -0.999, 0, low)))
            assert found.terms["data"] == pytest.approx(bits.mean().item(), rel=1e-5)
        total += bits
    assert found.terms["prior"] == pytest.approx(prior.mean().item(), rel=1e-9)
    assert found.terms["t"][0] == 0 and found.calls == T
    torch.testing.assert_close(found.bits, total, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_a_part_of_the_terms_estimates_all_of_them_without_bias(steps):
    x = pixels(1, (4,)).expand(4000, 4)
    seeds = torch.arange(4000)
    full, some = (measure(x, seeds=seeds, steps=s, batch_size=4000) for s in (None, steps))
    assert some.calls == steps + 1
    difference = some.bits - full.bits
    assert difference.std() > 0 and abs(difference.mean()) < 4 * difference.std() / math.sqrt(4000)
    each = (some.terms["t"] - full.terms["t"]).abs()[1:] / full.terms["t"][1:]
    assert each.max() < 0.15
    assert torch.equal(measure(x[:9], seeds=seeds[:9], steps=SHORT.T - 1).bits, measure(x[:9], seeds=seeds[:9]).bits)


# --- the ODE: correlated data in three dimensions ---

DATA = Normal(np.array([0.3, -0.1, 0.5]), np.array([[0.25, 0.1, -0.05], [0.1, 0.3, 0.08], [-0.05, 0.08, 0.15]]))
TIME = {  # of what the network is told
    VP: lambda c: c / 999,
    SubVP: lambda c: c / 999,
    VE: lambda c: math.log(math.exp(c) / 0.01) / math.log(5000),
    EDM: lambda c: math.exp(4 * c),
    RectifiedFlow: lambda c: c,
    Schedule: lambda c: c,
}
ODES = {
    "vp": (VP(t_min=1e-5), "eps"),
    "vp score": (VP(t_min=1e-5), "score"),
    "sub-vp": (SubVP(t_min=1e-3), "v"),
    "ve": (VE(), "x0"),
    "edm": (EDM(), "edm"),
    "flow": (RectifiedFlow(), "flow"),
    "linear": (LINEAR, "eps"),
    "cosine": (Schedule.cosine(), "v"),
}


def normal_network(data: Normal, process, prediction: str):
    """The exact network of correlated data, differentiable, of rows that have the same t."""
    mean, axes, variances = (torch.from_numpy(a) for a in (data.mean, data.axes, data.variances))

    def network(x, t, labels):
        s = process.point(TIME[type(process)](t[0].item()))
        x = x.double() / process.c_in(s)
        gains = s.alpha * variances / (s.alpha**2 * variances + s.sigma**2)
        x0 = mean + ((x - s.alpha * mean) @ axes * gains) @ axes.T
        eps = s.sigma * ((x - s.alpha * mean) @ axes / (s.alpha**2 * variances + s.sigma**2)) @ axes.T
        y_x, y_e = map(float, target(prediction, s.alpha, s.sigma, **process.head_constants(prediction, s)))
        return (y_x * x0 + y_e * eps).float()

    return network


def exact_ode_bits(data: Normal, process, x: torch.Tensor) -> torch.Tensor:
    s, t = process.point(process.t_min), process.point(process.t_max)
    before, after = (p.alpha**2 * data.variances + p.sigma**2 for p in (s, t))
    x_T = torch.from_numpy(data.flow(x.double().numpy(), s, t))
    prior = -Distribution(0.0, process.prior_std).log_prob(x_T).sum(1)
    return (prior - np.log(after / before).sum() / 2) / (x.shape[1] * math.log(2))


def draws(n: int) -> torch.Tensor:
    z = torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scaled = z * torch.from_numpy(np.sqrt(DATA.variances))
    return (torch.from_numpy(DATA.mean) + scaled @ torch.from_numpy(DATA.axes).T).float()


@pytest.mark.parametrize("name", ODES)
def test_the_ode_s_bits_are_exact_for_each_sample(name):
    process, prediction = ODES[name]
    x, network = draws(12), normal_network(DATA, process, prediction)
    options = dict(network=network, schedule=process, prediction=prediction, levels=None, probes=None)
    found = measure(x, "ode", **options)
    assert (found.bits - exact_ode_bits(DATA, process, x)).abs().max() < 2e-5
    assert found.calls < 100 and found.terms["data"] == 0
    assert found.bits.mean().item() == pytest.approx(found.terms["prior"] + found.terms["t"].item(), abs=1e-12)


@pytest.mark.parametrize(
    ("process", "bits"),
    [(VP(t_min=1e-5), 1.0471005554244377), (VE(), 1.0474100386136342), (EDM(), 1.047117271148473)],
    ids=lambda value: type(value).__name__,
)
def test_the_ode_s_expected_bits_are_the_closed_form(process, bits):
    """Over data N(MEAN, VARIANCE): two samples at one standard deviation of x at t_min have the expectation."""
    data, s = Normal(np.array([MEAN]), np.array([[VARIANCE]])), process.point(process.t_min)
    spread = math.sqrt(s.alpha**2 * VARIANCE + s.sigma**2)
    x = torch.tensor([[s.alpha * MEAN - spread], [s.alpha * MEAN + spread]])
    options = dict(network=normal_network(data, process, "eps"), schedule=process, levels=None, tol=1e-6)
    assert measure(x, "ode", **options).bits.mean().item() == pytest.approx(bits, abs=5e-6)


def test_a_straight_flow_from_data_to_noise_gives_the_entropy():
    data, flow = Normal(np.array([MEAN]), np.array([[VARIANCE]])), RectifiedFlow()
    x = torch.tensor([[MEAN - math.sqrt(VARIANCE)], [MEAN + math.sqrt(VARIANCE)]])
    options = dict(network=normal_network(data, flow, "flow"), schedule=flow, prediction="flow", levels=None)
    assert measure(x, "ode", **options).bits.mean().item() == pytest.approx(ENTROPY, abs=1e-5)


def test_probes_estimate_the_divergence_without_bias_and_are_exact_without_correlation():
    process = VP()
    x, seeds = draws(1).expand(3000, 3), torch.arange(3000)
    options = dict(schedule=process, levels=None, tol=1e-3, batch_size=3000)
    network = normal_network(DATA, process, "eps")
    exact = measure(x[:1], "ode", network=network, **options | dict(probes=None, batch_size=1)).bits
    spreads = []
    for probes in (1, 4):
        error = measure(x, "ode", network=network, seeds=seeds, probes=probes, **options).bits - exact
        assert abs(error.mean()) < 4 * error.std() / math.sqrt(3000) + 1e-3
        spreads.append(error.std().item())
    assert spreads[1] == pytest.approx(spreads[0] / 2, rel=0.1)
    apart = Normal(DATA.mean, np.diag([0.1, 0.2, 0.3]))
    error = measure(x[:9], "ode", network=normal_network(apart, process, "eps"), **options | dict(batch_size=9)).bits
    assert error.std() < 1e-6


def test_levels_cost_7_bits_and_spread_over_the_whole_range():
    """x plus uniform noise within its level, by the change of variables."""
    process, x = VP(), pixels(4, (3,))
    seeds = torch.arange(4)
    network = normal_network(DATA, process, "eps")
    u = uniform(seeds, (3,), 1 << 31)
    y = ((x.double() + 1) * 127.5 + u) / 128 - 1
    assert y.min() >= -1 and y.max() <= 1
    options = dict(network=network, schedule=process, probes=None, seeds=seeds)
    found = measure(x, "ode", **options)
    assert found.terms["data"] == 7
    assert (found.bits - 7 - exact_ode_bits(DATA, process, y.float())).abs().max() < 2e-5
    assert measure(pixels(4, (3,), 8), "ode", levels=8, **options).terms["data"] == 2


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "flow", "edm"])
def test_the_velocity_is_that_of_x0_hat_and_eps(prediction):
    process = EDM()
    for t in (0.01, 0.7, 30.0):
        s = process.point(t)
        a, b = velocity(prediction, s, process)
        p_x, p_o = head_at(prediction, s, process)
        x, out = 0.7, -0.4
        x0 = p_x * x + p_o * out
        eps, scale = (x - s.alpha * x0) / s.sigma, math.hypot(s.alpha, s.sigma)
        expected = s.alpha / scale * eps - s.sigma / scale * x0
        assert a * x / scale + b * out == pytest.approx(expected, rel=1e-9)


# --- what both share ---


def test_signs_are_fair_and_uniform_numbers_uniform():
    seeds = torch.arange(200)
    s, u = signs(seeds, (500,), 0), uniform(seeds, (500,), 1)
    assert set(s.unique().tolist()) == {-1.0, 1.0} and abs(s.mean()) < 4 / math.sqrt(s.numel())
    counts = torch.histc(u.float(), 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 45  # chi-square of 19 degrees: p = 0.0007
    assert torch.equal(signs(seeds[7:8], (500,), 0), s[7:8])


@pytest.mark.parametrize("method", ["bound", "ode"])
def test_bits_depend_on_the_sample_and_its_seed_alone(method):
    x, seeds = pixels(5), [9, 8, 7, 6, 5]
    options = dict(labels=[0, 1, 2, 3, 4], **dict(steps=3) if method == "bound" else dict(tol=1e-4))
    whole, by_two, alone = (measure(x, method, seeds=seeds, batch_size=b, **options).bits for b in (5, 2, 1))
    limit = 1e-12 if method == "bound" else 1e-3
    assert (by_two - whole).abs().max() < limit and (alone - whole).abs().max() < limit
    again = measure(x.flip(0), method, seeds=seeds[::-1], batch_size=1, **options | dict(labels=[4, 3, 2, 1, 0])).bits
    assert torch.equal(again.flip(0), alone)
    for other in (dict(seeds=range(5)), dict(labels=[90] * 5)):
        changed = measure(x, method, batch_size=1, **dict(seeds=seeds) | options | other).bits
        assert ((changed - alone).abs() > 1e-5).sum() >= 4


@pytest.mark.parametrize("method", ["bound", "ode"])
def test_a_u_net_is_measured_in_eval_mode_without_touching_it(method):
    model = tiny_model()
    model.network.train()
    x = pixels(2, (1, 8, 8))
    options = dict(labels=[0, 2], progress=False, **dict(tol=0.1) if method == "ode" else dict(steps=2))
    with torch.inference_mode():
        found = nll(model, x, method, **options)
    assert model.network.training and all(p.grad is None for p in model.network.parameters())
    assert found.bits.isfinite().all() and found.bits.dtype == torch.float64
    if method == "bound":  # the ODE has gradients, which no engine gives
        plain = nll(model, x, engine=False, **options)
        torch.testing.assert_close(found.bits, plain.bits, rtol=1e-3, atol=1e-3)


def test_conditions_and_latents_reach_the_network():
    def network(x, t, labels, text):
        return 0.5 * x + text.mean(1).view(-1, 1, 1, 1)

    codec = Codec(lambda x: x[..., ::2], lambda x: x, 2.0)
    model = Model(network, SHORT, "eps", (2, 3, 2), conditions=(Condition("text", (4,)),), codec=codec)
    x, text = pixels(3), torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    found = nll(model, x, levels=None, text=text, progress=False)
    latents = 2 * x[..., ::2]
    bare = lambda y, t, labels: 0.5 * y + text.mean(1).view(-1, 1, 1, 1)  # noqa: E731
    expected = measure(latents, network=bare, levels=None, clip=False)
    torch.testing.assert_close(found.bits, expected.bits)


def test_without_scipy_the_ode_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    with pytest.raises(ImportError, match="^method: expected scipy for 'ode', got none: run pip install scipy$"):
        measure(None, "ode")
    assert measure().bits.isfinite().all()


BAD = {
    "method": (dict(method="exact"), "method: expected one of ('bound', 'ode'), got 'exact'"),
    "x": (dict(x=[1.0]), "x: expected a floating-point tensor, got list"),
    "x int": (dict(x=torch.zeros(2, 3, dtype=torch.uint8)), "x: expected a floating-point tensor, got torch.uint8"),
    "x range": (dict(x=torch.full((2, 3), 1.5)), "x: expected values in [-1, 1], or levels=None for continuous ones"),
    "x none": (dict(x=torch.zeros(0, 3)), "x: expected at least one sample, got none"),
    "shape": (dict(shape=(4,)), "x: expected shape (n, 4), got (5, 2, 3, 3)"),
    "seeds": (dict(seeds=[1]), "seeds: expected 5, one for each image, got 1"),
    "labels": (dict(labels=[-2] * 5), "labels: expected ints >= -1, got -2"),
    "levels": (dict(levels=1), "levels: expected an int >= 2 or None, got 1"),
    "levels 2.5": (dict(levels=2.5), "levels: expected an int >= 2 or None, got 2.5"),
    "steps": (dict(steps=8), "steps: expected an int in 1..7 or None, got 8"),
    "variance": (dict(variance="tiny"), "variance: expected one of ('fixed_small', 'fixed_large', 'learned', "),
    "variance 0": (dict(variance=torch.zeros(8)), "variance: expected variances > 0, got 0.0"),
    "variance [3]": (dict(variance=torch.ones(3)), "variance: expected shape (8,), one for each step, got (3,)"),
    "clip": (dict(clip=0.5), "clip: expected True or False with method 'bound', got 0.5"),
    "levels 16": (dict(levels=16), "levels: expected 256 or None with method 'bound', got 16"),
    "option": (dict(colour=3), "colour: expected one of the options schedule, prediction, shape, batch_size"),
    "schedule": (dict(schedule=None), "schedule: expected a value with a bare function"),
    "process": (dict(schedule=VP()), "method: expected 'ode' for a process without time steps, VP(beta_min=0.1"),
    "graph": (dict(cuda_graph=True), "cuda_graph: expected False, got True"),
    "ode steps": (dict(method="ode", steps=5), "steps: expected None with method 'ode', got 5"),
    "ode clip": (dict(method="ode", clip=True), "clip: expected None with method 'ode', got True"),
    "tol": (dict(method="ode", tol=0.0), "tol: expected a number in (0, 1), got 0.0"),
    "probes": (dict(method="ode", probes=0), "probes: expected an int >= 1 or None, got 0"),
    "mu": (dict(method="ode", prediction="mu"), "prediction: expected one that does not depend on time steps with"),
    "flow by eps": (
        dict(method="ode", schedule=RectifiedFlow()),
        "prediction: expected one that tells x0_hat and eps at alpha = 0 and sigma = 1, got 'eps'",
    ),
    "no graph": (
        dict(method="ode", network=lambda x, t, labels: 0 * x.detach()),
        "model: expected an output that depends on x_t by torch's operations, got a constant",
    ),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input_names_the_argument(options, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        measure(options.pop("x", None), options.pop("method", "bound"), **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_a_model_of_latents_has_no_levels():
    model = Model(linear_network, SHORT, "eps", SHAPE, codec=Codec())
    with pytest.raises(ValueError, match="^levels: expected None with a model of latents, got 256$"):
        nll(model, pixels())
