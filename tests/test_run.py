"""Running a program: in float32 the results of the sampler in float64, with guidance and constraints."""

import math

import numpy as np
import pytest
import torch
from gaussian import GRIDS, MOMENTS, network_output
from test_program import case_name, heads
from torch.utils._python_dispatch import TorchDispatchMode

from diffkern import (
    EDM,
    VE,
    VP,
    From,
    Guidance,
    Inpaint,
    PiGDM,
    Quantile,
    RectifiedFlow,
    Run,
    Schedule,
    SubVP,
    ops,
    sample,
)
from diffkern.codec import Codec
from diffkern.conditions import Condition
from diffkern.constraints import limit_of
from diffkern.model import Model
from diffkern.process import Point
from diffkern.program import Direct
from diffkern.runtime import Loop
from diffkern.samplers import SAMPLERS
from diffkern.sampling import encode, interpolate

LINEAR, CPU = Schedule.linear(), torch.device("cpu")
SHAPE = (2, 3, 3)


def normal_network(process, prediction, mean=0.3, variance=0.25):
    """The exact network, on tensors of any dtype, of pixels that are N(mean, variance) each."""
    points = {}

    def denoise(x: torch.Tensor, s: Point) -> torch.Tensor:
        gain = s.alpha * variance / (s.alpha**2 * variance + s.sigma**2)
        return mean + gain * (x - s.alpha * mean)

    def network(x, t, labels):
        c = float(t[0])
        s = points[c]
        x = x / process.c_in(s)
        return torch.as_tensor(network_output(prediction, x, denoise(x, s), s, type("", (), {"process": process})))

    network.points, network.denoise = points, denoise
    return network


@pytest.mark.parametrize("case", MOMENTS, ids=case_name)
def test_float32_rows_on_the_kernel_are_the_sampler_in_float64(case):
    grid = GRIDS[case["grid"]](10)
    prediction = [name for name in heads(grid) if name not in ("eps", "score", "mu")][0]
    network = normal_network(grid.process, prediction)
    program = SAMPLERS[case["sampler"]].trace(grid, prediction, **case["options"])
    for row in program.rows:
        if row.point is not None:
            c = row.point.c_noise
            network.points[float(torch.tensor(c, dtype=torch.float32))] = row.point
    seeds = torch.arange(3)
    x_T = ops.noise(seeds, SHAPE, step=0) * grid.process.prior_std

    def noise(address, count):
        z = [ops.noise(seeds, SHAPE, step=address - i, stream=1).double() for i in range(count)]
        return sum(z) / math.sqrt(count)

    exact = SAMPLERS[case["sampler"]](Direct(grid, network.denoise, noise, x_T.double()), grid, **case["options"])
    loop = Loop(network, program, (3, *SHAPE), CPU, limit=None)
    loop.begin(x_T, seeds)
    largest = []
    loop.run(lambda: largest.append(loop.x.abs().max().item()))
    assert (loop.x - exact).abs().max() <= 1e-5 * max(1.0, x_T.abs().max().item(), *largest)


def linear_network(x, t, labels):
    return x * 0.5 if labels is None else x * 0.5 + labels.view(-1, *[1] * (x.ndim - 1)) * 0.01


def draw(network=linear_network, n=3, **options):
    described = dict(schedule=LINEAR, prediction="eps", shape=SHAPE, steps=8, progress=False)
    return sample(network, n, **described | options)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_depends_on_its_seed_alone_with_every_sampler(name):
    if name == "ddim_inversion":
        return
    options = dict(prediction="x0") if name == "velocity" else {}
    alone = draw(sampler=name, seeds=[7], n=None, **options)
    among = draw(sampler=name, seeds=[3, 7, 5], n=None, batch_size=2, **options)
    assert torch.isfinite(alone).all() and torch.equal(alone[0], among[1])


@pytest.mark.parametrize("process", [VP(), SubVP(), VE(), EDM(), RectifiedFlow()], ids=repr)
@pytest.mark.parametrize("shape", [(5,), (4, 6), (3, 2, 2), (2, 2, 2, 2)], ids=str)
def test_every_process_is_sampled_in_any_shape(process, shape):
    seen = []

    def network(x, t, labels):
        seen.append(t)
        return 0 * x

    x = draw(network, schedule=process, prediction="x0", shape=shape, sampler="unipc")
    assert x.shape == (3, *shape) and x.abs().max() == 0
    assert all(t.dtype == torch.float32 for t in seen) and len(seen) == 8
    assert seen[0][0].item() == pytest.approx(float(process.c_noise(process.t_max)))


def test_a_schedule_tells_int64_time_steps_and_real_times_only_to_samplers_that_ask():
    told = {}
    for name in ("heun", "dpmpp_2s", "midpoint"):
        draw(lambda x, t, y: told.setdefault(name, []).append(t) or x * 0.1, sampler=name)  # noqa: B023
    assert all(t.dtype == torch.int64 for name in ("heun", "dpmpp_2s") for t in told[name])
    assert all(t.dtype == torch.float32 for t in told["midpoint"])


# --- guidance ---


