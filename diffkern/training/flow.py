"""Training of a flow by maximum likelihood: Algorithm 1's loop, settings, average, log and checkpoints, another loss.

What is drawn for the k-th example is a function of k and the run's seed, as in :class:`diffkern.training.Trainer`: its
place in the epoch's order, the noise that dequantizes it, and its flip. A resumed run continues to the bit.
"""

import copy
import math
import os
import signal
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import images
from ..arguments import check_x_T
from ..data import Dataset, epoch_order
from ..flows.files import build
from ..flows.flow import Flow
from ..io.description import checked_training
from ..io.files import CHECKPOINT, read, restore, state, write
from ..likelihood.draws import dequantized, offset
from ..model import checked_device
from ..progress import bar as progress_bar
from . import runs
from .config import Config
from .draws import draw
from .plot import loss_plot
from .runs import Log, Unlogged
from .trainer import HELD_OUT, Diverged, ema_decay, new_optimizer

USED = {
    *(
        "steps",
        "batch_size",
        "lr",
        "lr_schedule",
        "warmup",
        "betas",
        "weight_decay",
        "grad_clip",
        "ema",
        "flip",
        "seed",
    ),
    *("seed", "checkpoint_every", "keep_every", "validate_every", "log_every"),
}
"""The settings of a :class:`Config` that a flow's training has. The others keep their defaults."""

FLOW_PRESETS = {
    "glow-fashion-mnist": (
        dict(kind="Glow", shape=[1, 32, 32], levels=3, steps=8, width=64),
        Config(steps=10_000, batch_size=64, lr=1e-3, lr_schedule="cosine", log_every=50),
    ),
}
"""Recipes by name: the options of a flow, and the settings of its training. Glow has 0.3 million parameters."""


