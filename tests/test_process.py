"""Processes, their points and grids, held against the papers' formulas and against differences."""

import dataclasses
import json
import math

import numpy as np
import pytest

from diffkern.process import EDM, END, VE, VP, Process, RectifiedFlow, SubVP
from diffkern.schedule import Schedule, from_config

CONTINUOUS = [VP(), SubVP(), VE(), EDM(), RectifiedFlow()]
PROCESSES = [*CONTINUOUS, Schedule.linear(), Schedule.cosine(50)]


def inside(process):
    return np.linspace(process.t_min, process.t_max, 9)[1:-1]


def test_alpha_and_sigma_are_those_of_the_papers():
    t = 0.37
    integral = 0.1 * t + 19.9 * t * t / 2  # of beta from 0 to t
    assert VP().alpha(t) == pytest.approx(math.exp(-integral / 2), rel=1e-14)
    assert VP().sigma(t) ** 2 == pytest.approx(1 - math.exp(-integral), rel=1e-14)
    assert SubVP().sigma(t) == pytest.approx(1 - math.exp(-integral), rel=1e-14)
    assert VE().sigma(t) == pytest.approx(0.01 * 5000**t, rel=1e-14)
    assert EDM().sigma(3.0) == 3 and EDM().c_noise(3.0) == pytest.approx(math.log(3) / 4)
    assert EDM().c_in(EDM().point(3.0)) == pytest.approx(1 / math.sqrt(9.25))
    assert RectifiedFlow().alpha(t) == 1 - t and RectifiedFlow().sigma(t) == t


@pytest.mark.parametrize("process", CONTINUOUS, ids=repr)
def test_derivatives_are_those_of_differences(process):
    for t in inside(process):
        step = 1e-6 * t
        differences = [(f(t + step) - f(t - step)) / (2 * step) for f in (process.alpha, process.sigma)]
        assert process.derivatives(t) == pytest.approx(differences, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("process", CONTINUOUS, ids=repr)
def test_the_sde_keeps_the_marginals(process):
    """dalpha/dt = f alpha, and d(sigma^2)/dt = 2 f sigma^2 + g^2."""
    for t in inside(process):
        (f, g2), (d_alpha, d_sigma) = process.drift_and_diffusion(t), process.derivatives(t)
        assert f * process.alpha(t) == pytest.approx(d_alpha, rel=1e-12, abs=1e-15)
        assert 2 * f * process.sigma(t) ** 2 + g2 == pytest.approx(2 * process.sigma(t) * d_sigma, rel=1e-12)
        assert g2 > 0


def test_the_diffusion_of_sub_vp_is_beta_times_1_minus_alpha_to_the_4():
    for t in inside(SubVP()):
        beta = 0.1 + 19.9 * t
        _, g2 = SubVP().drift_and_diffusion(t)
        assert g2 == pytest.approx(beta * (1 - SubVP().alpha(t) ** 4), rel=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_time_undoes_lambda(process):
    for t in inside(process):
        assert process.lam(process.time(process.lam(t))) == pytest.approx(process.lam(t), rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("process", CONTINUOUS, ids=repr)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_grid_of_n_steps_falls_from_the_prior_to_an_image_without_noise(process, steps):
    grid = process.grid(steps)
    assert len(grid) == steps and len(grid.points) == steps + 1
    assert grid.points[0].time == process.t_max and grid.points[-1].sigma == 0
    assert all(s.lam < t.lam for s, t in grid.steps)


def test_karras_spacing_is_equation_5():
    rho = [p.rho for p in EDM().grid(10).points[:-1]]
    expected = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    assert rho == pytest.approx(expected, rel=1e-12)


def test_lambda_spacing_is_even_in_lambda():
    lam = [p.lam for p in VP().grid(9, "lambda", denoise=False).points]
    assert np.diff(lam) == pytest.approx(np.full(9, (lam[-1] - lam[0]) / 9), rel=1e-9)


@pytest.mark.parametrize("spacing", ["karras", "lambda"])
def test_a_schedule_snaps_to_time_steps_and_takes_their_alpha_and_sigma(spacing):
    schedule = Schedule.linear()
    for point in schedule.grid(12, spacing).points[:-1]:
        t = int(point.time)
        assert point.time == t == point.address == point.c_noise
        assert point.alpha**2 == pytest.approx(schedule.alpha_bar[t].item(), rel=1e-15)


def test_a_schedule_at_a_real_time_lies_between_its_time_steps_in_logarithms():
    schedule = Schedule.linear()
    before, at, after = (schedule.point(t) for t in (300, 300.25, 301))
    for name in ("log_alpha", "log_sigma"):
        a, b, c = (getattr(point, name) for point in (before, at, after))
        assert b == pytest.approx(a + (c - a) / 4, rel=1e-12)


def test_a_path_addresses_every_cell_of_a_continuous_process_once():
    for steps in (5, 50):
        points = VP().grid(steps, "lambda", path=True).points
        assert all(s.address > t.address for s, t in zip(points[:-1], points[1:], strict=True))
    with pytest.raises(ValueError, match="noise: expected 'step' with 5000 steps"):
        VP().grid(5000, "lambda", path=True)


def test_a_new_process_is_alpha_and_sigma():
    @dataclasses.dataclass(frozen=True)
    class Circle(Process):
        t_min: float = 0.01
        t_max: float = 1.5

        def alpha(self, t):
            return np.cos(t)

        def sigma(self, t):
            return np.sin(t)

    assert Circle().lam(Circle().time(0.3)) == pytest.approx(0.3, abs=1e-12)
    assert Circle().drift_and_diffusion(0.5)[0] == pytest.approx(-math.tan(0.5))
    assert Circle().prior_std == math.sin(1.5)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: VP().grid(0), ValueError, "steps: expected an int >= 1, got 0"),
        (lambda: VP().grid(2.5), TypeError, "steps: expected an int >= 1, got 2.5"),
        (lambda: VP().grid(4, "even"), ValueError, "spacing: expected one of"),
        (lambda: VP().grid([0.1, 0.5]), ValueError, "steps: expected times that fall"),
        (lambda: VP().grid([1.5, 0.5]), ValueError, "steps: expected times that fall"),
        (lambda: VP().grid([]), ValueError, "steps: expected times that fall"),
        (
            lambda: RectifiedFlow().grid(4, "karras"),
            ValueError,
            "spacing: expected 'uniform' where alpha or sigma is 0",
        ),
    ],
)
def test_processes_refuse_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_end_has_no_noise():
    assert END.lam == math.inf and END.rho == 0


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_a_process_comes_back_from_its_config(process):
    again = from_config(json.loads(json.dumps(process.config())))
    assert again == process and type(again) is type(process)


