"""The convolution of training and its gradients, against float64: every shape, layout, CPU level and thread count."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import laid_out, layouts
from levels import WIDTHS, values
from networks import config_of, diffusers_twin, inputs, with_random_weights
from test_conv2d import SHAPES
from tolerances import UNET, winograd
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import ops, reference
from diffkern.unet import Conv3x3, UNet

_ops = torch.ops.diffkern

# samples, channels, out channels, height, width: also maps smaller than a tile, and tiles in several parts
ALL_SHAPES = [*SHAPES, (5, 8, 33, 2, 2), (9, 20, 20, 32, 32), (3, 64, 96, 18, 50)]


def arguments(n: int, c: int, k: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, and a gradient of the result."""
    weight = values((k, c, 3, 3), scale=(9 * c) ** -0.5, seed=1)
    return values((n, c, h, w)), weight, values((k,), seed=2), values((n, k, h, w), seed=3)


def with_gradients(op, grad_y: Tensor, *inputs: Tensor) -> list[Tensor]:
    """[y, grad_x, grad_weight, grad_bias]"""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    y = op(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def assert_exact(x: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor) -> None:
    """Within float32 arithmetic: y adds up C products, grad_x K, grad_weight one for each pixel."""
    results = with_gradients(ops.conv3x3, grad_y, x, weight, bias)
    wide = [tensor.double() for tensor in (grad_y, x, weight, bias)]
    expected = with_gradients(reference.conv3x3, *wide)
    sizes = with_gradients(reference.conv3x3, *(tensor.abs() for tensor in wide))
    depth = max(*weight.shape[:2], grad_y[:, 0].numel())
    for result, exact, size in zip(results, expected, sizes, strict=True):
        assert result.dtype == torch.float32 and result.shape == exact.shape
        if result.numel():
            assert (result.double() - exact).abs().max() <= winograd(depth) * size.max()


# --- the definition ---


@pytest.mark.parametrize("shape", ALL_SHAPES, ids=str)
def test_conv3x3_and_its_gradients_are_their_definitions(shape):
    assert_exact(*arguments(*shape))


@given(
    sizes=st.tuples(*(st.integers(*bounds) for bounds in ((0, 3), (1, 70), (1, 70), (1, 9), (1, 9)))),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_conv3x3_takes_every_size_and_layout(sizes, data):
    x, weight, bias, grad_y = arguments(*sizes)
    x, weight, grad_y = (laid_out(tensor, **data.draw(layouts(4))) for tensor in (x, weight, grad_y))
    assert_exact(x, weight, laid_out(bias, **data.draw(layouts(1))), grad_y)


@pytest.mark.parametrize("empty", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_the_gradient_of_nothing_is_zero(empty):
    n, h, w = empty
    x, weight, bias, grad_y = arguments(n, 5, 7, h, w)
    y, grad_x, grad_weight, grad_bias = with_gradients(ops.conv3x3, grad_y, x, weight, bias)
    assert y.shape == (n, 7, h, w) and grad_x.shape == x.shape
    assert not grad_weight.any() and not grad_bias.any()


@pytest.mark.parametrize("n", [0, 2])
def test_no_output_channels_give_an_empty_result_and_a_gradient_of_zero(n):
    inputs, grad_y = (values((n, 3, 4, 5)), torch.zeros(0, 3, 3, 3), torch.zeros(0)), torch.zeros(n, 0, 4, 5)
    y, *gradients = with_gradients(ops.conv3x3, grad_y, *inputs)
    assert torch.equal(y, grad_y)
    for gradient, like in zip(gradients, inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(like))


def test_results_lie_in_memory_as_the_network_wants_them():
    last = [tensor.contiguous(memory_format=torch.channels_last) for tensor in arguments(2, 20, 30, 8, 12)[:2]]
    for x, weight in ((*arguments(2, 20, 30, 8, 12)[:2],), last):
        y = ops.conv3x3(x, weight)
        gradients = _ops.conv3x3_backward(y, x, weight, True, True)
        for result in (y, *gradients):
            assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, ops.conv3x3(*last))


def test_packed_taps_are_the_references():
    for k, c in ((1, 1), (5, 3), (32, 16), (70, 33), (64, 128)):
        weight = values((k, c, 3, 3))
        for memory_format in (torch.contiguous_format, torch.channels_last):
            laid = weight.contiguous(memory_format=memory_format)
            assert torch.equal(ops.pack_taps(laid).tensor, reference.pack_taps(weight).tensor)


# --- gradients that are asked for ---


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_that_are_asked_for_are_made(wanted):
    inputs, grad_y = arguments(2, 5, 7, 6, 6)[:3], values((2, 7, 6, 6), seed=3)
    expected = with_gradients(ops.conv3x3, grad_y, *inputs)[1:]
    leaves = [tensor.clone().requires_grad_(of) for tensor, of in zip(inputs, wanted, strict=True)]
    y = ops.conv3x3(*leaves)
    y.backward(grad_y)
    for leaf, of, gradient in zip(leaves, wanted, expected, strict=True):
        assert torch.equal(leaf.grad, gradient) if of else leaf.grad is None
    grad_x, grad_weight = _ops.conv3x3_backward(grad_y, *inputs[:2], *wanted[:2])
    assert [bool(grad_x.numel()), bool(grad_weight.numel())] == list(wanted[:2])


def test_a_second_derivative_is_refused():
    x, weight, bias, _ = arguments(1, 2, 3, 4, 4)
    y = ops.conv3x3(x.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match="create_graph: expected False, for conv3x3 can be differentiated once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# --- the same bits ---


@pytest.mark.parametrize("shape", [(5, 48, 70, 12, 10), (9, 130, 200, 4, 4), (2, 3, 16, 33, 40)], ids=str)
def test_the_bits_depend_on_no_thread_count(shape):
    *inputs, grad_y = arguments(*shape)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = with_gradients(ops.conv3x3, grad_y, *inputs)[:3]
        for count in range(2, 9):
            torch.set_num_threads(count)
            for result, one_thread in zip(with_gradients(ops.conv3x3, grad_y, *inputs), expected, strict=False):
                assert torch.equal(result, one_thread)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(40, 48, 70, 12, 10), (9, 130, 200, 4, 4)], ids=str)
def test_a_samples_bits_depend_on_no_batch(shape):
    x, weight, bias, grad_y = arguments(*shape)
    y, grad_x, *_ = with_gradients(ops.conv3x3, grad_y, x, weight, bias)
    for of in (slice(0, 1), slice(3, None)):
        part, grad_part, *_ = with_gradients(ops.conv3x3, grad_y[of], x[of], weight, bias)
        assert torch.equal(part, y[of]) and torch.equal(grad_part, grad_x[of])


def test_nothing_is_read_outside_a_sample():
    x, weight, bias, grad_y = arguments(3, 5, 20, 6, 6)
    alone = with_gradients(ops.conv3x3, grad_y[1:2], x[1:2], weight, bias)
    x[::2], grad_y[::2] = torch.nan, torch.inf
    y, grad_x, *_ = with_gradients(ops.conv3x3, grad_y, x, weight, bias)
    assert torch.equal(y[1:2], alone[0]) and torch.equal(grad_x[1:2], alone[1])


AT_A_LEVEL = """
from test_conv3x3 import ALL_SHAPES, arguments, assert_exact

for shape in ALL_SHAPES:
    assert_exact(*arguments(*shape))
"""


def test_each_cpu_level_is_exact(at_every_level):
    at_every_level(AT_A_LEVEL, WIDTHS)


# --- in the network ---


def gradients(network: nn.Module, out: Tensor) -> dict[str, Tensor]:
    """The gradients of the parameters, by their names."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(out.square().mean(), parameters), strict=True))


def test_the_networks_gradients_are_those_of_diffusers_network():
    """In float64. Without attention, whose keys' biases have no gradient but rounding's."""
    unet = with_random_weights(UNet(**config_of("plain") | dict(attention_levels=(), mid_attention=False)))
    twin = diffusers_twin(unet)
    twin.load_state_dict(unet.state_dict())
    twin.double()
    x, t, _ = inputs(unet)
    ours, exact = gradients(unet, unet(x, t)), gradients(twin, twin(x.double(), t).sample)
    for name, gradient in ours.items():
        assert (gradient - exact[name]).abs().max() <= UNET * exact[name].abs().max(), name
        assert gradient.stride() == unet.get_parameter(name).stride(), name  # or accumulating it would be a copy


def test_the_module_is_a_conv2d_that_chooses(monkeypatch):
    """By the kernel on a CPU in float32; else, under autocast too, as every ``Conv2d``."""
    module, x = Conv3x3(5, 7, 3, padding=1), values((2, 5, 6, 6))
    twin = nn.Conv2d(5, 7, 3, padding=1)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(module(x), ops.conv3x3(x, module.weight, module.bias))
    monkeypatch.setattr(ops, "conv3x3", None)
    assert torch.equal(module.double()(x.double()), twin.double()(x.double()))
    module, twin = module.float(), twin.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), twin(x))
    assert module.to("meta")(x.to("meta")).shape == (2, 7, 6, 6)


def test_the_reference_is_torchs_convolution():
    x, weight, bias, _ = arguments(2, 5, 7, 6, 9)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(reference.conv3x3(x, weight, bias).double(), expected, rtol=0, atol=1e-5)
