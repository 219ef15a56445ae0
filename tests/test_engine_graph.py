"""The engine on any network: what is captured, what the rules make of it, and when the network runs itself."""

import collections
import copy
import functools
import gc
import importlib.metadata
import math
import pickle
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import with_random_weights
from tolerances import UNET
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import UNet, explain, ops, optimize
from diffkern.engine import compiled as compiled_module
from diffkern.engine import diffkern as backend
from diffkern.engine import is_optimized, unwrapped
from diffkern.engine.compiled import _compiled
from diffkern.ops import attention, group_norm_silu


class Net(nn.Module):
    """A convolution and a group norm, and what a function makes of them."""

    def __init__(self, function: Callable[..., Tensor], channels: int = 8):
        super().__init__()
        self.function = function
        self.conv, self.other = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.point, self.down = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, stride=2)
        self.norm, self.layer = nn.GroupNorm(2, channels), nn.LayerNorm(channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.wide = nn.Conv2d(2 * channels, channels, 1)
        self.wide_norm = nn.GroupNorm(4, 2 * channels)
        self.batch_norm, self.dropout = nn.BatchNorm2d(channels), nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.function(self, x, t)


def network_of(function: Callable[..., Tensor]) -> Net:
    return with_random_weights(Net(function)).eval().requires_grad_(False)


X = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(0))
T = torch.tensor([1.0, 2.5, 0.3])


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= UNET * expected.abs().max()


# --- rules: each pattern becomes the calls that are named, and keeps its values ---


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def heads(net: Net, x: Tensor) -> list[Tensor]:
    x = tokens(x)
    return [to(x).unflatten(2, (2, 4)).transpose(1, 2) for to in (net.q, net.k, net.v)]


