"""Every raw op and the memory of its arguments: none, freed, shared with what it writes, negated; and its own stack."""

import re
import threading
from collections.abc import Iterator

import pytest
import torch
from levels import values
from torch import Tensor

from diffkern import ops

_ops = torch.ops.diffkern


def image(n: int, c: int, h: int, w: int, seed: int = 0) -> Tensor:
    return values((n, c, h, w), seed=seed).contiguous(memory_format=torch.channels_last)


def calls(
    n: int = 2,
    c: int = 32,
    k: int = 33,
    h: int = 5,
    w: int = 6,
    heads: int = 2,
    q: int = 40,
    keys: int = 70,
    d: int = 32,
) -> dict[str, dict]:
    """Arguments for every op, each with memory of its own: by the op's name, and the kernel's where it has several."""

    def tokens(count: int, seed: int) -> Tensor:
        return values((n, count, heads, d), seed=seed).transpose(1, 2)

    x, y, weight, groups = image(n, c, h, w), image(n, k, h, w, seed=1), values((k, c, 3, 3), scale=0.1), min(c, 4)
    noise = dict(seeds=torch.arange(n), t=torch.tensor(0))
    table = torch.rand(1, 10) * (torch.arange(10) != 8)  # t is 0
    step = dict(x=x, out=image(n, 2 * c, h, w), table=table, step=noise["t"], seeds=noise["seeds"])
    step |= dict(out_uncond=image(n, 2 * c, h, w), guidance=2.0, clip=True, learned_variance=True, history=[x])
    long = step | dict(table=torch.rand(1, 24), guidance=1.0, clip=False, address=torch.tensor([[5, 2]]))
    long |= dict(grad=x, known=x, mask=values((1, 1, h, w)))
    attention = dict(q=tokens(q, 2), k=tokens(keys, 3), v=tokens(keys, 4))
    lse = values((n, heads, q))
    norm = dict(weight=values((c,)), bias=values((c,)), groups=groups, scale_shift=values((n, 2 * c)), silu=True)
    norm_out = norm | dict(y=x, x=x, skip=None, eps=1e-5)
    conv = dict(y=y, x=x, skip=None, in_channels=c, out_channels=k, bias=values((k,)), add=values((n, k)), residual=y)
    conv |= dict(stride=1, padding=1, upsample=False)
    all_calls = {
        "noise": dict(seeds=noise["seeds"], shape=(c, h, w), step=noise["t"], stream=0, dtype=torch.float32),
        "q_sample": noise | dict(x_0=x, table=torch.rand(1, 2), return_eps=True),
        "q_sample_": noise | dict(x_0=x, table=torch.rand(1, 2)),
        "reverse_step": step | dict(return_x0=True),
        "reverse_step_": step | dict(x0_hat=x),
        "reverse_step, long rows": long | dict(return_x0=True),
        "reverse_step_, long rows": long | dict(x0_hat=None, kept=x),
        "moments": dict(a=x, b=image(n, c, h, w, seed=7)),
        "abs_quantile": dict(x=x, out=long["out"], table=long["table"], step=step["step"], q=0.5)
        | dict(out_uncond=step["out_uncond"], guidance=1.0, grad=x, learned_variance=True),
        "noise_loss": noise | dict(out=x, weights=torch.rand(n)),
        "noise_loss_backward": noise | dict(grad_loss=torch.rand(n), out=x, weights=torch.rand(n)),
        "attention": attention | dict(scale=None),
        "attention_backward": attention | dict(grad_out=tokens(q, 5), out=tokens(q, 6), lse=lse, scale=None),
        "pack_taps": dict(weight=weight),
        "expand_taps": dict(taps=_ops.pack_taps(weight)),
        "conv3x3": dict(x=x, weight=weight, bias=values((k,))),
        "conv3x3_backward": dict(grad_y=y, x=x, weight=weight, of_x=True, of_weight=True),
        "group_norm_silu": norm | dict(x=x, eps=1e-5, add=values((n, c)), residual=x),
        "group_norm_silu_backward": norm
        | dict(grad_y=x, x=x, mean=values((n, groups)), rstd=values((n, groups)), add=values((n, c))),
        "group_norm_silu_out": norm_out,
        "fingerprint": dict(hash=torch.zeros(1, dtype=torch.int64), weights=[weight, x], exact=True),
    }
    for terms in (None, 1, 2, 3):
        all_calls[f"attention_out, {terms} terms"] = attention | dict(out=tokens(q, 5), scale=None, terms=terms)
        if terms:
            blocked = torch.zeros(n, c // 32, terms, h + 2, w + 2, 32, dtype=torch.bfloat16)
            all_calls[f"group_norm_silu_out, {terms} terms"] = norm_out | dict(y=blocked)
        if c and k:
            packed = ops.pack_conv(weight, terms=terms).tensor
            all_calls[f"conv2d_out, {terms} terms"] = conv | dict(packed=packed)
    if c and k:
        taps, upsampled = ops.pack_taps(weight), conv | dict(y=image(n, k, 2 * h, 2 * w), residual=None, upsample=True)
        all_calls["conv2d_out, taps"] = conv | dict(packed=taps.tensor)
        all_calls["conv2d_out, matrices"] = conv | dict(packed=ops.expand_taps(taps).tensor)
        all_calls["conv2d_out, upsampling"] = upsampled | dict(packed=ops.pack_upsampling(weight, terms=3).tensor)
    return {name: fresh(call) for name, call in all_calls.items()}


def fresh(call: dict) -> dict:
    """The same arguments in memory of their own, with the same strides."""

    def copy(value):
        return [*map(copy, value)] if isinstance(value, list) else value.clone() if isinstance(value, Tensor) else value

    return {name: copy(value) for name, value in call.items()}


def tensors(call: dict) -> Iterator[tuple[str, Tensor]]:
    for name, value in call.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Tensor):
                yield name, one


