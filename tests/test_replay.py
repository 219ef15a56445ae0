"""A CUDA graph of a row belongs to the device of the network, whichever is current. torch.cuda is a fake."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from diffkern.runtime import Loop
from diffkern.samplers import SAMPLERS
from diffkern.schedule import Schedule


class FakeCuda:
    """Notes on which device things happen. No device is current that nobody asked for."""

    def __init__(self):
        self.current, self.seen = None, []

    def note(self, name):
        self.seen.append((name, self.current))

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, device
        yield
        self.current = before

    def Stream(self):
        self.note("stream")
        return SimpleNamespace(wait_stream=lambda other: None)

    current_stream = Stream

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.note("replay"))

    @contextlib.contextmanager
    def stream(self, stream):
        self.note("warm-up")
        yield

    @contextlib.contextmanager
    def graph(self, graph):
        self.note("capture")
        yield


@pytest.mark.parametrize("batches", [1, 2])
def test_a_graph_of_each_kind_of_row_is_recorded_and_replayed_on_the_device_of_x(monkeypatch, batches):
    cuda, device = FakeCuda(), torch.device("meta")
    monkeypatch.setattr(torch, "cuda", cuda)
    rows = SAMPLERS["heun"].trace(Schedule.linear().grid(3)).rows
    loop = SimpleNamespace(
        x=torch.empty(1, device=device),
        row=torch.empty(1, device=device),
        slots=[],
        program=SimpleNamespace(rows=rows),
        graphs={},
        kind=lambda row: row.keep,
        step=lambda row: cuda.note("step"),
    )
    loop._record = lambda row: Loop._record(loop, row)
    ticks = []
    for _ in range(batches):
        Loop.replay(loop, lambda: ticks.append(cuda.current))
    assert {current for _, current in cuda.seen} == {device} and cuda.current is None
    names = [name for name, _ in cuda.seen if name != "stream"]
    recorded = ["warm-up", "step", "capture", "step", "replay"]  # of the first stage and of the second, and again
    assert names == [*recorded * 2, *["replay"] * (len(rows) * batches - 2)]
    assert len(ticks) == len(rows) * batches
