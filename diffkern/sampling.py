"""Sampling: noise in, images out. Arguments become a program of rows; the loop runs it, batch by batch."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import ops
from .arguments import (
    accelerated,
    batch_of,
    check_guided,
    check_weights,
    check_x_T,
    conditions_of,
    guidance_of,
    loaded,
    program_of,
    resolve,
    run_of,
    samples_of,
)
from .constraints import From, Inpaint, Quantile, limit_of, rows_of
from .guidance import Guidance
from .model import Model
from .networks.modes import evaluating
from .process import Grid, Process, checked_count, checked_int
from .program import Row
from .progress import bar as progress_bar
from .runtime import Loop, Run
from .runtime.loop import Network as Network
from .samplers import Sampler
from .system import System

FIRST_BLEND = (1 << 20) - 1  # the address of the known part's noise at the start of a run
MASK_STREAM = 6  # of the known part's noise, as ``ops.reverse_step`` draws it


@dataclass(frozen=True)
class Step:
    """The argument of a callback: a batch before it leaves step ``t``, and the image that the network sees in it.

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
    guidance: float | Guidance | None = None,
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
    guidance    w of out_null + w (out_label - out_null) (Ho & Salimans 2022): None or 1 is the conditional model, 0 the
                unconditional one, each one pass through the network; any other w takes two, and needs labels. Or a
                :class:`Guidance`
    clip        clamp each prediction of x_0: True to [-1, 1], to a range (-a, a), or by a :class:`Quantile`; None is
                the model's own way, or True, or False for latents
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
    run = run_of(run, options)
    model = loaded(model, run)
    if isinstance(model, System):
        given = dict(seeds=seeds, labels=labels, sampler=sampler, steps=steps, guidance=guidance, clip=clip)
        given |= dict(start=start, constraint=constraint, noise=noise, callback=callback, run=run)
        return model.sample(n, **given, **options)
    model, network, device, dtype = resolve(model, run, options)
    process, x_T = model.schedule, options.pop("x_T", None)
    guidance = guidance_of(guidance, model, device)
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
        check_x_T(x_T, model.shape)
        if start is not None:
            raise ValueError("x_T: expected None with start, which says where to begin, got a tensor")
    n, seeds, labels = samples_of(n, seeds, labels, x_T, model)
    check_guided(guidance, labels, model, n)
    conditions = conditions_of(labels, guidance, model, n, options)
    if clip is None:
        clip = model.codec is None if model.clip is None else model.clip
    limit = limit_of(clip)
    program = program_of(model, sampler, steps, constraint, start, noise, guidance, options)
    if limit is None and not guidance.by_gradient:  # whose term is x0_hat's
        program = program.fold()
    batch_size = min(n, 16) if run.batch_size is None else run.batch_size
    check_weights(network, dtype)
    runs, dtype = accelerated(network, dtype, run)
    loop = Loop(
        runs,
        program,
        (batch_size, *model.shape),
        device,
        limit=limit,
        quantile=clip if isinstance(clip, Quantile) else None,
        guidance=guidance,
        conditions=batch_of(conditions, torch.zeros(batch_size, dtype=torch.int64, device="cpu"), device),
        inpaint=constraint is not None,
        dtype=dtype,
    )
    if model.codec is not None:
        start, constraint = (given and replace(given, x=model.to_latents(given.x)) for given in (start, constraint))
    beginning = _Beginning(model, program.grid, x_T, start, constraint, n)

    images: Tensor | None = None
    batches = range(0, n, batch_size)
    bar = progress_bar(len(batches) * len(program), "sampling", "step", run.progress)
    others = [m for m in (guidance.network, guidance.classifier) if isinstance(m, torch.nn.Module)]
    with contextlib.ExitStack() as entered:
        for manager in (bar, *map(evaluating, [network, *others]), torch.no_grad()):
            entered.enter_context(manager)
        for first in batches:
            rows = torch.arange(first, first + batch_size, dtype=torch.int64, device="cpu").clamp_(max=n - 1)
            kept = slice(first, min(first + batch_size, n))  # the last image pads the last batch
            seed = seeds[rows].to(device)
            x, known, mask = beginning.batch(rows, seed)
            weights = None if guidance.one_weight else guidance.weight[rows].float().to(device)
            loop.begin(x, seed, batch_of(conditions, rows, device), weights=weights, known=known, mask=mask)
            if run.cuda_graph:
                loop.replay(bar.update)
            else:
                loop.run(bar.update, callback and _reporter(callback, kept, process))
            drawn = loop.x[: kept.stop - kept.start]
            decoded = model.to_images(drawn)
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
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a floating-point tensor, got {type(x).__name__}")
    _refuse(options, "sampler", "x_T", "seeds", "n", "start", "clip", "noise", "constraint")
    model, x = _latent(model, x)
    check_x_T(x, model.shape if isinstance(model, Model) else tuple(x.shape[1:]), "x")
    given = dict(x_T=x, sampler="ddim_inversion", steps=steps, clip=False, seeds=range(len(x)))
    return sample(model, **given, **options)


