"""Children of a fork."""

import functools
import json
import os
import subprocess
import sys
import time

from interpreted import ROOT


def exit_code(child: int, seconds: float = 60) -> int | None:
    """Return the exit code of a forked process; None, and it is killed, if it does not end in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None


def python(program: str) -> subprocess.CompletedProcess:
    """Run the program in a new process that has imported torch and nothing of diffkern."""
    server = _server()
    server.stdin.write(json.dumps(program) + "\n")
    server.stdin.flush()
    returncode, stdout, stderr = json.loads(server.stdout.readline())
    return subprocess.CompletedProcess(program, returncode, stdout, stderr)


@functools.cache
def _server() -> subprocess.Popen:
    """A process that imports torch once: its children need not."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, "-c", SERVER]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


SERVER = """
import json, os, sys, tempfile, traceback
import torch

def run(program):
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        if not isinstance(leaving.code, str):
            return leaving.code or 0
        print(leaving.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    streams = [tempfile.TemporaryFile("w+") for _ in range(2)]
    child = os.fork()
    if not child:
        for number, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), number)
        returncode = run(json.loads(line))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(returncode)  # the interpreter would take a second to take torch down
    returncode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([returncode, *(stream.seek(0) or stream.read() for stream in streams)]), flush=True)
"""
