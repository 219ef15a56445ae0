"""sample(): against float64 runs with the same noise, its rules, and what it refuses."""

import math
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from networks import diffusers_twin
from oracles import Gaussian, ddim_trajectory, ddpm_trajectory, dpmpp_2m_trajectory
from oracles import one_thread as one_thread
from tolerances import SAMPLE
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from diffkern import ops
from diffkern.engine import optimize
from diffkern.guidance import Guidance
from diffkern.model import Model, save
from diffkern.runtime import Loop
from diffkern.samplers import SAMPLERS, ddpm
from diffkern.sampling import Step, sample
from diffkern.schedule import Schedule
from diffkern.unet import UNet

LINEAR = Schedule.linear()
CPU = torch.device("cpu")
SHAPE = (2, 3, 3)
ONE = torch.ones(1, dtype=torch.float64)


def zeros(x_t, t, labels):
    return torch.zeros_like(x_t)


def run(network=zeros, n=3, *, schedule=LINEAR, prediction="x0", shape=SHAPE, progress=False, **options):
    """sample() of a bare callable, quietly."""
    return sample(network, n, schedule=schedule, prediction=prediction, shape=shape, progress=progress, **options)


def small_unet(num_classes: int | None = None, learned_variance: bool = False) -> UNet:
    """A UNet whose zero-initialised layers are random, so that it depends on all it is given."""
    torch.manual_seed(0)
    unet = UNet(
        2,
        channels=32,
        channel_mult=(1, 1),
        blocks=1,
        num_classes=num_classes,
        learned_variance=learned_variance,
        dropout=0.5,
    )
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
    return unet


class Recorder(nn.Module):
    """Wraps a network and notes what it is called with."""

    def __init__(self, network=zeros):
        super().__init__()
        self.network, self.calls = network, []

    def forward(self, x_t, t, labels):
        self.calls.append((x_t.clone(), t.clone(), None if labels is None else labels.clone()))
        return self.network(x_t, t, labels)


def noise(seeds, step: int, stream: int, shape=SHAPE) -> torch.Tensor:
    return ops.noise(torch.as_tensor(seeds), shape, step=step, stream=stream).double()


def trajectory(timesteps, seeds, x_0, *, variance=None, eta=None, schedule=LINEAR):
    """The float64 run that ``sample`` must give, of Gaussian data and of the noise that the standard prescribes."""
    z = [noise(seeds, t, 1) for t in timesteps]
    alpha_bars = torch.cat((schedule.alpha_bar[timesteps], ONE))
    start = noise(seeds, 0, 0)
    if variance is not None:
        return ddpm_trajectory(start, z, x_0, alpha_bars, variance)
    if eta is not None:
        return ddim_trajectory(start, z, x_0, alpha_bars, eta)
    return dpmpp_2m_trajectory(start, x_0, alpha_bars)


def assert_near(got, expected, tolerance=SAMPLE):
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


# --- against the affine map of Gaussian data ---

RUNS = {
    "ddpm, all steps": (dict(), dict(variance="fixed_small"), LINEAR.timesteps()),
    "ddpm, fixed large": (
        dict(sampler="ddpm", steps=50, variance="fixed_large"),
        dict(variance="fixed_large"),
        LINEAR.timesteps(50),
    ),
    "ddpm, leading": (
        dict(sampler="ddpm", steps=30, spacing="leading"),
        dict(variance="fixed_small"),
        LINEAR.timesteps(30, "leading"),
    ),
    "ddim": (dict(sampler="ddim"), dict(eta=0.0), LINEAR.timesteps(50)),
    "eta": (dict(steps=30, eta=0.0), dict(eta=0.0), LINEAR.timesteps(30)),
    "steps of one's own": (dict(steps=[999, 500, 3], eta=0.0), dict(eta=0.0), [999, 500, 3]),
    "ddim, eta 0.5": (
        dict(sampler="ddim", steps=20, spacing="quadratic", eta=0.5),
        dict(eta=0.5),
        LINEAR.timesteps(20, "quadratic"),
    ),
    "ddim, explicit": (dict(sampler="ddim", steps=[999, 700, 40, 3], eta=1.0), dict(eta=1.0), [999, 700, 40, 3]),
    "dpmpp_2m": (dict(sampler="dpmpp_2m"), dict(), LINEAR.timesteps(20)),
    "dpmpp_2m, explicit": (dict(sampler="dpmpp_2m", steps=[900, 600, 300, 10]), dict(), [900, 600, 300, 10]),
    "dpmpp_2m, two steps": (dict(sampler="dpmpp_2m", steps=2), dict(), LINEAR.timesteps(2)),
}


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_sample_is_the_papers_equations_on_the_prescribed_noise(name, clip, prediction):
    options, oracle, timesteps = RUNS[name]
    data = Gaussian(0.3, 0.5)

    def x_0(x, alpha_bar):
        x0_hat = data.x_0(x, alpha_bar)
        return x0_hat.clamp(-1, 1) if clip else x0_hat

    seeds = [5, 2**40, -1]
    expected = trajectory(timesteps, seeds, x_0, **oracle)[-1][0]
    got = run(data.network(LINEAR, prediction), seeds=seeds, prediction=prediction, clip=clip, **options)
    assert got.shape == (3, *SHAPE) and got.dtype == torch.float32 and got.is_contiguous()
    assert_near(got, expected)