def replaced(call: dict, name: str, change) -> dict:
    value = call[name]
    return call | {name: [*map(change, value)] if isinstance(value, list) else change(value)}


def op_of(name: str):
    return getattr(_ops, name.split(",")[0]).default


def written(name: str, call: dict) -> list[str]:
    arguments = op_of(name)._schema.arguments
    return [argument.name for argument in arguments if argument.is_write and call.get(argument.name) is not None]


def outcome(name: str, call: dict) -> tuple:
    """What the op returns and writes, or the message that it raises."""
    try:
        results = op_of(name)(**call)
    except RuntimeError as error:
        return (str(error),)
    results = results if isinstance(results, tuple) else (results,)
    return *(result for result in results if result is not None), *(call[target] for target in written(name, call))


CALLS = calls()
WRITING = [name for name, call in CALLS.items() if written(name, call)]


def test_the_table_of_calls_has_every_op():
    everything = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffkern::")}
    assert {f"diffkern::{name.split(',')[0]}" for name in CALLS} == everything


# --- none ---


@pytest.mark.parametrize("size", ["n", "c", "k", "h", "w", "heads", "q", "keys", "d"])
def test_an_empty_argument_gives_nothing_or_zeros_or_an_error_in_words(size):
    for name, call in calls(**{size: 0}).items():
        if all(tensor.numel() for _, tensor in tensors(call)) and name != "noise":
            continue
        for result in outcome(name, call):
            if isinstance(result, str):
                assert re.match(r"[\w, ]+: expected ", result), f"{name}: {result}"
            elif name not in ("noise", "fingerprint") or not call.get("shape", (1,)):
                assert not result.any(), name


@pytest.mark.parametrize("name", CALLS)
def test_a_freed_storage_is_refused_by_its_arguments_name(name):
    for argument, _ in tensors(CALLS[name]):
        call = fresh(CALLS[name])
        for other, tensor in tensors(call):
            if other == argument:
                tensor.untyped_storage().resize_(0)
        (message,) = outcome(name, call)
        assert re.fullmatch(rf"{argument}: expected a storage of at least \d+ bytes, got 0", message)


