"""The network against diffusers' ``UNet2DModel``, with the same weights loaded both ways."""

import pytest
import torch
from torch import Tensor, nn

from diffkern.unet import UNet, timestep_embedding

diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "plain": dict(),
    "ddpm_cifar10": dict(channel_mult=(1, 2, 2, 2), attention_levels=(1,), groups=32),
    "fashion_mnist": dict(
        in_channels=1, channel_mult=(1, 2, 4), attention_levels=(2,), num_classes=10, norm_eps=1e-5,
        downsample_padding=1, flip_sin_to_cos=True, freq_shift=0.0,
    ),
    "scale_shift": dict(scale_shift=True),
    "resample_blocks": dict(resample_blocks=True),
    "heads": dict(head_dim=8),
    "one_level_without_attention": dict(channel_mult=(1,), attention_levels=(), mid_attention=False),
    "attention_everywhere": dict(attention_levels=(0, 1), blocks=3),
    "class_labels": dict(num_classes=5),
    "learned_variance": dict(learned_variance=True),
    "in_and_out_channels_differ": dict(in_channels=6, out_channels=2),
    "improved_ddpm": dict(
        scale_shift=True, resample_blocks=True, head_dim=16, learned_variance=True, num_classes=3,
        flip_sin_to_cos=True, freq_shift=0.0, downsample_padding=1,
    ),
}  # fmt: skip


def config_of(name: str) -> dict:
    return dict(channels=32, channel_mult=(1, 2), attention_levels=(1,), blocks=2, groups=8) | CONFIGS[name]


def with_random_weights(network: nn.Module) -> nn.Module:
    """Of a size that keeps activations of order 1; nothing is left at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 25
        noise = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        parameter.data.copy_(1 + noise if "norm" in name and name.endswith("weight") else noise)
    return network


def diffusers_twin(unet: UNet) -> nn.Module:
    """The same network by diffusers' names of things."""
    c = unet.config
    levels = range(len(c["channel_mult"]))

    def block_type(level: int, side: str) -> str:
        if level in c["attention_levels"]:
            return f"Attn{side}Block2D"
        return f"Resnet{side}sampleBlock2D" if c["resample_blocks"] else f"{side}Block2D"

    return diffusers.UNet2DModel(
        in_channels=c["in_channels"],
        out_channels=c["out_channels"] * (2 if c["learned_variance"] else 1),
        block_out_channels=tuple(c["channels"] * m for m in c["channel_mult"]),
        layers_per_block=c["blocks"],
        down_block_types=tuple(block_type(level, "Down") for level in levels),
        up_block_types=tuple(block_type(level, "Up") for level in reversed(levels)),
        add_attention=c["mid_attention"],
        attention_head_dim=c["head_dim"],
        norm_num_groups=c["groups"],
        attn_norm_num_groups=c["groups"],  # or its middle attention would have none beside scale-shift blocks
        norm_eps=c["norm_eps"],
        downsample_padding=c["downsample_padding"],
        downsample_type="resnet" if c["resample_blocks"] else "conv",
        upsample_type="resnet" if c["resample_blocks"] else "conv",
        resnet_time_scale_shift="scale_shift" if c["scale_shift"] else "default",
        num_class_embeds=None if c["num_classes"] is None else c["num_classes"] + 1,
        flip_sin_to_cos=c["flip_sin_to_cos"],
        freq_shift=c["freq_shift"],
    )


def inputs(unet: UNet, size: int = 16) -> tuple[Tensor, Tensor, Tensor | None]:
    x = torch.randn(3, unet.config["in_channels"], size, size, generator=torch.Generator().manual_seed(1))
    classes = unet.config["num_classes"]
    return x, torch.tensor([0, 500, 999]), None if classes is None else torch.tensor([-1, 0, classes - 1])


