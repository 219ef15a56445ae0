"""Sampling: noise in, images out. One loop, over the rows of a table of coefficients."""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from .engine import Engine
from .model import Model, checked_device, load, unwrapped
from .networks import UNet
from .networks.modes import evaluating
from .progress import bar as progress_bar
from .samplers import PREDICTIONS, SAMPLERS, ddim, ddpm, default_sampler, dpmpp_2m, fold_x0
from .schedule import Schedule, checked_float, checked_int

DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpmpp_2m": 20}  # None: all of them

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""network(x_t [N, C, H, W] float32, t [N] int64, labels [N] int64 or None) -> [N, C or 2C, H, W], or what
holds that as its ``sample``, as diffusers' networks give it"""


@dataclass(frozen=True)
class Step:
    """What a callback sees: a batch before it leaves step ``t``, and the image that the network sees in it.

    images  the rows of the result that this batch becomes
    index   how many steps came before, 0-based
    t       the time step, 0..T-1
    x_t     [batch, C, H, W], float32; a copy, as is x0_hat
    x0_hat  [batch, C, H, W], float32; clamped where ``sample`` clips
    """

    images: slice
    index: int
    t: int
    x_t: Tensor
    x0_hat: Tensor


def sample(
    model: str | os.PathLike | Model | Network,
    n: int | None = None,
    *,
    seeds: int | Sequence[int] | Tensor | None = None,
    labels: int | str | Sequence[int | str] | Tensor | None = None,
    guidance: float = 1.0,
    sampler: str | None = None,
    steps: int | Sequence[int] | None = None,
    spacing: str = "trailing",
    variance: str | Tensor | None = None,
    eta: float = 0.0,
    clip: bool = True,
    x_T: Tensor | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    engine: bool = True,
    cuda_graph: bool = False,
    progress: bool = True,
    schedule: Schedule | None = None,
    prediction: str | None = None,
    shape: Sequence[int] | None = None,
    callback: Callable[[Step], Any] | None = None,
) -> Tensor:
    """Draw images from a diffusion model: [N, C, H, W], float32, in [-1, 1] with ``clip``.

    model       a shipped model's name, a file, a ``Model``; or any ``model(x_t, t, labels)``, with t int64 [N] in
                0..T-1, which needs ``schedule``, ``prediction`` ("eps", "x0", "v" or "score") and ``shape`` (C, H, W)
    n, seeds    how many images, which have the seeds 0..n-1; or the seed of each. All noise of an image is a function
                of its seed: the image depends on its seed, ``batch_size`` and the device, and on no other image. So
                ``n`` gives the same images at every call; others come by ``seeds=torch.randint(2**63 - 1, (n,))``
    labels      a class for each image, or one for all, by number, or by a name that the ``Model`` knows; -1 is the null
                class, and None is null throughout. A network without a null class needs them
    guidance    w of out_null + w (out_label - out_null) (Ho & Salimans 2022): 1 is the conditional model, 0 the
                unconditional one, each one pass through the network; any other w takes two, and needs labels
    sampler     "ddpm", "ddim" (``eta`` in [0, 1]) or "dpmpp_2m": see :mod:`diffkern.samplers`; None is ddpm for all
                steps and ddim for fewer
    steps       how many, spread by ``spacing`` ("trailing", "leading", "linspace", "quadratic"), or the very steps,
                decreasing; None is all of them for ddpm, 50 for ddim and 20 for dpmpp_2m
    variance    of ddpm: "fixed_small", "fixed_large", "learned", or a tensor [steps] of variances; None is "learned"
                for a ``UNet`` that learned it, else "fixed_small"
    clip        clamp each prediction of x_0 to [-1, 1]
    x_T         where to start, [N, C, H, W]; None draws it from the seeds
    batch_size  rows of every network call, at most 16 unless given; the last batch is padded to it
    device      where to run; None is where the network is, and the CPU for a name, a file or a bare function
    dtype       torch.bfloat16 or float16 runs the network under autocast; the engine has bfloat16 kernels of its own.
                None is float32, or what the network was optimized for. x_t and the update stay float32
    engine      run a U-Net on a CPU by :func:`diffkern.optimize`, which is faster and rounds otherwise
    cuda_graph  on a CUDA device, record one step, network and update, and replay it for all: no step waits for the
                host. The network must be one that a CUDA graph can hold; there is no ``callback``
    progress    show a progress bar on stderr, or now and then a line where that is no terminal
    callback    called with a :class:`Step` in every step

    Network and callback run without gradients (``torch.no_grad``), which they may enable for themselves. The network is
    in eval mode for every thread until the last call that samples it ends, however it ends; then all its modules have
    the training flags that they had before the first. To train meanwhile, sample a copy.
    Raises TypeError or ValueError for an argument that does not fit.
    """
    source = _resolve(model, device, schedule, prediction, shape)
    device = source.device
    guidance = checked_float("guidance", guidance, "a finite number", math.isfinite)
    _check_options(clip, dtype, engine, cuda_graph, progress, callback)
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"cuda_graph: expected False on a device other than CUDA, got True on {str(device)!r}")
    if cuda_graph and callback is not None:
        raise ValueError("cuda_graph: expected False with a callback, which the host must wait for, got True")
    if x_T is not None:
        _check_x_T(x_T, source.shape)
    n, seeds, labels = _rows(n, seeds, labels, x_T, source)
    if labels is None and guidance != 1:
        raise ValueError(f"guidance: expected 1 without labels, got {guidance}")
    if not source.null_class and guidance != 1:
        raise ValueError(f"guidance: expected 1 with a network without a null class, got {guidance}")
    if not source.null_class and labels is None:
        raise ValueError("labels: expected a class for each image with a network without a null class, got None")
    batch_size = min(n, 16) if batch_size is None else checked_int("batch_size", batch_size, "an int >= 1")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected an int >= 1, got {batch_size}")
    if steps is None and DEFAULT_STEPS.get(sampler):
        steps = min(DEFAULT_STEPS[sampler], source.schedule.T)
    timesteps = source.schedule.timesteps(steps, spacing)
    if sampler is None:
        sampler = default_sampler(len(timesteps), source.schedule.T)
    if variance is None and sampler == "ddpm":
        variance = "learned" if source.learned_variance else "fixed_small"
    table = _coefficients(sampler, source.schedule, timesteps, source.prediction, variance, eta)
    table = (table if clip else fold_x0(table)).float().to(device)
    network, dtype = source.network, dtype or source.dtype
    _check_weights(network, dtype)
    if engine and isinstance(network, UNet):
        bf16 = dtype == torch.bfloat16
        network, dtype = (Engine(network, dtype), None) if bf16 else (Engine(network), dtype)
    loop = _Loop(
        network=network,
        table=table,
        shape=(batch_size, *source.shape),
        labelled=labels is not None,
        guidance=guidance,
        clip=clip,
        learned_variance=isinstance(variance, str) and variance == "learned",
        dtype=dtype,
        watched=callback is not None,
    )

    images = torch.empty((n, *source.shape), dtype=torch.float32, device=device)
    batches = range(0, n, batch_size)
    bar = progress_bar(len(batches) * len(timesteps), "sampling", "step", progress)
    with bar, evaluating(source.network), torch.no_grad():
        for start in batches:
            rows = torch.arange(start, start + batch_size, dtype=torch.int64, device="cpu")
            rows.clamp_(max=n - 1)  # the last image pads the last batch
            seed = seeds[rows].to(device)
            y = None if labels is None else labels[rows].to(device)
            if x_T is None:
                x = ops.noise(seed, source.shape, step=0, stream=0, device=device)
            else:
                x = x_T[rows.to(x_T.device)].to(device, torch.float32, memory_format=torch.contiguous_format)
            kept = slice(start, min(start + batch_size, n))
            loop.begin(x, seed, y)
            if cuda_graph:
                loop.replay(bar.update)
            else:
                loop.run(timesteps, callback and partial(_report, callback, kept), bar.update)
            images[kept] = loop.x[: kept.stop - kept.start]
    return images


