"""How should OpenMP threads wait? An op, a network and a training step by each policy, alone and beside a neighbour.

    python -m benchmarks.waiting

Each policy has a process of its own, since libgomp reads its variables once. The neighbour is a process that computes
on one core without a pause. Median milliseconds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

POLICIES = {
    "default": {},
    "active": {"OMP_WAIT_POLICY": "active"},
    "spin 1,000": {"GOMP_SPINCOUNT": "1000"},
    "spin 10,000": {"GOMP_SPINCOUNT": "10000"},
    "spin 100,000": {"GOMP_SPINCOUNT": "100000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def measure(seconds: float) -> dict[str, float]:
    """Median milliseconds of each subject in this process."""
    import torch

    from diffkern import load, ops
    from diffkern.data import Dataset
    from diffkern.engine import optimize
    from diffkern.training import Config, Trainer, new_model

    torch.set_grad_enabled(True)
    model = load("fashion-mnist")
    network = optimize(model.network)
    images = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    config = Config(batch_size=16, network={"channels": 32, "channel_mult": (1, 2), "attention_levels": (1,)})
    trainer = Trainer(new_model(Dataset(images), config), Dataset(images), config)
    x, seeds = torch.zeros(16, 1, 32, 32), torch.arange(16)

    @torch.no_grad()
    def run(n: int) -> None:
        network(x[:n], torch.full((n,), 500), torch.zeros(n, dtype=torch.int64))

    subjects: dict[str, Callable] = {
        "noise [16, 1, 32, 32]": lambda: ops.noise(seeds, (1, 32, 32), step=0),
        "shipped network, 1 image": lambda: run(1),
        "16 images": lambda: run(16),
        "training step of 16": trainer.step,
    }
    found = {}
    for name, subject in subjects.items():
        times = []
        subject(), subject()
        end = time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            before = time.perf_counter()
            subject()
            times.append(time.perf_counter() - before)
        found[name] = 1e3 * statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each subject (default: 2)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.seconds)))
        return
    for neighbours in (0, 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(neighbours)]
        try:
            rows = {name: _apart(variables, arguments.seconds) for name, variables in POLICIES.items()}
        finally:
            for process in busy:
                process.kill()
        print(f"\n{'beside a neighbour' if neighbours else 'alone'}, ms\n")
        subjects = next(iter(rows.values()))
        print("| waiting | " + " | ".join(subjects) + " |\n| --- " + "| ---: " * len(subjects) + "|")
        for name, found in rows.items():
            print(f"| {name} | " + " | ".join(f"{value:.3g}" for value in found.values()) + " |", flush=True)


def _apart(variables: dict[str, str], seconds: float) -> dict[str, float]:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | variables
    command = [sys.executable, "-m", "benchmarks.waiting", "--measure", "--seconds", str(seconds)]
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    main()