@pytest.mark.parametrize(
    "options",
    [
        dict(sampler="ddpm", steps=20),
        dict(sampler="ddim"),
        dict(sampler="ddim", eta=1.0),
        dict(sampler="dpmpp_2m", steps=5),
    ],
    ids=str,
)
def test_sample_lands_on_a_point_mass(options):
    got = run(Gaussian(-0.4, 0.0).network(LINEAR), prediction="eps", **options)
    assert_near(got, torch.full((3, *SHAPE), -0.4))


def test_sample_with_zero_v_has_the_moments_of_unit_gaussian_data():
    got = run(n=8, shape=(3, 32, 32), prediction="v", sampler="ddpm", steps=100, variance="fixed_large", clip=False)
    elements = got.numel()
    assert abs(got.mean().item()) < 5 / elements**0.5
    # fixed large is the optimal variance of N(0, 1) data, but for the last step's
    assert abs(got.std().item() / LINEAR.alpha_bar[9].sqrt().item() - 1) < 5 / (2 * elements) ** 0.5


@pytest.mark.parametrize("steps", [1, 50, 1000])
def test_ddim_with_zero_eps_scales_x_T(steps):
    expected = noise([0, 1, 2], 0, 0) / LINEAR.alpha_bar[999].sqrt()
    assert_near(run(prediction="eps", sampler="ddim", steps=steps, clip=False), expected)


def test_optimal_variances_can_be_given_as_a_tensor():
    data, timesteps = Gaussian(0.0, 0.5), LINEAR.timesteps(10)
    s = LINEAR.respace(timesteps)
    variance = (data.variance(s.alpha_bar_prev) * s.betas / data.variance(s.alpha_bar)).flip(0)
    options = dict(sampler="ddpm", steps=10, variance=variance, clip=False)
    got = run(data.network(LINEAR, "v"), 16, prediction="v", shape=(3, 32, 32), **options)
    assert abs(got.std().item() / 0.5 - 1) < 5 / (2 * got.numel()) ** 0.5


