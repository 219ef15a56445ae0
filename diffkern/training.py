"""Training: Algorithm 1 of Ho et al. 2020, with an average of the weights, from counters alone.

Whatever is drawn for the k-th example that training sees (its image, t, noise, label dropout, flip) is a function of
k and the run's seed: there is no generator to save, and a resumed run continues to the bit. Several processes
(``torchrun -m diffkern train``) share each step's examples, and train the network that one alone would, but for the
order in which a gradient is summed.
"""

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import images, ops, parallel
from .data import EXAMPLE_STREAM, Dataset, epoch_order, words
from .defaults import float32_on
from .description import checked_training
from .files import CHECKPOINT, read, restore, write
from .model import Model, build, checked_device
from .sampling import sample
from .schedule import Schedule, checked_float, checked_int
from .unet import UNet

LR_SCHEDULES = ("constant", "cosine")


def option(default: Any, text: str, **kwargs) -> Any:
    """A field of :class:`Config`; the command line makes its options from these."""
    if isinstance(default, dict):
        return field(default_factory=lambda: copy.deepcopy(default), metadata={"help": text, **kwargs})
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass(frozen=True)
class Config:
    """A training run but for its data. ``network`` and ``schedule`` hold a UNet's and a Schedule's arguments."""

    steps: int = option(100_000, "optimizer steps in all")
    batch_size: int = option(64, "images a step, of all processes together")
    lr: float = option(2e-4, "learning rate of AdamW")
    lr_schedule: str = option("constant", "after the warm-up", choices=LR_SCHEDULES)
    warmup: int = option(500, "steps over which the learning rate rises from 0")
    betas: tuple[float, float] = option((0.9, 0.99), "of AdamW")
    weight_decay: float = option(0.0, "of AdamW")
    grad_clip: float = option(1.0, "largest norm of the gradient (0: no limit)")
    ema: float = option(0.999, "decay of the weights' average; min(ema, (1 + step) / (10 + step)) early on")
    label_dropout: float = option(0.1, "share of labels replaced by the null class, for classifier-free guidance")
    flip: bool = option(False, "mirror half of the images")
    bf16: bool = option(False, "autocast to bfloat16")
    seed: int = option(0, "of all that is drawn")
    checkpoint_every: int = option(1000, "steps between checkpoints")
    sample_every: int = option(5000, "steps between sample grids (0: none)")
    log_every: int = option(100, "steps between the lines of log.csv")
    network: dict = option({}, "arguments of diffkern.unet.UNet")
    schedule: dict = option(Schedule.linear(1000).config(), "a diffkern.Schedule's config()")

    def __post_init__(self):
        for name, low in dict(steps=1, batch_size=1, checkpoint_every=1, log_every=1, warmup=0, sample_every=0).items():
            if checked_int(name, getattr(self, name), f"an int >= {low}") < low:
                raise ValueError(f"{name}: expected an int >= {low}, got {getattr(self, name)}")
        seed = checked_int("seed", self.seed, "an int in [-2^63, 2^64)")
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: expected an int in [-2^63, 2^64), got {seed}")
        checked_float("lr", self.lr, "a number > 0", lambda value: value > 0)
        checked_float("weight_decay", self.weight_decay, "a number >= 0", lambda value: value >= 0)
        checked_float("grad_clip", self.grad_clip, "a number >= 0", lambda value: value >= 0)
        checked_float("ema", self.ema, "a number in [0, 1)", lambda value: 0 <= value < 1)
        checked_float("label_dropout", self.label_dropout, "a probability", lambda value: 0 <= value <= 1)
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, from JSON
        if len(self.betas) != 2:
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        for beta in self.betas:
            checked_float("betas", beta, "two numbers in [0, 1)", lambda value: 0 <= value < 1)
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule: expected one of {LR_SCHEDULES}, got {self.lr_schedule!r}")
        for name in ("network", "schedule"):
            if not isinstance(getattr(self, name), dict):
                raise TypeError(f"{name}: expected a dict, got {type(getattr(self, name)).__name__}")

    def learning_rate(self, step: int) -> float:
        """Of the 0-based ``step``: linear warm-up, then constant or half a cosine down to 0 at ``steps``."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))) if self.lr_schedule == "cosine" else 1.0
        return self.lr * rise * fall


PRESETS = {
    "fashion-mnist": Config(
        steps=60_000,
        lr=4e-4,
        bf16=True,
        network={
            "channels": 32,
            "channel_mult": (1, 2, 4),
            "attention_levels": (2,),
            "groups": 8,
            "norm_eps": 1e-5,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0.0,
        },
    ),
}
"""Recipes by name. ``fashion-mnist`` is the shipped model's, of 3.9 million parameters."""


class Diverged(RuntimeError):
    """The loss or its gradient is NaN or infinite; the state is the one before that step."""


