"""The fixture of every benchmark: ours beside its peers, checked first, then timed in turns on the same threads.

A benchmark asks for ``compare`` and calls it once::

    def test_op(compare):
        compare(
            "op [64, 3, 32, 32]",
            lambda: ops.op(x),
            {"torch": lambda: reference.op(x)},
            tolerance=1e-5,
            elements=x.numel(),
            bytes=8 * x.numel(),
        )

and a line of the report at the end of the run reads: the median time, the time an element, the rate and its share of
what this machine was measured to reach, and by how much ours is faster than each peer (the median, over the turns, of
the quotient of two neighbouring times).

``pytest benchmarks --benchmark-only`` takes a quarter of an hour at most: each op beside its reference. ``--peers``
adds inductor and the other inference engines that are installed; ``--large`` adds the larger networks and more shapes.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import engines
import pytest
import torch
from torch import Tensor

TURNS = 25
SECONDS = 1.5  # for all turns of one comparison, roughly
SHORTEST = 2e-3  # a measurement repeats a call until it lasts this long
SETTLE = 5e-3  # before it, and one call untimed: the threads of the call before still spin, its data fill the caches

Call = Callable[[], object]
_report: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peers", action="store_true", help="inductor and other engines (pip install -e .[bench-peers])")
    parser.addoption("--large", action="store_true", help="large networks, and every shape of the tables")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "large: takes long; with --large")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--large"):
        large = [item for item in items if item.get_closest_marker("large")]
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if item not in large]


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _in_turns(calls: Mapping[str, Call]) -> dict[str, list[float]]:
    """Seconds a call, a list with an entry for each turn; every turn measures each call once."""
    for call in calls.values():
        call()  # warm: caches, thread pools, lazy initialisation
    once = {name: _seconds(call, 1) for name, call in calls.items()}
    repeats = {name: max(1, round(SHORTEST / seconds)) for name, seconds in once.items()}
    turn = sum(once[name] * repeats[name] for name in calls)
    turns = max(3, min(TURNS, int(SECONDS / turn)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            time.sleep(SETTLE)
            call()
            times[name].append(_seconds(call, repeats[name]))
    return times


def _copy_of(size: int) -> Call:
    """Moves ``size`` bytes, half of them read and half written: the ceiling of an op with that traffic."""
    source = torch.ones(max(1, size // 8))
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@pytest.fixture(scope="session")
def peak_flops() -> Callable[[torch.dtype], float]:
    """Floating-point operations a second of a square matrix product: the ceiling of an op that computes."""
    measured: dict[torch.dtype, float] = {}

    def peak(dtype: torch.dtype) -> float:
        if dtype not in measured:
            n = 1024
            a, b = torch.randn(2, n, n, dtype=torch.float32, generator=torch.Generator().manual_seed(0)).to(dtype)
            out = torch.empty_like(a)
            (times,) = _in_turns({"product": lambda: torch.mm(a, b, out=out)}).values()
            measured[dtype] = 2 * n**3 / min(times)
        return measured[dtype]

    return peak


@pytest.fixture
def other_engines(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., dict[str, Call]]:
    """``other_engines(network, x, t)``: the network in torch, and with ``--peers`` in every engine that is there."""
    return functools.partial(engines.calls, folder=tmp_path, peers=request.config.getoption("--peers"))


def _as_tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]


@pytest.fixture
def compare(benchmark, peak_flops) -> Callable[..., None]:
    """See this module. Results are compared by ``tolerance``, or by ``same(ours, peers)`` where that is no
    measure (other noise); ``unchecked`` are peers that compute something less exact."""

    def compare(
        title: str,
        ours: Call,
        peers: Mapping[str, Call],
        *,
        tolerance: float = 1e-5,
        same: Callable[[object, object], None] | None = None,
        unchecked: Mapping[str, Call] | None = None,
        elements: int | None = None,
        bytes: int | None = None,
        flops: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        expected = _as_tensors(ours())
        expected = [tensor.clone() for tensor in expected]
        for peer in peers.values():
            result = _as_tensors(peer())
            if same is not None:
                same(expected, result)
            else:
                torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)
        if benchmark.disabled:
            benchmark(ours)
            return

        peers = {**peers, **(unchecked or {})}
        calls = {"ours": ours, **peers}
        if bytes is not None:
            calls["copy"] = _copy_of(bytes)
        times = _in_turns(calls)
        seconds = statistics.median(times["ours"])

        def faster(name: str) -> float:
            return statistics.median(peer / own for peer, own in zip(times[name], times["ours"], strict=True))

        facts = [f"{seconds * 1e6:10.1f} us"]
        if elements is not None:
            facts.append(f"{seconds / elements * 1e9:7.3f} ns/element")
        if bytes is not None:
            facts.append(f"{bytes / seconds * 1e-9:6.1f} GB/s ({faster('copy'):4.0%} of a copy)")
        if flops is not None:
            rate = flops / seconds
            facts.append(f"{rate * 1e-9:7.1f} GFLOP/s ({rate / peak_flops(dtype):4.0%} of a matrix product)")
        facts += [f"{faster(name):.2f}x {name}" for name in peers]
        _report.append(f"{title:<52} " + "  ".join(facts))
        benchmark.extra_info.update({name: round(faster(name), 3) for name in calls if name != "ours"})
        benchmark.pedantic(ours, rounds=len(times["ours"]), iterations=max(1, round(SHORTEST / seconds)))

    return compare


def pytest_terminal_summary(terminalreporter) -> None:
    if _report:
        terminalreporter.section(f"ours, and how many times faster it is ({torch.get_num_threads()} threads)")
        for line in _report:
            terminalreporter.write_line(line)