# --- equivalences ---


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_the_error_falls_with_the_order_of_the_sampler(sampler, order):
    """Both follow the ODE that takes a Gaussian's x_t from one t to another along a straight line."""
    data, schedule, x_T = Gaussian(0.3, 0.5), Schedule.cosine(64_001), noise([0, 1, 2], 0, 0)
    first, last = schedule.alpha_bar[48_000], schedule.alpha_bar[8_000]
    gain = (data.variance(last) / data.variance(first)).sqrt()
    exact = last.sqrt() * data.mean + gain * (x_T - first.sqrt() * data.mean)
    errors = []
    for length in (1_000, 500):
        seen = []
        options = dict(sampler=sampler, steps=range(48_000, 7_999, -length), clip=False, callback=seen.append)
        run(data.network(schedule, "x0"), x_T=x_T, schedule=schedule, prediction="x0", **options)
        errors.append((seen[-1].x_t - exact).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.2


def test_ddim_with_eta_one_is_ddpm():
    network = Gaussian().network(LINEAR)
    ddpm = run(network, prediction="eps", steps=50, sampler="ddpm")
    ddim = run(network, prediction="eps", steps=50, sampler="ddim", eta=1.0)
    assert_near(ddim, ddpm)


@pytest.mark.parametrize(("half", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_learned_variance_at_its_ends_is_a_fixed_one(half, variance):
    def network(x_t, t, labels):
        return torch.cat((0.5 * x_t, torch.full_like(x_t, half)), 1)

    options = dict(sampler="ddpm", steps=20)
    learned = run(network, variance="learned", **options)
    assert_near(learned, run(lambda x_t, t, labels: 0.5 * x_t, variance=variance, **options))
    # the half is left out unless it is asked for
    assert torch.equal(run(network, **options), run(lambda x_t, t, labels: 0.5 * x_t, **options))


def by_label(x_t, t, labels):
    return 0.1 * x_t + 0.05 * labels.view(-1, 1, 1, 1)


def test_guidance_extrapolates_from_the_null_class():
    labels, w = torch.tensor([3, 0, 5]), 2.5

    def mixed(x_t, t, _):
        null = by_label(x_t, t, torch.full_like(t, -1))
        return null + w * (by_label(x_t, t, labels) - null)

    got = run(by_label, labels=labels, guidance=w, steps=10, clip=False)
    assert_near(got, run(mixed, steps=10, clip=False))


@pytest.mark.parametrize(
    "w", [torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64), np.float32(2.5), np.array(2.5)]
)
def test_guidance_may_be_a_scalar_of_torch_or_numpy(w):
    expected = run(by_label, labels=[3, 0, 5], guidance=2.5, steps=3)
    assert torch.equal(run(by_label, labels=[3, 0, 5], guidance=w, steps=3), expected)


def test_guidance_of_one_is_the_conditional_model_and_of_zero_the_unconditional_one():
    labels, conditional, unconditional = torch.tensor([3, 0, 5]), Recorder(by_label), Recorder(by_label)
    one = run(conditional, labels=labels, guidance=1.0, steps=10)
    zero = run(unconditional, labels=labels, guidance=0, steps=10)
    assert torch.equal(one, run(lambda x_t, t, _: by_label(x_t, t, labels), steps=10))
    assert torch.equal(zero, run(by_label, labels=-1, steps=10))
    for recorder, expected in ((conditional, labels), (unconditional, torch.full((3,), -1))):
        assert len(recorder.calls) == 10  # one pass a step
        assert all(torch.equal(y, expected) for *_, y in recorder.calls)


def test_guidance_runs_the_network_twice_with_batch_size_rows():
    recorder = Recorder(by_label)
    run(recorder, labels=[3, 0, 5], guidance=2, steps=[9, 4], batch_size=2)
    assert [(len(x), y.tolist()) for x, _, y in recorder.calls] == [
        *[(2, [3, 0]), (2, [-1, -1])] * 2,
        *[(2, [5, 5]), (2, [-1, -1])] * 2,
    ]


def test_without_labels_the_network_gets_none():
    recorder = Recorder()
    run(recorder, steps=2)
    assert all(labels is None for *_, labels in recorder.calls)


# --- what the network sees ---


def test_network_gets_contiguous_float32_images_and_zero_based_steps():
    recorder = Recorder()
    run(recorder, steps=[999, 10, 0], batch_size=3)
    assert [t.tolist() for _, t, _ in recorder.calls] == [[999] * 3, [10] * 3, [0] * 3]
    for x_t, t, _ in recorder.calls:
        assert x_t.dtype == torch.float32 and x_t.is_contiguous() and x_t.shape == (3, *SHAPE)
        assert t.dtype == torch.int64
    assert torch.equal(recorder.calls[0][0], ops.noise(torch.arange(3), SHAPE, step=0, stream=0))


@pytest.mark.parametrize(
    ("sampler", "T", "count"), [(None, 30, 30), ("ddpm", 30, 30), ("ddim", 1000, 50), ("ddim", 30, 30)]
)
def test_default_steps_are_all_for_ddpm_and_50_for_ddim(sampler, T, count):
    recorder = Recorder()
    run(recorder, 1, schedule=Schedule.cosine(T), sampler=sampler)
    assert len(recorder.calls) == count


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_autocast_around_the_network_alone(dtype):
    seen = []

    def network(x_t, t, labels):
        enabled = torch.is_autocast_enabled("cpu")
        seen.append((torch.get_autocast_dtype("cpu") if enabled else None, x_t.dtype))
        return x_t.to(dtype or x_t.dtype)

    got = run(network, steps=2, dtype=dtype, callback=lambda step: seen.append(torch.is_autocast_enabled("cpu")))
    assert seen == [(dtype, torch.float32), False] * 2 and got.dtype == torch.float32


def test_images_are_in_range_with_clip_whatever_the_network_says():
    torch.manual_seed(0)
    for options in (
        dict(sampler="ddpm", steps=20),
        dict(steps=7),
        dict(sampler="ddim", eta=1.0, spacing="leading"),
    ):
        got = run(lambda x_t, t, labels: 3 * torch.randn_like(x_t), prediction="eps", **options)
        assert got.abs().max() == 1


# --- seeds and batches ---


def test_n_alone_means_the_first_seeds():
    network = Gaussian().network(LINEAR)
    options = dict(sampler="ddpm", steps=5)
    assert torch.equal(run(network, 5, **options), run(network, None, seeds=range(5), **options))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 16])
def test_noise_of_an_image_does_not_depend_on_the_batches(batch_size):
    whole = run(n=7, shape=(1, 5, 3), prediction="v", sampler="ddpm", steps=10, batch_size=7)
    split = run(n=7, shape=(1, 5, 3), prediction="v", sampler="ddpm", steps=10, batch_size=batch_size)
    assert torch.equal(split, whole)


def test_one_image_of_a_batch_is_regenerated_from_its_seed():
    unet, options = small_unet(3), dict(prediction="eps", shape=(2, 8, 8), sampler="ddim", steps=3, eta=0.7)
    images = run(unet, None, seeds=[7, 1, 31337, 4, 9, 2], labels=[0, 1, 2, 0, 1, 2], batch_size=4, **options)
    again = run(unet, None, seeds=[31337], labels=[2], batch_size=4, **options)
    assert torch.equal(again[0], images[2])
    assert not torch.equal(images[2], images[5])