class _Loop:
    """Takes x [N, C, H, W] from x_T to x_0, in place, along the rows of ``table``.

    All that a step reads and writes stays where it is on the device, the number of the row too, and a step advances it:
    a CUDA graph of one step is one of each.
    """

    def __init__(
        self,
        network: Network,
        table: Tensor,
        shape: tuple[int, ...],
        labelled: bool,
        guidance: float,
        clip: bool,
        learned_variance: bool,
        dtype: torch.dtype | None,
        watched: bool = False,
    ):
        self.network, self.table, self.dtype = network, table, dtype
        self.guidance, self.clip, self.learned_variance = guidance, clip, learned_variance
        self.t = table[:, ops.COLUMNS.index("t")].long()
        self.row = torch.zeros(1, dtype=torch.int64, device=table.device)
        self.x = torch.empty(shape, dtype=torch.float32, device=table.device)
        self.has_history = table.shape[1] > len(ops.COLUMNS)  # which is the x0_hat of the step before
        self.x0_hat = torch.empty_like(self.x) if watched or self.has_history else None
        self.seeds = torch.empty(shape[0], dtype=torch.int64, device=table.device)
        self.labels = torch.empty_like(self.seeds) if labelled else None
        self.null = torch.full_like(self.seeds, -1) if labelled else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def begin(self, x_T: Tensor, seeds: Tensor, labels: Tensor | None) -> None:
        self.x.copy_(x_T)
        self.seeds.copy_(seeds)
        if labels is not None:
            self.labels.copy_(labels)
        if self.x0_hat is not None:
            self.x0_hat.zero_()
        self.row.zero_()

    def predict(self, t: Tensor, labels: Tensor | None) -> Tensor:
        """The network's output. It gets copies of what the loop changes in place: a graph of its own may hold them."""
        labels = None if labels is None else labels.clone()
        with torch.autocast(self.x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            out = self.network(self.x.clone(), t, labels)
        return _checked_output(out, self.x, self.learned_variance).detach().float()

    def step(self) -> None:
        """One row of the table; the host looks at no value."""
        t = self.t.index_select(0, self.row).repeat(len(self.x))
        both = self.guidance not in (0, 1)  # two calls of N rows, not one of 2N: each is the call that it is alone
        out = self.predict(t, self.null if self.guidance == 0 else self.labels)
        ops.reverse_step_(
            self.x,
            out,
            self.table,
            self.row,
            self.seeds,
            out_uncond=self.predict(t, self.null) if both else None,
            guidance=self.guidance if both else 1.0,
            clip=self.clip,
            learned_variance=self.learned_variance,
            history=[self.x0_hat] if self.has_history else [],
            x0_hat=self.x0_hat,
        )
        self.row.add_(1)

    def run(
        self,
        timesteps: list[int],
        callback: Callable[[int, int, Tensor, Tensor], Any] | None,
        tick: Callable[[], Any],
    ) -> None:
        for index, t in enumerate(timesteps):
            x_t = self.x.clone() if callback else None
            self.step()
            if callback:
                callback(index, t, x_t, self.x0_hat.clone())
            tick()

    def replay(self, tick: Callable[[], Any]) -> None:
        """``run`` by a CUDA graph of one step, which the first batch records. All of it happens on the device of x,
        whichever is current: a stream of another one would record nothing.
        """
        with torch.cuda.device(self.x.device):
            if self.graph is None:
                x_T, aside = self.x.clone(), torch.cuda.Stream()
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    self.step()  # libraries set themselves up at their first call, which a graph cannot hold
                torch.cuda.current_stream().wait_stream(aside)
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph):
                    self.step()
                self.begin(x_T, self.seeds, self.labels)
            for _ in range(len(self.table)):
                self.graph.replay()
                tick()


