"""The call: arguments, batches, and the sum of the terms."""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..arguments import (
    accelerated,
    check_guided,
    check_rest,
    check_weights,
    check_x_T,
    conditions_of,
    resolve,
    run_of,
    samples_of,
)
from ..guidance import Guidance
from ..model import Model
from ..networks.modes import evaluating
from ..progress import bar as progress_bar
from ..runtime import Run
from ..runtime.loop import Network, call
from ..samplers.options import one_of
from .bound import Bound
from .draws import check_levels
from .ode import Ode


@dataclass(frozen=True, eq=False)
class Nll:
    """The negative log-likelihoods of N samples.

    bits   float64 [N], bits a dimension
    terms  their means over the samples; ``bits.mean()`` is prior + t.sum() + data

           prior  float: L_T (bound); -log2 of the density of x_T (ode)
           t      float64 [T]: L_t of each time step, 0 at index 0 (bound); float64 [1]: the change of volume (ode)
           data   float: L_0 (bound); log2(levels / 2), for the width of a level (ode)
    calls  of the network for a sample; of the batch that took the most (ode)
    """

    bits: Tensor
    terms: dict[str, Any]
    calls: int


def nll(
    model: str | os.PathLike | Model | Network,
    x: Tensor,
    method: str = "bound",
    *,
    labels: Any = None,
    seeds: Any = None,
    levels: int | None = 256,
    steps: int | None = None,
    variance: Any = None,
    clip: Any = None,
    tol: float = 1e-5,
    probes: int | None = 1,
    run: Run | None = None,
    **options: Any,
) -> Nll:
    """Compute the negative log-likelihood of samples under a model, in bits a dimension: an :class:`Nll` on the CPU.

    model     as :func:`diffkern.sample` takes it; a bare function needs ``schedule`` and ``prediction``
    x         [N, ...], floating point; in [-1, 1] with ``levels``
    method    "bound", for a ``Schedule``; or "ode", the probability-flow ODE of any process from t_min to t_max
    labels    a class for each sample, or one for all, as :func:`diffkern.sample` takes them
    seeds     one for each sample; None: 0..N-1. All random numbers of a sample are a function of its seed
    levels    how many values a dimension of x can have, equally spaced in [-1, 1]. The bits tell which one it is: by a
              bin of the normal p(x_0 | x_1), of 256 (bound; Ho et al. 2020, eq. 13), or after adding uniform noise
              within the level (ode). None: x is continuous, and the bits are those of its density
    steps     (bound) how many of the T - 1 divergences to compute: one t is drawn from each of as many equal parts, for
              an estimate without bias. None: all
    variance  (bound) of the model's steps: a name as ``ddpm`` takes it, or a tensor [T] by time step; None: the model's
              own. "full" needs ``levels=None``. The small variance of the last step would be 0; it is that of the step
              before
    clip      (bound) clamp each prediction of x_0 to [-1, 1], as :func:`diffkern.sample` does; None: with ``levels``
    tol       (ode) relative and absolute error of a step of Runge-Kutta 4(5), by scipy
    probes    (ode) how many random sign vectors v estimate the divergence, by v^T J v (Hutchinson 1990; Grathwohl
              2019). None: every axis in turn, which is exact and costs a product for each dimension
    run       a :class:`Run`. A batch shares the steps of its ODE: bits depend on the batch to about ``tol``, and on
              nothing else with ``batch_size=1``
    options   conditions of the model by name; ``schedule``, ``prediction``, ``shape`` of a bare function; the fields of
              ``run``

    A model with a codec is measured on its latents, with ``levels=None``: the dimensions are theirs.
    Raises TypeError or ValueError for an argument that does not fit, ImportError without scipy (ode).
    """
    one_of("method", method, ("bound", "ode"))
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a floating-point tensor, got {type(x).__name__}")
    if not isinstance(model, str | os.PathLike | Model):
        options.setdefault("shape", tuple(x.shape[1:]))
    run = run_of(run, options)
    if run.cuda_graph:
        raise ValueError("cuda_graph: expected False, got True")
    model, network, device, dtype = resolve(model, run, options)
    x = _checked(x, levels, model)
    n, seeds, labels = samples_of(len(x), seeds, labels, None, model)
    check_guided(Guidance(), labels, model, n)
    conditions = {name: given for name, (given, _) in conditions_of(labels, Guidance(), model, n, options).items()}
    check_rest(options, model)
    check_weights(network, dtype)
    runs = network
    if method == "bound":
        way = Bound.of(model, levels, steps, variance, clip)
        runs, dtype = accelerated(network, dtype, run)
    else:
        way = Ode.of(model, levels, tol, probes, steps=steps, variance=variance, clip=clip)

    batch_size = min(n, 16) if run.batch_size is None else run.batch_size
    batches = range(0, n, batch_size)
    bits, sums, calls = [], [0.0, 0.0, 0.0], 0
    bar = progress_bar(len(batches) * way.ticks, "likelihood", way.unit, run.progress)
    with bar, evaluating(network), torch.no_grad():
        for first in batches:
            rows = torch.arange(first, first + batch_size, dtype=torch.int64, device="cpu").clamp_(max=n - 1)
            kept = min(batch_size, n - first)  # the last sample pads the last batch
            given = {name: value[rows.to(value.device)].to(device) for name, value in conditions.items()}
            predict = partial(call, runs, conditions=given, channels=way.channels, dtype=dtype)
            *terms, taken = way.terms(predict, x[rows.to(x.device)].to(device), seeds[rows].to(device), bar.update)
            prior, t, data = (term[:kept].cpu() for term in terms)
            bits.append(prior + t.sum(1) + data)
            sums = [total + term.sum(0) for total, term in zip(sums, (prior, t, data), strict=True)]
            calls = max(calls, taken)
    prior, t, data = (total / n for total in sums)
    return Nll(torch.cat(bits), {"prior": prior.item(), "t": t, "data": data.item()}, calls)


def _checked(x: Tensor, levels: Any, model: Model) -> Tensor:
    """x as the model diffuses it, float32."""
    if model.codec is not None:
        if levels is not None:
            raise ValueError(f"levels: expected None with a model of latents, got {levels}")
        x = model.to_latents(x)
    check_x_T(x, model.shape, "x")
    check_levels(x, levels)
    return x.detach().float()
