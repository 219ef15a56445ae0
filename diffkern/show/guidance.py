"""Classifier-free guidance on labelled points: precision rises up to that of data, and recall falls.

    out = out_null + w (out_label - out_null)                                                 (Ho & Salimans 2022)

The network is the exact one of a mixture of Gaussians with two classes. At w = 0 labels do nothing, at w = 1 samples
are of the class, and at w > 1 they flee from the other class to where only the best examples are. Precision and recall
of the samples of a class against points of it are those of Kynkaanniemi et al. 2019, and the last column is the mean
of the exact p(label | sample). The last row is for other points of the classes: more precision than that is noise.
"""

import torch
from torch import Tensor

from ..evaluate import precision_recall
from ..sampling import sample
from ..schedule import Schedule
from . import Figure
from .gaussians import Gaussians, plane

DATA = Gaussians(
    means=[[-1.6, 0.6], [-0.8, -0.8], [-0.2, 0.9], [1.6, -0.6], [0.8, 0.8], [0.2, -0.9]],
    stds=[0.4] * 6,
    labels=[0, 0, 0, 1, 1, 1],
)
SCALES = (0.0, 1.0, 3.0)
LIMIT = 3.0


def figure(n: int = 300, steps: int = 50) -> Figure:
    """n samples of each class, in some steps of ddpm."""
    model = DATA.model(Schedule.linear())
    real, others = (_by_label(n, seed) for seed in (0, 1))
    labels = torch.arange(2 * n, dtype=torch.int64, device="cpu") % 2
    options = dict(sampler="ddpm", steps=steps, batch_size=2 * n, progress=False)
    rows, panels = [], []
    for scale in SCALES:
        x = sample(model, 2 * n, labels=labels, guidance=scale, **options)
        drawn = [x[labels == label] for label in (0, 1)]
        rows.append((f"{scale:g}", *measured(real, drawn)))
        named = {f"label {label}": points for label, points in enumerate(drawn)}
        panels.append(plane(f"scale {scale:g}", DATA, named, LIMIT))
    rows.append(("other points", *measured(real, others)))
    return Figure(("scale", "precision", "recall", "p(label given x)"), rows, panels)


def _by_label(n: int, seed: int) -> list[Tensor]:
    """At most n points of each class."""
    points, k = DATA.draw(8 * n, seed)
    return [points[DATA.labels[k] == label][:n] for label in (0, 1)]


def measured(real: list[Tensor], drawn: list[Tensor]) -> tuple[float, float, float]:
    """(precision, recall, mean of p(label | x)) of points of each class: means over the classes."""
    found = []
    for label, (truth, x) in enumerate(zip(real, drawn, strict=True)):
        right = DATA.log_parts(x).softmax(1)[:, DATA.labels == label].sum(1).mean().item()
        found.append((*precision_recall(truth, x), right))
    return tuple(sum(values) / len(found) for values in zip(*found, strict=True))
