"""The arguments of ``sample``: what came, checked, and made what a run takes.

Each error names the argument, what was expected and what came.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .classifier import NoisyClassifier, load_noisy_classifier
from .constraints import From, Inpaint
from .engine import dtype_of, optimize, unwrapped
from .guidance import Guidance
from .model import Model, check_classes, checked_device, load, load_one
from .networks import UNet
from .process import checked_count, checked_float, checked_int
from .program import FIRST_VISIT, Program
from .runtime import Run
from .runtime.loop import Network
from .samplers import SAMPLERS, Sampler, default_sampler
from .system import System

DESCRIBED = ("schedule", "prediction", "shape")
"""The arguments that a bare network needs to make a :class:`Model`."""
OTHERS = (*DESCRIBED, *(field.name for field in fields(Run)))
"""The options of every call that are neither the sampler's nor conditions of the model."""

# --- the network and the machine ---


def run_of(run: Run | None, options: dict[str, Any]) -> Run:
    """``run``, with those of its fields that came as options of their own."""
    if run is not None and not isinstance(run, Run):
        raise TypeError(f"run: expected a Run, got {type(run).__name__}")
    named = {field.name: options.pop(field.name) for field in fields(Run) if field.name in options}
    return replace(run or Run(), **named)


def loaded(model: Any, run: Run) -> Any:
    """Load the model of a name or a path; return anything else as it is."""
    return load(model, run.device) if isinstance(model, str | os.PathLike) else model


def guidance_of(guidance: Any, model: Model, device: torch.device) -> Guidance:
    """A :class:`Guidance` whose classifier is a function."""
    if isinstance(guidance, Guidance):
        if isinstance(guidance.network, Model):
            check_classes("network", guidance.network, model)
        return replace(guidance, classifier=_classifier_of(guidance.classifier, model, device))
    guidance = 1.0 if guidance is None else guidance
    return Guidance(checked_float("guidance", guidance, "a finite number", math.isfinite))


def _classifier_of(classifier: Any, model: Model, device: torch.device) -> Callable[..., Tensor] | None:
    """ValueError for a :class:`NoisyClassifier` of other images or another noise than the model's."""
    if isinstance(classifier, str | os.PathLike):
        classifier = load_noisy_classifier(classifier, device)
    if not isinstance(classifier, NoisyClassifier):
        return classifier
    for name in ("schedule", "shape", "classes"):
        theirs, ours = getattr(classifier, name), getattr(model, name)
        if ours is not None and theirs != ours:
            raise ValueError(f"classifier: expected one with the model's {name}, {ours}, got {theirs}")
    return classifier.network


def check_guided(guidance: Guidance, labels: Tensor | None, model: Model, n: int) -> None:
    """Raises ValueError where what guides is missing."""
    w = guidance.weight
    if not guidance.one_weight and len(w) != n:
        raise ValueError(f"guidance: expected {n} weights, one for each image, got {len(w)}")
    compares = guidance.plus_plus or not guidance.one_weight or w != 1
    others = any(condition.null is not None for condition in model.conditions)
    by_labels = compares and not guidance.by_gradient and guidance.network is None and not others
    if guidance.negative is not None and labels is None:
        raise ValueError("negative: expected None without labels, got classes")
    if labels is None and by_labels:
        raise ValueError(f"guidance: expected 1 without labels, got {w}")
    if not model.null_class and by_labels and guidance.negative is None:
        raise ValueError(f"guidance: expected 1 with a network without a null class, got {w}")
    if not model.null_class and labels is None:
        raise ValueError("labels: expected a class for each image with a network without a null class, got None")
    if labels is None and guidance.classifier is not None:
        raise ValueError("labels: expected a class for each image with guidance by a classifier, got None")


