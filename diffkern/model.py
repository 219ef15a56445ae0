"""A network with everything that sampling from it needs, as one object and one file.

The file is safetensors: the weights, and in its metadata under "diffkern" a JSON description of the rest. A training
checkpoint (:mod:`diffkern.training`) is such a file with more tensors in it; its model is the averaged one.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn

from . import covariance
from .codec import Codec
from .conditions import Condition
from .constraints import Quantile, limit_of
from .engine import unwrapped
from .io import foreign, hub, pipelines
from .io.description import FORMAT, check_model
from .io.files import CHECKPOINT, compare, fill, read, restore, state, write
from .networks import ARCHITECTURES, UNet
from .networks.blueprint import Blueprint
from .prediction import PREDICTIONS
from .process import Process, checked_int
from .progress import tell
from .samplers import LEARNED, VARIANCES
from .schedule import SPACINGS, from_config
from .system import FORMAT as SYSTEM_FORMAT
from .system import System

MODELS = Path(__file__).parent / "models"
"""The folder of the shipped models, each with its card."""

SYSTEMS = ("cascade", "unclip")
"""The kinds of files of several models: packages here, whose modules ``files`` read them."""


@dataclasses.dataclass(repr=False)
class Model:
    """A network with its process, its prediction and the shape of its samples.

    network     any callable or module, called as ``network(x_t, t, labels, **conditions)``: [N, ...], [N], [N] int64 or
                None. Its attributes ``num_classes`` (None for none) and ``null_class`` say which labels it takes
    schedule    the betas that it was trained on, or another :class:`diffkern.process.Process`
    prediction  a name in :data:`diffkern.prediction.PREDICTIONS`
    shape       of a sample: (C, H, W) of an image
    classes     a name for each label 0..K-1, or None
    name        for file names and titles
    variance    what ddpm draws with, unless told otherwise; None: what the network has learned, or "fixed_small"
    clip        how ``sample`` clips x0_hat, unless told otherwise; None: to [-1, 1]
    spacing     how it spreads steps, unless told otherwise; None: the process's own way
    conditions  what the network gets beside labels: each a Condition, or all as shapes by name: {"image": (3, 32, 32)}.
                Then the null value of a vector or an image is 0, and a number has none. A diffkern network has by
                default those of its config
    codec       between images and what is diffused; None: pixels are
    """

    network: Callable[..., Any]
    schedule: Process
    prediction: str = "eps"
    shape: tuple[int, ...] = (3, 32, 32)
    classes: tuple[str, ...] | None = None
    name: str = "model"
    variance: str | None = None
    clip: bool | float | Quantile | None = None
    spacing: str | None = None
    conditions: Sequence[Condition] | Mapping[str, Sequence[int]] = ()
    codec: Codec | None = None

    def __post_init__(self):
        if not callable(self.network):
            raise TypeError(f"network: expected a torch.nn.Module or a callable, got {type(self.network).__name__}")
        if not isinstance(self.schedule, Process):
            raise TypeError(f"schedule: expected a Schedule or another process, got {type(self.schedule).__name__}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        self.shape = _checked_shape(self.shape)
        if self.classes is not None:
            self.classes = tuple(self.classes)
            names = [name.lower() if isinstance(name, str) else name for name in (*self.classes, "none")]
            if not all(isinstance(name, str) for name in names):
                raise TypeError(f"classes: expected names, got {self.classes}")
            if len(set(names)) < len(names):
                raise ValueError(
                    f"classes: expected names other than none that differ by more than case, got {self.classes}"
                )
        if self.variance not in (None, *VARIANCES):
            raise ValueError(f"variance: expected None or one of {VARIANCES}, got {self.variance!r}")
        if self.variance == "full":
            covariance.channels(self.shape)
        if self.spacing not in (None, *SPACINGS):
            raise ValueError(f"spacing: expected None or one of {SPACINGS}, got {self.spacing!r}")
        if self.clip is not None:
            limit_of(self.clip)
        network = unwrapped(self.network)
        self.conditions = _checked_conditions(self.conditions) or _own_conditions(network)
        if isinstance(network, UNet):
            channels = network.config["in_channels"]
            if len(self.shape) != 3 or self.shape[0] != channels:
                raise ValueError(f"shape: expected the network's {channels} channels, got {self.shape}")
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(
                f"classes: expected names for the network's num_classes, {self.num_classes}, got {len(self.classes)}"
            )

    @property
    def num_classes(self) -> int | None:
        """How many classes the network has: what it says as ``num_classes``, else as many as have names; None for none,
        and where nobody knows."""
        return getattr(unwrapped(self.network), "num_classes", None if self.classes is None else len(self.classes))

    @property
    def null_class(self) -> bool:
        """Whether the network takes -1 for no class: what it says as ``null_class``; True where nobody knows."""
        return getattr(unwrapped(self.network), "null_class", True)

    @property
    def learned_variance(self) -> bool:
        """Whether the network tells a variance by its second half: a ``UNet`` by its channels, else by ``variance``."""
        network = unwrapped(self.network)
        if isinstance(network, UNet):
            return network.conv_out.out_channels == 2 * self.shape[0]
        return self.variance in LEARNED

    @property
    def default_variance(self) -> str:
        """The variance of its steps, unless told otherwise: its own, else what was learned, else "fixed_small"."""
        return self.variance or ("learned" if self.learned_variance else "fixed_small")

    @classmethod
    def from_diffusers(cls, pipeline: Any, name: str = "model", *, ignore: Collection[str] = ()) -> "Model":
        """The model in a pipeline of diffusers' for pixels, as ``DDPMPipeline``: its ``UNet2DModel``, and the betas and
        the prediction of its scheduler.

        ignore  names of the scheduler's settings to leave aside, as "clip_sample"

        The network shares the parameters that are float32, and has float32 copies of others. Classes are 0..K-1,
        without a null class. The Model keeps what the scheduler clips, its variance and its spacing: ``sample`` follows
        them unless told otherwise. A warning says which arguments it needs to do more of what the scheduler is set to.

        Raises TypeError for a pipeline of other parts; ValueError for an option of them that diffkern has not, for a
        network that computes something else than diffkern's U-Net, and for settings that ``sample`` does not follow, as
        Karras sigmas.
        """
        return cls(**pipelines.read(pipeline, ignore), name=name)

    def to_diffusers(self, folder: str | os.PathLike) -> None:
        """Write a folder from which diffusers loads a ``DDPMPipeline`` of this model, with the same images.

        The scheduler gets the betas, the prediction, and what the model clips, its variance and its spacing. Classes
        are class embeddings without names for diffusers, the null class the last of them; :func:`load` reads both from
        ``diffkern.json`` beside them.

        Raises ValueError for a network, a process or a setting that diffusers has not, for conditions and a codec;
        OSError.
        """
        for name in ("conditions", "codec"):
            if getattr(self, name):
                raise ValueError(f"{name}: expected none, as a DDPMPipeline has none, got {getattr(self, name)}")
        kept = dict(clip=self.clip, variance=self.default_variance, spacing=self.spacing)
        kept |= dict(shape=self.shape, classes=self.classes, schedule=self.schedule, prediction=self.prediction)
        foreign.diffusers.write_folder(Path(folder), unwrapped(self.network), **kept)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *, revision: str | None = None, **options: Any) -> "Model":
        """:func:`load` a local path, or a repository of the Hugging Face Hub by its name (needs ``huggingface_hub``).

        options  as :func:`load` takes them. Files that hold code are not downloaded.
        """
        return load(Path(name) if os.path.exists(name) else hub.pull(str(name), revision), **options)

    def push_to_hub(self, name: str, *, private: bool = False, dtype: torch.dtype = torch.float32) -> str:
        """Upload the model to a repository of the Hugging Face Hub, as the file of :func:`save` (needs
        ``huggingface_hub``, logged in). Returns its address."""
        return hub.push(name, lambda path: save(self, path, dtype=dtype), private)

    def __call__(self, x_t: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x_t, t, labels)

    def __repr__(self) -> str:
        parameters = [p for p in _parameters(self.network) if not isinstance(p, nn.UninitializedParameter)]
        network = type(self.network).__name__
        if parameters:
            dtype = str(parameters[0].dtype).removeprefix("torch.")
            network += f" of {sum(p.numel() for p in parameters):,} parameters, {dtype} on {self.device}"
        if self.learned_variance and self.variance is None:
            network += ", with a learned variance"
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given |= dict(network=f"<{network}>", schedule=repr(self.schedule))
        if self.classes is not None:
            given["classes"] = f"<{len(self.classes)}: {shorten(', '.join(self.classes), 80, placeholder=' ...')}>"
        shown = given.keys() - {"network", "schedule", "classes"}
        lines = (
            f"  {name}={value!r},\n" if name in shown else f"  {name}={value},\n"
            for name, value in given.items()
            if value not in (None, ())
        )
        return f"Model(\n{''.join(lines)})"

    @property
    def device(self) -> torch.device:
        """Return the device of the network's parameters; the CPU where it has none."""
        parameter = next(_parameters(self.network), None)
        return torch.device("cpu") if parameter is None else parameter.device

    @torch.no_grad()
    def to_latents(self, images: Tensor) -> Tensor:
        """Return what the network diffuses: images [N, ...] themselves, or the latents that the codec makes of them."""
        return images if self.codec is None else self.codec.to_model(images.to(self.device))

    @torch.no_grad()
    def to_images(self, x: Tensor) -> Tensor:
        """The images of what the model has drawn, [N, ...]."""
        return x if self.codec is None else self.codec.to_images(x)

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
        """All but the weights, as JSON holds it. Under "own" are the names of what only its maker's code has: a network
        that is none of ``networks.ARCHITECTURES``, a process of a class of one's own, conditions, a codec."""
        network = unwrapped(self.network)
        if not isinstance(network, nn.Module):
            raise TypeError(f"network: expected a torch.nn.Module to describe, got {type(network).__name__}")
        ours = _describes(network)
        own = {} if ours else {"network": type(network).__name__}
        if self.schedule.own:
            fields = dataclasses.is_dataclass(self.schedule)
            own["schedule"] = repr(self.schedule) if fields else type(self.schedule).__name__
        own |= {
            condition.name: "Condition" for condition in self.conditions if condition not in _own_conditions(network)
        }
        own |= {"codec": "Codec"} if self.codec else {}
        clip = {"quantile": self.clip.q} if isinstance(self.clip, Quantile) else self.clip
        kept = dict(variance=self.variance, clip=clip, spacing=self.spacing)
        return {
            "format": FORMAT,
            "name": self.name,
            "network": network.config if ours else {},
            "schedule": {} if self.schedule.own else self.schedule.config(),
            "prediction": self.prediction,
            "shape": self.shape,
            "classes": self.classes,
            "prefix": "",
            **{name: value for name, value in kept.items() if value is not None},
            **({"architecture": type(network).__name__} if ours and not isinstance(network, UNet) else {}),
            **({"own": own} if own else {}),
        }


