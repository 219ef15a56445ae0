"""Flows: layers are bijections with the log-determinant of their Jacobian, densities sum to one, and training raises
the likelihood."""

import json
import math
from functools import partial

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import one_thread  # noqa: F401
from torch import nn

from diffkern import RectifiedFlow, flows, nll, noise, sample
from diffkern.flows import ActNorm, Chain, Coupling, Flow, Glow, Half, Linear, Permutation, RealNVP, Squeezed
from diffkern.show.densities import DENSITIES, eight_gaussians
from diffkern.show.gaussians import Gaussians
from diffkern.training import CHECKPOINT, Config, Trainer
from diffkern.training.batches import Batches

FLOAT64 = dict(dtype=torch.float64, device="cpu")
SMALL_GLOW = dict(shape=(1, 8, 8), levels=2, steps=1, width=8)
SMALL_NVP = dict(shape=(2,), couplings=3, width=16)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), **FLOAT64)


def shaken(layer: nn.Module, by: float = 0.2) -> nn.Module:
    """``layer`` in float64, its parameters far from where they start."""
    layer = layer.double()
    with torch.no_grad():
        for seed, parameter in enumerate(layer.parameters()):
            parameter.add_(by * randn(*parameter.shape, seed=seed))
    return layer


def coupling(channels: int, affine: bool = True, image: bool = False) -> Coupling:
    kept, changed = channels - channels // 2, channels // 2 * (2 if affine else 1)
    network = nn.Conv2d(kept, changed, 3, padding=1) if image else nn.Linear(kept, changed)
    return Coupling(channels, nn.Sequential(network, nn.Tanh()), affine)


LAYERS = {
    "actnorm": (partial(ActNorm, 5), (5,)),
    "actnorm of images": (partial(ActNorm, 2), (2, 2, 3)),
    "reverse": (partial(Permutation.reverse, 5), (5,)),
    "random": (partial(Permutation.random, 5, 1), (5,)),
    "linear": (lambda: Linear(4, randn(4, 4)), (4,)),
    "1x1 convolution": (lambda: Linear(4, randn(4, 4)), (4, 2, 1)),
    "additive coupling": (partial(coupling, 5, False), (5,)),
    "affine coupling": (partial(coupling, 5), (5,)),
    "coupling of images": (partial(coupling, 3, image=True), (3, 2, 2)),
    "squeezed": (lambda: Squeezed(Chain(ActNorm(4), coupling(4, image=True))), (1, 2, 4)),
    "half": (lambda: Half(coupling(3)), (5,)),
    "RealNVP": (partial(RealNVP, (3,), couplings=3, width=8, waves=1), (3,)),
    "Glow": (partial(Glow, (1, 4, 4), levels=2, steps=1, width=4), (1, 4, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_a_bijection_with_the_log_determinant_of_its_jacobian(name):
    make, shape = LAYERS[name]
    layer, x = shaken(make()), randn(2, *shape)
    with torch.no_grad():
        z, log_det = layer(x)
        torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=1e-11)
        torch.testing.assert_close(layer(layer.inverse(x))[0], x, rtol=0, atol=1e-11)
    for one, expected in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda x: layer(x[None])[0][0], one).reshape(one.numel(), -1)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian).logabsdet, expected, rtol=0, atol=1e-10)
    assert name in ("reverse", "random") or not torch.equal(z, x)
    layer, x = layer.float(), x.float()
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(layer(x)[0]), x, rtol=0, atol=1e-5)


def test_a_linear_layer_starts_from_its_matrix():
    matrix = randn(5, 5)
    layer = Linear(5, matrix).double()
    torch.testing.assert_close(layer.weight(), matrix, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.log_s.sum(), torch.linalg.slogdet(matrix).logabsdet, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="matrix: expected one that is invertible, got a singular one"):
        Linear(3, torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"matrix: expected shape \(3, 3\), got \(2, 2\)"):
        Linear(3, torch.eye(2))