def call_twin(twin: nn.Module, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
    null = labels is not None and twin.class_embedding.num_embeddings - 1
    return twin(x, t, class_labels=None if labels is None else torch.where(labels < 0, null, labels)).sample


def assert_close(got: Tensor, expected: Tensor, what: str = "") -> None:
    """float32 sums in another order: an error beside the largest value."""
    error, scale = (got - expected).abs().max(), expected.abs().max()
    assert error <= 3e-5 * scale, f"{what}: {error} of {scale}"


@pytest.mark.parametrize("name", CONFIGS)
def test_unet_gives_what_diffusers_gives_with_its_weights(name):
    unet = UNet(**config_of(name))
    twin = with_random_weights(diffusers_twin(unet))
    unet.load_state_dict(twin.state_dict())
    with torch.no_grad():
        expected = call_twin(twin, *inputs(unet))
        assert expected.std() > 0.1
        assert_close(unet(*inputs(unet)), expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_gives_what_unet_gives_with_our_weights_and_so_do_all_gradients(name):
    unet = with_random_weights(UNet(**config_of(name)))
    twin = diffusers_twin(unet)
    twin.load_state_dict(unet.state_dict())
    results = []
    for network, call in ((unet, UNet.__call__), (twin, call_twin)):
        x, t, labels = inputs(unet)
        out = call(network, x.requires_grad_(), t, labels)
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(incoming)
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        results.append((out.detach(), x.grad, gradients))
    (out, grad_x, gradients), (expected_out, expected_grad_x, expected_gradients) = results
    assert_close(out, expected_out)
    assert_close(grad_x, expected_grad_x)
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max() for gradient in expected_gradients.values())
    for name, expected in expected_gradients.items():
        # the keys' bias adds the same to every score of a query: its true gradient is 0
        error, scale = (gradients[name] - expected).abs().max(), expected.abs().max()
        assert error <= 1e-4 * scale + 1e-6 * largest, f"{name}: {error} of {scale}"


def test_the_memory_format_of_the_image_changes_nothing():
    unet = with_random_weights(UNet(**config_of("plain")))
    x, t, _ = inputs(unet)
    with torch.no_grad():
        expected = unet(x, t)
        assert torch.equal(unet(x.contiguous(memory_format=torch.channels_last), t), expected)
        assert torch.equal(unet(x.transpose(2, 3).contiguous().transpose(2, 3), t), expected)


def test_images_need_not_be_square():
    unet = with_random_weights(UNet(**config_of("ddpm_cifar10")))
    twin = diffusers_twin(unet)
    twin.load_state_dict(unet.state_dict())
    x = torch.randn(2, 3, 8, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(unet(x, torch.tensor([3, 4])), call_twin(twin, x, torch.tensor([3, 4]), None))


def test_a_sample_does_not_feel_the_others_of_its_batch():
    unet = with_random_weights(UNet(**config_of("class_labels")))
    x, t, labels = inputs(unet)
    with torch.no_grad():
        batch = unet(x, t, labels)
        for n in range(3):
            assert_close(unet(x[n : n + 1], t[n : n + 1], labels[n : n + 1]), batch[n : n + 1])


def test_a_fresh_network_predicts_zero_and_learns():
    unet = UNet(**config_of("plain"))
    x, t, _ = inputs(unet)
    out = unet(x, t)
    assert torch.equal(out, torch.zeros_like(out))
    (out - 1).square().mean().backward()
    assert unet.conv_out.weight.grad.abs().max() > 0


def test_no_labels_mean_the_null_class_and_labels_matter():
    unet = with_random_weights(UNet(**config_of("class_labels")))
    x, t, _ = inputs(unet)
    with torch.no_grad():
        null = unet(x, t)
        assert torch.equal(null, unet(x, t, torch.full((3,), -1)))
        assert not torch.allclose(null, unet(x, t, torch.tensor([0, 1, 2])), atol=1e-2)


def test_dropout_is_there_in_training_and_not_in_evaluation():
    unet = with_random_weights(UNet(**config_of("plain"), dropout=0.5))
    x, t, _ = inputs(unet)
    with torch.no_grad():
        torch.manual_seed(0)
        assert not torch.equal(unet(x, t), unet(x, t))
        unet.eval()
        assert torch.equal(unet(x, t), unet(x, t))


@pytest.mark.parametrize("name", ["plain", "improved_ddpm"])
def test_bfloat16_weights_and_autocast_stay_close_to_float32(name):
    unet = with_random_weights(UNet(**config_of(name)))
    arguments = inputs(unet)
    with torch.no_grad():
        expected = unet(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = unet(*arguments)
        x, *rest = arguments
        low = unet.bfloat16()(x.bfloat16(), *rest)
    assert low.dtype == torch.bfloat16
    for out in (autocast, low):
        assert (out.float() - expected).std() < 0.05 * expected.std()


@pytest.mark.parametrize("flip_sin_to_cos", [False, True])
@pytest.mark.parametrize("freq_shift", [0.0, 1.0])
@pytest.mark.parametrize("dim", [32, 128])
def test_timestep_embedding_is_its_formula_in_float64(flip_sin_to_cos, freq_shift, dim):
    t = torch.arange(1000)
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - freq_shift))
    angle = t.double()[:, None] * frequency
    halves = (angle.cos(), angle.sin()) if flip_sin_to_cos else (angle.sin(), angle.cos())
    got = timestep_embedding(t, dim, flip_sin_to_cos=flip_sin_to_cos, freq_shift=freq_shift)
    # float32 angles up to 999 have an error of a few times 999 * 2^-24
    torch.testing.assert_close(got.double(), torch.cat(halves, 1), rtol=0, atol=3e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x_t=torch.zeros(3, 1, 4, 4)), "x_t: expected [N, 3, H, W] with H and W divisible by 2, got (3, 1, 4, 4)"),
        (dict(x_t=torch.zeros(3, 3, 5, 4)), "x_t: expected [N, 3, H, W] with H and W divisible by 2, got (3, 3, 5, 4)"),
        (dict(x_t=torch.zeros(3, 4, 4)), "x_t: expected [N, 3, H, W] with H and W divisible by 2, got (3, 4, 4)"),
        (dict(t=torch.tensor([1, 2])), "t: expected shape (3,), got (2,)"),
        (dict(t=torch.tensor(1)), "t: expected shape (3,), got ()"),
        (dict(labels=torch.tensor([1])), "labels: expected shape (3,), got (1,)"),
    ],
)  # fmt: skip
def test_a_wrong_input_raises_its_message(change, message):
    unet = UNet(**config_of("class_labels"))
    x, t, labels = inputs(unet)
    with pytest.raises(ValueError) as raised:
        unet(**dict(x_t=x, t=t, labels=labels) | change)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(groups=5), "groups: expected a divisor of every width [32, 64], got 5"),
        (dict(head_dim=7), "head_dim: expected a divisor of level 1's width 64, got 7"),
    ],
)
def test_a_wrong_config_raises_its_message(config, message):
    with pytest.raises(ValueError) as raised:
        UNet(**config_of("plain") | config)
    assert str(raised.value) == message


def test_labels_without_classes_raise():
    unet = UNet(**config_of("plain"))
    with pytest.raises(ValueError, match="^labels: expected None, this network has no classes"):
        unet(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.tensor([0]))