def test_a_freed_storage_is_refused_where_torch_would_copy_it_first():
    def freed(like: Tensor) -> Tensor:
        tensor = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        tensor.untyped_storage().resize_(0)
        return tensor

    x, vector, weight = values((2, 3, 4, 4)), values((3,)), values((5, 3, 3, 3))
    for call in (
        lambda gone: ops.conv2d(gone(x), ops.pack_conv(weight)),
        lambda gone: ops.conv2d(x, ops.pack_conv(weight), residual=gone(values((2, 5, 4, 4)))),
        lambda gone: ops.conv3x3(x, weight, gone(values((10,))[::2])),
        lambda gone: ops.group_norm_silu(gone(x.mT), vector, vector, 3),
        lambda gone: ops.group_norm_silu(x, gone(vector.bfloat16()), vector, 3),
        lambda gone: ops.attention(x.bfloat16(), gone(x.bfloat16()), x.bfloat16()),
        lambda gone: ops.attention(x, x, gone(x.mT)),
        lambda gone: ops.noise_loss(x, gone(torch.arange(4)[::2]), 0),
        lambda gone: ops.pack_conv(gone(weight)),
        lambda gone: ops.pack_upsampling(gone(weight), terms=1),
        lambda gone: ops.pack_taps(gone(weight)),
    ):
        call(lambda tensor: tensor)
        with pytest.raises(RuntimeError, match=r"^\w+: expected a storage of at least \d+ bytes, got 0$"):
            call(freed)


# --- shared ---


@pytest.mark.parametrize("name", WRITING)
def test_a_target_that_overlaps_another_argument_is_refused_and_left_as_it_was(name):
    for target in written(name, CALLS[name]):
        for argument, _ in tensors(CALLS[name]):
            if argument == target:
                continue
            memory = torch.rand(100_000)
            before = memory.clone()
            call = replaced(fresh(CALLS[name]), target, lambda tensor: inside(memory, tensor, 0))  # noqa: B023
            call = replaced(call, argument, lambda tensor: inside(memory, tensor, 1))  # noqa: B023
            (message,) = outcome(name, call)
            assert re.fullmatch(rf"({target}|{argument}): expected .*memory.*, got some of it", message), message
            assert torch.equal(memory, before)


def inside(memory: Tensor, like: Tensor, offset: int) -> Tensor:
    return memory.view(like.dtype).as_strided(like.shape, like.stride(), offset)


def test_a_table_that_holds_the_target_is_refused():
    memory = torch.rand(10, 10)
    table, seeds = memory[:, :2].contiguous(), torch.arange(2)
    with pytest.raises(RuntimeError, match="^table: expected other memory than x_0's, got some of it$"):
        ops.q_sample_(table[:2], 0, seeds, table)
    with pytest.raises(RuntimeError, match="^table: expected other memory than x's, got some of it$"):
        ops.reverse_step_(memory[:2], torch.rand(2, 10), memory, 0, seeds, history=[torch.rand(2, 10)])


def test_the_norm_may_write_where_its_image_lies():
    call, in_place = fresh(CALLS["group_norm_silu_out"]), fresh(CALLS["group_norm_silu_out"])
    _ops.group_norm_silu_out(**call)
    _ops.group_norm_silu_out(**in_place | dict(y=in_place["x"]))
    assert torch.equal(in_place["x"], call["y"])


# --- negated ---


@pytest.mark.parametrize("name", CALLS)
def test_a_negated_view_is_read_as_its_values_and_not_written_to(name):
    for argument, tensor in tensors(CALLS[name]):
        if not tensor.is_floating_point():
            continue
        results = outcome(name, replaced(fresh(CALLS[name]), argument, torch._neg_view))
        if argument in written(name, CALLS[name]):
            assert results == (f"{argument}: expected a tensor to write to, got a view with the negative bit",)
        else:
            expected = outcome(name, replaced(fresh(CALLS[name]), argument, torch.neg))
            torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)


def test_the_imaginary_part_of_a_conjugate_is_read_as_its_values():
    x, seeds = torch.view_as_complex(values((2, 3, 4, 2))).conj().imag, [1, 2]
    assert x.is_neg()
    table = torch.rand(10, 2)
    assert torch.equal(ops.q_sample(x, 3, seeds, table), ops.q_sample(x.clone(), 3, seeds, table))
    with pytest.raises(RuntimeError, match="^x_0: expected a tensor to write to, got a view with the negative bit$"):
        ops.q_sample_(x, 3, seeds, table)


# --- the stack ---


def test_every_op_runs_in_a_thread_with_a_stack_of_256_kilobytes():
    """On the thread itself. A larger frame would end the process."""
    expected, results = {name: outcome(name, fresh(call)) for name, call in CALLS.items()}, {}

    def run() -> None:
        torch.set_num_threads(1)
        results.update({name: outcome(name, fresh(call)) for name, call in CALLS.items()})

    threads, size = torch.get_num_threads(), threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
        torch.set_num_threads(threads)
    torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)
