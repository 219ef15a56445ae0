"""Checkpoints of other libraries: what their own code makes of an input, and what is said of others."""

import dataclasses
import json
import math
import os
import pickle
import shutil
import sys
import types

import foreign
import pytest
import torch
from foreign import error_of, fixture, normals, random_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import one_thread  # noqa: F401
from torch import Tensor

from diffkern.classifier import load_noisy_classifier
from diffkern.cli import main
from diffkern.codec import Codec
from diffkern.guidance import Guidance
from diffkern.io.foreign import openai
from diffkern.model import Model, load, save
from diffkern.networks import UNet
from diffkern.prediction import head_at
from diffkern.process import VE, VP
from diffkern.sampling import sample
from diffkern.schedule import Schedule

PARITY = 1e-5


def output(model: Model, said: dict) -> Tensor:
    """The output of the model's network, for the input that the library's own network got."""
    given = {k: normals(101, tuple(v)) if len(v) == 4 else torch.tensor(v) for k, v in said["given"].items()}
    labels = given.pop("y", None)
    with torch.no_grad():
        return model.network(normals(100, (2, 3, 8, 8)), told(model, said), labels, **given)


def told(model: Model, said: dict) -> Tensor:
    """Its t: the process has it for a sigma."""
    t = torch.tensor(said["t"])
    return t if not isinstance(model.schedule, VE) else (model.schedule.c_noise_scale * 2 * t).log()


def denoised(model: Model, said: dict) -> Tensor:
    """x0_hat by the model's process and prediction, of x = x_0 + sigma eps."""
    labels, out = torch.tensor(said["given"].get("labels", [-1, -1])), []
    for x, sigma, label in zip(normals(100, (2, 3, 8, 8)), said["t"], labels, strict=True):
        process = model.schedule
        if process.discrete:
            rho = (process.one_minus_alpha_bar / process.alpha_bar).sqrt()
            point = process.point(int((rho - sigma).abs().argmin()))
        else:
            point = process.at_rho(sigma)
        c_noise = torch.tensor([point.c_noise], dtype=torch.int64 if process.discrete else torch.float32)
        # a time step has the sigma that is nearest: the head is of the sigma asked for
        alpha = 1 / math.hypot(1, sigma) if process.discrete else point.alpha
        point = dataclasses.replace(point, alpha=alpha, sigma=alpha * sigma)
        x_t = point.alpha * x[None]
        given = [label[None]] if model.num_classes else []
        with torch.no_grad():
            net = model.network(process.c_in(point) * x_t, c_noise, *given)[:, :3]
        p_x, p_o = head_at(model.prediction, point, process)
        out.append(p_x * x_t + p_o * net)
    return torch.cat(out)


OPENAI = dict(image_size=8, noise_schedule="linear")
CASES = {
    "openai": OPENAI | dict(num_heads=4),
    "openai_adm": OPENAI | dict(num_head_channels=16, use_new_attention_order=True),
    "openai_upsampler": OPENAI | dict(num_heads=2, small_size=4),
    "pytorch_ddpm": dict(img_size=8),
    "edm_adm": dict(precond="edm"),
    "edm_iddpm": {},
    "edm_ddpmpp": dict(precond="vp"),
    "edm_ncsnpp": dict(precond="ve"),
    "edm2": dict(head_dim=16),
    "score_sde_ddpmpp": dict(sde="vp", image_size=8),
    "score_sde_ncsnpp": dict(image_size=8),
    "score_sde_skip": dict(image_size=8),
    "lucidrains": dict(image_size=8, objective="pred_v", betas=[0.1, 0.2]),
    "lucidrains_fourier": dict(image_size=8, objective="pred_v", betas=[0.1, 0.2]),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "edm_iddpm" else n for n in CASES])
