"""diffusers' folders: a pipeline for pixels, or its ``UNet2DModel``, and the scheduler beside it.

A U-Net that ours can be is ours, with the tensors of the file; any other is diffusers' own class.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from ...conditions import Condition
from ...networks import UNet
from ...networks.diffusers import DEFAULTS, config_of, options_of
from .. import pipelines
from ..files import write_atomically
from .weights import Option, Weights, fill, read_tensors

NAME = "diffusers"
ANCHOR = "time_embedding.linear_1.weight"
OPTIONS = {
    "scheduler": Option(object, "a scheduler of diffusers, where the folder has none"),
    "ignore": Option(list, "settings of the scheduler to leave aside"),
}
INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
OURS = "diffkern.json"
"""The file that :func:`write_folder` adds, which diffusers does not read: the names of classes, and whether one more is
the null class."""
STEM = "diffusion_pytorch_model"  # variants follow: .fp16
WEIGHTS = (f"{STEM}.safetensors", f"{STEM}.bin")
SHARDS = f"{WEIGHTS[0]}.index.json"
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""The names of attention's layers in files of diffusers before 0.18, and today's."""


class DiffusersUNet(nn.Module):
    """diffusers' ``UNet2DModel``, called as a network of a ``Model`` is."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        kind, embeds = network.config["class_embed_type"], network.config["num_class_embeds"]
        self.num_classes = embeds if kind is None else None  # "timestep": labels are any numbers
        self.null_class = kind == "identity" or (kind is None and embeds is None)

    def forward(
        self, x_t: Tensor, t: Tensor, labels: Tensor | None = None, *, class_embedding: Tensor | None = None
    ) -> Tensor:
        """class_embedding: [N, E] of a network with ``class_embed_type="identity"``, in the place of labels."""
        return self.network(x_t, t, labels if class_embedding is None else class_embedding).sample


def is_folder(path: Path) -> bool:
    """Whether a folder holds a pipeline or a network of diffusers."""
    return (path / INDEX).exists() or (path / CONFIG).exists()


def read(weights: Weights, options: Mapping[str, Any]) -> dict[str, Any]:
    """Refuse a file that is alone: its config has options that no tensor shows."""
    raise ValueError(f"expected {CONFIG} beside a UNet2DModel of diffusers, got the tensors alone")


def read_folder(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a ``Model`` of a folder, or of a file of weights in one."""
    folder = path if path.is_dir() else path.parent
    if (folder / INDEX).exists():
        _check_pipeline(_json(folder / INDEX))
    root = folder if (folder / INDEX).exists() else folder.parent
    unet = folder / "unet" if (folder / "unet" / CONFIG).exists() else folder
    config = _json(unet / CONFIG)
    ours = _json(root / OURS) if (root / OURS).exists() else {}
    if not isinstance(ours.get("classes"), list | None):
        raise ValueError(f"classes: expected a list of names in {OURS}, got {ours['classes']!r:.80}")
    network = _network(config, _tensors(path if path.is_file() else unet), null_class=ours.get("null_class") is True)
    scheduler = options.get("scheduler") or _scheduler([root / "scheduler", root, unet])
    told = pipelines.told_by(config, scheduler, options.get("ignore", ()))
    embedded = config.get("class_embed_type") == "identity"
    conditions = (Condition("class_embedding", (4 * config["block_out_channels"][0],)),) if embedded else ()
    return dict(network=network, conditions=conditions, classes=ours.get("classes"), **told)