def _report(callback: Callable[[Step], Any], images: slice, index: int, t: int, x_t: Tensor, x0_hat: Tensor) -> None:
    n = images.stop - images.start  # without the padding
    callback(Step(images, index, t, x_t[:n], x0_hat[:n]))


def _coefficients(
    sampler: str, schedule: Schedule, timesteps: list[int], prediction: str, variance: str | Tensor | None, eta: float
) -> Tensor:
    """The table of the sampler named; an option that it does not have must be at its default."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: expected one of {SAMPLERS}, got {sampler!r}")
    if sampler != "ddim" and eta != 0:
        raise ValueError(f"eta: expected 0, its default, with sampler {sampler!r}, got {eta!r}")
    if sampler != "ddpm" and variance is not None:
        raise ValueError(f"variance: expected None, its default, with sampler {sampler!r}, got {variance!r}")
    if sampler == "ddpm":
        return ddpm(schedule, timesteps, prediction, variance)
    if sampler == "ddim":
        return ddim(schedule, timesteps, prediction, eta)
    return dpmpp_2m(schedule, timesteps, prediction)


# --- arguments ---


class _Source(NamedTuple):
    network: Network
    schedule: Schedule
    prediction: str
    shape: tuple[int, int, int]
    num_classes: int | None  # None where nobody knows
    null_class: bool  # True where nobody knows
    learned_variance: bool  # False where nobody knows
    label: Callable[[str], int] | None  # of a class's name or number as text; None where nobody knows
    device: torch.device
    dtype: torch.dtype | None  # bfloat16 of a network that was optimized for it


def _resolve(
    model: str | os.PathLike | Model | Network,
    device: torch.device | str | None,
    schedule: Schedule | None,
    prediction: str | None,
    shape: Sequence[int] | None,
) -> _Source:
    if device is not None:
        device = torch.empty(0, dtype=torch.uint8, device=checked_device(device)).device  # with its index
    described = dict(schedule=schedule, prediction=prediction, shape=shape)
    if isinstance(model, str | os.PathLike):
        model = load(model, device)
    if isinstance(model, Model):
        for name, value in described.items():
            if value is not None:
                raise ValueError(f"{name}: expected None, the model brings its own, got {value!r}")
        network, schedule, prediction, shape = model.network, model.schedule, model.prediction, model.shape
        num_classes, label = (None, None) if model.classes is None else (len(model.classes), model.label)
    elif not isinstance(model, nn.Module) and hasattr(model, "unet") and hasattr(model, "scheduler"):
        pipeline = type(model).__name__
        raise TypeError(f"model: expected a Model, as Model.from_diffusers(pipeline) makes of one, got a {pipeline}")
    elif callable(model):
        for name, value in described.items():
            if value is None:
                raise ValueError(
                    f"{name}: expected a value with a bare {type(model).__name__}, which has none, got None"
                )
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {type(schedule).__name__}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {PREDICTIONS}, got {prediction!r}")
        network, shape, num_classes, label = model, _shape(shape), None, None
    else:
        raise TypeError(f"model: expected a name, a path, a Model or a callable, got {type(model).__name__}")
    dtype = torch.bfloat16 if isinstance(network, Engine) and network.dtype == torch.bfloat16 else None
    network, learned_variance, null_class = unwrapped(network), False, True
    _check_signature(network)
    if isinstance(network, UNet):
        num_classes = network.config["num_classes"]
        null_class = num_classes is None or network.config["null_class"]
        learned_variance = network.conv_out.out_channels == 2 * shape[0]
    where = _where(network, device)
    return _Source(
        network, schedule, prediction, tuple(shape), num_classes, null_class, learned_variance, label, where, dtype
    )


def _check_signature(network: Network) -> None:
    """TypeError unless it can be called as ``network(x_t, t, labels)``, as far as Python can tell."""
    function = network.forward if isinstance(network, nn.Module) else network
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a built-in function, which does not tell
        return
    try:
        signature.bind(None, None, None)
    except TypeError:
        called = f"{getattr(network, '__name__', type(network).__name__)}{signature}"
        raise TypeError(f"model: expected a network that is called as network(x_t, t, labels), got {called}") from None


def _check_weights(network: Network, dtype: torch.dtype | None) -> None:
    """ValueError for a ``UNet`` that does not take the loop's float32."""
    if isinstance(network, UNet) and dtype is None and network.conv_in.weight.dtype != torch.float32:
        weights = network.conv_in.weight.dtype
        raise ValueError(f"model: expected a UNet of float32, or dtype={weights} for autocast, got one of {weights}")


