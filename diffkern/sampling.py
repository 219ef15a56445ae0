"""Sampling: noise in, images out. Arguments become a program of rows; the loop runs it, batch by batch."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .constraints import From, Inpaint, Quantile, limit_of, rows_of
from .engine import Engine
from .guidance import Guidance
from .model import Model, checked_device, load, unwrapped
from .networks import UNet
from .networks.modes import evaluating
from .process import Grid, Process
from .program import Program, Row
from .progress import bar as progress_bar
from .runtime import Loop, Run
from .runtime.loop import Network as Network
from .samplers import PREDICTIONS, SAMPLERS, Sampler, default_sampler
from .schedule import checked_float, checked_int

FIRST_BLEND = (1 << 20) - 1  # the address of the known part's noise at the start of a run


@dataclass(frozen=True)
class Step:
    """What a callback sees: a batch before it leaves step ``t``, and the image that the network sees in it.

    images  the rows of the result that this batch becomes
    index   how many steps came before, 0-based
    t       what the network was told: the time step, 0..T-1, of a schedule
    x_t     [batch, ...], float32; a copy, as are x0_hat and x_next
    x0_hat  [batch, ...], float32; clamped where ``sample`` clips
    x_next  [batch, ...], float32: what the step has made of x_t
    """

    images: slice
    index: int
    t: int | float
    x_t: Tensor
    x0_hat: Tensor
    x_next: Tensor


def sample(
    model: str | os.PathLike | Model | Network,
    n: int | None = None,
    *,
    seeds: int | Sequence[int] | Tensor | None = None,
    labels: int | str | Sequence[int | str] | Tensor | None = None,
    sampler: str | Sampler | Callable[..., Any] | None = None,
    steps: int | Sequence[float] | None = None,
    guidance: float | Guidance = 1.0,
    clip: bool | float | tuple[float, float] | Quantile | None = None,
    start: From | None = None,
    constraint: Inpaint | None = None,
    noise: str = "step",
    callback: Callable[[Step], Tensor | None] | None = None,
    run: Run | None = None,
    **options: Any,
) -> Tensor:
    """Draw images from a diffusion model: [N, C, H, W], float32, in [-1, 1] with ``clip``.

    model       a shipped model's name, a file, a ``Model``; or any ``model(x_t, t, labels)``, which needs ``schedule``
                (a ``Schedule``, with t int64 [N] in 0..T-1, or another process), ``prediction`` ("eps", "x0", "v",
                "score", "flow", "edm", "mu") and ``shape``, of any rank
    n, seeds    how many images, which have the seeds 0..n-1; or the seed of each. All noise of an image is a function
                of its seed: the image depends on its seed, the batch size and the device, and on no other image. So
                ``n`` gives the same images at every call; others come by ``seeds=torch.randint(2**63 - 1, (n,))``
    labels      a class for each image, or one for all, by number, or by a name that the ``Model`` knows; -1 is the null
                class, and None is null throughout. A network without a null class needs them
    sampler     a name in :data:`diffkern.samplers.SAMPLERS`, or a function ``(m, grid, **options) -> m.program(x)``;
                None is ddpm for all steps of a schedule, unipc for fewer, and ddim with ``eta``
    steps       how many, or the very time steps, decreasing; None is the sampler's own number
    guidance    w of out_null + w (out_label - out_null) (Ho & Salimans 2022): 1 is the conditional model, 0 the
                unconditional one, each one pass through the network; any other w takes two, and needs labels. Or a
                :class:`Guidance`
    clip        clamp each prediction of x_0: True to [-1, 1], to a range (-a, a), or by a :class:`Quantile`; None is
                the model's own way, or True
    start       begin inside the run, :class:`From` an image
    constraint  :class:`Inpaint`: keep a part of an image
    noise       "step": a step's noise is that of the time step that it leaves; "path": of all that it passes, so that a
                seed gives similar images for any number of steps
    callback    called with a :class:`Step` in every step; a tensor that it returns takes the place of ``x_next``
    run         a :class:`Run`: batch size, device, dtype, engine, CUDA graph, progress bar
    options     the sampler's (``eta``, ``order``, ``variance``), conditions of the model, by their names, and

                spacing     of the steps: "trailing", "leading", "linspace", "quadratic", "karras", "lambda" of a
                            schedule; "uniform", "karras", "lambda" of another process
                x_T         where to start, [N, ...]; None draws it from the seeds
                schedule, prediction, shape     of a bare function
                batch_size, device, dtype, engine, cuda_graph, progress     the fields of ``run``

    Network and callback run without gradients (``torch.no_grad``), which they may enable for themselves. The network is
    in eval mode for every thread until the last call that samples it ends, however it ends; then all its modules have
    the training flags that they had before the first. To train meanwhile, sample a copy.
    Raises TypeError or ValueError for an argument that does not fit.
    """
    run = _run(run, options)
    model, network, device, dtype = _resolve(model, run, options)
    process, x_T = model.schedule, options.pop("x_T", None)
    guidance = _guidance(guidance)
    if noise not in ("step", "path"):
        raise ValueError(f"noise: expected 'step' or 'path', got {noise!r}")
    for name, value, kind in (("start", start, From), ("constraint", constraint, Inpaint)):
        if value is not None and not isinstance(value, kind):
            raise TypeError(f"{name}: expected None or {kind.__name__}(...), got {type(value).__name__}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")
    if run.cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected False on a device other than CUDA, got True on {str(device)!r}")
    if run.cuda_graph and callback is not None:
        raise ValueError("cuda_graph: expected False with a callback, which the host must wait for, got True")
    if x_T is not None:
        _check_x_T(x_T, model.shape)
        if start is not None:
            raise ValueError("x_T: expected None with start, which says where to begin, got a tensor")
    n, seeds, labels = _rows(n, seeds, labels, x_T, model)
    _check_guided(guidance, labels, model, n)
    conditions = _conditions(labels, guidance, model, n, options)
    clip = (True if model.clip is None else model.clip) if clip is None else clip
    limit = limit_of(clip)
    program = _program(model, sampler, steps, constraint, start, noise, guidance, options)
    if limit is None and not guidance.by_gradient:  # whose term is x0_hat's
        program = program.fold()
    batch_size = min(n, 16) if run.batch_size is None else run.batch_size
    _check_weights(network, dtype)
    runs, dtype = _fast(network, dtype, run)
    loop = Loop(
        runs,
        program,
        (batch_size, *model.shape),
        device,
        limit=limit,
        quantile=clip if isinstance(clip, Quantile) else None,
        guidance=guidance,
        conditions=_batch(conditions, torch.zeros(batch_size, dtype=torch.int64, device="cpu"), device),
        inpaint=constraint is not None,
        dtype=dtype,
    )
    beginning = _Beginning(model, program.grid, x_T, start, constraint, n)

    images: Tensor | None = None
    batches = range(0, n, batch_size)
    bar = progress_bar(len(batches) * len(program), "sampling", "step", run.progress)
    with bar, evaluating(network), torch.no_grad():
        for first in batches:
            rows = torch.arange(first, first + batch_size, dtype=torch.int64, device="cpu").clamp_(max=n - 1)
            kept = slice(first, min(first + batch_size, n))  # the last image pads the last batch
            seed = seeds[rows].to(device)
            x, known, mask = beginning.batch(rows, seed)
            weights = None if guidance.per_row else guidance.weight[rows].float().to(device)
            loop.begin(x, seed, _batch(conditions, rows, device), weights=weights, known=known, mask=mask)
            if run.cuda_graph:
                loop.replay(bar.update)
            else:
                loop.run(bar.update, callback and _reporter(callback, kept, process))
            drawn = loop.x[: kept.stop - kept.start]
            decoded = drawn if model.codec is None else model.codec.to_images(drawn)
            if images is None:
                images = torch.empty((n, *decoded.shape[1:]), dtype=torch.float32, device=device)
            images[kept] = decoded
    return images


def encode(
    model: str | os.PathLike | Model | Network, x: Tensor, *, steps: int | Sequence[float] | None = None, **options: Any
) -> Tensor:
    """Find the noise from which a deterministic sampler draws ``x``: x_T [N, ...], by DDIM's inversion (Song et al.
    2021a, section 5.4).

    x        [N, ...], images in [-1, 1]
    steps    how many, or the time steps, decreasing
    options  as :func:`sample` takes them: labels, spacing, run

    ``sample(model, x_T=encode(model, x, steps=50), sampler="ddim", steps=50, clip=False)`` gives x back but for the
    error of the steps. Raises TypeError or ValueError for an argument that does not fit.
    """
    described = model if isinstance(model, Model) else None
    _check_x_T(x, tuple(x.shape[1:]) if described is None else described.shape, "x")
    return sample(model, x_T=x, sampler="ddim_inversion", steps=steps, clip=False, seeds=range(len(x)), **options)


def interpolate(
    model: str | os.PathLike | Model | Network,
    a: Tensor,
    b: Tensor,
    n: int = 9,
    *,
    fraction: float | None = None,
    seed: int = 0,
    steps: int | None = None,
    **options: Any,
) -> Tensor:
    """Draw n images that lead from ``a`` to ``b``: [n, ...].

    a, b      [...], two images in [-1, 1]
    fraction  mix x_t at that part of the process' time (Ho et al. 2020, section 5.4), with one ``seed``'s noise; None:
              turn from one image's x_T to the other's (Song et al. 2021a, section 5.3), which :func:`encode` finds
    options   as :func:`sample` takes them
    """
    weights = torch.linspace(0, 1, checked_int("n", n, "an int >= 2"), dtype=torch.float64, device="cpu")
    if fraction is None:
        steps = 50 if steps is None else steps
        x_T = encode(model, torch.stack((a, b)), steps=steps, **options)
        return sample(model, x_T=_turn(x_T[0], x_T[1], weights), sampler="ddim", steps=steps, clip=False, **options)
    mixed = torch.stack([torch.lerp(a, b, float(weight)) for weight in weights])  # the noise is the same: so is x_t's
    return sample(model, seeds=[seed] * n, start=From(mixed, fraction), steps=steps, **options)


def _turn(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation [len(weights), ...] (Shoemake 1985)."""
    cosine = (a.double() * b.double()).sum() / (a.double().norm() * b.double().norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.stack([torch.lerp(a, b, float(weight)) for weight in weights])
    parts = [(((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin() for w in weights.to(a.device)]
    return torch.stack(parts).to(a.dtype)


# --- the program of a run ---


def _program(
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
    if sampler is None:
        sampler = default_sampler(None if steps is None or T is None else len(steps), T, options.get("eta"))
    sampler = _sampler(sampler)
    if steps is None and sampler.steps is not None:
        steps = sampler.steps if T is None else min(sampler.steps, T)
    if constraint is not None and constraint.resample > 1:
        if sampler.name != "ddpm":
            raise ValueError(f"resample: expected 1 with sampler {sampler.name!r}, got {constraint.resample}")
        sampler = SAMPLERS["repaint"]
        options |= dict(jump=constraint.jump, resample=constraint.resample)
    _settle(options, sampler, model)
    if steps is None and T is None:
        steps = 1000
    grid = process.grid(steps, spacing, path=noise == "path")
    if sampler.name == "ddim_inversion":
        grid = grid.reversed()
    if start is not None:
        grid = grid.tail(start.fraction)
    return sampler.trace(grid, model.prediction, plus_plus=guidance.plus_plus, **options)


def _sampler(sampler: Any) -> Sampler:
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, str) and sampler in SAMPLERS:
        return SAMPLERS[sampler]
    if callable(sampler):
        return Sampler(sampler)
    raise ValueError(f"sampler: expected one of {tuple(SAMPLERS)} or a function, got {sampler!r}")


def _settle(options: dict[str, Any], sampler: Sampler, model: Model) -> None:
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
        options["variance"] = model.variance or ("learned" if model.learned_variance else "fixed_small")
    for name, value in options.items():
        if name not in sampler.options:
            known = [*sampler.options, *(condition.name for condition in model.conditions)]
            others = ["spacing", "x_T", "schedule", "prediction", "shape", *(field.name for field in fields(Run))]
            raise TypeError(
                f"{name}: expected an option of sampler {sampler.name!r}, a condition of the model "
                f"({', '.join(known) or 'neither has any'}), or one of {', '.join(others)}, got {value!r}"
            )


@dataclass(frozen=True)
class _Beginning:
    """Where batches begin, and what they are held to."""

    model: Model
    grid: Grid
    x_T: Tensor | None
    start: From | None
    constraint: Inpaint | None
    n: int

    def batch(self, rows: Tensor, seeds: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(x, known, mask) for those rows of the result."""
        device, first = seeds.device, self.grid.points[0]
        if self.x_T is not None:
            x = self.x_T[rows.to(self.x_T.device)].to(device, torch.float32, memory_format=torch.contiguous_format)
        elif self.start is not None:
            z = ops.noise(seeds, self.model.shape, step=first.address, stream=2, device=device)
            x = first.alpha * self._given("start", self.start.x, rows, device) + first.sigma * z
        else:
            x = ops.noise(seeds, self.model.shape, step=0, stream=0, device=device)
            std = self.model.schedule.prior_std
            x = x if std == 1 else x * std
        if self.constraint is None:
            return x, None, None
        known = self._given("constraint", self.constraint.x, rows, device)
        mask = rows_of("mask", self.constraint.mask, self.n, self.model.shape)[rows.to(self.constraint.mask.device)]
        mask = mask.to(device)
        z = ops.noise(seeds, self.model.shape, step=FIRST_BLEND, stream=6, device=device)
        return mask * x + (1 - mask) * (first.alpha * known + first.sigma * z), known, mask

    def _given(self, name: str, x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
        if self.model.codec is not None:
            x = self.model.codec.to_model(x)
        return rows_of(name, x, self.n, self.model.shape)[rows.to(x.device)].to(device)


def _reporter(callback: Callable[[Step], Any], images: slice, process: Process) -> Callable[..., Tensor | None]:
    n = images.stop - images.start  # without the padding

    def report(index: int, row: Row, x_t: Tensor, x0_hat: Tensor, x_next: Tensor) -> Tensor | None:
        told = row.point.c_noise
        t = int(told) if process.discrete and told == int(told) else told
        changed = callback(Step(images, index, t, x_t[:n], x0_hat[:n], x_next[:n].clone()))
        if changed is None:
            return None
        if not isinstance(changed, Tensor) or changed.shape != x_next[:n].shape:
            got = tuple(changed.shape) if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(f"callback: expected None or a tensor of shape {tuple(x_next[:n].shape)}, got {got}")
        return torch.cat((changed.to(x_next), x_next[n:]))

    return report


# --- arguments ---


def _run(run: Run | None, options: dict[str, Any]) -> Run:
    """``run``, with those of its fields that came as options of their own."""
    if run is not None and not isinstance(run, Run):
        raise TypeError(f"run: expected a Run, got {type(run).__name__}")
    named = {field.name: options.pop(field.name) for field in fields(Run) if field.name in options}
    return replace(run or Run(), **named)


def _guidance(guidance: Any) -> Guidance:
    if isinstance(guidance, Guidance):
        return guidance
    return Guidance(checked_float("guidance", guidance, "a finite number", math.isfinite))


def _check_guided(guidance: Guidance, labels: Tensor | None, model: Model, n: int) -> None:
    """Raises ValueError where what guides is missing."""
    w = guidance.weight
    if not guidance.per_row and len(w) != n:
        raise ValueError(f"guidance: expected {n} weights, one for each image, got {len(w)}")
    compares = guidance.plus_plus or not guidance.per_row or w != 1
    by_labels = compares and not guidance.by_gradient and guidance.network is None and not model.conditions
    if labels is None and by_labels:
        raise ValueError(f"guidance: expected 1 without labels, got {w}")
    if not model.null_class and by_labels and guidance.negative is None:
        raise ValueError(f"guidance: expected 1 with a network without a null class, got {w}")
    if not model.null_class and labels is None:
        raise ValueError("labels: expected a class for each image with a network without a null class, got None")
    if labels is None and guidance.classifier is not None:
        raise ValueError("labels: expected a class for each image with guidance by a classifier, got None")


def _conditions(
    labels: Tensor | None, guidance: Guidance, model: Model, n: int, options: dict[str, Any]
) -> dict[str, tuple[Tensor, Tensor]]:
    """By name: the condition of each sample, and what the call without it gets."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    if labels is not None:
        null = torch.full_like(labels, -1)
        if guidance.negative is not None:
            null = _labels(guidance.negative, model).expand(n).clone()
        found["labels"] = labels, null
    for condition in model.conditions:
        given = condition.batch(options.pop(condition.name, None), n)
        found[condition.name] = given, given if condition.null is None else condition.batch(None, n)
    return found


def _batch(
    conditions: dict[str, tuple[Tensor, Tensor]], rows: Tensor, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    def pick(value: Tensor) -> Tensor:
        return value[rows.to(value.device)].to(device)

    return {name: (pick(given), pick(null)) for name, (given, null) in conditions.items()}


def _resolve(model: Any, run: Run, options: dict[str, Any]) -> tuple[Model, Network, torch.device, torch.dtype | None]:
    """(model, its network without an engine around it, where to run, the dtype of autocast or of the engine)."""
    device = run.device
    if device is not None:
        device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
    described = {name: options.pop(name, None) for name in ("schedule", "prediction", "shape")}
    if isinstance(model, str | os.PathLike):
        model = load(model, device)
    if isinstance(model, Model):
        for name, value in described.items():
            if value is not None:
                raise ValueError(f"{name}: expected None, the model brings its own, got {value!r}")
    elif not isinstance(model, nn.Module) and hasattr(model, "unet") and hasattr(model, "scheduler"):
        pipeline = type(model).__name__
        raise TypeError(f"model: expected a Model, as Model.from_diffusers(pipeline) makes of one, got a {pipeline}")
    elif callable(model):
        for name, value in described.items():
            if value is None:
                bare = f"a bare {type(model).__name__}, which has none"
                raise ValueError(f"{name}: expected a value with {bare}, got None")
        if not isinstance(described["schedule"], Process):
            got = type(described["schedule"]).__name__
            raise TypeError(f"schedule: expected a Schedule, got {got}")
        if described["prediction"] not in PREDICTIONS:
            expected = tuple(PREDICTIONS)
            raise ValueError(f"prediction: expected one of {expected}, got {described['prediction']!r}")
        model = Model(model, described["schedule"], described["prediction"], _shape(described["shape"]))
    else:
        raise TypeError(f"model: expected a name, a path, a Model or a callable, got {type(model).__name__}")
    dtype = run.dtype
    if dtype is None and isinstance(model.network, Engine) and model.network.dtype == torch.bfloat16:
        dtype = torch.bfloat16
    network = unwrapped(model.network)
    _check_signature(network, [condition.name for condition in model.conditions])
    return model, network, _where(network, device), dtype


def _check_signature(network: Network, conditions: Sequence[str]) -> None:
    """TypeError unless it can be called as ``network(x_t, t, labels, **conditions)``, as far as Python can tell."""
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


def _check_weights(network: Network, dtype: torch.dtype | None) -> None:
    """ValueError for a ``UNet`` that does not take the loop's float32."""
    if isinstance(network, UNet) and dtype is None and network.conv_in.weight.dtype != torch.float32:
        weights = network.conv_in.weight.dtype
        raise ValueError(f"model: expected a UNet of float32, or dtype={weights} for autocast, got one of {weights}")


def _fast(network: Network, dtype: torch.dtype | None, run: Run) -> tuple[Network, torch.dtype | None]:
    """What runs the network, an engine if ``run`` has it so, and the dtype of autocast around it."""
    if not (run.engine and isinstance(network, UNet)):
        return network, dtype
    return (Engine(network, dtype), None) if dtype == torch.bfloat16 else (Engine(network), dtype)


def _check_rest(options: dict[str, Any], model: Model) -> None:
    """TypeError for an option that is neither a condition of the model nor a field of a run."""
    for name, value in options.items():
        names = (condition.name for condition in model.conditions)
        known = [*names, "schedule", "prediction", "shape", *(field.name for field in fields(Run))]
        raise TypeError(f"{name}: expected one of the options {', '.join(known)}, got {value!r}")


def _where(network: Network, device: torch.device | None) -> torch.device:
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if parameter is None:
        return device or torch.device("cpu")
    if device not in (None, parameter.device):
        raise ValueError(f"device: expected {str(parameter.device)!r}, where the network is, got {str(device)!r}")
    return parameter.device


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    expected = "positive sizes, as (C, H, W)"
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape: expected {expected}, got {shape!r}")
    shape = tuple(checked_int("shape", size, expected) for size in shape)
    if not shape or min(shape) < 1:
        raise ValueError(f"shape: expected {expected}, got {shape}")
    return shape


def _check_x_T(x_T: Any, shape: tuple[int, ...], name: str = "x_T") -> None:
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        got = x_T.dtype if isinstance(x_T, Tensor) else type(x_T).__name__
        raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if x_T.shape[1:] != shape or x_T.ndim != len(shape) + 1:
        raise ValueError(f"{name}: expected shape (n, {', '.join(map(str, shape))}), got {tuple(x_T.shape)}")


def _rows(n: Any, seeds: Any, labels: Any, x_T: Tensor | None, model: Model) -> tuple[int, Tensor, Tensor | None]:
    """(n, seeds [n], labels [n] or None), n being that of whichever argument tells it."""
    if seeds is not None:
        seeds = ops.as_seeds(seeds, "cpu")
    if labels is not None:
        labels = _labels(labels, model)
    lengths = {name: len(rows) for name, rows in dict(seeds=seeds, x_T=x_T).items() if rows is not None}
    if labels is not None and labels.ndim:
        lengths["labels"] = len(labels)
    if n is None:
        if not lengths:
            raise ValueError("n: expected n or seeds, got neither")
        n = next(iter(lengths.values()))
    n = checked_int("n", n, "an int >= 1")
    if n < 1:
        raise ValueError(f"n: expected an int >= 1, got {n}")
    for name, length in lengths.items():
        if length != n:
            raise ValueError(f"{name}: expected {n}, one for each image, got {length}")
    seeds = torch.arange(n, dtype=torch.int64, device="cpu") if seeds is None else seeds
    return n, seeds, labels if labels is None else labels.expand(n)


def _labels(labels: Any, model: Model) -> Tensor:
    """int64: [] of one label, [n] of several."""
    low, high, expected = -1, 2**63, "ints >= -1"
    if model.num_classes is not None:
        low, high = -1 if model.null_class else 0, model.num_classes
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
