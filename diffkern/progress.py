"""Progress on stderr: a bar on a terminal and in a notebook, plain lines anywhere else.

A stderr that is closed, full or hung up ends nothing: what cannot be written is left out.
"""

import contextlib
import sys
import time
from datetime import timedelta
from typing import Any

TENTHS, SECONDS, SILENCE = 10, 10, 300
"""Lines nobody asks for come at each tenth of the work, and at least SECONDS seconds after the one before; and SILENCE
seconds after it at the latest."""

LONGEST = timedelta.max.days * 86400
"""In seconds. A time left that is longer, which Python could not write, is told as this."""


def tell(line: str) -> None:
    """Write one line to stderr, if there is one that can be written to."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: closed within Python
        if sys.stderr is not None:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()


def bar(total: int, desc: str, unit: str, enabled: bool = True, *, initial: int = 0) -> Any:
    """Begin the progress of ``total`` units, ``initial`` of which are done, as a context manager.

    ``update(n)`` counts n more units. ``report(**values)`` shows values, and in a file it writes a line at once.
    """
    if enabled and sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules):
        from tqdm.auto import tqdm  # in a notebook, a widget where it can be one

        shown = tqdm(total=total, desc=desc, unit=unit, initial=initial, file=_Screen(), dynamic_ncols=True)
        shown.report = shown.set_postfix
        return shown
    return Lines(total, desc, unit, enabled, initial)


class _Screen:
    """stderr, which may go away: a terminal does when its connection is lost."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


class Lines:
    """The same as plain lines: ``training: 6400/64000 img, step 100, loss 0.1234, 512.3 img/s, 0:01:52 left``."""

    def __init__(self, total: int, desc: str, unit: str, enabled: bool, initial: int):
        self.total, self.desc, self.unit, self.enabled = total, desc, unit, enabled
        self.done = self.told = self.initial = initial
        self.start = self.told_at = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.done += n
        tenth = self.done * TENTHS // self.total > self.told * TENTHS // self.total
        if time.monotonic() - self.told_at >= (SECONDS if tenth else SILENCE):
            self.report()

    def report(self, **values: Any) -> None:
        if not self.enabled:
            return
        now = time.monotonic()
        rate = (self.done - self.told) / max(now - self.told_at, 1e-9)
        left = (self.total - self.done) * (now - self.start) / max(self.done - self.initial, 1)
        left = timedelta(seconds=round(min(left, LONGEST)))
        shown = [f"{self.done}/{self.total} {self.unit}", *(f"{name} {value}" for name, value in values.items())]
        tell(f"{self.desc}: {', '.join(shown)}, {rate:.1f} {self.unit}/s, {left} left")
        self.told, self.told_at = self.done, now
