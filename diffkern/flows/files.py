"""Flows as files: safetensors, with the flow's options as JSON in its metadata under "diffkern"."""

import os
from pathlib import Path
from typing import Any

import torch

from ..io.files import CHECKPOINT, compare, read, restore, state, write
from ..model import checked_device
from ..networks.blueprint import Blueprint
from .architectures import KINDS
from .flow import FORMAT, Flow
from .layers import Linear, Permutation


def save(flow: Flow, path: str | os.PathLike, *, dtype: torch.dtype = torch.float32) -> None:
    """Write a ``RealNVP`` or ``Glow`` for :func:`load`, its weights as ``dtype`` (half precision halves the file).

    Raises TypeError for another flow, ValueError for a dtype that does not hold the weights, OSError for the path.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"flow: expected a Flow, got {type(flow).__name__}")
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    weights = {k: tensor.to(dtype) if tensor.is_floating_point() else tensor for k, tensor in state(flow).items()}
    for key, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"flow: expected weights that are finite in {dtype}, got others in {key}")
    write(path, flow.description(), weights)


def load(path: str | os.PathLike, device: torch.device | str | None = None) -> Flow:
    """Load a flow from a file of :func:`save`, or the averaged one of a training run's checkpoint or folder.

    Weights are float32 and frozen, and the flow is in eval mode. Raises FileNotFoundError for a path that is not there,
    ValueError for a file that holds no flow.
    """
    path = Path(path)
    path, device = (path / CHECKPOINT if path.is_dir() else path), checked_device(device)
    flow = build(*read(path), path)
    return flow.to(device).eval().requires_grad_(False)


def check_flow(description: dict[str, Any], tensors: int) -> None:
    """Raise TypeError or ValueError for a description that is not a flow's, whatever number of tensors it has."""
    version, kind, config = (description.get(key) for key in ("flow", "kind", "config"))
    if type(version) is not int or version != FORMAT:
        raise ValueError(f"expected a flow of format {FORMAT}, got {', '.join(description)}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r:.80}")
    if not isinstance(config, dict) or not isinstance(description.get("prefix"), str):
        raise TypeError(f"config: expected the options of a {kind}, and a prefix, got {description!r:.200}")


def build(description: dict[str, Any], tensors: dict[str, torch.Tensor], path: Path, prefix: str | None = None) -> Flow:
    """The flow that a file describes, with the weights whose names begin with ``prefix`` (None: the description's own).

    Memory is taken once names and shapes agree. Raises ValueError that begins with ``path``.
    """
    try:
        check_flow(description, len(tensors))
        kind, config = description["kind"], description["config"]
        with Blueprint():
            flow = KINDS[kind](**config | {"seed": None})
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        message, *_ = str(error).splitlines() or [type(error).__name__]
        raise ValueError(f"{path}: {message[:500]}") from None
    prefix = description["prefix"] if prefix is None else prefix
    weights = {k.removeprefix(prefix): tensor for k, tensor in tensors.items() if k.startswith(prefix)}
    compare(state(flow), weights, path, f"a {kind} of its config")
    flow.to_empty(device="cpu")
    restore(state(flow), weights, path)
    for layer in flow.modules():
        if isinstance(layer, Permutation | Linear) and not layer.is_bijection():
            raise ValueError(f"{path}: order: expected a permutation, and signs of -1 or 1, got others")
    flow.config = config
    return flow