def check_models(**models: Any) -> None:
    """Raises TypeError for an argument that is no Model, by its name."""
    for name, model in models.items():
        if not isinstance(model, Model):
            got = f"{model!r} (load reads it)" if isinstance(model, str) else type(model).__name__
            raise TypeError(f"{name}: expected a Model, got {got}")


def check_classes(name: str, model: Model, other: Model) -> None:
    """Raises ValueError, for the argument ``name``, where a label does not mean the same to both models.

    A model without classes takes no labels, and one without names takes all names of as many classes.
    """
    if None in (model.num_classes, other.num_classes):
        return
    named = None not in (model.classes, other.classes)
    ours, theirs = (m.classes if named else m.num_classes for m in (model, other))
    if ours != theirs:
        raise ValueError(
            f"{name}: expected one with the classes of {other.name}, {theirs}, got {model.name} with {ours}"
        )


def _checked_shape(shape: Sequence[int], name: str = "shape", dimensions: int = 1) -> tuple[int, ...]:
    """A shape of at least so many dimensions. Raises TypeError or ValueError for what is none."""
    expected = "positive sizes, as (C, H, W)"
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{name}: expected {expected}, got {shape!r}")
    shape = tuple(checked_int(name, size, expected) for size in shape)
    if len(shape) < dimensions or min(shape, default=1) < 1:
        raise ValueError(f"{name}: expected {expected}, got {shape}")
    return shape


