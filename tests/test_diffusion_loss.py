"""The training losses: squared error and the bound's term, value and gradient, and the same bits for any split."""

import math

import levels
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts, shapes
from levels import DTYPES, digest, values
from levels import loss_rows as table
from tolerances import BIN, BOUND, LOSS, ROUNDING

from diffkern import ops, reference, torch_ops
from diffkern.ops import LOSS_COLUMNS
from diffkern.schedule import Schedule
from diffkern.training import objectives

T = torch.tensor([0, 1, 2, 3, 0, 1, 2])
WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, -1.0, 1e-3, 30.0])
FIRST = {"divergence": 0.0, "bins": 1.0, "density": 2.0}


def case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, learned_variance: bool = False):
    """out [7, ...] and an x_0 of the 256 levels of an image."""
    doubled = (2 * shape[0], *shape[1:]) if learned_variance else shape
    image = (values((7, *shape), seed=9, scale=100).round().clamp(-127, 128) - 0.5) / 127.5
    return values((7, *doubled), dtype), image.to(dtype)


def gradient(out: torch.Tensor, incoming: torch.Tensor, *arguments, **options) -> torch.Tensor:
    out = out.detach().requires_grad_()
    return torch.autograd.grad(ops.diffusion_loss(out, *arguments, **options), out, incoming)[0]


def exact_gradient(out: torch.Tensor, incoming: torch.Tensor, x_0: torch.Tensor | None, *arguments, **options):
    """By torch's derivative of the float64 composite."""
    seeds, step, rows = arguments
    x_0 = None if x_0 is None else x_0.double()
    with torch_ops():
        return gradient(out.double(), incoming.double(), x_0, seeds, step, rows.double(), **options)


OPTIONS = [
    dict(),
    dict(weights=WEIGHTS),
    dict(learned_variance=True),
    dict(bound=True),
    dict(bound=True, clip=True, stop_mean=False),
    dict(bound=True, learned_variance=True, weights=WEIGHTS),
    dict(bound=True, learned_variance=True, stop_mean=False, clip=True, address=torch.arange(7) * 99),
]
NAMES = ["-".join(options) or "mse" for options in OPTIONS]