def test_the_output_is_that_of_the_library_s_own_code(name, tmp_path, capsys):
    said = fixture(name)
    torch.save({"ema_model": weights_of(name)}, tmp_path / f"{name}.pt")
    model = load(tmp_path / f"{name}.pt", **CASES[name])
    output_of = denoised if name.startswith("edm") else output
    assert error_of(output_of(model, said), said["out"]) < PARITY
    line, rest = capsys.readouterr().err.split("\n")
    assert line.startswith(f"{tmp_path / name}.pt: ") and "parameters, predicts" in line and rest == ""
    if name != "openai_upsampler":
        save(model, tmp_path / "ours.safetensors")
        ours = load(tmp_path / "ours.safetensors")
        assert (ours.schedule, ours.prediction, ours.shape) == (model.schedule, model.prediction, model.shape)
        assert torch.equal(output_of(ours, said), output_of(model, said))


def weights_of(name: str) -> dict[str, Tensor]:
    said = fixture(name)
    made = random_weights(said["shapes"])
    for key, tensor in made.items():
        if key.endswith("resample_filter"):
            taps = torch.tensor([1.0, 1.0] if tensor.shape[2] == 2 else [1.0, 3.0, 3.0, 1.0])
            tensor.copy_(taps.outer(taps) / taps.sum() ** 2)
        elif key == "sigmas":
            tensor.copy_(torch.tensor(said.get("sigmas", 1.0)))
        elif key == "u":  # of iDDPM, by its definition
            steps = torch.arange(1001, dtype=torch.float64)
            alpha_bar = (math.pi / 2 * steps / 1000 / 1.008).sin().square()
            u = 0.0
            for j in range(1000, 0, -1):
                ratio = max(float(alpha_bar[j - 1] / alpha_bar[j]), 0.001)
                u = ((u**2 + 1) / ratio - 1) ** 0.5
                tensor[j - 1] = u
            tensor[1000] = 0.0
    return made


def test_a_file_of_ddpm_has_its_process_and_its_size(tmp_path):
    weights = weights_of("pytorch_ddpm")
    other = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"net_model": other, "ema_model": weights, "x_T": torch.zeros(64, 3, 8, 8)}, tmp_path / "ckpt.pt")
    model = load(tmp_path / "ckpt.pt")
    assert torch.equal(model.network.conv_in.weight, weights["head.weight"])
    assert (model.schedule, model.shape) == (Schedule.linear(20), (3, 8, 8))
    assert (model.variance, model.clip, model.prediction) == ("fixed_large", False, "eps")
    assert sample(model, 1, steps=2, progress=False).isfinite().all()


def test_files_of_openai_are_known_by_name(tmp_path):
    torch.save(weights_of("openai_adm"), tmp_path / "64x64_diffusion.pt")
    model = load(tmp_path / "64x64_diffusion.pt", num_head_channels=16)
    assert (model.shape, model.schedule, model.learned_variance) == ((3, 64, 64), Schedule.cosine(1000), True)
    assert (model.num_classes, model.null_class, model.label("4")) == (5, False, 4)
    with pytest.raises(ValueError, match="labels: expected none or one of 0 0, 1 1, 2 2, 3 3, 4 4, got '5'"):
        model.label("5")
    assert load(tmp_path / "64x64_diffusion.pt", num_heads=2).network.config["heads"] == 2
    torch.save(weights_of("openai"), tmp_path / "x.pt")
    told = OPENAI | dict(num_heads=4, diffusion_steps=4000)
    with pytest.raises(ValueError, match=r"x\.pt: rescale_timesteps: expected it as an option, .* got none"):
        load(tmp_path / "x.pt", **told)
    slow, fast = (load(tmp_path / "x.pt", **told, rescale_timesteps=r).network for r in (True, False))
    x = normals(1, (1, 3, 8, 8))
    assert torch.equal(slow(x, torch.tensor([400])), fast(x, torch.tensor([100])))


