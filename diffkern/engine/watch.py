"""Is a network what it was when it was captured?

A capture holds what Python did: which modules, classes, options and processors it found. All of these are looked at in
every call, and so are the numbers of the weights. What is not looked at: functions outside classes and
``torch.nn.functional``, and the global variables that they read; and the contents of C types without members.
"""

import array
import collections
import functools
import itertools
import operator
import pathlib
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from .. import _C

MANY = 100_000  # objects: more than this are not looked at in every call
MANY_BYTES = 1 << 16  # of an array: more than this are not looked at in every call

_LEAVES = (type, types.BuiltinFunctionType, types.ModuleType, torch.Generator, fx.Graph, fx.Node)
_IMMUTABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, slice, pathlib.PurePath, np.generic, np.dtype),
    *(torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format),
)
_UNWATCHED = (*_IMMUTABLE, *_LEAVES)
_MUTABLE = (list, set, collections.deque)
_CONTAINERS = (dict, *_MUTABLE, tuple, frozenset)
_ARRAYS = (np.ndarray, bytearray, array.array, memoryview)
_UNSET = object()  # what a slot or a cell holds that holds nothing
_MEMBERS = ("_parameters", "_buffers", "_modules")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}  # the attributes that every module has


class Modules:
    """A network's modules, with all that they hold in attributes, and their classes. It holds tables, not the network.

    tensors     its parameters and buffers, and tensors among its attributes
    why_not     why it must run by itself: hooks, forwards of single modules; or ""
    leads_back  does one of the tables hold the network, as by a bound method?
    """

    def __init__(self, network: nn.Module):
        self.tensors: list[Tensor] = []
        self._attributes_of: list[tuple[dict, Callable[[dict], Any]]] = []  # tables, and what is looked at in each
        self._tables: list[dict] = []
        self._alike: list[tuple[dict, Any]] = []  # where a value is that another may be equal to
        self._lists: list[Any] = []
        self._looks: list[Callable[[], list[Any]]] = []  # at slots, cells, arrays, and lists of tensors
        self._owners: list[dict] = []  # of members
        self._empty: list[Any] = []
        self._hooks: list[dict] = []  # dictionaries for hooks, empty ones
        self._handles = RemovableHandle.next_id
        self.why_not, self.leads_back = "", False
        classes = self._explore(network)
        self._classes = [vars(one) for one in dict.fromkeys(itertools.chain.from_iterable(c.__mro__ for c in classes))]
        self._classes.append(vars(F))
        self._seen = self._find()

    def changed(self) -> bool:
        """Does a module have another attribute, member, hook or class?"""
        if self._hooked() or any(self._empty):
            return True
        try:
            values, alike = self._find()
            if len(alike) != len(self._seen[1]) or any(map(operator.is_not, alike, self._seen[1])):
                return True
            return values != self._seen[0]
        except Exception:  # an attribute is gone, or values do not compare: two tensors of several elements
            return True

    def _hooked(self) -> bool:
        """Were hooks added? Torch numbers them: while there are no new numbers, nobody looks."""
        if self._handles != RemovableHandle.next_id:
            if any(self._hooks):
                return True
            self._handles = RemovableHandle.next_id
        return False

    def _find(self) -> tuple[list[Any], list[Any]]:
        """(values, those of them that must be the same and not only equal). To compare equal lists of the same things
        asks none of them, so that it is faster than to look at each."""
        every = itertools.chain.from_iterable
        values = [get(table) for table, get in self._attributes_of]
        values += map(len, self._tables)
        values += every(map(dict.values, self._owners))
        values += every(self._lists)
        values += map(len, self._lists)
        values += map(type, self._holders)
        values += every(table.values() for table in self._classes)
        alike = [table[key] for table, key in self._alike]
        for look in self._looks:
            for value in look():
                (alike if isinstance(value, Tensor) else values).append(value)
        return values, alike

    def _explore(self, network: nn.Module) -> set[type]:
        seen: set[int] = set()
        classes: set[type] = set()
        self._holders: list[Any] = []  # whose class may be set; modules are held by their parents, the root by nobody
        stack: list[Any] = [network]
        for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
            self._watch_hooks(hooks, "there are global hooks")
        while stack:
            thing = stack.pop()
            if isinstance(thing, _UNWATCHED):
                continue
            if id(thing) in seen:
                self.leads_back |= thing is network
                continue
            seen.add(id(thing))
            if len(seen) > MANY:
                self.why_not, self.leads_back = f"its modules hold more than {MANY} things", True
                break
            if isinstance(thing, Tensor):
                self.tensors.append(thing)
            elif isinstance(thing, nn.Module):
                classes.add(type(thing))
                self.leads_back |= vars(thing) is vars(network) and thing is not network  # as an optimized one
                self._module(thing, stack, root=thing is network)
            elif isinstance(thing, _CONTAINERS):
                self._container(thing, stack)
            elif isinstance(thing, types.FunctionType):
                stack += [*(thing.__closure__ or ()), *(thing.__defaults__ or ()), thing.__kwdefaults__]
            elif isinstance(thing, types.CellType):
                self._look(functools.partial(_contents, thing), stack)
            elif isinstance(thing, _ARRAYS):
                self._array(thing)
            else:
                self._object(thing, stack, classes)
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
            self._add(table[name], list(table[name]), stack)

    def _container(self, thing: Any, stack: list[Any]) -> None:
        if isinstance(thing, dict):
            self._attributes(thing, list(thing), stack)
        elif isinstance(thing, _MUTABLE) and any(isinstance(item, Tensor) for item in thing):
            self._look(functools.partial(list, thing), stack)
        else:
            if isinstance(thing, _MUTABLE):
                (self._lists if thing else self._empty).append(thing)
            stack += thing
        if isinstance(getattr(thing, "__dict__", None), dict):  # of a subclass
            self._attributes(vars(thing), list(vars(thing)), stack)

    def _object(self, thing: Any, stack: list[Any], classes: set[type]) -> None:
        """Watch an object's ``__dict__``, its ``__slots__``, and the members of C types, as those of a partial."""
        has_dict, members = isinstance(getattr(thing, "__dict__", None), dict), _members(type(thing))
        if has_dict or members:
            classes.add(type(thing))
            self._holders.append(thing)
        if has_dict:
            self._attributes(vars(thing), list(vars(thing)), stack)
        if members:
            self._look(functools.partial(_held_by, thing, members), stack)

    def _array(self, thing: Any) -> None:
        values = np.asarray(thing)
        if values.nbytes > MANY_BYTES or values.dtype.hasobject:
            what = "objects" if values.dtype.hasobject else f"{values.nbytes} bytes"
            self.why_not = f"its modules hold a {type(thing).__name__} of {what}"
        else:
            self._looks.append(functools.partial(_numbers, thing))

    def _look(self, look: Callable[[], list[Any]], stack: list[Any]) -> None:
        self._looks.append(look)
        stack += look()

    def _watch_hooks(self, hooks: dict, why_not: str) -> None:
        if hooks:
            self.why_not = why_not
            self._attributes(hooks, list(hooks), [])
        else:
            self._hooks.append(hooks)

    def _attributes(self, table: dict, keys: list[Any], stack: list[Any]) -> None:
        """Watch the values of a table under these of its keys."""
        if not keys:
            self._empty.append(table)
            return
        self._tables.append(table)
        self._attributes_of.append((table, operator.itemgetter(*keys)))
        self._add(table, keys, stack)

    def _add(self, table: dict, keys: list[Any], stack: list[Any]) -> None:
        self._alike += [(table, key) for key in keys if _may_equal_another(table[key])]
        stack += [table[key] for key in keys]


def _may_equal_another(value: Any) -> bool:
    """Is it a tensor or module that another may be equal to? Two tensors of several elements do not compare."""
    if isinstance(value, Tensor):
        return value.numel() == 1 or type(value) not in (Tensor, nn.Parameter, nn.Buffer)
    return isinstance(value, nn.Module) and type(value).__eq__ is not object.__eq__


def _members(kind: type) -> list[Any]:
    """The descriptors of its ``__slots__``, or of what a C type shows of itself (but for pointers)."""
    items = itertools.chain.from_iterable(vars(one).items() for one in kind.__mro__)
    return [item for name, item in items if type(item) is types.MemberDescriptorType and not name.endswith("offset__")]


def _held_by(thing: Any, members: list[Any]) -> list[Any]:
    values = []
    for member in members:
        try:
            values.append(member.__get__(thing))
        except AttributeError:
            values.append(_UNSET)
    return values


def _contents(cell: types.CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:
        return [_UNSET]


def _numbers(thing: Any) -> list[Any]:
    values = np.asarray(thing)
    return [values.dtype, values.shape, values.tobytes()]


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