def _refuse(options: dict[str, Any], *names: str) -> None:
    for name in names:
        if name in options:
            raise TypeError(f"{name}: expected none here, got {options[name]!r}")


def _latent(model: Any, x: Tensor) -> tuple[Any, Tensor]:
    """(the model without its codec, what it diffuses of the images x)."""
    if not isinstance(model, Model) or model.codec is None:
        return model, x
    clip = False if model.clip is None else model.clip  # latents have no range
    return replace(model, codec=None, clip=clip), model.to_latents(x)


def interpolate(
    model: str | os.PathLike | Model | Network,
    a: Tensor | int | str,
    b: Tensor | int | str,
    n: int = 9,
    *,
    fraction: float | None = None,
    seed: int = 0,
    steps: int | None = None,
    **options: Any,
) -> Tensor:
    """Draw n images that lead from ``a`` to ``b``: [n, ...].

    a, b      [...], two images in [-1, 1]; or the seeds of two that the model draws; of unCLIP also texts
    fraction  mix x_t with that part of the steps left to do (Ho et al. 2020, section 4.4), with one ``seed``'s noise;
              None: turn from one image's x_T to the other's, which :func:`encode` finds (Song et al. 2021a, sec. 5.3)
    options   as :func:`sample` takes them; a label is that of all images. Without ``fraction`` the sampler is ddim
    """
    checked_count("n", n, 2)
    run = run_of(options.pop("run", None), options)
    model = loaded(model, run)
    if isinstance(model, System):
        if fraction is not None:
            raise ValueError(f"fraction: expected None with a system of models, got {fraction}")
        return model.interpolate(a, b, n, seed=seed, steps=steps, run=run, **options)
    _refuse(options, "x_T", "seeds", "start", "clip", "noise", "constraint", *(["sampler"] if fraction is None else []))
    model, _, device, _ = resolve(model, run, options)
    for name, end in (("a", a), ("b", b)):
        if not isinstance(end, Tensor):
            checked_int(name, end, "an image or a seed")
        elif model.codec is None:
            check_x_T(end[None], model.shape, name)
    weights = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")
    if fraction is None:
        given = dict(steps=50 if steps is None else steps, run=run, **options)
        ends = (_noise_of(model, end, given, device) for end in (a, b))
        inverted = isinstance(a, Tensor) or isinstance(b, Tensor)  # by steps without a clamp
        clip = {"clip": False} if inverted else {}
        return sample(model, **dict(x_T=turn(*ends, weights), sampler="ddim") | clip | given)
    given = dict(steps=steps, run=run, **options)
    ends = [end if isinstance(end, Tensor) else sample(model, seeds=[end], **given)[0] for end in (a, b)]
    inner, ends = _latent(model, torch.stack([end.to(device) for end in ends]))
    mixed = torch.stack([torch.lerp(*ends, float(weight)) for weight in weights])
    x = sample(inner, **dict(seeds=[seed] * n, start=From(mixed, fraction)) | given)
    return x if inner is model else torch.cat([model.to_images(batch) for batch in x.split(16)])


def _noise_of(model: Model, end: Tensor | int, options: dict[str, Any], device: torch.device) -> Tensor:
    """x_T of an image, or of a seed."""
    if isinstance(end, Tensor):
        return encode(model, end[None], **options)[0]
    return ops.noise([end], model.shape, step=0, stream=0, device=device)[0] * model.schedule.prior_std


def turn(a: Tensor, b: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation [len(weights), ...] (Shoemake 1985)."""
    cosine = (a.double() * b.double()).sum() / (a.double().norm() * b.double().norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-6:
        return torch.stack([torch.lerp(a, b, float(weight)) for weight in weights])
    parts = [(((1 - w) * angle).sin() * a + (w * angle).sin() * b) / angle.sin() for w in weights.to(a.device)]
    return torch.stack(parts).to(a.dtype)


@dataclass(frozen=True)
class _Beginning:
    """The start of each batch, and the constraint on it."""

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
            std = self.model.schedule.start_std(first)
            x = x if std == 1 else x * std
        if self.constraint is None:
            return x, None, None
        known = self._given("constraint", self.constraint.x, rows, device)
        mask = rows_of("mask", self.constraint.mask, self.n, self.model.shape)[rows.to(self.constraint.mask.device)]
        mask = mask.to(device)
        z = ops.noise(seeds, self.model.shape, step=FIRST_BLEND, stream=MASK_STREAM, device=device)
        return mask * x + (1 - mask) * (first.alpha * known + first.sigma * z), known, mask

    def _given(self, name: str, x: Tensor, rows: Tensor, device: torch.device) -> Tensor:
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
