"""Pickles of more than tensors, read without running any code of theirs.

A pickle names classes and functions, and has them called. Here a name stands for a :class:`Record`, which keeps what it
was called with. A few functions of torch that make tensors are the only ones that run.
"""

import collections
import io
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.serialization import MAGIC_NUMBER

from .weights import Weights, read_tensors


class Record(dict):
    """An object of a class that was not imported: its arguments, its state, and its items if it was a dict."""

    args: tuple[Any, ...] = ()  # of an object that is made without a call
    state: Mapping[str, Any] = {}  # and without attributes

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__()
        self.args, self.state = args, kwargs

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, Mapping) else {}

    def append(self, item: Any) -> None:
        self[len(self)] = item

    def extend(self, items: Any) -> None:
        for item in items:
            self.append(item)

    add = append


def _load_from_bytes(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


SAFE: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("torch", "Size"): torch.Size,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("numpy", "dtype"): np.dtype,
    **{(f"numpy.{core}.multiarray", "scalar"): np.float64(0).__reduce__()[0] for core in ("core", "_core")},
}
"""The functions that a pickle may call."""


class Reader(pickle.Unpickler):
    """Makes records of what a pickle names, but for :data:`SAFE`. ``named`` has the names of what was not called."""

    named: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in SAFE:
            return SAFE[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        self.named.add(f"{module}.{name}")
        return type(name, (Record,), {"__module__": module})


def read(path: Path, unsafe: bool = False) -> tuple[Any, dict[str, Any], str]:
    """(the tensors in nested dicts, options that the objects show, how it was read).

    unsafe  run the pickle as Python does, with whatever code it holds, if nothing else reads it

    Raises ValueError for a file that is not read so.
    """
    try:
        return read_tensors(path), {}, "a pickle of tensors alone"
    except ValueError:
        pass
    try:
        named: set[str] = set()
        reader = type("Reader", (Reader,), {"named": named})
        safe = ModuleType("pickle")
        safe.Unpickler, safe.load = reader, lambda file, **_: reader(file).load()
        content = _read(path, safe)
        found: list[tuple[str, Mapping[str, Any]]] = []
        tree = _tree(content, found)
        if not Weights.of(tree, path).tensors:
            raise ValueError("no tensors")
        listed = ", ".join(sorted(named)[:3]) + (", ..." if len(named) > 3 else "")
        return tree, _options(found), f"a pickle that names code, none of which was run: {listed}"
    except Exception as error:  # whatever a pickle makes of records
        if not unsafe:
            line, *_ = str(error).splitlines() or [type(error).__name__]
            text = "expected a pickle whose tensors can be read without its code"
            raise ValueError(f"{path}: {text}, got {line[:200]}: --unsafe-pickle runs it") from None
    content = _read(path, pickle)
    return _modules(content), {}, "a pickle whose code was run"


MAGIC = MAGIC_NUMBER.to_bytes(10, "little")
"""The first pickle of a file of ``torch.save`` before 1.6, and of ``_use_new_zipfile_serialization=False``."""


def _read(path: Path, module: Any) -> Any:
    with open(path, "rb") as file:
        if zipfile.is_zipfile(path) or MAGIC in file.read(64):
            return torch.load(path, map_location="cpu", pickle_module=module, weights_only=False)
        file.seek(0)
        return module.Unpickler(file).load()


def _tree(content: Any, found: list[tuple[str, Mapping[str, Any]]]) -> Any:
    """Tensors by the names that ``state_dict`` gives them; ``found`` gets (class, attributes) of each module."""
    if isinstance(content, Record):
        kind, state = type(content).__name__, content.state
        if kind == "_reconstruct_persistent_obj":  # NVIDIA's: the class and its source are in the file
            (meta,) = content.args
            kind, state = meta.get("class_name", kind), meta.get("state") or {}
        parts: dict[str, Any] = {}
        if "_parameters" in state:
            found.append((kind, state))
            for group in ("_parameters", "_buffers", "_modules"):
                parts |= {name: _tree(part, found) for name, part in (state.get(group) or {}).items()}
        return parts | {str(key): _tree(value, found) for key, value in content.items()}
    if isinstance(content, Mapping):
        return {str(key): _tree(value, found) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_tree(value, found) for value in content]
    return content


def _options(found: list[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Options of :mod:`.edm` and :mod:`.edm2` that the attributes of their networks show."""
    from .edm import OPTIONS, PRECONDS

    for kind, state in found:
        if kind in PRECONDS:
            told = {name: float(state[name]) for name in OPTIONS if name in state and name != "precond"}
            return {"precond": PRECONDS[kind]} | told
        if kind == "Precond":
            heads = [s["out_channels"] // s["num_heads"] for k, s in found if k == "Block" and s.get("num_heads")]
            return {"sigma_data": float(state["sigma_data"])} | ({"head_dim": heads[0]} if heads else {})
    return {}


def _modules(content: Any) -> Any:
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, Mapping):
        return {str(key): _modules(value) for key, value in content.items()}
    return content if isinstance(content, Tensor) else None
