"""A network's recordings: which calls they serve, and whether they still hold.

call -> signature -> Case: a capture, rewritten, planned and recorded, with the embeddings of its samples
"""

import collections
import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import rules
from .capture import Capture, NotCaptured, capture
from .embeddings import Rows, Small, embeddings, frontier
from .graph import Graph, Node, evaluate
from .packing import Store, terms_of
from .plan import Plan
from .trees import mapped
from .watch import Modules, Numbers

KEPT_RECORDINGS = 4
AGREES = {None: 1e-3, 3: 1e-3, 2: 1e-2, 1: 0.5}
"""How far a first result may be from the network's own, of its largest value: a check of the rules, not of rounding."""


def signature(tree: Any, leaves: list[Any]) -> Any:
    """Return a key that calls of one recording share. Tensors and numbers go to ``leaves``: their values may differ."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return tree.shape, tree.dtype
    if type(tree) in (int, float):
        leaves.append(tree)
        return type(tree)
    if tree is None or isinstance(tree, (bool, str, torch.dtype, torch.device)):
        return tree
    if type(tree) in (tuple, list):
        return (type(tree), *(signature(item, leaves) for item in tree))
    if type(tree) is dict:
        return (dict, *((key, signature(value, leaves)) for key, value in tree.items()))
    raise NotCaptured(f"an argument is a {type(tree).__name__}")


class Case:
    """A network's call, for one signature: what runs it, or ``why_not``.

    steady      says whether the network's modules are as they were
    own_result  the network's own result, in a tuple, where its only run so far gave one and no recording is to be had
    raised      did that run raise, as for a class that there is not?
    """

    def __init__(
        self,
        run: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        tensors: list[Tensor],
        dtype: torch.dtype,
        store: Store,
        steady: Callable[[], bool],
    ):
        self.why_not, self.dtype, self.terms, self.store, self.steady = "", dtype, terms_of(dtype), store, steady
        self.own_result: tuple[Any] | None = None
        self.raised = False
        self._ready: list[Tensor] | None = None  # the results of the call that this was made for
        try:
            self._build(run, args, kwargs, tensors)
        except NotCaptured as why:
            self.why_not, self.raised = str(why), why.result is None
            self.own_result = why.result if why.result and _is_finite(why.result) else None

    def _build(self, run: Callable[..., Any], args: tuple, kwargs: dict, tensors: list[Tensor]) -> None:
        leaves: list[Any] = []
        signature((args, kwargs), leaves)
        self._owned = tensors
        try:
            captured = capture(run, args, kwargs, tensors)
        finally:
            steady = self.steady()
        if not steady:
            raise NotCaptured(CHANGES, (captured.result,))
        try:
            self._record(run, args, kwargs, leaves, captured)
        except (NotCaptured, RuntimeError) as why:  # a kernel of torch's may refuse what its function takes
            reason, *_ = str(why).splitlines() or [""]
            raise NotCaptured(reason, (captured.result,)) from None

    def _record(self, run: Callable[..., Any], args: tuple, kwargs: dict, leaves: list[Any], captured: Capture) -> None:
        self._rewrite(captured)
        self.graph, self.output = captured.graph, captured
        if not any(rules.is_ours(node, *rules.OURS) for node in self.graph):
            raise NotCaptured("no kernel of ours is of use to it")
        static = _static(captured)
        small = _small(captured)
        self.read = frontier(self.graph)
        main = [(i, node) for i, node in enumerate(captured.graph.inputs) if node.role == "main"]
        self._places = [i for i, _ in main]
        samples = rules.shape(main[0][1])[0] if main else 1
        batch = all(rules.shape(node)[0] == samples for _, node in main)

        def alone() -> tuple[Graph, dict[Node, Any], Small] | None:
            return self._of_one(run, args, kwargs, samples) if batch else None

        self.embeddings = embeddings(self.graph, static, small, samples, leaves, alone)
        self.plan = Plan(
            self.graph, static, [*(node for _, node in main), *self.read], self.store, self.dtype, self.terms
        )
        filled: list[bool] = []
        self.recording = self.plan.record(lambda inputs: filled.append(self._fill(inputs, leaves)))
        if filled == [True]:
            self._ready = self.recording.results()
            self._compare(self._ready, captured.result)
        if any(type(leaf) in (int, float) for leaf in leaves):
            self._compare_numbers(run, args, kwargs)
        captured.result = None

    def _compare_numbers(self, run: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        """NotCaptured if other numbers give what the network does not. Functions of C, such as the index of a list and
        ``math.sin``, read one without a trace, and the recording would hold its value."""
        args, kwargs = mapped(_another, (args, kwargs))
        leaves: list[Any] = []
        signature((args, kwargs), leaves)
        try:
            expected = run(*args, **kwargs)
        except Exception as error:
            raise NotCaptured(f"for another number, its forward raises {type(error).__name__}") from None
        self._compare(self._results(leaves), expected)

    def _rewrite(self, captured: Capture) -> None:
        rules.rewrite(captured.graph)

    def _of_one(self, run: Callable, args: tuple, kwargs: dict, samples: int) -> Any:
        """The graph of the first sample."""

        def first(leaf: Any) -> Any:
            return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples else leaf

        try:
            captured = capture(run, *mapped(first, (args, kwargs)), self._owned)
        except NotCaptured:
            return None
        self._rewrite(captured)
        return captured.graph, _static(captured), _small(captured)

    def _compare(self, results: list[Tensor] | None, expected: Any) -> None:
        """NotCaptured unless the recording gives what the network gives."""
        expected = [leaf for leaf in pytree.tree_leaves(expected) if isinstance(leaf, Tensor)]
        if results is None or not all(leaf.isfinite().all() for leaf in expected):
            return
        for got, leaf in zip(results, expected, strict=True):
            scale = leaf.abs().max().clamp(min=1e-30) if leaf.numel() else 1.0
            if leaf.numel() and not (got - leaf).abs().max() <= AGREES[self.terms] * scale:
                raise NotCaptured("its recording gives another result")

    def _fill(self, inputs: list[Tensor], leaves: list[Any]) -> bool:
        """Put the inputs and their embeddings into the plan's memory. Returns whether there are such embeddings."""
        for buffer, place in zip(inputs, self._places, strict=False):
            buffer.copy_(leaves[place])
        try:
            return not self.read or self.embeddings.fill(inputs[len(self._places) :], leaves)
        except (IndexError, RuntimeError):  # a class that there is not: the network says so
            return False

    def _results(self, leaves: list[Any]) -> list[Tensor] | None:
        return self.recording.run() if self._fill(self.recording.inputs, leaves) else None

    def run(self, leaves: list[Any]) -> Any:
        """The result; NotCaptured where these inputs are the network's own matter."""
        ready, self._ready = self._ready, None
        results = ready or self._results(leaves)
        if results is None:
            raise NotCaptured("its embeddings are not finite")
        results = iter(results)
        found = [next(results) if isinstance(leaf, Node) else leaf for leaf in self.output.leaves]
        return pytree.tree_unflatten(found, self.output.output)


