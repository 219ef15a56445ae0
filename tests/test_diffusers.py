"""diffusers' schedulers beside diffkern's samplers: the same images where both are right, and how far they differ.

Both get the exact network of a mixture of two Gaussians, in float64, and the same noise. The time steps are those that
the scheduler visits. Its tables are made float64, so that 1e-5 is the samplers' own float32.
"""

import importlib
import math

import diffusers
import numpy as np
import pytest
import torch
from oracles import Gaussian, ddim_trajectory, ddpm_trajectory, head, mp_alpha_bar
from oracles import one_thread as one_thread

from diffkern import EDM, VE, RectifiedFlow, Schedule, ops, sample
from diffkern.process import END
from diffkern.program import Direct
from diffkern.samplers import SAMPLERS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers

LINEAR = Schedule.linear()
SHAPE = (2, 3, 3)


def z(address: int, stream: int = 1) -> torch.Tensor:
    return ops.noise(torch.arange(3), SHAPE, step=int(address), stream=stream).double()


def mixture(x, alpha, sigma):
    """E[x_0 | x_t = x] of pixels that are N(-0.6, 0.3^2) or N(0.5, 0.3^2)."""
    variance = (alpha * 0.3) ** 2 + sigma**2
    apart = [x - alpha * mean for mean in (-0.6, 0.5)]
    weights = torch.stack([-(d**2) / (2 * variance) for d in apart]).softmax(0)
    parts = (mean + alpha * 0.3**2 / variance * d for mean, d in zip((-0.6, 0.5), apart, strict=True))
    return sum(weight * part for weight, part in zip(weights, parts, strict=True))


def v_network(x, t, labels=None):
    """v of the linear schedule."""
    s, x = LINEAR.point(int(t.flatten()[0])), x.double()
    x_0 = mixture(x, s.alpha, s.sigma)
    return s.alpha * (x - s.alpha * x_0) / s.sigma - s.sigma * x_0


def edm_network(x, t, labels=None):
    """F of Karras et al. 2022, of c_in x and ln(sigma) / 4."""
    sigma = math.exp(4 * float(t.flatten()[0]))
    total = math.hypot(sigma, 0.5)
    x = x.double() * total
    return (mixture(x, 1.0, sigma) - 0.25 / total**2 * x) / (sigma * 0.5 / total)


def flow_network(x, t, labels=None):
    """eps - x_0 of 1000 t."""
    t, x = float(t.flatten()[0]) / 1000, x.double()
    return (x - mixture(x, 1 - t, t)) / t


def made(name, steps, **settings):
    """A scheduler on the linear schedule, with tables in float64."""
    defaults = dict(beta_schedule="linear", timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler = getattr(diffusers, name)(**defaults | settings)
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = LINEAR.betas, LINEAR.alphas, LINEAR.alpha_bar
    scheduler.set_timesteps(steps)
    return scheduler


def theirs(monkeypatch, scheduler, network, x, noise=z, **options):
    """x after all steps of a scheduler, with ``noise(t)`` for what it draws in the step that leaves t, if any."""
    drawn, module = [], importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: drawn[-1])
    for t in scheduler.timesteps:
        drawn.append(noise(t) if noise else None)
        out = network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t)
        x = scheduler.step(out, t, x, **options).prev_sample
    return x


def ours(network, steps, schedule=LINEAR, prediction="v", **options):
    """(the image, x_t where the last step begins) of diffkern."""
    seen = []
    described = dict(schedule=schedule, prediction=prediction, shape=SHAPE, steps=steps, progress=False)
    image = sample(network, 3, clip=False, callback=seen.append, **described | options)
    return image.double(), seen[-1].x_t.double()


def linear_start(scheduler):
    """x_T as a scheduler holds it: x, or x / alpha."""
    return z(0, 0) * (1.0 if scheduler.init_noise_sigma == 1 else (1 + scheduler.init_noise_sigma**2) ** 0.5)


def visited(scheduler):
    return [int(t) for t in dict.fromkeys(scheduler.timesteps.tolist())]


def largest(difference):
    return difference.abs().max().item()


# --- where both are right ---