def conditions_of(
    labels: Tensor | None, guidance: Guidance, model: Model, n: int, options: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By name: the condition of each sample, and what the call without it gets."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if labels is not None:
        null = torch.full_like(labels, -1) if model.null_class else labels
        if guidance.negative is not None:
            null = labels_of(guidance.negative, model)
            if null.ndim and len(null) != n:
                raise ValueError(f"negative: expected {n} classes, one for each image, got {len(null)}")
            null = null.expand(n).clone()
        found["labels"] = labels, null
    for condition in model.conditions:
        given = condition.batch(options.pop(condition.name, None), n)
        kept = condition.null is None or guidance.classifier is not None  # which is there for the labels alone
        found[condition.name] = given, given if kept else condition.batch(None, n)
    return found


def batch_of(
    conditions: dict[str, tuple[Tensor, Tensor]], rows: Tensor, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    def pick(value: Tensor) -> Tensor:
        return value[rows.to(value.device)].to(device)

    return {name: (pick(given), pick(null)) for name, (given, null) in conditions.items()}


def resolve(model: Any, run: Run, options: dict[str, Any]) -> tuple[Model, Network, torch.device, torch.dtype | None]:
    """(model, its network without an engine around it, where to run, the dtype of autocast or of the engine)."""
    device = run.device
    if device is not None:
        device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
    described = {name: options.pop(name, None) for name in DESCRIBED}
    if isinstance(model, str | os.PathLike):
        model = load_one(model, device)
    if isinstance(model, System):
        raise TypeError(f"model: expected one network, got the system {type(model).__name__}")
    if isinstance(model, Model):
        for name, value in described.items():
            if value is not None:
                raise ValueError(f"{name}: expected None, the model brings its own, got {value!r}")
    elif not isinstance(model, nn.Module) and hasattr(model, "unet") and hasattr(model, "scheduler"):
        pipeline = type(model).__name__
        raise TypeError(f"model: expected a Model, as Model.from_diffusers(pipeline) makes of one, got a {pipeline}")
    elif callable(model):
        for name, value in described.items():
            if value is None and hasattr(model, "log_prob"):
                got = f"{type(model).__name__}, a flow, which has sample() and bits() of its own"
                raise TypeError(f"model: expected a diffusion model, got {got}")
            if value is None:
                bare = f"a bare {type(model).__name__}, which has none"
                raise ValueError(f"{name}: expected a value with {bare}, got None")
        model = Model(model, **described)
    else:
        raise TypeError(f"model: expected a name, a path, a Model or a callable, got {type(model).__name__}")
    dtype = run.dtype
    if dtype is None and dtype_of(model.network) == torch.bfloat16:
        dtype = torch.bfloat16
    network = unwrapped(model.network)
    check_signature(model)
    return model, network, _where(network, device), dtype


def check_signature(model: Model) -> None:
    """TypeError unless its network can be called as ``network(x_t, t, labels, **conditions)``, as far as Python can
    tell."""
    network, conditions = unwrapped(model.network), _conditions(model)
    function = network.forward if isinstance(network, nn.Module) else network
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function, which does not tell
        return
    try:
        signature.bind(None, None, None, **dict.fromkeys(conditions))
    except TypeError:
        called = f"{getattr(network, '__name__', type(network).__name__)}{signature}"
        taken = ", ".join(("x_t", "t", "labels", *conditions))
        raise TypeError(f"model: expected a network that is called as network({taken}), got {called}") from None


def check_weights(network: Network, dtype: torch.dtype | None) -> None:
    """ValueError for a ``UNet`` that does not take the loop's float32."""
    if isinstance(network, UNet) and dtype is None and network.conv_in.weight.dtype != torch.float32:
        weights = network.conv_in.weight.dtype
        raise ValueError(f"model: expected a UNet of float32, or dtype={weights} for autocast, got one of {weights}")


def accelerated(network: Network, dtype: torch.dtype | None, run: Run) -> tuple[Network, torch.dtype | None]:
    """Return the network, or its engine if ``run`` asks for one, and the dtype of autocast around it."""
    if not (run.engine and isinstance(network, nn.Module)):
        return network, dtype
    return (optimize(network, dtype=dtype), None) if dtype == torch.bfloat16 else (optimize(network), dtype)


def check_rest(options: dict[str, Any], model: Model) -> None:
    """TypeError for an option that is neither a condition of the model nor a field of a run."""
    for name, value in options.items():
        known = ", ".join((*_conditions(model), *OTHERS))
        raise TypeError(f"{name}: expected one of the options {known}, got {value!r}")


def _conditions(model: Model) -> list[str]:
    return [condition.name for condition in model.conditions]


def _where(network: Network, device: torch.device | None) -> torch.device:
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if parameter is None:
        return device or torch.device("cpu")
    if device not in (None, parameter.device):
        raise ValueError(f"device: expected {str(parameter.device)!r}, where the network is, got {str(device)!r}")
    return parameter.device


def check_x_T(x_T: Any, shape: tuple[int, ...], name: str = "x_T") -> None:
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        got = x_T.dtype if isinstance(x_T, Tensor) else type(x_T).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if x_T.shape[1:] != shape or x_T.ndim != len(shape) + 1:
        raise ValueError(f"{name}: expected shape (n, {', '.join(map(str, shape))}), got {tuple(x_T.shape)}")


def samples_of(n: Any, seeds: Any, labels: Any, x_T: Tensor | None, model: Model) -> tuple[int, Tensor, Tensor | None]:
    """(n, seeds [n], labels [n] or None), n being that of whichever argument tells it."""
    if seeds is not None:
        seeds = ops.as_seeds(seeds, "cpu")
    if labels is not None:
        labels = labels_of(labels, model)
    lengths = {name: len(rows) for name, rows in dict(seeds=seeds, x_T=x_T).items() if rows is not None}
    if labels is not None and labels.ndim:
        lengths["labels"] = len(labels)
    if n is None:
        if not lengths:
            raise ValueError("n: expected n or seeds, got neither")
        n = next(iter(lengths.values()))
    n = checked_count("n", n)
    for name, length in lengths.items():
        if length != n:
            raise ValueError(f"{name}: expected {n}, one for each image, got {length}")
    seeds = torch.arange(n, dtype=torch.int64, device="cpu") if seeds is None else seeds
    return n, seeds, labels if labels is None else labels.expand(n)


def labels_of(labels: Any, model: Model) -> Tensor:
    """int64: [] of one label, [n] of several."""
    low, high = -1 if model.null_class else 0, 2**63
    expected = f"ints >= {low}"
    if model.num_classes is not None:
        high = model.num_classes
        expected = f"ints in {low}..{high - 1}"
    if isinstance(labels, Tensor):
        if labels.dtype != torch.int64 or labels.ndim > 1:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise TypeError(f"labels: expected an int64 tensor [] or [n], got {got}")
        labels = labels.tolist()
    lone = isinstance(labels, str) or not isinstance(labels, Iterable)
    labels = [labels] if lone else list(labels)
    if model.classes is not None:
        labels = [model.label(label) if isinstance(label, str) else label for label in labels]
    labels = [checked_int("labels", label, expected) for label in labels]
    for label in labels:
        if not low <= label < high:
            raise ValueError(f"labels: expected {expected}, got {label}")
    return torch.tensor(labels[0] if lone else labels, dtype=torch.int64, device="cpu")


# --- the program of a run ---


def program_of(
    model: Model,
    sampler: Any,
    steps: Any,
    constraint: Inpaint | None,
    start: From | None,
    noise: str,
    guidance: Guidance,
    options: dict[str, Any],
) -> Program:
    """The rows of a run. What is left in ``options`` is the sampler's."""
    process, spacing = model.schedule, options.pop("spacing", None) or model.spacing
    T = process.T if process.discrete else None
    if T is not None and steps is not None:
        steps = process.timesteps(steps, spacing or process.spacing)
    if constraint is not None and constraint.resample > 1:
        if sampler not in (None, "ddpm", "repaint", SAMPLERS["ddpm"], SAMPLERS["repaint"]):
            raise ValueError(f"resample: expected 1 with another sampler than 'ddpm', got {constraint.resample}")
        sampler = "repaint"
        options |= dict(jump=constraint.jump, resample=constraint.resample)
    if sampler is None:
        sampler = default_sampler(None if steps is None or T is None else len(steps), T, options.get("eta"))
    sampler = sampler_of(sampler)
    if steps is None and sampler.steps is not None:
        steps = sampler.steps if T is None else min(sampler.steps, T)
    settle(options, sampler, model)
    if steps is None and T is None:
        steps = 1000
    grid = process.grid(steps, spacing, path=noise == "path")
    if sampler.name == "ddim_inversion":
        grid = grid.reversed()
    if start is not None:
        grid = grid.tail(start.fraction)
    program = sampler.trace(grid, model.prediction, plus_plus=guidance.plus_plus, **options)
    guidance.check(program)
    if grid.path and not any(row.noise and row.noise.address < FIRST_VISIT for row in program.rows):
        name = sampler.name
        raise ValueError(
            f"noise: expected 'step' with sampler {name!r}, which draws no noise of a step's path, got 'path'"
        )
    return program


def sampler_of(sampler: Any) -> Sampler:
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if callable(sampler):
        return Sampler(sampler)
    raise ValueError(f"sampler: expected one of {tuple(SAMPLERS)} or a function, got {sampler!r}")


def settle(options: dict[str, Any], sampler: Sampler, model: Model) -> None:
    """Leave in ``options`` what the sampler takes: an option of other samplers may be there at its default."""
    if "eta" in options and "eta" not in sampler.options:
        if options["eta"] != 0:
            raise ValueError(f"eta: expected 0, its default, with sampler {sampler.name!r}, got {options['eta']!r}")
        del options["eta"]
    if "variance" in options and "variance" not in sampler.options:
        if options["variance"] is not None:
            got = options["variance"]
            raise ValueError(f"variance: expected None, its default, with sampler {sampler.name!r}, got {got!r}")
        del options["variance"]
    if "variance" in sampler.options and options.get("variance") is None:
        options["variance"] = model.default_variance
    for name, value in options.items():
        if name not in sampler.options:
            of_sampler, of_model = (", ".join(names) or "none" for names in (sampler.options, _conditions(model)))
            raise TypeError(
                f"{name}: expected an option of sampler {sampler.name!r} ({of_sampler}), a condition of the model "
                f"({of_model}), or one of {', '.join(('spacing', 'x_T', *OTHERS))}, got {value!r}"
            )
