"""Bad inputs, each with its error and its whole message: what a user reads who made that mistake."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from calls import moved, name_of

import diffkern
from diffkern import _C, ops
from diffkern.ops.example import Example, all_examples
from diffkern.ops.registration import kind_of


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values)


X = torch.zeros(2, 3, 4, 4)
SEEDS, Q_TABLE, STEPS, LOSSES = [1, 2], torch.zeros(10, 2), torch.zeros(5, 9), torch.zeros(5, 12)
PACKED, TAPS = (pack(torch.zeros(5, 3, 3, 3)) for pack in (ops.pack_conv, ops.pack_taps))


LONG = dict(table=torch.zeros(5, 20))
LONG_NOISY = torch.eye(1, 20).roll(9, 1)  # one row, whose sigma is 1


def noisy(t: float) -> torch.Tensor:
    """Rows whose sigma is 1, so that their t is used."""
    return torch.tensor([[0.0] * 5 + [1.0, 0.0, 0.0, t]])


def plain(value):
    """As a script says it: ints and lists of them."""
    integers = isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.ndim <= 1
    return value.tolist() if integers else value


def good_calls() -> dict:
    """Return the first example of each op, as the public function's where there is one."""
    calls = {}
    for example in all_examples(n=2, c=3, k=5, h=4, w=4):
        function = getattr(ops, example.op, None)
        public = inspect.isfunction(function)
        op = function if public else getattr(torch.ops.diffkern, example.op)
        calls.setdefault(op, {name: plain(value) if public else value for name, value in example.arguments.items()})
    return calls


GOOD = good_calls() | {_C.word_hash: dict(function="radius", first_run=0, last_run=0)}

