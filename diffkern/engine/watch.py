"""Is a network what it was when it was captured?

A capture holds what Python did: which modules, classes, options and processors it found. All of these are looked at in
every call, and so are the numbers of the weights. What is not looked at: functions outside classes and
``torch.nn.functional``, and what they read.
"""

import itertools
import operator
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .. import _C

MANY = 100_000  # objects: more than this are not looked at in every call

_LEAVES = (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, torch.Generator)
_IMMUTABLE = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.layout)
_MEMBERS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}  # the attributes that every module has


class Modules:
    """A network's modules, with all that they hold in attributes, and their classes. It holds tables, not the network.

    tensors  its parameters and buffers, and tensors among its attributes
    why_not  why it must run by itself: hooks, forwards of single modules; or ""
    """

    def __init__(self, network: nn.Module):
        self.tensors: list[Tensor] = []
        self._tables: list[dict] = []  # of attributes
        self._getters: list[Callable[[dict], Any]] = []  # of what is looked at in each of them
        self._held: list[tuple[dict, Any]] = []  # where tensors are among them
        self._lists: list[Any] = []
        self._owners: list[dict] = []  # of members
        self._empty: list[Any] = []
        self._hooks: list[dict] = []  # dictionaries for hooks, empty ones
        self._handles = RemovableHandle.next_id
        self.why_not = ""
        classes = self._explore(network)
        self._classes = [vars(one) for one in dict.fromkeys(itertools.chain.from_iterable(c.__mro__ for c in classes))]
        self._classes.append(vars(F))
        self._seen = self._find()

    def changed(self) -> bool:
        """Does a module have another attribute, member, hook or class?"""
        if self._hooked() or any(self._empty):
            return True
        try:
            members, values = self._find()
            if len(members) != len(self._seen[0]) or any(map(operator.is_not, members, self._seen[0])):
                return True
            return values != self._seen[1]
        except Exception:  # an attribute is gone, or values do not compare
            return True

    def _hooked(self) -> bool:
        """Were hooks added? Torch numbers them: while there are no new numbers, nobody looks."""
        if self._handles != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._handles = RemovableHandle.next_id
        return False

    def _find(self) -> tuple[list[Any], list[Any]]:
        """(members, which are compared by what they are; other values)."""
        every = itertools.chain.from_iterable
        values = [get(table) for get, table in zip(self._getters, self._tables, strict=True)]
        values += map(len, self._tables)
        values += every(self._lists)
        values += map(type, self._holders)
        values += every(table.values() for table in self._classes)
        members = [*every(map(dict.values, self._owners)), *(table[key] for table, key in self._held)]
        return members, values

    def _explore(self, network: nn.Module) -> set[type]:
        seen: set[int] = set()
        classes: set[type] = set()
        self._holders: list[Any] = []  # whose class may be set; modules are held by their parents, the root by nobody
        stack: list[Any] = [network]
        for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
            self._watch_hooks(hooks, "there are global hooks")
        while stack:
            thing = stack.pop()
            if isinstance(thing, (*_IMMUTABLE, *_LEAVES)) or id(thing) in seen:
                continue
            seen.add(id(thing))
            if len(seen) > MANY:
                self.why_not = f"its modules hold more than {MANY} things"
                break
            if isinstance(thing, Tensor):
                self.tensors.append(thing)
            elif isinstance(thing, nn.Module):
                classes.add(type(thing))
                self._module(thing, stack, root=thing is network)
            elif isinstance(thing, dict):
                self._attributes(thing, list(thing), stack)
                if type(thing) is not dict and hasattr(thing, "__dict__"):
                    self._attributes(vars(thing), list(vars(thing)), stack)
            elif isinstance(thing, (list, set, tuple, frozenset)):
                if isinstance(thing, (list, set)):
                    (self._lists if thing else self._empty).append(thing)
                stack += thing
            elif isinstance(getattr(thing, "__dict__", None), dict):
                classes.add(type(thing))
                self._holders.append(thing)
                self._attributes(vars(thing), list(vars(thing)), stack)
        return classes

    def _module(self, module: nn.Module, stack: list[Any], *, root: bool) -> None:
        table = module.__dict__
        if "forward" in table or "__call__" in table:
            self.why_not = f"a {type(module).__name__} has a forward of its own"
        if not root:
            self._holders.append(module)
            for name in _HOOKS:
                self._watch_hooks(table[name], f"a {type(module).__name__} has hooks")
        self._attributes(table, [name for name in table if name not in _OF_TORCH], stack)
        for name in _MEMBERS:
            (self._owners if table[name] else self._empty).append(table[name])
            stack += table[name].values()

    def _watch_hooks(self, hooks: dict, why_not: str) -> None:
        if hooks:
            self.why_not = why_not
            self._attributes(hooks, list(hooks), [])
        else:
            self._hooks.append(hooks)

    def _attributes(self, table: dict, keys: list[Any], stack: list[Any]) -> None:
        """What is in a table, under these of its keys."""
        if not keys:
            self._empty.append(table)
            return
        self._tables.append(table)
        self._getters.append(operator.itemgetter(*keys))
        self._held += [(table, key) for key in keys if isinstance(table[key], Tensor)]
        stack += [table[key] for key in keys]


class Numbers:
    """The numbers of tensors. Torch counts what it writes to one; fused optimizers, ``.data`` and NumPy write behind
    its back: hence the numbers themselves, all of them if exact, else 16 of each tensor.

    why_not  why no kernel can read them, or ""
    """

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self._counted = [tensor for tensor in tensors if not tensor.is_inference()]  # those have no version
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        self.why_not = "" if all(map(_native, floats)) else "a weight is not float32 on the CPU, in one piece"
        self._hash = torch.zeros(1, dtype=torch.int64, device="cpu")
        self._places, self._versions = self._find_places(), self._find_versions()
        self._hashing: dict[bool, _C.Program] = {}
        self._seen: dict[bool, int] = {}
        for exact in () if self.why_not else (False, True):
            self._hashing[exact] = self._record(floats, exact)
            self._seen[exact] = int(self._hash)

    def changed(self, exact: bool = False) -> bool:
        if self._find_places() != self._places or self._find_versions() != self._versions:
            return True
        return bool(self._hashing) and self._look(exact) != self._seen[exact]

    @property
    def learn(self) -> bool:
        """Does one of them require a gradient?"""
        return any(tensor.requires_grad for tensor in self.tensors)

    def _find_places(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def _find_versions(self) -> list[int]:
        return [tensor._version for tensor in self._counted]

    def _record(self, tensors: list[Tensor], exact: bool) -> _C.Program:
        """Look at the tensors, and record it: to run it again converts no list of them."""
        program = _C.Program()
        with program:
            torch.ops.diffkern.fingerprint(self._hash, tensors, exact)
        return program

    def _look(self, exact: bool) -> int:
        self._hashing[exact].run()
        return int(self._hash)


def _native(tensor: Tensor) -> bool:
    """Is it float32 on the CPU, in one piece?"""
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):  # a subclass may hold its numbers elsewhere
        return False
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return False
    return torch.ops.aten.is_non_overlapping_and_dense(tensor) and tensor.untyped_storage().nbytes() >= tensor.nbytes