def image(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(3, 8, 6, 6)


RULES = {
    "convolution": (lambda n, x, t: n.conv(x), {"conv": 1}, {}),
    "1x1": (lambda n, x, t: n.point(x), {"conv": 1}, {}),
    "norm and silu": (lambda n, x, t: F.silu(n.norm(n.conv(x))), {"conv": 1, "norm": 1}, {}),
    "a norm whose output is read twice": (
        lambda n, x, t: F.silu(h := n.norm(n.conv(x))) + h, {"conv": 1, "norm": 1}, {"silu": 1, "add": 1},
    ),
    "scale and shift": (
        lambda n, x, t: n.conv(F.silu(n.norm(x) * (1 + t[:, None, None, None].expand(3, 8, 1, 1)) + n.v(
            t[:, None].expand(3, 8))[:, :, None, None])), {"conv": 1, "norm": 1}, {},
    ),
    "what our own ops do": (
        lambda n, x, t: group_norm_silu(
            ops.conv3x3(x, n.conv.weight, n.conv.bias), n.norm.weight, n.norm.bias, 2, add=n.q(t[:, None].expand(3, 8)),
        ), {"conv": 1, "norm": 1}, {},
    ),
    "a vector that is added": (
        lambda n, x, t: n.conv(x) + n.q(t[:, None].expand(3, 8))[:, :, None, None], {"conv": 1}, {},
    ),
    "a residual": (lambda n, x, t: x + n.conv(F.silu(n.norm(x))), {"conv": 1, "norm": 1}, {}),
    "a residual behind views": (lambda n, x, t: x + image(n.q(tokens(x))), {"conv": 1}, {}),
    "no ops": (
        lambda n, x, t: (n.dropout(n.conv(x)).contiguous().clone().to(torch.float32) + x) / 1.0, {"conv": 1}, {},
    ),
    "padding": (lambda n, x, t: n.down(F.pad(x, (0, 1, 0, 1))), {"conv": 1}, {}),
    "padding of ones": (
        lambda n, x, t: n.down(F.pad(n.conv(x), (0, 1, 0, 1), value=1.0)), {"conv": 1}, {"pad": 1, "conv2d": 1},
    ),
    "no padding": (lambda n, x, t: n.down(n.conv(x)), {"conv": 1}, {"conv2d": 1}),
    "upsampling": (lambda n, x, t: n.conv(F.interpolate(x, scale_factor=2.0, mode="nearest")), {"conv": 1}, {}),
    "bilinear upsampling": (
        lambda n, x, t: n.conv(F.interpolate(x, scale_factor=2.0, mode="bilinear")), {"conv": 1}, {"interpolate": 1},
    ),
    "side by side": (
        lambda n, x, t: n.wide(F.silu(n.wide_norm(torch.cat([x, n.conv(x)], 1)))), {"conv": 2, "norm": 1}, {},
    ),
    "attention": (
        lambda n, x, t: image(F.scaled_dot_product_attention(*heads(n, x)).transpose(1, 2).flatten(2)),
        {"conv": 1, "attention": 1}, {},
    ),
    "our attention": (
        lambda n, x, t: image(attention(*heads(n, x), scale=0.7).transpose(1, 2).flatten(2)),
        {"conv": 1, "attention": 1}, {},
    ),
    "attention with a mask": (
        lambda n, x, t: image(F.scaled_dot_product_attention(*heads(n, x), is_causal=True).transpose(1, 2).flatten(2)),
        {"conv": 3}, {"scaled_dot_product_attention": 1},
    ),
    "layer norm and gelu": (
        lambda n, x, t: n.v(F.gelu(n.q(n.layer(tokens(x))))), {"conv": 2}, {"gelu": 1, "layer_norm": 1},
    ),
    "gates of one layer": (
        lambda n, x, t: torch.mul(*n.q(tokens(x)).chunk(2, -1)), {"conv": 1}, {"mul": 1},
    ),
    "batch norm in eval mode": (
        lambda n, x, t: F.relu(n.batch_norm(n.conv(x))), {"conv": 1}, {"batch_norm": 1, "relu": 1},
    ),
    "what is written in place": (lambda n, x, t: n.conv(x).add_(x).mul_(2.0), {"conv": 1}, {"mul": 1}),
    "weights that are computed": (
        lambda n, x, t: F.conv2d(x, n.conv.weight * 2, n.conv.bias + 1, padding=1), {"conv": 1}, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_a_rule_makes_these_calls_and_keeps_the_values(name):
    function, ours, by_torch = RULES[name]
    network = network_of(function)
    found = explain(network, X, T)
    copies = {"reshape", "flatten", "transpose", "contiguous"}  # where memory must change its order
    assert (found.ours, {k: v for k, v in found.by_torch.items() if k not in copies | set(ours)}) == (ours, by_torch)
    fast, expected = optimize(network), network(X, T)
    for _ in range(2):  # recorded, then replayed
        assert_close(fast(X, T), expected)
    assert_close(fast(2 * X, T + 1), network(2 * X, T + 1))


def test_a_gated_layer_behind_a_layer_norm_takes_no_copy():
    def gated(n: Net, x: Tensor, t: Tensor) -> Tensor:
        hidden, gate = F.linear(n.layer(x), torch.cat([n.q.weight, n.k.weight])).chunk(2, dim=-1)
        return x + n.v(hidden * F.gelu(gate))

    network, x = network_of(gated), torch.randn(2, 5, 8)
    found = explain(network, x, T)
    assert (found.ours, found.by_torch) == ({"conv": 2}, {"layer_norm": 1, "gelu": 1, "mul": 1})
    assert_close(optimize(network)(x, T), network(x, T))


# --- when the network itself runs, and once ---


def reads(n: Net, x: Tensor, t: Tensor) -> Tensor:
    return n.conv(x) * (2 if x.mean().item() > 0 else 3)


def branches(n: Net, x: Tensor, t: Tensor) -> Tensor:
    return n.conv(x) if x.sum() > 0 else n.other(x)


def keeps(n: Net, x: Tensor, t: Tensor) -> Tensor:
    n.last = n.conv(x)
    return n.last * 2


def draws(n: Net, x: Tensor, t: Tensor) -> Tensor:
    return n.conv(x) + torch.randn(3, 8, 6, 6)


def writes(n: Net, x: Tensor, t: Tensor) -> Tensor:
    return n.conv(x.mul_(0.5))


def from_elsewhere(n: Net, x: Tensor, t: Tensor) -> Tensor:
    return n.conv(x) * torch.from_numpy(x.numpy())


def masks(n: Net, x: Tensor, t: Tensor) -> Tensor:
    h = n.conv(x)
    h[h > 0] = 1.0
    return h[:, :, h[0, 0, 0, 0].long().clamp(0, 1).item() :]


def differentiates(n: Net, x: Tensor, t: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(n.conv(x).square().sum(), x)[0]


REFUSED = (reads, branches, keeps, draws, writes, from_elsewhere, masks, differentiates)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", REFUSED)
@pytest.mark.filterwarnings("ignore:diffkern. Net runs as it is")
def test_what_no_graph_tells_runs_as_the_network_and_once_a_call(function, dtype):
    runs: list[int] = []

    def counted(n: Net, x: Tensor, t: Tensor) -> Tensor:
        runs.append(1)
        return function(n, x, t)

    network, fast = network_of(function), optimize(network_of(counted), dtype=dtype)
    for factor in (1.0, -1.0, 2.0):
        x, given = factor * X, factor * X
        torch.manual_seed(0)
        expected = network(x, T)
        torch.manual_seed(0)
        got = fast(given, T)
        assert torch.equal(given, x)  # written to, or not
        if dtype == torch.float32:
            assert torch.equal(got, expected)
        else:  # a mask may be another in it
            assert (got - expected).abs().mean() <= 0.05 * expected.abs().mean()
    assert len(runs) == 3
    assert explain(network, X.clone(), T).why_not


def test_one_warning_says_why_a_network_is_refused():
    fast = optimize(network_of(reads))
    with pytest.warns(UserWarning, match="Net runs as it is, since no recording serves it: its forward reads numbers"):
        fast(X, T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast(X, T)


def counts(n: Net, x: Tensor, t: Tensor) -> Tensor:
    n.count = getattr(n, "count", 0) + 1
    return n.conv(x) * n.count


def remembers(n: Net, x: Tensor, t: Tensor) -> Tensor:
    n.__dict__.setdefault("cache", []).append(x.sum())
    return n.conv(x) + n.cache[-1]


def learns_statistics(n: Net, x: Tensor, t: Tensor) -> Tensor:
    n.batch_norm.train()
    return n.batch_norm(n.conv(x))


@pytest.fixture
def captures(monkeypatch) -> list[int]:
    """It gets longer with each capture."""
    capture, found = compiled_module.capture, []
    monkeypatch.setattr(compiled_module, "capture", lambda *args: (found.append(1), capture(*args))[1])
    return found


@pytest.mark.parametrize("function", [counts, remembers, learns_statistics])
def test_a_network_that_changes_itself_in_each_call_runs_once_a_call_and_is_captured_three_times(function, captures):
    network, fast = network_of(function), optimize(network_of(function))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            assert torch.equal(fast(X, T), network(X, T))
    assert len(captures) == 3
    (warning,) = caught
    assert re.search("serves it: it(s forward changes its modules| writes to a weight: add_)$", str(warning.message))


def test_a_network_that_changes_itself_in_training_is_recorded_in_eval_mode():
    network = network_of(lambda n, x, t: n.batch_norm(n.conv(x))).train()
    fast = optimize(network)
    with pytest.warns(UserWarning, match="Net runs as it is"):
        for _ in range(4):
            fast(X, T)
    network.eval()
    assert_close(fast(X, T), network(X, T))
    assert [case.why_not for case in _compiled[network].cases.values()] == [""]


def test_a_network_that_fills_a_cache_for_each_shape_is_recorded():
    def caches(n: Net, x: Tensor, t: Tensor) -> Tensor:
        table = n.__dict__.setdefault("table", {0: 0})
        return n.conv(x) + table.setdefault(x.shape[0], torch.full((), x.shape[0], dtype=x.dtype, device=x.device))

    network, fast = network_of(caches), optimize(network_of(caches))
    for count in (1, 2, 3, 1, 2, 3):
        assert_close(fast(X[:1].expand(count, -1, -1, -1), T), network(X[:1].expand(count, -1, -1, -1), T))
    assert not any(case.why_not for case in _compiled[unwrapped(fast)].cases.values())


def test_inputs_of_a_graph_that_is_returned_are_the_callers():
    fast = optimize(network_of(lambda n, x, t: (n.conv(x).mean().item(), x)))
    with pytest.warns(UserWarning, match="Net runs as it is"):
        assert fast(X, T)[1] is X


def test_a_label_out_of_range_raises_what_the_network_raises():
    network = network_of(lambda n, x, t: n.conv(x) + F.embedding(t, n.q.weight)[:, :, None, None])
    fast, labels, wrong = optimize(network), torch.tensor([0, 1, 2]), torch.tensor([0, 1, 8])
    for call in (lambda: None, lambda: fast(X, labels)):  # in the first call, and where there is a recording
        call()
        with pytest.raises(IndexError) as expected:
            network(X, wrong)
        with pytest.raises(IndexError) as raised:
            fast(X, wrong)
        assert str(raised.value) == str(expected.value) and raised.value.__context__ is None
    assert_close(fast(X, labels), network(X, labels))


def test_explain_raises_what_a_network_raises():
    network = UNet(3, channels=8, channel_mult=(1,), attention_levels=(), groups=4, num_classes=3).eval()
    x, t, wrong = torch.zeros(2, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="^labels: expected values in -1..2, got 3"):
        explain(network.requires_grad_(False), x, t, wrong)


@pytest.mark.parametrize("t", [3, 2.5])
def test_a_number_is_not_baked(t):
    network = network_of(lambda n, x, t: n.conv(x) * torch.tensor(t, dtype=torch.float32, device="cpu"))
    fast = optimize(network)
    for value in (t, t + 1, t + 2):
        assert_close(fast(X, value), network(X, value))
    assert len(_compiled[network].cases) == 1


@pytest.mark.filterwarnings("ignore:diffkern. Net runs as it is")
@pytest.mark.parametrize("read", [lambda t: t / 10, lambda t: [1.0, 2.0, 3.0, 4.0, 5.0][int(t)], math.sin])
def test_a_number_that_python_computes_with_is_the_networks_matter(read):
    network = network_of(lambda n, x, t: n.conv(x) * read(t))
    fast = optimize(network)
    for value in (3, 4, 1, 2.5):
        assert torch.equal(fast(X, value), network(X, value))


@pytest.mark.filterwarnings("ignore:diffkern. Net runs as it is")
def test_a_number_that_chooses_from_a_list_is_the_networks_matter():
    network = network_of(lambda n, x, t: n.conv(x) * [1.0, 2.0, 3.0][t])  # which C reads without a trace
    fast = optimize(network)
    for value in (2, 1, 0):
        assert torch.equal(fast(X, value), network(X, value))


# --- what is watched ---


def test_a_processor_a_list_and_a_class_that_change_are_noticed(monkeypatch):
    class Scale:
        def __init__(self) -> None:
            self.factor = 1.0

        def __call__(self, x: Tensor) -> Tensor:
            return x * self.factor

    network = network_of(lambda n, x, t: n.processor(n.layers[0](x)))
    network.processor, network.layers = Scale(), [network.conv]
    fast = optimize(network)
    fast(X, T)
    network.processor.factor = 3.0
    assert_close(fast(X, T), network(X, T))
    network.layers[0] = network.other
    assert_close(fast(X, T), network(X, T))
    monkeypatch.setattr(Scale, "__call__", lambda self, x: x - 1)
    assert_close(fast(X, T), network(X, T))
    monkeypatch.setattr(F, "silu", F.relu)
    network.processor = lambda x: F.silu(x)
    assert_close(fast(X, T), network(X, T))


@dataclass(slots=True)
class Slots:
    factor: Any = 1.0

    def times(self, x: Tensor) -> Tensor:
        return x * self.factor


def a_cell() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    factor = 1.0

    def change() -> None:
        nonlocal factor
        factor = 3.0

    return lambda x: x * factor, change


def holders() -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[], None]]]:
    """A callable that keeps an option, by where it does, and what changes the option."""
    slots, tensor, bound, part, deque = Slots(), Slots(torch.ones(())), Slots(), {}, collections.deque([1.0])
    unset, array, default = Slots(), np.ones(1), [1.0]
    del unset.factor
    return {
        "slots": (Processor(lambda x, kept: kept.times(x), slots), lambda: setattr(slots, "factor", 3.0)),
        "a slot of a tensor": (
            Processor(lambda x, kept: kept.times(x), tensor), lambda: setattr(tensor, "factor", 3 * torch.ones(())),
        ),
        "a slot that is set": (
            Processor(lambda x, kept: x * getattr(kept, "factor", 1.0), unset), lambda: setattr(unset, "factor", 3.0),
        ),
        "a bound method": (bound.times, lambda: setattr(bound, "factor", 3.0)),
        "a partial": (functools.partial(lambda x, kept: x * kept.get("factor", 1.0), kept=part),
                      lambda: part.update(factor=3.0)),
        "a deque": (Processor(lambda x, kept: x * sum(kept), deque), lambda: deque.append(2.0)),
        "an array": (Processor(lambda x, kept: x * float(kept[0]), array), lambda: array.fill(3.0)),
        "a closure": a_cell(),
        "a default": (lambda x, kept=default: x * sum(kept), lambda: default.append(2.0)),
    }  # fmt: skip


class Processor:
    def __init__(self, function: Callable[..., Tensor], kept: Any):
        self.function, self.kept = function, kept

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x, self.kept)


@pytest.mark.parametrize("where", holders())
def test_an_option_is_noticed_wherever_it_is_kept(where):
    network = network_of(lambda n, x, t: n.processor(n.conv(x)))
    network.processor, change = holders()[where]
    fast = optimize(network)
    before = fast(X, T)
    assert not _compiled[network].update(network, False) and len(_compiled[network].cases) == 1
    change()
    assert_close(fast(X, T), network(X, T))
    assert not torch.allclose(fast(X, T), before, atol=1e-2)


def test_a_large_array_among_attributes_is_the_networks_matter():
    network = network_of(lambda n, x, t: n.conv(x) * float(n.factors[-1]))
    network.factors = np.ones(100_000)
    fast = optimize(network)
    fast(X, T)
    network.factors[-1] = 3.0
    assert torch.equal(fast(X, T), network(X, T))
    assert "a ndarray of 800000 bytes" in str(explain(network, X, T))


def test_a_tensor_among_attributes_that_gives_way_to_an_equal_one_is_noticed():
    network = network_of(lambda n, x, t: n.conv(x) * n.factor)
    network.factor = torch.full((), 2.0)
    fast = optimize(network)
    fast(X, T)
    network.factor = torch.full((), 2.0)
    fast(X, T)
    network.factor.mul_(3.0)
    assert_close(fast(X, T), network(X, T))


def test_attributes_that_come_and_go_are_noticed():
    network = network_of(lambda n, x, t: n.conv(x) * getattr(n, "factor", 1.0) + getattr(n, "shift", 0.0))
    fast = optimize(network)
    for change in (
        lambda: setattr(network, "factor", 2.0), lambda: setattr(network, "shift", 3.0),
        lambda: delattr(network, "factor"),
    ):  # fmt: skip
        fast(X, T)
        change()
        assert_close(fast(X, T), network(X, T))


def test_global_hooks_are_called():
    network = network_of(lambda n, x, t: n.conv(x))
    fast, calls = optimize(network), []
    fast(X, T)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, y: calls.append(module))
    try:
        fast(X, T)
        assert network.conv in calls
    finally:
        handle.remove()


