"""The tensors of a checkpoint, by name, and the renamings that make them those of a network of ours."""

import pickle
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...networks.blueprint import Blueprint
from ..files import compare, floating

MOST_TENSORS = 100_000
DEEPEST = 12  # dicts and lists, one in another


class Option(NamedTuple):
    """An option of :func:`diffkern.load` for a file: its type, and a text that says what it is."""

    kind: type
    text: str

    def __str__(self) -> str:
        return self.text

    def check(self, name: str, value: Any) -> None:
        """TypeError for a value of another kind. An int is a float, and any sequence a list."""
        kinds = {int: Integral, float: Real, list: Collection}
        wrong = isinstance(value, bool) and self.kind in (int, float) or isinstance(value, str) and self.kind is list
        if wrong or not isinstance(value, kinds.get(self.kind, self.kind)):
            raise TypeError(f"{name}: expected {self.kind.__name__}, got {value!r:.80}")


def is_ours(path: Path) -> bool | None:
    """Whether a safetensors file has our description; None for a file that is none."""
    try:
        with safe_open(path, framework="pt") as file:
            return "diffkern" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return None


def is_pickle(path: Path) -> bool:
    """Whether a file is one of ``torch.save``, or any other pickle."""
    try:
        with open(path, "rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    except OSError:
        return False


def read_tensors(path: Path) -> Any:
    """Read a file: the tensors of safetensors, or the tree of a pickle of tensors alone. Tensors are mapped.

    Raises ValueError for a pickle of anything else.
    """
    if not is_pickle(path):
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another pickle protocol than torch's: read or refused, here
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (EOFError, pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile) as error:
        line, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path}: expected a pickle of tensors alone, got {line[:200]}: diffkern convert reads more kinds"
        ) from None


@dataclass(frozen=True)
class Weights:
    """The tensors below ``prefix`` in a checkpoint, by the rest of their names; ``all`` has every one of the file."""

    tensors: dict[str, Tensor]
    path: Path
    all: Mapping[str, Any]
    prefix: str = ""

    @classmethod
    def of(cls, tree: Any, path: Path) -> "Weights":
        """All tensors of nested dicts and lists, by the path to each; other values are in ``all`` alone."""
        every = dict(_leaves(tree, "", DEEPEST))
        if len(every) > MOST_TENSORS:
            raise ValueError(f"{path}: expected at most {MOST_TENSORS} tensors, got {len(every)}")
        return cls({name: value for name, value in every.items() if isinstance(value, Tensor)}, path, every)

    def below(self, anchor: str) -> "Weights | None":
        """The part of them where ``anchor`` is a name, averaged weights before others; None where there is none."""
        prefixes = [name.removesuffix(anchor) for name in self.tensors if f".{name}".endswith(f".{anchor}")]
        if not prefixes:
            return None
        prefix = min(prefixes, key=lambda prefix: ("ema" not in prefix, len(prefix)))
        tensors = {k.removeprefix(prefix): t for k, t in self.tensors.items() if k.startswith(prefix)}
        return Weights(tensors, self.path, self.all, prefix)

    def beside(self, name: str) -> Any:
        """Return the entry of that name in the module that holds this network as ``model``, or None."""
        return self.all.get(f"{self.prefix.removesuffix('model.')}{name}")

    def has(self, prefix: str) -> bool:
        """Whether a tensor's name is ``prefix``, or begins with it and a dot."""
        return any(name == prefix or name.startswith(f"{prefix}.") for name in self.tensors)

    def count(self, prefix: str) -> int:
        """How many numbers follow ``prefix`` in the names: 0 up to one less."""
        numbers = {name[len(prefix) + 1 :].split(".")[0] for name in self.tensors if name.startswith(f"{prefix}.")}
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def _leaves(tree: Any, prefix: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        items = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list | tuple):
        items = [(str(index), value) for index, value in enumerate(tree)]
    else:
        yield prefix, tree
        return
    for key, value in items if depth else ():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else key, depth - 1)


# --- blocks of our U-Net, by the names of others ---

Places = dict[str, str]
"""A block of our U-Net -> where a checkpoint has it."""

Parts = Sequence[tuple[str, str]]
"""(a part of a block of ours, its name in a checkpoint); ("", "") for a block that is one layer."""


ATTENTION = ("group_norm", "qkv", "to_q", "to_k", "to_v", "to_out.0")
"""Parts of an attention block."""