def test_network_always_runs_batch_size_rows():
    recorder = Recorder()
    images = run(recorder, 5, steps=[3], batch_size=2)
    assert [len(x) for x, *_ in recorder.calls] == [2, 2, 2] and len(images) == 5
    recorder.calls.clear()
    run(recorder, 20, steps=[3])
    assert [len(x) for x, *_ in recorder.calls] == [16, 16]
    recorder.calls.clear()
    run(recorder, 2, steps=[3], batch_size=8)
    assert [len(x) for x, *_ in recorder.calls] == [8]


@pytest.mark.parametrize(
    ("seeds", "same"),
    [
        (2**64 - 1, [-1]),
        ([2**63, 3], [-(2**63), 3]),
        (torch.tensor(6), [6]),
        (torch.tensor([4, -2]), [4, 2**64 - 2]),
        ((8, 9), torch.tensor([8, 9])),
        (np.arange(3, dtype=np.int32), [0, 1, 2]),
        (np.array([2**64 - 1, 5], np.uint64), [-1, 5]),
        (np.array(7), 7),
    ],
    ids=str,
)
def test_seeds_are_taken_modulo_2_to_the_64(seeds, same):
    def images(seeds):
        return run(n=None, seeds=seeds, sampler="ddpm", steps=2, prediction="v")

    assert torch.equal(images(seeds), images(same))


def test_x_T_is_where_sampling_starts():
    x_T = ops.noise(torch.arange(3), SHAPE, step=0, stream=0)
    expected = run(prediction="v", steps=4, batch_size=2)
    for start in (x_T, x_T.double(), x_T.contiguous(memory_format=torch.channels_last)):
        before = start.clone()
        assert torch.equal(run(n=None, prediction="v", steps=4, batch_size=2, x_T=start), expected)
        assert torch.equal(start, before)
    half = run(prediction="v", steps=4, x_T=x_T.bfloat16())
    assert torch.equal(half, run(prediction="v", steps=4, x_T=x_T.bfloat16().float()))


# --- callbacks, interruptions, training flags ---


@pytest.mark.parametrize("clip", [False, True])
def test_callback_sees_each_step_of_the_float64_run(clip):
    data, timesteps, seen = Gaussian(), LINEAR.timesteps(10), []

    def x_0(x, alpha_bar):
        return data.x_0(x, alpha_bar).clamp(-1, 1) if clip else data.x_0(x, alpha_bar)

    options = dict(prediction="eps", sampler="ddpm", steps=10, clip=clip, batch_size=2)
    images = run(data.network(LINEAR), 3, callback=seen.append, **options)
    assert torch.equal(images, run(data.network(LINEAR), 3, **options))
    expected = trajectory(timesteps, range(3), x_0, variance="fixed_small")
    assert [(step.images, step.index, step.t) for step in seen] == [
        (images, index, t) for images in (slice(0, 2), slice(2, 3)) for index, t in enumerate(timesteps)
    ]
    for step in seen:
        assert isinstance(step, Step)
        x_t, x0_hat = expected[step.index]
        assert_near(step.x_t, x_t[step.images])
        assert_near(step.x0_hat, x0_hat[step.images], 4e-5 if step.t > 900 else SAMPLE)  # eps error times 1 / sqrt(ab)
    assert torch.equal(seen[-1].x0_hat, images[2:])


def classifier_guided(x_t, t, labels):
    """Differentiates inside, as classifier guidance does (Dhariwal & Nichol 2021, algorithm 2): 0.5 x_t in the end."""
    with torch.enable_grad():
        x = x_t.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(x.square().sum() / 2, x)
    return 0.5 * gradient


@pytest.mark.parametrize("variance", [None, "learned"])
def test_a_network_may_differentiate_inside(variance):
    def plain(x_t, t, labels):
        return torch.cat((0.5 * x_t, x_t), 1) if variance else 0.5 * x_t

    def differentiating(x_t, t, labels):
        return torch.cat((classifier_guided(x_t, t, labels), x_t), 1) if variance else classifier_guided(x_t, t, labels)

    options = dict(sampler="ddpm", steps=5, variance=variance)
    assert torch.equal(run(differentiating, **options), run(plain, **options))


def test_graphs_that_a_network_keeps_outlive_the_step():
    weight, outs = torch.ones(2, 1, 1, requires_grad=True), []

    def network(x_t, t, labels):
        with torch.enable_grad():
            outs.append((weight * x_t).square() * labels.view(-1, 1, 1, 1))
        return outs[-1]

    images = run(network, labels=[1, 2, 3], steps=4, batch_size=1)
    assert not images.requires_grad
    sum(out.sum() for out in outs).backward()
    assert weight.grad.isfinite().all() and weight.grad.abs().min() > 0


def test_a_network_that_overwrites_its_input_overwrites_no_image():
    def overwriting(x_t, t, labels):
        labels.fill_(7)
        return x_t.mul_(0.5)

    assert torch.equal(run(overwriting, labels=1, steps=5), run(lambda x_t, t, labels: 0.5 * x_t, steps=5))


def test_what_a_callback_keeps_is_an_ordinary_tensor():
    seen = []
    weight = torch.ones((), requires_grad=True)
    run(steps=2, callback=seen.append)
    for step in seen:
        (weight * step.x_t * step.x0_hat).sum().backward()
        step.x_t.add_(1)
        step.x0_hat.add_(1)
    assert weight.grad.isfinite()