def test_a_process_of_ones_own_has_no_config():
    class Line(RectifiedFlow):
        pass

    with pytest.raises(TypeError, match="^schedule: expected a Schedule or one of VP, .* to describe, got Line$"):
        Line().config()


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"kind": "square"}, ValueError, "config: expected a kind among .*'edm', .*'linear'.*, got 'square'"),
        ([], TypeError, "config: expected a dict, got list"),
        ({"kind": "edm", "sigma_data": 0}, ValueError, "sigma_data: expected a number > 0, got 0"),
        ({"kind": "vp", "beta_max": "20"}, TypeError, "beta_max: expected a number > 0, got '20'"),
        (
            {"kind": "ve", "sigma_min": 60},
            ValueError,
            "sigma_min: expected a number below sigma_max",
        ),
        ({"kind": "vp", "t_min": 2}, ValueError, "t_min: expected a number below t_max, 1.0, got 2"),
        ({"kind": "edm", "t_min": 80}, ValueError, "t_min: expected a number below t_max, 80.0, got 80"),
        ({"kind": "edm", "t_min": 90}, ValueError, "t_min: expected a number below t_max, 80.0, got 90"),
    ],
)
def test_what_is_no_process_is_refused(config, error, message):
    with pytest.raises(error, match=f"^{message}"):
        from_config(config)


@pytest.mark.parametrize("process", CONTINUOUS, ids=str)
def test_derivatives_of_many_times_are_those_of_each(process):
    t = np.linspace(0.1, 0.9, 5)
    for f in (process.derivatives, process.drift_and_diffusion):
        each = np.array([f(float(value)) for value in t]).T
        np.testing.assert_allclose([np.broadcast_to(column, 5) for column in f(t)], each, rtol=1e-15)
