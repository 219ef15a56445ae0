"""The figures of the theory: their numbers are those of closed forms, what trains learns, the command writes them."""

import math
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.integrate import quad
from tiny import one_thread  # noqa: F401

from diffkern import RectifiedFlow, Schedule, cli, nll, noise, sample
from diffkern.cli import plot as plot_command
from diffkern.evaluate import precision_recall
from diffkern.prediction import head_at
from diffkern.show import (
    Figure,
    Panel,
    consistency,
    convergence,
    elbo,
    figures,
    flow,
    forward,
    gaussians,
    guidance,
    inpaint,
    kl,
    mixture,
    objectives,
    path_noise,
    paths,
    processes,
    sampler_of,
    schedule,
    swiss_roll,
)
from diffkern.show.gaussians import Gaussians

FLOAT = dict(dtype=torch.float64, device="cpu")
NAMES = (
    *("consistency", "convergence", "elbo", "flow", "forward", "guidance", "inpaint", "kl", "mixture", "objectives"),
    *("path-noise", "paths", "processes", "schedule", "swiss-roll"),
)
SMALL = {  # as options of the command; forward loads the model that ships
    "consistency": ["--n", "20"],
    "convergence": ["--n", "4", "--samplers", "euler", "unipc,order=1", "--process", "edm"],
    "elbo": ["--n", "4"],
    "flow": ["--n", "10", "--steps", "1", "--no-progress"],
    "forward": ["--n", "2", "--steps", "1", "--no-progress"],
    "guidance": ["--n", "10", "--steps", "2"],
    "inpaint": ["--n", "5", "--steps", "4"],
    "kl": ["--n", "1001"],
    "mixture": ["--n", "5"],
    "objectives": ["--n", "5"],
    "path-noise": ["--n", "5", "--steps", "10"],
    "paths": ["--n", "20", "--steps", "8"],
    "processes": ["--n", "5"],
    "schedule": ["--steps", "10"],
    "swiss-roll": ["--n", "20", "--steps", "1", "--no-progress"],
}

# --- the exact network ---

DATA = Gaussians([[0.5, -1.0], [-1.0, 0.2], [0.9, 0.8]], [0.3, 0.5, 0.2], [0.5, 0.2, 0.3], labels=[0, 1, 1])


def on_a_grid(t: int, x_t: torch.Tensor, label: int) -> torch.Tensor:
    """E[x_0 | x_t, label] by Bayes' rule, summed over a grid of x_0."""
    side = torch.linspace(-4, 4, 201, **FLOAT)
    x_0 = torch.cartesian_prod(side, side)
    known = Gaussians(DATA.means, DATA.stds, DATA.weights * ((DATA.labels == label) | (label < 0)))
    alpha, sigma = Schedule.linear().alpha_bar[t].sqrt(), Schedule.linear().one_minus_alpha_bar[t].sqrt()
    log = known.log_prob(x_0) - ((x_t.double() - alpha * x_0) / sigma).square().sum(1) / 2
    return log.softmax(0) @ x_0


@pytest.mark.parametrize("label", [-1, 0, 1])
def test_the_exact_network_is_bayes_rule(label):
    linear = Schedule.linear()
    model = DATA.model(linear, "x0")
    x_t, t = torch.tensor([[0.3, -0.4], [-1.2, 0.9]]), torch.tensor([150, 700])
    out = model(x_t, t, torch.full_like(t, label))
    exact = torch.stack([on_a_grid(int(t[i]), x_t[i], label) for i in range(2)])
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["eps", "v", "score", "flow", "mu"])
def test_every_prediction_of_the_exact_network_tells_the_same_x_0(prediction):
    process = Schedule.linear()
    x_t, t = DATA.draw(3)[0], torch.full((3,), 400)
    p_x, p_o = head_at(prediction, process.point(400), process)
    x0_hat = p_x * x_t + p_o * DATA.model(process, prediction)(x_t, t)
    torch.testing.assert_close(x0_hat, DATA.model(process, "x0")(x_t, t), rtol=0, atol=2e-4)


def test_the_exact_network_of_a_straight_flow_draws_the_data():
    x = sample(DATA.model(RectifiedFlow(), "flow"), 2000, sampler="velocity", steps=50, batch_size=2000, progress=False)
    truth, k = DATA.draw(2000)
    assert abs(mixture.energy_distance(x, truth)) < 0.01
    assert (k.bincount() / 2000 - DATA.weights).abs().max() < 4 * 0.5 / math.sqrt(2000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [1.0]), r"means: expected shape \(K, D\), got \(1,\)"),
        (([[0.0]], [1.0, 1.0]), r"stds: expected shape \(1,\), got \(2,\)"),
        (([[0.0]], [1.0], None, [0, 1]), r"labels: expected shape \(1,\), got \(2,\)"),
    ],
)
def test_gaussians_of_shapes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gaussians(*arguments)


