"""Every example by its CUDA kernel is the CPU's: the same bits, or within the example's tolerance."""

import pytest
import torch
from calls import cuda_examples, name_of, results
from layouts import LAYOUTS, arranged
from torch import Tensor

from diffkern.ops.example import Example

pytestmark = pytest.mark.cuda

# (C, H, W): aligned vectors; an odd size; less than a vector; several chunks and a tail
SHAPES = ((3, 8, 8), (3, 7, 5), (1, 1, 1), (2, 40, 33))


OPS = cuda_examples()
EXACT = [op for op, examples in OPS.items() if all(example.tolerance == 0 for example in examples)]
ELEMENTWISE = [op for op in OPS if not op.endswith("_") and (op in EXACT or f"{op}_backward" in EXACT)]


def assert_the_cpus(cuda, example: Example) -> None:
    arguments = example.registered_arguments()
    ours = results(getattr(cuda.ops, example.op), arguments, cuda.device)
    for got, expected in zip(ours, results(example.registered(), arguments), strict=True):
        got, name = got.cpu(), name_of(example)
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride()), name
        if example.tolerance == 0:
            assert torch.equal(bits(got), bits(expected)), name
        elif expected.numel():
            error, largest = (got.double() - expected.double()).abs().max(), expected.double().abs().max()
            assert error <= example.tolerance * max(largest, 1), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("op", OPS)
def test_every_example_is_the_cpus(cuda, op):
    for example in OPS[op]:
        assert_the_cpus(cuda, example)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", ELEMENTWISE)
def test_every_size_and_layout_is_the_cpus(cuda, op, shape, layout):
    for example in cuda_examples(**dict(zip("chw", shape, strict=True)))[op]:
        if layout == "contiguous" or (example.images and example.tolerance == 0):
            assert_the_cpus(cuda, arranged(example, LAYOUTS[layout]))


@pytest.mark.parametrize("op", OPS)
def test_an_empty_batch_launches_nothing(cuda, op):
    for example in cuda_examples(n=0)[op]:
        assert_the_cpus(cuda, example)