def test_the_averaged_weights_of_score_sde_are_a_list(tmp_path):
    tensors = weights_of("score_sde_ncsnpp")
    trained = {name: t for name, t in tensors.items() if name not in ("sigmas", "all_modules.0.W")}
    old = {f"module.{name}": t + 1 if name in trained else t for name, t in tensors.items()}
    content = {"model": old, "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": [*trained.values()]}}
    torch.save(content, tmp_path / "checkpoint_8.pth")
    model = load(tmp_path / "checkpoint_8.pth", image_size=8)
    said = fixture("score_sde_ncsnpp")
    assert error_of(output(model, said), said["out"]) < PARITY
    process = model.schedule  # of data in [-1, 1], twice as far apart as in [0, 1]
    assert (process.sigma_min, process.sigma_max) == pytest.approx((0.02, 100.0), rel=1e-6)


@pytest.mark.parametrize("objective", ["pred_v", "pred_noise", "pred_x0"])
def test_the_file_of_a_gaussian_diffusion_shows_its_objective_and_its_betas(objective, tmp_path):
    """By the names of its buffers, float32, and the weights of its loss."""
    schedule = Schedule.cosine(1000)
    snr = schedule.alpha_bar / schedule.one_minus_alpha_bar
    weight = {"pred_noise": 1 + 0 * snr, "pred_x0": snr, "pred_v": snr / (snr + 1)}[objective]
    content = {f"ema_model.model.{name}": tensor for name, tensor in weights_of("lucidrains").items()}
    content |= {f"online_model.model.{name}": tensor + 1 for name, tensor in weights_of("lucidrains").items()}
    content |= {"ema_model.betas": schedule.betas.float(), "ema_model.loss_weight": weight.float()}
    torch.save({"step": 1, "ema": content}, tmp_path / "model-1.pt")
    model = load(tmp_path / "model-1.pt", image_size=8)
    assert model.prediction == {"pred_v": "v", "pred_noise": "eps", "pred_x0": "x0"}[objective]
    assert model.schedule == schedule
    said = fixture("lucidrains")
    assert error_of(output(model, said), said["out"]) < PARITY


def test_a_classifier_of_openai_classifies_as_its_own_code(tmp_path, monkeypatch):
    said = fixture("openai_classifier")
    torch.save(weights_of("openai_classifier"), tmp_path / "tiny_classifier.pt")
    with pytest.raises(ValueError, match="expected a file with a name that openai gave it, got tiny_classifier.pt"):
        load_noisy_classifier(tmp_path / "tiny_classifier.pt")
    published = openai.PUBLISHED["64x64_classifier"] | dict(image_size=8)
    monkeypatch.setitem(openai.PUBLISHED, "tiny_classifier", published)
    classifier = load_noisy_classifier(tmp_path / "tiny_classifier.pt")
    with torch.no_grad():
        logits = classifier(normals(100, (2, 3, 8, 8)), torch.tensor(said["t"]))
    assert logits.shape == (2, 7) and error_of(logits, said["out"]) < PARITY
    assert (classifier.schedule, classifier.shape) == (Schedule.cosine(1000), (3, 8, 8))
    guidance = Guidance(2.0, classifier=tmp_path / "tiny_classifier.pt")
    network = UNet(3, channels=8, channel_mult=(1, 2), blocks=1, groups=4, num_classes=7)
    model = small(network=network, schedule=Schedule.cosine(1000))
    drawn = sample(model, 1, labels=3, guidance=guidance, steps=2, progress=False)
    assert not torch.equal(drawn, sample(model, 1, steps=2, progress=False))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["pred_v", "pred_noise", "pred_x0"])