def test_a_network_is_recorded_once_its_hooks_are_taken_off():
    network, runs = network_of(lambda n, x, t: n.conv(x)), []
    fast, of_all = optimize(network), torch.nn.modules.module.register_module_forward_hook
    fast(X, T)
    for register in (network.conv.register_forward_hook, network.conv.register_forward_pre_hook, of_all):
        handle = register(lambda module, *args: runs.append(1) if module is network.conv else None)
        assert torch.equal(fast(X, T), network(X, T))
        handle.remove()
        assert_close(fast(X, T), network(X, T))
    assert len(runs) == 6
    assert [case.why_not for case in _compiled[network].cases.values()] == [""]


def test_an_optimized_network_shares_all_and_is_of_a_subclass_by_the_same_name():
    network = network_of(lambda n, x, t: n.conv(x))
    fast = optimize(network)
    assert isinstance(fast, Net) and type(fast) is not Net and type(fast).__name__ == "Net"
    assert fast.state_dict().keys() == network.state_dict().keys() and fast.conv is network.conv
    fast.conv = fast.other
    assert network.conv is network.other
    assert_close(fast(X, T), network(X, T))
    assert fast.train() is fast and network.conv.training


def test_a_pickle_of_an_optimized_network_is_optimized_where_it_is_loaded():
    fast = optimize(nn.Sequential(nn.Conv2d(8, 8, 3)).eval().requires_grad_(False))
    loaded = pickle.loads(pickle.dumps(fast))
    assert is_optimized(loaded) and torch.equal(loaded(X), fast(X))
    assert b"diffkern" not in pickle.dumps(unwrapped(fast))