class FlowTrainer:
    """The state of a run: the flow, its average, AdamW's moments, and two counters.

    ``flow`` is the averaged one, and what to sample from. The loss is bits a dimension, of images by levels.

    flow        is trained in place
    data        a :class:`diffkern.data.Dataset`, whose images are dequantized; or points [K, ...], floating point
    config      its settings in ``USED``; the others must keep their defaults
    validation  held-out data of the same kind, or None
    initialize  let the layers that start from data do so, by the first batch: False of a flow that is trained already

    Raises TypeError or ValueError for data and settings that do not fit.
    """

    def __init__(
        self,
        flow: Flow,
        data: Dataset | Tensor,
        config: Config,
        *,
        device: torch.device | str | None = None,
        validation: Dataset | Tensor | None = None,
        initialize: bool = True,
    ):
        if not isinstance(flow, Flow) or next(flow.parameters(), None) is None:
            raise TypeError(f"flow: expected a Flow with parameters, got {type(flow).__name__}")
        _check(config)
        for name, given in (("data", data), ("validation", validation)):
            if given is not None:
                _check_data(name, given, flow, config)
        self.config, self.data, self.validation, self.steps, self.examples = config, data, validation, 0, 0
        self.unlogged, self._order = Unlogged(), (-1, torch.empty(0, dtype=torch.int64, device="cpu"))
        self.network = flow.to(checked_device(device)).train().requires_grad_(True)
        if initialize:
            self.network.initialize(self.batch()[0])
        self.flow = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = new_optimizer(self.network.parameters(), config)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        data: Dataset | Tensor,
        *,
        device: torch.device | str | None = None,
        validation: Dataset | Tensor | None = None,
    ) -> "FlowTrainer":
        """Continue the run of a checkpoint: to the bit, on the same kind of machine."""
        description, tensors = read(path)
        config = checked_training(description, path, Config)
        flow = build(description, tensors, Path(path), prefix="network.")
        self = cls(flow, data, config, device=device, validation=validation, initialize=False)
        restore(self.tensors(), tensors, path)
        training = description["training"]
        self.steps, self.examples = training["steps"], training["examples"]
        self.unlogged = Unlogged(**(training.get("log") or {}))
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.steps)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, but for the counters: the live tensors, by their names in a checkpoint."""
        named = dict(self.network.named_parameters())
        return {
            **{f"network.{name}": tensor for name, tensor in state(self.network).items()},
            **{f"ema.{name}": tensor for name, tensor in state(self.flow).items()},
            **{
                f"{moment}.{name}": self.optimizer.state[parameter][moment]
                for moment in ("exp_avg", "exp_avg_sq")
                for name, parameter in named.items()
            },
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint, atomically. ``diffkern.flows.load`` reads its averaged flow."""
        training = dict(config=asdict(self.config), steps=self.steps, examples=self.examples, log=asdict(self.unlogged))
        write(path, {**self.flow.description(), "prefix": "ema.", "training": training}, self.tensors())

    def batch(self) -> tuple[Tensor, int | None]:
        """x [N, ...] of the next step, and its levels."""
        examples = self.examples + np.arange(self.config.batch_size)
        epochs, places = (torch.from_numpy(part) for part in np.divmod(examples, len(self.data)))
        index = torch.empty_like(epochs)
        for epoch in epochs.unique().tolist():
            if self._order[0] != epoch:
                self._order = epoch, epoch_order(len(self.data), epoch, self.config.seed)
            index[epochs == epoch] = self._order[1][places[epochs == epoch]]
        return self._drawn(self.data, index, examples, self.config.flip)

    def _drawn(
        self, data: Dataset | Tensor, index: Tensor, examples: np.ndarray, flip: bool
    ) -> tuple[Tensor, int | None]:
        like = next(self.network.parameters())
        if isinstance(data, Tensor):
            return data[index.to(data.device)].to(like), None
        x, draws = data.x_0(index), draw(examples, self.config.seed, 1, 0.0)
        if flip:
            x = torch.where(draws.flip.view(-1, 1, 1, 1), x.flip(-1), x)
        return dequantized(x, draws.seeds, 256).to(like), 256

    def losses(self, flow: Flow, x: Tensor, levels: int | None) -> Tensor:
        """-log2 p(x) / D of each example, [N]."""
        return offset(levels) - flow.log_prob(x) / (math.prod(flow.shape) * math.log(2))

    def step(self) -> float:
        """Take one step; returns its loss. Raises :class:`Diverged`, and then has changed no parameter."""
        loss = self.losses(self.network, *self.batch()).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip or math.inf)
        if not (loss + norm).isfinite():
            raise Diverged(f"loss: expected a finite value, got {loss.item()} (gradient norm {norm.item()}) "
                           f"at step {self.steps}")  # fmt: skip
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.steps)
        self.optimizer.step()
        self.steps += 1
        self.examples += self.config.batch_size
        decay = ema_decay(self.config.ema, self.steps)
        with torch.no_grad():
            torch._foreach_lerp_(list(self.flow.parameters()), list(self.network.parameters()), 1 - decay)
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """The mean bits a dimension of all held-out data, by the averaged flow, with the same noise each time."""
        total = 0.0
        for index in torch.arange(len(self.validation), dtype=torch.int64, device="cpu").split(256):
            x, levels = self._drawn(self.validation, index, HELD_OUT + index.numpy(), False)
            total += self.losses(self.flow, x, levels).double().sum().item()
        return total / len(self.validation)

    def run(self, out: str | os.PathLike, *, progress: bool = True) -> signal.Signals | None:
        """Train up to ``config.steps``, into the directory ``out``: checkpoint.safetensors, log.csv and loss.png.

        SIGINT, SIGTERM and SIGHUP end the run after the step at hand, with a checkpoint, and are returned; None means
        finished. Raises RuntimeError if another run is at work in ``out``, and :class:`Diverged`.
        """
        out, config, heard = Path(out), self.config, 0
        out.mkdir(parents=True, exist_ok=True)
        total, done = (steps * config.batch_size for steps in (config.steps, self.steps))
        with (
            runs.locked(out),
            progress_bar(total, "training", "img", progress, initial=done) as bar,
            runs.signals() as received,
        ):
            log = Log(out / runs.LOG, self.steps, self.unlogged)
            while self.steps < config.steps and heard not in runs.STOPPING:
                lr = config.learning_rate(self.steps)
                log.add(self.step())
                heard = received.take()
                bar.update(config.batch_size)
                if self.steps % config.log_every == 0:
                    due, before = self.steps // config.validate_every, self.steps - config.log_every
                    validates = self.validation is not None and due > before // config.validate_every
                    held_out = self.validate() if validates else None
                    said = {} if held_out is None else {"validation": f"{held_out:.4f}"}
                    loss = log.write(self.steps, lr, config.batch_size, held_out)
                    bar.report(step=self.steps, loss=f"{loss:.4f}", **said)
                if config.keep_every and self.steps % config.keep_every == 0:
                    self.save(out / f"checkpoint-{self.steps:07d}.safetensors")
                if self.steps % config.checkpoint_every == 0 or heard == runs.SAVING:
                    self._write(out, log)
            self._write(out, log)
        return signal.Signals(heard) if self.steps < config.steps else None

    def _write(self, out: Path, log: Log) -> None:
        self.save(out / CHECKPOINT)
        curves = log.curves()
        if curves["training"]:
            images.save_png(loss_plot(curves), out / "loss.png", {"step": self.steps})


def train_flow(flow: Flow, data: Dataset | Tensor, config: Config, *, progress: bool = True, **options: Any) -> Flow:
    """Train ``flow`` in place for all of ``config.steps``, and return its average: nothing is written.

    For the arguments, the options and the errors see :class:`FlowTrainer`.
    """
    trainer = FlowTrainer(flow, data, config, **options)
    with progress_bar(config.steps, flow.name, "step", progress) as bar:
        for step in range(config.steps):
            loss = trainer.step()
            bar.update()
            if (step + 1) % config.log_every == 0:
                bar.report(loss=f"{loss:.4f}")
    return trainer.flow


def _check(config: Config) -> None:
    """Raise ValueError for a setting that a flow's training has not."""
    default = Config()
    for field in fields(Config):
        expected, got = getattr(default, field.name), getattr(config, field.name)
        if field.name not in USED and got != expected:
            raise ValueError(f"{field.name}: expected {expected} for a flow, got {got}")


def _check_data(name: str, data: Any, flow: Flow, config: Config) -> None:
    if isinstance(data, Dataset):
        if data.shape != flow.shape:
            raise ValueError(f"{name}: expected images of shape {flow.shape}, got {data.shape}")
        return
    check_x_T(data, flow.shape, name)
    if not len(data) or not data.isfinite().all():
        raise ValueError(f"{name}: expected finite points, at least one, got {tuple(data.shape)}")
    if config.flip:
        raise ValueError("flip: expected False of points, got True")
