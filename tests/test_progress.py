"""Progress: what a log file gets, and what a stderr that has gone away does to a run: nothing."""

import sys

import pytest

from diffkern import progress


class Gone:
    """A terminal that has hung up."""

    def isatty(self):
        return True

    def fileno(self):
        raise OSError("hung up")

    def write(self, text):
        raise OSError("hung up")

    flush = fileno


def test_a_file_gets_a_line_each_report_and_no_redraws(capsys):
    with progress.bar(80, "training", "img", initial=8) as bar:
        for step in (1, 2):
            bar.update(8)
            bar.report(step=step, loss="0.5")
        bar.update(8)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(", ")[:3] for line in lines] == [
        ["training: 16/80 img", "step 1", "loss 0.5"],
        ["training: 24/80 img", "step 2", "loss 0.5"],
    ]
    assert all(line.endswith(" left") and " img/s, " in line for line in lines)


def test_more_time_than_python_can_tell_is_told_as_the_longest(capsys, monkeypatch):
    clock = iter([0.0, 60.0, 60.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.bar(2**62, "training", "img") as bar:
        bar.update(64)
        bar.report()
    assert capsys.readouterr().err.endswith(", 1.1 img/s, 999999999 days, 0:00:00 left\n")


@pytest.mark.parametrize(("seconds", "lines"), [(0, 10), (3600, 0)])
def test_a_file_gets_a_line_each_tenth_of_work_that_takes_long(capsys, monkeypatch, seconds, lines):
    monkeypatch.setattr(progress, "SECONDS", seconds)
    with progress.bar(995, "sampling", "step") as bar:
        for _ in range(995):
            bar.update()
    assert capsys.readouterr().err.count("\n") == lines


def test_a_file_gets_a_line_after_a_long_silence(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SILENCE", 0)
    with progress.bar(1000, "features of ddpm", "img") as bar:
        bar.update(3)
    assert capsys.readouterr().err.startswith("features of ddpm: 3/1000 img, ")


def test_progress_that_is_not_wanted_is_silent(capsys):
    with progress.bar(1, "training", "img", False) as bar:
        bar.update()
        bar.report(step=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("stderr", [None, Gone()], ids=["closed", "hung up"])
def test_a_stderr_that_is_gone_ends_nothing(capsys, monkeypatch, stderr):
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress.bar(10, "training", "img") as bar:
        bar.update(10)
        bar.report(step=1)
    progress.tell("a line")
    assert capsys.readouterr() == ("", "")