def test_a_weight_is_a_guidance():
    labels = [1, 2, 3]
    assert torch.equal(draw(labels=labels, guidance=2.5), draw(labels=labels, guidance=Guidance(2.5)))


def test_weights_of_samples_are_those_of_each_alone():
    labels, weights = [1, 2, 3], [1.0, 2.5, -0.5]
    together = draw(labels=labels, guidance=Guidance(weights))
    for i, w in enumerate(weights):
        alone = draw(labels=[labels[i]], guidance=Guidance([w]), n=None, seeds=[i])
        assert torch.equal(together[i], alone[0])
        assert torch.allclose(alone, draw(labels=[labels[i]], guidance=w, n=None, seeds=[i]), atol=1e-6)


def test_an_interval_guides_within_it_and_calls_once_elsewhere():
    calls = []

    def network(x, t, labels):
        calls.append((int(t[0]), int(labels[0])))
        return linear_network(x, t, labels)

    draw(network, labels=[1, 2, 3], guidance=Guidance(2.0, interval=(0.5, 2.0)))
    for t in LINEAR.timesteps(8):
        inside = 0.5 <= LINEAR.point(t).rho <= 2.0
        assert [label for step, label in calls if step == t] == ([1, -1] if inside else [1])


def test_negative_labels_take_the_null_class_s_place():
    seen = set()
    draw(lambda x, t, y: seen.add(int(y[0])) or x * 0.1, labels=1, guidance=Guidance(2.0, negative=4))
    assert seen == {1, 4}


def test_each_sample_has_its_own_negative_label_in_every_batch():
    seen = {}

    def network(x, t, labels):
        seen.setdefault(len(seen), labels.tolist())
        return x * 0.1

    draw(network, labels=[1, 2, 3], guidance=Guidance(2.0, negative=[4, 5, 6]), batch_size=2, steps=1)
    assert list(seen.values()) == [[1, 2], [4, 5], [3, 3], [6, 6]]


def test_what_stands_for_no_condition_is_each_image_s_own_in_every_batch():
    labels, options = [1, 2, 3], dict(guidance=Guidance(2.0, negative=[4, 5, 6]))
    assert torch.equal(draw(labels=labels, **options), draw(labels=labels, batch_size=1, **options))

    def network(x, t, labels, image):
        return linear_network(x, t, labels) + 0.1 * image

    model = Model(network, LINEAR, "eps", SHAPE, conditions=(Condition("image", SHAPE),))  # it has no null value
    images = torch.linspace(-1, 1, 54).view(3, *SHAPE)
    whole, split = (
        sample(model, 3, labels=labels, guidance=2.0, image=images, steps=4, batch_size=batch_size, progress=False)
        for batch_size in (3, 2)
    )
    assert torch.equal(whole, split)


def test_rescaled_guidance_has_the_standard_deviation_of_the_conditional_output():
    outputs = {}

    def network(x, t, labels):
        torch.manual_seed(int(t[0]))
        out = torch.randn(x.shape) * (1.0 if labels[0] < 0 else 2.0)
        outputs.setdefault(int(t[0]), []).append(out)
        return out

    seen = []
    draw(
        network,
        labels=1,
        steps=[500, 0],
        guidance=Guidance(3.0, rescale=1.0),
        clip=False,
        sampler="ddim",
        prediction="x0",
        callback=lambda step: seen.append(step.x0_hat),
    )
    c, _ = outputs[500]
    assert torch.allclose(seen[0].flatten(1).std(1), c.flatten(1).std(1), rtol=1e-5)


def test_autoguidance_compares_with_the_worse_network():
    def worse(x, t, labels):
        return x * 0.4

    w = 2.0
    by_hand = draw(lambda x, t, y: worse(x, t, y) + w * (linear_network(x, t, y) - worse(x, t, y)))
    assert torch.allclose(draw(guidance=Guidance(w, network=worse)), by_hand, atol=2e-5)


def test_cfg_plus_plus_steps_by_the_unconditional_noise():
    """x = alpha_t x0_hat(guided) + sigma_t eps(unconditional) (Chung et al. 2024, algorithm 1), by hand in float64."""
    w, steps, labels = 0.6, [900, 500, 100], torch.tensor([1, 2, 3])
    x = ops.noise(torch.arange(3), SHAPE, step=0).double()
    points = LINEAR.grid(steps).points
    for s, t in zip(points[:-1], points[1:], strict=True):
        u = linear_network(x, None, torch.full((3,), -1))
        o = u + w * (linear_network(x, None, labels) - u)
        x = t.alpha * (x - s.sigma * o) / s.alpha + t.sigma * u
    guided = draw(labels=labels, steps=steps, guidance=Guidance(w, plus_plus=True), sampler="ddim", clip=False)
    assert torch.allclose(guided.double(), x, atol=1e-4)


def test_cfg_plus_plus_is_the_conditional_model_outside_its_interval():
    options = dict(labels=[1, 2, 3], sampler="ddim", clip=False)
    nowhere = Guidance(0.6, plus_plus=True, interval=(1e8, 1e9))
    assert torch.allclose(draw(guidance=nowhere, **options), draw(**options), atol=1e-5)
    low, high = LINEAR.point(300).rho, LINEAR.point(700).rho  # from the first step on, it is another run
    inside = draw(guidance=Guidance(0.6, plus_plus=True, interval=(low, high)), **options)
    assert inside.isfinite().all() and not torch.allclose(inside, draw(**options), atol=1e-3)


