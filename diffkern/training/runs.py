"""The surroundings of a training run: its folder and lock, log.csv, and the signals that end it."""

import contextlib
import csv
import errno
import fcntl
import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..io.files import write_atomically
from ..process import checked_count, checked_float

LOG, LOCK = "log.csv", ".lock"

# --- the folder --------------------------------------------------------------------------------------------------


def check_folder(out: str | os.PathLike) -> None:
    """Raise OSError unless the folder ``out`` can be written to, or be made; nothing stays behind."""
    path = Path(out).absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=there):
            pass
    except OSError as error:
        raise type(error)(f"out: expected a folder to write to, got {os.fspath(out)!r} ({error.strerror})") from None


@contextlib.contextmanager
def locked(out: str | os.PathLike) -> Iterator[int]:
    """Within, no other process can hold the lock of the folder ``out``: RuntimeError if one does already.

    The lock ends with its process, however that ends; the file that is left in the folder means nothing by itself.
    A file system without locks is used without.
    """
    file = os.open(Path(out) / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"out: expected a folder that no other run writes to, got {os.fspath(out)!r}, where one is at work"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
        yield file
    finally:
        os.close(file)


# --- log.csv -----------------------------------------------------------------------------------------------------

FORMATS = {"loss": ".6f", "lr": ".6g", "images_per_second": ".1f", "validation_loss": ".6f"}
"""How log.csv writes the numbers of a step."""

COLUMNS = ("step", *FORMATS)
"""The columns of log.csv. The last, which may be empty, is not in the logs of earlier versions."""

CURVES = {"training": "loss", "validation": "validation_loss"}
"""The columns that are drawn, by the names of their curves."""


@dataclass
class Unlogged:
    """The losses since the last line of the log: their sum and their number. A checkpoint holds them."""

    total: float = 0.0
    count: int = 0

    def __post_init__(self):
        checked_float("total", self.total, "a finite number", lambda value: True)
        checked_count("count", self.count, 0)

    def add(self, loss: float) -> None:
        self.total += loss
        self.count += 1


class Log:
    """log.csv: the mean loss since the line before, which a checkpoint may have begun, and the loss on held-out data.

    Lines later than the checkpoint that is resumed are dropped, and so is an early one at the end of a run: the
    checkpoint still holds its losses for the next line. Damaged ones are dropped with a warning.
    """

    HEADER, OLD_HEADER = ",".join(COLUMNS), ",".join(COLUMNS[:-1])

    def __init__(self, path: Path, steps: int, unlogged: Unlogged | None = None):
        self.path, self.unlogged = path, Unlogged() if unlogged is None else unlogged
        self.count, self.since = 0, time.monotonic()
        text = path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""
        *lines, cut = text.replace("\r\n", "\n").split("\n")  # what follows the last line break was cut off
        lines = lines[1:] if lines[:1] in ([self.HEADER], [self.OLD_HEADER]) else lines
        lines = [f"{line}," if line.count(",") == self.OLD_HEADER.count(",") else line for line in lines]
        steps_of_lines = [_step_of(line) for line in lines]
        damaged = steps_of_lines.count(None) + (cut != "")
        if damaged:
            warnings.warn(f"{path}: dropped {damaged} damaged lines; expected {self.HEADER}", stacklevel=2)
        last = steps - 1 if self.unlogged.count else steps
        kept = [line for line, step in zip(lines, steps_of_lines, strict=True) if step is not None and step <= last]
        whole = "".join(f"{line}\n" for line in (self.HEADER, *kept))
        if whole != text:
            write_atomically(path, lambda temporary: temporary.write_text(whole, encoding="utf-8"))

    def add(self, loss: float) -> None:
        self.unlogged.add(loss)
        self.count += 1

    def write(
        self, step: int, lr: float, batch_size: int, validation_loss: float | None = None, *, early: bool = False
    ) -> dict[str, float]:
        """Append the line of ``step``; returns its numbers by column. The rate counts this process's steps alone.

        early  the line is not due yet: its losses count in the next one, too
        """
        now = time.monotonic()
        mean, rate = self.unlogged.total / self.unlogged.count, self.count * batch_size / (now - self.since)
        numbers = dict(loss=mean, lr=lr, images_per_second=rate)
        if validation_loss is not None:
            numbers["validation_loss"] = validation_loss
        cells = {"step": f"{step}"} | {name: f"{value:{FORMATS[name]}}" for name, value in numbers.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(",".join(cells.get(name, "") for name in COLUMNS) + "\n")
        if not early:
            self.unlogged.total, self.unlogged.count = 0.0, 0
            self.count, self.since = 0, now
        return numbers

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """(step, loss) of each line, by the names of :data:`CURVES`."""
        with self.path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        return {name: [(int(line["step"]), float(line[c])) for line in lines if line[c]] for name, c in CURVES.items()}


def _step_of(line: str) -> int | None:
    """The step that a line of the log is about, None if it is not such a line."""
    try:
        step, *numbers, held_out = line.split(",")
        read = [int(step), *map(float, (*numbers, held_out or 0))]
        return read[0] if len(read) == len(COLUMNS) else None
    except ValueError:
        return None


# --- signals -----------------------------------------------------------------------------------------------------

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""They end a run with a checkpoint: Ctrl-C; a scheduler, a container or a launcher; a connection that is lost."""

SAVING = signal.SIGUSR1
"""It has a run write a checkpoint and go on: a scheduler's warning that time is nearly up."""

IMPATIENCE = 1.0
"""Seconds from one Ctrl-C to the next from which on the second means "now": launchers send two within milliseconds."""


class Signals:
    """The signals that have come and that a run has not heeded yet."""

    def __init__(self) -> None:
        self.stop = self.save = 0
        self.interrupted_at: float | None = None

    def take(self) -> int:
        """The number of the signal to heed after this step, 0 for none. A stop stays; a save is taken once."""
        taken, self.save = self.stop or self.save, 0
        return taken


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Collect ``STOPPING`` and ``SAVING`` instead of dying by them, in the main thread.

    Repetitions change nothing, except a Ctrl-C more than ``IMPATIENCE`` seconds after the first: that acts as it did
    before. A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """
    received = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (*STOPPING, SAVING)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def receive(number, frame):
        if number == SAVING:
            received.save = number
            return
        received.stop = received.stop or number
        if number == signal.SIGINT:
            now = time.monotonic()
            if received.interrupted_at is None:
                received.interrupted_at = now
            elif now - received.interrupted_at > IMPATIENCE:
                signal.signal(number, before[number])
                signal.raise_signal(number)

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """For a process that has saved and is about to leave: its status shall be its own, whatever a launcher repeats."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
