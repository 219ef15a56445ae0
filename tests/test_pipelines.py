"""Pipelines of diffusers': they are models, or say by name why they are none."""

import dataclasses
import logging
import warnings

import diffusers
import pytest
import tiny
import torch
from networks import diffusers_twin, with_random_weights
from tiny import one_thread  # noqa: F401
from torch import Tensor, nn

from diffkern.constraints import Quantile
from diffkern.engine import optimize
from diffkern.io.pipelines import ARGUMENTS, DONE, settings
from diffkern.model import Model, load, save
from diffkern.sampling import sample
from diffkern.unet import UNet

SAME = dict(timestep_spacing="trailing")  # settings that sample() has by default
X_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([3, 17])


def network(**options) -> nn.Module:
    """A ``UNet2DModel`` with random weights everywhere."""
    twin = with_random_weights(diffusers_twin(UNet(**tiny.NETWORK | options)))
    twin.register_to_config(sample_size=8)
    return twin.eval().requires_grad_(False)


def pipeline(unet: nn.Module | None = None, scheduler: type = diffusers.DDPMScheduler, **settings):
    scheduler = scheduler(num_train_timesteps=20, **SAME | settings)
    made = diffusers.DDPMPipeline(network(), scheduler)
    made.unet = made.unet if unet is None else unet
    return made


def trajectory(unet: nn.Module, scheduler, **labels) -> Tensor:
    """By diffusers: DDIM without noise from X_T."""
    scheduler = diffusers.DDIMScheduler.from_config(scheduler.config)
    scheduler.set_timesteps(20)
    x = X_T
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, **labels).sample, t, x).prev_sample
    return x