def test_labels_need_classes():
    with pytest.raises(ValueError, match="labels: expected None of a mixture without classes"):
        Gaussians([[0.0]], [1.0]).predict(torch.zeros(2, 1), 0.5, 0.5, torch.tensor([0, -1]))


def test_a_plane_has_the_density_of_the_mixture():
    panel = gaussians.plane("", DATA, {}, 5.0)
    assert panel.image.sum().item() * (10 / 99) ** 2 == pytest.approx(1, abs=1e-3)
    row, column = divmod(panel.image.argmax().item(), 100)  # the narrowest one is the highest: at (0.9, 0.8)
    assert (-5 + column * 10 / 99, -5 + row * 10 / 99) == pytest.approx((0.9, 0.8), abs=0.06)


# --- precision and recall ---


def test_precision_and_recall_of_points_on_a_line():
    real = torch.arange(10.0)[:, None]  # the balls of k = 1 reach to the neighbours: -1 to 10
    drawn = torch.tensor([[-1.0], [-0.8], [4.4], [4.9], [10.5], [10.6]])  # theirs hold 4 and 5 alone
    assert precision_recall(real, drawn, k=1) == (4 / 6, 2 / 10)
    assert precision_recall(real, real.clone(), k=3, batch_size=4) == (1.0, 1.0)
    assert precision_recall(real, real + 100) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("real", "drawn", "k", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(9, 2), 3, r"real: expected features \[more than 3, 2\], got \(3, 2\)"),
        (torch.zeros(9, 2), torch.zeros(9, 3), 3, r"drawn: expected features \[more than 3, 2\], got \(9, 3\)"),
        (torch.zeros(9, 2), torch.zeros(9, 2), 0, "k: expected an int >= 1, got 0"),
    ],
)
def test_precision_and_recall_refuse_what_they_cannot_measure(real, drawn, k, message):
    with pytest.raises(ValueError, match=message):
        precision_recall(real, drawn, k=k)


# --- the figures' numbers ---


def test_the_forward_process_ends_in_white_noise():
    """A correlation of n values near 0 has the standard error 1 / sqrt(n): 5 of them are allowed."""
    linear, n = Schedule.linear(), 50_000
    x_0 = noise(torch.arange(50), (1, 20, 50), step=0, stream=0)
    found = forward.noised(x_0 / x_0.std(), linear, [0, 300, 600, 999])
    alpha = linear.alpha_bar[[0, 300, 600, 999]].sqrt()
    assert found.column("expected") == pytest.approx(alpha.tolist(), abs=1e-7)  # as the variance is 1
    assert found.column("correlation with x_0") == pytest.approx(alpha.tolist(), abs=5 / math.sqrt(n))
    assert found.column("std") == pytest.approx([1] * 4, abs=5 / math.sqrt(n))
    for name in ("mean", "with the next pixel"):
        assert abs(found.column(name)[-1]) < 5 / math.sqrt(n)


def test_the_forward_process_of_smooth_images_forgets_their_neighbourhoods():
    x_0 = torch.linspace(-0.5, 0.1, 64)[None, None, :, None].expand(8, 1, 64, 64)
    found = forward.noised(x_0, Schedule.linear(), [0, 999])
    assert found.column("with the next pixel")[0] > 0.99
    assert abs(found.column("with the next pixel")[1]) < 5 / math.sqrt(8 * 64 * 64)
    assert found.panels[0].image.shape == (8 * 64, 2 * 64)


def test_the_prior_of_a_schedule_is_that_of_the_bound_and_zero_terminal_snr_has_none():
    found = schedule.figure(20)
    known, x = schedule.schedules(20), torch.tensor([[-1.0], [1.0]])  # mean 0, variance 1
    network = lambda x, t, labels: torch.zeros_like(x)  # noqa: E731
    for name, alpha_bar, snr, prior in found.rows[:-1]:
        terms = nll(network, x, schedule=known[name], levels=None, prediction="eps", progress=False).terms
        assert prior == pytest.approx(terms["prior"], rel=1e-9)
        assert snr == pytest.approx(alpha_bar / (1 - alpha_bar))
    assert found.rows[-1] == ("linear, zero terminal SNR", 0, 0, 0)