# --- samples, memory ---


def test_conditions_that_mix_the_batch_are_computed_for_it():
    network = network_of(lambda n, x, t: n.conv(x) * (t / t.max())[:, None, None, None])
    fast = optimize(network)
    for t in (torch.ones(3), T, T.flip(0)):
        assert_close(fast(X, t), network(X, t))
    assert not explain(network, X, T).independent


def test_a_sample_of_a_graph_of_ours_has_the_same_bits_in_any_batch():
    vector = lambda n, t: n.q(t.sin()[:, None].expand(-1, 8))[..., None, None]  # noqa: E731
    network = network_of(lambda n, x, t: F.silu(n.norm(x + (n.conv(x) + vector(n, t)))))
    assert explain(network, X, T).independent
    fast = optimize(network)
    whole = fast(X, T)
    assert torch.equal(torch.cat([fast(x, t) for x, t in zip(X.split(1), T.split(1), strict=True)]), whole)


def test_packed_weights_go_with_the_recordings_that_use_them():
    network = network_of(lambda n, x, t: n.conv(x))
    fast = optimize(network)
    for size in range(5, 15):
        fast(X[:, :, :1, :1].expand(3, 8, size, size), T)
    store = _compiled[network]._store._packed
    assert len(_compiled[network].cases) == 4
    assert 1 <= len(store) <= 2
    network.conv.weight.add_(1)
    fast(X, T)
    gc.collect()
    assert len(store) == 0  # the store of the weights that were