# of each op: what is wrong in an otherwise good call, the error, its message
BAD = {
    ops.noise: [
        (dict(seeds="7"), TypeError, "seeds: expected an int, ints or an int64 tensor, got '7'"),
        (dict(seeds=1.5), TypeError, "seeds: expected an int, ints or an int64 tensor, got 1.5"),
        (dict(seeds=None), TypeError, "seeds: expected ints, got None"),
        (dict(seeds=[1, 2.5]), TypeError, "seeds: expected ints, got 2.5"),
        (dict(seeds=[True]), TypeError, "seeds: expected ints, got True"),
        (dict(seeds=True), TypeError, "seeds: expected ints, got True"),
        (dict(seeds=2**64), ValueError, "seeds: expected ints in [-2^63, 2^64), got 18446744073709551616"),
        (dict(seeds=[-(2**63) - 1]), ValueError, "seeds: expected ints in [-2^63, 2^64), got -9223372036854775809"),
        (dict(seeds=torch.zeros(2)), TypeError, "seeds: expected an int64 tensor [N], got torch.float32 of shape (2,)"),
        (
            dict(seeds=torch.zeros(2, 2, dtype=torch.int64)),
            TypeError,
            "seeds: expected an int64 tensor [N], got torch.int64 of shape (2, 2)",
        ),
        (
            dict(seeds=index(1, 2).int()),
            TypeError,
            "seeds: expected an int64 tensor [N], got torch.int32 of shape (2,)",
        ),
        (dict(seeds={1, 2}), TypeError, "seeds: expected ints, got {1, 2}"),
        (dict(seeds=b"12"), TypeError, "seeds: expected an int, ints or an int64 tensor, got b'12'"),
        (dict(seeds=["1"]), TypeError, "seeds: expected ints, got '1'"),
        (dict(shape="33"), TypeError, "shape: expected ints, got '33'"),
        (dict(shape=(3, -1)), RuntimeError, "shape: expected no negative size, got (3, -1)"),
        (dict(shape=(3, 1.5)), TypeError, "shape: expected ints, got 1.5"),
        (dict(shape=None), TypeError, "shape: expected ints, got None"),
        (dict(shape=2.0), TypeError, "shape: expected ints, got 2.0"),
        (dict(shape=-4), RuntimeError, "shape: expected no negative size, got (-4,)"),
        (dict(step=-1), RuntimeError, "step: expected values in [0, 4294967296), got -1"),
        (dict(step=2**32), RuntimeError, "step: expected values in [0, 4294967296), got 4294967296"),
        (dict(step=1.0), TypeError, "step: expected an int or an int64 tensor, got 1.0"),
        (dict(step=True), TypeError, "step: expected an int or an int64 tensor, got True"),
        (dict(step=np.array([0, 1])), TypeError, "step: expected an int or an int64 tensor, got array([0, 1])"),
        (dict(step=None), TypeError, "step: expected an int or an int64 tensor, got None"),
        (dict(step="0"), TypeError, "step: expected an int or an int64 tensor, got '0'"),
        (dict(step=torch.zeros(2)), RuntimeError, "step: expected int64, got float32"),
        (dict(step=index(1, 2, 3)), RuntimeError, "step: expected shape () or (2,), got (3,)"),
        (dict(step=index(1, 2).int()), RuntimeError, "step: expected int64, got int32"),
        (dict(step=index(0, -1)), RuntimeError, "step: expected values in [0, 4294967296), got -1"),
        (dict(step=index(0, 2**32)), RuntimeError, "step: expected values in [0, 4294967296), got 4294967296"),
        (dict(step=torch.zeros(2, 1, dtype=torch.int64)), RuntimeError, "step: expected shape () or (2,), got (2, 1)"),
        (dict(step=2**70), ValueError, "step: expected an int of 64 bits, got 1180591620717411303424"),
        (dict(step=index(0, 1).to("meta")), RuntimeError, "step: expected device cpu, got meta"),
        (dict(device="gpu"), RuntimeError, "device: expected one that is here, got 'gpu'"),
        (dict(device="cuda:99"), RuntimeError, "device: expected one that is here, got 'cuda:99'"),
        (dict(device=1.5), RuntimeError, "device: expected one that is here, got 1.5"),
        (dict(stream=-1), RuntimeError, "stream: expected a value in [0, 2^32), got -1"),
        (dict(stream=2**32), RuntimeError, "stream: expected a value in [0, 2^32), got 4294967296"),
        (dict(stream=1.5), TypeError, "stream: expected an int, got 1.5"),
        (dict(stream=None), TypeError, "stream: expected an int, got None"),
        (dict(stream="0"), TypeError, "stream: expected an int, got '0'"),
        (
            dict(shape=(10**14,)),
            RuntimeError,
            "memory: expected enough on cpu for a float32 tensor of shape (2, 100000000000000), got less",
        ),
        (
            dict(dtype=torch.float64),
            RuntimeError,
            "dtype: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(dtype=torch.int64), RuntimeError, "dtype: expected float32, bfloat16 or float16, got int64"),
        (dict(dtype="float32"), TypeError, "dtype: expected a torch.dtype, got 'float32'"),
        (dict(dtype=None), TypeError, "dtype: expected a torch.dtype, got None"),
        (dict(dtype=float), TypeError, "dtype: expected a torch.dtype, got <class 'float'>"),
        (dict(dtype=torch.complex64), RuntimeError, "dtype: expected float32, bfloat16 or float16, got another dtype"),
    ],
    ops.q_sample: [
        (dict(x_0=torch.zeros(3)), RuntimeError, "seeds: expected shape (3,), got (2,)"),
        (
            dict(x_0=torch.zeros(2, 1, 1, dtype=torch.bfloat16).expand(2, 10**7, 10**7)),
            RuntimeError,
            "memory: expected enough on cpu for a bfloat16 tensor of shape (2, 10000000, 10000000), got less",
        ),
        (
            dict(x_0=X.double()),
            RuntimeError,
            "x_0: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(x_0=X.int()), RuntimeError, "x_0: expected float32, bfloat16 or float16, got int32"),
        (dict(x_0=X.numpy()), TypeError, "x_0: expected a tensor, got array([[[[0.,...dtype=float32)"),
        (dict(x_0=None), TypeError, "x_0: expected a tensor, got None"),
        (dict(x_0=X.to("meta")), RuntimeError, "table: expected device meta, got cpu"),
        (dict(x_0=torch.zeros(())), RuntimeError, "x_0: expected [N, ...], got shape ()"),
        (dict(x_0=X.cfloat()), RuntimeError, "x_0: expected float32, bfloat16 or float16, got another dtype"),
        (dict(t=-1), RuntimeError, "t: expected values in [0, 10), got -1"),
        (dict(t=10), RuntimeError, "t: expected values in [0, 10), got 10"),
        (dict(t=index(0, 10)), RuntimeError, "t: expected values in [0, 10), got 10"),
        (dict(t=index(0, 1, 2)), RuntimeError, "t: expected shape () or (2,), got (3,)"),
        (dict(t=torch.zeros(2)), RuntimeError, "t: expected int64, got float32"),
        (dict(t=1.0), TypeError, "t: expected an int or an int64 tensor, got 1.0"),
        (dict(t=True), TypeError, "t: expected an int or an int64 tensor, got True"),
        (dict(t=None), TypeError, "t: expected an int or an int64 tensor, got None"),
        (dict(t=index(1, 2).to("meta")), RuntimeError, "t: expected device cpu, got meta"),
        (dict(t=2**70), ValueError, "t: expected an int of 64 bits, got 1180591620717411303424"),
        (dict(t=[1, 2]), TypeError, "t: expected an int or an int64 tensor, got [1, 2]"),
        (dict(seeds=[1]), RuntimeError, "seeds: expected shape (2,), got (1,)"),
        (dict(seeds=index(1, 2, 3)), RuntimeError, "seeds: expected shape (2,), got (3,)"),
        (dict(seeds=1), RuntimeError, "seeds: expected shape (2,), got (1,)"),
        (dict(seeds=torch.zeros(2)), TypeError, "seeds: expected an int64 tensor [N], got torch.float32 of shape (2,)"),
        (dict(seeds="12"), TypeError, "seeds: expected an int, ints or an int64 tensor, got '12'"),
        (dict(table=torch.zeros(10)), RuntimeError, "table: expected shape (T, 2), got (10,)"),
        (dict(table=torch.zeros(10, 3)), RuntimeError, "table: expected shape (T, 2), got (10, 3)"),
        (
            dict(table=Q_TABLE.double()),
            RuntimeError,
            "table: expected float32, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(table=torch.zeros(2, 10).t()), RuntimeError, "table: expected a contiguous tensor, got strides (1, 10)"),
        (dict(table=Q_TABLE.to("meta")), RuntimeError, "table: expected device cpu, got meta"),
        (dict(table=None), TypeError, "table: expected a tensor, got None"),
        (dict(table=[[1, 2]]), TypeError, "table: expected a tensor, got [[1, 2]]"),
        (dict(table=torch.zeros(0, 2)), RuntimeError, "t: expected values in [0, 0), got 0"),
        (dict(table=torch.zeros(10, 2, 1)), RuntimeError, "table: expected shape (T, 2), got (10, 2, 1)"),
        (dict(address=-1), RuntimeError, "address: expected values in [0, 4294967296), got -1"),
        (dict(address=index(0, 2**32)), RuntimeError, "address: expected values in [0, 4294967296), got 4294967296"),
        (dict(address=index(0, 1, 2)), RuntimeError, "address: expected shape () or (2,), got (3,)"),
        (dict(address=torch.zeros(2)), RuntimeError, "address: expected int64, got float32"),
        (dict(address=1.0), TypeError, "address: expected an int or an int64 tensor, got 1.0"),
        (dict(address=index(1, 2).to("meta")), RuntimeError, "address: expected device cpu, got meta"),
        (dict(return_eps="yes"), TypeError, "return_eps: expected True or False, got 'yes'"),
        (dict(return_eps=None), TypeError, "return_eps: expected True or False, got None"),
        (dict(return_eps=1), TypeError, "return_eps: expected True or False, got 1"),
        (
            dict(x_0=torch.zeros(2, 3, 3, 3, 3, 3, 3)[:, ::2, ::2, ::2, ::2, ::2, ::2]),
            RuntimeError,
            "x_0: expected at most 5 separate dimensions a sample, got more",
        ),
    ],
    ops.q_sample_: [
        (
            dict(x_0=torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)),
            RuntimeError,
            "x_0: expected a tensor to write to, got an expanded one",
        ),
        (
            dict(x_0=torch.zeros(2, 1, 4, 4).expand(2, 3, 4, 4)),
            RuntimeError,
            "x_0: expected a tensor to write to, got an expanded one",
        ),
        (
            dict(x_0=X.double()),
            RuntimeError,
            "x_0: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(t=10), RuntimeError, "t: expected values in [0, 10), got 10"),
        (dict(seeds=[1]), RuntimeError, "seeds: expected shape (2,), got (1,)"),
    ],
    ops.reverse_step: [
        (dict(table=noisy(-1.0)), RuntimeError, "table: expected t in [0, 2^32), got -1 in row 0"),
        (dict(table=noisy(math.nan)), RuntimeError, "table: expected t in [0, 2^32), got nan in row 0"),
        (dict(table=noisy(2.0**32)), RuntimeError, "table: expected t in [0, 2^32), got 4.29497e+09 in row 0"),
        (dict(x=torch.zeros(())), RuntimeError, "x: expected [N, ...], got shape ()"),
        (
            dict(x=torch.zeros(2), learned_variance=True),
            RuntimeError,
            "x: expected [N, C, ...], got shape (2,)",
        ),
        (
            dict(x=X.double()),
            RuntimeError,
            "x: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(x=X.half()), RuntimeError, "out: expected float16, got float32"),
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got [1.0]"),
        (dict(x=X.to("meta")), RuntimeError, "out: expected device meta, got cpu"),
        (dict(out=torch.zeros(2, 3, 4)), RuntimeError, "out: expected shape (2, 3, 4, 4), got (2, 3, 4)"),
        (dict(out=torch.zeros(2, 6, 4, 4)), RuntimeError, "out: expected shape (2, 3, 4, 4), got (2, 6, 4, 4)"),
        (dict(out=X.half()), RuntimeError, "out: expected float32, got float16"),
        (dict(out=X.to("meta")), RuntimeError, "out: expected device cpu, got meta"),
        (dict(out=None), TypeError, "out: expected a tensor, got None"),
        (dict(out=torch.zeros(1, 3, 4, 4)), RuntimeError, "out: expected shape (2, 3, 4, 4), got (1, 3, 4, 4)"),
        (dict(learned_variance=True), RuntimeError, "out: expected shape (2, 6, 4, 4), got (2, 3, 4, 4)"),
        (dict(learned_variance="yes"), TypeError, "learned_variance: expected True or False, got 'yes'"),
        (dict(learned_variance=None), TypeError, "learned_variance: expected True or False, got None"),
        (dict(out_uncond=torch.zeros(2, 3, 4)), RuntimeError, "out_uncond: expected shape (2, 3, 4, 4), got (2, 3, 4)"),
        (dict(out_uncond=X.bfloat16()), RuntimeError, "out_uncond: expected float32, got bfloat16"),
        (dict(out_uncond=X.to("meta")), RuntimeError, "out_uncond: expected device cpu, got meta"),
        (dict(out_uncond=2.0), TypeError, "out_uncond: expected a tensor or None, got 2.0"),
        (dict(guidance="3"), TypeError, "guidance: expected a number, got '3'"),
        (dict(guidance=math.nan, out_uncond=X), ValueError, "guidance: expected a finite number, got nan"),
        (dict(guidance=math.inf, out_uncond=X), ValueError, "guidance: expected a finite number, got inf"),
        (dict(guidance=None), TypeError, "guidance: expected a number, got None"),
        (dict(guidance=torch.tensor(2.0)), TypeError, "guidance: expected a number, got tensor(2.)"),
        (dict(guidance=1j), TypeError, "guidance: expected a number, got 1j"),
        (dict(guidance=True), TypeError, "guidance: expected a number, got True"),
        (dict(clip="yes"), TypeError, "clip: expected True or False, got 'yes'"),
        (dict(clip=None), TypeError, "clip: expected True or False, got None"),
        (dict(clip=1), TypeError, "clip: expected True or False, got 1"),
        (dict(table=torch.zeros(9)), RuntimeError, "table: expected shape (steps, 9), got (9,)"),
        (dict(table=torch.zeros(5, 8)), RuntimeError, "table: expected shape (steps, 9), got (5, 8)"),
        (dict(table=torch.zeros(5, 10)), RuntimeError, "table: expected shape (steps, 9), got (5, 10)"),
        (
            dict(table=STEPS.double()),
            RuntimeError,
            "table: expected float32, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(table=STEPS.to("meta")), RuntimeError, "table: expected device cpu, got meta"),
        (dict(table=torch.zeros(9, 5).t()), RuntimeError, "table: expected a contiguous tensor, got strides (1, 5)"),
        (dict(table=torch.zeros(0, 9)), RuntimeError, "step: expected values in [0, 0), got 0"),
        (dict(table=None), TypeError, "table: expected a tensor, got None"),
        (dict(step=-1), RuntimeError, "step: expected values in [0, 5), got -1"),
        (dict(step=5), RuntimeError, "step: expected values in [0, 5), got 5"),
        (dict(step=index(0, 5)), RuntimeError, "step: expected values in [0, 5), got 5"),
        (dict(step=index(0, 1, 2)), RuntimeError, "step: expected shape () or (2,), got (3,)"),
        (dict(step=index(0, 1).int()), RuntimeError, "step: expected int64, got int32"),
        (dict(step=1.0), TypeError, "step: expected an int or an int64 tensor, got 1.0"),
        (dict(step=True), TypeError, "step: expected an int or an int64 tensor, got True"),
        (dict(step=index(1).to("meta")), RuntimeError, "step: expected device cpu, got meta"),
        (dict(step=[0, 1]), TypeError, "step: expected an int or an int64 tensor, got [0, 1]"),
        (dict(seeds=[1]), RuntimeError, "seeds: expected shape (2,), got (1,)"),
        (dict(seeds=index(1, 2, 3)), RuntimeError, "seeds: expected shape (2,), got (3,)"),
        (dict(seeds=1.5), TypeError, "seeds: expected an int, ints or an int64 tensor, got 1.5"),
        (dict(seeds=[2**64, 1]), ValueError, "seeds: expected ints in [-2^63, 2^64), got 18446744073709551616"),
        (dict(seeds=torch.zeros(2)), TypeError, "seeds: expected an int64 tensor [N], got torch.float32 of shape (2,)"),
        (dict(history=[X]), RuntimeError, "table: expected shape (steps, 10), got (5, 9)"),
        (
            dict(history=[torch.zeros(2, 3, 4)], table=torch.zeros(5, 10)),
            RuntimeError,
            "history: expected shape (2, 3, 4, 4), got (2, 3, 4)",
        ),
        (dict(history=[X.half()], table=torch.zeros(5, 10)), RuntimeError, "history: expected float32, got float16"),
        (dict(history=[X] * 7, table=torch.zeros(5, 16)), RuntimeError, "history: expected at most 6 tensors, got 7"),
        (
            dict(history=X, table=torch.zeros(5, 11)),
            TypeError,
            "history: expected a list of tensors, got tensor([[[[0....., 0., 0.]]]])",
        ),
        (dict(history=None), TypeError, "history: expected a list of tensors, got None"),
        (dict(history=3), TypeError, "history: expected a list of tensors, got 3"),
        (dict(history=[None], table=torch.zeros(5, 10)), TypeError, "history: expected tensors, got None"),
        (
            dict(history=[X.to("meta")], table=torch.zeros(5, 10)),
            RuntimeError,
            "history: expected device cpu, got meta",
        ),
        (
            dict(address=index(0, 1).expand(5, 2)),
            RuntimeError,
            "address: expected None with short rows, got a tensor",
        ),
        (dict(grad=X), RuntimeError, "grad: expected None with short rows, got a tensor"),
        (dict(known=X, mask=X), RuntimeError, "known: expected None with short rows, got a tensor"),
        (
            dict(return_kept=True),
            ValueError,
            "return_kept: expected False with short rows, which have return_x0, got True",
        ),
        (
            LONG | dict(return_x0=True),
            ValueError,
            "return_x0: expected False with long rows, which have return_kept, got True",
        ),
        (LONG | dict(clip=True), ValueError, "clip: expected False with long rows, which have a limit, got True"),
        (
            LONG | dict(guidance=2.5),
            ValueError,
            "guidance: expected 1 with long rows, which have w, got 2.5",
        ),
        (dict(table=torch.zeros(5, 21)), RuntimeError, "table: expected shape (steps, 20), got (5, 21)"),
        (dict(table=torch.zeros(5, 32)), RuntimeError, "table: expected shape (steps, 20), got (5, 32)"),
        (
            dict(table=torch.zeros(5, 20), history=[X]),
            RuntimeError,
            "table: expected shape (steps, 24), got (5, 20)",
        ),
        (
            dict(table=torch.zeros(101)[1:].view(5, 20)),
            RuntimeError,
            "table: expected memory at a multiple of 16 bytes, got 4 beyond one",
        ),
        (
            LONG | dict(out=None, out_uncond=X),
            RuntimeError,
            "out_uncond: expected None without out, got a tensor",
        ),
        (
            LONG | dict(out=None, learned_variance=True),
            RuntimeError,
            "learned_variance: expected False without out, got True",
        ),
        (LONG | dict(out=3), TypeError, "out: expected a tensor or None, got 3"),
        (LONG | dict(known=X), RuntimeError, "mask: expected a tensor with known, got None"),
        (LONG | dict(mask=X), RuntimeError, "known: expected a tensor with mask, got None"),
        (LONG | dict(grad=X.half()), RuntimeError, "grad: expected float32, got float16"),
        (LONG | dict(grad=X[:1]), RuntimeError, "grad: expected shape (2, 3, 4, 4), got (1, 3, 4, 4)"),
        (LONG | dict(known=X[:, :1], mask=X), RuntimeError, "known: expected shape (2, 3, 4, 4), got (2, 1, 4, 4)"),
        (
            LONG | dict(known=X, mask=X[:, :2]),
            RuntimeError,
            "mask: expected shape (2, 3, 4, 4) or 1 in place of any size, got (2, 2, 4, 4)",
        ),
        (LONG | dict(known=X, mask=X > 0), RuntimeError, "mask: expected float32, got another dtype"),
        (LONG | dict(known=X, mask=X.to("meta")), RuntimeError, "mask: expected device cpu, got meta"),
        (LONG | dict(address=index(0, 1)), RuntimeError, "address: expected shape (5, 2), got (2,)"),
        (LONG | dict(address=torch.zeros(5, 2)), RuntimeError, "address: expected int64, got float32"),
        (LONG | dict(address=7), TypeError, "address: expected a tensor or None, got 7"),
        (
            dict(table=LONG_NOISY),
            RuntimeError,
            "address: expected a tensor, for row 0 draws noise, got None",
        ),
        *(
            (
                dict(table=LONG_NOISY, address=torch.tensor([[address, count]])),
                RuntimeError,
                f"address: expected 1 <= count <= address + 1 and address < 2^32, got count {count} and address "
                f"{address} in row 0",
            )
            for address, count in ((-1, 1), (2**32, 1), (5, 0), (5, 7), (2**63 - 1, 2**63 - 1))
        ),
        (dict(return_x0="yes"), TypeError, "return_x0: expected True or False, got 'yes'"),
        (dict(return_x0=None), TypeError, "return_x0: expected True or False, got None"),
    ],
    ops.reverse_step_: [
        (
            dict(x=torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)),
            RuntimeError,
            "x: expected a tensor to write to, got an expanded one",
        ),
        (dict(x0_hat=torch.zeros(2, 3, 4)), RuntimeError, "x0_hat: expected shape (2, 3, 4, 4), got (2, 3, 4)"),
        (dict(x0_hat=X.half()), RuntimeError, "x0_hat: expected float32, got float16"),
        (
            dict(x0_hat=torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)),
            RuntimeError,
            "x0_hat: expected a tensor to write to, got an expanded one",
        ),
        (dict(x0_hat=X.to("meta")), RuntimeError, "x0_hat: expected device cpu, got meta"),
        (dict(x0_hat=True), TypeError, "x0_hat: expected a tensor or None, got True"),
        (
            dict(kept=X.clone()),
            RuntimeError,
            "kept: expected None with short rows, which have x0_hat, got a tensor",
        ),
        (
            LONG | dict(x0_hat=X.clone()),
            RuntimeError,
            "x0_hat: expected None with long rows, which have kept, got a tensor",
        ),
        (LONG | dict(kept=X.half()), RuntimeError, "kept: expected float32, got float16"),
        (LONG | dict(kept=X[:1]), RuntimeError, "kept: expected shape (2, 3, 4, 4), got (1, 3, 4, 4)"),
        (dict(step=5), RuntimeError, "step: expected values in [0, 5), got 5"),
        (dict(out=torch.zeros(2, 3, 4)), RuntimeError, "out: expected shape (2, 3, 4, 4), got (2, 3, 4)"),
    ],
    ops.moments: [
        (dict(a=torch.zeros(())), RuntimeError, "a: expected [N, ...], got shape ()"),
        (
            dict(a=X[:, :0], b=X[:, :0]),
            RuntimeError,
            "a: expected at least one element a sample, got shape (2, 0, 4, 4)",
        ),
        (dict(a=None), TypeError, "a: expected a tensor, got None"),
        (dict(b=X[:1]), RuntimeError, "b: expected shape (2, 3, 4, 4), got (1, 3, 4, 4)"),
        (dict(b=X.half()), RuntimeError, "b: expected float32, got float16"),
        (dict(b=X.to("meta")), RuntimeError, "b: expected device cpu, got meta"),
    ],
    ops.abs_quantile: [
        (dict(q=1.5), ValueError, "q: expected a number in [0, 1], got 1.5"),
        (dict(q=math.nan), ValueError, "q: expected a number in [0, 1], got nan"),
        (dict(q="median"), TypeError, "q: expected a number, got 'median'"),
        (
            dict(x=X[:, :0], out=X[:, :0]),
            RuntimeError,
            "x: expected 1 to 2^32 - 1 elements a sample, got shape (2, 0, 4, 4)",
        ),
        (dict(out=None), RuntimeError, "out: expected a tensor with short rows, got None"),
        (dict(table=torch.zeros(5, 16)), RuntimeError, "table: expected shape (steps, 9), got (5, 16)"),
        (dict(step=5), RuntimeError, "step: expected values in [0, 5), got 5"),
        (dict(grad=X), RuntimeError, "grad: expected None with short rows, got a tensor"),
    ],
    ops.noise_loss: [
        (dict(out=torch.zeros(())), RuntimeError, "out: expected [N, ...], got shape ()"),
        (
            dict(out=torch.zeros(2, 0, 4)),
            RuntimeError,
            "out: expected at least one element a sample, got shape (2, 0, 4)",
        ),
        (
            dict(out=X.double()),
            RuntimeError,
            "out: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(out=X.long()), RuntimeError, "out: expected float32, bfloat16 or float16, got int64"),
        (dict(out=None), TypeError, "out: expected a tensor, got None"),
        (dict(seeds=[1]), RuntimeError, "seeds: expected shape (2,), got (1,)"),
        (dict(seeds=1.0), TypeError, "seeds: expected an int, ints or an int64 tensor, got 1.0"),
        (dict(seeds=index(1, 2, 3)), RuntimeError, "seeds: expected shape (2,), got (3,)"),
        (dict(t=-1), RuntimeError, "t: expected values in [0, 4294967296), got -1"),
        (dict(t=2**32), RuntimeError, "t: expected values in [0, 4294967296), got 4294967296"),
        (dict(t=index(0, -5)), RuntimeError, "t: expected values in [0, 4294967296), got -5"),
        (dict(t=index(1, 2, 3)), RuntimeError, "t: expected shape () or (2,), got (3,)"),
        (dict(t=torch.zeros(2)), RuntimeError, "t: expected int64, got float32"),
        (dict(t=1.5), TypeError, "t: expected an int or an int64 tensor, got 1.5"),
        (dict(t=None), TypeError, "t: expected an int or an int64 tensor, got None"),
        (dict(weights=torch.zeros(3)), RuntimeError, "weights: expected shape (2,), got (3,)"),
        (dict(weights=torch.zeros(2, 1)), RuntimeError, "weights: expected shape (2,), got (2, 1)"),
        (
            dict(weights=torch.zeros(2).double()),
            RuntimeError,
            "weights: expected float32, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(weights=torch.zeros(2).half()), RuntimeError, "weights: expected float32, got float16"),
        (dict(weights=torch.zeros(4)[::2]), RuntimeError, "weights: expected a contiguous tensor, got strides (2,)"),
        (dict(weights=2.0), TypeError, "weights: expected a tensor or None, got 2.0"),
        (dict(weights=torch.zeros(2).to("meta")), RuntimeError, "weights: expected device cpu, got meta"),
        (dict(weights=[1.0, 2.0]), TypeError, "weights: expected a tensor or None, got [1.0, 2.0]"),
        (dict(weights=torch.zeros(())), RuntimeError, "weights: expected shape (2,), got ()"),
        (
            dict(weights=torch.ones(2, requires_grad=True)),
            RuntimeError,
            "weights: expected no gradient through noise_loss, got a tensor that requires grad, which "
            "diffkern.torch_ops() takes",
        ),
    ],
    ops.diffusion_loss: [
        (dict(out=torch.zeros(())), RuntimeError, "out: expected [N, ...], got shape ()"),
        (
            dict(out=torch.zeros(2, 0, 4)),
            RuntimeError,
            "out: expected at least one element a sample, got shape (2, 0, 4)",
        ),
        (
            dict(out=X.double()),
            RuntimeError,
            "out: expected float32, bfloat16 or float16, got float64, which diffkern.torch_ops() takes",
        ),
        (dict(out=None), TypeError, "out: expected a tensor, got None"),
        (
            dict(out=torch.zeros(2), learned_variance=True),
            RuntimeError,
            "out: expected [N, C, ...], got shape (2,)",
        ),
        (dict(learned_variance=True), RuntimeError, "out: expected an even number of channels, got shape (2, 3, 4, 4)"),
        (
            dict(out=torch.zeros(2, 6, 4, 4)),
            RuntimeError,
            "x_0: expected shape (2, 6, 4, 4), got (2, 3, 4, 4)",
        ),
        (dict(x_0=torch.zeros(2, 3, 4)), RuntimeError, "x_0: expected shape (2, 3, 4, 4), got (2, 3, 4)"),
        (dict(x_0=X.half()), RuntimeError, "x_0: expected float32, got float16"),
        (dict(out=X.half(), x_0=X.bfloat16()), RuntimeError, "x_0: expected float16, got bfloat16"),
        (dict(x_0=X.to("meta")), RuntimeError, "x_0: expected device cpu, got meta"),
        (dict(x_0=1.0), TypeError, "x_0: expected a tensor or None, got 1.0"),
        (dict(x_0=None, bound=True), ValueError, "x_0: expected a tensor with bound=True, got None"),
        (
            dict(x_0=None, table=torch.ones(5, 12)),
            RuntimeError,
            "x_0: expected a tensor where y_x of the table is not 0, got None",
        ),
        (dict(seeds=[1]), RuntimeError, "seeds: expected shape (2,), got (1,)"),
        (dict(step=5), RuntimeError, "step: expected values in [0, 5), got 5"),
        (dict(step=index(0, -1)), RuntimeError, "step: expected values in [0, 5), got -1"),
        (dict(step=index(1, 2, 3)), RuntimeError, "step: expected shape () or (2,), got (3,)"),
        (dict(step=torch.zeros(2)), RuntimeError, "step: expected int64, got float32"),
        (dict(step=1.5), TypeError, "step: expected an int or an int64 tensor, got 1.5"),
        (dict(table=torch.zeros(5, 9)), RuntimeError, "table: expected shape (rows, 12), got (5, 9)"),
        (
            dict(table=LOSSES.double()),
            RuntimeError,
            "table: expected float32, got float64, which diffkern.torch_ops() takes",
        ),
        (
            dict(table=torch.zeros(12, 5).t()),
            RuntimeError,
            "table: expected a contiguous tensor, got strides (1, 5)",
        ),
        (dict(table=LOSSES.to("meta")), RuntimeError, "table: expected device cpu, got meta"),
        (dict(table=None), TypeError, "table: expected a tensor, got None"),
        (dict(address=-1), RuntimeError, "address: expected values in [0, 4294967296), got -1"),
        (dict(address=index(1, 2, 3)), RuntimeError, "address: expected shape () or (2,), got (3,)"),
        (dict(address="0"), TypeError, "address: expected an int or an int64 tensor, got '0'"),
        (dict(weights=torch.zeros(3)), RuntimeError, "weights: expected shape (2,), got (3,)"),
        (dict(weights=2.0), TypeError, "weights: expected a tensor or None, got 2.0"),
        (dict(learned_variance=1), TypeError, "learned_variance: expected True or False, got 1"),
        (dict(bound="yes"), TypeError, "bound: expected True or False, got 'yes'"),
        (dict(stop_mean=None), TypeError, "stop_mean: expected True or False, got None"),
        (dict(clip=0.5), TypeError, "clip: expected True or False, got 0.5"),
    ],
    ops.pack_conv: [
        (dict(weight=None), TypeError, "weight: expected a tensor, got None"),
        (
            dict(weight=torch.zeros(5, 3, 3)),
            RuntimeError,
            "weight: expected [K, C, 3, 3] or [K, C, 1, 1], got shape (5, 3, 3)",
        ),
        (
            dict(weight=torch.zeros(5, 3, 3, 1)),
            RuntimeError,
            "weight: expected [K, C, 3, 3] or [K, C, 1, 1], got shape (5, 3, 3, 1)",
        ),
        (
            dict(weight=torch.zeros(0, 3, 3, 3)),
            RuntimeError,
            "weight: expected at least one input and one output channel, got shape (0, 3, 3, 3)",
        ),
    ],
    ops.expand_taps: [
        (dict(taps=TAPS.tensor), TypeError, "taps: expected a PackedConv, as pack_conv returns it, got Tensor"),
        (dict(taps=PACKED), RuntimeError, "taps: expected [column blocks, C, 9, 32], got shape (9, 1, 3, 64)"),
    ],
    ops.conv2d: [
        (dict(x=None), TypeError, "x: expected a tensor, got None"),
        (dict(x=torch.zeros(2, 3, 4)), RuntimeError, "x: expected [N, C, H, W], got shape (2, 3, 4)"),
        (dict(x=X[:, :0], skip=X), RuntimeError, "x: expected at least one channel, got shape (2, 0, 4, 4)"),
        (dict(x=X.double()), RuntimeError, "x: expected float32, got float64"),
        (dict(x=X.to("meta")), RuntimeError, "packed: expected device meta, got cpu"),
        (
            dict(x=X.clone().requires_grad_()),
            RuntimeError,
            "x: expected no gradient through conv2d, got a tensor that requires grad",
        ),
        (dict(packed=None), TypeError, "packed: expected a PackedConv, as pack_conv returns it, got NoneType"),
        (dict(packed=PACKED.tensor), TypeError, "packed: expected a PackedConv, as pack_conv returns it, got Tensor"),
        (dict(x=X[:, :2]), RuntimeError, "x: expected 3 channels, got 2"),
        (dict(out_channels=65), RuntimeError, "out_channels: expected 5, those of packed, got 65"),
        (dict(out_channels=0), ValueError, "out_channels: expected an int of at least 1, got 0"),
        (dict(out_channels=5.0), TypeError, "out_channels: expected an int, got 5.0"),
        (dict(bias=torch.zeros(4)), RuntimeError, "bias: expected shape (5,), got (4,)"),
        (dict(bias=torch.zeros(5).half()), RuntimeError, "bias: expected float32, got float16"),
        (dict(bias=0.0), TypeError, "bias: expected a tensor or None, got 0.0"),
        (dict(stride=0), ValueError, "stride: expected an int of at least 1, got 0"),
        (dict(stride=(2, 2)), TypeError, "stride: expected an int, got (2, 2)"),
        (dict(padding=3), RuntimeError, "padding: expected a value in [0, 3), got 3"),
        (dict(padding=-1), RuntimeError, "padding: expected a value in [0, 3), got -1"),
        (
            dict(packed=ops.pack_conv(torch.zeros(5, 3, 1, 1))),
            RuntimeError,
            "padding: expected a value in [0, 1), got 1",
        ),
        (dict(padding="same"), TypeError, "padding: expected an int, got 'same'"),
        (dict(skip=torch.zeros(2, 3, 4)), RuntimeError, "skip: expected [N, C, H, W], got shape (2, 3, 4)"),
        (dict(skip=torch.zeros(2, 7, 4, 5)), RuntimeError, "skip: expected shape (2, 7, 4, 4), got (2, 7, 4, 5)"),
        (dict(skip=X), RuntimeError, "x, skip: expected 3 channels together, got 3 and 3"),
        (dict(skip=X.half()), RuntimeError, "skip: expected float32, got float16"),
        (dict(add=torch.zeros(5)), RuntimeError, "add: expected shape (2, 5), got (5,)"),
        (dict(add=torch.zeros(1, 5)), RuntimeError, "add: expected shape (2, 5), got (1, 5)"),
        (dict(residual=X), RuntimeError, "residual: expected shape (2, 5, 4, 4), got (2, 3, 4, 4)"),
        (dict(residual=True), TypeError, "residual: expected a tensor or None, got True"),
        (dict(upsample=2), TypeError, "upsample: expected True or False, got 2"),
    ],
    ops.conv3x3: [
        (dict(x=None), TypeError, "x: expected a tensor, got None"),
        (dict(weight=[1.0]), TypeError, "weight: expected a tensor, got [1.0]"),
        (dict(bias=1.0), TypeError, "bias: expected a tensor or None, got 1.0"),
        (dict(x=torch.zeros(3, 4, 4)), RuntimeError, "x: expected [N, C, H, W], got shape (3, 4, 4)"),
        (dict(x=X.double()), RuntimeError, "x: expected float32, got float64, which diffkern.torch_ops() takes"),
        (dict(x=X.bfloat16()), RuntimeError, "x: expected float32, got bfloat16"),
        (dict(x=X[:, :0]), RuntimeError, "x: expected at least one channel, got shape (2, 0, 4, 4)"),
        (
            dict(weight=torch.zeros(5, 3, 1, 1)),
            RuntimeError,
            "weight: expected [K, C, 3, 3], got shape (5, 3, 1, 1)",
        ),
        (
            dict(weight=torch.zeros(5, 4, 3, 3)),
            RuntimeError,
            "weight: expected shape (5, 3, 3, 3), got (5, 4, 3, 3)",
        ),
        (dict(weight=torch.zeros(5, 3, 3, 3).half()), RuntimeError, "weight: expected float32, got float16"),
        (dict(weight=torch.zeros(5, 3, 3, 3, device="meta")), RuntimeError, "weight: expected device cpu, got meta"),
        (dict(bias=torch.zeros(4)), RuntimeError, "bias: expected shape (5,), got (4,)"),
        (
            dict(bias=torch.zeros(5).double()),
            RuntimeError,
            "bias: expected float32, got float64, which diffkern.torch_ops() takes",
        ),
    ],
    torch.ops.diffkern.conv3x3_backward: [
        (dict(grad_y=torch.zeros(2, 4, 4, 4)), RuntimeError, "grad_y: expected shape (2, 5, 4, 4), got (2, 4, 4, 4)"),
        (dict(grad_y=torch.zeros(2, 5, 4, 4).double()), RuntimeError, "grad_y: expected float32, got float64"),
    ],
    torch.ops.diffkern.conv2d_out: [
        (dict(x=X), RuntimeError, "x: expected channels_last memory, got strides (48, 16, 4, 1)"),
        (
            dict(y=torch.empty(2, 5, 4, 4)),
            RuntimeError,
            "y: expected channels_last memory, got strides (80, 16, 4, 1)",
        ),
        (
            dict(y=torch.empty(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)),
            RuntimeError,
            "y: expected shape (2, 5, 4, 4), got (2, 5, 3, 4)",
        ),
        (
            dict(packed=torch.zeros(5, 3, 3)),
            RuntimeError,
            "packed: expected [matrices, column blocks, C, column block], got shape (5, 3, 3)",
        ),
        (dict(packed=torch.zeros(5, 3, 3, 3)), RuntimeError, "packed: expected 1, 9 or 36 matrices, got 5"),
        (
            dict(packed=torch.zeros(9, 1, 4, 64)),
            RuntimeError,
            "packed: expected shape (9, 1, 3, 64), got (9, 1, 4, 64)",
        ),
        (dict(packed=PACKED.tensor.double()), RuntimeError, "packed: expected float32, got float64"),
        (
            dict(packed=PACKED.tensor.mT.contiguous().mT),
            RuntimeError,
            "packed: expected a contiguous tensor, got strides (192, 192, 1, 3)",
        ),
        (dict(in_channels=4), RuntimeError, "x: expected 4 channels, got 3"),
        (dict(out_channels=6), RuntimeError, "y: expected shape (2, 6, 4, 4), got (2, 5, 4, 4)"),
        (dict(stride=0), RuntimeError, "stride: expected a value > 0, got 0"),
        (
            dict(add=torch.zeros(2, 10)[:, ::2]),
            RuntimeError,
            "add: expected the channels of a sample together, got strides (10, 2)",
        ),
    ],
    torch.ops.diffkern.fingerprint: [
        (dict(hash=torch.zeros(1)), RuntimeError, "hash: expected int64, got float32"),
        (dict(weights=[X, X.double()]), RuntimeError, "weights: expected float32, got float64"),
        (dict(weights=[X[:, ::2]]), RuntimeError, "weights: expected dense memory, got strides (48, 32, 4, 1)"),
        (
            dict(weights=[X[:1].expand(2, -1, -1, -1)]),
            RuntimeError,
            "weights: expected dense memory, got strides (0, 16, 4, 1)",
        ),
    ],
    _C.word_hash: [
        (dict(function="sine"), RuntimeError, "function: expected 'radius' or 'angle', got 'sine'"),
        (dict(first_run=-1), RuntimeError, "runs: expected 0 <= first <= last <= 4096, got -1 and 0"),
        (dict(first_run=1), RuntimeError, "runs: expected 0 <= first <= last <= 4096, got 1 and 0"),
        (dict(last_run=4097), RuntimeError, "runs: expected 0 <= first <= last <= 4096, got 0 and 4097"),
    ],
}
ROWS = [pytest.param(op, *row, id=f"{op.__name__}-{'-'.join(row[0])}") for op, rows in BAD.items() for row in rows]


@pytest.mark.parametrize("op", GOOD, ids=lambda op: op.__name__)
def test_the_call_that_the_table_spoils_is_good(op):
    op(**GOOD[op])


@pytest.mark.parametrize(("op", "change", "error", "message"), ROWS)
def test_bad_input_raises_its_message(op, change, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$") as raised:
        op(**GOOD[op] | change)
    assert raised.type is error


TARGETS = [
    row
    for row in ROWS
    if row.values[0] is ops.reverse_step_
    and re.match("(x0_hat|kept): expected (None with|shape|float32, got)", row.values[3])
]


@pytest.mark.parametrize(("op", "change", "error", "message"), TARGETS)
def test_torch_s_own_ops_refuse_the_targets_that_the_kernel_refuses(op, change, error, message):
    with diffkern.torch_ops(), pytest.raises(error, match=f"^{re.escape(message)}$"):
        op(**GOOD[op] | change)


def test_a_bad_call_leaves_its_target_as_it_was():
    for op, target in ((ops.q_sample_, "x_0"), (ops.reverse_step_, "x")):
        for change, error, _ in BAD[op]:
            if target not in change:
                arguments = GOOD[op] | {target: torch.ones_like(X)} | change
                with pytest.raises(error):
                    op(**arguments)
                assert torch.equal(arguments[target], torch.ones_like(X))


def test_a_layout_without_strides_finds_no_kernel():
    with pytest.raises(NotImplementedError, match="SparseCPU"):
        ops.q_sample(**GOOD[ops.q_sample] | dict(x_0=X.to_sparse()))


def tensors(example: Example) -> list[tuple[str, torch.Tensor | list]]:
    """Return the registered op's arguments that are tensors or lists of them."""
    arguments = example.registered_arguments() if example.registered() else {}
    return [
        (name, value)
        for name, value in arguments.items()
        if torch.is_tensor(value) or isinstance(value, list) and value
    ]


MIXED = {name_of(example): example for example in all_examples() if len(tensors(example)) > 1}


@pytest.mark.parametrize("name", MIXED)
def test_one_tensor_without_memory_among_others_is_refused(name):
    """Its fake would answer for the op, and make tensors without values of everything."""
    example = MIXED[name]
    for argument, value in tensors(example):
        with pytest.raises(RuntimeError, match=": expected device (cpu, got meta|meta, got cpu)"):
            example.registered()(**example.registered_arguments() | {argument: moved(value, torch.device("meta"))})


def test_an_op_with_an_argument_that_no_check_knows_is_not_registered():
    argument, *_ = torch._C.parse_schema("op(Dict(str, int) options) -> ()").arguments
    with pytest.raises(TypeError, match=r"^options: expected a schema's type among Tensor, .*, got Dict.*str, int.*$"):
        kind_of(argument)


def test_a_kind_of_argument_that_was_accepted_once_is_still_told_from_others():
    call = GOOD[ops.reverse_step] | dict(history=[X], table=torch.zeros(5, 10))
    for good, bad, message in (
        (2.5, True, "guidance: expected a number, got True"),
        (2, "2", "guidance: expected a number, got '2'"),
    ):
        ops.reverse_step(**call | dict(guidance=good, out_uncond=X))
        with pytest.raises(TypeError, match=f"^{message}$"):
            ops.reverse_step(**call | dict(guidance=bad, out_uncond=X))
    with pytest.raises(TypeError, match="^history: expected tensors, got None$"):
        ops.reverse_step(**call | dict(history=[None]))