@pytest.mark.parametrize("sampler", ["unipc", "euler", "ddpm", "dpmpp_2m"])
def test_cfg_plus_plus_refuses_samplers_that_do_not_add_an_eps_to_x0_hat(sampler):
    with pytest.raises(ValueError, match="plus_plus: expected a sampler that adds eps to x0_hat"):
        draw(labels=1, sampler=sampler, guidance=Guidance(0.5, plus_plus=True))
    with pytest.raises(ValueError, match=r"guidance: expected a weight in \[0, 1\] with plus_plus, got 2"):
        draw(labels=1, sampler="ddim", guidance=Guidance(2.0, plus_plus=True))


@pytest.mark.parametrize("noise", ["step", "path"])
def test_a_classifier_in_mean_form_shifts_the_mean_by_the_variance_times_its_gradient(noise):
    """One step of ddpm from x_T: mean + w var g, with the variance of the whole step, however many noises it adds."""
    w, g = 0.7, 1.3
    options = dict(sampler="ddpm", prediction="x0", steps=[999, 499], clip=False, labels=1, noise=noise)
    seen = {}
    for guidance in (1.0, Guidance(w, classifier=lambda x, t, y: g * x.flatten(1).sum(1), form="mean")):
        steps = seen.setdefault(guidance, [])
        draw(lambda x, t, y: 0 * x, guidance=guidance, callback=steps.append, **options)
    plain, guided = (steps[0].x_next for steps in seen.values())
    s, t = LINEAR.grid([999, 499]).steps[0]
    assert torch.allclose(guided - plain, torch.tensor(w * t.sigma**2 * LINEAR.removed(s, t) * g, dtype=torch.float32))


def test_guidance_by_a_gradient_names_a_start_from_noise_alone():
    with pytest.raises(ValueError, match="guidance: expected a run that starts at alpha > 0"):
        draw(
            schedule=RectifiedFlow(),
            prediction="x0",
            labels=1,
            guidance=Guidance(1, classifier=lambda x, t, y: x.sum()),
        )


def test_a_classifier_in_score_form_gives_the_conditional_prediction_of_two_gaussian_classes():
    """x0_hat + sigma^2 / alpha grad ln p(y | x_t) is the exact x0_hat of the class: at every step of a run."""
    means, variance = torch.tensor([-1.0, 1.0]), 0.1

    def posterior(x, s):
        """ln p(y | x_t) of each element alone, with equal classes."""
        spread = s.alpha**2 * variance + s.sigma**2
        return torch.stack([-((x - s.alpha * m) ** 2) / (2 * spread) for m in means]).log_softmax(0)

    def of_class(x, s, m):
        gain = s.alpha * variance / (s.alpha**2 * variance + s.sigma**2)
        return m + gain * (x - s.alpha * m)

    def network(x, t, labels):
        s = LINEAR.point(int(t[0]))
        return sum(p.exp() * of_class(x, s, m) for p, m in zip(posterior(x, s), means, strict=True))

    def classifier(x, t, labels):
        s = LINEAR.point(int(t[0]))
        return torch.stack([posterior(x, s)[k].flatten(1).sum(1) for k in range(2)], 1)

    def log_p(x, t, labels):  # of one class: [N]
        return classifier(x, t, labels)[:, 1]

    options = dict(prediction="x0", labels=1, sampler="ddim", clip=False)
    guided = draw(network, guidance=Guidance(1.0, classifier=log_p), **options)
    exact = draw(lambda x, t, y: of_class(x, LINEAR.point(int(t[0])), 1.0), **options)
    assert torch.allclose(guided, exact, atol=1e-4)


def test_a_measurement_s_gradient_goes_through_the_network():
    seen = []

    def measurement(x0):
        seen.append(x0.requires_grad)
        return -((x0 - 0.8) ** 2).flatten(1).sum(1)

    options = dict(prediction="x0", sampler="ddim", clip=False)
    free, held = (
        draw(lambda x, t, y: x * 0.3, guidance=g, **options) for g in (1.0, Guidance(0.3, measurement=measurement))
    )
    assert all(seen) and (held - 0.8).abs().mean() < (free - 0.8).abs().mean()


