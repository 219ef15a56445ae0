"""The state of a training run, and its steps."""

import contextlib
import copy
import json
import math
import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import images, ops, parallel
from ..data import Dataset, epoch_order
from ..io.description import check_model, checked_state
from ..io.files import CHECKPOINT, restore, write
from ..model import Model, build, checked_device
from ..networks import UNet
from ..progress import bar as progress_bar
from ..sampling import sample
from . import runs
from .checkpoint import read_checkpoint
from .config import Config, plain
from .draws import Draws, draw
from .noising import Noising
from .objectives import OBJECTIVES
from .runs import Log, Unlogged

FIXED = ("schedule", "prediction", "objective", "times", "times_mean", "times_std", "seed")
"""The settings that a run keeps from its first step to its last."""


class Diverged(RuntimeError):
    """The loss or its gradient is NaN or infinite; the state is the one before that step."""


def ema_decay(decay: float, step: int) -> float:
    """Of the average after ``step`` steps: the first steps must not keep the random start."""
    return min(decay, (1 + step) / (10 + step))


class Trainer:
    """The state of a run: the network, its average, AdamW's moments, and two counters.

    ``model`` holds the averaged network, and is what to sample from. ``steps`` optimizer steps have been taken and
    ``examples`` images seen; ``step()`` takes the next one.

    The network that is given is trained in place: it is moved to ``device``, put into training mode, and its parameters
    change. Those that are frozen (``requires_grad`` is False) stay so, unless all are, as ``load`` leaves them: then
    all are trained. Raises TypeError or ValueError for a model, data and config that do not fit each other.
    """

    def __init__(self, model: Model, dataset: Dataset, config: Config, *, device: torch.device | str | None = None):
        if not isinstance(model.network, UNet):
            name = type(model.network).__name__
            raise TypeError(f"network: expected a diffkern.unet.UNet, whose options a checkpoint holds, got {name}")
        options = model.network.config
        if dataset.shape != model.shape:
            raise ValueError(f"data: expected images of shape {model.shape}, got {dataset.shape}")
        dataset = dataset.in_order_of(model.classes)
        if dataset.classes != model.classes:
            raise ValueError(f"data: expected the classes {model.classes}, got {dataset.classes}")
        _check_size(dataset.shape, len(options["channel_mult"]))
        config = _settled(config, model)
        self.objective = config.made_objective()
        if options["learned_variance"] != (self.objective.vlb != 0):
            whose = "a learned variance" if options["learned_variance"] else "a fixed variance"
            with_bound = [name for name, make in OBJECTIVES.items() if (make().vlb != 0) == options["learned_variance"]]
            expected = f"one of {', '.join(with_bound)} with a network of {whose}"
            raise ValueError(f"objective: expected {expected}, got {config.objective!r}")
        if model.prediction != config.prediction:
            raise ValueError(f"prediction: expected {config.prediction!r}, which is trained, got {model.prediction!r}")
        if config.label_dropout and options["num_classes"] is not None and not options["null_class"]:
            raise ValueError(
                f"label_dropout: expected 0 for a network without a null class, got {config.label_dropout}"
            )
        if config.batch_size % parallel.world():
            raise ValueError(
                f"batch_size: expected a multiple of the {parallel.world()} processes, got {config.batch_size}"
            )
        self.dataset, self.config, self.steps, self.examples = dataset, config, 0, 0
        self.data = {"images": len(dataset), "fingerprint": dataset.fingerprint}
        self.unlogged = Unlogged()
        self.network: nn.Module = model.network.to(checked_device(device)).train()
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            self.network.requires_grad_(True)
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.model = replace(model, network=copy.deepcopy(self.network).eval().requires_grad_(False))
        self.predict = parallel.averaging(self.network)
        variance = "learned" if model.learned_variance else model.default_variance
        self.noising = Noising(self.objective, model.schedule, variance, self.model.device)
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        for parameter in self.trained.values():  # the state exists from the start: restoring is copying
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))
        written = _as_json(self.description())  # what could not be read again is refused before a step is taken
        check_model(written, len(self.tensors()))
        checked_state(written["training"], Config)

    @classmethod
    def resume(
        cls, path: str | os.PathLike, dataset: Dataset, *, device: torch.device | str | None = None, **changes
    ) -> "Trainer":
        """Continue the run of a checkpoint. ``changes`` are fields of its :class:`Config` that shall differ.

        Weights, moments, average, counters and data order continue to the bit, on the same kind of machine. Warns of
        other images than the run has seen. Raises ValueError for a change of the network, the process, the objective
        or the seed, and for fewer ``steps`` than have been taken.
        """
        description, tensors, config = read_checkpoint(path)
        state = description["training"]
        model = build(description, tensors, path, prefix="network.", device=checked_device(device))
        config = _settled(config, model)
        whole = {name: getattr(config, name) for name in FIXED} | {"network": model.network.config}
        for name in changes.keys() & whole.keys():
            wanted, stored = changes[name], whole[name]
            if isinstance(wanted, dict) and isinstance(stored, dict):  # it says as much as it wants to
                stored = {key: stored.get(key) for key in wanted}
            if _as_json(wanted) != _as_json(stored):
                raise ValueError(f"{name}: expected that of {path}, {stored}, got {wanted}")
        config = replace(config, **{**changes, "network": config.network, "schedule": config.schedule})
        if "steps" in changes and config.steps < state["steps"]:
            raise ValueError(f"steps: expected at least the {state['steps']} that {path} has taken, got {config.steps}")
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(name not in (state.get("frozen") or ()))
        self = cls(model, dataset, config, device=device)
        self._compare_data(state.get("data"), path)
        restore(self.tensors(), tensors, path)
        self.steps, self.examples = state["steps"], state["examples"]
        self.unlogged = Unlogged(**(state.get("log") or {}))
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.steps)
        return self

    def _compare_data(self, stored: dict[str, Any] | None, path: str | os.PathLike) -> None:
        """Warn if the images are not those of the checkpoint's run; an older checkpoint does not tell."""
        known = {name: value for name, value in (stored or {}).items() if None not in (value, self.data.get(name))}
        if any(value != self.data[name] for name, value in known.items()):
            warnings.warn(
                f"data: expected the {stored['images']} images of the run of {path}, got {len(self.dataset)}, and not "
                "the same ones: it goes on with these",
                stacklevel=3,
            )

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, but for the counters: the live tensors, by their names in a checkpoint."""
        return {
            **{f"network.{name}": tensor for name, tensor in self.network.state_dict().items()},
            **{f"ema.{name}": tensor for name, tensor in self.model.network.state_dict().items()},
            **{f"exp_avg.{name}": self.optimizer.state[p]["exp_avg"] for name, p in self.trained.items()},
            **{f"exp_avg_sq.{name}": self.optimizer.state[p]["exp_avg_sq"] for name, p in self.trained.items()},
        }

    def description(self) -> dict[str, Any]:
        """All of a checkpoint but its tensors: that of ``model``, and the state of the run, as JSON holds it."""
        training = {
            "config": asdict(self.config),
            "steps": self.steps,
            "examples": self.examples,
            "data": self.data,
            "log": asdict(self.unlogged),
        }
        frozen = [name for name, _ in self.network.named_parameters() if name not in self.trained]
        if frozen:
            training["frozen"] = frozen
        return {**self.model.description(), "prefix": "ema.", "training": training}

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint, atomically. ``diffkern.load`` reads its averaged model."""
        write(path, self.description(), self.tensors())

    def index(self, examples: np.ndarray) -> Tensor:
        """Which image is seen as the k-th example: epoch after epoch, each in an order of its own."""
        index = torch.empty(len(examples), dtype=torch.int64, device="cpu")
        epochs, places = np.divmod(examples, len(self.dataset))
        for epoch in np.unique(epochs).tolist():
            if self._order[0] != epoch:
                self._order = (epoch, epoch_order(len(self.dataset), epoch, self.config.seed))
            here = torch.from_numpy(epochs == epoch)
            index[here] = self._order[1][torch.from_numpy(places)[here]]
        return index

    def batch(self) -> tuple[Tensor, Tensor | None, Draws]:
        """This process's share of the next step: x_0 [N, C, H, W] in [-1, 1], labels [N] (-1 where dropped), draws."""
        share = self.config.batch_size // parallel.world()
        examples = self.examples + share * parallel.rank() + np.arange(share)
        clock = self.noising.terms or self.model.schedule
        draws = draw(examples, self.config.seed, clock, self.config.label_dropout, self.objective.t)
        index = self.index(examples)
        x_0 = self.dataset.x_0(index)
        if self.config.flip:
            x_0 = torch.where(draws.flip[:, None, None, None], x_0.flip(-1), x_0)
        labels = None if self.dataset.labels is None else self.dataset.labels[index].masked_fill(draws.null, -1)
        return x_0, labels, draws

    def loss(self) -> Tensor:
        """The mean of the objective: on a schedule by default || eps - eps_theta(sqrt(alpha_bar) x_0 +
        sqrt(1 - alpha_bar) eps, t) ||^2 an element."""
        device = self.model.device
        x_0, labels, draws = self.batch()
        x_0, seeds, at = x_0.to(device), draws.seeds.to(device), self.noising.at(draws.t)
        labels = None if labels is None else labels.to(device)
        x_t = ops.q_sample(x_0, at.step, seeds, at.q_table, address=at.address)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            out = self.predict(x_t, at.t, labels)
        return self.noising.loss(out, x_0, seeds, at, learned_variance=self.model.learned_variance).mean()

    def step(self) -> float:
        """One step of Algorithm 1; returns its loss. Raises :class:`Diverged`, and then has changed nothing."""
        self.optimizer.zero_grad()
        with _seeded((self.config.seed + self.steps + (parallel.rank() << 40)) % 2**63, self.model.device):
            loss = self.loss()
        loss.backward()
        loss = parallel.mean(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.grad_clip or math.inf)
        if not (loss + norm).isfinite():
            raise Diverged(
                f"loss: expected a finite value, got {loss.item()} (gradient norm {norm.item()}) at step {self.steps}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate(self.steps)
        self.optimizer.step()
        self.steps += 1
        self.examples += self.config.batch_size
        decay = ema_decay(self.config.ema, self.steps)
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.model.network.parameters()), list(self.network.parameters()), 1 - decay
            )  # ema <- decay ema + (1 - decay) theta
        return loss.item()

    def grid(self, n: int = 40, steps: int = 50):
        """A ``PIL.Image`` of n samples of the averaged model, the same seeds and labels each time."""
        classes = self.model.classes
        labels = None if classes is None else torch.arange(n, dtype=torch.int64, device="cpu") % len(classes)
        steps = min(steps, self.noising.terms or steps)
        x = sample(self.model, n, labels=labels, sampler="ddim", steps=steps, progress=False)
        names = None if classes is None else images.captions(classes, labels.tolist())
        return images.grid(x, names, columns=10)

    def run(self, out: str | os.PathLike, *, progress: bool = True, lock: bool = True) -> signal.Signals | None:
        """Train up to ``config.steps``, into the directory ``out``: checkpoint.safetensors, log.csv, samples-*.png.

        The first of several processes writes. SIGINT, SIGTERM and SIGHUP, to any of them, end the run after the step at
        hand, with a checkpoint, and are returned; None means finished. SIGUSR1 has it write a checkpoint and go on.
        Raises RuntimeError if another run is at work in ``out``, which ``lock=False`` leaves to the caller to rule out.
        A loss that is not finite raises :class:`Diverged`, and leaves the last checkpoint as it was.
        """
        out, config, writes = Path(out), self.config, parallel.rank() == 0
        heard, saved = 0, None
        with contextlib.ExitStack() as stack:
            if writes:
                out.mkdir(parents=True, exist_ok=True)
                if lock:
                    stack.enter_context(runs.locked(out))
                log = Log(out / runs.LOG, self.steps, self.unlogged)
            total, done = (steps * config.batch_size for steps in (config.steps, self.steps))
            bar = stack.enter_context(progress_bar(total, "training", "img", progress and writes, initial=done))
            received = stack.enter_context(runs.signals())
            while self.steps < config.steps and heard not in runs.STOPPING:
                lr = config.learning_rate(self.steps)
                loss = self.step()
                heard = parallel.largest(received.take(), self.model.device)
                if not writes:
                    continue
                bar.update(config.batch_size)
                log.add(loss)
                if self.steps % config.log_every == 0:
                    bar.report(step=self.steps, loss=f"{log.write(self.steps, lr, config.batch_size):.4f}")
                if self.steps % config.checkpoint_every == 0 or heard == runs.SAVING:
                    self.save(out / CHECKPOINT)
                    saved = self.steps
                if config.sample_every and self.steps % config.sample_every == 0:
                    images.save_png(self.grid(), out / f"samples-{self.steps:07d}.png", {"step": self.steps})
            if writes and saved != self.steps:
                self.save(out / CHECKPOINT)
        return signal.Signals(heard) if self.steps < config.steps else None


def _settled(config: Config, model: Model) -> Config:
    """``config`` with the model's process, and its prediction and objective where it names none."""
    return replace(
        config,
        schedule=model.schedule.config(),
        prediction=config.prediction or model.prediction,
        objective=config.objective or model.schedule.objective,
    )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(plain(value)))


def _check_size(shape: tuple[int, int, int], levels: int) -> None:
    factor = 2 ** (levels - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"size: expected a multiple of {factor} for a network of {levels} levels, "
            f"got images of {shape[1]} x {shape[2]}"
        )


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What torch draws on ``device`` is drawn from ``seed``; its generator is left as it was."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)