def test_rescaling_to_zero_terminal_snr_keeps_the_first_step():
    linear = Schedule.linear()
    rescaled = schedule.zero_terminal_snr(linear)
    alpha, before = rescaled.alpha_bar.sqrt(), linear.alpha_bar.sqrt()
    assert alpha[-1] == 0 and alpha[0].item() == pytest.approx(before[0].item(), abs=1e-12)
    slope = (before[0] / (before[0] - before[-1])).item()
    torch.testing.assert_close(alpha, (before - before[-1]) * slope, rtol=1e-9, atol=1e-12)


def test_guidance_trades_recall_for_precision():
    found = guidance.figure(200, 20)
    assert found.column("scale") == ["0", "1", "3", "other points"]
    (none, one, three, data), recall = found.column("precision"), found.column("recall")
    assert none + 0.1 < one and min(one, three) > data - 0.05 and data > 0.9
    assert min(recall[0], recall[1], recall[3]) > 0.85 and recall[2] < recall[1] - 0.1
    right = found.column("p(label given x)")
    assert right[0] == pytest.approx(0.5, abs=0.06) and right[0] + 0.3 < right[1] < right[2] < 1


def test_more_steps_bring_samplers_nearer_to_the_mixture():
    found = mixture.figure(300)
    by = {row[:2]: row[2:] for row in found.rows}
    assert len(found.rows) == 17 and found.across == 4
    for name in mixture.SAMPLERS:
        distances = [by[name, steps][0] for steps in mixture.STEPS]
        assert distances[0] > 2 * distances[1] > 2 * distances[3] and abs(distances[3]) < 0.01
        assert by[name, 50][1] < 4 * 0.5 / math.sqrt(300)
    assert by["unipc", 10][0] < by["ddim", 10][0] < by["ddpm", 10][0]


