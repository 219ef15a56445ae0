"""A network with everything that sampling from it needs, as one object and one file.

The file is safetensors: the weights, and in its metadata under "diffkern" a JSON description of the rest. A training
checkpoint (:mod:`diffkern.training`) is such a file with more tensors in it; its model is the averaged one.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .samplers import PREDICTIONS
from .schedule import Schedule
from .unet import UNet, from_diffusers

MODELS = Path(__file__).parent / "models"
"""Where the shipped models are, each with its card."""

FORMAT = 1


@dataclasses.dataclass
class Model:
    """What the network predicts, on which schedule, for images of which shape.

    network     called as ``network(x_t, t, labels)``: [N, C, H, W], [N] int64, [N] int64 or None
    schedule    the betas that it was trained on
    prediction  "eps", "x0", "v" or "score"
    shape       (C, H, W) of an image
    classes     a name for each label 0..K-1, or None
    name        for file names and titles
    """

    network: nn.Module
    schedule: Schedule
    prediction: str = "eps"
    shape: tuple[int, int, int] = (3, 32, 32)
    classes: tuple[str, ...] | None = None
    name: str = "model"

    def __post_init__(self):
        if not isinstance(self.network, nn.Module):
            raise TypeError(f"network: expected a torch.nn.Module, got {type(self.network).__name__}")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {type(self.schedule).__name__}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        self.shape = tuple(self.shape)
        if len(self.shape) != 3 or not all(isinstance(size, int) and size > 0 for size in self.shape):
            raise ValueError(f"shape: expected three positive sizes (C, H, W), got {self.shape}")
        if self.classes is not None:
            self.classes = tuple(self.classes)
            names = [name.lower() if isinstance(name, str) else name for name in (*self.classes, "none")]
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"classes: expected names, got {self.classes}")
            if len(set(names)) < len(names):
                raise ValueError(
                    f"classes: expected names other than none that differ by more than case, got {self.classes}"
                )
        network = unwrapped(self.network)
        if isinstance(network, UNet):
            channels, num_classes = (network.config[name] for name in ("in_channels", "num_classes"))
            if self.shape[0] != channels:
                raise ValueError(f"shape: expected the network's {channels} channels, got {self.shape}")
            if self.classes is not None and len(self.classes) != num_classes:
                raise ValueError(
                    f"classes: expected names for the network's num_classes, {num_classes}, got {len(self.classes)}"
                )

    @classmethod
    def from_diffusers(cls, pipeline: Any, name: str = "model") -> "Model":
        """The model in a pipeline of diffusers' for pixels, as ``DDPMPipeline``: its ``UNet2DModel``, whose parameters
        it shares, and the betas and the prediction of its scheduler.

        Raises TypeError for a pipeline of other parts, ValueError for an option of them that diffkern has not.
        """
        unet, scheduler = getattr(pipeline, "unet", None), getattr(pipeline, "scheduler", None)
        if type(unet).__name__ != "UNet2DModel" or not hasattr(scheduler, "betas"):
            parts = f"{type(unet).__name__} and {type(scheduler).__name__}"
            raise TypeError(f"pipeline: expected a UNet2DModel as unet and a scheduler with betas, got {parts}")
        predictions = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
        kind, size = scheduler.config.prediction_type, unet.config.sample_size
        if kind not in predictions:
            raise ValueError(f"prediction_type: expected one of {', '.join(predictions)}, got {kind!r}")
        if size is None:
            raise ValueError("sample_size: expected the images' size in the UNet2DModel's config, got None")
        height, width = (size, size) if isinstance(size, int) else size
        shape, schedule = (unet.config.in_channels, height, width), Schedule(scheduler.betas)
        return cls(from_diffusers(unet), schedule, predictions[kind], shape, name=name)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x_t, t, labels)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def label(self, text: str) -> int:
        """The class of that name, upper or lower case, or else of that number; -1, the null class, of "none"."""
        classes = self.classes or ()
        by_number = {str(label): label for label in range(-1, len(classes))}
        by_name = {name.lower(): label for label, name in enumerate(classes)} | {"none": -1}
        known = by_number | by_name  # a name that is a number is meant as a name
        if text.lower() not in known:
            numbered = ", ".join(f"{label} {name}" for label, name in enumerate(classes))
            raise ValueError(f"labels: expected none or one of {numbered}, got {text!r}")
        return known[text.lower()]

    def description(self) -> dict[str, Any]:
        """All but the weights, as JSON holds it."""
        network = unwrapped(self.network)
        if not isinstance(network, UNet):
            raise TypeError(f"network: expected a diffkern.unet.UNet to describe, got {type(network).__name__}")
        return {
            "format": FORMAT,
            "name": self.name,
            "network": network.config,
            "schedule": self.schedule.config(),
            "prediction": self.prediction,
            "shape": self.shape,
            "classes": self.classes,
            "prefix": "",
        }


def unwrapped(network: Any) -> Any:
    """The ``UNet`` that ``optimize`` was given, or any other network as it is."""
    from .engine import Engine  # which takes a Model

    return network.network if isinstance(network, Engine) else network


def shipped() -> list[str]:
    """The names of the models in this package."""
    return sorted(path.stem for path in MODELS.glob("*.safetensors"))


def load(name: str | os.PathLike, device: torch.device | str | None = None) -> Model:
    """A shipped model by its name, or one from a file of :func:`save` or a training checkpoint (its averaged weights).

    Weights are float32, whatever the file holds, and the network is in eval mode.
    Raises FileNotFoundError for a name or path that is not there, ValueError for a file that is no model.
    """
    path = _find(name)
    description, tensors = read(path)
    model = build(description, path)
    prefix = description.get("prefix", "")
    weights = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
    restore(model.network.state_dict(), weights, path)
    model.network.eval().requires_grad_(False).to(checked_device(device))
    return model


def checked_device(device: torch.device | str | None) -> torch.device:
    """``device``, the CPU for None; ValueError unless it is the CPU or a CUDA device that is there."""
    try:
        device = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected cpu or cuda, got {device!r}") from None
    if device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()):
        return device
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    raise ValueError(f"device: expected one of {', '.join(there)}, got {device}")


def save(model: Model, path: str | os.PathLike, *, dtype: torch.dtype = torch.float32) -> None:
    """Write ``model`` for :func:`load`, its weights as ``dtype`` (half precision halves the file)."""
    if not isinstance(model, Model):
        raise TypeError(f"model: expected a Model, got {type(model).__name__}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    weights = {key: tensor.to(dtype) for key, tensor in unwrapped(model.network).state_dict().items()}
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: expected weights that are finite in {dtype}, got others in {key}")
    write(path, model.description(), weights)


def build(description: dict[str, Any], path: str | os.PathLike) -> Model:
    """The model that ``description`` describes, its weights still random; ``path`` names it in errors."""
    if description.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a model of format {FORMAT}, got format {description.get('format')!r}")
    try:
        return Model(
            network=UNet(**description["network"]),
            schedule=Schedule.from_config(description["schedule"]),
            prediction=description["prediction"],
            shape=description["shape"],
            classes=description["classes"],
            name=description["name"],
        )
    except KeyError as error:
        raise ValueError(f"{path}: expected {error} in the model's description, got {', '.join(description)}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def restore(live: dict[str, Tensor], stored: dict[str, Tensor], path: str | os.PathLike) -> None:
    """Copy ``stored`` into ``live``, which keeps its dtypes, devices and memory formats; the keys must be the same."""
    missing, unexpected = sorted(live.keys() - stored.keys()), sorted(stored.keys() - live.keys())
    if missing or unexpected:
        raise ValueError(
            f"{path}: expected the tensors of its network, got {len(missing)} missing {missing[:3]} "
            f"and {len(unexpected)} unexpected {unexpected[:3]}"
        )
    with torch.no_grad():
        for key, tensor in live.items():
            if stored[key].shape != tensor.shape:
                raise ValueError(f"{path}: {key}: expected shape {tuple(tensor.shape)}, got {tuple(stored[key].shape)}")
            tensor.copy_(stored[key])


def read(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a file of :func:`write`."""
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected a file, got a directory")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("diffkern", "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected a file, got none") from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: expected a safetensors file, got {error}") from None
    if not isinstance(description, dict):
        raise ValueError(f"{path}: expected a file written by diffkern, got one without its description")
    return description, tensors


def write(path: str | os.PathLike, description: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """One safetensors file, written atomically: ``description`` in its metadata, and ``tensors``."""
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    metadata = {"diffkern": json.dumps(description)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def write_atomically(path: str | os.PathLike, write_to: Callable[[Path], Any]) -> None:
    """Let ``write_to`` fill a file beside ``path``, force it to disk, and give it the name ``path``.

    Whatever interrupts this, ``path`` holds the old file or the new one, whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        write_to(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors writes 0600
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != "posix":  # others open no directories
        return
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name, too
    finally:
        os.close(directory)


def _find(name: str | os.PathLike) -> Path:
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"model: expected a name or a path, got {type(name).__name__}")
    if name in shipped():
        return MODELS / f"{name}.safetensors"
    if not Path(name).exists():
        names = ", ".join(shipped()) or "none in this package"
        raise FileNotFoundError(
            f"model: expected a shipped model ({names}) or an existing file, got {os.fspath(name)!r}"
        )
    return Path(name)
