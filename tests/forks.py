"""Children of a fork."""

import os
import time


def exit_code(child: int, seconds: float = 60) -> int | None:
    """Of a process that was forked; None, and it is killed, if it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None
