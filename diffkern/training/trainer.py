"""The state of a training run, and its steps."""

import contextlib
import copy
import json
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

from .. import images, ops, parallel
from ..data import Batch, Dataset, Items, as_dataset, epoch_order
from ..engine import Engine
from ..io.description import check_model, checked_state
from ..io.files import CHECKPOINT, restore, state, write
from ..model import Model, build, checked_device
from ..networks import UNet
from ..progress import bar as progress_bar
from ..runtime.loop import call
from ..samplers import LEARNED
from ..sampling import sample
from . import runs
from .checkpoint import read_checkpoint
from .config import Config, plain
from .draws import Draws, draw
from .noising import Noising
from .objectives import OBJECTIVES, Objective
from .plot import loss_plot
from .reading import Place, Reader
from .runs import Log, Unlogged
from .times import TIMES, Importance

FIXED = ("schedule", "prediction", "objective", "times", "times_mean", "times_std", "seed")
"""The settings that a run keeps from its first step to its last."""

HELD_OUT = 2**62
"""The examples from here on, which no run trains on, are those of the held-out data."""


class Diverged(RuntimeError):
    """The loss or its gradient is NaN or infinite; the state is the one before that step."""


def ema_decay(decay: float, step: int) -> float:
    """Of the average after ``step`` steps: the first steps must not keep the random start."""
    return min(decay, (1 + step) / (10 + step))


