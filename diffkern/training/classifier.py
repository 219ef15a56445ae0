"""Training of a classifier of noisy images, whose gradient guides (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .. import ops
from ..classifier import NoisyClassifier, check_time_steps, one_cycle
from ..data import Dataset, epoch_order
from ..model import checked_device
from ..networks import HalfUNet
from ..networks.defaults import float32_on
from ..process import checked_count, checked_float
from ..progress import bar as progress_bar
from ..schedule import Schedule
from .draws import draw

LOG_EVERY = 100  # steps between losses that are reported


def train_noisy_classifier(
    train: Dataset,
    schedule: Schedule,
    *,
    examples: int = 200_000,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    network: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> NoisyClassifier:
    """Train a :class:`HalfUNet` to tell the class of x_t, for t uniform in 0..T-1.

    The k-th example is image k of the epochs' order, at the t and with the noise that :func:`draw` has for k: all of
    it a function of the seed, as in :class:`Trainer`. The loss is the cross-entropy; AdamW, one cycle of the rate.
    ``network`` has options of the :class:`HalfUNet`. Raises TypeError or ValueError, also for images without labels
    and for a process without time steps.
    """
    if train.labels is None:
        raise ValueError("data: expected labelled images, got none with labels")
    check_time_steps(schedule)
    for option, value in dict(examples=examples, batch_size=batch_size).items():
        checked_count(option, value)
    checked_float("lr", lr, "a number > 0", lambda rate: rate > 0)
    device = checked_device(device)
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.default_generator.manual_seed(seed)
        network = HalfUNet(train.shape[0], len(train.classes), **(network or {})).train().to(device)
    order = torch.cat([epoch_order(len(train), epoch, seed) for epoch in range(-(-examples // len(train)))])[:examples]
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05, fused=True)
    rates = one_cycle(optimizer, lr, -(-examples // batch_size), rise=0.1)
    table, losses = schedule.q_table(device), []
    with progress_bar(examples, "classifier", "img", progress) as bar:
        for first in range(0, examples, batch_size):
            index = order[first : first + batch_size]
            draws = draw(first + np.arange(len(index)), seed, schedule.T, 0.0)
            drawn = train.x_0(index), train.labels[index], draws.t, draws.seeds
            x_0, labels, t, seeds = (tensor.to(device) for tensor in drawn)
            loss = F.cross_entropy(network(ops.q_sample(x_0, t, seeds, table), t), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            losses.append(loss.item())
            bar.update(len(index))
            if len(losses) % LOG_EVERY == 0:
                bar.report(loss=f"{sum(losses[-LOG_EVERY:]) / LOG_EVERY:.4f}")
    network.eval().requires_grad_(False)
    return NoisyClassifier(network, schedule, train.shape, train.classes)