def seen_by_rows(x):
    """Five mixtures of a sample's 18 elements, which no two have in common with equal weight."""
    rows = torch.randn(5, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    return x.flatten(1) @ rows.T


@pytest.mark.parametrize("noise_std", [0.0, 0.3])
@pytest.mark.parametrize(
    "forward", [seen_by_rows, lambda x: x[:, :, 1:], lambda x: x.mean(3)], ids=["rows", "part", "means"]
)
def test_pigdm_draws_from_the_posterior_of_gaussian_data(forward, noise_std):
    """For N(m, s^2) the guided prediction is E[x_0 | x_t, y], at every step of a run; each has a y."""
    m, s = 0.2, 0.5
    y = forward(ops.noise(torch.arange(3), SHAPE, step=7, stream=9))
    matrix = forward(torch.eye(18, dtype=torch.float64).reshape(18, *SHAPE)).flatten(1).T
    told = y.flatten(1).double() - matrix.sum(1) * m

    def prior(x, t, labels):
        p = LINEAR.point(int(t[0]))
        return m + s**2 * p.alpha / (s**2 * p.alpha**2 + p.sigma**2) * (x - p.alpha * m)

    def posterior(x, t, labels):
        p = LINEAR.point(int(t[0]))
        variance = 1 / (1 / s**2 + (p.alpha / p.sigma) ** 2)
        covariance = variance * matrix @ matrix.T + noise_std**2 * torch.eye(len(matrix), dtype=torch.float64)
        x0_hat = prior(x, t, labels).flatten(1).double() - m
        gain = variance * matrix.T @ torch.linalg.inv(covariance)
        return (m + x0_hat + (told - x0_hat @ matrix.T) @ gain.T).reshape(x.shape).float()

    options = dict(prediction="x0", sampler="ddim", clip=False)
    guidance = Guidance(1.0, measurement=PiGDM(forward, y, noise_std, data_std=s))
    guided, exact = draw(prior, guidance=guidance, **options), draw(posterior, **options)
    assert torch.allclose(guided, exact, atol=1e-4)
    assert (draw(prior, **options) - exact).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(forward=3), TypeError, "forward: expected a callable, got int"),
        (dict(y=[0.0]), TypeError, "y: expected a floating-point tensor, got list"),
        (dict(y=torch.zeros(1, 2)), ValueError, r"y: expected the shape that forward gives, \(3, 2, 3\), got \(1, 2\)"),
        (dict(y=torch.zeros(2, 2, 3)), ValueError, r"y: expected the shape .*, \(3, 2, 3\), got \(2, 2, 3\)"),
        (dict(noise_std=-1.0), ValueError, "noise_std: expected a number >= 0, got -1"),
        (dict(data_std=0), ValueError, "data_std: expected a number > 0, got 0"),
        (dict(iterations=0), ValueError, "iterations: expected an int >= 1, got 0"),
    ],
)
def test_pigdm_says_what_it_expected(changes, error, message):
    with pytest.raises(error, match=f"^{message}"):
        measurement = PiGDM(**dict(forward=lambda x: x.mean(3), y=torch.zeros(1, 2, 3)) | changes)
        draw(guidance=Guidance(1.0, measurement=measurement), sampler="ddim")


def test_pigdm_serves_a_sample_whatever_the_others_measure():
    """Conjugate gradients stop for each sample by itself: one without a residual is left as it is."""
    y = ops.noise(torch.arange(3), SHAPE, step=7, stream=9)
    x0_hat, rho = torch.cat((y[:1], 0 * y[1:])), torch.tensor(0.7)
    for part in (slice(0, 1), slice(1, 3)):
        alone = PiGDM(seen_by_rows, seen_by_rows(y[part]))
        x = x0_hat[part].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(alone(x, rho).sum(), x)
        whole = x0_hat.clone().requires_grad_()
        (expected,) = torch.autograd.grad(PiGDM(seen_by_rows, seen_by_rows(y))(whole, rho).sum(), whole)
        assert torch.allclose(gradient, expected[part], rtol=1e-5, atol=1e-6)
    assert not expected[0].any() and expected[1:].abs().amax((1, 2, 3)).min() > 0.1


