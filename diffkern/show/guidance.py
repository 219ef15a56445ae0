"""Classifier-free guidance on labelled points: precision rises with its scale, and recall falls.

    out = out_null + w (out_label - out_null)                                                 (Ho & Salimans 2022)

The network is the exact one of a mixture of Gaussians with two classes. At w = 0 labels do nothing, at w = 1 samples
are of the class, and at w > 1 they flee from the other class to where only the best examples are. Precision and recall
of the samples of a class against points of it are those of Kynkaanniemi et al. 2019, and the last column is the mean
of the exact p(label | sample).
"""

import torch

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
    points, k = DATA.draw(8 * n)
    real = [points[DATA.labels[k] == label][:n] for label in (0, 1)]
    labels = torch.arange(2 * n, dtype=torch.int64, device="cpu") % 2
    options = dict(sampler="ddpm", steps=steps, batch_size=2 * n, progress=False)
    rows, panels = [], []
    for scale in SCALES:
        x = sample(model, 2 * n, labels=labels, guidance=scale, **options)
        drawn = [x[labels == label] for label in (0, 1)]
        shares = [precision_recall(*pair) for pair in zip(real, drawn, strict=True)]
        precision, recall = (sum(pair) / 2 for pair in zip(*shares, strict=True))
        parts = DATA.log_parts(x).softmax(1)
        right = torch.where(DATA.labels == labels[:, None], parts, 0.0).sum(1)
        rows.append((scale, precision, recall, right.mean().item()))
        named = {f"label {label}": points for label, points in enumerate(drawn)}
        panels.append(plane(f"scale {scale:g}", DATA, named, LIMIT))
    return Figure(("scale", "precision", "recall", "p(label given x)"), rows, panels)