def _another(leaf: Any) -> Any:
    """Another number, in the range of indices where the first one is; anything else as it is."""
    return leaf + (-1 if leaf > 0 else 1) if type(leaf) in (int, float) else leaf


def _static(captured: Capture) -> dict[Node, Any]:
    nodes = [node for node in captured.graph if node.role == "static"]
    values: dict[Node, Any] = {node: node.target for node in nodes if node.kind != "call"}
    evaluate([node for node in nodes if node.kind == "call"], values)
    return values


def _small(captured: Capture) -> Small:
    found = [(i, node) for i, node in enumerate(captured.graph.inputs) if node.role == "small"]
    return Small([node for _, node in found], [i for i, _ in found])


def _is_finite(tree: Any) -> bool:
    leaves = (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor))
    return all(bool(leaf.isfinite().all()) for leaf in leaves)


CHANGES = "its forward changes its modules"
RESTLESS = 3  # captures of one signature in which a network changed its own modules, or raised: then it runs itself


class Compiled:
    """All that is made of a network. It holds the network only where what it watches leads back to it."""

    def __init__(self) -> None:
        self._changes: collections.Counter[Any] = collections.Counter()  # captures in which it did, by signature
        self._restless: set[bool] = set()  # the training flags with which it goes on changing itself
        self._raised: collections.Counter[Any] = collections.Counter()  # captures in which it did, by signature
        self.lock = threading.Lock()
        self.cases: dict[Any, Case] = {}
        self._modules: Modules | None = None
        self._numbers: Numbers | None = None

    def update(self, network: nn.Module, exact: bool) -> str:
        """Forget what is out of date. Returns why the network must run itself, or ""."""
        self._training = network.training
        if self._training in self._restless:
            return CHANGES
        if self._modules is None or self._modules.changed():
            self._modules, self._numbers = Modules(network), None
            _keep(network, self, not self._modules.leads_back)
        if self._numbers is None or self._numbers.changed(exact):
            self._numbers = Numbers(self._modules.tensors)
            self.cases, self._store = {}, Store()
        return self._modules.why_not or self._numbers.why_not

    @property
    def learns(self) -> bool:
        return self._numbers.learn

    def case(self, key: Any, run: Callable, args: tuple, kwargs: dict, dtype: torch.dtype) -> Case:
        """Return the case that serves these calls. ``KEPT_RECORDINGS`` are kept; the least recently used goes first."""
        key = key, dtype, terms_of(dtype), torch.get_default_dtype()
        case = self.cases.pop(key, None)
        if case is None:
            while len(self.cases) >= KEPT_RECORDINGS:
                del self.cases[next(iter(self.cases))]
            steady = functools.partial(self._steady, key)
            case = Case(run, args, kwargs, self._modules.tensors, dtype, self._store, steady)
            self._raised[key] += case.raised
            if case.raised and self._raised[key] < RESTLESS:  # other values may do
                return case
        self.cases[key] = case
        return case

    def _steady(self, key: Any) -> bool:
        """Are the modules as they were before they ran?"""
        if not (self._modules.changed() or self._numbers.changed()):
            return True
        self._changes[self._training, key] += 1
        if self._changes[self._training, key] == RESTLESS:
            self._restless.add(self._training)
        return False


_compiled: weakref.WeakKeyDictionary[nn.Module, Compiled] = weakref.WeakKeyDictionary()
_cyclic: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Compiled]] = weakref.WeakKeyDictionary()
"""Recordings that hold their network. Its optimized forms hold them, so that all of it is garbage together."""


def compiled(network: nn.Module) -> Compiled:
    found = _cyclic.get(network)
    return (found and found()) or _compiled.setdefault(network, Compiled())


def _keep(network: nn.Module, one: Compiled, keep: bool) -> None:
    """Keep it as long as the network lives, or as long as an optimized form of the network does."""
    if keep:
        _compiled[network] = one
        _cyclic.pop(network, None)
    else:
        _cyclic[network] = weakref.ref(one)
        _compiled.pop(network, None)


def _after_fork() -> None:
    """The child has one thread: whatever another one was at work on stays locked, and is made anew."""
    for network, one in list(_compiled.items()):
        if one.lock.locked():
            _compiled[network] = Compiled()
    for network, found in list(_cyclic.items()):
        if (one := found()) is not None and one.lock.locked():
            del _cyclic[network]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["Case", "Compiled", "Rows", "compiled", "signature"]