@dataclass(frozen=True)
class Draws:
    """What chance decides for N examples, each a function of its number and the run's seed."""

    seeds: Tensor  # [N] int64: of the forward noise (stream 2)
    t: Tensor  # [N] int64, uniform on 0..T-1
    null: Tensor  # [N] bool: the label is dropped
    flip: Tensor  # [N] bool: the image may be mirrored


def draw(examples: np.ndarray, seed: int, T: int, label_dropout: float) -> Draws:
    """For each example number k: Philox words of (k, stream 3) are seed (two of them), t, and label dropout."""
    w = words(examples, 0, EXAMPLE_STREAM, seed)
    return Draws(
        seeds=torch.from_numpy((w[:, 0] | w[:, 1] << np.uint64(32)).view(np.int64)),
        t=torch.from_numpy((w[:, 2] * np.uint64(T) >> np.uint64(32)).astype(np.int64)),
        null=torch.from_numpy(w[:, 3] * 2.0**-32 < label_dropout),
        flip=torch.from_numpy(words(examples, 1, EXAMPLE_STREAM, seed)[:, 0] >> np.uint64(31) == 1),
    )


def ema_decay(decay: float, step: int) -> float:
    """Of the average after ``step`` steps: the first steps must not keep the random start."""
    return min(decay, (1 + step) / (10 + step))


def new_model(dataset: Dataset, config: Config, name: str = "model") -> Model:
    """The untrained eps-predicting model that ``config`` asks for, with the data's shape and classes."""
    classes = dataset.classes
    with torch.random.fork_rng(devices=[]), float32_on("cpu"):
        torch.manual_seed(config.seed)
        network = UNet(**{"in_channels": dataset.shape[0], "num_classes": classes and len(classes), **config.network})
    return Model(network, Schedule.from_config(config.schedule), "eps", dataset.shape, classes, name=name)


