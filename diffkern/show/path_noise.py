"""One seed at different numbers of steps, with the noise of a step and with that of a path.

    z of the step from s to t = (z(s) + z(s - 1) + .. + z(t + 1)) / sqrt(s - t)                     noise="path"

Points of a mixture are drawn by ``ddpm`` in a few steps and in all of them, from the same seeds. The table has the
correlation of the two and how many of the pairs belong to one mode. Over all steps both noises are the same.
"""

import torch

from ..sampling import sample
from ..schedule import Schedule
from . import Figure, Panel
from .mixture import DATA, LIMIT

PARTS = (100, 50, 20, 5)  # of all the steps
COLUMNS = ("noise", "steps", "correlation with all steps", "same mode")


def figure(n: int = 500, steps: int = 1000) -> Figure:
    """n seeds; some of the 1000 time steps of the linear schedule are all the steps there are."""
    model = DATA.model(Schedule.linear().respace(steps))
    options = dict(sampler="ddpm", batch_size=n, progress=False)
    all_steps = sample(model, n, **options)
    mode = DATA.log_parts(all_steps).argmax(1)
    rows, panels = [], []
    for noise in ("step", "path"):
        for few in (max(2, steps // part) for part in PARTS):
            x = sample(model, n, steps=few, noise=noise, **options)
            both = torch.stack((x.flatten(), all_steps.flatten())).double()
            same = (DATA.log_parts(x).argmax(1) == mode).double().mean().item()
            rows.append((noise, few, torch.corrcoef(both)[0, 1].item(), same))
            if len(rows) % len(PARTS) == 2:
                axes = dict(xlabel=f"x at {few} steps", ylabel=f"x at {steps} steps", aspect="equal")
                axes |= dict(xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT))
                points = {"": torch.stack((x[:, 0], all_steps[:, 0]), 1)}
                panels.append(Panel(f'noise="{noise}"', points=points, axes=axes))
    return Figure(COLUMNS, rows, panels)