BACK = {
    "a bound method": lambda n: n.forward,
    "a closure": lambda n: lambda: n,
    "a list": lambda n: [n],
    "its optimized form": optimize,
}


def test_a_network_that_its_modules_refer_to_is_garbage_with_all_that_was_made_of_it():
    def made_of(back: Callable) -> list[weakref.ref]:
        network = network_of(lambda n, x, t: n.conv(x))
        network.conv.back = back(network)
        fast = optimize(network)
        fast(X, T)
        made = compiled_module.compiled(network)
        optimize(network)(X, T)
        assert compiled_module.compiled(network) is made
        assert [case.why_not for case in made.cases.values()] == [""]
        (packed,) = made._store._packed.values()
        return [weakref.ref(thing) for thing in (network, made, packed)]

    gone = {name: made_of(back) for name, back in BACK.items()}
    gc.collect()
    assert not {name for name, things in gone.items() if any(thing() is not None for thing in things)}


# --- torch.compile ---


def test_torch_compile_takes_the_engine_as_a_backend(captures):
    network = network_of(lambda n, x, t: n.conv(F.silu(n.norm(x))) + x)
    compiled = torch.compile(network, backend=backend, dynamic=False)
    with torch.no_grad():
        got = compiled(X, T)
        assert_close(got, network(X, T))
        assert not torch.equal(got, network(X, T))  # other kernels
        before = len(captures)
        assert_close(compiled(2 * X, T), network(2 * X, T))
        assert len(captures) == before
        network.conv.weight.mul_(2)
        assert_close(compiled(X, T), network(X, T))
        assert not torch.equal(compiled(X, T), network(X, T))  # other kernels
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x, T).sum(), x)
    (expected,) = torch.autograd.grad(network(x, T).sum(), x)
    assert_close(gradient, expected)


