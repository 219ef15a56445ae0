"""FlopCounterMode counts our network and its ops as it counts torch's."""

import pytest
import torch
from networks import call_twin, config_of, diffusers_twin, inputs
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffkern import UNet, ops, optimize


def flops(f) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["class_labels", "improved_ddpm"])
def test_the_network_and_the_engine_count_as_diffusers_network(name):
    unet = UNet(**config_of(name)).eval().requires_grad_(False)
    twin, (x, t, labels) = diffusers_twin(unet), inputs(unet, size=8)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # the CPU's own attention is not counted
        expected = flops(lambda: call_twin(twin, x, t, labels))
    engine = optimize(unet)
    engine(x, t, labels)
    assert expected > 1e7 and flops(lambda: unet(x, t, labels)) == flops(lambda: engine(x, t, labels)) == expected


@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)])
def test_the_gradients_of_a_convolution_count_as_torchs(learns):
    leaves = [values(*shape).requires_grad_(of) for shape, of in zip(((2, 5, 6, 7), (4, 5, 3, 3)), learns, strict=True)]
    ours = flops(lambda: ops.conv3x3(*leaves).sum().backward())
    assert ours == flops(lambda: F.conv2d(*leaves, padding=1).sum().backward()) > 0


def test_attention_counts_two_products_and_its_gradients_five():
    q, k, v = values(2, 3, 5, 8), values(2, 3, 7, 8), values(2, 3, 7, 8)
    product = 2 * (2 * 3) * 5 * 7 * 8
    assert flops(lambda: ops.attention(q, k, v)) == 2 * product
    assert flops(lambda: ops.attention(q.requires_grad_(), k, v).sum().backward()) == 7 * product


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("pack", ["pack_conv", "terms", "pack_taps", "expand_taps", "pack_upsampling"])
def test_a_packed_convolution_counts_as_a_direct_one(kernel, pack):
    weight, x, skip = values(70, 40, kernel, kernel), values(2, 30, 6, 6), values(2, 10, 6, 6)
    if kernel == 1 and pack in ("pack_taps", "expand_taps", "pack_upsampling"):
        pytest.skip("for kernels of 3x3")
    packed = {
        "pack_conv": lambda: ops.pack_conv(weight),
        "terms": lambda: ops.pack_conv(weight, terms=2),
        "pack_taps": lambda: ops.pack_taps(weight),
        "expand_taps": lambda: ops.expand_taps(ops.pack_taps(weight)),
        "pack_upsampling": lambda: ops.pack_upsampling(weight, terms=1),
    }[pack]()
    upsample, padding = pack == "pack_upsampling", kernel // 2
    image = F.interpolate(torch.cat((x, skip), 1), scale_factor=2.0) if upsample else torch.cat((x, skip), 1)
    expected = flops(lambda: F.conv2d(image, weight, padding=padding))
    options = dict(out_channels=70, padding=padding, skip=skip, upsample=upsample)
    assert flops(lambda: ops.conv2d(x, packed, **options)) == expected
