"""The task of a diffusion model: to tell the noise, or what stands for it, of x_t."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import images, ops
from ..arguments import check_signature
from ..data import Batch, Dataset, Items
from ..engine import is_optimized
from ..io.description import check_model, checked_state
from ..io.files import state
from ..model import Model, build, plan
from ..networks import UNet
from ..prediction import head_at
from ..runtime.loop import call
from ..samplers import LEARNED
from ..sampling import sample
from .config import Config, as_json
from .draws import Draws
from .noising import Noising
from .objectives import OBJECTIVES, Objective
from .task import Given, Task
from .times import TIMES, Importance


class Denoising(Task):
    """The mean of an objective: on a schedule by default || eps - eps_theta(sqrt(alpha_bar) x_0 +
    sqrt(1 - alpha_bar) eps, t) ||^2 an element (Ho et al. 2020, eq. 14)."""

    model: Model

    def __init__(
        self,
        model: Model,
        config: Config,
        device: torch.device,
        dataset: Dataset | Items,
        validation: Dataset | Items | None,
    ):
        objective = config.made_objective()
        _check(model, config, objective)
        check_signature(model)
        learns = model.learned_variance and model.variance not in LEARNED
        variance = "learned" if learns else model.default_variance
        self.noising = Noising(objective, model.schedule, variance, device)
        _check_description(model, config)
        process = model.schedule
        head_at(model.prediction, process.point(process.t_max), process)  # raises now what the first samples would
        self.model, self.times = model, objective.t
        self.clock = self.noising.terms or model.schedule
        self.importance = Importance(self.clock) if config.times == "importance" else None
        self.dtype = torch.bfloat16 if config.bf16 else None

    @staticmethod
    def settled(config: Config, model: Model) -> Config:
        """``config`` with the model's process, and its prediction and objective where it names none."""
        if not isinstance(model.network, nn.Module) or is_optimized(model.network):
            name = type(model.network).__name__ + (" that was optimized" if is_optimized(model.network) else "")
            raise TypeError(f"network: expected a torch.nn.Module that can be trained, got {name}")
        return replace(
            config,
            schedule=model.description()["schedule"],
            prediction=config.prediction or model.prediction,
            objective=config.objective or model.schedule.objective,
        )

    @staticmethod
    def fitting(name: str, data: Dataset | Items, model: Model) -> Dataset | Items:
        """``data`` with the labels of the model's classes."""
        kind = "images" if isinstance(data, Dataset) else "items"
        if isinstance(data, Items):
            data = replace(data, conditions=tuple(condition.name for condition in model.conditions))
        if model.codec is None and data.shape != model.shape:
            raise ValueError(f"{name}: expected {kind} of shape {model.shape}, got {data.shape}")
        parts = data.names if isinstance(data, Items) else ()
        missing = [condition.name for condition in model.conditions if condition.name not in parts]
        if missing:
            expected, got = ", ".join(missing), f"of {', '.join(parts)}" if parts else "alone"
            raise ValueError(f"{name}: expected {kind} with the model's conditions, {expected}, got {kind} {got}")
        data = data.in_order_of(model.classes)
        if data.classes != model.classes:
            named = "; Model(..., classes=dataset.classes) names those of a network that takes labels"
            remedy = named if model.classes is None else ""
            raise ValueError(f"{name}: expected the classes {model.classes}, got {data.classes}{remedy}")
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

    @staticmethod
    def check(description: dict[str, Any], tensors: int) -> None:
        check_model(description, tensors)

    @staticmethod
    def planned(description: dict[str, Any], tensors: dict[str, Tensor], path: Path, into: Model | None) -> Model:
        return plan(description, tensors, path, into=into)

    @staticmethod
    def built(
        description: dict[str, Any], tensors: dict[str, Tensor], path: Path, into: Model | None, device: torch.device
    ) -> nn.Module:
        return build(description, tensors, path, prefix="network.", device=device, into=into).network

    @property
    def network(self) -> nn.Module:
        return self.model.network

    def _with(self, network: nn.Module) -> Model:
        return replace(self.model, network=network)

    def given(self, batch: Batch, draws: Draws) -> Given:
        """A batch encoded, with its labels and conditions dropped where that was drawn."""
        x_0, labels, n = batch.x_0, batch.labels, len(batch.x_0)
        if self.model.codec is not None:
            x_0 = self.model.to_latents(x_0).float()
        if tuple(x_0.shape[1:]) != self.model.shape:
            raise ValueError(f"data: expected items of shape {self.model.shape}, got {tuple(x_0.shape[1:])}")
        labels = None if labels is None else labels.masked_fill(draws.null, -1)
        conditions = {}
        for condition in self.model.conditions:
            value = conditions[condition.name] = condition.batch(batch.conditions.get(condition.name), n)
            if condition.null is not None:
                null = draws.null.view(-1, *[1] * (value.ndim - 1))
                conditions[condition.name] = torch.where(null, condition.batch(None, n), value)
        return Given(x_0, labels, draws, conditions)

    def losses(self, network: Any, batch: Given) -> Tensor:
        device, learned = self.model.device, self.model.learned_variance
        _, labels, draws, conditions = batch
        x_0, seeds, at = batch.x_0.to(device), draws.seeds.to(device), self.noising.at(draws.t)
        given = conditions if labels is None else conditions | {"labels": labels}
        given = {name: value.to(device) for name, value in given.items()}
        x_t = ops.q_sample(x_0, at.step, seeds, at.q_table, address=at.address)
        out = call(network, x_t, at.t, given, x_t.shape[1] * (2 if learned else 1), self.dtype)
        return self.noising.loss(out, x_0, seeds, at, learned_variance=learned)

    @property
    def draws_images(self) -> bool:
        model = self.model
        return model.codec is not None or (len(model.shape) == 3 and model.shape[0] in (1, 3))

    def grid(self, data: Dataset | Items, n: int, steps: int):
        """The classes in turn, or where they have no names the labels of the first items, if items have some."""
        classes, index = self.model.classes, torch.arange(n, dtype=torch.int64, device="cpu")
        first = data.batch(index % len(data))
        labels = names = None
        if classes is not None:
            labels = index % len(classes)
            names = images.captions(classes, labels.tolist())
        elif data.labelled:
            labels = first.labels
            names = [str(label) for label in labels.tolist()]
        steps = min(steps, self.noising.terms or steps)
        x = sample(self.model, n, labels=labels, sampler="ddim", steps=steps, progress=False, **first.conditions)
        return images.grid(x, names, columns=10)