class Trainer:
    """The state of a run: the network, its average, AdamW's moments, and two counters.

    ``model`` holds the averaged network, and is what to sample from. ``steps`` optimizer steps have been taken and
    ``examples`` images seen; ``step()`` takes the next one.

    model       its network is any ``nn.Module``, called as ``network(x_t, t, labels, **conditions)``; its process,
                prediction and conditions are those of the run
    dataset     a :class:`diffkern.data.Dataset`, or any map-style dataset, as :class:`diffkern.data.Items` reads it
    validation  held-out data of the same kind, or None

    The network that is given is trained in place: it is moved to ``device``, put into training mode, and its parameters
    change. Those that are frozen (``requires_grad`` is False) stay so, unless all are, as ``load`` leaves them: then
    all are trained. Modules in eval mode stay so too, unless all are.
    Raises TypeError or ValueError for a model, data and config that do not fit each other.
    """

    def __init__(
        self,
        model: Model,
        dataset: Any,
        config: Config,
        *,
        device: torch.device | str | None = None,
        validation: Any = None,
    ):
        if not isinstance(model.network, nn.Module) or isinstance(model.network, Engine):
            name = type(model.network).__name__
            raise TypeError(f"network: expected a torch.nn.Module that can be trained, got {name}")
        config = _settled(config, model)
        device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
        self.dataset = _fitting("data", as_dataset(dataset), model)
        self.validation = None if validation is None else _fitting("validation", as_dataset(validation), model)
        self.objective = config.made_objective()
        _check(model, config, self.objective, self.dataset)
        self.config, self.steps, self.examples = config, 0, 0
        self.data = {"images": len(self.dataset), "fingerprint": self.dataset.fingerprint}
        self.unlogged = Unlogged()
        learns = model.learned_variance and model.variance not in LEARNED
        variance = "learned" if learns else model.default_variance
        self.noising = Noising(self.objective, model.schedule, variance, device)
        self.clock = self.noising.terms or model.schedule
        self.importance = Importance(self.clock) if config.times == "importance" else None
        self._terms: list[Tensor] = []  # [N, 2], t and loss of each example of the step
        self.network, self.model = model.network, model
        parameters = dict(self.network.named_parameters())
        self.trained = {name: p for name, p in parameters.items() if p.requires_grad} or parameters
        written = _as_json(self.description())  # what could not be read again is refused before a step is taken
        check_model(written, len(state(self.network)))
        checked_state(written["training"], Config)
        # What is refused has been refused: from here on the caller's network changes.
        self.network.to(device)
        if not any(module.training for module in self.network.modules()):
            self.network.train()
        if len(self.trained) == len(parameters):
            self.network.requires_grad_(True)
        self.trained = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        self.model = replace(model, network=copy.deepcopy(self.network).eval().requires_grad_(False))
        average = dict(self.model.network.named_parameters())
        self.average = [average[name] for name in self.trained]
        self.predict = parallel.averaging(self.network)
        self.optimizer = new_optimizer(self.trained.values(), config)
        ahead = config.workers and isinstance(self.dataset, Items)
        self.reader = Reader(self.dataset, config.workers, self._asked, self._after) if ahead else None
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))

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
        """Continue the run of a checkpoint. ``changes`` are fields of its :class:`Config` that shall differ.

        into  a ``Model`` as the one that the run began with, whose network is trained on: needed where that is no
              ``UNet``, and where there are a process of one's own, conditions or a codec

        Weights, moments, average, counters and data order continue to the bit, on the same kind of machine. Warns of
        other images than the run has seen. Raises ValueError for a change of the network, the process, the objective
        or the seed, and for fewer ``steps`` than have been taken.
        """
        description, tensors, config = read_checkpoint(path)
        training = description["training"]
        model = build(description, tensors, path, prefix="network.", device=checked_device(device), into=into)
        config = _settled(config, model)
        whole = {name: getattr(config, name) for name in FIXED}
        whole["network"] = model.network.config if isinstance(model.network, UNet) else config.network
        for name in changes.keys() & whole.keys():
            wanted, stored = changes[name], whole[name]
            if isinstance(wanted, dict) and isinstance(stored, dict):  # it says as much as it wants to
                stored = {key: stored.get(key) for key in wanted}
            if _as_json(wanted) != _as_json(stored):
                raise ValueError(f"{name}: expected that of {path}, {stored}, got {wanted}")
        config = replace(config, **{**changes, "network": config.network, "schedule": config.schedule})
        if "steps" in changes and config.steps < training["steps"]:
            raise ValueError(
                f"steps: expected at least the {training['steps']} that {path} has taken, got {config.steps}"
            )
        for name, parameter in model.network.named_parameters():
            parameter.requires_grad_(name not in (training.get("frozen") or ()))
        self = cls(model, dataset, config, device=device, validation=validation)
        self._compare_data(training.get("data"), path)
        restore(self.tensors(), tensors, path)
        self.steps, self.examples = training["steps"], training["examples"]
        self.unlogged = Unlogged(**(training.get("log") or {}))
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
        importance = {} if self.importance is None else self.importance.tensors()
        return {
            **{f"network.{name}": tensor for name, tensor in state(self.network).items()},
            **{f"ema.{name}": tensor for name, tensor in state(self.model.network).items()},
            **{f"exp_avg.{name}": self.optimizer.state[p]["exp_avg"] for name, p in self.trained.items()},
            **{f"exp_avg_sq.{name}": self.optimizer.state[p]["exp_avg_sq"] for name, p in self.trained.items()},
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

    def batch(self, part: int = 0) -> tuple[Tensor, Tensor | None, Draws, dict[str, Tensor]]:
        """A part of this process's share of the next step: x_0 [N, ...], labels [N] (-1 where dropped), draws, and the
        conditions of the model by name, [N, ...] (null where labels are dropped)."""
        place = self.examples, part
        draws = self._draws_at(place)
        if self.reader is not None:
            return self._drawn(self.reader.read(place), draws, self.config.flip)
        return self._drawn(self.dataset.batch(*self._asked(place)), draws, self.config.flip)

    def _examples(self, place: Place) -> np.ndarray:
        """The numbers of the examples of a part of this process's share of a step."""
        before, part = place
        parts = self.config.accumulate
        share = self.config.batch_size // (parallel.world() * parts)
        return before + share * (parts * parallel.rank() + part) + np.arange(share)

    def _draws_at(self, place: Place) -> Draws:
        times = self.importance or self.objective.t
        return draw(self._examples(place), self.config.seed, self.clock, self.config.label_dropout, times)

    def _asked(self, place: Place) -> tuple[Tensor, Tensor]:
        """The index and the seeds of the items at a place."""
        return self.index(self._examples(place)), self._draws_at(place).seeds

    def _after(self, place: Place) -> Place:
        before, part = place
        last = part == self.config.accumulate - 1
        return (before + self.config.batch_size, 0) if last else (before, part + 1)

    def _drawn(
        self, batch: Batch, draws: Draws, flip: bool = False
    ) -> tuple[Tensor, Tensor | None, Draws, dict[str, Tensor]]:
        """What :meth:`batch` gives, of any batch of items."""
        x_0, labels, n = batch.x_0, batch.labels, len(batch.x_0)
        if flip:
            x_0 = torch.where(draws.flip.view(-1, *[1] * (x_0.ndim - 1)), x_0.flip(-1), x_0)
        if self.model.codec is not None:
            with torch.no_grad():
                x_0 = self.model.codec.to_model(x_0.to(self.model.device)).float()
        if tuple(x_0.shape[1:]) != self.model.shape:
            raise ValueError(f"data: expected items of shape {self.model.shape}, got {tuple(x_0.shape[1:])}")
        labels = None if labels is None else labels.masked_fill(draws.null, -1)
        conditions = {}
        for condition in self.model.conditions:
            value = conditions[condition.name] = condition.batch(batch.conditions.get(condition.name), n)
            if condition.null is not None:
                null = draws.null.view(-1, *[1] * (value.ndim - 1))
                conditions[condition.name] = torch.where(null, condition.batch(None, n), value)
        return x_0, labels, draws, conditions

    def loss(self, part: int = 0) -> Tensor:
        """The mean of the objective: on a schedule by default || eps - eps_theta(sqrt(alpha_bar) x_0 +
        sqrt(1 - alpha_bar) eps, t) ||^2 an element."""
        batch = self.batch(part)
        losses, draws = self._losses(self.predict, *batch), batch[2]
        if draws.weights is None:
            return losses.mean()
        self._terms.append(torch.stack((draws.t.to(losses), losses.detach()), 1))
        return (losses * draws.weights.to(losses)).mean()

    def _losses(
        self, network: Any, x_0: Tensor, labels: Tensor | None, draws: Draws, conditions: dict[str, Tensor]
    ) -> Tensor:
        """Each example's loss, [N]."""
        device, learned = self.model.device, self.model.learned_variance
        x_0, seeds, at = x_0.to(device), draws.seeds.to(device), self.noising.at(draws.t)
        given = conditions if labels is None else conditions | {"labels": labels}
        given = {name: value.to(device) for name, value in given.items()}
        x_t = ops.q_sample(x_0, at.step, seeds, at.q_table, address=at.address)
        channels, dtype = x_t.shape[1] * (2 if learned else 1), torch.bfloat16 if self.config.bf16 else None
        out = call(network, x_t, at.t, given, channels, dtype)
        return self.noising.loss(out, x_0, seeds, at, learned_variance=learned)

    def step(self) -> float:
        """One step of Algorithm 1; returns its loss. Raises :class:`Diverged`, and then has changed no parameter."""
        self.optimizer.zero_grad()
        losses, parts = [], self.config.accumulate
        self._terms.clear()
        with _seeded((self.config.seed + self.steps + (parallel.rank() << 40)) % 2**63, self.model.device):
            for part in range(parts):
                with parallel.apart(self.predict) if part < parts - 1 else contextlib.nullcontext():
                    loss = self.loss(part)
                    (loss / parts).backward()
                losses.append(loss.detach())
        loss = parallel.mean(torch.stack(losses).mean())
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
        decay = ema_decay(self.config.ema, self.steps)
        with torch.no_grad():
            torch._foreach_lerp_(
                self.average, list(self.trained.values()), 1 - decay
            )  # ema <- decay ema + (1 - decay) theta
            for mine, theirs in zip(self.model.network.buffers(), self.network.buffers(), strict=True):
                mine.copy_(theirs)  # such as the statistics of BatchNorm, which are averages themselves
        if self.importance is not None:
            t, terms = parallel.joined_rows(torch.cat(self._terms)).cpu().unbind(1)
            self.importance.update(t.long(), terms)
        return loss.item()

    @torch.no_grad()
    def validate(self) -> float:
        """The mean of the objective on all held-out data, by the averaged network, with the same draws each time."""
        if self.validation is None:
            raise ValueError("validation: expected held-out data, got None")
        total, n = 0.0, len(self.validation)
        for index in torch.arange(n, dtype=torch.int64, device="cpu").split(self.config.batch_size):
            draws = draw(HELD_OUT + index.numpy(), self.config.seed, self.clock, 0.0, self.objective.t)
            losses = self._losses(self.model.network, *self._drawn(self.validation.batch(index, draws.seeds), draws))
            total += losses.double().sum().item()
        return total / n

    def grid(self, n: int = 40, steps: int = 50):
        """A ``PIL.Image`` of n samples of the averaged model, the same seeds and labels each time: the classes in turn,
        or where they have no names the labels of the first items, if items have some."""
        classes, index = self.model.classes, torch.arange(n, dtype=torch.int64, device="cpu")
        labels = names = None
        if classes is not None:
            labels = index % len(classes)
            names = images.captions(classes, labels.tolist())
        elif self.dataset.labelled:
            labels = self.dataset.batch(index % len(self.dataset)).labels
            names = [str(label) for label in labels.tolist()]
        steps = min(steps, self.noising.terms or steps)
        x = sample(self.model, n, labels=labels, sampler="ddim", steps=steps, progress=False)
        return images.grid(x, names, columns=10)

    def _has_grids(self) -> bool:
        """Whether there are sample grids: of images, by a network that needs no condition."""
        image = self.model.codec is not None or (len(self.model.shape) == 3 and self.model.shape[0] in (1, 3))
        free = all(condition.null is not None for condition in self.model.conditions)
        return bool(self.config.sample_every and image and free)

    def _validates(self) -> bool:
        """Whether a line of the log is the first since the held-out loss was due."""
        due, before = self.steps // self.config.validate_every, self.steps - self.config.log_every
        return self.validation is not None and due > before // self.config.validate_every

    def _write(self, out: Path, log: Log) -> None:
        """The checkpoint, and the picture of the log."""
        self.save(out / CHECKPOINT)
        curves = log.curves()
        if curves["training"]:
            images.save_png(loss_plot(curves), out / "loss.png", {"step": self.steps})

    def run(self, out: str | os.PathLike, *, progress: bool = True, lock: bool = True) -> signal.Signals | None:
        """Train up to ``config.steps``, into the directory ``out``: checkpoint.safetensors, log.csv, loss.png,
        samples-*.png of images, and checkpoint-*.safetensors with ``keep_every``.

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
            if self.reader is not None:
                stack.callback(self.reader.close)
            while self.steps < config.steps and heard not in runs.STOPPING:
                lr = config.learning_rate(self.steps)
                loss = self.step()
                heard = parallel.largest(received.take(), self.model.device)
                if not writes:
                    continue
                bar.update(config.batch_size)
                log.add(loss)
                if self.steps % config.log_every == 0:
                    held_out = self.validate() if self._validates() else None
                    said = {} if held_out is None else {"validation": f"{held_out:.4f}"}
                    loss = log.write(self.steps, lr, config.batch_size, held_out)
                    bar.report(step=self.steps, loss=f"{loss:.4f}", **said)
                if config.keep_every and self.steps % config.keep_every == 0:
                    self.save(out / f"checkpoint-{self.steps:07d}.safetensors")
                if self.steps % config.checkpoint_every == 0 or heard == runs.SAVING:
                    self._write(out, log)
                    saved = self.steps
                if self._has_grids() and self.steps % config.sample_every == 0:
                    images.save_png(self.grid(), out / f"samples-{self.steps:07d}.png", {"step": self.steps})
            if writes and saved != self.steps:
                self._write(out, log)
        return signal.Signals(heard) if self.steps < config.steps else None


def _settled(config: Config, model: Model) -> Config:
    """``config`` with the model's process, and its prediction and objective where it names none."""
    return replace(
        config,
        schedule=model.description()["schedule"],
        prediction=config.prediction or model.prediction,
        objective=config.objective or model.schedule.objective,
    )


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(plain(value)))