LEADING, SDE = dict(timestep_spacing="leading"), dict(algorithm_type="sde-dpmsolver++")
SAME = {  # scheduler, its settings, the options of its steps; sampler, its options
    "ddpm": ("DDPMScheduler", {}, {}, "ddpm", {}),
    "ddpm leading": ("DDPMScheduler", LEADING, {}, "ddpm", {}),
    "ddim": ("DDIMScheduler", {}, {}, "ddim", {}),
    "ddim leading": ("DDIMScheduler", LEADING, {}, "ddim", {}),
    "ddim eta": ("DDIMScheduler", {}, dict(eta=0.7), "ddim", dict(eta=0.7)),
    "euler": ("EulerDiscreteScheduler", {}, {}, "euler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}, {}, "euler_a", {}),
    "heun": ("HeunDiscreteScheduler", {}, {}, "heun", {}),
    "lms": ("LMSDiscreteScheduler", {}, {}, "lms", {}),
    **{f"deis {p}": ("DEISMultistepScheduler", dict(solver_order=p), {}, "deis", dict(order=p)) for p in (1, 2, 3)},
    **{f"dpmpp {p}": ("DPMSolverMultistepScheduler", dict(solver_order=p), {}, f"dpmpp_{p}m", {}) for p in (1, 2)},
    **{
        f"sde 2m {kind}": ("DPMSolverMultistepScheduler", SDE | dict(solver_type=kind), {}, *sampler)
        for kind in ("midpoint", "heun")
        for sampler in [("dpmpp_2m_sde", dict(kind=kind))]
    },
    **{
        f"unipc {p}": ("UniPCMultistepScheduler", dict(solver_order=p), {}, "unipc", dict(order=p))
        for p in (1, 2, 3, 4)
    },
}


@pytest.mark.parametrize("name", SAME)
def test_a_sampler_and_diffusers_scheduler_draw_the_same_images(name, monkeypatch):
    kind, settings, step, sampler, options = SAME[name]
    clipping = dict(clip_sample=False) if kind in ("DDPMScheduler", "DDIMScheduler") else {}
    scheduler = made(kind, 20, **clipping | settings)
    x = theirs(monkeypatch, scheduler, v_network, linear_start(scheduler), **step)
    if kind == "DEISMultistepScheduler":  # which ends at time step 0
        _, image = ours(v_network, [*visited(scheduler), 0], sampler=sampler, **options)
    else:
        image, _ = ours(v_network, visited(scheduler), sampler=sampler, **options)
    assert x.dtype == torch.float64 and largest(image - x) <= 1e-5


EDMS = {
    "euler": ("EDMEulerScheduler", {}, "euler"),
    "dpmpp 1": ("EDMDPMSolverMultistepScheduler", dict(solver_order=1), "dpmpp_1m"),
    "dpmpp 2": ("EDMDPMSolverMultistepScheduler", dict(solver_order=2), "dpmpp_2m"),
    "sde 2m": ("EDMDPMSolverMultistepScheduler", SDE, "dpmpp_2m_sde"),
}


@pytest.mark.parametrize("name", EDMS)
def test_a_sampler_on_edm_and_diffusers_scheduler_draw_the_same_images(name, monkeypatch):
    kind, settings, sampler = EDMS[name]
    scheduler = getattr(diffusers, kind)(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **settings)
    scheduler.set_timesteps(18)
    number = {float(t): i for i, t in enumerate(scheduler.timesteps)}
    x = theirs(monkeypatch, scheduler, edm_network, z(0, 0) * 80, lambda t: z(number[float(t)]))
    image, _ = ours(edm_network, 18, EDM(), "edm", sampler=sampler)
    assert largest(image - x) <= 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_velocity_on_a_flow_and_diffusers_scheduler_draw_the_same_images(shift, monkeypatch):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    x = theirs(monkeypatch, scheduler, flow_network, z(0, 0), None)
    times = scheduler.sigmas[:-1].double().tolist()
    image, _ = ours(flow_network, times, RectifiedFlow(1000.0), "flow", sampler="velocity", order=1)
    assert largest(image - x) <= 1e-5


# --- where diffusers' is another sampler, or a wrong one ---


def oracle(steps, *, eta=None, variance=None):
    """The float64 run of Song et al. 2021a or Ho et al. 2020 through those time steps."""
    alpha_bars = torch.cat((LINEAR.alpha_bar[steps], torch.ones(1, dtype=torch.float64)))
    start, noises = z(0, 0), [z(t) for t in steps]

    def x_0(x, alpha_bar):
        return mixture(x, alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    if eta is None:
        return ddpm_trajectory(start, noises, x_0, alpha_bars, variance)[-1][0]
    return ddim_trajectory(start, noises, x_0, alpha_bars, eta)[-1][0]


@pytest.mark.parametrize(
    "steps, settings, error",
    [
        (10, dict(timestep_spacing="linspace"), 0.1),
        (20, dict(timestep_spacing="linspace"), 0.04),
        (80, {}, 0.03),  # trailing, and 1000 / 80 is not whole
        (7, {}, 0.015),
        (20, dict(set_alpha_to_one=False), 0.009),
    ],
    ids=str,
)
def test_ddim_goes_through_the_time_steps_that_it_visits(steps, settings, error, monkeypatch):
    """diffusers' goes to t - T // N whatever comes next, or to the first time step at the end."""
    scheduler = made("DDIMScheduler", steps, clip_sample=False, **settings)
    exact = oracle(visited(scheduler), eta=0.0)
    assert largest(ours(v_network, visited(scheduler), sampler="ddim")[0] - exact) <= 1e-5
    assert largest(theirs(monkeypatch, scheduler, v_network, z(0, 0)) - exact) > error


@pytest.mark.parametrize("steps, error", [(10, 0.6), (50, 0.1)])
def test_ddpm_of_the_large_variance_ends_without_noise(steps, error, monkeypatch):
    """diffusers' adds noise after the last step, unless that leaves time step 0."""
    scheduler = made("DDPMScheduler", steps, clip_sample=False, variance_type="fixed_large")
    exact = oracle(visited(scheduler), variance="fixed_large")
    assert largest(ours(v_network, visited(scheduler), sampler="ddpm", variance="fixed_large")[0] - exact) <= 1e-5
    assert largest(theirs(monkeypatch, scheduler, v_network, z(0, 0)) - exact) > error


def ode(x, s, t, mean=0.3, std=0.5):
    """The probability-flow ODE of N(mean, std^2) from s to t."""
    before, after = ((p.alpha * std) ** 2 + p.sigma**2 for p in (s, t))
    return t.alpha * mean + math.sqrt(after / before) * (x - s.alpha * mean)


def multistep_of_order_3(steps):
    """DPM-Solver++(3M) in float64: the quadratic through the last three predictions, integrated by Gauss' quadrature.

    With two of them it is 2M, which takes the line's value in the middle of the step.
    """
    points, (nodes, weights) = LINEAR.grid(steps).points, np.polynomial.legendre.leggauss(20)
    x, past = z(0, 0), []
    for i, (s, t) in enumerate(zip(points[:-1], points[1:], strict=True)):
        past = [(s.lam, mixture(x, s.alpha, s.sigma)), *past][: min(3, len(steps) - i)]
        if t.sigma == 0:
            return past[0][1]
        h = t.lam - s.lam
        lam = s.lam + (nodes + 1) / 2 * h
        at = np.full_like(lam, s.lam + h / 2) if len(past) == 2 else lam
        x = x * (t.sigma / s.sigma)
        for own, x_0 in past:
            basis = np.prod([np.ones_like(at), *((at - other) / (own - other) for other, _ in past if other != own)], 0)
            x = x + x_0 * (t.alpha * float(np.sum(weights * h / 2 * np.exp(lam - t.lam) * basis)))


def test_dpmpp_3m_takes_the_whole_second_derivative(monkeypatch):
    """diffusers' takes half of it, as the authors' code does."""
    scheduler = made("DPMSolverMultistepScheduler", 14, solver_order=3)
    exact, got = multistep_of_order_3(visited(scheduler)), theirs(monkeypatch, scheduler, v_network, z(0, 0))
    assert largest(ours(v_network, visited(scheduler), sampler="dpmpp_3m")[0] - exact) <= 1e-5
    assert largest(ours(v_network, visited(scheduler), sampler="dpmpp_3m", published=True)[0] - got) <= 1e-5
    assert largest(got - exact) > 1.2e-3


def test_dpmpp_3m_on_edm_takes_the_whole_second_derivative(monkeypatch):
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(0.002, 80.0, 0.5, solver_order=3)
    scheduler.set_timesteps(14)
    got = theirs(monkeypatch, scheduler, edm_network, z(0, 0) * 80, None)
    assert largest(ours(edm_network, 14, EDM(), "edm", sampler="dpmpp_3m", published=True)[0] - got) <= 1e-5
    assert largest(ours(edm_network, 14, EDM(), "edm", sampler="dpmpp_3m")[0] - got) > 3e-3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_b1_ends_at_sigma_0(order, monkeypatch):
    """diffusers' bh1 divides by the last step's length in lambda, which is infinite."""
    scheduler = made("UniPCMultistepScheduler", 10, solver_order=order, solver_type="bh1")
    grid = LINEAR.grid(visited(scheduler))
    run = Direct(grid, lambda x, s: mixture(x, s.alpha, s.sigma), None, z(0, 0))
    exact = SAMPLERS["unipc"](run, grid, order=order, variant="B1")
    assert largest(ours(v_network, visited(scheduler), sampler="unipc", order=order, variant="B1")[0] - exact) <= 1e-5
    assert theirs(monkeypatch, scheduler, v_network, z(0, 0)).isnan().all()


def solver_sigmas(scheduler):
    """(sigma / alpha that the solver reckons with, that of the time step that it tells the network)."""
    t = scheduler.timesteps.double().numpy()
    seen = np.exp(np.interp(t, np.arange(1000), [-LINEAR.lam(step) for step in range(1000)]))
    return scheduler.sigmas[: len(t)].double().numpy(), seen


@pytest.mark.parametrize(
    "name, option, error",
    [
        ("DPMSolverMultistepScheduler", "use_karras_sigmas", 0.04),
        ("UniPCMultistepScheduler", "use_karras_sigmas", 0.04),
        ("DEISMultistepScheduler", "use_karras_sigmas", 0.04),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", 0.1),
    ],
)
def test_solver_and_network_have_one_sigma_on_karras_and_lambda_grids(name, option, error):
    """diffusers' rounds the time step that the network is told, and keeps the sigma that was asked for."""
    used, seen = solver_sigmas(made(name, 20, **{option: True}))
    assert np.abs(seen / used - 1).max() > error
    used, seen = solver_sigmas(made("EulerDiscreteScheduler", 20, use_karras_sigmas=True))  # does not round
    assert np.abs(seen / used - 1).max() < 1e-4
    points = LINEAR.grid(20, "karras" if option == "use_karras_sigmas" else "lambda").points[:-1]
    for point, alpha_bar in zip(points, mp_alpha_bar(LINEAR, [int(p.c_noise) for p in points]), strict=False):
        assert point.rho == pytest.approx(float(((1 - alpha_bar) / alpha_bar) ** 0.5), rel=1e-12)


def pndm(monkeypatch, steps, prediction_type):
    """The error of diffusers' PNDM, against the ODE of Gaussian data; and that of ipndm on the same time steps."""
    settings = dict(prediction_type=prediction_type, skip_prk_steps=True, set_alpha_to_one=True)
    scheduler, data = made("PNDMScheduler", steps, **settings), Gaussian(0.3, 0.5)
    kind = "eps" if prediction_type == "epsilon" else "v"

    def network(x, t, labels=None):
        alpha_bar = LINEAR.alpha_bar[int(t.flatten()[0])]
        return head(kind, x.double(), data.x_0(x.double(), alpha_bar), alpha_bar)

    exact = ode(z(0, 0), LINEAR.point(visited(scheduler)[0]), END)
    image, _ = ours(network, visited(scheduler), prediction=kind, sampler="ipndm")
    return largest(theirs(monkeypatch, scheduler, network, z(0, 0)) - exact), largest(image - exact)


def test_ipndm_goes_through_the_time_steps_that_it_visits(monkeypatch):
    """diffusers' PNDM goes to t - T // N: right for 40 steps of 25, wrong for 80 of 12 or 13."""
    assert max(pndm(monkeypatch, 40, "epsilon")) < 0.002
    got, mine = pndm(monkeypatch, 80, "epsilon")
    assert mine < 0.001 and got > 0.04


def test_ipndm_combines_eps_whatever_the_network_predicts(monkeypatch):
    """diffusers' PNDM combines the v of several time steps, which are not of one kind: it falls to order 1."""
    got, mine = pndm(monkeypatch, 40, "v_prediction")
    assert mine < 0.002 and got > 0.06


def test_a_flow_s_times_are_shifted_once(monkeypatch):
    """diffusers' shifts its smallest sigma when it is made and again when it is used: it leaves .0089, not .0030."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    times = 3 * np.linspace(1, 0.001, 10) / (1 + 2 * np.linspace(1, 0.001, 10))
    assert times[-1] == pytest.approx(0.003 / 1.002)
    assert scheduler.sigmas[-2].item() > 2.9 * times[-1]
    x = z(0, 0)
    for t, after in zip(times, [*times[1:], 0.0], strict=True):
        x = x + (after - t) * flow_network(x, torch.tensor(1000 * t))
    mine, _ = ours(flow_network, times.tolist(), RectifiedFlow(1000.0), "flow", sampler="velocity", order=1)
    assert largest(mine - x) <= 1e-5
    assert largest(theirs(monkeypatch, scheduler, flow_network, z(0, 0), None) - x) > 1e-3


def test_repaint_goes_back_by_the_betas_of_the_steps_that_it_undoes(monkeypatch):
    """diffusers' takes betas[t..t+n-1] for t-n+1..t."""
    scheduler = diffusers.RePaintScheduler(beta_schedule="linear")
    scheduler.set_timesteps(20)
    monkeypatch.setattr(
        importlib.import_module(type(scheduler).__module__), "randn_tensor", lambda shape, **_: torch.zeros(shape)
    )
    program = SAMPLERS["repaint"].trace(LINEAR.grid(range(950, -1, -50)), "v", jump=1, resample=2)
    back = [row.k_x for row in program.rows if row.point is None]
    for t, k_x in zip(range(950, 50, -50), back, strict=False):
        right = math.prod(1 - beta for beta in LINEAR.betas[t - 49 : t + 1].tolist()) ** 0.5
        assert k_x == pytest.approx(right, rel=1e-12)
        got = scheduler.undo_step(torch.ones(1), t).item()
        assert right - got > (0.015 if t == 950 else 0)


def test_pc_corrects_an_image_whatever_its_neighbours_are(monkeypatch):
    """diffusers' divides by the mean of the batch's norms."""
    scheduler = diffusers.ScoreSdeVeScheduler()
    scheduler.set_timesteps(10)
    scheduler.set_sigmas(10)
    x = z(0, 0).float() * 50
    score = -x / 50**2 * torch.tensor([1.0, 3.0, 3.0]).view(3, 1, 1, 1)
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **_: z(1).float()[: shape[0]])
    alone, among = (scheduler.step_correct(score[:n], x[:n]).prev_sample[0] for n in (1, 3))
    assert largest(alone - among) > 1.75
    options = dict(schedule=VE(), prediction="v", shape=SHAPE, sampler="pc", steps=5, clip=False, progress=False)
    alone, among = (
        sample(lambda x, t, y: x * 0.1, seeds=seeds, batch_size=3, **options)[0] for seeds in ([0], [0, 1, 2])
    )
    assert torch.equal(alone, among)


def test_trailing_time_steps_are_as_many_as_asked_for():
    """diffusers' are one too many for 62 of 1000 numbers, by a rounded range."""
    scheduler, wrong = diffusers.DDIMScheduler(timestep_spacing="trailing"), 0
    for N in range(1, 1001):
        scheduler.set_timesteps(N)
        wrong += len(scheduler.timesteps) != N
        assert LINEAR.timesteps(N) == [(2 * 1000 * i + N) // (2 * N) - 1 for i in range(N, 0, -1)]
    assert wrong >= 62


def test_tables_keep_the_digits_of_the_first_time_steps():
    """1 - alpha_bar_0 is beta_0. diffusers' float32 product has lost 1.6e-4 of it."""
    assert LINEAR.one_minus_alpha_bar[0].item() == pytest.approx(1e-4, rel=1e-13)
    assert abs((1 - diffusers.DDPMScheduler().alphas_cumprod[0].item()) / 1e-4 - 1) > 1.6e-4


def test_edm_starts_at_sigma_max():
    assert EDM().prior_std == 80
    assert diffusers.EDMEulerScheduler(0.002, 80.0).init_noise_sigma > 80.006


def test_ipndm_is_of_the_schedule_that_the_network_was_trained_on():
    """diffusers' IPNDM has times of its own, whatever the number of training steps and betas."""
    one, other = (diffusers.IPNDMScheduler(num_train_timesteps=T) for T in (1000, 50))
    for scheduler in (one, other):
        scheduler.set_timesteps(10)
    assert one.timesteps.equal(other.timesteps) and one.timesteps.max() == 1
    rows = [SAMPLERS["ipndm"].trace(schedule.grid(10)).table() for schedule in (LINEAR, Schedule.cosine())]
    assert not torch.allclose(*rows)