def test_ctrl_c_leaves_cleanly(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    network = nn.Sequential(Recorder(), nn.Dropout())
    network.forward = lambda x_t, t, labels: network[0](x_t, t, labels)
    network.train()
    network[1].eval()

    def interrupt(step):
        if step.index == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(network, steps=10, callback=interrupt, progress=True)
    assert len(network[0].calls) == 3
    assert [module.training for module in network.modules()] == [True, True, False]
    assert torch.is_grad_enabled()
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize("training", [False, True])
def test_training_flags_are_restored_and_dropout_is_off(training):
    unet = small_unet().train(training)
    unet.mid_block.eval()
    flags = [module.training for module in unet.modules()]
    options = dict(prediction="eps", shape=(2, 8, 8), steps=2)
    first = run(unet, 2, **options)
    assert [module.training for module in unet.modules()] == flags
    assert torch.equal(first, run(unet, 2, **options))  # dropout would differ
    first.requires_grad_().sum().backward()  # the result is no inference tensor


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_steps_that_find_their_row_on_the_device_are_those_of_a_loop_of_the_host(guidance):
    """A CUDA graph replays one row for all of its kind: the first row's, here, which knows neither number nor t."""
    unet, labels, timesteps = small_unet(num_classes=3).eval(), torch.tensor([0, 2]), [900, 500, 499, 0]
    table, seeds = ddpm(LINEAR, timesteps, "eps").float(), torch.tensor([5, 6])
    program, null = SAMPLERS["ddpm"].trace(LINEAR.grid(timesteps), "eps"), torch.tensor([-1, -1])
    conditions = {"labels": (labels, null)}
    loop = Loop(unet, program, (2, 2, 8, 8), CPU, guidance=Guidance(guidance), conditions=conditions)
    x = ops.noise(seeds, (2, 8, 8), step=0)
    with torch.inference_mode():
        loop.begin(x, seeds, conditions)
        assert len({loop.kind(row) for row in program.rows}) == 1
        for _ in timesteps:
            loop.step(program.rows[0])
        for row, t in enumerate(timesteps):
            out, null = (unet(x, torch.tensor([t, t]), y) for y in (labels, torch.tensor([-1, -1])))
            guided = dict(out_uncond=null, guidance=guidance) if guidance != 1 else {}
            x = ops.reverse_step(x, out, table, row, seeds, clip=True, **guided)
    assert torch.equal(loop.x, x)


def test_a_step_looks_at_no_value_on_the_host():
    """Tensors without values refuse that; a CUDA graph would, too."""
    unet, program = small_unet(num_classes=3).eval(), SAMPLERS["ddpm"].trace(LINEAR.grid([900, 0]), "eps")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        labels = torch.zeros(2, dtype=torch.int64)
        conditions = {"labels": (labels, labels)}
        loop = Loop(
            *(unet, program, (2, 2, 8, 8), CPU), guidance=Guidance(3.0), conditions=conditions, dtype=torch.bfloat16
        )
        loop.begin(torch.empty(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64), conditions)
        loop.step(program.rows[0])
        with pytest.raises(DataDependentOutputException):
            loop.row.item()


def test_progress_bar_counts_the_steps_of_all_batches(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run(n=5, steps=4, batch_size=2, progress=True)
    assert "12/12" in capsys.readouterr().err
    run(n=5, steps=4, batch_size=2, progress=False)
    assert capsys.readouterr().err == ""


# --- models ---


def test_model_object_file_and_bare_network_are_the_same(tmp_path):
    unet, schedule = small_unet(3), Schedule.cosine(20)
    model = Model(unet, schedule, "v", (2, 8, 8), ("a", "b", "c"))
    save(model, tmp_path / "model.safetensors")
    options = dict(labels=[0, -1, 2], guidance=1.5, steps=3, progress=False)
    expected = sample(unet, schedule=schedule, prediction="v", shape=(2, 8, 8), **options)
    for source in (model, tmp_path / "model.safetensors", str(tmp_path / "model.safetensors")):
        assert torch.equal(sample(source, **options), expected)


def test_model_with_a_learned_variance_is_sampled_with_it():
    model = Model(small_unet(learned_variance=True), Schedule.cosine(20), "eps", (2, 8, 8))
    learned, fixed, default = (
        sample(model, 2, steps=4, sampler="ddpm", variance=variance, progress=False)
        for variance in ("learned", "fixed_small", None)
    )
    assert learned.isfinite().all() and not torch.equal(learned, fixed)
    assert torch.equal(default, learned)
    assert sample(model, 2, steps=4, sampler="ddim", progress=False).isfinite().all()  # which has no use for it


def test_a_network_of_diffusers_is_sampled_as_ours():
    unet, described = small_unet(), dict(prediction="eps", shape=(2, 8, 8), sampler="ddpm", steps=4)
    twin = diffusers_twin(unet)
    twin.load_state_dict(unet.state_dict())
    assert_near(run(twin, **described), run(unet, engine=False, **described), 1e-4)


def test_a_module_may_have_a_unet_and_a_scheduler():
    module = Recorder(Gaussian().network(LINEAR))
    module.unet, module.scheduler = module.network, None
    assert torch.equal(run(module, prediction="eps", steps=2), run(module.network, prediction="eps", steps=2))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_optimized_network_is_sampled_as_the_network_itself(dtype):
    unet, described = small_unet(3, learned_variance=True), dict(prediction="eps", shape=(2, 8, 8))
    expected = run(unet, labels=[0, 2, -1], steps=4, dtype=dtype, **described)
    optimized = optimize(unet, dtype=dtype or torch.float32)
    assert torch.equal(run(optimized, labels=[0, 2, -1], steps=4, **described), expected)
    model = optimize(Model(unet, LINEAR, "eps", (2, 8, 8), ("a", "b", "c")), dtype=dtype or torch.float32)
    assert torch.equal(sample(model, labels=["a", "c", "none"], steps=4, progress=False), expected)
    with pytest.raises(ValueError, match=r"labels: expected ints in -1..2, got 99"):
        run(optimized, labels=99, **described)


# --- what does not fit ---

UNCONDITIONAL, CONDITIONAL = small_unet(), small_unet(3)
MODEL = Model(CONDITIONAL, LINEAR, "eps", (2, 8, 8), ("a", "b", "c"))
UNET = dict(network=CONDITIONAL, shape=(2, 8, 8))
X_T = torch.zeros(3, *SHAPE)


class TwoArguments(nn.Module):
    def forward(self, x, t):
        return x


def returns(out):
    return dict(network=lambda x_t, t, labels: out)


BAD = [
    # model
    (dict(network=None), TypeError, "model: expected a name, a path, a Model or a callable, got NoneType"),
    (dict(network=3), TypeError, "model: expected a name, a path, a Model or a callable, got int"),
    (
        dict(schedule=None),
        ValueError,
        "schedule: expected a value with a bare function, which has none",
    ),
    (
        dict(network=CONDITIONAL, schedule=None),
        ValueError,
        "schedule: expected a value with a bare UNet, which has none",
    ),
    (dict(prediction=None), ValueError, "prediction: expected a value with a bare function"),
    (dict(shape=None), ValueError, "shape: expected a value with a bare function"),
    (dict(network=MODEL), ValueError, "schedule: expected None, the model brings its own, got Schedule.linear(T=1000"),
    (dict(network=MODEL, schedule=None), ValueError, "prediction: expected None, the model brings its own, got 'x0'"),
    (
        dict(network=MODEL, schedule=None, prediction=None),
        ValueError,
        "shape: expected None, the model brings its own, got (2, 3, 3)",
    ),
    (dict(schedule=[0.1, 0.2]), TypeError, "schedule: expected a Schedule or another process, got list"),
    (dict(prediction="noise"), ValueError, "prediction: expected one of eps, x0, v,"),
    (dict(prediction="eps", schedule=Schedule([0.5, 1.0])), ValueError, "prediction: expected 'v', 'x0' or 'flow'"),
    (dict(shape=(3, 0)), ValueError, "shape: expected positive sizes, as (C, H, W), got (3, 0)"),
    (dict(shape=(2, 3, 0)), ValueError, "shape: expected positive sizes, as (C, H, W), got (2, 3, 0)"),
    (dict(shape=(2, 3, 3.0)), TypeError, "shape: expected positive sizes, as (C, H, W), got 3.0"),
    (dict(shape=8), TypeError, "shape: expected positive sizes, as (C, H, W), got 8"),
    (dict(shape="283"), TypeError, "shape: expected positive sizes, as (C, H, W), got '283'"),
    (
        dict(network=SimpleNamespace(unet=zeros, scheduler=None)),
        TypeError,
        "model: expected a Model, as Model.from_diffusers(pipeline) makes of one, got a SimpleNamespace",
    ),
    (
        dict(network=TwoArguments()),
        TypeError,
        "model: expected a network that is called as network(x_t, t, labels), got TwoArguments(x, t)",
    ),
    (
        dict(network=Model(TwoArguments(), LINEAR), schedule=None, prediction=None, shape=None),
        TypeError,
        "model: expected a network that is called as network(x_t, t, labels), got TwoArguments(x, t)",
    ),
    (
        dict(network=lambda x, t: x),
        TypeError,
        "model: expected a network that is called as network(x_t, t, labels), got <lambda>(x, t)",
    ),
    (
        dict(network=small_unet().bfloat16(), shape=(2, 8, 8)),
        ValueError,
        "model: expected a UNet of float32, or dtype=torch.bfloat16 for autocast, got one of torch.bfloat16",
    ),
    # n, seeds, labels
    (dict(n=None), ValueError, "n: expected n or seeds, got neither"),
    (dict(n=0), ValueError, "n: expected an int >= 1, got 0"),
    (dict(n=-2), ValueError, "n: expected an int >= 1, got -2"),
    (dict(n=2.0), TypeError, "n: expected an int >= 1, got 2.0"),
    (dict(n=True), TypeError, "n: expected an int >= 1, got True"),
    (dict(n="3"), TypeError, "n: expected an int >= 1, got '3'"),
    (dict(n=None, seeds=[]), ValueError, "n: expected an int >= 1, got 0"),
    (dict(seeds=[1, 2]), ValueError, "seeds: expected 3, one for each image, got 2"),
    (dict(seeds=5), ValueError, "seeds: expected 3, one for each image, got 1"),
    (dict(seeds=[1, 2, 2**64]), ValueError, "seeds: expected ints in [-2^63, 2^64), got 18446744073709551616"),
    (dict(seeds=[1, 2, -(2**63) - 1]), ValueError, "seeds: expected ints in [-2^63, 2^64), got -9223372036854775809"),
    (dict(seeds=[1, 2, 0.5]), TypeError, "seeds: expected ints, got 0.5"),
    (dict(seeds=np.array([0.5, 1.0, 2.0])), TypeError, "seeds: expected ints, got 0.5"),
    (dict(seeds=np.ones((3, 2), np.int64)), TypeError, "seeds: expected ints, got [1, 1]"),
    (dict(seeds=0.5), TypeError, "seeds: expected an int, ints or an int64 tensor, got 0.5"),
    (dict(seeds="abc"), TypeError, "seeds: expected an int, ints or an int64 tensor, got 'abc'"),
    (
        dict(seeds=torch.arange(3).int()),
        TypeError,
        "seeds: expected an int64 tensor [N], got torch.int32 of shape (3,)",
    ),
    (dict(seeds=torch.zeros(3)), TypeError, "seeds: expected an int64 tensor [N], got torch.float32 of shape (3,)"),
    (
        dict(seeds=torch.ones(2, 2).long()),
        TypeError,
        "seeds: expected an int64 tensor [N], got torch.int64 of shape (2,",
    ),
    (dict(labels=[1, 2]), ValueError, "labels: expected 3, one for each image, got 2"),
    (dict(labels=[0, 1, -2]), ValueError, "labels: expected ints >= -1, got -2"),
    (dict(labels=-2), ValueError, "labels: expected ints >= -1, got -2"),
    (dict(labels=2**63), ValueError, "labels: expected ints >= -1, got 9223372036854775808"),
    (dict(labels=[0, 1, None]), TypeError, "labels: expected ints >= -1, got None"),
    (dict(labels=["shoe"] * 3), TypeError, "labels: expected ints >= -1, got 'shoe'"),
    (dict(labels=torch.tensor([0, -2, 1])), ValueError, "labels: expected ints >= -1, got -2"),
    (
        dict(labels=torch.zeros(3)),
        TypeError,
        "labels: expected an int64 tensor [] or [n], got torch.float32 of shape (3,)",
    ),
    (dict(labels=torch.ones(3, 1).long()), TypeError, "labels: expected an int64 tensor [] or [n], got torch.int64 of"),
    (dict(labels=[0, 1, 3], **UNET), ValueError, "labels: expected ints in -1..2, got 3"),
    (dict(labels=torch.tensor(3), **UNET), ValueError, "labels: expected ints in -1..2, got 3"),
    (
        dict(labels=3, network=MODEL, schedule=None, prediction=None, shape=None),
        ValueError,
        "labels: expected ints in -1..2, got 3",
    ),
    (dict(labels=0, network=UNCONDITIONAL, shape=(2, 8, 8)), ValueError, "labels: expected None, this network has no"),
    # guidance, sampler and its options
    (dict(guidance=2.0), ValueError, "guidance: expected 1 without labels, got 2.0"),
    (dict(guidance=0), ValueError, "guidance: expected 1 without labels, got 0"),
    (dict(labels=0, guidance=float("nan")), ValueError, "guidance: expected a finite number, got nan"),
    (dict(labels=0, guidance="2"), TypeError, "guidance: expected a finite number, got '2'"),
    (dict(labels=0, guidance=torch.tensor(True)), TypeError, "guidance: expected a finite number, got True"),
    (dict(labels=0, guidance=torch.ones(3)), TypeError, "guidance: expected a finite number, got tensor([1., 1., 1.])"),
    (dict(sampler="plms"), ValueError, f"sampler: expected one of {tuple(SAMPLERS)} or a function, got 'plms'"),
    (
        dict(steps=5, variance="fixed_large"),
        ValueError,
        "variance: expected None, its default, with sampler 'unipc', got",
    ),
    (dict(steps=0), ValueError, "steps: expected 1 to 1000, the length of the schedule, got 0"),
    (dict(steps=1001), ValueError, "steps: expected 1 to 1000, the length of the schedule, got 1001"),
    (dict(steps=50.0), TypeError, "steps: expected an int in 1..1000 or a decreasing sequence of ints, got 50.0"),
    (dict(steps=[0, 999]), ValueError, "steps: expected strictly decreasing steps, got [0, 999]"),
    (dict(steps=[1000, 0]), ValueError, "steps: expected steps in 0..999, got 1000 to 0"),
    (
        dict(spacing="even"),
        ValueError,
        "spacing: expected one of ['karras', 'lambda', 'leading', 'linspace', 'quadratic', 'trailing', 'uniform']",
    ),
    (
        dict(variance="tiny"),
        ValueError,
        "variance: expected one of ('fixed_small', 'fixed_large', 'learned', 'diagonal', 'full', 'optimal')",
    ),
    (
        dict(variance=torch.ones(3), sampler="ddpm", steps=5),
        ValueError,
        "variance: expected shape (5,), one for each step, got (3,)",
    ),
    (dict(sampler="ddim", variance="fixed_large"), ValueError, "variance: expected None, its default, with"),
    (dict(sampler="ddim", variance=torch.ones(50)), ValueError, "variance: expected None, its default, with"),
    (dict(sampler="ddpm", eta=0.5), ValueError, "eta: expected 0, its default, with sampler 'ddpm', got 0.5"),
    (dict(sampler="ddim", eta=2.0), ValueError, "eta: expected a number in [0, 1], got 2.0"),
    (dict(sampler="ddim", eta=None), TypeError, "eta: expected a number in [0, 1], got None"),
    # x_T, batch_size, device, dtype, flags
    (dict(x_T=[1.0]), TypeError, "x_T: expected a floating-point tensor, got list"),
    (dict(x_T=X_T.long()), TypeError, "x_T: expected a floating-point tensor, got torch.int64"),
    (dict(x_T=X_T[0]), ValueError, "x_T: expected shape (n, 2, 3, 3), got (2, 3, 3)"),
    (dict(x_T=X_T[:, :1]), ValueError, "x_T: expected shape (n, 2, 3, 3), got (3, 1, 3, 3)"),
    (dict(x_T=X_T[:2]), ValueError, "x_T: expected 3, one for each image, got 2"),
    (dict(batch_size=0), ValueError, "batch_size: expected an int >= 1, got 0"),
    (dict(batch_size=1.5), TypeError, "batch_size: expected an int >= 1, got 1.5"),
    (dict(cuda_graph=True), ValueError, "cuda_graph: expected False on a device other than CUDA, got True on 'cpu'"),
    (dict(cuda_graph=1), TypeError, "cuda_graph: expected True or False, got 1"),
    (dict(device="gpu"), ValueError, "device: expected cpu or cuda, got 'gpu'"),
    (dict(device="meta"), ValueError, ", got meta"),
    (dict(device=1.5), ValueError, "device: expected cpu or cuda, got 1.5"),
    (
        dict(network=small_unet().to("meta"), device="cpu"),
        ValueError,
        "device: expected 'meta', where the network is",
    ),
    (dict(dtype=torch.float64), ValueError, "dtype: expected None, torch.bfloat16 or torch.float16, got torch.float64"),
    (dict(dtype="bf16"), ValueError, "dtype: expected None, torch.bfloat16 or torch.float16, got 'bf16'"),
    (dict(clip="yes"), TypeError, "clip: expected True, False, a number > 0, a range (-a, a) or a Quantile, got 'yes'"),
    (dict(progress="no"), TypeError, "progress: expected True or False, got 'no'"),
    (dict(callback="print"), TypeError, "callback: expected a callable, got str"),
    # what the network returns
    (returns(None), TypeError, "model: expected a tensor as output, got NoneType"),
    (returns((X_T,)), TypeError, "model: expected a tensor as output, got tuple"),
    (returns(X_T.long()), TypeError, "model: expected a floating-point output, got torch.int64"),
    (returns(X_T[:1]), ValueError, "model: expected an output of shape (3, 2, 3, 3), got (1, 2, 3, 3)"),
    (returns(X_T.to("meta")), ValueError, "model: expected an output on cpu, got meta"),
    (
        dict(variance="learned", **returns(X_T)),
        ValueError,
        "model: expected an output of shape (3, 4, 3, 3), got (3, 2, 3, 3)",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=range(len(BAD)))
def test_sample_refuses_what_does_not_fit(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        run(**options)


def test_model_that_is_not_there_is_refused():
    with pytest.raises(FileNotFoundError, match="model: expected a shipped model"):
        sample("no-such-model", 1)


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device: expected one of cpu, got cuda:0"):
        run(device="cuda:0")


def test_classes_have_names():
    model = Model(small_unet(num_classes=3), LINEAR, "eps", SHAPE[:1] + (8, 8), ("Cat", "Dog", "Emu"))
    options = dict(steps=2, progress=False)
    for names, labels in ((["emu", "Cat", 1, "none"], [2, 0, 1, -1]), ("dog", [1, 1, 1, 1])):
        assert torch.equal(sample(model, 4, labels=names, **options), sample(model, 4, labels=labels, **options))
    with pytest.raises(ValueError, match="labels: expected none or one of 0 Cat, 1 Dog, 2 Emu, got 'cow'"):
        sample(model, 1, labels="cow", **options)
