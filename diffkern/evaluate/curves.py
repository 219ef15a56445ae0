"""Samplers over network calls: how many steps they take, and how far their images are from the ODE's."""

from collections.abc import Sequence
from typing import Any

from .. import samplers
from ..model import Model
from ..sampling import sample
from .sources import labels_in_turn

CURVES = ("ddim", "dpmpp_2m", "unipc", "heun", "ddpm")
"""The samplers that are compared over network calls, unless others are named."""

LIMIT_STEPS = 1000  # or all time steps; on the shipped model 100 of them leave an rms error of .006, and 400 of .002


def steps_within(model: Model, sampler: str, calls: int) -> int:
    """The most steps that a sampler takes in that many network calls, one at least."""
    made, steps = samplers.SAMPLERS[sampler], max(1, calls // samplers.SAMPLERS[sampler].calls)
    most = model.schedule.T if model.schedule.discrete else calls
    while steps < most and made.trace(model.schedule.grid(steps + 1), model.prediction).calls <= calls:
        steps += 1
    return min(steps, most)


def distances_to_limit(
    model: Model, runs: Sequence[tuple[str, int]], *, n: int = 8, guidance: float = 1.0, **options: Any
) -> list[float | None]:
    """How far the images of ``runs`` (sampler, steps) are from those of the exact ODE: the rms difference of a pixel.

    Images are of the seeds 0..n-1 and labels in turn, unclipped. The ODE is solved by UniPC of order 3 in
    :data:`LIMIT_STEPS` steps from the same x_T. None for a sampler that draws noise: it solves no ODE.

    options  of :func:`diffkern.sample`: batch_size, dtype, progress
    """
    options |= dict(labels=labels_in_turn(model, n), guidance=guidance, clip=False)
    steps = min(LIMIT_STEPS, model.schedule.T) if model.schedule.discrete else LIMIT_STEPS
    limit = sample(model, n, sampler="unipc", order=3, steps=steps, **options).double()
    found = []
    for name, steps in runs:
        program = samplers.SAMPLERS[name].trace(model.schedule.grid(steps), model.prediction)
        if any(row.noise is not None for row in program.rows):
            found.append(None)
            continue
        x = sample(model, n, sampler=name, steps=steps, **options).double()
        found.append((x - limit).square().mean().sqrt().item())
    return found
