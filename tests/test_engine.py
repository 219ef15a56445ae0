"""The engine: the network's values by other kernels, the same bits for any batch and any number of threads."""

import copy
import gc
import os
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from forks import exit_code
from networks import CONFIGS, assert_close, call_twin, config_of, diffusers_twin, inputs, with_random_weights
from tolerances import ENGINE, ENGINE_HIGH, SAMPLE_ENGINE
from torch import Tensor, nn

import diffkern
from diffkern import _C, Schedule, UNet, ops, optimize, sample
from diffkern.engine import is_optimized, unwrapped
from diffkern.engine.compiled import _compiled
from diffkern.unet import Conv3x3, from_diffusers

COVERING = {"ddpm_cifar10", "fashion_mnist", "improved_ddpm", "one_level_without_attention"}
"""Networks that together have many levels, labels, and both kinds of time, of resampling and of attention."""
COVERING_CONFIGS = [name if name in COVERING else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS]


def small(name: str, **options) -> UNet:
    """Half as wide, with one block a level."""
    return network_of(name, **dict(channels=16, blocks=1) | options)


def network_of(name: str, **options) -> UNet:
    return with_random_weights(UNet(**config_of(name) | options)).eval().requires_grad_(False)


def in_float64(network: UNet, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    """By diffusers, with the same weights."""
    twin = diffusers_twin(network)
    twin.load_state_dict(network.state_dict())
    with torch.no_grad():
        return call_twin(twin.double(), x.double(), t, labels)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def precision(request):
    """Sets what ``torch.set_float32_matmul_precision`` sets."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


# --- the same values ---


def assert_is_float64_s(name: str, size: int) -> None:
    network = network_of(name)
    x, t, labels = inputs(network, size)
    expected = in_float64(network, x, t, labels)
    engine = optimize(network)
    for _ in range(2):  # recorded, then replayed
        assert relative_error(engine(x, t, labels), expected) < ENGINE


@pytest.mark.parametrize("name", CONFIGS)
def test_engine_gives_the_network_in_float64(name):
    assert_is_float64_s(name, 8)


@pytest.mark.parametrize("name", COVERING_CONFIGS)
def test_engine_gives_the_network_in_float64_at_many_pixels(name):
    assert_is_float64_s(name, 16)


def test_images_may_be_oblong_and_of_any_divisible_size():
    network = small("ddpm_cifar10", groups=8)
    engine = optimize(network)
    for h, w in ((8, 24), (40, 8), (24, 40)):
        x = torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(1))
        t = torch.tensor([3, 4])
        assert relative_error(engine(x, t), in_float64(network, x, t, None)) < ENGINE


@pytest.mark.parametrize("precision", ["high"], indirect=True)
@pytest.mark.parametrize("name", COVERING_CONFIGS)
def test_at_high_precision_it_is_within_factors_of_16_bits(precision, name):
    network = network_of(name)
    x, t, labels = inputs(network)
    assert relative_error(optimize(network)(x, t, labels), in_float64(network, x, t, labels)) < ENGINE_HIGH


@pytest.mark.parametrize("precision", ["high"], indirect=True)
def test_the_precision_is_that_of_the_call(precision):
    network = network_of("ddpm_cifar10")
    x, t, labels = inputs(network)
    engine = optimize(network)
    high = engine(x, t, labels)
    torch.set_float32_matmul_precision("highest")
    highest = engine(x, t, labels)
    assert torch.equal(high, highest) == (_C.cpu_level() != "avx512_amx")
    assert relative_error(highest, in_float64(network, x, t, labels)) < ENGINE
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(engine(x, t, labels), high)


AT_A_LEVEL = """
import torch
from tolerances import ENGINE
from diffkern import UNet, optimize

for config, state, inputs, expected in torch.load({path!r}):
    network = UNet(**config).eval().requires_grad_(False)
    network.load_state_dict(state)
    got = optimize(network)(*inputs)
    assert (got.double() - expected).abs().max() < ENGINE * expected.abs().max()
"""


def test_each_cpu_level_gives_the_network(at_every_level, tmp_path):
    cases, path = [], str(tmp_path / "cases.pt")  # made here: a process of a level need not import diffusers
    for name, size in (("ddpm_cifar10", 16), ("improved_ddpm", 8)):
        network = network_of(name, blocks=1)
        given = inputs(network, size)
        cases.append((network.config, network.state_dict(), given, in_float64(network, *given)))
    torch.save(cases, path)
    at_every_level(AT_A_LEVEL.format(path=path))


def test_every_call_has_its_own_result_and_its_own_shape():
    network = small("class_labels")
    engine = optimize(network)
    x, t, labels = inputs(network)
    first = engine(x, t, labels)
    kept = first.clone()
    for n in (1, 2, 1):
        for size in (8, 16):
            engine(torch.randn(n, 3, size, size), t[:n], labels[:n])
    assert torch.equal(first, kept)
    assert torch.equal(engine(x, t, labels), kept)


def test_no_labels_are_the_null_class():
    network = small("class_labels")
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    assert torch.equal(engine(x, t), engine(x, t, torch.full((3,), -1)))
    assert not torch.allclose(engine(x, t), engine(x, t, torch.tensor([0, 1, 2])), atol=1e-2)


# --- the same bits ---


OTHERS = [
    pytest.param(name, precision, marks=pytest.mark.slow)
    for name, precision in (("improved_ddpm", "high"), ("fashion_mnist", "high"), ("ddpm_cifar10", "highest"))
]


@pytest.mark.parametrize(
    ("name", "precision"),
    [("ddpm_cifar10", "high"), ("improved_ddpm", "highest"), ("fashion_mnist", "highest"), *OTHERS],
    indirect=["precision"],
)
def test_a_sample_has_the_same_bits_in_any_batch(precision, name):
    network, size = network_of(name, blocks=1), 16 if name == "ddpm_cifar10" else 8
    engine = optimize(network)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(7, network.config["in_channels"], size, size, generator=generator)
    t = torch.tensor([0, 999, 5, 5, 5, 17, 400])
    labels = None if network.config["num_classes"] is None else torch.tensor([0, 1, -1, 2, 2, 0, -1])
    whole = engine(x, t, labels)
    for split in ([1] * 7, [2, 5], [6, 1]):
        parts = zip(x.split(split), t.split(split), [None] * 9 if labels is None else labels.split(split), strict=False)
        assert torch.equal(torch.cat([engine(*part) for part in parts]), whole)


def test_the_number_of_threads_changes_no_bit():
    network = network_of("improved_ddpm")
    x, t, labels = inputs(network)
    engine, threads = optimize(network), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = engine(x, t, labels)
        for count in (2, 3, 5, 8):
            torch.set_num_threads(count)
            assert torch.equal(engine(x, t, labels), expected)
    finally:
        torch.set_num_threads(threads)


def test_the_memory_format_of_the_image_changes_no_bit():
    network = small("plain")
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    assert torch.equal(engine(x.contiguous(memory_format=torch.channels_last), t), engine(x, t))


# --- weights ---


def step_of_fused_adamw(network: UNet) -> None:
    for parameter in network.parameters():
        parameter.requires_grad_(True).grad = torch.full_like(parameter, 0.1)
    torch.optim.AdamW(network.parameters(), lr=0.02, fused=True).step()
    network.requires_grad_(False)


def average_through_data(network: UNet) -> None:
    for parameter in network.parameters():
        parameter.data.mul_(0.9)


def other_layer(network: UNet) -> None:
    network.mid_block.resnets[0].conv1 = with_random_weights(Conv3x3(64, 64, 3, padding=1)).requires_grad_(False)


def assigned_state(network: UNet) -> None:
    network.load_state_dict({key: 0.9 * value for key, value in network.state_dict().items()}, assign=True)


CHANGES = {
    "one weight": lambda network: network.down_blocks[0].resnets[0].conv2.weight.mul_(1.5),
    "a loaded state": lambda n: n.load_state_dict({key: 0.9 * value for key, value in n.state_dict().items()}),
    "an assigned state": assigned_state,
    "another parameter": lambda n: setattr(n.conv_out, "bias", nn.Parameter(n.conv_out.bias + 1, requires_grad=False)),
    "a fused step": step_of_fused_adamw,
    "data": average_through_data,
    "another layer": other_layer,
    "a hook": lambda network: network.conv_in.register_forward_hook(lambda module, inputs, output: 0.5 * output),
    "a hook before": lambda network: network.mid_block.register_forward_pre_hook(lambda m, inputs: None),
    "a forward of its own": lambda network: setattr(network.conv_out, "forward", lambda x: x[:, :3]),
    "a layer of another class": lambda n: setattr(
        n.mid_block.attentions[0], "to_q", Adapted(n.mid_block.attentions[0].to_q)
    ),
}


class Adapted(nn.Module):
    """A layer as adapters wrap it, which lets its weight be seen and does something else."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    @property
    def bias(self) -> Tensor:
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_the_network_is_noticed(change):
    network = network_of("plain", blocks=1)
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    before = engine(x, t)
    with torch.no_grad():
        CHANGES[change](network)
        for _ in range(2):
            assert_close(engine(x, t), network(x, t))
    assert change == "a hook before" or not torch.allclose(engine(x, t), before, atol=1e-3)


def one_number(network: UNet) -> None:
    network.conv_out.weight[0, 0, 0, 1] += 10


def one_bias(network: UNet) -> None:
    network.conv_in.bias[5] += 5


def one_filter(network: UNet) -> None:
    network.conv_in.weight[7] *= 3


def step_of_adam_on_one_class(network: UNet) -> None:
    """Its gradient is 0 for every other class."""
    weight = network.class_embedding.weight
    weight.requires_grad_(True).grad = torch.zeros_like(weight)
    weight.grad[537] = 1
    torch.optim.Adam([weight], lr=1).step()
    weight.requires_grad_(False)


@pytest.mark.parametrize("change", [one_number, one_bias, one_filter, step_of_adam_on_one_class])
def test_a_weight_that_changes_in_few_places_is_noticed(change):
    network = small("plain", num_classes=1000)
    x, t, _ = inputs(network, 8)
    engine, labels = optimize(network), torch.tensor([537, 537, 0])
    before = engine(x, t, labels)
    with torch.no_grad():
        change(network)
    after = engine(x, t, labels)
    assert_close(after, network(x, t, labels))
    assert not torch.allclose(after, before, atol=1e-2)


def test_one_number_written_behind_torchs_back_is_noticed_by_the_next_engine():
    network = small("plain")
    x, t, _ = inputs(network, 8)
    before = optimize(network)(x, t)
    network.conv_out.weight.data[0, 0, 0, 1] += 10
    after = optimize(network)(x, t)
    assert_close(after, network(x, t))
    assert not torch.allclose(after, before, atol=1e-2)


@pytest.mark.parametrize("layer", ["conv_norm_out", "time_embedding.linear_1", "mid_block.resnets.0.conv1"])
def test_a_weight_whose_storage_was_freed_raises(layer):
    network = small("plain")
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    engine(x, t)
    network.get_submodule(layer).weight.untyped_storage().resize_(0)
    for run in (engine, network):
        with pytest.raises(RuntimeError, match="storage"):
            run(x, t)


def test_weights_made_in_inference_mode_which_have_no_version_are_looked_at():
    with torch.inference_mode():
        network = small("plain")
        x, t, _ = inputs(network, 8)
        engine = optimize(network)
        before = engine(x, t)
        network.conv_out.bias.add_(1)
        assert_close(engine(x, t), network(x, t))
        assert not torch.allclose(engine(x, t), before, atol=1e-2)


@pytest.mark.parametrize("change", ["a fused step", "data", "an assigned state", "a hook", "another parameter"])
def test_what_changes_in_a_network_of_diffusers_is_noticed(change):
    ours = small("plain")
    network = diffusers_twin(ours).eval().requires_grad_(False)
    x, t, _ = inputs(ours, 8)
    engine = optimize(network)
    before = engine(x, 7).sample
    with torch.no_grad():
        CHANGES[change](network)
        for _ in range(2):
            assert_close(engine(x, 7).sample, network(x, 7).sample)
    assert not torch.allclose(engine(x, 7).sample, before, atol=1e-2)


def test_a_weight_that_is_thawed_gets_its_gradient():
    network = small("plain")
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    assert not engine(x, t).requires_grad
    weight = network.conv_out.weight.requires_grad_()
    (got,) = torch.autograd.grad(engine(x, t).sum(), weight)
    (expected,) = torch.autograd.grad(network(x, t).sum(), weight)
    assert_close(got, expected)


def test_what_is_packed_is_shared_by_engines_and_goes_with_the_network():
    network = small("plain")
    x, t, _ = inputs(network, 8)
    optimize(network)(x, t)
    compiled = weakref.ref(_compiled[network])
    optimize(network)(x, t)
    assert _compiled[network] is compiled()
    del network
    gc.collect()
    assert compiled() is None


def test_a_network_that_was_run_can_be_copied_and_saved(tmp_path):
    model = diffkern.Model(small("plain"), Schedule.linear(1000), shape=(3, 16, 16))
    x, t, _ = inputs(model.network)
    expected = optimize(model.network)(x, t)
    diffkern.save(model, tmp_path / "model.safetensors")
    for twin in (copy.deepcopy(model.network), diffkern.load(tmp_path / "model.safetensors").network):
        assert torch.equal(optimize(twin)(x, t), expected)


def test_the_plan_that_was_used_longest_ago_gives_way():
    network = small("one_level_without_attention")
    engine, t = optimize(network), torch.tensor([3])

    def run(size: int) -> list[int]:
        engine(torch.zeros(1, 3, size, size), t)
        return [case.graph.inputs[0].shape[2] for case in _compiled[network].cases.values()]

    for size in (4, 6, 8, 10):
        run(size)
    kept = dict(_compiled[network].cases)
    assert run(4) == [6, 8, 10, 4]
    assert run(12) == [8, 10, 4, 12]
    assert all(plan is kept[key] for key, plan in _compiled[network].cases.items() if key in kept)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_child_of_a_fork_runs_an_engine_that_another_thread_was_in():
    network = small("one_level_without_attention")
    x, t, _ = inputs(network, 4)
    engine = optimize(network)
    expected = engine(x, t)
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with _compiled[network].lock:
            held.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(60)
    child = os.fork()
    if not child:
        torch.set_num_threads(1)  # torch's own threads are not in a child
        os._exit(0 if torch.equal(engine(x, t), expected) else 1)
    leave.set()
    thread.join()
    assert exit_code(child) == 0


# --- where the network itself runs ---


def test_training_keeps_the_network():
    network = with_random_weights(UNet(**config_of("plain"), dropout=0.5))
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    engine(x, t).square().mean().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(engine(x, t), engine(x, t))
        engine.eval()
        assert torch.equal(engine(x, t), engine(x, t))
        assert not torch.equal(engine(x, t), network(x, t))  # other kernels
        assert_close(engine(x, t), network(x, t))


def test_other_dtypes_and_autocast_keep_the_network():
    network = small("plain")
    x, t, _ = inputs(network, 8)
    engine = optimize(network)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(engine(x, t), network(x, t))
    network.bfloat16()
    assert torch.equal(engine(x.bfloat16(), t), network(x.bfloat16(), t))


def test_an_empty_batch_is_empty():
    engine = optimize(small("plain"))
    assert engine(torch.zeros(0, 3, 16, 16), torch.zeros(0, dtype=torch.int64)).shape == (0, 3, 16, 16)


def test_wrong_inputs_raise_the_networks_messages():
    engine = optimize(small("plain"))
    with pytest.raises(ValueError, match=r"^x_t: expected \[N, 3, H, W\] with H and W divisible by 2"):
        engine(torch.zeros(1, 3, 7, 8), torch.tensor([1]))
    with pytest.raises(ValueError, match=r"^t: expected shape \(1,\), got \(2,\)"):
        engine(torch.zeros(1, 3, 8, 8), torch.tensor([1, 2]))
    with pytest.raises(TypeError, match=r"^t: expected a tensor, got int"):
        engine(torch.zeros(1, 3, 8, 8), 5)
    expected = "^network: expected a torch.nn.Module or a diffkern Model, got"
    with pytest.raises(TypeError, match=f"{expected} function$"):
        optimize(network_of)
    with pytest.raises(TypeError, match=f"{expected} SimpleNamespace: give it the pipeline's unet$"):
        optimize(SimpleNamespace(unet=None))
    with pytest.raises(ValueError, match=r"^dtype: expected torch.float32"):
        optimize(small("plain"), dtype=torch.float64)


# --- whole sampling ---


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_sample_draws_the_same_images_with_and_without_the_engine(sampler):
    model = diffkern.load("fashion-mnist")
    options = dict(seeds=[1, 2], labels=[3, 7], guidance=2.0, sampler=sampler, steps=2, progress=False)
    expected = sample(model, engine=False, **options)
    images = sample(model, engine=True, **options)
    assert not torch.equal(images, expected)
    assert (images - expected).abs().max() < SAMPLE_ENGINE
    assert torch.equal(images, sample(optimize(model), **options))


# --- diffusers ---


@pytest.mark.parametrize("name", COVERING_CONFIGS)
def test_optimize_takes_what_diffusers_builds(name):
    network = UNet(**config_of(name) | dict(blocks=1))
    twin = with_random_weights(diffusers_twin(network)).eval().requires_grad_(False)
    fast = optimize(twin)
    x, t, labels = inputs(network)
    expected = call_twin(twin, x, t, labels)
    assert_close(call_twin(fast, x, t, labels), expected)
    assert fast.config is twin.config
    twin.conv_out.bias.add_(1)
    assert_close(call_twin(fast, x, t, labels), expected + 1)


def test_a_diffusers_pipeline_runs_on_the_engine():
    from diffusers import DDIMPipeline, DDIMScheduler

    twin = with_random_weights(diffusers_twin(UNet(**config_of("plain")))).eval().requires_grad_(False)
    twin.register_to_config(sample_size=16)
    images = []
    for network in (twin, optimize(twin)):
        pipeline = DDIMPipeline(network, DDIMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images.append(pipeline(2, generator=generator, num_inference_steps=3, output_type="np").images)
    assert abs(images[0] - images[1]).max() < 1e-4


def test_a_network_of_diffusers_that_ours_is_not_raises_the_options_name():
    from diffusers import UNet2DModel

    common = dict(block_out_channels=(32, 64), norm_num_groups=8)
    blocks = dict(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
    for options, name in (
        (dict(time_embedding_type="fourier"), "time_embedding_type"),
        (dict(center_input_sample=True), "center_input_sample"),
        (dict(act_fn="gelu"), "act_fn"),
        (dict(mid_block_scale_factor=2**0.5), "mid_block_scale_factor"),
        (dict(up_block_types=("AttnUpBlock2D", "UpBlock2D")), "up_block_types"),
        (dict(resnet_time_scale_shift="scale_shift"), "attn_norm_num_groups"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            from_diffusers(UNet2DModel(**common | blocks | options))


# --- programs ---


def test_a_program_does_again_what_was_recorded_on_what_lies_there_now():
    x, y = torch.empty(2, 4, 6, 6).contiguous(memory_format=torch.channels_last), torch.empty(2, 5, 6, 6)
    y = y.contiguous(memory_format=torch.channels_last)
    packed = ops.pack_conv(torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    program = _C.Program()
    with program:
        torch.ops.diffkern.conv2d_out(y, x.zero_(), None, packed.tensor, 4, 5, None, None, None, 1, 1, False)
    assert len(program) == 1 and torch.equal(y, torch.zeros_like(y))
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    program.run()
    assert torch.equal(y, ops.conv2d(x, packed))


def test_one_program_is_recorded_at_a_time_and_an_error_ends_it():
    with _C.Program(), pytest.raises(RuntimeError, match="^a program is being recorded already"):
        _C.Program().__enter__()
    program = _C.Program()
    with pytest.raises(ZeroDivisionError), program:
        raise ZeroDivisionError
    ops.noise([1], (4,), step=0)
    assert len(program) == 0


def test_an_engine_in_a_model_is_a_model():
    model = optimize(diffkern.load("fashion-mnist"))
    assert isinstance(model, diffkern.Model) and is_optimized(model.network)
    assert optimize(model.network) is model.network and type(unwrapped(model.network)) is UNet
