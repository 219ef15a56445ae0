"""The network against diffusers' ``UNet2DModel``, with the same weights loaded both ways."""

import pytest
import torch
from networks import CONFIGS, assert_close, call_twin, config_of, diffusers_twin, inputs, with_random_weights

from diffkern.engine import optimize
from diffkern.unet import UNet, timestep_embedding


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
        (dict(channel_mult=(1, 1.5)), "channel_mult: expected ints >= 1, got 1.5"),
        (dict(channel_mult=(1, 0)), "channel_mult: expected ints >= 1, got (1, 0)"),
        (dict(blocks=0), "blocks: expected an int >= 1, got 0"),
        (dict(num_classes=-1), "num_classes: expected an int >= 1, got -1"),
        (dict(in_channels=0), "in_channels: expected an int >= 1, got 0"),
        (dict(out_channels=True), "out_channels: expected an int >= 1, got True"),
        (dict(downsample_padding=2), "downsample_padding: expected an int in 0..1, got 2"),
        (dict(norm_eps=-1e-5), "norm_eps: expected a number >= 0, got -1e-05"),
        (dict(dropout=1.5), "dropout: expected a number in [0, 1], got 1.5"),
    ],
)
def test_a_wrong_config_raises_its_message(config, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        UNet(**config_of("plain") | config)
    assert str(raised.value) == message


def test_the_first_level_may_be_wider_than_channels():
    unet = with_random_weights(UNet(**config_of("plain") | dict(channel_mult=(2, 3), groups=16))).eval()
    x, t, labels = inputs(unet)
    with torch.no_grad():
        out = unet(x, t, labels)
        assert out.shape == x.shape and out.std() > 0.1
        assert_close(optimize(unet)(x, t, labels), out)


def test_labels_without_classes_raise():
    unet = UNet(**config_of("plain"))
    with pytest.raises(ValueError, match="^labels: expected None, this network has no classes"):
        unet(torch.zeros(1, 3, 8, 8), torch.tensor([1]), torch.tensor([0]))


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
