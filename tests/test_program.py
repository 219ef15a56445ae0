"""Programs: the rows of every sampler give what the sampler gives, run directly."""

import math
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from gaussian import GRIDS, MOMENTS, Affine, Normal, interpret

from diffkern import samplers
from diffkern.prediction import PREDICTIONS
from diffkern.process import EDM, VE, VP, RectifiedFlow, SubVP
from diffkern.program import Direct, Trace
from diffkern.samplers import SAMPLERS, Sampler, sampler
from diffkern.schedule import Schedule


def case_name(case):
    options = "-".join(f"{name}={value}" for name, value in case["options"].items())
    return "-".join(filter(None, (case["sampler"], options, case["grid"])))


def heads(grid):
    """The predictions that make sense on a grid."""
    flows = grid.points[0].alpha == 0
    left_out = {"edm"} if not isinstance(grid.process, EDM) else set()
    left_out |= {"mu"} if not grid.process.discrete else set()
    return [name for name in PREDICTIONS if name not in left_out and not (flows and name in ("eps", "score"))]


@pytest.mark.parametrize("case", MOMENTS, ids=case_name)
def test_a_sampler_draws_the_known_moments_directly_and_as_a_program_with_every_head(case):
    sampler = SAMPLERS[case["sampler"]]
    for steps, (mean, std) in case["moments"].items():
        grid, data = GRIDS[case["grid"]](int(steps)), Affine()
        direct = sampler(Direct(grid, data.denoise, data.noise, data.x_T()), grid, **case["options"])
        assert data.moments(direct, grid.process.prior_std) == pytest.approx((mean, std), abs=1e-12)
        for prediction in heads(grid):
            program = sampler.trace(grid, prediction, **case["options"])
            for form in (program, program.fold()):
                x = interpret(form, data, data.x_T())
                assert np.abs(x - direct).max() <= 1e-12 * np.abs(direct).max()


OTHERS = [
    *(("midpoint", {}), ("kutta3", {}), ("rk4", {}), ("dopri5", {}), ("dpmpp_2s", {}), ("dpmpp_2s", {"r": 0.3})),
    *(("unipc", {"order": 4}), ("unipc", {"order": 3, "corrector": False}), ("dpmpp_3m", {"lower_final": False})),
    *(
        ("euler_a", {"eta": 0.5}),
        ("dpmpp_2m_sde", {"eta": 0.5}),
        ("ddpm", {"variance": [0.01] * 9}),
        ("consistency", {}),
    ),
    *(("repaint", {"jump": 2, "resample": 3}), ("pc", {"corrections": 2}), ("langevin", {"steps_a_level": 2})),
]


@pytest.mark.parametrize("schedule", ["cosine", "scaled_linear"])
@pytest.mark.parametrize("name, options", OTHERS, ids=str)
def test_a_program_is_its_sampler_on_other_schedules_too(name, options, schedule):
    grid, data = getattr(Schedule, schedule)().grid(9), Affine()
    direct = SAMPLERS[name](Direct(grid, data.denoise, data.noise, data.x_T()), grid, **options)
    x = interpret(SAMPLERS[name].trace(grid, "v", **options), data, data.x_T())
    assert np.abs(x - direct).max() <= 1e-8 * np.abs(direct).max()


@pytest.mark.parametrize("process", [EDM(), VP(), Schedule.linear()], ids=str)
def test_langevin_dynamics_draw_the_data_s_moments_on_any_process(process):
    sampler, data = SAMPLERS["langevin"], Affine()
    grid = process.grid(sampler.steps)
    x = sampler(Direct(grid, data.denoise, data.noise, data.x_T()), grid)
    mean, std = data.moments(x, grid.process.prior_std)
    assert mean == pytest.approx(0.3, abs=1e-3) and std == pytest.approx(0.5, abs=0.2)


def test_inversion_is_the_same_direct_and_as_a_program_and_ddim_gives_the_image_back():
    grid, data = Schedule.linear().grid(200), Affine()
    up = grid.reversed()
    image = np.eye(1, data.size, 1)[0]
    direct = SAMPLERS["ddim_inversion"](Direct(up, data.denoise, data.noise, image), up)
    assert interpret(SAMPLERS["ddim_inversion"].trace(up), data, image) == pytest.approx(direct, rel=1e-12, abs=1e-15)
    back = SAMPLERS["ddim"](Direct(grid, data.denoise, data.noise, direct), grid)
    assert back == pytest.approx(image, abs=0.1)