def test_torch_compile_trains_by_the_engine_as_a_backend():
    def step(network: nn.Module, forward: Callable) -> list[Tensor]:
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        forward(X, T).square().mean().backward()
        optimizer.step()
        with torch.no_grad():  # by the weights as they are now
            return [*(weight.grad for weight in network.parameters()), forward(X, T)]

    network = with_random_weights(Net(lambda n, x, t: F.silu(n.norm(n.conv(x)))))
    for name in ("other", "point", "down", "layer", "q", "k", "v", "wide", "wide_norm", "batch_norm"):
        delattr(network, name)
    again = copy.deepcopy(network)
    expected = step(again, again)
    for got, right in zip(step(network, torch.compile(network, backend=backend, dynamic=False)), expected, strict=True):
        assert_close(got, right)


def test_the_package_tells_torch_of_its_backend():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    entry = importlib.metadata.EntryPoint(
        "diffkern", project["entry-points"]["torch_dynamo_backends"]["diffkern"], "torch_dynamo_backends"
    )
    assert entry.load() is backend


# --- public networks ---


def _unet2d(**options):
    import diffusers

    config = dict(sample_size=16, block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1)
    kinds = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return diffusers.UNet2DModel(**config | kinds | options), (torch.randn(2, 3, 16, 16), torch.tensor([3, 700]))


