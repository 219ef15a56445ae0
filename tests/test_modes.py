"""Eval mode on loan: when the last call ends, every module has the flag that it had before the first."""

import os
import threading

import pytest
from forks import exit_code
from torch import nn

from diffkern.networks.modes import _loans, evaluating
from diffkern.sampling import sample
from diffkern.schedule import Schedule


def network() -> nn.Module:
    """Flags that neither train() nor eval() gives."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Dropout(), nn.Linear(1, 1)))
    net[1].eval()
    return net


def flags(net: nn.Module) -> list[bool]:
    return [module.training for module in net.modules()]


BEFORE = flags(network())


def test_calls_that_overlap_give_the_flags_back_when_the_last_one_ends():
    net = network()
    first, second, part = evaluating(net), evaluating(net), evaluating(net[0])
    for call in (first, second, part):
        call.__enter__()
        assert not any(flags(net))
    first.__exit__(None, None, None)
    assert not any(flags(net))
    second.__exit__(None, None, None)
    assert flags(net) == [True, False, False, False, False]  # the part is lent still
    part.__exit__(None, None, None)
    assert flags(net) == BEFORE and not _loans


def test_an_exception_gives_the_flags_back():
    net = network()
    with pytest.raises(KeyboardInterrupt), evaluating(net), evaluating(net):
        raise KeyboardInterrupt
    assert flags(net) == BEFORE and not _loans


def test_train_wins_over_the_flags_from_before():
    net = network().eval()
    with evaluating(net):
        net.train()
        with evaluating(net):
            assert not any(flags(net))
    assert all(flags(net)) and not _loans


def test_what_is_no_module_has_no_flags():
    with evaluating(lambda x_t, t, labels: x_t):
        assert not _loans


class Meeting(nn.Module):
    """A network that is called by all threads at once, at least once."""

    def __init__(self, threads: int):
        super().__init__()
        self.dropout, self.barrier, self.seen = nn.Dropout(), threading.Barrier(threads), []

    def forward(self, x_t, t, labels):
        self.seen.append((self.training, self.dropout.training))
        if t[0] == 1:
            self.barrier.wait(timeout=60)
        return x_t


def test_threads_that_sample_a_network_in_training_leave_it_in_training():
    net, errors = Meeting(4), []

    def run(steps: int) -> None:
        try:
            options = dict(schedule=Schedule.linear(20), prediction="x0", shape=(1, 4, 4), progress=False)
            # without the engine, which runs a network by one thread at a time: here they wait for each other inside
            sample(net, 2, steps=list(range(steps, -1, -1)), engine=False, **options)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(steps,)) for steps in (1, 2, 5, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert set(net.seen) == {(False, False)}
    assert all(flags(net)) and not _loans


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_child_of_a_fork_gives_back_what_other_threads_had_borrowed():
    net, entered, leave = network(), threading.Event(), threading.Event()

    def borrow() -> None:
        with evaluating(net):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=borrow)
    thread.start()
    assert entered.wait(60)
    with evaluating(net[1]):
        child = os.fork()
        if not child:
            os._exit(0 if flags(net) == BEFORE and set(_loans) == set(map(id, net[1].modules())) else 1)
        assert exit_code(child) == 0 and not any(flags(net))
    leave.set()
    thread.join()
    assert flags(net) == BEFORE