SLOPES = [  # order of the error in the number of steps, on the ODE of correlated Gaussian data
    *(("ddim", {}, "vp lambda", 1), ("euler", {}, "edm", 1), ("heun", {}, "edm", 2), ("velocity", {}, "flow", 2)),
    *(("dpmpp_2s", {}, "vp lambda", 2), ("dpmpp_2m", {}, "vp lambda", 2), ("dpmpp_3m", {}, "vp lambda", 3)),
    *(("unipc", {"order": 1, "corrector": False}, "vp lambda", 1), ("unipc", {"order": 1}, "vp lambda", 2)),
    *(("unipc", {"order": 2}, "vp lambda", 3), ("unipc", {"order": 3}, "vp lambda", 3)),
    *(
        ("deis", {"order": 2}, "vp lambda", 2),
        ("deis", {"order": 3}, "vp lambda", 3),
        ("lms", {"order": 3}, "edm", 2.8),
    ),
    *(("midpoint", {}, "edm", 2), ("kutta3", {}, "edm", 3), ("rk4", {}, "edm", 4), ("dopri5", {}, "edm", 5)),
    ("ipndm", {}, "edm", 1.8),
]


@pytest.mark.parametrize("name, options, grid, order", SLOPES, ids=str)
def test_a_solver_converges_with_its_order(name, options, grid, order):
    data = Normal(np.array([0.3, -0.2, 0.1]), np.array([[1.0, 0.3, 0.1], [0.3, 0.7, -0.2], [0.1, -0.2, 0.5]]))
    start = np.random.default_rng(0).standard_normal((64, 3))
    errors = []
    for N in (80, 160):
        points = EDM().grid(N, denoise=False) if grid == "edm" else GRIDS[grid](N)
        x = start * points.process.prior_std
        run = Direct(points, data.denoise, None, x)
        exact = data.flow(x, points.points[0], points.points[-1])
        errors.append(np.linalg.norm(SAMPLERS[name](run, points, **options) - exact))
    assert math.log2(errors[0] / errors[1]) >= order - 0.15


def test_dpmpp_3m_as_published_has_order_2():
    data = Normal(np.zeros(2), np.array([[0.3, 0.1], [0.1, 0.2]]))
    errors = []
    for N in (80, 160):
        grid = VP().grid(N, "lambda", denoise=False)
        x = np.array([[0.5, -1.0]])
        exact = data.flow(x, grid.points[0], grid.points[-1])
        errors.append(
            np.abs(SAMPLERS["dpmpp_3m"](Direct(grid, data.denoise, None, x), grid, published=True) - exact).max()
        )
    assert 1.8 <= math.log2(errors[0] / errors[1]) <= 2.2


@pytest.mark.parametrize(
    "one, other",
    [
        (("unipc", {"order": 2, "corrector": False}), ("dpmpp_2m", {})),
        (("unipc", {"order": 3, "corrector": False}), ("dpmpp_3m", {})),
        (("ddim", {"eta": 1.0}), ("ddpm", {})),
        (("ddim", {"eta": 1.0}), ("euler_a", {})),
        (("ddim", {}), ("euler", {})),
        (("ddim", {}), ("dpmpp_1m", {})),
        (("dpmpp_2m_sde", {"eta": 0.0}), ("dpmpp_2m", {})),
    ],
    ids=str,
)
def test_samplers_of_two_papers_are_one(one, other):
    grid, data = Schedule.linear().grid(12), Affine()
    (a, b) = (SAMPLERS[n](Direct(grid, data.denoise, data.noise, data.x_T()), grid, **o) for n, o in (one, other))
    assert a == pytest.approx(b, rel=1e-11, abs=1e-13)