def _where(network: Network, device: torch.device | None) -> torch.device:
    parameter = next(network.parameters(), None) if isinstance(network, nn.Module) else None
    if parameter is None:
        return device or torch.device("cpu")
    if device not in (None, parameter.device):
        raise ValueError(f"device: expected {str(parameter.device)!r}, where the network is, got {str(device)!r}")
    return parameter.device


def _shape(shape: Sequence[int]) -> tuple[int, ...]:
    expected = "three positive sizes (C, H, W)"
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape: expected {expected}, got {shape!r}")
    shape = tuple(checked_int("shape", size, expected) for size in shape)
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape: expected {expected}, got {shape}")
    return shape


def _check_options(clip: Any, dtype: Any, engine: Any, cuda_graph: Any, progress: Any, callback: Any) -> None:
    for name, value in (("clip", clip), ("engine", engine), ("cuda_graph", cuda_graph), ("progress", progress)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected None, torch.bfloat16 or torch.float16, got {dtype!r}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback: expected a callable, got {type(callback).__name__}")


def _check_x_T(x_T: Any, shape: tuple[int, ...]) -> None:
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point():
        got = x_T.dtype if isinstance(x_T, Tensor) else type(x_T).__name__
        raise TypeError(f"x_T: expected a floating-point tensor, got {got}")
    if x_T.shape[1:] != shape or x_T.ndim != len(shape) + 1:
        raise ValueError(f"x_T: expected shape (n, {', '.join(map(str, shape))}), got {tuple(x_T.shape)}")


def _rows(n: Any, seeds: Any, labels: Any, x_T: Tensor | None, source: _Source) -> tuple[int, Tensor, Tensor | None]:
    """(n, seeds [n], labels [n] or None), n being that of whichever argument tells it."""
    if seeds is not None:
        seeds = ops.as_seeds(seeds, "cpu")
    if labels is not None:
        labels = _labels(labels, source)
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


def _labels(labels: Any, source: _Source) -> Tensor:
    """int64: [] of one label, [n] of several."""
    low, high, expected = -1, 2**63, "ints >= -1"
    if source.num_classes is not None:
        low, high = -1 if source.null_class else 0, source.num_classes
        expected = f"ints in {low}..{high - 1}"
    if isinstance(labels, Tensor):
        if labels.dtype != torch.int64 or labels.ndim > 1:
            got = f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise TypeError(f"labels: expected an int64 tensor [] or [n], got {got}")
        labels = labels.tolist()
    lone = isinstance(labels, str) or not isinstance(labels, Iterable)
    labels = [labels] if lone else list(labels)
    if source.label is not None:
        labels = [source.label(label) if isinstance(label, str) else label for label in labels]
    labels = [checked_int("labels", label, expected) for label in labels]
    for label in labels:
        if not low <= label < high:
            raise ValueError(f"labels: expected {expected}, got {label}")
    return torch.tensor(labels[0] if lone else labels, dtype=torch.int64, device="cpu")


def _checked_output(out: Any, x_t: Tensor, learned_variance: bool) -> Tensor:
    """The network's output; without the half that tells a variance where none is asked for."""
    n, channels, *size = x_t.shape
    out = getattr(out, "sample", out)
    if not isinstance(out, Tensor):
        raise TypeError(f"model: expected a tensor as output, got {type(out).__name__}")
    if not out.is_floating_point():
        raise TypeError(f"model: expected a floating-point output, got {out.dtype}")
    if out.device != x_t.device:
        raise ValueError(f"model: expected an output on {x_t.device}, got {out.device}")
    if not learned_variance and out.shape == (n, 2 * channels, *size):
        return out[:, :channels]
    shape = (n, 2 * channels if learned_variance else channels, *size)
    if out.shape != shape:
        raise ValueError(f"model: expected an output of shape {shape}, got {tuple(out.shape)}")
    return out
