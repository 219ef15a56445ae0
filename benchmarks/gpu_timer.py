"""Times of calls on a CUDA card, by its events."""

import statistics
from collections.abc import Mapping

import torch

from benchmarks.gpu_cases import Call, Case

RUN_SECONDS, MOST_RUNS, FEWEST_RUNS, WARM = 0.15, 50, 5, 3  # of one call
FLUSH_BYTES, COPY_BYTES, PRODUCT = 256 << 20, 1 << 30, 8192


class Timer:
    """Times calls on the current card; knows its ceilings."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        self.bandwidth = 2 * COPY_BYTES / statistics.median(self(lambda: target.copy_(source)))
        self.rates: dict[torch.dtype, float] = {}

    def __call__(self, call: Call) -> list[float]:
        """Seconds of each run."""
        for _ in range(WARM):
            call()
        (first,) = self.runs(call, 1)
        return self.runs(call, max(FEWEST_RUNS, min(MOST_RUNS, round(RUN_SECONDS / first))))

    def runs(self, call: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for begin, end in events:
            self.flush.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) * 1e-3 for begin, end in events]

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product."""
        if dtype not in self.rates:
            a, b = torch.randn(2, PRODUCT, PRODUCT, device="cuda").to(dtype)
            self.rates[dtype] = 2 * PRODUCT**3 / statistics.median(self(lambda: a @ b))
        return self.rates[dtype]


def line(case: Case, times: Mapping[str, list[float]], timer: Timer) -> str:
    median = {name: statistics.median(runs) for name, runs in times.items()}
    ours = median.pop("ours")
    facts = [f"{case.title:<64} {ours * 1e6:10.1f} us"]
    if case.bytes:
        facts.append(f"{case.bytes / ours * 1e-9:7.0f} GB/s {case.bytes / ours / timer.bandwidth:4.0%} of a copy")
    if case.flops:
        rate = case.flops / ours
        facts.append(f"{rate * 1e-12:6.1f} TFLOP/s {rate / timer.rate(case.dtype):4.0%} of a product")
    return "  ".join([*facts, *(f"{peer / ours:.2f}x {name}" for name, peer in median.items())])