ROWS = {  # the most bytes that a row reads and writes for an element, in float32
    **{("ddpm", ()): 12, ("heun", ()): 16, ("dpmpp_2m", ()): 20, ("dpmpp_3m", ()): 24},
    **{("unipc", (("order", p),)): 16 + 4 * p for p in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name, options", ROWS, ids=str)
def test_rows_move_as_few_bytes_as_their_sampler_needs(name, options):
    assert max(SAMPLERS[name].trace(Schedule.linear().grid(20), **dict(options)).bytes()) == ROWS[name, options]


def test_tracing_is_quick():
    def seconds(name, N):
        grid = Schedule.linear().grid(N)
        begin = time.thread_time()
        SAMPLERS[name].trace(grid, "eps").table(1.0)
        return time.thread_time() - begin

    assert min(seconds("unipc", 20) for _ in range(5)) < 0.1  # on a slow processor too
    assert min(seconds("ddpm", 1000) for _ in range(2)) < 3


def test_noise_of_a_path_is_that_of_all_the_time_steps_that_a_step_passes():
    program = SAMPLERS["ddpm"].trace(Schedule.linear().grid(10, path=True))
    assert program.addresses().tolist()[:-1] == [[t, 100] for t in range(999, 199, -100)] + [[199, 100]]
    once = SAMPLERS["ddpm"].trace(Schedule.linear().grid(1000, path=True))
    ordinary = SAMPLERS["ddpm"].trace(Schedule.linear().grid(1000))
    assert once.addresses().equal(ordinary.addresses()) and once.table().equal(ordinary.table())


def test_every_process_has_a_path():
    for process in (VP(), SubVP(), VE(), EDM(), RectifiedFlow()):
        for steps in (1, 10, 50):
            rows = SAMPLERS["ddpm"].trace(process.grid(steps, path=True)).rows
            drawn = [row.noise.address - i for row in rows if row.noise for i in range(row.noise.count)]
            assert len(set(drawn)) == len(drawn) and all(0 <= address < 2**20 for address in drawn)


def test_noise_of_a_point_is_never_that_of_a_path():
    grid = VP().grid(5, path=True)
    m = Trace(grid)
    along = {(z.address - i) for s, t in grid.steps for z in m.z(s, t).coefficients for i in range(z.count)}
    beside = {z.address for s, _ in grid.steps for z in m.z(s).coefficients}
    assert not along & beside


def test_each_visit_of_a_time_step_has_noise_of_its_own():
    program = SAMPLERS["repaint"].trace(Schedule.linear().grid(20), jump=5, resample=4)
    addresses = [row.noise.address for row in program.rows if row.noise]
    assert len(set(addresses)) == len(addresses) and max(addresses) < 2**32
    assert program.calls == 15 * 4 + 5


def drawn(name, grid, **options):
    """The addresses of all normals of a program, in their order."""
    noises = [row.noise for row in SAMPLERS[name].trace(grid, **options).rows if row.noise]
    return [noise.address - i for noise in noises for i in range(noise.count)]


def test_noises_have_the_addresses_of_the_page_on_noise():
    steps = [900, 500, 100]
    assert drawn("ddpm", Schedule.linear().grid(steps)) == [900, 500]
    assert drawn("ddpm", VP().grid([0.9, 0.5, 0.1])) == [0, 1]  # points, counted from t_max
    visits = drawn("pc", Schedule.linear().grid(steps), corrections=2)
    assert visits == [s + (visit << 20) for s in steps for visit in range(3)][:-1]
    halves = [2**31 + 2 * s + half for s in (900, 500) for half in (1, 1, 0)]  # one half, then both
    assert drawn("dpmpp_sde", Schedule.linear().grid(steps)) == halves
    assert drawn("ddpm", Schedule.linear().grid(steps, path=True)) == list(range(900, 100, -1))
    grid = VP().grid(10, path=True)
    cells = [round((7 - max(point.lam, -7)) * 1024 / 14) - 1 for point in grid.points[:-1]]
    assert [point.address for point in grid.points] == [*cells, -1]


def test_a_state_that_is_lost_is_named():
    def forgetful(m, grid):
        x = m.start()
        for s, t in m.steps():
            before = x * 1.0
            x = m(x, s) * t.alpha + m.z(s, t) * t.sigma
            x = x + before
        return m.program(x)

    grid = Schedule.linear().grid(3)
    forgetful(Trace(grid), grid)  # here x holds what was before

    def lost(m, grid):
        x = m.start()
        first = x * 1.0
        for s, t in m.steps():
            x = m(x, s) * t.alpha
        return m.program(x + first)

    with pytest.raises(ValueError, match=r"sampler: expected m\.keep\(x\)"):
        lost(Trace(grid), grid)


def test_the_page_on_systems_names_every_sampler():
    page = (Path(__file__).parents[1] / "docs" / "systems.md").read_text()
    assert [name for name in SAMPLERS if f"`{name}`" not in page] == []


def test_a_sampler_whose_coefficients_are_not_finite_is_refused():
    def divided(m, grid):
        x = m.start()
        for s, t in m.steps():
            x = m(x, s) * (math.inf if t.sigma == 0 else 1.0)
        return m.program(x)

    with pytest.raises(ValueError, match="sampler: expected one with finite coefficients .* got 'divided'"):
        Sampler(divided).trace(Schedule.linear().grid(3))


NOT_LINEAR = {
    "power": (lambda x, d, s: d**2, "a power, a reciprocal or a comparison"),
    "reciprocal": (lambda x, d, s: 1 / d, "a power, a reciprocal or a comparison"),
    "comparison": (lambda x, d, s: x if x > 0 else d, "a power, a reciprocal or a comparison"),
    "product": (lambda x, d, s: x * d, "a product of two"),
    "quotient": (lambda x, d, s: x / d, "a quotient of two"),
    "sum": (lambda x, d, s: x + 1.0, "a sum with a float"),
    "difference": (lambda x, d, s: 1 - x, "a difference from a int"),
    "torch": (lambda x, d, s: torch.tanh(x), "torch's tanh"),
    "tensor": (lambda x, d, s: torch.ones(2) + x, "a sum with a Tensor"),
}


@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_no_row_can_hold_is_told_of(name):
    function, got = NOT_LINEAR[name]

    def bent(m, grid):
        x = m.start()
        for s, t in m.steps():
            x = function(x, m.eps(x, s), s) * torch.tensor(t.alpha)  # a tensor of one number is a factor
        return m.program(x)

    with pytest.raises(TypeError, match=f"sampler: expected sums and multiples of the state and .*, got {got}"):
        Sampler(bent).trace(Schedule.linear().grid(3))


@pytest.mark.parametrize(("returned", "got"), [(lambda m: None, "nothing"), (lambda m: m.start(), "a Form")])
def test_a_sampler_that_returns_no_program_is_told_of(returned, got):
    def lost(m, grid):
        return returned(m)

    with pytest.raises(TypeError, match=rf"sampler: expected 'lost' to return m\.program\(x\), got {got}"):
        Sampler(lost).trace(Schedule.linear().grid(3))


def test_a_sampler_takes_no_other_samplers_name():
    def made():
        @sampler()
        def mine(m, grid):
            return m.program(m.start())

        return mine

    with mock.patch.dict(SAMPLERS):
        first, again = made(), made()  # a definition that is run again
        assert SAMPLERS["mine"] is again is not first
        with pytest.raises(ValueError, match="sampler: expected a function whose name no sampler has, got 'ddim'"):

            @sampler()
            def ddim(m, grid):
                return m.program(m.start())

        assert SAMPLERS["ddim"] is samplers.ancestral.ddim


def test_every_sampler_is_an_attribute_of_the_package():
    assert all(getattr(samplers, name) is sampler for name, sampler in SAMPLERS.items())


def test_a_short_table_refuses_a_sampler_that_visits_a_time_step_twice():
    with pytest.raises(ValueError, match="sampler: expected one that draws the noise of each time step once"):
        samplers.pc(Schedule.linear(), [900, 500, 0], "x0")


def test_options_are_the_samplers_own():
    with pytest.raises(TypeError, match=r"order: expected an option of sampler 'ddim' \(eta\), got 2"):
        SAMPLERS["ddim"].trace(Schedule.linear().grid(5), order=2)
    with pytest.raises(ValueError, match="prediction: expected 'v', 'x0' or 'flow' where alpha falls to 0"):
        SAMPLERS["ddim"].trace(RectifiedFlow().grid(5), "eps")