class Trainer:
    """The state of a run: the network, its average, AdamW's moments, and two counters.

    ``model`` holds the averaged network, and is what to sample from. ``steps`` optimizer steps have been taken and
    ``examples`` images seen; ``step()`` takes the next one.
    """

    def __init__(self, model: Model, dataset: Dataset, config: Config, *, device: torch.device | str | None = None):
        if dataset.shape != model.shape:
            raise ValueError(f"data: expected images of shape {model.shape}, got {dataset.shape}")
        dataset = dataset.in_order_of(model.classes)
        if dataset.classes != model.classes:
            raise ValueError(f"data: expected the classes {model.classes}, got {dataset.classes}")
        if model.network.config["learned_variance"]:
            raise ValueError("learned_variance: expected False, the loss of Algorithm 1 does not train a variance")
        if model.prediction != "eps":
            raise ValueError(f"prediction: expected 'eps', which Algorithm 1 trains, got {model.prediction!r}")
        if config.batch_size % parallel.world():
            raise ValueError(
                f"batch_size: expected a multiple of the {parallel.world()} processes, got {config.batch_size}"
            )
        self.dataset, self.config, self.steps, self.examples = dataset, config, 0, 0
        self.network: nn.Module = model.network.to(checked_device(device)).train().requires_grad_(True)
        self.model = replace(model, network=copy.deepcopy(self.network).eval().requires_grad_(False))
        self.predict = parallel.averaging(self.network)
        self.table = model.schedule.q_table(self.model.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True
        )
        for parameter in self.network.parameters():  # the state exists from the start: restoring is copying
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        self._order: tuple[int, Tensor] = (-1, torch.empty(0, dtype=torch.int64, device="cpu"))

    @classmethod
    def resume(
        cls, path: str | os.PathLike, dataset: Dataset, *, device: torch.device | str | None = None, **changes
    ) -> "Trainer":
        """Continue the run of a checkpoint. ``changes`` are fields of its :class:`Config` that shall differ.

        Weights, moments, average, counters and data order continue to the bit, on the same kind of machine.
        """
        description, tensors = read(path)
        config = checked_training(description, path, Config)
        for name in changes.keys() & {"network", "schedule", "seed"}:
            stored = getattr(config, name)
            wanted = {**stored, **changes[name]} if isinstance(stored, dict) else changes[name]
            if json.dumps(wanted) != json.dumps(stored):
                raise ValueError(f"{name}: expected that of {path}, {stored}, got {changes[name]}")
        config = replace(config, **{**changes, "network": config.network, "schedule": config.schedule})
        model = build(description, tensors, path, prefix="network.", device=checked_device(device))
        self = cls(model, dataset, config, device=device)
        restore(self.tensors(), tensors, path)
        state = description["training"]
        self.steps, self.examples = state["steps"], state["examples"]
        for moments in self.optimizer.state.values():
            moments["step"].fill_(self.steps)
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a step changes, but for the counters: the live tensors, by their names in a checkpoint."""
        parameters = dict(self.network.named_parameters())
        return {
            **{f"network.{name}": tensor for name, tensor in self.network.state_dict().items()},
            **{f"ema.{name}": tensor for name, tensor in self.model.network.state_dict().items()},
            **{f"exp_avg.{name}": self.optimizer.state[p]["exp_avg"] for name, p in parameters.items()},
            **{f"exp_avg_sq.{name}": self.optimizer.state[p]["exp_avg_sq"] for name, p in parameters.items()},
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write a checkpoint, atomically. ``diffkern.load`` reads its averaged model."""
        training = {"config": asdict(self.config), "steps": self.steps, "examples": self.examples}
        write(path, {**self.model.description(), "prefix": "ema.", "training": training}, self.tensors())

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
        draws = draw(examples, self.config.seed, self.model.schedule.T, self.config.label_dropout)
        index = self.index(examples)
        x_0 = self.dataset.x_0(index)
        if self.config.flip:
            x_0 = torch.where(draws.flip[:, None, None, None], x_0.flip(-1), x_0)
        labels = None if self.dataset.labels is None else self.dataset.labels[index].masked_fill(draws.null, -1)
        return x_0, labels, draws

    def loss(self) -> Tensor:
        """Of the batch: || eps - eps_theta(sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, t) ||^2 an element."""
        device = self.model.device
        x_0, labels, draws = self.batch()
        x_0, seeds, t = x_0.to(device), draws.seeds.to(device), draws.t.to(device)
        labels = None if labels is None else labels.to(device)
        x_t = ops.q_sample(x_0, t, seeds, self.table)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            eps_theta = self.predict(x_t, t, labels)
        return ops.noise_loss(eps_theta, seeds, t).mean()  # the same eps, drawn again rather than stored

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
        steps = min(steps, self.model.schedule.T)
        x = sample(self.model, n, labels=labels, sampler="ddim", steps=steps, progress=False)
        names = None if classes is None else [classes[label] for label in labels]
        return images.grid(x, names, columns=10)

    def run(self, out: str | os.PathLike, *, progress: bool = True) -> signal.Signals | None:
        """Train up to ``config.steps``, into the directory ``out``: checkpoint.safetensors, log.csv, samples-*.png.

        Of several processes the first one writes. SIGINT and SIGTERM, to any of them, end it after the step at hand,
        with a checkpoint, and are returned; None means finished.
        A loss that is not finite raises :class:`Diverged`, and leaves the last checkpoint as it was.
        """
        from tqdm import tqdm

        out, config, writes = Path(out), self.config, parallel.rank() == 0
        if writes:
            out.mkdir(parents=True, exist_ok=True)
        log = Log(out / "log.csv", self.steps) if writes else None
        bar = tqdm(
            total=config.steps * config.batch_size,
            initial=self.steps * config.batch_size,
            unit="img",
            dynamic_ncols=True,
            disable=not (progress and writes),
        )
        stop = 0
        with bar, _signals() as received:
            while self.steps < config.steps and not stop:
                lr = config.learning_rate(self.steps)
                loss = self.step()
                stop = parallel.largest(received[0] if received else 0, self.model.device)
                if not writes:
                    continue
                bar.update(config.batch_size)
                log.add(loss)
                if self.steps % config.log_every == 0:
                    bar.set_postfix(step=self.steps, loss=f"{log.write(self.steps, lr, config.batch_size):.4f}")
                if self.steps % config.checkpoint_every == 0:
                    self.save(out / CHECKPOINT)
                if config.sample_every and self.steps % config.sample_every == 0:
                    images.save_png(self.grid(), out / f"samples-{self.steps:07d}.png", {"step": self.steps})
            if writes:
                self.save(out / CHECKPOINT)
        return signal.Signals(stop) if stop else None


class Log:
    """log.csv: the mean loss since the line before. Lines later than the checkpoint that is resumed are dropped."""

    HEADER = "step,loss,lr,images_per_second\n"

    def __init__(self, path: Path, steps: int):
        lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
        path.write_text(self.HEADER + "".join(line for line in lines if int(line.split(",")[0]) <= steps))
        self.path, self.losses, self.since = path, [], time.monotonic()

    def add(self, loss: float) -> None:
        self.losses.append(loss)

    def write(self, step: int, lr: float, batch_size: int) -> float:
        now = time.monotonic()
        mean, rate = sum(self.losses) / len(self.losses), len(self.losses) * batch_size / (now - self.since)
        with self.path.open("a") as file:
            file.write(f"{step},{mean:.6f},{lr:.6g},{rate:.1f}\n")
        self.losses, self.since = [], now
        return mean


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGINT and SIGTERM instead of dying; a second one of a kind acts as it did before."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # Python delivers signals to the main thread alone
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def receive(number, frame):
        received.append(signal.Signals(number))
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What torch draws on ``device`` is drawn from ``seed``; its generator is left as it was."""
    generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


def config_fields() -> list:
    """The fields of :class:`Config` that are single values: what the command line offers as options."""
    return [f for f in fields(Config) if f.name not in ("network", "schedule")]