def _check(model: Model, config: Config, objective: Objective, data: Dataset | Items) -> None:
    """Raise ValueError for settings that the model cannot be trained by."""
    if next(model.network.parameters(), None) is None:
        raise ValueError("network: expected one with parameters, got none")
    if model.variance == "full":
        raise ValueError("variance: expected another one (diffkern.covariance has the loss of this one), got 'full'")
    if config.times == "importance" and not model.schedule.discrete:
        raise ValueError(f"times: expected {', '.join(TIMES)} or None without time steps, got 'importance'")
    if model.learned_variance != (objective.vlb != 0):
        whose = "a learned variance" if model.learned_variance else "a fixed variance"
        with_bound = [name for name, make in OBJECTIVES.items() if (make().vlb != 0) == model.learned_variance]
        expected = f"one of {', '.join(with_bound)} with a network of {whose}"
        raise ValueError(f"objective: expected {expected}, got {config.objective!r}")
    if model.prediction != config.prediction:
        raise ValueError(f"prediction: expected {config.prediction!r}, which is trained, got {model.prediction!r}")
    if config.label_dropout and not model.null_class:
        raise ValueError(f"label_dropout: expected 0 for a network without a null class, got {config.label_dropout}")
    if config.flip and len(data.shape) != 3:
        raise ValueError(f"flip: expected False of what is no image (C, H, W), got True with shape {data.shape}")
    parts = parallel.world() * config.accumulate
    if config.batch_size % parts:
        expected = f"a multiple of the {parallel.world()} processes"
        expected += f" times {config.accumulate} parts" if config.accumulate > 1 else ""
        raise ValueError(f"batch_size: expected {expected}, got {config.batch_size}")