def write_folder(
    folder: Path, network: UNet, *, shape: tuple[int, ...], classes: Sequence[str] | None = None, **kept: Any
) -> None:
    """Write a ``DDPMPipeline`` that diffusers loads: its ``UNet2DModel``, and its scheduler.

    kept  what :func:`diffkern.io.pipelines.scheduler_config` takes

    Raises ValueError for what diffusers has not, and for a folder that holds something else; OSError.
    """
    if not isinstance(network, UNet):
        raise ValueError(f"network: expected a UNet, which diffusers has too, got {type(network).__name__}")
    config = config_of(network) | {"sample_size": shape[1] if shape[1] == shape[2] else shape[1:]}
    scheduler = pipelines.scheduler_config(**kept)
    outputs, learned = network.conv_out.out_channels, kept["variance"] == "learned"
    if learned != (outputs == 2 * shape[0]):
        expected = "a fixed one" if learned else "'learned'"
        raise ValueError(
            f"variance: expected {expected}, as diffusers has for {outputs} channels of the network's output, "
            f"got {kept['variance']!r}"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).exists():
        raise ValueError(f"{folder}: expected an empty folder or one of diffusers, got another")
    for part in ("unet", "scheduler"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous() for name, tensor in network.state_dict().items()}
    write_atomically(folder / "unet" / WEIGHTS[0], lambda path: save_file(weights, path, metadata={"format": "pt"}))
    index = {name: ["diffusers", kind] for name, kind in (("scheduler", "DDPMScheduler"), ("unet", "UNet2DModel"))}
    for name, content in (
        (f"unet/{CONFIG}", {"_class_name": "UNet2DModel"} | config),
        (f"scheduler/{SCHEDULER}", scheduler),
        (INDEX, {"_class_name": "DDPMPipeline"} | index),
        (OURS, {"classes": classes, "null_class": network.null_class}),
    ):
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(folder / name, lambda path, text=text: path.write_text(text))


def _check_pipeline(index: Mapping[str, Any]) -> None:
    """Raise ValueError unless a pipeline is a ``UNet2DModel`` and a scheduler."""
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[-1] is not None}
    others = {name: part[-1] for name, part in parts.items() if name not in ("unet", "scheduler")}
    others |= {"unet": parts["unet"][-1]} if "unet" in parts and parts["unet"][-1] != "UNet2DModel" else {}
    if others or "unet" not in parts:
        listed = ", ".join(f"{kind} as {name}" for name, kind in others.items()) or "no unet"
        raise ValueError(f"expected a pipeline of a UNet2DModel and a scheduler, got {listed}")


def _network(config: Mapping[str, Any], tensors: Mapping[str, Tensor], null_class: bool = False) -> nn.Module:
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"expected a UNet2DModel, got a {kind}")
    known = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(known.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(f"expected the options of a UNet2DModel, got also {', '.join(unknown)}")
    tensors = {_renamed(name): tensor for name, tensor in tensors.items()}
    try:
        options = options_of(known)
    except ValueError:  # an option that our U-Net has not
        from diffusers import UNet2DModel

        return DiffusersUNet(fill(lambda: UNet2DModel(**known), tensors))
    if null_class and options["num_classes"]:
        options |= {"num_classes": options["num_classes"] - 1, "null_class": True}
    return fill(lambda: UNet(**options), tensors)


def _renamed(name: str) -> str:
    parts = name.split(".")
    if "attentions" in parts and parts[-2] in OLD_NAMES:
        parts[-2] = OLD_NAMES[parts[-2]]
    return ".".join(parts)


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.is_file():
        return read_tensors(path)
    if (path / SHARDS).exists():
        names = sorted(set(_json(path / SHARDS)["weight_map"].values()))
        return {key: tensor for name in names for key, tensor in read_tensors(path / Path(name).name).items()}
    for name in WEIGHTS:
        if (path / name).exists():
            return read_tensors(path / name)
    raise ValueError(f"expected one of {', '.join(WEIGHTS)} in {path}, got none")


def _scheduler(folders: list[Path]) -> Any:
    for folder in folders:
        if (folder / SCHEDULER).exists():
            import diffusers

            config = _json(folder / SCHEDULER)
            kind = getattr(diffusers, str(config.get("_class_name")), None)
            if not hasattr(kind, "from_config"):
                raise ValueError(f"expected a scheduler of diffusers, got {config.get('_class_name')}")
            known = inspect.signature(kind.__init__).parameters  # from_config imports every scheduler: seconds
            return kind(**{name: value for name, value in config.items() if name in known})
    raise ValueError(f"scheduler: expected {SCHEDULER} in the folder, or it as an option, got none")


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"expected JSON in {path.name}, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"expected an object in {path.name}, got {content!r}")
    return content