# --- values ---


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (1025,), (3, 33, 35)])
def test_the_losses_are_their_equations_in_float64(shape, dtype, options):
    out, x_0 = case(shape, dtype, "learned_variance" in options)
    loss = ops.diffusion_loss(out, x_0, levels.SEEDS, T, table(), **options)
    assert loss.dtype == torch.float32 and loss.shape == ((7, 2) if "bound" in options else (7,))
    expected = reference.diffusion_loss(out, x_0, levels.SEEDS, T, table(), **options)
    torch.testing.assert_close(loss, expected, rtol=BOUND, atol=BOUND)
    if "bound" not in options:
        torch.testing.assert_close(loss, expected, rtol=LOSS, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_that_of_the_equations_in_float64(dtype, options):
    learned = "learned_variance" in options
    out, x_0 = case((3, 17, 23), dtype, learned)
    incoming = values((7, 2) if "bound" in options else (7,), seed=2)
    arguments = (levels.SEEDS, T, table())
    got = gradient(out, incoming, x_0, *arguments, **options)
    expected = exact_gradient(out, incoming, x_0, *arguments, **options)
    assert got.dtype == dtype and got.shape == out.shape
    scale, subnormal = expected.abs().flatten(1).amax(1).view(7, 1, 1, 1), torch.finfo(dtype).smallest_normal
    tolerance = (BOUND + 2 * ROUNDING[dtype]) * scale + 2 * ROUNDING[dtype] * subnormal
    assert ((got.double() - expected).abs() <= tolerance).all()


def test_the_equations_gradient_is_their_slope():
    """By central differences in float64."""
    out, x_0 = (tensor.double() for tensor in case((2, 3), learned_variance=True))
    rows = table().double()
    for clip in (False, True):
        with torch_ops():
            options = dict(learned_variance=True, bound=True, stop_mean=False, clip=clip)
            losses = lambda out: ops.diffusion_loss(out, x_0, levels.SEEDS, T, rows, **options)  # noqa: B023, E731
            assert torch.autograd.gradcheck(losses, out.requires_grad_(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("learned_variance", [False, True])
def test_stop_mean_keeps_the_bound_from_the_mean_alone(learned_variance):
    out, x_0 = case((3, 5, 7), learned_variance=learned_variance)
    arguments, options = (x_0, levels.SEEDS, T, table()), dict(learned_variance=learned_variance, bound=True)
    of_bound, of_mse = torch.tensor([[0.0, 1.0]] * 7), torch.tensor([[1.0, 0.0]] * 7)
    stopped, free = (gradient(out, of_bound, *arguments, stop_mean=stop, **options) for stop in (True, False))
    assert not stopped[:, :3].any() and free[:, :3].flatten(1).any(1).all()
    assert torch.equal(stopped[:, 3:], free[:, 3:])
    assert not gradient(out, of_mse, *arguments, stop_mean=False, **options)[:, 3:].any()


@given(shapes(2), st.sampled_from(DTYPES), st.booleans(), st.sampled_from(OPTIONS), st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_value_and_gradient_are_the_same_in_every_layout(shape, dtype, wide, option, data):
    shape = [7, *(max(1, size) for size in shape[1:])]
    learned = "learned_variance" in option
    out, x_0 = case(tuple(shape[1:]), dtype, learned)
    x_0 = x_0.float() if wide else x_0
    arguments, incoming = (levels.SEEDS, T, table()), values((7, 2) if "bound" in option else (7,), seed=2)
    expected = ops.diffusion_loss(out, x_0, *arguments, **option), gradient(out, incoming, x_0, *arguments, **option)
    out, x_0 = (laid_out(tensor, **data.draw(layouts(len(shape)))) for tensor in (out, x_0))
    got = ops.diffusion_loss(out, x_0, *arguments, **option), gradient(out, incoming, x_0, *arguments, **option)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and digest(a) == digest(b)


# --- the bound's terms ---


def bound_of(x_0: float, out: float, log_var: float, first: str, **columns: float) -> float:
    """The bound's term in nats of one element whose x0_hat is the network's output."""
    rows = table(first=FIRST[first], p_x=0, p_o=1, c1=1, log_var_max=log_var, **columns)
    one = torch.full((1, 1), x_0), torch.full((1, 1), out)
    loss = ops.diffusion_loss(one[1], one[0], [0], 0, rows, bound=True)
    return loss[0, 1].item() * math.log(2)


def bin_nats(x_0: float, mean: float, log_var: float) -> float:
    """-ln of the mass of N(mean, e^log_var) in the bin of x_0, to 60 digits, of the float32 values of its arguments."""
    x_0, mean, log_var = (torch.tensor(value, dtype=torch.float32).item() for value in (x_0, mean, log_var))
    with mpmath.workdps(60):
        scale = mpmath.sqrt(2) * mpmath.exp(mpmath.mpf(log_var) / 2)
        low, high = ((mpmath.mpf(x_0) + mpmath.mpf(side) / 255 - mean) / scale for side in (-1, 1))
        low, high = -mpmath.inf if x_0 == -1 else low, mpmath.inf if x_0 == 1 else high
        low, high = (-high, -low) if low + high > 0 else (low, high)
        return float(-mpmath.log((mpmath.erfc(-high) - mpmath.erfc(-low)) / 2))


LEVEL = 2 / 255


@pytest.mark.parametrize("std", [3e-4, 4e-3, 0.01, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("x_0", [-1.0, LEVEL - 1, 0.5 * LEVEL, 1 - LEVEL, 1.0])
@pytest.mark.parametrize("away", [0.0, 0.3, 3.0, -5.0, 40.0, -1000.0])
def test_the_mass_of_a_bin_is_exact_out_to_a_thousand_standard_deviations(x_0, std, away):
    mean, log_var = x_0 + away * std, 2 * math.log(std)
    expected = bin_nats(x_0, mean, log_var)
    assert bound_of(x_0, mean, log_var, "bins") == pytest.approx(expected, rel=BIN, abs=BIN)
    rows, (out, image) = table(first=1, p_x=0, p_o=1, log_var_max=log_var), torch.tensor([[[mean]], [[x_0]]])
    loss = reference.diffusion_loss(out, image, torch.tensor([0]), torch.tensor(0), rows, bound=True)
    assert loss[0, 1].item() * math.log(2) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_masses_of_all_bins_are_one():
    for mean, std in ((0.1, 0.003), (0.3, 0.2), (-0.99, 0.05), (0.0, 2.0)):
        x_0 = (torch.arange(256) / 127.5 - 1).view(256, 1)
        rows = table(first=1, p_x=0, p_o=1, log_var_max=2 * math.log(std))
        out, seeds = torch.full((256, 1), mean), torch.zeros(256, dtype=torch.int64)
        bits = ops.diffusion_loss(out, x_0, seeds, 0, rows, bound=True)[:, 1].double()
        assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("x_0", "mean", "std", "nats"), [
    (0.0, 0.0, 0.01, 1.1872543892353482),
    (0.0, 0.03, 0.01, 5.470527518762331),
    (0.0, 0.08, 0.01, 31.906058742745568),
    (1.0, 0.97, 0.02, 2.3420521441255158),
    (-1.0, -0.9, 0.02, 14.066617748960464),
    (0.5, 0.49, 0.004, 2.7480218918323915),
])  # fmt: skip
def test_a_bin_has_its_known_answers(x_0, mean, std, nats):
    """The mean and the variance are rounded to float32 first: up to 6e-8 (x_0 - mean) / var nats."""
    rounding = 1e-6 + 2**-24 * abs(x_0 - mean) / std**2 * 2
    assert bound_of(x_0, mean, 2 * math.log(std), "bins") == pytest.approx(nats, rel=BIN, abs=rounding)


@pytest.mark.parametrize("excess", [0.0, 1e-6, 1e-3, -0.1, 0.35, 3.0, -4.0])
def test_a_divergence_keeps_its_digits_where_the_variances_are_nearly_equal(excess):
    """KL(N(0, e^-2) || N(0, e^(-2 + excess))) = (e^-excess - 1 + excess) / 2."""
    log_var = torch.tensor(-2 + excess, dtype=torch.float32).item()
    expected = (math.expm1(-2 - log_var) - (-2 - log_var)) / 2
    if abs(excess) < 0.1:  # where the difference above has lost its digits
        ratio = -2 - log_var
        expected = ratio**2 / 4 * (1 + ratio / 3 + ratio**2 / 12)
    assert bound_of(0.25, 0.25, log_var, "divergence", log_var_q=-2.0) == pytest.approx(expected, rel=BIN)


# --- the best network ---

DATA_MEAN, DATA_VARIANCE = 0.3, 0.25


def exact_output(x_t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The best network's output for data N(0.3, 0.25), in the prediction of these rows, one for each sample."""
    a, s, p_x, p_o = (column.double().view(-1, 1) for column in rows[:, [0, 1, 5, 6]].unbind(1))
    x_t = x_t.double()
    x0_hat = DATA_MEAN + a * DATA_VARIANCE / (a * a * DATA_VARIANCE + s * s) * (x_t - a * DATA_MEAN)
    return ((x0_hat - p_x * x_t) / p_o).float()


def gaussian_losses(rows: torch.Tensor, elements: int, **options) -> torch.Tensor:
    """The losses of the best network, [rows, ...]: each row's over so many values of the data."""
    n = len(rows)
    seeds, step = torch.arange(n), torch.arange(n)
    x_0 = DATA_MEAN + math.sqrt(DATA_VARIANCE) * ops.noise(seeds, (elements,), step=step, stream=9)
    x_t = ops.q_sample(x_0, step, seeds, rows[:, :2].contiguous())
    return ops.diffusion_loss(exact_output(x_t, rows), x_0, seeds, step, rows, **options).double()


FLOORS = [
    ("eps", 1.0, 0.173053406084),
    ("v", 1.0, 0.379790054563),
    ("x0", 1.0, 0.206736648479),
    ("eps", objectives.MinSNR(5), 0.096940876396),
    ("v", objectives.MinSNR(5), 0.096940876396),
    ("x0", objectives.MinSNR(5), 0.096940876396),
    ("eps", objectives.P2(), 0.03415327577104),
]


@pytest.mark.parametrize(("prediction", "weight", "floor"), FLOORS)
def test_the_loss_of_the_best_network_is_the_floor(prediction, weight, floor):
    """Mean over t of the least expected loss, for the linear schedule; five standard deviations of its estimate."""
    rows = objectives.Objective(prediction, weight).table(Schedule.linear())
    losses = gaussian_losses(rows, 512)
    std = (losses * math.sqrt(2 / 512)).square().sum().sqrt().item() / len(rows)
    assert abs(losses.mean().item() - floor) < 5 * std


def exact_terms(alpha: np.ndarray, sigma: np.ndarray, variance: str) -> np.ndarray:
    """E KL and -E ln p(x_0 | x_1) in bits for the best network; points noisiest first, the last the image itself."""
    terms = []
    for a, s, a_prev, s_prev in zip(alpha, sigma, alpha[1:], sigma[1:], strict=False):
        fall = (a / a_prev * s_prev / s) ** 2
        small, large = s_prev**2 * (1 - fall), s**2 - (a / a_prev * s_prev) ** 2
        error = DATA_VARIANCE * s**2 / (a**2 * DATA_VARIANCE + s**2)
        square = (a_prev * (1 - fall)) ** 2 * error
        var = {"fixed_large": large, "optimal": small + square}[variance]
        if s_prev == 0:
            terms.append((math.log(2 * math.pi * var) + square / var) / 2)
        else:
            terms.append((math.log(var / small) - 1 + (small + square) / var) / 2)
    return np.array(terms) / math.log(2)


@pytest.mark.parametrize(("variance", "bound"), [("fixed_large", 1.2809397297417218), ("optimal", 1.04709820562331)])
def test_the_bounds_terms_are_those_of_a_gaussian_in_closed_form(variance, bound):
    """DDPM on 5 of the linear schedule's steps, and the same sum with the prior's term as another code's."""
    schedule = Schedule.linear().respace(5)
    at = objectives.levels_of(schedule, first="density")
    points = [np.append(np.flip(column), end) for column, end in ((at.alpha, 1.0), (at.sigma, 0.0))]
    expected = exact_terms(*points, variance)
    a, s = points[0][0], points[1][0]
    prior = (a**2 * (DATA_MEAN**2 + DATA_VARIANCE) + s**2 - 1 - 2 * math.log(s)) / 2 / math.log(2)
    assert prior + expected.sum() == pytest.approx(bound, abs=1e-12)
    if variance == "optimal":
        error = DATA_VARIANCE * at.sigma**2 / (at.alpha**2 * DATA_VARIANCE + at.sigma**2)
        variance = np.exp(at.log_var_q) * (at.first == 0) + at.c1**2 * error
    for prediction in ("eps", "v", "x0"):
        objective = objectives.Objective(prediction, vlb=1.0)
        rows = objective.table(schedule, variance=variance, first="density")
        got = gaussian_losses(rows, 65536, bound=True)[:, 1].flip(0).numpy()
        assert got == pytest.approx(expected, rel=0.03, abs=1e-5)


# --- bits ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_loss_is_the_row_whose_target_is_eps(dtype):
    out, incoming = values((7, 3, 65, 67), dtype), values((7,), seed=2)
    t = torch.tensor([0, 999, 500, 2**32 - 1, 1, 7, 42])
    rows = torch.zeros(4, len(LOSS_COLUMNS))
    rows[:, 3:5] = 1  # y_e, weight
    arguments, options = (None, levels.SEEDS, T, rows), dict(address=t, weights=WEIGHTS)
    leaf = out.clone().requires_grad_()
    loss = ops.noise_loss(leaf, levels.SEEDS, t, WEIGHTS)
    assert digest(ops.diffusion_loss(out, *arguments, **options)) == digest(loss.detach())
    (expected,) = torch.autograd.grad(loss, leaf, incoming)
    assert digest(gradient(out, incoming, *arguments, **options)) == digest(expected)
    assert table_of_simple_loss() == rows[0, 2:5].tolist()


def table_of_simple_loss() -> list[float]:
    """y_x, y_e and weight, wherever the schedule is."""
    (columns,) = objectives.simple().table(Schedule.linear())[:, 2:5].unique(dim=0).tolist()
    return columns


def test_the_address_is_that_of_the_noise_and_not_of_the_row():
    (out, x_0), address = case((3, 5, 7)), torch.arange(7) * 1000 + 5
    with_address = ops.diffusion_loss(out, x_0, levels.SEEDS, 2, table(), address=address, bound=True)
    x_t, eps = ops.q_sample(x_0, 2, levels.SEEDS, table()[:, :2].contiguous(), address=address, return_eps=True)
    assert torch.equal(eps, ops.noise(levels.SEEDS, (3, 5, 7), step=address, stream=2))
    _, _, y_x, y_e, weight, *_ = table()[2].double().tolist()
    mse = weight * (out.double() - y_x * x_0.double() - y_e * eps.double()).square().flatten(1).mean(1)
    torch.testing.assert_close(with_address[:, 0].double(), mse, rtol=LOSS, atol=0)
    same = ops.diffusion_loss(out, x_0, levels.SEEDS, 2, table(), address=torch.full((7,), 2), bound=True)
    assert torch.equal(same, ops.diffusion_loss(out, x_0, levels.SEEDS, 2, table(), bound=True))


def test_losses_and_gradients_are_independent_of_batch_and_threads():
    out, x_0 = case((3, 65, 67), learned_variance=True)
    incoming, rows = values((7, 2), seed=2), table()
    options = dict(learned_variance=True, bound=True, stop_mean=False)

    def of(samples: slice) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = (x_0[samples], levels.SEEDS[samples], T[samples], rows)
        loss = ops.diffusion_loss(out[samples], *arguments, weights=WEIGHTS[samples], **options)
        return loss, gradient(out[samples], incoming[samples], *arguments, weights=WEIGHTS[samples], **options)

    loss, of_out = of(slice(None))
    for n in range(7):
        for got, expected in zip(of(slice(n, n + 1)), (loss[n : n + 1], of_out[n : n + 1]), strict=True):
            assert torch.equal(got, expected)
    threads = torch.get_num_threads()
    try:
        for count in range(1, 9):
            torch.set_num_threads(count)
            assert all(torch.equal(*pair) for pair in zip(of(slice(None)), (loss, of_out), strict=True))
    finally:
        torch.set_num_threads(threads)


def test_every_cpu_level_has_the_same_gradient_bits_and_losses(at_every_level):
    answers = list(levels.answers_at_every_level().values())
    for answer in answers:
        assert answer["diffusion_loss gradient"] == answers[0]["diffusion_loss gradient"]
        assert answer["diffusion_loss"] == [pytest.approx(pair, rel=LOSS) for pair in answers[0]["diffusion_loss"]]


def test_nan_and_infinity_reach_the_losses_of_their_sample_alone():
    out, x_0 = case((3, 33, 35))
    clean = ops.diffusion_loss(out, x_0, levels.SEEDS, T, table(), bound=True)
    out[1, 0, 0, 0], out[4, 2, 32, 34] = torch.nan, torch.inf
    loss = ops.diffusion_loss(out, x_0, levels.SEEDS, T, table(), bound=True)
    assert loss[1].isnan().all() and loss[4, 0].abs() == torch.inf and not loss[4, 1].isfinite()
    others = [0, 2, 3, 5, 6]
    assert torch.equal(loss[others], clean[others])


# --- the dispatcher ---


def test_diffusion_loss_compiles_and_differentiates_without_a_graph_break():
    out, x_0 = case((3, 5, 7), learned_variance=True)

    rows, options = table(), dict(learned_variance=True, bound=True, stop_mean=False)

    def objective(out):
        return (ops.diffusion_loss(out * 2, x_0, levels.SEEDS, T, rows, **options) * torch.arange(14).view(7, 2)).sum()

    out.requires_grad_()
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(out), objective(out), rtol=0, atol=0)
    assert torch.equal(*(torch.autograd.grad(loss(out), out)[0] for loss in (compiled, objective)))


def test_diffusion_loss_refuses_a_gradient_that_it_does_not_have():
    out, x_0 = case((3, 5, 7))
    for name in ("x_0", "table", "weights"):
        arguments = dict(x_0=x_0, table=table(), weights=WEIGHTS)
        arguments[name] = arguments[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"^{name}: expected no gradient through diffusion_loss"):
            ops.diffusion_loss(out, seeds=levels.SEEDS, step=T, **arguments)
    loss = ops.diffusion_loss(out.requires_grad_(), x_0, levels.SEEDS, T, table()).sum()
    with pytest.raises(RuntimeError, match="^create_graph: expected False, for diffusion_loss"):
        torch.autograd.grad(loss, out, create_graph=True)


def test_diffusion_loss_on_the_meta_device_has_a_shape_and_no_values():
    out, x_0 = (torch.empty(2, 3, 8, 8, device="meta", dtype=torch.bfloat16) for _ in range(2))
    seeds, rows = levels.SEEDS[:2].to("meta"), table().to("meta")
    for bound, shape in ((False, (2,)), (True, (2, 2))):
        loss = ops.diffusion_loss(out, x_0, seeds, 5, rows, bound=bound)
        assert loss.device.type == "meta" and loss.shape == shape and loss.dtype == torch.float32