def _checked_conditions(conditions: Any) -> tuple[Condition, ...]:
    """Conditions, or shapes by name. Raises TypeError or ValueError for something else."""
    if isinstance(conditions, Mapping):
        return _of_shapes({name: _checked_shape(shape, f"conditions: {name}", 0) for name, shape in conditions.items()})
    if isinstance(conditions, Sequence) and all(isinstance(condition, Condition) for condition in conditions):
        return tuple(conditions)
    raise TypeError(
        f'conditions: expected Conditions, or shapes by name as {{"image": (3, 32, 32)}}, got {conditions!r}'
    )


def _of_shapes(shapes: Mapping[str, Sequence[int]]) -> tuple[Condition, ...]:
    """Conditions of these shapes by name: the null value of a vector or an image is 0, and a number has none."""
    return tuple(Condition(name, tuple(shape), 0.0 if shape else None) for name, shape in shapes.items())


def _own_conditions(network: Any) -> tuple[Condition, ...]:
    """The conditions in the config of a diffkern network."""
    return _of_shapes(network.config.get("conditions", {}) if _describes(network) else {})


def _describes(network: Any) -> bool:
    """Whether a file can hold all of a network: its architecture and options, and weights."""
    return ARCHITECTURES.get(type(network).__name__) is type(network)


