"""A CUDA graph of a step belongs to the device of the network, whichever is current. torch.cuda is a fake."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from diffkern.sampling import _Loop


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
def test_a_graph_is_recorded_and_replayed_on_the_device_of_x(monkeypatch, batches):
    cuda, rows, device = FakeCuda(), 3, torch.device("meta")
    monkeypatch.setattr(torch, "cuda", cuda)
    loop = SimpleNamespace(
        graph=None,
        x=torch.empty(1, device=device),
        seeds=None,
        labels=None,
        table=range(rows),
        step=lambda: cuda.note("step"),
        begin=lambda *start: cuda.note("begin"),
    )
    ticks = []
    for _ in range(batches):
        _Loop.replay(loop, lambda: ticks.append(cuda.current))
    assert {current for _, current in cuda.seen} == {device} and cuda.current is None
    names = [name for name, _ in cuda.seen if name != "stream"]
    assert names == ["warm-up", "step", "capture", "step", "begin", *["replay"] * rows * batches]
    assert len(ticks) == rows * batches