def test_actnorm_takes_mean_and_variance_from_its_first_batch_only():
    layer, x = ActNorm(3), 5 + 2 * randn(50, 3, 4, 4).float()
    z = layer.initialize(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.var((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)
    assert torch.equal(layer.initialize(2 * x), layer(2 * x)[0])
    glow, x = Glow(**SMALL_GLOW), 3 + randn(64, 1, 8, 8).float()
    glow.initialize(x)
    assert abs(glow.encode(x).mean()) < 0.2 < 1 < x.mean()


# --- densities ---


@pytest.mark.parametrize("flow", [RealNVP(**SMALL_NVP, seed=3), Glow(**SMALL_GLOW)], ids=["RealNVP", "Glow"])
def test_an_untrained_flow_is_a_standard_normal(flow):
    x = randn(4, *flow.shape).float()
    expected = torch.distributions.Normal(0, 1).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(flow.encode(x), x, atol=0.1)  # but it turns x


@pytest.mark.parametrize("permutation", ["linear", "reverse", "random"])
def test_the_density_of_a_flow_sums_to_one(permutation):
    flow = shaken(RealNVP(**SMALL_NVP, permutation=permutation), 0.1)
    ticks = torch.linspace(-12, 12, 300, **FLOAT64)
    with torch.no_grad():
        p = flow.log_prob(torch.cartesian_prod(ticks, ticks)).exp()
    assert p.sum().item() * (ticks[1] - ticks[0]).item() ** 2 == pytest.approx(1, abs=1e-4)
    assert abs(p.max() * 2 * math.pi - 1) > 0.05  # another density than it began with


def test_bits_are_those_of_the_ode_for_the_same_gaussian_and_seeds():
    """A flow and a diffusion model of one density, with the same levels and the same noise within them."""
    model = Gaussians([[0.2, 0.2]], [0.3]).model(RectifiedFlow(), "flow")
    flow = Flow((2,), [ActNorm(2)])
    with torch.no_grad():
        flow.layers[0].mean.fill_(0.2)
        flow.layers[0].log_std.fill_(math.log(0.3))
    x, seeds = torch.tensor([[0.1, -0.4], [0.6, 0.2], [0.2, 1.0]]), [5, 6, 7]
    for levels in (None, 256, 8):
        expected = nll(model, x, "ode", levels=levels, seeds=seeds, probes=None, tol=1e-5, progress=False).bits
        found = flow.bits(x, levels=levels, seeds=seeds)
        assert found.dtype == torch.float64 and found.shape == (3,)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)
        torch.testing.assert_close(flow.bits(x[1:2], levels, [6]), found[1:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", DENSITIES)
def test_a_density_of_the_plane_has_its_entropy(name):
    density = DENSITIES[name]()
    x = density.draw(10_000, 3)
    log_p = density.log_prob(x)
    assert x.dtype == torch.float32 and torch.equal(x, density.draw(10_000, 3))
    assert -log_p.mean().item() == pytest.approx(density.entropy, abs=4 * log_p.std().item() / 100 + 1e-6)
    grid = density.grid(150)
    cell = (grid[1, 0] - grid[0, 0]).item() ** 2
    total = sum(density.log_prob(part).exp().sum().item() for part in grid.split(2000)) * cell
    assert total == pytest.approx(1, abs=0.02)


# --- samples ---


def test_a_seed_has_the_same_sample_in_any_company():
    flow = shaken(RealNVP(**SMALL_NVP)).float()
    x = flow.sample(70)
    assert x.shape == (70, 2) and torch.equal(flow.sample(seeds=[69, 3]), x[[69, 3]])
    z = noise(torch.arange(70), (2,), step=0, stream=0)
    torch.testing.assert_close(flow.encode(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(flow.encode(flow.sample(70, temperature=0.5)), z / 2, rtol=1e-4, atol=1e-4)
    assert flow.sample(3, temperature=0).std(0).max() == 0


def test_interpolation_leads_from_one_to_the_other():
    flow = shaken(Glow(**SMALL_GLOW), 0.05).float()
    x = flow.sample(seeds=[4, 9])
    for a, b in ((4, 9), (x[0], 9), (4, x[1]), (x[0], x[1])):
        found = flow.interpolate(a, b, 5)
        torch.testing.assert_close(found[[0, -1]], x, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(flow.encode(found).flatten(1).norm(dim=1).std(), torch.tensor(0.0), rtol=0, atol=1)


# --- training ---


def test_training_raises_the_likelihood():
    density = eight_gaussians()
    data, held_out = density.draw(2000, 0), density.draw(500, 1)
    config = Config(steps=40, batch_size=64, lr=5e-3, warmup=0)
    flow = RealNVP((2,), couplings=4, width=32, waves=2)
    start = Trainer(flow, data, config, validation=held_out)
    before = start.validate()
    after = -Trainer(flow, data, config).train(progress=False).log_prob(held_out).mean().item() / (2 * math.log(2))
    assert density.entropy / (2 * math.log(2)) < after < before - 0.1
    assert start.validate() == before  # the average of another run


def test_a_resumed_run_of_images_continues_to_the_bit(tmp_path):
    data, held_out = tiny.dataset(), tiny.dataset(5, classes=None)
    config = Config(steps=4, batch_size=4, accumulate=2, lr=1e-3, flip=True, log_every=2, validate_every=2,
                    sample_every=4)  # fmt: skip
    whole = Trainer(Glow(**SMALL_GLOW), data, config, validation=held_out)
    assert whole.run(tmp_path / "whole", progress=False) is None
    written = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {CHECKPOINT, "log.csv", "loss.png", "samples-0000004.png"} <= written
    parts = Trainer(Glow(**SMALL_GLOW), data, config, validation=held_out)
    parts.step(), parts.step()
    parts.save(tmp_path / "half.safetensors")
    parts = Trainer.resume(tmp_path / "half.safetensors", data, validation=held_out)
    parts.step(), parts.step()
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in parts.tensors().items())
    assert parts.validate() == whole.validate()
    flow, x = flows.load(tmp_path / "whole"), data.x_0(slice(3))
    assert torch.equal(flow.bits(x), whole.model.bits(x)) and not flow.training
    with pytest.raises(ValueError, match="seed: expected that of "):
        Trainer.resume(tmp_path / "half.safetensors", data, seed=1)


def test_a_trained_flow_is_trained_on_from_where_it_is():
    data = eight_gaussians().draw(200, 0)
    config = Config(steps=2, batch_size=64, warmup=0)
    flow = Trainer(RealNVP(**SMALL_NVP), data, config).train(progress=False)
    again = Trainer(flow, 3 * data, config)
    assert torch.equal(again.model.layers[0].mean, flow.layers[0].mean)


def test_a_flow_is_resumed_with_what_was_frozen(tmp_path):
    data, config = eight_gaussians().draw(200, 0), Config(steps=4, batch_size=16, warmup=0)
    flow = RealNVP(**SMALL_NVP)
    next(layer for layer in flow.modules() if isinstance(layer, Coupling)).requires_grad_(False)
    whole = Trainer(flow, data, config)
    whole.step()
    whole.save(tmp_path / CHECKPOINT)
    again = Trainer.resume(tmp_path / CHECKPOINT, data)
    assert again.trained.keys() == whole.trained.keys() < dict(flow.named_parameters()).keys()
    assert again.step() == whole.step()


def test_a_flow_of_own_layers_is_trained_and_its_workers_end_but_no_file_is_begun(tmp_path, monkeypatch):
    data, closed = torch.linspace(-1, 1, 20).view(10, 2), []
    monkeypatch.setattr(Batches, "close", lambda batches: closed.append(batches))
    flow, config = Flow((2,), [ActNorm(2)]), Config(steps=1, batch_size=5)
    assert Trainer(flow, data, config).train(progress=False).log_prob(data).isfinite().all() and len(closed) == 1
    with pytest.raises(TypeError, match="flow: expected a RealNVP or a Glow to describe, got Flow"):
        Trainer(flow, data, config).run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=nn.Identity()), "model: expected a diffkern.Model or a Flow, got Identity"),
        (dict(data=torch.zeros(5, 3)), r"data: expected samples of shape \(2,\), got \(3,\)"),
        (dict(data=torch.zeros(0, 2)), "data: expected at least one item, got none"),
        (dict(validation=torch.zeros(5, 3)), r"validation: expected samples of shape \(2,\), got \(3,\)"),
        (dict(config=Config(objective="min_snr")), "objective: expected None for a flow, got min_snr"),
        (dict(config=Config(bf16=True)), "bf16: expected False for a flow, got True"),
        (dict(config=Config(flip=True)), "flip: expected False of what is no image"),
        (dict(config=Config(accumulate=3)), "batch_size: expected a multiple of the 1 processes times 3 parts, got"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:30],
)
def test_what_does_not_fit_is_refused(changes, message):
    given = dict(model=RealNVP(**SMALL_NVP), data=torch.zeros(5, 2), config=Config()) | changes
    with pytest.raises((TypeError, ValueError), match=message):
        Trainer(given.pop("model"), given.pop("data"), given.pop("config"), **given)


# --- files ---


def test_a_flow_in_the_place_of_a_model_is_called_one(tmp_path):
    flow = RealNVP(**SMALL_NVP)
    flows.save(flow, tmp_path / "f")
    with pytest.raises(
        ValueError, match=r"f: expected a diffusion model, got a flow \('RealNVP'\), which diffkern.flows."
    ):
        sample(tmp_path / "f", 1)
    for call in (lambda: sample(flow, 1), lambda: nll(flow, torch.zeros(2, 2), "ode")):
        with pytest.raises(TypeError, match="model: expected a diffusion model, got RealNVP, a flow, which has sample"):
            call()


@pytest.mark.parametrize(
    "flow",
    [
        RealNVP(**SMALL_NVP, permutation=kind, affine=kind != "reverse", seed=7)
        for kind in ("linear", "reverse", "random")
    ]
    + [Glow(**SMALL_GLOW)],
    ids=["linear", "reverse", "random", "Glow"],
)
def test_a_file_holds_the_flow(flow, tmp_path):
    flow, path = shaken(flow).float(), tmp_path / "flow.safetensors"
    flows.save(flow, path)
    before = torch.get_rng_state()
    loaded = flows.load(path)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(loaded) is type(flow) and loaded.config == flow.config and loaded.shape == flow.shape
    x = randn(3, *flow.shape).float()
    flow.requires_grad_(False)  # as that of the file: torch may choose another convolution
    assert torch.equal(loaded.log_prob(x), flow.log_prob(x)) and torch.equal(loaded.sample(3), flow.sample(3))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    flows.save(flow, path, dtype=torch.float16)
    torch.testing.assert_close(flows.load(path).log_prob(x), flow.log_prob(x), rtol=0.02, atol=0.02)


def rewritten(path, change):
    """The file with its description and tensors changed by ``change``."""
    with safe_open(path, framework="pt") as file:
        description = json.loads(file.metadata()["diffkern"])
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    change(description, tensors)
    save_file(tensors, path, metadata={"diffkern": json.dumps(description)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, t: d.update(flow=2), "expected a flow of format 1, got flow, kind, config, prefix"),
        (lambda d, t: d.update(kind="Module"), "kind: expected one of RealNVP, Glow, got 'Module'"),
        (lambda d, t: d.update(config=[]), "config: expected the options of a RealNVP"),
        (lambda d, t: d["config"].update(width=2**20), "width: expected an int in 1..4096, got 1048576"),
        (lambda d, t: d["config"].update(more=1), "RealNVP.__init__.. got an unexpected keyword argument 'more'"),
        (lambda d, t: d["config"].update(couplings=4), "expected the tensors of a RealNVP of its config, got "),
        (lambda d, t: t["layers.1.order"].fill_(1), "order: expected a permutation, and signs of -1 or 1"),
    ],
    ids=["format", "kind", "config", "size", "option", "tensors", "order"],
)
def test_a_file_that_holds_no_flow_is_refused(change, message, tmp_path):
    path = tmp_path / "flow.safetensors"
    flows.save(RealNVP(**SMALL_NVP), path)
    rewritten(path, change)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        flows.load(path)


def test_a_flow_that_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "flow.safetensors"
    flow = RealNVP(**SMALL_NVP)
    with pytest.raises(TypeError, match="flow: expected a RealNVP or a Glow to describe, got Flow"):
        flows.save(Flow((2,), [ActNorm(2)]), path)
    with pytest.raises(ValueError, match="dtype: expected float32, float16 or bfloat16, got torch.int8"):
        flows.save(flow, path, dtype=torch.int8)
    with torch.no_grad():
        flow.layers[0].mean.fill_(1e6)
    with pytest.raises(ValueError, match="expected weights that are finite in torch.float16, got others in layers.0"):
        flows.save(flow, path, dtype=torch.float16)
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        flows.load(path)


# --- arguments ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda flow: RealNVP((1,)), r"shape: expected \(D,\) with D in 2..4096, got \(1,\)"),
        (lambda flow: RealNVP((2,), couplings=0), "couplings: expected an int in 1..256, got 0"),
        (lambda flow: RealNVP((2,), affine=1), "affine: expected True or False, got 1"),
        (lambda flow: RealNVP((2,), permutation="odd"), "permutation: expected one of linear, reverse, random, got"),
        (lambda flow: RealNVP((2,), seed=-1), r"seed: expected an int in \[0, 2\^63\) or None, got -1"),
        (lambda flow: Glow((1, 6, 8), levels=2), r"shape: expected \(C, H, W\) with H and W divisible by 4"),
        (lambda flow: Flow(()), r"shape: expected at least one size, got \(\)"),
        (lambda flow: Flow(3), r"shape: expected sizes, as \(C, H, W\), got 3"),
        (lambda flow: Permutation([0, 2]), r"order: expected a permutation of 0..1, got \[0, 2\]"),
        (lambda flow: Coupling(1, nn.Identity()), "channels: expected at least 2, got 1"),
        (lambda flow: flow.log_prob(torch.zeros(3)), r"x: expected shape \(n, 2\), got \(3,\)"),
        (lambda flow: flow.decode(torch.zeros(3, 2).int()), "z: expected a floating-point tensor, got torch.int32"),
        (lambda flow: flow.sample(2, temperature=-1), "temperature: expected a number >= 0, got -1"),
        (lambda flow: flow.sample(), "n: expected n or seeds, got neither"),
        (lambda flow: flow.sample(2, batch_size=0), "batch_size: expected an int >= 1, got 0"),
        (lambda flow: flow.bits(torch.full((1, 2), 1.5)), r"x: expected values in \[-1, 1\], or levels=None"),
        (lambda flow: flow.bits(torch.zeros(1, 2), levels=1), "levels: expected an int >= 2 or None, got 1"),
        (lambda flow: flow.interpolate(1, "b"), "b: expected a sample or a seed, got 'b'"),
        (lambda flow: flow.interpolate(1, 2, 1), "n: expected an int >= 2, got 1"),
    ],
)  # fmt: skip
def test_what_is_no_argument_is_refused(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(RealNVP(**SMALL_NVP))