def _check(model: Model, config: Config, objective: Objective) -> None:
    """Raise ValueError for settings that the model cannot be trained by."""
    if next(model.network.parameters(), None) is None:
        raise ValueError("network: expected one with parameters, got none")
    if model.variance == "full":
        raise ValueError("variance: expected another one (diffkern.covariance has the loss of this one), got 'full'")
    if config.times == "importance" and not model.schedule.discrete:
        raise ValueError(f"times: expected {', '.join(TIMES)} or None without time steps, got 'importance'")
    if model.learned_variance != (objective.vlb != 0):
        whose = "a fixed variance"
        if model.learned_variance:
            whose = f"a learned variance, as it returns {2 * model.shape[0]} channels for {model.shape[0]}"
        with_bound = [name for name, make in OBJECTIVES.items() if (make().vlb != 0) == model.learned_variance]
        expected = f"one of {', '.join(with_bound)} with a network of {whose}"
        raise ValueError(f"objective: expected {expected}, got {config.objective!r}")
    if model.prediction != config.prediction:
        raise ValueError(f"prediction: expected {config.prediction!r}, which is trained, got {model.prediction!r}")
    if config.label_dropout and not model.null_class:
        raise ValueError(f"label_dropout: expected 0 for a network without a null class, got {config.label_dropout}")


def _check_description(model: Model, config: Config) -> None:
    """Refuse before the first step what could not be read again after the last."""
    check_model(as_json(model.description()), len(state(model.network)))
    checked_state(as_json({"config": asdict(config), "steps": 0, "examples": 0}), Config)
