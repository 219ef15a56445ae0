"""Every example of every op: torch's checks of the registered op, and its results on the meta device."""

from typing import Any

import pytest
import torch
from calls import fullest, name_of, public_examples, results
from layouts import LAYOUTS, arranged

from diffkern import ops, reference
from diffkern.ops.example import Example, all_examples, modules

REGISTERED = [example for example in all_examples() if example.registered()]
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
COMPILING = ("test_aot_dispatch_dynamic",)


def arguments_of(example: Example, layout: str = "contiguous") -> dict[str, Any]:
    """The arguments of the registered op, those that it differentiates as leaves."""
    arguments = arranged(example, LAYOUTS[layout]).registered_arguments()
    if hasattr(torch.ops.diffkern, f"{example.op}_backward"):
        leaves = {name: arguments[name] for name in example.differentiable if arguments[name] is not None}
        arguments |= {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    return arguments


def is_half(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)


COMPILED = [e for e in REGISTERED if not any(map(is_half, e.registered_arguments().values()))]
FULLEST = {name_of(example) for example in fullest(COMPILED)}


def test_every_op_has_a_name_of_its_own_and_its_reference():
    for op, module in modules().items():
        if hasattr(module, "reference"):
            assert getattr(ops, op) is getattr(module, op) and getattr(reference, op) is module.reference
            assert op in ops.__all__


def test_examples_have_names_of_their_own():
    names = [(example.op, example.name) for example in all_examples()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("example", REGISTERED, ids=name_of)
def test_a_registered_op_passes_opcheck(example):
    for layout in ("contiguous", "channels_last") if example.images else ("contiguous",):
        torch.library.opcheck(example.registered(), (), arguments_of(example, layout), test_utils=QUICK)


@pytest.mark.parametrize(
    "example",
    [pytest.param(e, marks=[] if name_of(e) in FULLEST else pytest.mark.slow) for e in COMPILED],
    ids=name_of,
)
def test_a_registered_op_passes_opchecks_compiler(example):
    """In float32. In the fast suite, the examples of each op that have most arguments."""
    torch.library.opcheck(example.registered(), (), arguments_of(example), test_utils=COMPILING)


@pytest.mark.parametrize("example", public_examples(), ids=name_of)
def test_results_on_the_meta_device_have_shape_dtype_and_strides_and_no_values(example):
    function = getattr(ops, example.op)
    here, there = (results(function, example.arguments, torch.device(device)) for device in ("cpu", "meta"))
    assert len(here) == len(there) > 0
    for tensor, without_values in zip(here, there, strict=True):
        assert without_values.device.type == "meta"
        assert (without_values.shape, without_values.dtype) == (tensor.shape, tensor.dtype)
        assert without_values.stride() == tensor.stride()
