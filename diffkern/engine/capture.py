"""Capture a network's graph: its ``forward`` runs once, and every function of torch that it calls becomes a node.

    network, inputs -> Capture: a graph whose nodes know their shape and dtype

The run is a real one, on the memory of the call's inputs, by ``torch.overrides.TorchFunctionMode``. So it sees whatever
Python does: processors, patched methods, options. It takes no compiler, and gives a result that the recording is held
against. Whatever the mode cannot follow raises :class:`NotCaptured`: numbers that Python reads, tensors of unknown
origin, random numbers, inputs and weights that are written to. The network still runs to its end, and its result is the
call's: whatever else it does, it does once.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..ops import transforms
from .functions import SEEN, SHAPED_BY_NUMBERS, Written, item_of, name_of
from .graph import Graph, Node
from .number import Number, plain
from .trees import leaves_of, mapped, masks


class NotCaptured(Exception):
    """A network, or a call of it, that no graph describes. Says why.

    result  what the run of the network gave, in a tuple; None if it did not come to its end
    """

    def __init__(self, why: str, result: tuple[Any] | None = None):
        super().__init__(why)
        self.result = result


@dataclasses.dataclass
class Capture:
    """The graph of a call.

    graph   it has an input for each tensor and number of the call. Weights are the network's own tensors, whose numbers
            may change
    output  the structure of the result, for ``tree_unflatten``
    leaves  its leaves: a node, or what is there at every call
    result  the result of the run
    """

    graph: Graph
    output: Any
    leaves: list[Any]
    result: Any


def capture(run: Callable[..., Any], args: tuple, kwargs: dict[str, Any], owned: Sequence[Tensor]) -> Capture:
    """Run ``run(*args, **kwargs)`` and note what it computes. NotCaptured if no graph tells.

    owned  the network's tensors: parameters, buffers, and those among its attributes
    """
    recorder = _Recorder(owned)
    args, kwargs = mapped(recorder.input, (args, kwargs))
    state = torch.get_rng_state()
    try:
        with transforms.capturing(), recorder:
            result = run(*args, **kwargs)
    except Exception as error:
        torch.set_rng_state(state)
        raise NotCaptured(recorder.refused or f"its forward raises {type(error).__name__}") from error
    if not torch.equal(state, torch.get_rng_state()):
        recorder.refuse("it draws random numbers")
    try:
        if recorder.refused:
            raise NotCaptured(recorder.refused)
        return recorder.finish(result)
    except NotCaptured as why:
        raise NotCaptured(str(why), (pytree.tree_map(recorder.given, result),)) from None


class _Recorder(TorchFunctionMode):
    def __init__(self, owned: Sequence[Tensor]):
        super().__init__()
        self.graph, self.refused = Graph(), ""
        self._owned = {id(tensor): tensor for tensor in owned}
        self._known: dict[int, tuple[weakref.ref, Node]] = {}
        self._numbers: dict[int, tuple[Any, Node]] = {}
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # what the network gets, and what the caller gave

    # --- what is known ---

    def input(self, leaf: Any) -> Any:
        """An input as the network gets it: another tensor of the same memory, or a number that says when it is read."""
        if isinstance(leaf, torch.nn.Parameter):
            self._owned[id(leaf)] = leaf
            return leaf
        if isinstance(leaf, Tensor):
            given, leaf = leaf, leaf.detach()
            self._inputs[id(leaf)] = leaf, given
            self._bind(leaf, _described(self.graph.add("input"), tuple(leaf.shape), leaf.dtype))
        elif type(leaf) in (int, float):
            node = _described(self.graph.add("input"), (), type(leaf))
            leaf = Number.of(leaf, lambda: self.refuse("its forward computes with a number that it gets"))
            self._numbers[id(leaf)] = leaf, node
        return leaf

    def given(self, leaf: Any) -> Any:
        """Return the caller's tensor for the one that the network got; anything else as it is."""
        return self._inputs[id(leaf)][1] if id(leaf) in self._inputs else plain(leaf)

    def _bind(self, tensor: Tensor, node: Node) -> None:
        self._known[id(tensor)] = weakref.ref(tensor), node

    def _find(self, tensor: Tensor) -> Node | None:
        reference, node = self._known.get(id(tensor), (None, None))
        if node is not None and reference() is tensor:
            return node
        if id(tensor) in self._owned:
            return self._add("weight", tensor)
        return None

    def _add(self, kind: str, tensor: Tensor) -> Node:
        node = _described(self.graph.add(kind, tensor), tuple(tensor.shape), tensor.dtype)
        self._bind(tensor, node)
        return node

    def refuse(self, why: str) -> NotCaptured:
        self.refused = self.refused or why
        return NotCaptured(why)

    # --- what is called ---

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("inplace") is True:
            kwargs = {**kwargs, "inplace": False}
        name = name_of(function)
        if name in SEEN:
            return function(*args, **kwargs)
        if self.refused:
            return function(*_plain(args), **_plain(kwargs))
        leaves = leaves_of((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if name == "requires_grad_" or (name in ("backward", "grad") and operands):
            self.refuse(f"it differentiates: {name}")
        numbers = bool(self._numbers) and any(isinstance(leaf, Number) for leaf in leaves)
        versions = [_version(tensor) for tensor in operands]
        result = function(*_plain(args), **_plain(kwargs)) if numbers else function(*args, **kwargs)
        with contextlib.suppress(NotCaptured):  # the run goes on, unnoted
            self._note(function, args, kwargs, operands, versions, numbers, result)
        return result

    def _note(
        self,
        function: Callable,
        args: Any,
        kwargs: Any,
        operands: list[Tensor],
        versions: list[int | None],
        numbers: bool,
        result: Any,
    ) -> None:
        """Add a call to the graph."""
        name = name_of(function)
        written = [i for i, tensor in enumerate(operands) if versions[i] not in (None, _version(tensor))]
        results = [result] if isinstance(result, Tensor) else result if isinstance(result, (tuple, list)) else []
        made = [tensor for tensor in results if isinstance(tensor, Tensor)]
        if written:
            self._write(function, args, kwargs, operands, written)
            if not all(any(tensor is operand for operand in operands) for tensor in made):
                raise self.refuse(f"it writes and returns something else: {name}")
            return
        if not made:
            if numbers or any(not self._constant_operand(tensor) for tensor in operands):
                raise self.refuse(f"its forward reads numbers of a tensor: {name}")
            return
        if name in SHAPED_BY_NUMBERS or (name == "getitem" and masks(args[1])):
            raise self.refuse(f"numbers decide a shape: {name}")
        if any(tensor.layout != torch.strided or tensor.is_complex() for tensor in made):
            raise self.refuse(f"a tensor is sparse or complex: {name}")
        if isinstance(result, Tensor) and any(result is operand for operand in operands):
            return  # it did nothing
        if not numbers and all(self._constant_operand(tensor) for tensor in operands):
            for tensor in made:
                self._add("constant", tensor)
            return
        node = self._call(function, args, kwargs)
        if isinstance(result, Tensor):
            self._bind(result, _described(node, tuple(result.shape), result.dtype))
        else:
            self._bind_several(results, node)

    def _bind_several(self, results: Sequence[Any], node: Node) -> None:
        """Each result of a function is a node of its own."""
        _described(node, None, None)
        for i, tensor in enumerate(results):
            if isinstance(tensor, Tensor):
                item = self.graph.add("call", item_of, (node, i))
                self._bind(tensor, _described(item, tuple(tensor.shape), tensor.dtype))
            elif tensor is not None:
                raise self.refuse(f"a result has other things than tensors: {node.name}")

    def _constant_operand(self, tensor: Tensor) -> bool:
        node = self._find(tensor)
        return node is not None and node.kind == "constant"

    def _call(self, function: Callable, args: Any, kwargs: Any) -> Node:
        def node_of(leaf: Any) -> Any:
            if isinstance(leaf, Number):
                return self._numbers[id(leaf)][1]
            if isinstance(leaf, Tensor):
                node = self._find(leaf)
                if node is None:
                    raise self.refuse(f"a tensor comes from elsewhere, to {name_of(function)}")
                return node
            if isinstance(leaf, torch.Generator):
                raise self.refuse("it draws random numbers")
            return leaf

        args, kwargs = mapped(node_of, args), mapped(node_of, kwargs)
        return self.graph.add("call", function, tuple(args), kwargs)

    def _write(self, function: Callable, args: Any, kwargs: Any, operands: list[Tensor], written: list[int]) -> None:
        """A function wrote to a tensor: from here on, that is another value."""
        name, tensor = name_of(function), operands[written[0]]
        node = self._find(tensor)
        if node is None or any(operands[i] is not tensor for i in written):
            raise self.refuse(f"it writes to a tensor from elsewhere: {name}")
        if node.kind == "input":
            raise self.refuse(f"it writes to an input: {name}")
        if node.kind == "weight":
            raise self.refuse(f"it writes to a weight: {name}")
        others = (reference() for reference, known in list(self._known.values()) if known is not node)
        address = tensor.untyped_storage().data_ptr()
        if any(other is not None and other.untyped_storage().data_ptr() == address for other in others):
            raise self.refuse(f"it writes to memory that two tensors share: {name}")
        if all(self._constant_operand(operand) for operand in operands):
            if node.users:
                raise self.refuse(f"it writes to a constant that was used: {name}")
            return  # to be read later, with its numbers of then
        functional = getattr(Tensor, name[:-1], None) if name.endswith("_") and not name.endswith("__") else None
        same = all(operand.dtype == tensor.dtype and operand.ndim <= tensor.ndim for operand in operands)
        if functional is not None and written == [0] and same and name in ("add_", "mul_", "sub_", "div_"):
            new = self._call(functional, args, kwargs)
        else:
            new = self._call(Written(function, written[0]), args, kwargs)
        self._bind(tensor, _described(new, tuple(tensor.shape), tensor.dtype))

    # --- the result ---

    def finish(self, result: Any) -> Capture:
        leaves, spec = pytree.tree_flatten(result)
        found = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                node = self._find(leaf)
                if node is None:
                    raise NotCaptured("a tensor of its result comes from elsewhere")
                found.append(node)
            elif leaf is None or type(leaf) in (bool, str, int, float):
                found.append(leaf)
            else:
                raise NotCaptured(f"its result holds a {type(leaf).__name__}")
        nodes = [leaf for leaf in found if isinstance(leaf, Node)]
        if not nodes:
            raise NotCaptured("its result holds no tensor")
        self.graph.add("output", None, tuple(nodes))
        self.graph.sweep()
        return Capture(self.graph, spec, found, result)


def _described(node: Node, shape: tuple[int, ...] | None, dtype: Any) -> Node:
    node.shape, node.dtype = shape, dtype
    return node


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _plain(tree: Any) -> Any:
    return mapped(plain, tree)