def _parameters(network: Any) -> Iterator[Tensor]:
    return network.parameters() if isinstance(network, nn.Module) else iter(())


def shipped() -> list[str]:
    """The names of the models in this package."""
    return sorted(path.stem for path in MODELS.glob("*.safetensors") if not path.stem.endswith(".part"))


def load(
    name: str | os.PathLike, device: torch.device | str | None = None, *, into: Model | None = None, **options: Any
) -> "Model | System":
    """Load a shipped model by its name, a file of :func:`save`, the averaged model of a run's checkpoint or folder, or
    a checkpoint of another library (docs/checkpoints.md), of which stderr gets a line that says what it is.

    A file of several models, as unCLIP's, gives a :class:`diffkern.system.System`.

    into  a ``Model`` as the one that was saved, whose network gets the weights, in place: needed where that is none of
          ``networks.ARCHITECTURES``, and where there are a process of one's own, conditions that the network's config
          does not name or a codec, because a file holds no code
    options  of another library's checkpoint, which it does not hold itself: ``num_heads=4``

    No code of a file is run: pickles are read with ``weights_only=True``. Weights are float32, whatever the file holds,
    and the network is in eval mode; that of ``into`` keeps its dtypes. Raises FileNotFoundError for a name or path that
    is not there, ValueError for a file that is no model, and for a name that is both a shipped model and a path;
    TypeError for options that the checkpoint's family has not.
    """
    path, device = find(name), checked_device(device)
    if foreign.is_foreign(path):
        if into is not None:
            raise TypeError("into: expected None with a checkpoint of another library, got a Model")
        arguments, found = foreign.read(path, options)
        tell(found)
        model = Model(**arguments, name=path.stem)
        model.network.to(device)
        return model
    if options:
        raise TypeError(f"load: expected no options of a file of diffkern, got {', '.join(options)}")
    description, tensors = read(path)
    if "flow" in description:
        kind = description.get("kind")
        raise ValueError(
            f"{path}: expected a diffusion model, got a flow ({kind!r:.80}), which diffkern.flows.load reads"
        )
    if "system" in description:
        return _system(description, tensors, path, device)
    model = build(description, tensors, path, device=device, into=into)
    model.network.eval().requires_grad_(False)
    return model


def load_one(name: str | os.PathLike, device: torch.device | str | None = None) -> Model:
    """Load a model of one network. Raises TypeError for a system."""
    model = load(name, device)
    if isinstance(model, System):
        raise TypeError(f"model: expected one network, got the system {os.fspath(name)}")
    return model


def _system(
    description: dict[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike, device: torch.device
) -> System:
    """The system of a file. Raises ValueError that begins with ``path`` for whatever no diffkern has written."""
    kind = description["system"]
    if kind not in SYSTEMS:
        raise ValueError(f"{path}: system: expected one of {', '.join(SYSTEMS)}, got {kind!r:.80}")
    files = import_module(f".{kind}.files", __package__)  # which is made of models
    try:
        if description.get("format") != SYSTEM_FORMAT:
            raise ValueError(f"expected a system of format {SYSTEM_FORMAT}, got {description.get('format')!r:.80}")
        return files.read(description, tensors, path, device)
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(path)) else f"{path}: {message[:500]}") from None


def load_part(
    description: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    device: torch.device | str | None,
) -> Model:
    """The model that is the part ``name`` of a system's file, in eval mode. Raises TypeError or ValueError."""
    if not isinstance(description.get(name), dict):
        raise TypeError(f"{name}: expected an object, got {description.get(name)!r:.80}")
    model = build(description[name], tensors, path, prefix=f"{name}.", device=device)
    model.network.eval().requires_grad_(False)
    return model


def find(name: str | os.PathLike) -> Path:
    """Find the file that :func:`load` reads: a ``Path``, or text that is no shipped model's name, is a path."""
    if not isinstance(name, str | os.PathLike):
        raise TypeError(f"model: expected a name or a path, got {type(name).__name__}")
    path = Path(name)
    if isinstance(name, str) and name in shipped():
        theirs = MODELS / f"{name}.safetensors"
        if path.exists():
            raise ValueError(
                f"model: expected one model, got {name!r}, which is a shipped one and a path: "
                f"say ./{name} for the path, {theirs} for the shipped one"
            )
        return theirs
    if not path.exists():
        names = ", ".join(shipped()) or "none in this package"
        raise FileNotFoundError(
            f"model: expected a shipped model ({names}) or an existing file, got {os.fspath(name)!r}"
        )
    if not path.is_dir() or foreign.is_foreign(path):
        return path
    for file in (path / CHECKPOINT, path / hub.FILE):
        if file.exists():
            return file
    raise ValueError(f"{path}: expected a file, got a directory without {CHECKPOINT}")


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


