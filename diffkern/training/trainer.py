"""The state of a training run, and its steps."""

import contextlib
import copy
import math
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import parallel
from ..flows import Flow
from ..io.files import CHECKPOINT, restore, state, write
from ..model import Model
from ..progress import bar as progress_bar
from . import loop
from .batches import Batches
from .checkpoint import kind_in, modes, read_checkpoint, restore_modes
from .config import Config
from .draws import step_seed
from .ema import PowerAverages, ema_decay
from .fitting import Fitted, changed, fitted
from .runs import Unlogged
from .task import Given


class Diverged(RuntimeError):
    """The loss or its gradient is NaN or infinite; the state is the one before that step."""


class Trainer:
    """The state of a run: the network, its average, AdamW's moments, and two counters.

    ``model`` holds the averaged network, and is what to sample from. ``steps`` optimizer steps have been taken and
    ``examples`` images seen; ``step()`` takes the next one. ``task`` is the loss: an objective of a ``Model``, bits a
    dimension of a flow.

    model       its network is any ``nn.Module``, called as ``network(x_t, t, labels, **conditions)``; its process,
                prediction and conditions are those of the run. Or a :class:`diffkern.flows.Flow`: ``run`` and ``save``
                want a ``RealNVP`` or ``Glow``, and the config's settings of t, labels and networks keep their defaults
    dataset     a :class:`diffkern.data.Dataset`, or any map-style dataset, as :class:`diffkern.data.Items` reads it
    validation  held-out data of the same kind, or None

    The network that is given is trained in place: it is moved to ``device``, put into training mode, and its parameters
    change. Those that are frozen (``requires_grad`` is False) stay so, unless all are, as ``load`` leaves them: then
    all are trained. Modules in eval mode stay so too, unless all are.
    Raises TypeError or ValueError for a model, data and config that do not fit each other.
    """

    def __init__(
        self,
        model: Model | Flow,
        dataset: Any,
        config: Config,
        *,
        device: torch.device | str | None = None,
        validation: Any = None,
    ):
        self._begin(fitted(model, dataset, config, device=device, validation=validation), first=True)

    def _begin(self, run: Fitted, *, first: bool) -> None:
        """The state before the first step. All that is refused has been refused: the caller's network changes here.

        first  whether the network takes from data what it begins with; of a checkpoint it has
        """
        self.config, self.dataset, self.validation = run.config, run.dataset, run.validation
        self.steps = self.examples = 0
        self.data = {"images": len(self.dataset), "fingerprint": self.dataset.fingerprint}
        self.unlogged = Unlogged()
        self._terms: list[Tensor] = []  # [N, 2], t and loss of each example of the step
        network = run.task.network.to(run.device)
        if first:
            run.task.initialize(Batches(run.task, run.dataset, replace(run.config, workers=0, accumulate=1)))
        self.network = _in_training(network)
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.task = run.task.of(copy.deepcopy(self.network).eval().requires_grad_(False))
        average = dict(self.task.network.named_parameters())
        self.average = [average[name] for name in self.trained]
        self.powers = PowerAverages(run.config.ema_profiles if run.config.snapshot_every else (), self.trained)
        self.predict = parallel.averaging(self.network)
        self.optimizer = _optimizer(self.trained.values(), run.config)
        self.batches = Batches(self.task, self.dataset, run.config)

    @property
    def model(self) -> Model | Flow:
        """The model with the averaged network."""
        return self.task.model

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike,
        dataset: Any,
        *,
        device: torch.device | str | None = None,
        validation: Any = None,
        into: Model | None = None,
        **changes,
    ) -> "Trainer":
        """Continue the run of a checkpoint, or of a folder with one. ``changes`` are fields of its :class:`Config` that
        shall differ.

        into  a ``Model`` as the one that the run began with, whose network is trained on: needed where that is none
              of ``networks.ARCHITECTURES``, and where there are a process of one's own, conditions that the network's
              config does not name or a codec

        Weights, moments, average, counters and data order continue to the bit, on the same kind of machine. Warns of
        other images than the run has seen. Raises ValueError for a change of the network, the process, the objective
        or the seed, and for fewer ``steps`` than have been taken.
        """
        path = Path(path) / CHECKPOINT if os.path.isdir(path) else Path(path)
        description, tensors, config = read_checkpoint(path)
        training, kind = description["training"], kind_in(description)
        planned = kind.planned(description, tensors, path, into)
        config = changed(kind.settled(config, planned), changes, planned, training["steps"], path)
        run = fitted(planned, dataset, config, device=device, validation=validation)
        task = run.task.of(kind.built(description, tensors, path, into, run.device))
        restore_modes(task.network, training)
        self = cls.__new__(cls)
        self._begin(replace(run, task=task), first=False)
        self._continue(training, tensors, path)
        return self

    def _continue(self, training: dict[str, Any], tensors: dict[str, Tensor], path: str | os.PathLike) -> None:
        """Take the state of a checkpoint."""
        self._compare_data(training.get("data"), path)
        restore(self.tensors(), tensors, path)
        self.steps, self.examples = training["steps"], training["examples"]
        self.unlogged = Unlogged(**(training.get("log") or {}))
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.steps)

    def _compare_data(self, stored: dict[str, Any] | None, path: str | os.PathLike) -> None:
        """Warn if the images are not those of the checkpoint's run; an older checkpoint does not tell."""
        known = {name: value for name, value in (stored or {}).items() if None not in (value, self.data.get(name))}
        if any(value != self.data[name] for name, value in known.items()):
            warnings.warn(
                f"data: expected the {stored['images']} images of the run of {path}, got {len(self.dataset)}, and not "
                "the same ones: it goes on with these",
                stacklevel=4,
            )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, but for the counters: the live tensors, by their names in a checkpoint."""
        importance = {} if self.task.importance is None else self.task.importance.tensors()
        return {
            **{f"network.{name}": tensor for name, tensor in state(self.network).items()},
            **{f"ema.{name}": tensor for name, tensor in state(self.task.network).items()},
            **{f"exp_avg.{name}": self.optimizer.state[p]["exp_avg"] for name, p in self.trained.items()},
            **{f"exp_avg_sq.{name}": self.optimizer.state[p]["exp_avg_sq"] for name, p in self.trained.items()},
            **self.powers.tensors(),
            **{f"importance.{name}": tensor for name, tensor in importance.items()},
        }

    def description(self) -> dict[str, Any]:
        """All of a checkpoint but its tensors: that of ``model``, and the state of the run, as JSON holds it."""
        training = {
            "config": asdict(self.config),
            "steps": self.steps,
            "examples": self.examples,
            "data": self.data,
            "log": asdict(self.unlogged),
            **modes(self.network),
        }
        return {**self.model.description(), "prefix": "ema.", "training": training}

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint, atomically. ``diffkern.load`` reads its averaged model."""
        write(path, self.description(), self.tensors())

    def index(self, examples: np.ndarray) -> Tensor:
        """Which item is seen as the k-th example: epoch after epoch, each in an order of its own."""
        return self.batches.index(examples)

    def batch(self, part: int = 0) -> Given:
        """A part of this process's share of the next step: x_0 [N, ...], labels [N] (-1 where dropped), draws, and the
        conditions of the model by name, [N, ...] (null where labels are dropped)."""
        return self.batches.at((self.examples, part))

    def loss(self, part: int = 0) -> Tensor:
        """The mean of the task's losses of a part of this process's share of the next step."""
        batch = self.batch(part)
        losses, draws = self.task.losses(self.predict, batch), batch.draws
        if draws.weights is None:
            return losses.mean()
        self._terms.append(torch.stack((draws.t.to(losses), losses.detach()), 1))
        return (losses * draws.weights.to(losses)).mean()

    def step(self) -> float:
        """One step of Algorithm 1; returns its loss. Raises :class:`Diverged`, and then has changed no parameter."""
        loss = self._backward()
        norm = torch.nn.utils.clip_grad_norm_(list(self.trained.values()), self.config.grad_clip or math.inf)
        if not (loss + norm).isfinite():
            raise Diverged(
                f"loss: expected a finite value, got {loss.item()} (gradient norm {norm.item()}) at step {self.steps}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.steps)
        self.optimizer.step()
        self.steps += 1
        self.examples += self.config.batch_size
        self._update_averages()
        if self.task.importance is not None:
            t, terms = parallel.joined_rows(torch.cat(self._terms)).cpu().unbind(1)
            self.task.importance.update(t.long(), terms)
        return loss.item()

    def _backward(self) -> Tensor:
        """The mean loss of the step's parts; their mean gradient is left in the parameters."""
        self.optimizer.zero_grad()
        losses, parts = [], self.config.accumulate
        self._terms.clear()
        with _seeded(step_seed(self.config.seed, self.steps, parallel.rank()), self.model.device):
            for part in range(parts):
                with parallel.apart(self.predict) if part < parts - 1 else contextlib.nullcontext():
                    loss = self.loss(part)
                    (loss / parts).backward()
                losses.append(loss.detach())
        return parallel.mean(torch.stack(losses).mean())

    @torch.no_grad()
    def _update_averages(self) -> None:
        trained, decay = list(self.trained.values()), ema_decay(self.config.ema, self.steps)
        torch._foreach_lerp_(self.average, trained, 1 - decay)  # ema <- decay ema + (1 - decay) theta
        self.powers.update(self.steps)
        for mine, theirs in zip(self.task.network.buffers(), self.network.buffers(), strict=True):
            mine.copy_(theirs)  # such as the statistics of BatchNorm, which are averages themselves

    @torch.no_grad()
    def validate(self) -> float:
        """The mean of the objective on all held-out data, by the averaged network, with the same draws each time."""
        if self.validation is None:
            raise ValueError("validation: expected held-out data, got None")
        total = 0.0
        for batch in self.batches.held_out(self.validation):
            total += self.task.losses(self.task.network, batch).double().sum().item()
        return total / len(self.validation)

    def grid(self, n: int = 40, steps: int = 50):
        """A ``PIL.Image`` of n samples of the averaged model, the same seeds and labels each time: the classes in turn,
        or where they have no names the labels of the first items, if items have some. Their conditions are those of the
        first items.

        steps  of a diffusion model's sampler
        """
        return self.task.grid(self.dataset, n, steps)

    def train(self, *, progress: bool = True) -> Model | Flow:
        """Train up to ``config.steps`` and return the averaged model. Nothing is written."""
        with (
            contextlib.closing(self.batches),
            progress_bar(self.config.steps, "training", "step", progress, initial=self.steps) as bar,
        ):
            while self.steps < self.config.steps:
                loss = self.step()
                bar.update()
                if self.steps % self.config.log_every == 0:
                    bar.report(loss=f"{loss:.4f}")
        return self.model

    def run(self, out: str | os.PathLike, *, progress: bool = True, lock: bool = True) -> signal.Signals | None:
        """Train up to ``config.steps``, into the directory ``out``: checkpoint.safetensors, log.csv, loss.png,
        samples-*.png of images, checkpoint-*.safetensors with ``keep_every``, and ema-*.safetensors with
        ``snapshot_every``.

        The first of several processes writes. SIGINT, SIGTERM and SIGHUP, to any of them, end the run after the step at
        hand, with a checkpoint, and are returned; None means finished. SIGUSR1 has it write a checkpoint and go on.
        Raises RuntimeError if another run is at work in ``out``, which ``lock=False`` leaves to the caller to rule out.
        A loss that is not finite raises :class:`Diverged`, and leaves the last checkpoint as it was.
        """
        return loop.run(self, out, progress=progress, lock=lock)


def _in_training(network: nn.Module) -> nn.Module:
    """``network`` in training mode where all of it was in eval mode, trained where all was frozen."""
    if not any(module.training for module in network.modules()):
        network.train()
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)
    return network


def _optimizer(parameters: Iterable[Tensor], config: Config) -> torch.optim.AdamW:
    """AdamW whose state exists from the start: restoring it is copying."""
    betas, decay = config.betas, config.weight_decay
    optimizer = torch.optim.AdamW(parameters, config.lr, betas, weight_decay=decay, fused=True)
    for parameter in optimizer.param_groups[0]["params"]:
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generator of ``device`` with ``seed`` within the context; its state is restored afterwards."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
