"""No order in which warps and blocks may run changes a bit."""

import pytest
import torch
from cases import CASES

pytestmark = pytest.mark.cuda

ORDERS = (
    1,
    pytest.param(2, marks=pytest.mark.slow),
    pytest.param(3, marks=pytest.mark.slow),
)  # beside that of their numbers


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_no_order_of_warps_and_blocks_changes_a_bit(interpreter, case, order):
    expected = CASES[case](interpreter.ops)
    with interpreter.options(seed=order):
        shuffled = CASES[case](interpreter.ops)
    for ours, theirs in zip(shuffled, expected, strict=True):
        assert torch.equal(ours, theirs)