def new_optimizer(parameters: Iterable[Tensor], config: Config) -> torch.optim.AdamW:
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


def _fitting(name: str, data: Dataset | Items, model: Model) -> Dataset | Items:
    """``data`` with the labels of the model's classes. Raises ValueError for data that the model does not take."""
    kind = "images" if isinstance(data, Dataset) else "items"
    if isinstance(data, Items):
        data = replace(data, conditions=tuple(condition.name for condition in model.conditions))
    if model.codec is None and data.shape != model.shape:
        raise ValueError(f"{name}: expected {kind} of shape {model.shape}, got {data.shape}")
    data = data.in_order_of(model.classes)
    if data.classes != model.classes:
        raise ValueError(f"{name}: expected the classes {model.classes}, got {data.classes}")
    if model.num_classes is not None and not data.labelled:
        expected = f"{kind} with labels of {model.num_classes} classes"
        raise ValueError(f"{name}: expected {expected}, got {kind} without labels")
    if isinstance(model.network, UNet):
        levels = len(model.network.config["channel_mult"])
        if any(size % 2 ** (levels - 1) for size in model.shape[1:]):
            raise ValueError(
                f"size: expected a multiple of {2 ** (levels - 1)} for a network of {levels} levels, "
                f"got images of {model.shape[1]} x {model.shape[2]}"
            )
    return data


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