def _resnet_kinds(**options):
    kinds = dict(down_block_types=("ResnetDownsampleBlock2D",) * 2, up_block_types=("ResnetUpsampleBlock2D",) * 2)
    return _unet2d(**kinds, downsample_type="resnet", upsample_type="resnet", **options)


def _condition(**options):
    import diffusers

    net = diffusers.UNet2DConditionModel(
        **dict(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
               attention_head_dim=4, norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
               up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")) | options
    )  # fmt: skip
    return net, (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 7, 24))


def _vae(part: str):
    import diffusers

    kinds = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    net = diffusers.AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1, **kinds)
    return getattr(net, part), (torch.randn(2, 4, 8, 8) if part == "decoder" else torch.randn(2, 3, 16, 16),)


def _tiny_vae(part: str):
    import diffusers

    net = diffusers.AutoencoderTiny(encoder_block_out_channels=(16,) * 4, decoder_block_out_channels=(16,) * 4,
                                    num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)  # fmt: skip
    return getattr(net, part), (torch.randn(2, 4, 8, 8) if part == "decoder" else torch.randn(2, 3, 32, 32),)


def _dit(**options):
    import diffusers

    heads = dict(num_attention_heads=2, attention_head_dim=16, norm_num_groups=4, num_embeds_ada_norm=10)
    net = diffusers.DiTTransformer2DModel(in_channels=4, num_layers=2, sample_size=8, patch_size=2, **heads)
    return net, (torch.randn(2, 4, 8, 8), torch.tensor([1, 7])), dict(class_labels=torch.tensor([0, 5]))


