"""diffkern's samplers as the scheduler of a pipeline of diffusers.

    pipeline.scheduler = diffkern.Scheduler.of(pipeline.scheduler)  # the same sampler
    pipeline.scheduler = diffkern.Scheduler.of(pipeline.scheduler, sampler="unipc", options={"order": 3})

The pipeline calls the network and combines its outputs. The scheduler does one row of a program for each call. This
module needs diffusers, and nothing else in the package imports it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from torch import Tensor

from . import ops
from .io.pipelines import PREDICTION_TYPES
from .ops.row import of_x0
from .process import EDM, Grid, Process, RectifiedFlow
from .program import Program
from .samplers import SAMPLERS
from .schedule import Schedule

# --- a scheduler of diffusers as a sampler and a process ---

BETAS = {
    "linear": Schedule.linear,
    "scaled_linear": Schedule.scaled_linear,
    "squaredcos_cap_v2": lambda T, *_: Schedule.cosine(T),
}


def _order(config: Mapping[str, Any]) -> int:
    return config.get("solver_order", 2)


def _dpm_solver(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kind = config.get("algorithm_type", "dpmsolver++")
    if kind == "sde-dpmsolver++":
        return "dpmpp_2m_sde", {"kind": config.get("solver_type", "midpoint")}
    if kind != "dpmsolver++":
        raise ValueError(f"algorithm_type: expected 'dpmsolver++' or 'sde-dpmsolver++', got {kind!r}")
    return f"dpmpp_{_order(config)}m", {}


def _uni_pc(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    variant = {"bh1": "B1", "bh2": "B2"}[config.get("solver_type", "bh2")]
    return "unipc", {"order": _order(config), "variant": variant}


SAMPLER_OF = {
    "DDPMScheduler": lambda _: ("ddpm", {}),
    "DDIMScheduler": lambda _: ("ddim", {}),
    "PNDMScheduler": lambda _: ("ipndm", {}),
    "LMSDiscreteScheduler": lambda _: ("lms", {}),
    "EulerDiscreteScheduler": lambda _: ("euler", {}),
    "EulerAncestralDiscreteScheduler": lambda _: ("euler_a", {}),
    "HeunDiscreteScheduler": lambda _: ("heun", {}),
    "DEISMultistepScheduler": lambda config: ("deis", {"order": _order(config)}),
    "DPMSolverMultistepScheduler": _dpm_solver,
    "DPMSolverSinglestepScheduler": lambda _: ("dpmpp_2s", {}),
    "UniPCMultistepScheduler": _uni_pc,
    "EDMEulerScheduler": lambda _: ("euler", {}),
    "EDMDPMSolverMultistepScheduler": _dpm_solver,
    "FlowMatchEulerDiscreteScheduler": lambda _: ("velocity", {"order": 1}),
    "FlowMatchHeunDiscreteScheduler": lambda _: ("velocity", {"order": 2}),
}
"""By the class of a scheduler: its config -> (the sampler that does what it is meant to do, its options)."""

PROCESS_OF = {
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
}

FOLLOWED: dict[str, tuple[Any, ...]] = {
    "thresholding": (False,),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_flow_sigmas": (False, None),
    "invert_sigmas": (False,),
    "sigma_schedule": ("karras",),
    "rho": (7.0,),
    "shift_terminal": (None,),
    "stochastic_sampling": (False,),
    "time_shift_type": ("exponential",),
}
"""Settings that change what a scheduler computes, with the values that this one follows."""


def _settings(name: str, config: Mapping[str, Any], other_sampler: bool) -> dict[str, Any]:
    """Return a scheduler's class and config as our settings, beyond those that have the same name in both."""
    if name not in SAMPLER_OF and not other_sampler:
        raise ValueError(f"scheduler: expected one of {', '.join(SAMPLER_OF)}, or sampler=, got a {name}")
    refused = {key: config[key] for key, values in FOLLOWED.items() if key in config and config[key] not in values}
    if refused:
        raise ValueError(f"scheduler: expected settings that are followed, got {refused}")
    process = PROCESS_OF.get(name, "betas")
    found = {"process": process, "timestep_spacing": config.get("timestep_spacing", "trailing")}
    if not other_sampler:
        found["sampler"], found["options"] = SAMPLER_OF[name](config)
    return found