def test_the_package_of_lucidrains_itself_agrees(objective, tmp_path):
    package = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    network = package.Unet(dim=16, dim_mults=(1, 2, 3), attn_heads=2, attn_dim_head=8)
    network.load_state_dict(random_weights({k: list(t.shape) for k, t in network.state_dict().items()}))
    diffusion = package.GaussianDiffusion(network.eval(), image_size=8, timesteps=100, objective=objective)
    torch.save(diffusion.state_dict(), tmp_path / "x.pt")
    model, x, t = load(tmp_path / "x.pt", image_size=8), normals(1, (2, 3, 8, 8)), torch.tensor([3, 70])
    assert torch.allclose(model.schedule.betas.float(), diffusion.betas)
    with torch.no_grad():
        expected = network(x, t)
        assert (model.network(x, t) - expected).abs().max() <= PARITY * expected.abs().max()
        p_x, p_o = (
            torch.tensor([head_at(model.prediction, model.schedule.point(int(s)), model.schedule)[i] for s in t])
            for i in range(2)
        )
        x0_hat = (p_x.view(-1, 1, 1, 1) * x + p_o.view(-1, 1, 1, 1) * expected).float()
        theirs = diffusion.model_predictions(x, t).pred_x_start
    assert (x0_hat - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(("options", "clip"), [({}, None), (dict(latents=True), False)])
def test_latents_of_edm2_are_not_clipped(options, clip, tmp_path):
    torch.save(weights_of("edm2"), tmp_path / "x.pt")
    assert load(tmp_path / "x.pt", head_dim=16, **options).clip is clip


def test_an_upsampler_gets_the_small_image(tmp_path):
    torch.save(weights_of("openai_upsampler"), tmp_path / "x.pt")
    model = load(tmp_path / "x.pt", **CASES["openai_upsampler"])
    small = torch.zeros(2, 3, 4, 4)
    images = sample(model, 2, low_res=small, steps=2, progress=False)
    assert images.shape == (2, 3, 8, 8)
    assert not torch.equal(images, sample(model, 2, low_res=small + 0.5, steps=2, progress=False))
    by_class = UNet(6, 3, channels=8, channel_mult=(1, 2), blocks=1, groups=4, num_classes=2, null_class=False)
    model.network = openai.SuperResolution(by_class)
    with pytest.raises(ValueError, match="labels: expected a class for each image with a network without a null class"):
        sample(model, 2, low_res=small, steps=2, progress=False)


ERRORS = {
    "no heads": ("openai", OPENAI, "num_heads: expected it or num_head_channels as an option, .* got neither"),
    "no size": (
        "openai",
        dict(num_heads=4),
        "image_size: expected it as an option, which no tensor shows .*, got none",
    ),
    "no x_T": ("pytorch_ddpm", {}, "img_size: expected the images' size as an option"),
    "another option": ("pytorch_ddpm", dict(heads=4), "load: expected options of w86763777/pytorch-ddpm .*, got heads"),
    "another kind": (
        "openai",
        OPENAI | dict(num_heads=4, use_new_attention_order="flase"),
        "use_new_attention_order: expected bool, got 'flase'",
    ),
    "no whole number": ("openai", OPENAI | dict(num_heads=True), "num_heads: expected int, got True"),
    "another value": ("pytorch_ddpm", dict(img_size=8, mean_type="v"), "mean_type: expected one of epsilon.*, got 'v'"),
}


@pytest.mark.parametrize(("name", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_options_that_are_missing_or_unknown_raise(name, options, message, tmp_path):
    torch.save(weights_of(name), tmp_path / "x.pt")
    with pytest.raises((TypeError, ValueError), match=message):
        load(tmp_path / "x.pt", **options)


FILES = {
    "unknown": ({"a.weight": torch.zeros(1)}, "expected a file written by diffkern, or by .*, got 1 tensors: a.weight"),
    "latent": (
        {"model.diffusion_model.time_embed.0.weight": torch.zeros(4, 4)},
        "expected a file written by diffkern, or by .*, got what looks like a latent diffusion model",
    ),
    "code": ({"x": foreign.record}, "expected a pickle of tensors alone, got .*: diffkern convert reads more kinds"),
    "unet alone": ({"time_embedding.linear_1.weight": torch.zeros(4, 4)}, "expected config.json beside a UNet2DModel"),
    "part": ({"time_embed.0.weight": torch.zeros(4, 4)}, "got a classifier of noisy images"),
}


@pytest.mark.parametrize(("content", "message"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_model_says_what_it_looks_like(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "x.pt")


def test_a_tensor_more_or_less_than_the_network_has_raises(tmp_path):
    weights = weights_of("openai")
    for changed in (
        weights | {"extra.weight": torch.zeros(1)},
        {k: w for k, w in weights.items() if k != "out.2.bias"},
    ):
        torch.save(changed, tmp_path / "x.pt")
        with pytest.raises(ValueError, match="x.pt: .*expected the tensors of a U"):
            load(tmp_path / "x.pt", **CASES["openai"])


# --- diffusers' folders ---

SMALL = dict(
    sample_size=8,
    in_channels=3,
    block_out_channels=(32, 48),
    layers_per_block=1,
    norm_num_groups=8,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
CONFIGS = {
    "ours": ({}, UNet),
    "groups": (dict(attn_norm_num_groups=4, resnet_time_scale_shift="scale_shift"), UNet),
    "fourier": (dict(time_embedding_type="fourier", class_embed_type="timestep"), None),
    "learned": (dict(time_embedding_type="learned", num_train_timesteps=1000), None),
    "identity": (dict(class_embed_type="identity", act_fn="gelu"), None),
    "classes": (dict(num_class_embeds=3, center_input_sample=True, dropout=0.1), None),
}


def unet2d(**options):
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(**SMALL | options)
    shapes = {key: list(tensor.shape) for key, tensor in unet.state_dict().items()}
    unet.load_state_dict(random_weights(shapes))
    return diffusers, unet.eval()


@pytest.mark.parametrize(("options", "kind"), CONFIGS.values(), ids=CONFIGS)
def test_a_folder_of_diffusers_is_what_it_computes(options, kind, tmp_path):
    diffusers, unet = unet2d(**options)
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    x, t = normals(1, (2, 3, 8, 8)), torch.tensor([3, 900])
    labels = torch.tensor([1, 2]) if "num_class_embeds" in options or "timestep" in options.values() else None
    embedding = normals(2, (2, 128)) if "identity" in options.values() else None
    expected = unet(x, t, embedding if labels is None else labels).sample
    for path in (tmp_path, tmp_path / "unet", tmp_path / "unet" / "diffusion_pytorch_model.safetensors"):
        model = load(path)
        given = {} if embedding is None else {"class_embedding": embedding}
        out = model.network(x, t, labels, **given)
        assert (out - expected).abs().max() <= PARITY * expected.abs().max()
        assert kind is None or isinstance(model.network, kind)
        assert (model.prediction, model.schedule, model.shape) == ("v", Schedule(scheduler.betas), (3, 8, 8))
    assert (model.num_classes, model.null_class) == (options.get("num_class_embeds"), labels is None)
    if labels is not None:
        for given, message in (
            ({}, "labels: expected a class for each image with a network without a null class, got None"),
            (dict(labels=-1), "labels: expected ints"),
            (dict(labels=2, guidance=2.0), "guidance: expected 1 with a network without a null class, got 2"),
        ):
            with pytest.raises(ValueError, match=message):
                sample(model, 2, steps=2, progress=False, **given)


def test_a_variance_is_learned_by_any_network_of_diffusers(tmp_path):
    diffusers, unet = unet2d(out_channels=6, act_fn="gelu")
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert not isinstance(model.network, UNet) and model.default_variance == "learned" and model.learned_variance
    options = dict(sampler="ddpm", steps=2, progress=False)
    learned, fixed = (sample(model, 1, variance=v, **options) for v in (None, "fixed_small"))
    assert learned.isfinite().all() and not torch.equal(learned, fixed)


def test_old_names_half_precision_and_parts_are_read(tmp_path):
    diffusers, unet = unet2d()
    unet.half().save_pretrained(tmp_path, variant="fp16")
    scheduler = diffusers.DDPMScheduler()
    half = load(tmp_path / "diffusion_pytorch_model.fp16.safetensors", scheduler=scheduler).network.state_dict()
    with pytest.raises(ValueError, match="expected one of diffusion_pytorch_model.safetensors, .* got none"):
        load(tmp_path, scheduler=scheduler)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = unet.state_dict()
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
    torch.save(tensors, tmp_path / "diffusion_pytorch_model.bin")
    by_old_names = load(tmp_path, scheduler=scheduler).network.state_dict()
    (tmp_path / "diffusion_pytorch_model.bin").unlink()
    unet.save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    in_parts = load(tmp_path, scheduler=scheduler).network.state_dict()
    for name, tensor in unet.state_dict().items():
        for read in (half, by_old_names, in_parts):
            assert torch.equal(read[name], tensor.float()) and read[name].dtype == torch.float32


def test_a_config_that_makes_no_network_is_refused(tmp_path):
    torch.save(weights_of("edm2"), tmp_path / "x.pt")
    save(load(tmp_path / "x.pt", head_dim=16), tmp_path / "ours.safetensors")
    with safe_open(tmp_path / "ours.safetensors", framework="pt") as file:
        description = json.loads(file.metadata()["diffkern"])
    tensors = load_file(tmp_path / "ours.safetensors")
    config = description["network"]
    for changes, message in (
        (dict(architecture="VQModel"), "architecture: expected one of UNet, NCSNpp"),
        (dict(network=config | dict(head_dim=0)), "ours.safetensors: .*zero"),
        (dict(network=config | dict(channel_mult=[])), "ours.safetensors: "),
        (dict(network=config | dict(channel_mult=[1] * 30)), "blocks: expected a network of the file's"),
        (dict(network=config | dict(channels=None)), "ours.safetensors: "),
        (dict(network=config | dict(taps=[1, 1])), "network: expected what this version knows, got also 'taps'"),
    ):
        metadata = {"diffkern": json.dumps(description | changes)}
        save_file(tensors, tmp_path / "ours.safetensors", metadata=metadata)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "ours.safetensors")


def test_defaults_of_a_unet2dmodel_are_diffusers_own():
    import inspect

    import diffusers

    from diffkern.networks.diffusers import DEFAULTS

    options = inspect.signature(diffusers.UNet2DModel.__init__).parameters
    assert {name: option.default for name, option in options.items() if name != "self"} == DEFAULTS


def test_what_a_folder_of_diffusers_may_not_have_is_named(tmp_path):
    diffusers, unet = unet2d()
    karras = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    diffusers.DDPMPipeline(unet, karras).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected settings that sample.. follows, got use_karras_sigmas=True"):
        load(tmp_path)
    assert load(tmp_path, ignore=["use_karras_sigmas"]).shape == (3, 8, 8)
    assert load(tmp_path, scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")).shape == (3, 8, 8)

    def config(name, **changes):
        path = tmp_path / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    config("unet/config.json", another_option=1)
    with pytest.raises(ValueError, match="expected the options of a UNet2DModel, got also another_option"):
        load(tmp_path)
    config("model_index.json", vqvae=["diffusers", "VQModel"])
    with pytest.raises(ValueError, match="expected a pipeline of a UNet2DModel and a scheduler, got VQModel as vqvae"):
        load(tmp_path)


def test_a_folder_written_for_diffusers_draws_the_same_images(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    options = dict(channels=32, channel_mult=(1, 1.5), blocks=1, groups=8, heads=2, attention_levels=(), num_classes=2)
    network = UNet(3, **options, scale_shift=True, resample_blocks=True)
    network.load_state_dict(random_weights({k: list(t.shape) for k, t in network.state_dict().items()}))
    model = Model(network.eval(), Schedule.cosine(20), "v", (3, 8, 8), ("a", "b"), clip=False, variance="fixed_large")
    model.to_diffusers(tmp_path)
    save(model, tmp_path / "ours.safetensors")
    exported = tmp_path / "exported"
    assert main(["export", str(tmp_path / "ours.safetensors"), "--to", "diffusers", "--out", str(exported)]) == 0
    for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/diffusion_pytorch_model.safetensors"):
        assert (exported / name).read_bytes() == (tmp_path / name).read_bytes()
    theirs = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    scheduler.set_timesteps(5)
    x = x_T = normals(3, (1, 3, 8, 8))
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(theirs.unet(x, t, class_labels=torch.tensor([1])).sample, t, x).prev_sample
    ours = sample(model, sampler="ddim", steps=5, x_T=x_T, labels="b", progress=False)
    assert (ours - x).abs().max() <= 1e-4 * x.abs().max()
    again = load(tmp_path)
    assert (again.prediction, again.clip, again.variance) == ("v", False, "fixed_large")
    assert torch.allclose(again.schedule.alpha_bar, model.schedule.alpha_bar, rtol=1e-5)  # of float32 betas
    assert (again.classes, again.null_class) == (("a", "b"), True)
    t, label = torch.tensor([7]), torch.tensor([1])
    assert torch.allclose(again.network(x_T, t, label), network(x_T, t, label), atol=1e-5)
    (tmp_path / "diffkern.json").write_text('{"classes": 2}')
    with pytest.raises(ValueError, match="classes: expected a list of names in diffkern.json, got 2"):
        load(tmp_path)
    (tmp_path / "diffkern.json").unlink()
    assert load(tmp_path).num_classes == 3  # the null class is one to diffusers
    model.to_diffusers(tmp_path)  # over itself, but over nothing else
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ValueError, match="expected an empty folder or one of diffusers, got another"):
        model.to_diffusers(tmp_path)


def small(**changes) -> Model:
    options = dict(network=UNet(3, channels=8, channel_mult=(1, 2), blocks=1, groups=4), schedule=Schedule.linear(20))
    return Model(**options | dict(shape=(3, 8, 8)) | changes)


REFUSED = {
    "process": (dict(schedule=VE()), "schedule: expected one of time steps"),
    "prediction": (dict(prediction="score"), "prediction: expected one of eps, x0, v"),
    "variance": (dict(variance="diagonal"), "variance: expected one of diffusers' fixed_small"),
    "spacing": (dict(spacing="quadratic"), "spacing: expected one of trailing, leading, linspace"),
    "t_scale": (
        dict(network=UNet(3, channels=8, channel_mult=(1, 2), groups=4, t_scale=0.25)),
        "t_scale: expected what a UNet2DModel of diffusers has, got 0.25",
    ),
    "conditions": (
        dict(network=UNet(3, channels=8, channel_mult=(1, 2), groups=4, conditions={"text": (4,)})),
        "conditions: expected none, as a DDPMPipeline has none, got .*text",
    ),
    "codec": (dict(codec=Codec(scale=0.5)), "codec: expected none, as a DDPMPipeline has none, got Codec"),
    "fixed of a learned": (
        dict(network=UNet(3, channels=8, channel_mult=(1, 2), groups=4, learned_variance=True), variance="fixed_large"),
        "variance: expected 'learned', as diffusers has for 6 channels of the network's output, got 'fixed_large'",
    ),
    "network": (dict(network=torch.nn.Identity()), "network: expected a UNet, which diffusers has too, got Identity"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_diffusers_has_not_is_not_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        small(**changes).to_diffusers(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# --- the Hub ---


def test_a_model_goes_to_the_hub_and_comes_back(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    class Api:
        def create_repo(self, name, **options):
            return f"hub/{name}"

        def upload_folder(self, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tmp_path / name))
    model = small()
    assert model.push_to_hub("me/mine") == "hub/me/mine"
    for name in ("me/mine", tmp_path / "me" / "mine"):
        again = Model.from_pretrained(name)
        assert torch.equal(again.network.conv_in.weight, model.network.conv_in.weight)


# --- pickles with code ---


class Empty:
    """Its pickle has no state."""


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def module_of(weights: dict[str, Tensor], kind: type = torch.nn.Module) -> torch.nn.Module:
    """A module with these parameters and buffers, of modules of that kind."""
    root = kind()
    for name, tensor in weights.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, kind())
            module = module._modules[part]
        module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


@pytest.fixture
def persistent(monkeypatch):
    """NVIDIA's way: an object is rebuilt by source that its pickle holds. This source ends the process."""
    library = types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("ran")

    _reconstruct_persistent_obj.__module__ = library.__name__
    _reconstruct_persistent_obj.__qualname__ = _reconstruct_persistent_obj.__name__
    library._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, library.__name__, library)

    class Persistent(torch.nn.Module):
        def __reduce__(self):
            kind = getattr(self, "class_name", "Block")
            meta = dict(type="class", module_src="raise SystemExit", class_name=kind, state=self.__dict__)
            return _reconstruct_persistent_obj, (meta,)

    return Persistent


def test_a_pickle_of_edm_is_converted_without_running_its_code(persistent, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    network = module_of(weights_of("edm_ddpmpp"), persistent)
    network.class_name, network.beta_min, network.beta_d, network.epsilon_t = "VPPrecond", 0.2, 19.8, 1e-4
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": network, "evil": Evil(), "empty": Empty()}))
    with pytest.raises(ValueError, match="x.pkl: expected a pickle of tensors alone, got .*: diffkern convert reads"):
        load("x.pkl")
    assert main(["convert", "x.pkl", "--out", "x.safetensors"]) == 0
    assert not (tmp_path / "evil").exists()
    assert "x.pkl: a pickle that names code, none of which was run: " in capsys.readouterr().err
    model, said = load("x.safetensors"), fixture("edm_ddpmpp")
    assert model.schedule == VP(0.2, 20.0, 1e-4) and model.name == "x"
    model.schedule = VP(t_min=1e-5)  # that of the fixture
    assert error_of(denoised(model, said), said["out"]) < PARITY


@pytest.mark.parametrize("zipped", [True, False])
def test_a_module_saved_whole_is_converted(zipped, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(module_of(weights_of("pytorch_ddpm")), "x.pt", _use_new_zipfile_serialization=zipped)
    assert main(["convert", "x.pt", "--out", "x.safetensors"]) == 2
    assert "x.pt: img_size: expected the images' size as an option" in capsys.readouterr().err
    arguments = ["convert", "x.pt", "--out", "x.safetensors", "--option", "img_size=8", "--option"]
    assert main([*arguments, "mean_type=xstart"]) == 0
    model = load("x.safetensors")
    assert (model.prediction, model.shape) == ("x0", (3, 8, 8))
    assert torch.equal(model.network.conv_in.weight, weights_of("pytorch_ddpm")["head.weight"])


class Hidden:
    """Its pickle makes the tensors only when it is run."""

    def __reduce__(self):
        return _hidden, (weights_of("pytorch_ddpm"),)


def _hidden(weights):
    return {f"net.{name}": tensor for name, tensor in weights.items()}


WRITERS = {
    "pickle": lambda content, path: path.write_bytes(pickle.dumps(content)),
    "torch before 1.6": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_code_is_run_only_if_asked_for(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write({"a": Hidden()}, tmp_path / "x.pkl")
    arguments = ["convert", "x.pkl", "--out", "x.safetensors", "--option", "img_size=8"]
    assert main(arguments) == 2
    assert "got no tensors" in capsys.readouterr().err
    assert main([*arguments, "--unsafe-pickle"]) == 0
    assert "x.pkl: a pickle whose code was run" in capsys.readouterr().err