class Bottleneck(nn.Module):
    """He et al. 2016, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.shortcut, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.inner(x) + self.shortcut(x)).mean((2, 3)))


def _modules(*modules: nn.Module, x: Tensor):
    return nn.Sequential(*modules), (x,)


FAST = {
    "cross attention": lambda: _condition(),
    "vae decoder": lambda: _vae("decoder"),
    "residual network": lambda: (Bottleneck(), (torch.randn(2, 3, 8, 8),)),
    "mlp": lambda: _modules(
        nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2), x=torch.randn(5, 6)
    ),
}
SLOW = {
    "unet2d": lambda: _unet2d(),
    "scale shift": lambda: _unet2d(resnet_time_scale_shift="scale_shift"),
    "resnet resampling": lambda: _resnet_kinds(),
    "resnet resampling, scale shift": lambda: _resnet_kinds(resnet_time_scale_shift="scale_shift"),
    "fourier": lambda: _unet2d(time_embedding_type="fourier"),
    "gelu": lambda: _unet2d(act_fn="gelu"),
    "mish": lambda: _unet2d(act_fn="mish"),
    "heads": lambda: _unet2d(attention_head_dim=4),
    "mid scale": lambda: _unet2d(mid_block_scale_factor=2**0.5),
    "no attention": lambda: _unet2d(
        add_attention=False, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
    ),
    "skip blocks": lambda: _unet2d(
        down_block_types=("SkipDownBlock2D",) * 2, up_block_types=("SkipUpBlock2D",) * 2, block_out_channels=(32, 64)
    ),
    "center input": lambda: _unet2d(center_input_sample=True),
    "linear projection": lambda: _condition(use_linear_projection=True),
    "only cross attention": lambda: _condition(only_cross_attention=True),
    "upcast": lambda: _condition(upcast_attention=True),
    "condition, scale shift": lambda: _condition(resnet_time_scale_shift="scale_shift"),
    "simple cross attention": lambda: _condition(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    ),
    "vae encoder": lambda: _vae("encoder"),
    "tiny encoder": lambda: _tiny_vae("encoder"),
    "tiny decoder": lambda: _tiny_vae("decoder"),
    "dit": lambda: _dit(),
    "transformer": lambda: _modules(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), x=torch.randn(2, 9, 16)),
    "transposed": lambda: _modules(
        nn.Conv2d(3, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.Tanh(), x=torch.randn(2, 3, 8, 8)
    ),
    "grouped and dilated": lambda: _modules(
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 8, 3, padding=2, dilation=2),
        nn.PixelShuffle(2),
        nn.InstanceNorm2d(2),
        x=torch.randn(2, 8, 8, 8),
    ),
    "weight norm": lambda: _modules(
        nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1)), nn.Softmax(1), x=torch.randn(2, 8, 8, 8)
    ),
    "one dimension": lambda: _modules(
        nn.Conv1d(8, 8, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv1d(8, 8, 3), x=torch.randn(2, 8, 9)
    ),
}


def assert_agrees(make: Callable) -> None:
    torch.manual_seed(0)
    network, args, *kwargs = make()
    network, kwargs = with_random_weights(network).eval().requires_grad_(False), kwargs[0] if kwargs else {}
    found = explain(network, *args, **kwargs)
    assert found.why_not == "" and found.share > 0.2, str(found)
    fast = optimize(network)
    for factor in (1.0, -0.7):
        inputs = [arg * factor if arg.is_floating_point() else arg for arg in args]
        got, expected = (getattr(y, "sample", y) for y in (fast(*inputs, **kwargs), network(*inputs, **kwargs)))
        assert_close(got, expected)


@pytest.mark.parametrize("name", FAST)
def test_a_public_network_is_its_own_twin(name):
    assert_agrees(FAST[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_public_networks_are_their_own_twins(name):
    assert_agrees(SLOW[name])