def save(model: "Model | System", path: str | os.PathLike, *, dtype: torch.dtype = torch.float32) -> None:
    """Write ``model`` for :func:`load`, its weights as ``dtype`` (half precision halves the file)."""
    if isinstance(model, System):
        model.save(path, dtype)
        return
    check_models(model=model)
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    description = model.description()
    weights = state(unwrapped(model.network))
    weights = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in weights.items()}
    if "own" not in description:
        planned = _planned(json.loads(json.dumps(description)), len(weights), "model")
        whose = "a UNet of its config (merge or take off layers that were put around its own)"
        compare(planned.network.state_dict(), weights, "model", whose)
        _check_options(unwrapped(model.network), planned.network)
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"model: expected weights that are finite in {dtype}, got others in {key}")
    write(path, description, weights)


def _check_options(network: UNet, planned: UNet) -> None:
    """ValueError unless the modules of a network are as its config makes them."""
    modules = dict(planned.named_modules())
    for name, module in network.named_modules():
        for option, expected in vars(modules[name]).items():
            if (
                option == "training"
                or option.startswith("_")
                or not isinstance(expected, (bool, int, float, str, tuple))
            ):
                continue
            got = getattr(module, option, None)
            if got != expected:
                raise ValueError(f"model: expected {name}.{option} {expected}, as its config says, got {got}")


def build(
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike,
    *,
    prefix: str | None = None,
    device: torch.device | str | None = None,
    into: Model | None = None,
) -> Model:
    """The model that ``description`` describes, on ``device`` (None: the CPU), in training mode.

    Its weights are those of ``tensors`` whose names begin with ``prefix`` (None: the description's own). No memory is
    taken before they fit. Or ``into`` gets them. Raises ValueError that begins with ``path``, for whatever no diffkern
    has written, and for another model than ``into``.
    """
    model = plan(description, tensors, path, into=into)
    prefix = description.get("prefix", "") if prefix is None else prefix
    weights = {k.removeprefix(prefix): tensors[k] for k in tensors if k.startswith(prefix)}
    if into is None:
        fill(model.network, weights, path, device)
    else:
        restore(state(model.network.to(device or "cpu")), weights, path)
    return model


def plan(
    description: dict[str, Any], tensors: Mapping[str, Tensor], path: str | os.PathLike, *, into: Model | None = None
) -> Model:
    """The model that :func:`build` gives weights to: its network on the meta device, or that of ``into`` as it is."""
    return (
        _planned(description, len(tensors), path) if into is None else _checked(into, description, len(tensors), path)
    )


def _checked(into: Model, description: dict[str, Any], tensors: int, path: str | os.PathLike) -> Model:
    """``into``, without an engine around its network, if it is a model as ``description`` says."""
    check_models(into=into)
    try:
        check_model(description, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    mine = json.loads(json.dumps(into.description()))
    for name in ("schedule", "prediction", "shape", "classes", "network", "own"):
        if mine.get(name) != description.get(name):
            raise ValueError(f"{path}: into: expected {name} {description.get(name)}, got {mine.get(name)}")
    return dataclasses.replace(into, network=unwrapped(into.network), name=description["name"])


def _planned(description: dict[str, Any], tensors: int, path: str | os.PathLike) -> Model:
    """The model that ``description`` describes, its network on the meta device: it takes no memory, draws nothing.

    A network of more than that many ``tensors`` is refused unmade.
    """
    try:
        check_model(description, tensors)
        if "own" in description:
            listed = ", ".join(f"{name} ({kind})" for name, kind in description["own"].items())
            raise ValueError(f"into: expected a Model that has what the file cannot hold, {listed}, got None")
        with Blueprint():
            network = ARCHITECTURES[description.get("architecture", "UNet")](**description["network"]).float()
        clip = description.get("clip")
        return Model(
            network=network,
            schedule=from_config(description["schedule"]),
            prediction=description["prediction"],
            shape=description["shape"],
            classes=description["classes"],
            name=description["name"],
            variance=description.get("variance"),
            clip=Quantile(clip["quantile"]) if isinstance(clip, dict) else clip,
            spacing=description.get("spacing"),
        )
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        message, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: {message[:500]}") from None
