"""The network against diffusers' ``UNet2DModel``, with the same weights loaded both ways."""

import json

import numpy as np
import pytest
import torch
from networks import CONFIGS, assert_close, call_twin, config_of, diffusers_twin, inputs, with_random_weights
from torch import nn

from diffkern.engine import optimize
from diffkern.networks import AttentionBlock
from diffkern.unet import Conv3x3, UNet, timestep_embedding


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
        (dict(groups=0), "groups: expected an int >= 1, got 0"),
        (dict(channels=36, groups=8), "groups: expected a divisor of every width [36, 72], got 8"),
        (dict(head_dim=7), "head_dim: expected a divisor of level 1's width 64, got 7"),
        (dict(head_dim=48, attention_levels=()), "head_dim: expected a divisor of level 1's width 64, got 48"),
        (dict(head_dim=128), "head_dim: expected a divisor of level 1's width 64, got 128"),
        (dict(head_dim=0), "head_dim: expected an int >= 1, got 0"),
        (dict(attention_levels=(0, 7)), "attention_levels: expected ints in 0..1, got (0, 7)"),
        (dict(attention_levels=(-1,)), "attention_levels: expected ints in 0..1, got (-1,)"),
        (dict(attention_levels=1), "attention_levels: expected a sequence of ints, got 1"),
        (dict(channels=0), "channels: expected an int >= 1, got 0"),
        (dict(channels=33, groups=1), "channels: expected an even int, half of them sines, got 33"),
        (dict(channels=2, groups=1), "freq_shift: expected a number below channels / 2 = 1, got 1.0"),
        (dict(channel_mult=()), "channel_mult: expected at least one level, got none"),
        (dict(channel_mult=(1, 1.51)), "channel_mult: expected a whole number of channels, times 32, got 1.51"),
        (dict(channel_mult=(1, 0)), "channel_mult: expected a whole number of channels, times 32, got 0"),
        (dict(heads=7), "heads: expected a divisor of level 1's width 64, got 7"),
        (dict(heads=2, head_dim=8), "heads: expected None beside head_dim = 8, got 2"),
        (dict(embedding_channels=33), "embedding_channels: expected an even int, half of them sines, got 33"),
        (dict(blocks=0), "blocks: expected an int >= 1, got 0"),
        (dict(num_classes=-1), "num_classes: expected an int >= 1, got -1"),
        (dict(in_channels=0), "in_channels: expected an int >= 1, got 0"),
        (dict(out_channels=True), "out_channels: expected an int >= 1, got True"),
        (dict(downsample_padding=2), "downsample_padding: expected an int in 0..1, got 2"),
        (dict(norm_eps=-1e-5), "norm_eps: expected a number >= 0, got -1e-05"),
        (dict(scale_shift=1), "scale_shift: expected True or False, got 1"),
        (dict(mid_attention=None), "mid_attention: expected True or False, got None"),
        (dict(learned_variance=0), "learned_variance: expected True or False, got 0"),
        (dict(dropout=1.5), "dropout: expected a number in [0, 1], got 1.5"),
    ],
)
def test_a_wrong_config_raises_its_message(config, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        UNet(**config_of("plain") | config)
    assert str(raised.value) == message


def test_options_of_any_number_type_are_kept_as_python_s():
    options = dict(channels=np.int64(32), channel_mult=[np.int8(1)], norm_eps=np.float32(0.5))
    config = UNet(**options, attention_levels=()).config
    assert [type(config[name]) for name in ("channels", "norm_eps", "freq_shift")] == [int, float, float]
    assert type(config["channel_mult"][0]) is int and json.loads(json.dumps(config))["norm_eps"] == 0.5


def test_heads_are_counted_and_the_embedding_has_a_width_of_its_own():
    options = config_of("plain") | dict(channel_mult=(1, 1.5), attention_levels=(0, 1))
    unet = with_random_weights(UNet(**options, heads=4, embedding_channels=64)).eval()
    blocks = [m for m in unet.modules() if isinstance(m, AttentionBlock)]
    assert {(m.heads, m.to_q.in_features) for m in blocks} == {(4, 32), (4, 48)}
    assert unet.time_embedding.linear_1.weight.shape == (256, 64)
    x, t, labels = inputs(unet)
    with torch.no_grad():
        assert_close(optimize(unet)(x, t, labels), unet(x, t, labels))


def test_a_time_that_is_no_whole_number_is_told_to_the_engine_as_it_is():
    unet = with_random_weights(UNet(**config_of("plain"))).eval()
    x, _, labels = inputs(unet)
    with torch.no_grad():
        t = torch.tensor([0.25, 1.5, -1.2])
        assert_close(optimize(unet)(x, t, labels), unet(x, t, labels))
        assert not torch.allclose(unet(x, t.trunc(), labels), unet(x, t, labels), atol=1e-2)


def test_the_first_level_may_be_wider_than_channels():
    unet = with_random_weights(UNet(**config_of("plain") | dict(channel_mult=(2, 3), groups=16))).eval()
    x, t, labels = inputs(unet)
    with torch.no_grad():
        out = unet(x, t, labels)
        assert out.shape == x.shape and out.std() > 0.1
        assert_close(optimize(unet)(x, t, labels), out)


@pytest.mark.parametrize("optimized", [False, True])
def test_a_label_out_of_range_raises(optimized):
    unet = with_random_weights(UNet(**config_of("class_labels"))).eval().requires_grad_(False)
    network, (x, t, _) = optimize(unet) if optimized else unet, inputs(unet, size=4)
    for label in (5, 6, -2):
        with pytest.raises(ValueError, match=f"^labels: expected values in -1..4, got {label}$"):
            network(x, t, torch.tensor([0, label, 0]))


def test_a_label_that_cannot_be_looked_at_gives_nan_out_of_range():
    unet = with_random_weights(UNet(**config_of("class_labels"))).eval().requires_grad_(False)
    x, t, _ = inputs(unet, size=4)
    labels = torch.tensor([-1, 0, 4, 5, 6, -2])
    x, t = x[:1].expand(6, -1, -1, -1), t[:1].expand(6)
    out = torch.vmap(lambda x, t, label: unet(x[None], t[None], label[None])[0])(x, t, labels)
    assert out.isnan().flatten(1).all(1).tolist() == out.isnan().flatten(1).any(1).tolist() == 3 * [False] + 3 * [True]
    assert_close(out[:3], unet(x[:3], t[:3], labels[:3]))


def test_labels_without_classes_raise():
    unet = UNet(**config_of("plain"))
    with pytest.raises(ValueError, match="^labels: expected None, this network has no classes"):
        unet(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.tensor([0]))


class LowRank(nn.Module):
    """A layer and a product of two narrow ones beside it, made by the layer's own class (Hu et al. 2021)."""

    def __init__(self, layer: nn.Conv2d, rank: int = 2):
        super().__init__()
        kind, settings = type(layer), dict(stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        self.layer = layer
        self.down = kind(layer.in_channels, rank, layer.kernel_size, **settings, bias=False)
        self.up = kind(rank, layer.out_channels, (1, 1), (1, 1), bias=False)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def test_convolutions_take_low_rank_layers_of_their_own_class():
    unet = with_random_weights(UNet(**config_of("plain"))).eval().requires_grad_(False)
    x, t, _ = inputs(unet, size=8)
    expected = unet(x, t)
    conv = unet.down_blocks[0].resnets[0].conv1
    unet.down_blocks[0].resnets[0].conv1 = wrapped = LowRank(conv)
    nn.init.zeros_(wrapped.up.weight)
    assert torch.equal(unet(x, t), expected)
    with_random_weights(wrapped.up), with_random_weights(wrapped.down)
    changed, out = unet(x, t), optimize(unet)(x, t)
    assert torch.equal(changed, out) and not torch.allclose(changed, expected, atol=1e-2)
    merged = nn.functional.conv2d(wrapped.down.weight.transpose(0, 1), wrapped.up.weight).transpose(0, 1)
    conv.weight.add_(merged)
    unet.down_blocks[0].resnets[0].conv1 = conv
    assert_close(unet(x, t), changed)


@pytest.mark.parametrize(
    "settings",
    [
        dict(kernel_size=3),
        dict(kernel_size=1),
        dict(kernel_size=3, padding=1, stride=2),
        dict(kernel_size=3, padding=2, dilation=2),
        dict(kernel_size=3, padding=1, groups=2),
        dict(kernel_size=3, padding="same"),
        dict(kernel_size=3, padding=1, padding_mode="circular"),
        dict(kernel_size=(3, 3), padding=1, bias=False),
    ],
)
def test_conv3x3_is_a_conv2d_with_any_settings(settings):
    torch.manual_seed(0)
    ours, x = Conv3x3(4, 6, **settings), torch.randn(2, 4, 5, 7)
    twin = nn.Conv2d(4, 6, **settings)
    twin.load_state_dict(ours.state_dict())
    assert_close(ours(x), twin(x))


def test_circular_padding_that_is_set_later_is_used():
    unet = with_random_weights(UNet(**config_of("plain"), downsample_padding=1)).eval().requires_grad_(False)
    x, t, _ = inputs(unet, size=8)
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"
    shifted = unet(x.roll(4, dims=3), t)
    assert_close(shifted, unet(x, t).roll(4, dims=3))


def test_it_compiles_into_one_graph_forward_and_backward():
    """By the compiler's front half, which asks the fakes and the gradients of our ops; inductor comes after it."""
    unet = with_random_weights(UNet(3, channels=8, channel_mult=(1,), blocks=1, attention_levels=(0,), groups=4))
    results = []
    for network in (unet, torch.compile(unet, fullgraph=True, backend="aot_eager")):
        x, t, labels = inputs(unet)
        out = network(x.requires_grad_(), t, labels)
        out.square().mean().backward()
        results.append((out, x.grad, [parameter.grad for parameter in unet.parameters()]))
        unet.zero_grad()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)  # sums of a bias's gradient, in any order