class _Indexing(TorchDispatchMode):
    """Notes the operators that take indices from a list or another tensor."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            self.seen.append(func.name())
        return func(*args, **kwargs or {})


def measured(x0):
    return -((x0 - 0.3) ** 2).flatten(1).sum(1)


def classified(x, t, labels):
    return -((x - 0.5) ** 2).flatten(1).sum(1)


@pytest.mark.parametrize(
    "guidance, quantile",
    [
        (Guidance(1e-3, measurement=measured), None),
        (Guidance([1e-3, 2e-3, 3e-3], measurement=measured), None),
        (Guidance(0.3, measurement=PiGDM(lambda x: x.mean(3), torch.ones(1, 2, 3), noise_std=0.2)), None),
        (Guidance(2.0, rescale=0.7), Quantile(0.9)),
        (Guidance([1.0, 2.0, 3.0]), Quantile(0.9)),
        (Guidance([0.1, 0.2, 0.3], classifier=classified, form="mean"), Quantile(0.9)),
        (Guidance(0.6, plus_plus=True), None),
    ],
    ids=["measurement", "measurements", "pigdm", "rescale", "weights", "classifier", "cfg++"],
)
def test_a_row_stands_for_all_of_its_kind_whatever_guides(guidance, quantile):
    """A CUDA graph of the first row is replayed for the others: nothing may come from that row but its kind."""
    sampler = SAMPLERS["ddim" if guidance.plus_plus else "ddpm"]
    program = sampler.trace(LINEAR.grid(6), "v", plus_plus=guidance.plus_plus)
    labels = torch.tensor([1, 2, 3])
    x_T, seeds = ops.noise(torch.arange(3), SHAPE, step=0), torch.arange(3)
    images = []
    for rows in (program.rows, [program.rows[0]] * len(program)):
        conditions = {"labels": (labels, torch.full_like(labels, -1))}
        options = dict(guidance=guidance, conditions=conditions, quantile=quantile, limit=quantile and 1.0)
        loop = Loop(linear_network, program, (3, *SHAPE), CPU, **options)
        weights = None if guidance.one_weight else guidance.weight.float()
        loop.begin(x_T, seeds, conditions, weights=weights)
        with _Indexing() as indexing:
            for row in rows:
                loop.step(row)
        assert indexing.seen == []
        images.append(loop.x)
    assert len({loop.kind(row) for row in program.rows}) == 1
    assert images[0].isfinite().all() and torch.equal(*images)


# --- zero terminal SNR ---

ZERO = Schedule([*Schedule.linear(50, 1e-3, 0.3).betas.tolist()[:-1], 1.0])  # alpha_T = 0
FROM_0 = ("ddpm", "ddim", "consistency", "repaint", "dpmpp_1m", "dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "dpmpp_2m_sde")
FROM_0 += ("dpmpp_sde", "velocity", "unipc")


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_starts_at_alpha_0_or_says_that_it_cannot(name, prediction):
    network = normal_network(ZERO, prediction)
    network.points.update({float(t): ZERO.point(t) for t in range(50)})
    options = dict(schedule=ZERO, prediction=prediction, sampler=name, steps=7, clip=False)
    if name == "ddim_inversion":
        return
    if name not in FROM_0:
        with pytest.raises(ValueError, match=f"sampler: expected one that can start at alpha = 0.* got '{name}'"):
            draw(network, **options)
        return
    grid, seeds = ZERO.grid(7), torch.arange(3)
    x_T = ops.noise(seeds, SHAPE, step=0).double()

    def noise(address, count):
        z = [ops.noise(seeds, SHAPE, step=address - i, stream=1).double() for i in range(count)]
        return sum(z) / math.sqrt(count)

    exact = SAMPLERS[name](Direct(grid, network.denoise, noise, x_T), grid)
    assert torch.allclose(draw(network, **options).double(), exact, atol=1e-5 * max(1.0, exact.abs().max().item()))


def test_velocity_from_alpha_0_of_a_schedule_follows_the_ode():
    """Data N(0.3, 0.25): the ODE takes x_T to 0.3 + 0.5 x_T."""
    linear = LINEAR.alpha_bar.sqrt()
    alpha_bar = ((linear - linear[-1]) * linear[0] / (linear[0] - linear[-1])).square()  # Lin et al. 2024, algorithm 1
    schedule = Schedule(1 - alpha_bar / torch.cat((alpha_bar.new_ones(1), alpha_bar[:-1])))
    network, x_T = normal_network(schedule, "v"), ops.noise(torch.arange(3), SHAPE, step=0)
    network.points.update({float(t): schedule.point(t) for t in range(1000)})
    x = draw(network, schedule=schedule, prediction="v", sampler="velocity", steps=200, clip=False)
    assert (x - (0.3 + 0.5 * x_T)).abs().max() < 0.02


# --- ranges and constraints ---


@pytest.mark.parametrize("clip, largest", [(True, 1.0), (0.5, 0.5), ((-2, 2), 2.0), (Quantile(0.9), 1.0)], ids=str)
def test_clip_bounds_the_images(clip, largest):
    assert draw(lambda x, t, y: -9 * x, clip=clip).abs().max() == largest


def test_a_quantile_divides_each_sample_by_its_own():
    seen = {}
    for clip in (False, Quantile(0.8)):
        calls = seen.setdefault(clip, [])
        draw(lambda x, t, y: x * 3, clip=clip, steps=[400], prediction="x0", callback=calls.append)
    x0, bounded = (seen[clip][0].x0_hat for clip in (False, Quantile(0.8)))
    size = x0.abs().flatten(1).quantile(0.8, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    assert torch.allclose(bounded, (x0 / size).clamp(-1, 1), atol=1e-6)


def test_inpainting_keeps_the_known_part_exactly_and_makes_the_rest():
    image, mask = torch.linspace(-1, 1, 18).view(1, *SHAPE), torch.zeros(1, 1, 3, 3)
    mask[..., 2] = 1
    for options in (dict(), dict(sampler="unipc"), dict(sampler="heun"), dict(sampler="ddpm")):
        x = draw(constraint=Inpaint(image, mask), **options)
        assert torch.equal(x[..., :2], image[..., :2].expand(3, -1, -1, -1))
        assert len({row.sum().item() for row in x[..., 2]}) == 3
    x = draw(constraint=Inpaint(image, mask, resample=3, jump=2), sampler="ddpm")
    assert torch.equal(x[..., :2], image[..., :2].expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", ["ddim", "heun", "midpoint", "rk4", "unipc", "repaint"])
def test_the_known_part_has_noise_of_its_own_in_every_step(name):
    program = SAMPLERS[name].trace(LINEAR.grid(6), "x0")
    blended = [
        n
        for row, (n, _) in zip(program.rows, program.addresses().tolist(), strict=True)
        if row.reached and row.reached.sigma > 0
    ]
    assert len(set(blended)) == len(blended) >= 5


def test_a_run_from_an_image_begins_at_its_noise_level():
    image, seen = torch.full((1, *SHAPE), 0.5), []
    draw(start=From(image, 0.5), callback=seen.append, sampler="ddim")
    first = LINEAR.point(seen[0].t)
    z = ops.noise(torch.arange(3), SHAPE, step=seen[0].t, stream=2)
    assert 0 < seen[0].t <= 0.5 * 999
    assert torch.allclose(seen[0].x_t, first.alpha * image + first.sigma * z, atol=1e-6)


def test_encoding_and_drawing_again_gives_the_image_back():
    network = normal_network(LINEAR, "v")
    network.points.update({float(t): LINEAR.point(t) for t in range(1000)})
    image = torch.linspace(-0.9, 0.9, 36).view(2, *SHAPE)
    described = dict(schedule=LINEAR, prediction="v", shape=SHAPE, progress=False)
    x_T = encode(network, image, steps=250, **described)
    back = sample(network, x_T=x_T, sampler="ddim", steps=250, clip=False, **described)
    assert (back - image).abs().max() < 0.05
    line = interpolate(network, image[0], image[1], 3, steps=100, **described)
    assert (line[0] - image[0]).abs().max() < 0.15 and (line[2] - image[1]).abs().max() < 0.15
    mixed = interpolate(network, image[0], image[1], 3, fraction=0.2, steps=100, **described)
    assert mixed.shape == (3, *SHAPE)


def test_latents_between_two_images_are_not_clamped():
    model = Model(lambda x, t, y: 9 + 0 * x, LINEAR, "x0", (1, 2, 2), codec=Codec(lambda x: 10 * x, lambda z: z / 10))
    image = torch.full((1, 2, 2), 0.9)
    line = interpolate(model, image, image, 2, fraction=0.1, steps=10, progress=False)
    assert (line - 0.9).abs().max() < 1e-5


BETWEEN = dict(schedule=LINEAR, prediction="x0", shape=SHAPE, steps=2, progress=False)
ENDS = {
    "a sampler of encode's": (lambda f, x: encode(f, x[None], sampler="ddpm", **BETWEEN), TypeError, "sampler: expect"),
    "seeds of encode's": (
        lambda f, x: encode(f, x[None], seeds=[1], **BETWEEN),
        TypeError,
        "seeds: expected none here",
    ),
    "a sampler": (
        lambda f, x: interpolate(f, x, x, sampler="ddpm", **BETWEEN),
        TypeError,
        "sampler: expected none here",
    ),
    "other shapes": (lambda f, x: interpolate(f, x, x[:, :1], **BETWEEN), ValueError, "b: expected shape"),
    "bytes": (lambda f, x: interpolate(f, x.byte(), x, fraction=0.5, **BETWEEN), TypeError, "a: expected a floating"),
}


@pytest.mark.parametrize(("call", "error", "message"), ENDS.values(), ids=ENDS)
def test_what_images_cannot_be_found_or_mixed_by_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(lambda x, t, labels: x, torch.zeros(SHAPE))


@pytest.mark.parametrize("process", [LINEAR, VE()], ids=["schedule", "VE"])
def test_interpolation_between_seeds_has_their_images_at_its_ends(process):
    described = dict(schedule=process, prediction="x0", shape=SHAPE, progress=False, steps=10)

    def network(x_t, t, labels):
        return x_t.tanh()

    ends = sample(network, seeds=[5, 6], sampler="ddim", **described)
    line = interpolate(network, 5, 6, 3, **described)
    assert torch.equal(line[0], ends[0]) and torch.allclose(line[2], ends[1], atol=1e-6)
    mixed = interpolate(network, 5, ends[1], 3, fraction=0.5, sampler="ddim", **described)
    assert torch.equal(mixed, interpolate(network, ends[0], ends[1], 3, fraction=0.5, sampler="ddim", **described))
    with pytest.raises(TypeError, match="^b: expected an image or a seed, got 'cat'"):
        interpolate(network, 5, "cat", **described)


def test_a_callback_s_tensor_takes_the_place_of_x():
    x = draw(callback=lambda step: torch.full_like(step.x_next, 0.25), batch_size=2)
    assert torch.equal(x, torch.full_like(x, 0.25))
    with pytest.raises(ValueError, match="callback: expected None or a tensor of shape"):
        draw(callback=lambda step: torch.zeros(1))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_callback_is_called_in_every_step_of_every_sampler(name):
    seen = []
    draw(sampler=name, callback=seen.append, prediction="x0", **(dict(jump=2, resample=1) if name == "repaint" else {}))
    assert [step.index for step in seen] == list(range(8))


def test_a_path_gives_similar_images_for_any_number_of_steps():
    """On the exact network of a mixture: with ordinary noise nothing but chance is in common."""
    means, spread = torch.tensor([[-0.8, 0.1], [0.7, 0.6], [0.2, -0.9]]), 0.15

    def network(x, t, labels):
        s = LINEAR.point(int(t[0]))
        variance = (s.alpha * spread) ** 2 + s.sigma**2
        d = x[:, None] - s.alpha * means
        weights = (-(d**2).sum(-1) / (2 * variance)).softmax(1)
        return (weights[..., None] * (means + s.alpha * spread**2 / variance * d)).sum(1)

    options = dict(network=network, n=300, prediction="x0", shape=(2,), clip=False, sampler="ddpm", batch_size=300)
    full = draw(noise="path", steps=None, **options)
    assert torch.equal(full, draw(noise="step", steps=None, **options))

    def correlation(x):
        return np.corrcoef(full.flatten(), x.flatten())[0, 1]

    assert correlation(draw(noise="path", steps=20, **options)) >= 0.93
    assert correlation(draw(noise="step", steps=20, **options)) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("labels", "least"), [(torch.arange(100) % 10, {20: 95}), (None, {20: 90, 50: 95})], ids=["labels", "none"]
)
def test_a_path_gives_the_shipped_model_s_image_of_that_seed(labels, least):
    """Out of 100 seeds, the nearest long-run image is that of the same seed. All steps, not 250, would take minutes."""

    def drawn(steps):
        options = dict(labels=labels, steps=steps, noise="path", batch_size=10, progress=False)
        return sample("fashion-mnist", 100, sampler="ddpm", **options).flatten(1)

    long = drawn(250)
    for steps, wanted in least.items():
        nearest = torch.cdist(drawn(steps), long).argmin(1)
        assert (nearest == torch.arange(100)).sum() >= wanted


@pytest.mark.parametrize("name", ["heun", "rk4", "dpmpp_2s", "pc"])
def test_a_callback_sees_where_a_step_ends_and_may_change_it_there(name):
    """Samplers that call the network several times in a step show no state within it."""
    seen = []
    options = dict(sampler=name, prediction="x0", clip=False)
    x = draw(callback=seen.append, **options)
    assert all(torch.equal(a.x_next, b.x_t) for a, b in zip(seen[:-1], seen[1:], strict=True))
    assert torch.equal(seen[-1].x_next, x)
    moved = draw(callback=lambda step: seen[step.index].x_next if step.index == 3 else None, **options)
    assert torch.equal(moved, x)
    still = draw(callback=lambda step: step.x_next * 0 if step.index == 7 else None, **options)
    assert still.abs().max() == 0


def test_latents_are_encoded_once_and_decoded_at_the_end_and_not_clipped():
    calls = []

    def encode_images(x):
        calls.append(len(x))
        return 4 * x

    model = Model(
        lambda x, t, y: 3 + 0 * x, LINEAR, "x0", SHAPE, codec=Codec(encode_images, lambda z: z / 4, scale=0.5)
    )
    given = dict(steps=4, sampler="ddim", progress=False)
    assert torch.allclose(sample(model, 2, **given), torch.full((2, *SHAPE), 3 / 0.5 / 4))
    image = torch.full((1, *SHAPE), 0.25)
    mask = torch.zeros(1, 1, 3, 3)
    kept = sample(model, 3, constraint=Inpaint(image, mask), batch_size=1, **given)
    assert torch.allclose(kept, image.expand(3, -1, -1, -1)) and calls == [1]
    line = Model(lambda x, t, y: 0.1 * x, LINEAR, "eps", SHAPE, codec=model.codec)
    x_T = encode(line, image, steps=50)
    assert x_T.shape == (1, *SHAPE) and not torch.allclose(x_T, image)
    assert torch.allclose(sample(line, x_T=x_T, sampler="ddim", steps=50, progress=False), image, atol=0.1)


def test_a_run_that_starts_below_t_max_starts_with_the_deviation_there():
    for process, times in ((EDM(), [10.0, 1.0]), (VE(), [0.5, 0.1])):
        seen = []
        draw(schedule=process, prediction="x0", steps=times, n=200, callback=seen.append, batch_size=200)
        assert seen[0].x_t.std() == pytest.approx(float(process.sigma(times[0])), rel=0.05)


def test_networks_that_guide_run_in_eval_mode():
    class Worse(torch.nn.Module):
        def forward(self, x, t, labels):
            assert not self.training
            return x * 0.4

    worse = Worse()
    draw(guidance=Guidance(2.0, network=worse))
    assert worse.training


# --- options ---


def test_any_function_is_a_sampler():
    def euler(m, grid, scale=1.0):
        x = m.start()
        for s, t in m.steps():
            d = m.eps(x, s)
            x = (x / s.alpha + d * (scale * (t.rho - s.rho))) * t.alpha
        return m.program(x)

    assert torch.allclose(draw(sampler=euler), draw(sampler="ddim"), atol=1e-5)
    assert not torch.equal(draw(sampler=euler, scale=0.9), draw(sampler=euler))


def test_eta_alone_means_ddim():
    assert torch.equal(draw(eta=0.0, schedule=VP()), draw(sampler="ddim", schedule=VP()))
    assert torch.equal(draw(eta=0.5, steps=None), draw(eta=0.5, steps=50, sampler="ddim"))


def test_a_run_s_fields_may_be_named_one_by_one():
    assert torch.equal(draw(run=Run(batch_size=1)), draw(batch_size=1))
    with pytest.raises(TypeError, match="run: expected a Run, got dict"):
        draw(run={})


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(ordr=3), TypeError, r"ordr: .* of sampler 'unipc' \(order, .*\), a condition of the model \(none\), or"),
        (dict(sampler="unipc", order=9), ValueError, r"order: expected one of \(1, 2, 3, 4\), got 9"),
        (dict(noise="path"), ValueError, "noise: expected 'step' with sampler 'unipc', which draws no noise"),
        (
            dict(guidance=Guidance(2, negative=[1, 2]), labels=1),
            ValueError,
            "negative: expected 3 classes, one for each",
        ),
        (dict(guidance=Guidance(2, negative=1)), ValueError, "negative: expected None without labels"),
        (
            dict(schedule=VP(), prediction="mu"),
            ValueError,
            "prediction: expected another one on a process without time",
        ),
        (dict(sampler="midpoint", prediction="mu"), ValueError, "prediction: expected another one at the real time"),
        (dict(noise="paths"), ValueError, "noise: expected 'step' or 'path', got 'paths'"),
        (dict(guidance=Guidance([1.0, 2.0]), labels=1), ValueError, "guidance: expected 3 weights, one for each image"),
        (
            dict(constraint=Inpaint(torch.zeros(2, *SHAPE), torch.ones(1, 1, 3, 3))),
            ValueError,
            "constraint: expected sh",
        ),
        (dict(start=From(torch.zeros(1, 2, 4, 3))), ValueError, "start: expected shape"),
        (dict(start=3), TypeError, r"start: expected None or From\(\.\.\.\), got int"),
        (dict(constraint=3), TypeError, r"constraint: expected None or Inpaint\(\.\.\.\), got int"),
        (dict(sampler="repaint", jump=0), ValueError, "jump: expected an int >= 1, got 0"),
        (dict(sampler="repaint", resample=0), ValueError, "resample: expected an int >= 1, got 0"),
        (dict(sampler="pc", corrections=-1), ValueError, "corrections: expected an int >= 0, got -1"),
        (dict(sampler="pc", corrections=1.5), TypeError, "corrections: expected an int >= 0, got 1.5"),
        (dict(sampler="langevin", steps_a_level=0), ValueError, "steps_a_level: expected an int >= 1, got 0"),
        (dict(sampler="langevin", step_size=-1.0), ValueError, "step_size: expected a number in"),
        (dict(sampler="heun", s_min="a"), TypeError, "s_min: expected a number in"),
        (dict(sampler="ddpm", variance="optimal"), ValueError, "data_std: expected a number >= 0 with variance"),
        (dict(sampler="ddpm", data_std=0.5), ValueError, "data_std: expected None unless variance is 'optimal'"),
        (
            dict(sampler="ddim", labels=1, guidance=Guidance(1.0, classifier=len, form="mean")),
            ValueError,
            "form: expected 'score' with a sampler that draws no independent noise, got 'mean'",
        ),
        (dict(clip=0.0), ValueError, "clip: expected True, False, a number > 0"),
        (dict(clip=(-1, 2)), ValueError, r"clip: expected a range \(-a, a\), got"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_name_themselves(options, error, message):
    with pytest.raises(error, match=message):
        draw(**options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: Guidance(math.nan), ValueError, "guidance: expected a finite number"),
        (lambda: Guidance("3"), TypeError, "guidance: expected a finite number, or one for each sample, got '3'"),
        (lambda: Guidance(2, rescale="a"), TypeError, "rescale: expected a number in"),
        (lambda: Guidance(2, interval=5), TypeError, "interval: expected .low, high., got 5"),
        (lambda: Guidance(2, classifier=5), TypeError, "classifier: expected a callable, got 5"),
        (lambda: Guidance(2, network=5), TypeError, "network: expected a callable, got 5"),
        (lambda: Guidance(2, rescale=2), ValueError, "rescale: expected a number in"),
        (lambda: Guidance(2, form="sum"), ValueError, "form: expected 'score' or 'mean', got 'sum'"),
        (lambda: Guidance(2, interval=(3, 1)), ValueError, "interval: expected"),
        (lambda: Guidance(2, negative=1, network=len), ValueError, "guidance: expected one of negative, network"),
        (lambda: Quantile(0), ValueError, r"q: expected a number in \(0, 1\]"),
        (lambda: From(torch.zeros(1), 0), ValueError, "fraction: expected a number in"),
        (lambda: From([0.0]), TypeError, "x: expected a floating-point tensor, got list"),
        (lambda: Inpaint(torch.zeros(1), torch.full((1,), 2.0)), ValueError, r"mask: expected values in \[0, 1\]"),
        (lambda: Inpaint(torch.zeros(1), torch.ones(1), jump=0), ValueError, "jump: expected an int >= 1, got 0"),
        (lambda: Run(engine=1), TypeError, "engine: expected True or False, got 1"),
        (lambda: Run(dtype=torch.int8), ValueError, "dtype: expected None"),
        (lambda: limit_of("no"), TypeError, "clip: expected True, False, a number"),
    ],
)
def test_settings_refuse_what_does_not_fit(call, error, message):
    with pytest.raises(error, match=message):
        call()