@dataclass
class SchedulerOutput(BaseOutput):
    """prev_sample: the sample after the step; pred_original_sample: x0_hat, clamped where the scheduler clips."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class Scheduler(SchedulerMixin, ConfigMixin):
    """A sampler of diffkern with the methods that the pipelines of diffusers call.

    sampler    a name in :data:`diffkern.samplers.SAMPLERS`
    options    its options, such as ``{"order": 3}``
    process    "betas", "edm" or "flow": which of the settings below hold

    The other settings have the names and the meaning that they have in diffusers.

    A sample's noise is a function of a seed, which the first step draws from the pipeline's generator: a run of the
    same generator gives the same images, whatever the device.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]

    @register_to_config
    def __init__(
        self,
        sampler: str = "unipc",
        options: dict[str, Any] | None = None,
        process: str = "betas",
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        variance_type: str | None = None,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        use_karras_sigmas: bool = False,
        use_lu_lambdas: bool = False,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
    ):
        config = self.config
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {sampler!r}")
        if process not in ("betas", "edm", "flow"):
            raise ValueError(f"process: expected 'betas', 'edm' or 'flow', got {process!r}")
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {prediction_type!r}")
        if process == "edm" and prediction_type != "epsilon":
            raise ValueError(f"prediction_type: expected 'epsilon', which is F, on EDM, got {prediction_type!r}")
        self.sampler, self.options = SAMPLERS[sampler], dict(options or {})
        self.sampler.check(self.options)
        self.prediction = {"edm": "edm", "flow": "flow"}.get(process, PREDICTION_TYPES[prediction_type])
        self.process = _process(config)
        if "variance" in self.sampler.options and variance_type is not None:
            variance = {"fixed_small_log": "fixed_small", "learned_range": "learned"}.get(variance_type, variance_type)
            self.options.setdefault("variance", variance)
        self.order = self.sampler.calls
        self.init_noise_sigma = float(self.process.prior_std)
        self.seeds: Tensor | None = None
        self._grid: Grid | None = None
        self.set_timesteps(min(20, num_train_timesteps))

    @classmethod
    def of(cls, scheduler: Any, **changes: Any) -> "Scheduler":
        """Make the one that does what ``scheduler``, of diffusers, is meant to do.

        changes  settings that shall differ, as ``sampler="unipc"`` and its ``options``

        Raises ValueError for a scheduler that is not known, and for settings that are not followed.
        """
        return cls.from_config({**scheduler.config, "_class_name": type(scheduler).__name__}, **changes)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **changes: Any) -> Any:
        """Make one of a config. Where this tells its class, as a file does, its sampler is that of :meth:`of`."""
        name = config.get("_class_name", cls.__name__)
        # Settings named there have the other class's defaults; diffusers would take ours instead.
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
        if name != cls.__name__:
            changes = _settings(name, config, "sampler" in changes) | changes
        return super().from_config(config, return_unused_kwargs, **changes)

    # --- the run ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Lay out a run: so many steps, or the very time steps, or for a flow its sigmas.

        mu  of a flow with ``use_dynamic_shifting``: the logarithm of its shift
        """
        self.num_inference_steps = num_inference_steps
        self._grid = _grid(self.config, self.process, num_inference_steps, timesteps, sigmas, mu)
        self._device = torch.device("cpu" if device is None else device)
        self._begin, self._row = 0, None  # the row whose turn it is; None between runs
        program = self._trace(self._grid)
        called = [row.point for row in program.rows if row.point is not None]
        whole = self.process.discrete and all(point.c_noise == int(point.c_noise) for point in called)
        told = torch.tensor([point.c_noise for point in called], dtype=torch.float64, device="cpu")
        self.timesteps = told.to(self._device, torch.int64 if whole else torch.float32)
        sigmas = [
            point.sigma if self.config.process == "flow" else point.rho for point in (*called, self._grid.points[-1])
        ]
        self.sigmas = torch.tensor(sigmas, dtype=torch.float32, device="cpu")

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin the run at that one of ``timesteps``, the first call of a step."""
        self._begin, self._row = begin_index, None

    @property
    def begin_index(self) -> int:
        return self._begin

    @property
    def step_index(self) -> int | None:
        """How many calls of the run have been made; None before the first."""
        return None if self._row is None else self._begin + self._calls

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the network's input for x_t: c_in x_t (c_in is 1 but for EDM)."""
        if self.config.process != "edm":
            return sample
        return sample * self.process.c_in(self._point(timestep))

    def step(
        self,
        model_output: Tensor,
        timestep: int | float | Tensor,
        sample: Tensor,
        eta: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """Do what follows a call of the network: x_t [N, ...] and its output -> x of the next call, in their dtype.

        timestep   the one of ``timesteps`` whose turn it is. The first of a run may be any: it begins there
        eta        of a sampler that takes it, in the first step of a run
        generator  draws the seeds of the samples, in the first step of a run: one, or one for each sample

        Raises ValueError for a time step whose turn it is not.
        """
        if self._row is None:
            self._start(timestep, sample, eta, generator)
        row = self._program.rows[self._row]
        told = float(timestep)
        if row.point is None or not math.isclose(told, row.point.c_noise, rel_tol=1e-5, abs_tol=1e-5):
            raise ValueError(f"timestep: expected {row.point and row.point.c_noise}, whose turn it is, got {told}")
        x, out = sample.float().contiguous(), model_output.float().contiguous()
        seen = of_x0(self._table)
        x0_hat = ops.reverse_step(x, out, seen, self._row, self.seeds, learned_variance=self._program.learned_variance)
        x = self._do(x, out)
        while self._row < len(self._program.rows) and self._program.rows[self._row].point is None:
            x = self._do(x, None)
        self._calls += 1
        if self._row == len(self._program.rows):
            self._row = None  # the run is over: the next call begins another
        x, x0_hat = x.to(sample.dtype), x0_hat.to(sample.dtype)
        return SchedulerOutput(x, x0_hat) if return_dict else (x, x0_hat)

    def _do(self, x: Tensor, out: Tensor | None) -> Tensor:
        """The row whose turn it is."""
        row = self._program.rows[self._row]
        learned = out is not None and self._program.learned_variance
        options = dict(history=self._slots, address=self._addresses, learned_variance=learned)
        if row.keep is None:
            x = ops.reverse_step(x, out, self._table, self._row, self.seeds, **options)
        else:
            x, self._slots[row.keep] = ops.reverse_step(
                x, out, self._table, self._row, self.seeds, return_kept=True, **options
            )
        self._row += 1
        return x

    def _start(self, timestep: Any, sample: Tensor, eta: float | None, generator: Any) -> None:
        """Begin a run at ``timestep``, with seeds for the samples."""
        told = self.timesteps.tolist()
        if self._begin == 0 and float(timestep) in told:
            self._begin = told.index(float(timestep))
        program = self._trace(self._grid, eta)
        called = [row for row in program.rows if row.point is not None]
        if self._begin:
            if not called[self._begin].begins:
                raise ValueError(
                    f"timestep: expected the first call of a step, got {float(timestep)}, which is a later one"
                )
            steps = sum(row.begins for row in called[: self._begin])
            program = self._trace(Grid(self._grid.points[steps:], self.process, self._grid.path), eta)
        self._program, self._row, self._calls = program, 0, 0
        clip = self.config.clip_sample
        self._table = program.table(self.config.clip_sample_range if clip else None).float().to(sample.device)
        self._addresses = program.addresses().to(sample.device)
        self._slots = [torch.zeros_like(sample, dtype=torch.float32) for _ in range(program.slots)]
        self.seeds = _seeds(len(sample), generator).to(sample.device)

    def _trace(self, grid: Grid, eta: float | None = None) -> Program:
        options = dict(self.options)
        if "eta" in self.sampler.options and eta is not None:
            options["eta"] = eta
        elif eta:
            raise ValueError(f"eta: expected 0 or None with sampler {self.sampler.name!r}, got {eta}")
        program = self.sampler.trace(grid, self.prediction, **options)
        if program.correlated:
            raise ValueError("variance: expected another one with a pipeline, got 'full'")
        return program if self.config.clip_sample else program.fold()

    def _point(self, timestep: Any) -> Any:
        """The point of the run where the network is told ``timestep``."""
        told = float(timestep)
        return min(self._grid.points[:-1], key=lambda point: abs(point.c_noise - told))

    # --- training ---

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise: x_0 and noise [N, ...], a time step for each or one for all."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    scale_noise = add_noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x_0 (Salimans & Ho 2022, appendix D)."""
        alpha, sigma = self._levels(timesteps, sample)
        return alpha * noise - sigma * sample

    def _levels(self, timesteps: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each sample, to multiply with ``like``."""
        told = timesteps.flatten().tolist() if isinstance(timesteps, Tensor) else [timesteps]
        points = [self.process.point(self._time(value)) for value in told]
        shape = (-1, *[1] * (like.ndim - 1))
        alpha = torch.tensor([point.alpha for point in points], dtype=torch.float64, device="cpu")
        sigma = torch.tensor([point.sigma for point in points], dtype=torch.float64, device="cpu")
        return alpha.to(like).view(shape), sigma.to(like).view(shape)

    def _time(self, told: float) -> float:
        """The time at which the network is told that."""
        if self.config.process == "edm":
            return math.exp(4 * told)
        return told / 1000 if self.config.process == "flow" else told

    def __len__(self) -> int:
        return self.config.num_train_timesteps


def _process(config: Any) -> Process:
    if config.process == "edm":
        return EDM(sigma_data=config.sigma_data, t_min=config.sigma_min, t_max=config.sigma_max)
    if config.process == "flow":
        return RectifiedFlow(c_noise_scale=1000)
    T, kind = config.num_train_timesteps, config.beta_schedule
    if config.trained_betas is not None:
        schedule = Schedule(torch.as_tensor(config.trained_betas, dtype=torch.float64, device="cpu"))
    elif kind in BETAS:
        schedule = BETAS[kind](T, config.beta_start, config.beta_end)
    else:
        raise ValueError(f"beta_schedule: expected one of {', '.join(BETAS)} or trained_betas, got {kind!r}")
    return schedule.rescaled() if config.rescale_betas_zero_snr else schedule


def _grid(
    config: Any,
    process: Process,
    steps: int | None,
    timesteps: Sequence[int] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> Grid:
    """The points of a run."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps: expected None with sigmas, got both")
    if timesteps is None and sigmas is None and steps is None:
        raise ValueError("num_inference_steps: expected it, timesteps or sigmas, got none")
    if config.process == "flow":
        shift = math.exp(mu) if config.use_dynamic_shifting and mu is not None else config.shift
        if timesteps is not None:
            sigmas = [float(t) / 1000 for t in timesteps]
        if sigmas is None:
            sigmas = torch.linspace(1, 1e-3, steps, dtype=torch.float64, device="cpu").tolist()
        return process.grid([shift * t / (1 + (shift - 1) * t) for t in map(float, sigmas)])
    if sigmas is not None:
        raise ValueError(f"sigmas: expected None without a flow, got {sigmas}")
    spacing = "karras" if config.use_karras_sigmas else "lambda" if config.use_lu_lambdas else None
    if timesteps is not None:
        return process.grid([int(t) for t in timesteps])
    if config.process == "edm" or spacing is not None:
        return process.grid(steps, spacing)
    times = process.timesteps(steps, config.timestep_spacing)
    offset = config.steps_offset if config.timestep_spacing == "leading" else 0
    return process.grid([min(t + offset, process.T - 1) for t in times])


def _seeds(n: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """A seed for each sample [n] int64, drawn from one generator or from one each."""
    if isinstance(generator, list):
        if len(generator) != n:
            raise ValueError(f"generator: expected one, or {n} in a list, got {len(generator)}")
        return torch.cat([_seeds(1, one) for one in generator])
    device = "cpu" if generator is None else generator.device
    return torch.randint(2**63 - 1, (n,), generator=generator, dtype=torch.int64, device=device).cpu()