OPTIONS = dict(sampler="ddim", steps=20, x_T=X_T, clip=False, progress=False)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_pipeline_of_diffusers_is_a_model(tmp_path, prediction_type):
    """Which without noise, of one variance, goes from the same x_T to the same image."""
    theirs = pipeline(prediction_type=prediction_type, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = Model.from_diffusers(theirs, "theirs", ignore=["clip_sample"])
    assert (model.shape, model.classes, model.name, model.schedule.T) == ((1, 8, 8), None, "theirs", 20)
    assert model.network.conv_in.weight is theirs.unet.conv_in.weight
    images, expected = sample(model, **OPTIONS), trajectory(theirs.unet, theirs.scheduler)
    assert (images - expected).abs().max() <= 1e-4 * expected.abs().max()
    save(model, tmp_path / "theirs.safetensors")
    assert torch.equal(sample(tmp_path / "theirs.safetensors", **OPTIONS), images)


# --- classes ---


def test_every_class_of_a_network_of_diffusers_is_a_class(tmp_path):
    unet = network(num_classes=3)  # whose twin has four
    theirs = pipeline(unet)
    model = Model.from_diffusers(theirs)
    save(model, tmp_path / "theirs.safetensors")
    for source in (model, load(tmp_path / "theirs.safetensors")):
        for label in (0, 3):
            expected = unet(X_T, T, torch.tensor([label] * 2)).sample
            assert (source(X_T, T, torch.tensor([label] * 2)) - expected).abs().max() <= 1e-4 * expected.abs().max()
        for labels, message in (
            (None, "labels: expected a class for each image with a network without a null class, got None"),
            (-1, r"labels: expected ints in 0\.\.3, got -1"),
            (4, r"labels: expected ints in 0\.\.3, got 4"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                sample(source, 2, labels=labels, steps=2, progress=False)
        with pytest.raises(ValueError, match="^guidance: expected 1 with a network without a null class, got 2"):
            sample(source, 2, labels=1, guidance=2.0, steps=2, progress=False)
        with pytest.raises(ValueError, match="^labels: expected a class for each image, this network has no null"):
            source(X_T, T)
    images, expected = sample(model, labels=3, **OPTIONS), trajectory(unet, theirs.scheduler, class_labels=T * 0 + 3)
    assert images.isfinite().all() and expected.isfinite().all()


@pytest.mark.parametrize("classes", [1, 4])
def test_an_optimized_network_of_diffusers_has_its_classes(classes):
    unet = network(num_classes=3)
    unet.class_embedding = nn.Embedding(classes, unet.class_embedding.embedding_dim)
    unet.register_to_config(num_class_embeds=classes)
    engine, labels = optimize(unet.requires_grad_(False)), torch.tensor([0, classes - 1])
    expected = unet(X_T, T, labels).sample
    assert (engine(X_T, T, labels).sample - expected).abs().max() <= 1e-4 * expected.abs().max()
    for wrong, error in ((None, ValueError), (torch.tensor([-1, 0]), IndexError), (torch.tensor([0, 4]), IndexError)):
        with pytest.raises(error):  # the network's own
            engine(X_T, T, wrong)


# --- options that the parameters do not tell ---


@pytest.mark.parametrize("groups", [None, 2, 8])
def test_the_middle_attention_has_the_groups_that_attn_norm_num_groups_says(groups):
    config = {name: value for name, value in network().config.items() if not name.startswith("_")}
    unet = with_random_weights(diffusers.UNet2DModel(**config | dict(attn_norm_num_groups=groups)))
    unet.eval().requires_grad_(False)
    expected = unet(X_T, T).sample
    for got in (optimize(unet)(X_T, T).sample, Model.from_diffusers(pipeline(unet))(X_T, T)):
        assert (got - expected).abs().max() <= 3e-5 * expected.abs().max()


class UNet2DModel(diffusers.UNet2DModel):
    """A class of the same name, with another forward."""

    def forward(self, sample, *args, **kwargs):
        return super().forward(0.5 * sample, *args, **kwargs)


def patched(unet: nn.Module) -> None:
    forward = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def subclassed(unet: nn.Module) -> None:
    unet.__class__ = UNet2DModel


def circular(unet: nn.Module) -> None:
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


def other_eps(unet: nn.Module) -> None:
    unet.conv_norm_out.eps = 1.0


CHANGES = {
    "hook": lambda unet: unet.mid_block.register_forward_hook(lambda module, inputs, output: 2 * output),
    "patched": patched,
    "subclass": subclassed,
    "circular": circular,
    "eps": other_eps,
}
REFUSED = r"^network: expected what diffkern's UNet computes, got a UNet2DModel whose output differs by [1-9]\.\de"


@pytest.mark.parametrize("change", CHANGES)
def test_a_network_that_computes_something_else_is_refused(change):
    unet = network()
    CHANGES[change](unet)
    with pytest.raises(ValueError, match=REFUSED):
        Model.from_diffusers(pipeline(unet))
    expected = unet(X_T, T).sample
    assert (optimize(unet)(X_T, T).sample - expected).abs().max() <= 3e-5 * expected.abs().max()


def test_a_network_is_compared_in_eval_mode_and_keeps_its_training_flags():
    unet = network()
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    unet.train()
    optimize(unet)
    Model.from_diffusers(pipeline(unet))
    assert all(module.training for module in unet.modules())


def test_a_network_that_is_changed_before_its_hook_is_taken_off_runs_as_it_is_then():
    unet = network()
    handle = CHANGES["hook"](unet)
    engine = optimize(unet)
    circular(unet)
    handle.remove()
    expected = unet(X_T, T).sample
    assert (engine(X_T, T).sample - expected).abs().max() <= 3e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pipeline_in_half_precision_is_a_model_in_float32(dtype):
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    unet = network()
    unet = unet.to(dtype)
    model = Model.from_diffusers(pipeline(unet))
    assert {parameter.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in unet.parameters()} == {dtype}
    expected = unet.float()(X_T, T).sample
    assert (model(X_T, T) - expected).abs().max() <= 1e-4 * expected.abs().max()


# --- settings of the scheduler ---

DDIM, DPM = diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler
TOLD = [
    (dict(timestep_spacing="leading", steps_offset=1), r"given steps=scheduler\.timesteps\.tolist\(\)$"),
    (dict(scheduler=DPM, clip_sample=False, solver_order=3), "has nothing for solver_order=3$"),
]
UNKEPT = [
    (dict(thresholding=True, sample_max_value=2.0), r"sample_max_value=2\.0; "),
    (dict(variance_type="learned"), "variance_type='learned'; "),
    (dict(scheduler=DDIM, set_alpha_to_one=False), "set_alpha_to_one=False; "),
    (dict(scheduler=DPM, use_karras_sigmas=True), "use_karras_sigmas=True; "),
    (dict(steps_offset=3), "steps_offset=3; "),
]


def settings_of(options: dict):
    options = SAME | options
    scheduler = options.pop("scheduler", diffusers.DDPMScheduler)
    if scheduler is DPM:
        options.pop("clip_sample", None)
    return scheduler(num_train_timesteps=20, **options)


FOLLOWED = [
    (dict(), {}),
    (dict(timestep_spacing="leading"), dict(spacing="leading")),
    (dict(variance_type="fixed_large", timestep_spacing="linspace"), dict(variance="fixed_large", spacing="linspace")),
    (dict(clip_sample=False), dict(clip=False)),
    (dict(scheduler=DPM), dict(clip=False)),  # which never clips
    (dict(clip_sample_range=2.0), dict(clip=2.0)),
    (dict(thresholding=True, dynamic_thresholding_ratio=0.9), dict(clip=Quantile(0.9))),
]


@pytest.mark.parametrize(("options", "kept"), FOLLOWED, ids=str)
def test_a_model_keeps_the_settings_of_its_scheduler_in_its_file_too(tmp_path, options, kept):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings(settings_of(options)) == kept
    model = dataclasses.replace(Model.from_diffusers(pipeline()), **kept)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert {name: getattr(again, name) for name in ("clip", "variance", "spacing")} == {
        **dict(clip=None, variance=None, spacing=None),
        **kept,
    }
    given = dict(steps=3, sampler="ddpm", progress=False)
    assert torch.equal(sample(again, 1, **given), sample(Model.from_diffusers(pipeline()), 1, **given, **kept))


@pytest.mark.parametrize(("options", "message"), TOLD, ids=str)
def test_a_setting_that_sample_must_be_told_is_named_with_its_argument(options, message):
    with pytest.warns(UserWarning, match=f"^scheduler: sample.*{message}") as seen:
        settings(settings_of(options), ignore=[name for name in options if name == "clip_sample"])
    assert len(seen) == 1


@pytest.mark.parametrize(("options", "message"), UNKEPT, ids=str)
def test_a_setting_without_which_the_images_are_others_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=f"^scheduler: expected settings that sample\\(\\) follows, got {message}"):
        settings(settings_of(options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        settings(settings_of(options), ignore=["clip_sample", *options])


def test_the_warning_points_to_the_callers_line():
    with pytest.warns(UserWarning) as seen:
        Model.from_diffusers(pipeline(timestep_spacing="leading", steps_offset=1))
    assert [warning.filename for warning in seen] == [__file__]


def test_arguments_are_given_for_settings_that_are_looked_at():
    assert {name for name, _ in ARGUMENTS} <= DONE.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(prediction_type="flow"), "prediction_type: expected one of epsilon, sample, v_prediction, got 'flow'"),
        (dict(sample_size=None), "sample_size: expected the images' size in the UNet2DModel's config, got None"),
        (dict(alphas_cumprod=torch.ones(20)), "alphas_cumprod: expected those of the betas, got others in DDPMSched"),
        (dict(alphas_cumprod=None), "alphas_cumprod: expected those of the betas, got a DDPMScheduler without any"),
    ],
)
def test_a_pipeline_that_is_no_model_says_why(change, message):
    theirs = pipeline(**{name: value for name, value in change.items() if name == "prediction_type"})
    for name in change.keys() & {"sample_size"}:
        theirs.unet.register_to_config(**{name: change[name]})
    for name in change.keys() & {"alphas_cumprod"}:
        setattr(theirs.scheduler, name, change[name])
    with pytest.raises(ValueError, match=f"^{message}"):
        Model.from_diffusers(theirs)


@pytest.mark.parametrize("scheduler", [diffusers.RePaintScheduler, diffusers.IPNDMScheduler])
def test_a_scheduler_without_a_prediction_type_is_refused(scheduler):
    theirs = pipeline()
    theirs.scheduler = scheduler()
    with pytest.raises(ValueError, match=f"^prediction_type: expected .*, got a {scheduler.__name__}, which has none"):
        Model.from_diffusers(theirs)


def test_other_parts_than_a_pixel_pipeline_s_are_refused():
    expected = "^pipeline: expected a UNet2DModel as unet and a scheduler with betas"
    with pytest.raises(TypeError, match=f"{expected}, got NoneType and NoneType"):
        Model.from_diffusers(tiny.model().network)
    with pytest.raises(TypeError, match="^ignore: expected a collection of names, got 'clip_sample'"):
        Model.from_diffusers(pipeline(), ignore="clip_sample")
    codec = diffusers.VQModel(block_out_channels=(8,), norm_num_groups=8, num_vq_embeddings=8)
    latent = diffusers.LDMPipeline(vqvae=codec, unet=network(), scheduler=DDIM())
    with pytest.raises(TypeError, match=f"{expected} and nothing else, got VQModel as vqvae too"):
        Model.from_diffusers(latent)
