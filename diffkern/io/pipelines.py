"""Pipelines of diffusers': what is read from them, and what is refused because ``sample`` does not do it."""

import inspect
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..constraints import Quantile, limit_of
from ..networks import UNet, from_diffusers
from ..networks.diffusers import DEFAULTS, check_same
from ..schedule import Schedule

PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}

# --- settings of a scheduler ---

KEPT = {
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr"),
    "prediction_type",
}
"""Settings that are in the betas, and the prediction."""

DONE: dict[str, tuple[Any, ...]] = {
    "clip_sample": (True, False),
    "set_alpha_to_one": (True,),
    "steps_offset": (0,),
    "sample_max_value": (1.0,),
    "thresholding": (True, False),
    "timestep_spacing": ("trailing", "leading", "linspace"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
}
"""The values that a ``Model`` keeps for ``sample``. It can be told to act on another:"""

ARGUMENTS = {("steps_offset", 1): "steps=scheduler.timesteps.tolist()"}


def settings(scheduler: Any, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Return a scheduler's clip, variance and spacing, where not ours, as a ``Model`` keeps them for ``sample``.

    Warns of settings that ``sample`` must be told, by its arguments; ValueError for those that it cannot be told.
    Settings named in ``ignore`` are not looked at. A scheduler without ``clip_sample`` does not clip.
    """
    if isinstance(ignore, str):
        raise TypeError(f"ignore: expected a collection of names, got {ignore!r}")
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    set_to = {"clip_sample": False} | {name: config[name] for name in DONE if name in config}
    set_to |= {name: value for name, value in config.items() if name.startswith("use_") and value}  # use_karras_sigmas
    if not set_to.get("thresholding"):
        set_to.pop("sample_max_value", None)
    unlike = {k: v for k, v in set_to.items() if k not in ignore and v not in DONE.get(k, ())}
    refused = {name: value for name, value in unlike.items() if (name, value) not in ARGUMENTS}
    if refused:
        raise ValueError(
            f"scheduler: expected settings that sample() follows, got {_listed(refused)}; "
            f"ignore={list(refused)} takes the model without them"
        )
    told = [ARGUMENTS[name, value] for name, value in unlike.items()]
    defaults = inspect.signature(type(scheduler).__init__).parameters
    looked_at = {*KEPT, *CLIPPING, *set_to, *ignore}
    other = {
        name: value
        for name, value in config.items()
        if name not in looked_at and name in defaults and value != defaults[name].default
    }
    told = [f"sample() does what it is set to if given {', '.join(told)}"] if told else []
    told += [f"sample() has nothing for {_listed(other)}"] if other else []
    if told:
        warnings.warn(f"scheduler: {'; '.join(told)}", stacklevel=5)
    kept: dict[str, Any] = {}
    if "clip_sample" not in ignore:
        kept["clip"] = _clip(set_to["clip_sample"], config) if "thresholding" not in ignore else set_to["clip_sample"]
    if set_to.get("variance_type") == "fixed_large" and "variance_type" not in ignore:
        kept["variance"] = "fixed_large"
    if "timestep_spacing" not in ignore and "steps_offset" not in unlike:  # steps told one by one have no spacing
        kept["spacing"] = set_to.get("timestep_spacing", "trailing")
    return {name: value for name, value in kept.items() if value not in (True, "trailing")}


CLIPPING = ("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value")


def _clip(clips: bool, config: Mapping[str, Any]) -> bool | float | Quantile:
    if config.get("thresholding"):  # which diffusers prefers where both are set
        return Quantile(config["dynamic_thresholding_ratio"])
    return clips and (True if config.get("clip_sample_range", 1) == 1 else float(config["clip_sample_range"]))


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _in_float32(network: UNet) -> UNet:
    """The network, with copies in place of the parameters that are not float32."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype != torch.float32:
                setattr(module, name, nn.Parameter(parameter.detach().float(), parameter.requires_grad))
    return network


# --- out ---


def scheduler_config(
    schedule: Schedule,
    prediction: str,
    *,
    clip: bool | float | Quantile | None = None,
    variance: str | None = None,
    spacing: str | None = None,
) -> dict[str, Any]:
    """The config of diffusers' ``DDPMScheduler`` that does what ``sample`` does with a ``Model`` that has these.

    Raises ValueError for what diffusers has not.
    """
    names = {ours: theirs for theirs, ours in PREDICTION_TYPES.items()}
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule: expected one of time steps, as diffusers' DDPMScheduler has, got {schedule}")
    if prediction not in names:
        raise ValueError(f"prediction: expected one of {', '.join(names)}, as diffusers has, got {prediction!r}")
    if variance not in VARIANCE_TYPES:
        raise ValueError(f"variance: expected one of diffusers' {', '.join(VARIANCE_TYPES)}, got {variance!r}")
    if spacing not in (None, *DONE["timestep_spacing"]):
        raise ValueError(f"spacing: expected one of {', '.join(DONE['timestep_spacing'])}, got {spacing!r}")
    thresholds = isinstance(clip, Quantile)
    limit = 1.0 if clip is None else limit_of(clip)
    return dict(
        **{"_class_name": "DDPMScheduler", "num_train_timesteps": schedule.T, "prediction_type": names[prediction]},
        **_betas(schedule),
        clip_sample=limit is not None and not thresholds,
        clip_sample_range=1.0 if limit is None else limit,
        thresholding=thresholds,
        **({"dynamic_thresholding_ratio": clip.q, "sample_max_value": 1.0} if thresholds else {}),
        variance_type=VARIANCE_TYPES[variance],
        timestep_spacing=spacing or "trailing",
        steps_offset=0,
    )


VARIANCE_TYPES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned": "learned_range"}


def _betas(schedule: Schedule) -> dict[str, Any]:
    config = schedule.config()
    ends = {name: config[name] for name in ("beta_start", "beta_end") if name in config}
    if config["kind"] in ("linear", "scaled_linear"):
        return {"beta_schedule": config["kind"], "trained_betas": None, **ends}
    if schedule == Schedule.cosine(schedule.T):
        return {"beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
    return {"trained_betas": schedule.betas.tolist()}


# --- all of it ---


def read(pipeline: Any, ignore: Collection[str] = ()) -> dict[str, Any]:
    """The arguments of a ``Model``: the network in float32, the schedule, the prediction, the images' shape and what is
    kept for ``sample``. See ``Model.from_diffusers``."""
    unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
    expected = "pipeline: expected a UNet2DModel as unet and a scheduler with betas"
    if type(unet).__name__ != "UNet2DModel" or not hasattr(scheduler, "betas"):
        raise TypeError(f"{expected}, got {type(unet).__name__} and {type(scheduler).__name__}")
    for name, part in getattr(pipeline, "components", {}).items():
        if name not in ("unet", "scheduler") and part is not None:
            raise TypeError(f"{expected} and nothing else, got {type(part).__name__} as {name} too")
    told = told_by(unet.config, scheduler, ignore)
    network = from_diffusers(unet)
    check_same(network, unet)
    return dict(network=_in_float32(network), **told)


def told_by(config: Mapping[str, Any], scheduler: Any, ignore: Collection[str] = ()) -> dict[str, Any]:
    """The same without the network, from the config of its ``UNet2DModel``."""
    if not hasattr(scheduler, "betas"):
        raise ValueError(f"scheduler: expected one with betas, got {type(scheduler).__name__}")
    kind, size = scheduler.config.get("prediction_type"), config.get("sample_size")
    if kind not in PREDICTION_TYPES:
        got = repr(kind) if kind else f"a {type(scheduler).__name__}, which has none"
        raise ValueError(f"prediction_type: expected one of {', '.join(PREDICTION_TYPES)}, got {got}")
    if size is None:
        raise ValueError("sample_size: expected the images' size in the UNet2DModel's config, got None")
    kept = settings(scheduler, ignore)
    schedule = Schedule(scheduler.betas)
    _check_alpha_bar(schedule, scheduler)
    height, width = (size, size) if isinstance(size, int) else size
    channels, out_channels = ((DEFAULTS | config)[name] for name in ("in_channels", "out_channels"))
    shape = channels, height, width
    if out_channels == 2 * channels:  # the second half is a variance, whatever the network is
        kept.setdefault("variance", "learned")
    return dict(schedule=schedule, prediction=PREDICTION_TYPES[kind], shape=shape, **kept)


def _check_alpha_bar(schedule: Schedule, scheduler: Any) -> None:
    """ValueError unless the scheduler's alpha_bar is that of its betas, up to the rounding of a float32 product."""
    theirs: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
    if theirs is None:
        raise ValueError(f"alphas_cumprod: expected those of the betas, got a {type(scheduler).__name__} without any")
    theirs = theirs.detach().to("cpu", torch.float64)
    if theirs.shape != schedule.alpha_bar.shape or not torch.allclose(theirs, schedule.alpha_bar, rtol=1e-3, atol=1e-6):
        raise ValueError(f"alphas_cumprod: expected those of the betas, got others in {type(scheduler).__name__}")
