"""``diffkern.Scheduler`` in the place of diffusers' schedulers: the same loop, the same network, the same images."""

import json

import diffusers
import pytest
import torch
from oracles import one_thread as one_thread
from test_diffusers import LINEAR, SAME, SHAPE, edm_network, flow_network, linear_start, made, theirs, v_network, z

import diffkern
from diffkern import EDM, Schedule, sample
from diffkern.schedulers import Scheduler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of NumPy, in diffusers

BETAS = LINEAR.betas.tolist()
OTHERS = ("ddpm", "eta", "euler_a", "sde", "deis")  # draw noise, which here follows the generator; end at time step 0
NO_NOISE = {name: case for name, case in SAME.items() if not any(word in name for word in OTHERS)}


def drawn(scheduler, network, x, **options):
    """x after all steps, as a pipeline takes them."""
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, **options, return_dict=False)[0]
    return x.double()


@pytest.mark.parametrize(("name", "settings", "options", "sampler", "extra"), NO_NOISE.values(), ids=NO_NOISE)
def test_it_does_what_the_scheduler_does(monkeypatch, name, settings, options, sampler, extra):
    other = made(name, 20, **settings)
    scheduler = Scheduler.of(other, trained_betas=BETAS)
    assert scheduler.sampler.name == sampler
    scheduler.set_timesteps(20)
    got = drawn(scheduler, v_network, z(0, 0))
    expected = theirs(monkeypatch, other, v_network, linear_start(other), **options)
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("sampler", ["ddpm", "euler_a", "dpmpp_2m_sde", "unipc", "heun", "rk4", "dpmpp_sde"])
def test_a_run_of_a_generator_is_sample_with_its_seeds(sampler):
    """Bit for bit, noise and all; clamped or not."""
    seeds = torch.randint(2**63 - 1, (3,), generator=torch.Generator().manual_seed(5))
    for clip in (False, True):
        scheduler = Scheduler(sampler, trained_betas=BETAS, clip_sample=clip, prediction_type="v_prediction")
        scheduler.set_timesteps(6)
        x_T = z(0, 0).float()
        network = lambda x, t, labels=None: v_network(x, t).float()  # noqa: E731
        got = drawn(scheduler, network, x_T, generator=torch.Generator().manual_seed(5))
        options = dict(x_T=x_T, sampler=sampler, steps=6, clip=clip, batch_size=3, progress=False)
        described = dict(schedule=LINEAR, prediction="v", shape=SHAPE)
        assert torch.equal(got.float(), sample(network, seeds=seeds, **described, **options))


def test_edm_and_flow_schedulers_have_their_process(monkeypatch):
    scheduler = Scheduler.of(diffusers.EDMEulerScheduler())
    assert isinstance(scheduler.process, EDM) and scheduler.init_noise_sigma == pytest.approx(80)
    scheduler.set_timesteps(18)
    x_T = z(0, 0) * scheduler.init_noise_sigma
    network = lambda x, t, labels=None: edm_network(x, t)  # noqa: E731
    expected = sample(
        network, x_T=x_T, schedule=EDM(), prediction="edm", shape=SHAPE, sampler="euler", steps=18, clip=False
    )
    assert (drawn(scheduler, edm_network, x_T) - expected).abs().max() < 1e-5
    other = diffusers.FlowMatchEulerDiscreteScheduler()
    flow = Scheduler.of(other)
    for one in (flow, other):
        one.set_timesteps(12)
    expected = theirs(monkeypatch, other, flow_network, z(0, 0), noise=None)
    assert (drawn(flow, flow_network, z(0, 0)) - expected).abs().max() < 1e-5
    shifted = Scheduler.of(other, shift=3.0)
    shifted.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    assert shifted.timesteps.tolist() == pytest.approx([1000, 750, 500])


def test_a_run_may_begin_inside():
    """As pipelines from image to image do: a multistep sampler begins there with its first order."""
    scheduler = Scheduler("dpmpp_2m", trained_betas=BETAS, prediction_type="v_prediction")
    scheduler.set_timesteps(10)
    x = z(0, 0)
    for t in scheduler.timesteps[4:]:
        x = scheduler.step(v_network(x, t), t, x).prev_sample
    options = dict(schedule=LINEAR, prediction="v", shape=SHAPE, sampler="dpmpp_2m", clip=False, progress=False)
    expected = sample(
        lambda x, t, labels: v_network(x, t), x_T=z(0, 0), steps=scheduler.timesteps[4:].tolist(), **options
    )
    assert torch.allclose(x.float(), expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="^timestep: expected 999.0, whose turn it is, got 5.0"):
        scheduler.set_timesteps(10)
        scheduler.step(x, 5, x)


def test_noise_is_added_as_the_scheduler_does():
    other = made("DDPMScheduler", 20)
    scheduler = Scheduler.of(other, trained_betas=BETAS)
    t = torch.tensor([0, 500, 999])
    for method in ("add_noise", "get_velocity"):
        got, expected = (getattr(one, method)(z(1), z(2), t) for one in (scheduler, other))
        assert torch.allclose(got, expected, rtol=0, atol=1e-12)


def test_a_pipeline_takes_it_and_saves_it(tmp_path):
    net = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    config = diffusers.DDPMScheduler().config
    pipeline = diffusers.DDPMPipeline(
        net, diffkern.Scheduler.from_config(config, sampler="unipc", options={"order": 3})
    )
    pipeline.set_progress_bar_config(disable=True)
    options = dict(batch_size=2, num_inference_steps=4, output_type="np")
    images = pipeline(generator=torch.Generator().manual_seed(3), **options).images
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["scheduler"] == ["diffkern.schedulers", "Scheduler"]
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.scheduler.sampler.name == "unipc" and again.scheduler.options["order"] == 3
    assert (again(generator=torch.Generator().manual_seed(3), **options).images == images).all()


def test_what_is_not_followed_is_refused():
    with pytest.raises(ValueError, match="^scheduler: expected settings that are followed, got {'thresholding': True}"):
        Scheduler.of(diffusers.DDPMScheduler(thresholding=True))
    with pytest.raises(ValueError, match="^scheduler: expected one of DDPMScheduler, .*, got a CMStochastic"):
        Scheduler.of(diffusers.CMStochasticIterativeScheduler())
    for scheduler in (
        diffusers.EDMEulerScheduler(sigma_schedule="exponential"),
        diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.1),
        diffusers.EDMEulerScheduler(prediction_type="v_prediction"),
    ):
        with pytest.raises(ValueError, match="^(scheduler: expected settings|prediction_type: expected 'epsilon')"):
            Scheduler.of(scheduler)
    with pytest.raises(ValueError, match="^sampler: expected one of"):
        Scheduler("best")
    with pytest.raises(TypeError, match="^order: expected an option of sampler 'ddim'"):
        Scheduler("ddim", {"order": 2})
    with pytest.raises(ValueError, match="^generator: expected one, or 3 in a list, got 2"):
        scheduler = Scheduler("ddpm")
        scheduler.step(z(0), scheduler.timesteps[0], z(0), generator=[torch.Generator(), torch.Generator()])


def test_a_schedule_is_rescaled_as_by_diffusers():
    other = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=True
    )
    schedule = Schedule.scaled_linear().rescaled()
    assert (schedule.alpha_bar[:-1] - other.alphas_cumprod[:-1].double()).abs().max() < 1e-5
    assert Scheduler.of(other).process == schedule