def unet_weights(
    weights: Weights,
    places: Places,
    parts: Parts,
    split: Callable[[Tensor, str], tuple[Tensor, Tensor, Tensor]] | None = None,
    ignore: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of our U-Net, by its names.

    places  where each block is; those that are not there are left out
    parts   the parts of blocks; those that are not there are left out
    split   (the weight or bias of q, k and v in one, its block) -> the three; their part is named "qkv"
    ignore  names that have no meaning here

    Raises ValueError for tensors that stand nowhere in these.
    """
    left, made = dict(weights.tensors), {}
    for block, place in places.items():
        for part, name in parts:
            if ".resnets." in block and part in ATTENTION:  # in the same place as its residual block
                continue
            source = f"{place}.{name}" if name else place
            for kind in ("weight", "bias"):
                tensor = left.pop(f"{source}.{kind}", None)
                if tensor is None:
                    continue
                if part == "qkv":
                    for target, third in zip(("to_q", "to_k", "to_v"), split(tensor, block), strict=True):
                        made[f"{block}.{target}.{kind}"] = _as_linear(third)
                else:
                    target = f"{block}.{part}" if part else block
                    made[f"{target}.{kind}"] = _as_linear(tensor) if ".to_" in target else tensor
    left = {name: tensor for name, tensor in left.items() if name not in ignore}
    if left:
        raise ValueError(f"expected the tensors of a U-Net, got {len(left)} others: {', '.join([*left][:3])}")
    return made


def _as_linear(tensor: Tensor) -> Tensor:
    """The weight of a convolution of 1 or 1x1 as that of a linear layer."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def split_qkv(tensor: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one weight or bias, whose rows are in this ``order`` of (h)ead, (3) and (d) channel of a head."""
    sizes = {"h": heads, "3": 3, "d": len(tensor) // (3 * heads)}
    parts = tensor.unflatten(0, tuple(sizes[axis] for axis in order)).movedim(order.index("3"), 0)
    return tuple(part.reshape(-1, *tensor.shape[1:]) for part in parts)


def unet_places(levels: int, blocks: int, side: Callable[[str, int, int], tuple[str, str]], others: Places) -> Places:
    """Return the places of all blocks of a U-Net.

    side    ("down" or "up", level or position on the way up, block) -> places of its residual block and its attention;
            block is ``blocks`` (+ 1 on the way up) for the step to the next resolution, whose place is the first
    others  the places of all else
    """
    places = dict(others)
    for way, count in (("down", blocks), ("up", blocks + 1)):
        for level in range(levels):
            for j in range(count):
                names = side(way, level, j)
                for kind, place in zip(("resnets", "attentions"), names, strict=True):
                    places[f"{way}_blocks.{level}.{kind}.{j}"] = place
            if level < levels - 1:
                places[f"{way}_blocks.{level}.{way}samplers.0"] = side(way, level, count)[0]
    return places


def unet_options(made: Mapping[str, Tensor], levels: int, blocks: int) -> dict[str, Any]:
    """The options of our U-Net that names and shapes tell."""
    channels, in_channels = made["conv_in.weight"].shape[:2]
    widths = [len(made[f"down_blocks.{level}.resnets.{blocks - 1}.conv2.weight"]) for level in range(levels)]
    first = "down_blocks.0.resnets.0"
    attention = [level for level in range(levels) if f"down_blocks.{level}.attentions.0.to_q.weight" in made]
    embedding = made["time_embedding.linear_1.weight"].shape[1]
    labels = made.get("class_embedding.weight")
    return dict(
        in_channels=in_channels,
        out_channels=len(made["conv_out.weight"]),
        channels=channels,
        channel_mult=tuple(w // channels if w % channels == 0 else w / channels for w in widths),
        blocks=blocks,
        attention_levels=tuple(attention),
        mid_attention="mid_block.attentions.0.to_q.weight" in made,
        num_classes=None if labels is None else len(labels),
        null_class=labels is None,
        scale_shift=len(made[f"{first}.time_emb_proj.weight"]) == 2 * widths[0],
        resample_blocks="down_blocks.0.downsamplers.0.conv1.weight" in made,
        embedding_channels=None if embedding == channels else embedding,
    )


def fill(make: Callable[[], nn.Module], weights: Mapping[str, Tensor]) -> nn.Module:
    """The network of ``make`` with these very tensors, or float32 copies of those that are not float32.

    Raises ValueError for other names or shapes than it has.
    """
    with Blueprint():
        network = make()
    planned = network.state_dict()
    compare(floating(planned), weights, "network", f"a {type(network).__name__} of their shapes")
    # A file may have a tensor's parts out of order: the network has them contiguous.
    network.load_state_dict({name: tensor.float().contiguous() for name, tensor in weights.items()}, assign=True)
    return network.eval().requires_grad_(False)
