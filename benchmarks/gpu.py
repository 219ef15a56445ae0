"""The loop and every kernel on a CUDA card, beside their peers, in 8 minutes: ``python -m benchmarks.gpu``.

The network and whole sampling come first, then attention, group norm and the elementwise ops: after 7 minutes no case
is begun. diffusers is a peer where it is installed.

Each result is checked before it is timed. Times are of CUDA events: the median of runs after a warm-up, the L2 cache
flushed before each, which also lets the host run ahead. A line ends with by how much ours is faster than each peer; the
share is of what this card was measured to reach: a copy, or a matrix product of that dtype. ``--json FILE`` keeps all
times. ``--device cpu --check`` checks small cases on a machine without a card, and times nothing.
"""

import argparse
import json
import sys
import time
from pathlib import Path

SECONDS = 420  # after which no case is begun


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--check", action="store_true", help="check every result and time nothing")
    parser.add_argument("--only", default="", help="cases whose title has this in it")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes long to begin")
    parser.add_argument("--json", type=Path, help="a file for all times")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.check:
        parser.error("--device cpu: expected --check with it, for times are of a CUDA device")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    import torch  # not before: --help needs no torch

    from benchmarks.gpu_cases import Cases, check
    from benchmarks.gpu_timer import Timer, line

    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: there is no CUDA device")
    start, device = time.monotonic(), torch.device(options.device)
    timer = None if options.check else Timer()
    if timer:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, a copy at {timer.bandwidth * 1e-9:.0f} GB/s")
    kept, wrong = {}, []
    for case in Cases(device, small=device.type == "cpu", compiled=not options.no_compile):
        if options.only not in case.title:
            continue
        if time.monotonic() - start > SECONDS:
            print(f"{case.title:<64} left out: {SECONDS} s are over")
            continue
        try:
            check(case)
        except AssertionError as error:  # the rest of the run is worth having
            print(f"{case.title:<64} differs: {str(error).strip().partition(chr(10))[0]}", flush=True)
            wrong.append(case.title)
            continue
        others = {**case.peers, **({"reference": case.reference} if case.reference else {})}
        if timer is None:
            print(f"{case.title:<64} agrees with {', '.join(others)}")
            continue
        kept[case.title] = {name: timer(call) for name, call in {"ours": case.ours, **others}.items()}
        print(line(case, kept[case.title], timer), flush=True)
        if options.json:
            options.json.write_text(json.dumps(kept))
    if wrong:
        sys.exit(f"benchmarks.gpu: results differ from their peers': {', '.join(wrong)}")


if __name__ == "__main__":
    main()
