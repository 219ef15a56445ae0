"""Every raw op and the memory of its arguments: none, freed, shared with what it writes, negated; and its own stack."""

import inspect
import re
import threading
from collections.abc import Iterable, Iterator

import pytest
import torch
from calls import moved, name_of
from levels import values
from torch import Tensor

from diffkern import ops
from diffkern.ops.example import Example, all_examples, examples_of, modules

_ops = torch.ops.diffkern


def calls_of(examples: Iterable[Example]) -> dict[str, dict]:
    """Arguments of the registered ops, each with memory of its own, by the names of op and example."""
    registered = [example for example in examples if example.registered()]
    return {name_of(example): moved(example.registered_arguments()) for example in registered}


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
    """Return the tensors that the op returns and writes, or the message that it raises."""
    try:
        results = op_of(name)(**call)
    except RuntimeError as error:
        return (str(error),)
    results = results if isinstance(results, tuple) else (results,)
    return tuple(result for result in (*results, *map(call.get, written(name, call))) if result is not None)


CALLS = calls_of(all_examples())
WRITING = [name for name, call in CALLS.items() if written(name, call)]
SIZES = [(op, size) for op, module in modules().items() for size in inspect.signature(module.examples).parameters]


def test_every_registered_op_has_an_example():
    everything = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("diffkern::")}
    assert {f"diffkern::{name.split(',')[0]}" for name in CALLS} == everything


# --- none ---


@pytest.mark.parametrize(("op", "size"), SIZES)
def test_an_empty_argument_gives_nothing_or_zeros_or_an_error_in_words(op, size):
    for name, call in calls_of(examples_of(modules()[op], **{size: 0})).items():
        if all(tensor.numel() for _, tensor in tensors(call)) and op != "noise":
            continue
        for result in outcome(name, call):
            if isinstance(result, str):
                assert re.match(r"[\w, ]+: expected ", result), f"{name}: {result}"
            elif op not in ("noise", "fingerprint") or not all(call.get("shape", (1,))):
                assert not result.any(), name


@pytest.mark.parametrize("name", CALLS)
def test_a_freed_storage_is_refused_by_its_arguments_name(name):
    for argument, _ in tensors(CALLS[name]):
        call = moved(CALLS[name])
        for other, tensor in tensors(call):
            if other == argument:
                tensor.untyped_storage().resize_(0)
        results = outcome(name, call)
        if isinstance(results[0], str):
            assert re.fullmatch(rf"{argument}: expected a storage of at least \d+ bytes, got 0", results[0])
        else:  # it was not read
            torch.testing.assert_close(results, outcome(name, moved(CALLS[name])), rtol=0, atol=0)


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
            call = replaced(moved(CALLS[name]), target, lambda tensor: inside(memory, tensor, 0))  # noqa: B023
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
    call, in_place = (moved(CALLS["group_norm_silu_out, one image"]) for _ in range(2))
    _ops.group_norm_silu_out(**call)
    _ops.group_norm_silu_out(**in_place | dict(y=in_place["x"]))
    assert torch.equal(in_place["x"], call["y"])


# --- negated ---


@pytest.mark.parametrize("name", CALLS)
def test_a_negated_view_is_read_as_its_values_and_not_written_to(name):
    for argument, tensor in tensors(CALLS[name]):
        if not tensor.is_floating_point():
            continue
        results = outcome(name, replaced(moved(CALLS[name]), argument, torch._neg_view))
        if argument in written(name, CALLS[name]):
            assert results == (f"{argument}: expected a tensor to write to, got a view with the negative bit",)
        else:
            expected = outcome(name, replaced(moved(CALLS[name]), argument, torch.neg))
            if isinstance(expected[0], str):
                assert results == expected
            else:
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
    expected, results = {name: outcome(name, moved(call)) for name, call in CALLS.items()}, {}

    def run() -> None:
        torch.set_num_threads(1)
        results.update({name: outcome(name, moved(call)) for name, call in CALLS.items()})

    threads, size = torch.get_num_threads(), threading.stack_size(256 * 1024)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(size)
        torch.set_num_threads(threads)
    torch.testing.assert_close(results, expected, rtol=0, atol=0, equal_nan=True)