def test_the_energy_distance_of_two_normals_is_the_closed_form():
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of N(0, 1) and N(1, 1): with D ~ N(m, 2), E|D| = 2 e^(-m^2/4) / sqrt(pi) +
    m erf(m / 2)."""
    x = noise(torch.arange(2000), (1,), step=0)
    y = noise(torch.arange(2000), (1,), step=1) + 1
    mean = lambda m: 2 * math.exp(-m * m / 4) / math.sqrt(math.pi) + m * math.erf(m / 2)  # noqa: E731
    assert mixture.energy_distance(x, y) == pytest.approx(2 * (mean(1) - mean(0)), abs=0.06)


def integral(p, q) -> float:
    """KL(p || q) of two functions for ln p and ln q, by scipy."""
    value = lambda x: math.exp(p(x)) * (p(x) - q(x))  # noqa: E731
    return quad(value, -25, 25, points=[-2, 0, 2], limit=200, epsabs=1e-9)[0]


def test_both_divergences_are_the_integrals_and_one_fit_covers_where_the_other_seeks():
    found = kl.figure(601)
    (weight_a, weight_b), (a, b), (s_a, s_b) = kl.DATA.weights, kl.DATA.means[:, 0], kl.DATA.stds
    mean = (weight_a * a + weight_b * b).item()
    std = math.sqrt(weight_a * (s_a**2 + a**2) + weight_b * (s_b**2 + b**2) - mean**2)

    def log_normal(x, mean, std):
        return -(((x - mean) / std) ** 2) / 2 - math.log(std * math.sqrt(2 * math.pi))

    modes = [(math.log(w), m, s) for w, m, s in zip(*(v.flatten().tolist() for v in
             (kl.DATA.weights, kl.DATA.means, kl.DATA.stds)), strict=True)]  # fmt: skip
    log_p = lambda x: np.logaddexp(*(w + log_normal(x, m, s) for w, m, s in modes))  # noqa: E731
    for _, at, spread, forwards, reverse in found.rows:
        log_q = partial(log_normal, mean=at, std=spread)
        assert forwards == pytest.approx(integral(log_p, log_q), abs=1e-6)
        assert reverse == pytest.approx(integral(log_q, log_p), abs=1e-6)
    covers, seeks = found.rows
    assert covers[1:3] == pytest.approx((mean, std), abs=1e-12)
    assert seeks[1:3] == pytest.approx((b.item(), s_b.item()), abs=0.02)  # the heavier mode, hardly wider
    assert covers[3] < seeks[3] and seeks[4] < covers[4]
    for off in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        near = partial(log_normal, mean=seeks[1] + off[0], std=seeks[2] + off[1])
        assert integral(near, log_p) > seeks[4]


def test_the_closed_bound_is_the_known_one_for_every_number_of_steps():
    for steps in (5, 10, 20, 50, 1000):
        respaced = Schedule.linear().respace(steps)
        known = elbo.variances(elbo.DATA, respaced)
        assert elbo.bound(elbo.DATA, respaced, known["optimal"]) == pytest.approx(1.047098205623, abs=1e-12)
    assert elbo.bound(elbo.DATA, respaced, known["fixed_large"]) == pytest.approx(1.048673996612, abs=1e-12)
    assert elbo.bound(elbo.DATA, respaced, known["fixed_small"]) == pytest.approx(1.869327520367, abs=1e-12)


def test_the_bound_of_nll_is_the_closed_form_within_its_standard_error():
    found = elbo.figure(1000)
    assert len(found.rows) == 12
    for _, _, bits, error, exact, entropy, gap in found.rows:
        assert abs(bits - exact) < 4 * error < 0.4
        assert entropy == pytest.approx(1.047095585181, abs=1e-12) and gap == exact - entropy > 2e-6


def test_forward_and_reverse_paths_have_the_exact_distribution_at_every_time():
    """Kolmogorov: sup |F_n - F| exceeds 1.95 / sqrt(n) once in 1000 draws."""
    found = paths.figure(500, 100)
    assert found.column("step") == [0, 25, 50, 75, 100]
    for kind in ("forward", "reverse SDE", "ODE"):
        assert max(found.column(kind)) < 1.95 / math.sqrt(500)
    truth, _ = paths.DATA.draw(20_000)
    assert found.column("std")[0] == pytest.approx(truth.std().item(), rel=0.03)
    assert found.column("std")[-1] == pytest.approx(1, abs=1e-3)


def test_the_distance_of_distributions_is_that_of_scipy():
    from scipy.stats import kstest

    x = torch.tensor([-1.4, 0.3, 1.1, 2.0, -1.6])
    cdf = lambda values: sum(  # noqa: E731
        w * torch.special.ndtr((torch.as_tensor(values) - 0.6 * m) / math.hypot(0.6 * s, 0.8))
        for w, m, s in zip(paths.DATA.weights, paths.DATA.means[:, 0], paths.DATA.stds, strict=True)
    ).numpy()
    assert paths.DATA.distance(x, 0.6, 0.8) == pytest.approx(kstest(x.double().numpy(), cdf).statistic, abs=1e-12)


def test_the_paths_of_the_ode_do_not_cross():
    path = paths.backward(Schedule.linear(50, 1e-3, 0.3), 30, "ddim")
    assert path.shape == (51, 30)
    assert (path[:, path[-1].argsort()].diff(dim=1) > 0).all()


def test_the_quantile_undoes_the_distribution_function():
    p = torch.tensor([1e-6, 0.2, 0.5, 0.999], **FLOAT)
    for alpha, sigma in ((1.0, 0.0), (0.6, 0.8), (0.0, 1.0)):
        x = paths.DATA.quantile(p, alpha, sigma)
        torch.testing.assert_close(paths.DATA.cdf(x, alpha, sigma), p, rtol=1e-9, atol=0)
    torch.testing.assert_close(x, torch.special.ndtri(p), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("process", "solver", "order"),
    [("vp", "dpmpp_2m", 2), ("vp", "dpmpp_3m,published=True", 2), ("vp", "unipc", 3), ("edm", "rk4", 4),
     ("flow", "velocity", 2)],
)  # fmt: skip
def test_solvers_converge_with_their_orders_on_a_mixture(process, solver, order):
    first, then = (convergence.error(*sampler_of(solver), process, calls, n=20) for calls in (72, 144))
    assert math.log2(first / then) == pytest.approx(order, abs=0.15)


def test_the_exact_consistency_function_draws_the_data_in_one_step():
    function, denoiser = consistency.figure(1000).rows
    assert max(function[1:4]) < 1.95 / math.sqrt(1000) < 0.2 < denoiser[3] < denoiser[1]


def test_the_conditional_of_a_mixture_is_bayes_rule():
    y = torch.linspace(-2, 2, 5, **FLOAT)
    joint = inpaint.DATA.log_prob(torch.stack((torch.full_like(y, 0.7), y), 1))
    marginal = Gaussians(inpaint.DATA.means[:, :1], inpaint.DATA.stds).log_prob(torch.tensor([[0.7]]))
    exact = inpaint.conditional(inpaint.DATA, 0.7)
    torch.testing.assert_close(exact.log_prob(y[:, None]), joint - marginal, rtol=0, atol=1e-7)


def test_a_gradient_through_the_network_inpaints_nearer_to_the_conditional_than_a_blend():
    exact, blend, *_, gradient = inpaint.figure(300, 10).rows
    assert gradient[4] + 0.1 < blend[4] and abs(gradient[2] - exact[2]) < abs(blend[2] - exact[2]) / 2


def test_noise_of_a_path_keeps_a_seed_s_point():
    found = path_noise.figure(200, 100)  # 2, 2, 5 and 20 of 100 steps
    step, path = (found.column("correlation with all steps")[i : i + 4] for i in (0, 4))
    assert max(step) < 0.5 < 0.8 < path[2] < 0.95 < path[3]


def test_a_process_has_its_ends():
    by = {row[0]: row[2:] for row in processes.figure(3).rows}
    assert by["RectifiedFlow()"] == (0, 1, math.inf, -math.inf, 1)
    assert by["VE()"] == pytest.approx((1, 50, math.log(100), -math.log(50), math.log(50)))
    assert by["EDM()"] == pytest.approx((1, 80, math.log(500), -math.log(80), math.log(80) / 4))


def test_the_weights_of_eps_are_the_papers():
    by = {row[0]: row[1:] for row in objectives.figure(3).rows}
    snr = np.array(objectives.SNR)
    for name, weight in {
        "simple, eps": 1 + 0 * snr,
        "simple, x0": 1 / snr,
        "simple, v": 1 + 1 / snr,
        "min_snr": np.minimum(snr, 5) / snr,
        "p2": 1 / (1 + snr),
        "edm": (4 + snr) / snr,
        "flow": (1 + np.sqrt(snr)) ** 2 / snr,
    }.items():
        assert by.pop(name) == pytest.approx(weight, rel=1e-5)
    assert not by


# --- the swiss roll ---


def bound(model, x) -> float:
    """In nats."""
    return nll(model, x, levels=None, batch_size=len(x), progress=False).bits.mean().item() * 2 * math.log(2)


@pytest.mark.parametrize("variance", ["diagonal", "full"])
def test_some_steps_lower_the_bound(variance):
    x = swiss_roll.swiss_roll(100, torch.Generator().manual_seed(1))
    first, then = (bound(swiss_roll.train(variance, steps, batch_size=64), x) for steps in (1, 60))
    assert then < first - 0.3


def test_the_swiss_roll_has_a_row_for_each_covariance_and_leaves_the_generator_alone():
    before = torch.random.get_rng_state()
    found = swiss_roll.figure(1, 50, progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert found.column("variance") == ["diagonal", "full", "data"]
    assert all(map(math.isfinite, found.column("bound, nats")[:2]))
    assert found.table().splitlines()[-1].startswith("| data |  | ")


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


PAGE = {section.split()[0]: section for section in (ROOT / "docs" / "figures.md").read_text().split("\n## ")[1:]}


def test_the_page_has_a_section_for_each_figure():
    assert sorted(PAGE) == sorted(figures())
    for name, section in PAGE.items():
        assert f"`diffkern show {name}`" in section


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*NAMES} - {"flow", "swiss-roll"}))  # trained, so rounding may grow
def test_the_page_has_the_tables_that_the_commands_print(name):
    options = {"progress": False} if name == "forward" else {}
    shown, computed = (cells(text.splitlines()) for text in (PAGE[name], figures()[name].figure(**options).table()))
    assert len(shown) == len(computed)
    for row, expected in zip(shown, computed, strict=True):
        for cell, value in zip(row, expected, strict=True):
            assert cell == value or float(cell) == pytest.approx(float(value), rel=0.01, abs=2e-3), row


@pytest.mark.slow
def test_a_full_covariance_has_the_better_bound_and_samples_lie_on_the_roll():
    found = swiss_roll.figure(progress=False)
    (diagonal, full, _), gaussian = found.column("bound, nats"), found.column("best Gaussian")[0]
    assert full < diagonal - 0.1 < gaussian - 1.5
    middle = found.column("distance to the roll, median")
    assert middle[1] < 2 * middle[2]


@pytest.mark.slow
def test_a_flow_and_a_diffusion_come_near_the_truth(monkeypatch):
    monkeypatch.setattr(flow, "DENSITIES", {"eight Gaussians": flow.DENSITIES["eight Gaussians"]})
    truth, by_flow, by_diffusion = flow.figure(progress=False).column("KL to the truth, nats")
    assert truth == 0 and 0 < by_flow < 0.2 and 0 < by_diffusion < 0.05


# --- the command ---


def without_matplotlib(name):
    return None if name == "matplotlib" else find_spec(name)


def test_the_figures_are_found():
    assert tuple(figures()) == NAMES


def test_the_help_has_a_line_for_each_figure(capsys):
    with pytest.raises(SystemExit):
        cli.main(["show", "--help"])
    told = capsys.readouterr().out
    for name, module in figures().items():
        assert f"  {name:12}{module.__doc__.splitlines()[0]}" in told


@pytest.mark.parametrize("name", NAMES)
def test_show_prints_the_table_alone_without_matplotlib(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_command, "find_spec", without_matplotlib)
    state = torch.random.get_rng_state()
    assert cli.main(["show", name, *SMALL[name]]) == 0
    told = capsys.readouterr()
    lines = told.out.splitlines()
    assert len(lines) > 3 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert told.err == "out: matplotlib is not installed, the tables are all: pip install matplotlib\n"
    assert not list(tmp_path.iterdir()) and torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("out", [None, "mine.png"])
def test_show_writes_its_picture(out, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    assert cli.main(["show", "kl", *SMALL["kl"], *(["--out", out] if out else [])]) == 0
    written = out or "kl.png"
    assert capsys.readouterr().out.splitlines()[-1] == written
    assert [path.name for path in tmp_path.iterdir()] == [written] and Image.open(written).size == (500, 350)


def test_a_panel_s_image_points_and_lines_are_drawn():
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure as Canvas

    axes, x = Canvas().subplots(), torch.arange(30.0)
    image, extent = torch.arange(6.0).view(2, 3), (0.0, 3.0, 0.0, 2.0)
    lines = {"one": (x, x), "many": (x, torch.stack((x, 2 * x), 1)), "": (x, x)}
    panel = Panel("title", image, extent, points={"points": torch.ones(5, 2)}, lines=lines, axes=dict(xlim=(0, 9)))
    plot_command._draw(axes, panel)
    assert axes.get_title() == "title" and axes.get_xlim() == (0, 9)
    assert (axes.images[0].get_array() == image.numpy()).all() and axes.images[0].origin == "lower"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["points", "one", "many"]
    assert [len(line.get_xdata()) for line in axes.lines] == [5, 30, 30, 30, 30]
    assert axes.lines[2].get_color() == axes.lines[3].get_color() != axes.lines[1].get_color()


def test_panels_are_in_rows(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    plot_command.draw_panels(str(tmp_path / "six.png"), [Panel("")] * 5, across=3)
    assert Image.open(tmp_path / "six.png").size == (900, 600)


def test_a_sampler_s_text_has_its_options():
    assert sampler_of("unipc,order=3,variant=B1") == ("unipc", {"order": 3, "variant": "B1"})
    assert sampler_of("ddim") == ("ddim", {})
    with pytest.raises(TypeError, match="eta: expected an option of sampler 'unipc'"):
        sampler_of("unipc,eta=1")


def test_a_table_is_markdown():
    made = Figure(("name", "n", "value"), [("a", 3, 0.123456), ("b", 4, math.nan)], [])
    expected = ["| name | n | value |", "| --- | ---: | ---: |", "| a | 3 | 0.1235 |", "| b | 4 |  |"]
    assert made.table().splitlines() == expected
    assert made.column("n") == [3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "argument FIGURE: invalid choice: 'nothing'"),
        ([], "the following arguments are required: FIGURE"),
        (["kl", "--steps", "5"], "steps: expected none with kl, got 5"),
        (["kl", "--n", "600", "--out", "no.png"], "n: expected at least 601 points of a grid, got 600"),
        (["mixture", "--samplers", "none"], "samplers: expected names of "),
        (["convergence", "--samplers", "ddpm"], "samplers: expected solvers of the ODE, got one that draws noise"),
        (["convergence", "--process", "ve"], "process: expected one of vp, edm, flow, got 've'"),
        (["kl", "--out", "kl.pdf"], "out: expected a file name that ends in .png, got 'kl.pdf'"),
    ],
    ids=" ".join,
)
def test_show_refuses_what_is_no_figure_or_option_of_it(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot_command, "tell", lambda line: None)  # of matplotlib, where it is not installed
    assert cli.main(["show", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"diffkern: error: {message}")
