"""A rewritten graph as steps on planned memory, and those recorded.

graph -> steps           what is computed from what, by which kernel       (Plan)
steps -> memory          offsets, by lifetimes                             (Memory)
steps -> calls           our kernels' as programs, torch's by ``out=``     (Plan.record)
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import rules
from .capture import NotCaptured
from .graph import Graph, Node
from .memory import Memory, storage_of
from .packing import Problem, Store, plan_conv
from .torch_calls import into
from .trees import mapped
from .words import words

_ops = torch.ops.diffkern

ALIASES = rules.VIEWS | words(
    "narrow chunk split tensor_split unbind select getitem expand expand_as broadcast_to unfold diagonal view_as",
    "reshape_as item_of detach data alias mT mH real",
)
"""Functions whose result may lie in the memory of their first argument."""

RESHAPES = words(
    "view reshape flatten unflatten view_as reshape_as",
)


@dataclasses.dataclass
class Step:
    """run(y, *inputs) on the tensors in memory. native: by our kernels, which a program records."""

    run: Callable[..., Any]
    y: Tensor
    inputs: tuple[Tensor | None, ...]
    native: bool
    node: Node


class Plan:
    """The main nodes of a graph for one shape of inputs.

    graph    a rewritten graph
    static   the values of its static nodes
    inputs   the nodes that have a value when it runs: main inputs, and small nodes that main ones read
    dtype    of images between our kernels: float32 or bfloat16
    terms    as ``Problem`` has it
    """

    def __init__(
        self,
        graph: Graph,
        static: dict[Node, Tensor],
        inputs: Sequence[Node],
        store: Store,
        dtype: torch.dtype,
        terms: int | None,
    ):
        self.static, self.store, self.dtype, self.terms = static, store, dtype, terms
        self.memory, self.steps = Memory(), []
        self.values: dict[Node, Any] = {}
        self._casts: dict[tuple[int, Any], Tensor] = {}
        for node in inputs:
            self.values[node] = self.memory.new(rules.shape(node), node.dtype, -1, last=node.kind == "input")
        output = graph.output
        self._outputs = set(output.inputs)
        for node in graph:
            if node.role == "main" and node.kind == "call":
                self.values[node] = self._lower(node)
        self.outputs = [self._cast(self.values[node], torch.float32, node) for node in output.args]
        self._inputs = [self.values[node] for node in inputs]
        self.memory.use([*self.outputs], len(self.steps))
        self.memory.use(self._inputs, 0)

    # --- recording ---

    def record(self, fill: Callable[[list[Tensor]], Any]) -> "Recording":
        """Run every step once, in its place in memory, on the inputs that ``fill`` puts there, and keep the calls."""
        self.memory.place()
        tensor, calls = self.memory.tensor, []
        inputs = [tensor(value).zero_() for value in self._inputs]
        fill(inputs)
        program: _C.Program | None = None
        for step in self.steps:
            y, operands = tensor(step.y), [None if value is None else tensor(value) for value in step.inputs]
            if step.native:
                if program is None:
                    program = _C.Program()
                    calls.append(program.run)
                with program:
                    step.run(y, *operands)
            else:
                program = None
                calls.append(into(step.run, y, operands))
                calls[-1]()
        return Recording(calls, inputs, [tensor(value) for value in self.outputs])

    # --- steps ---

    def _step(self, node: Node, run: Callable[..., Any], y: Tensor, *inputs: Tensor | None, native: bool) -> Tensor:
        self.memory.use([value for value in inputs if value is not None], len(self.steps))
        self.steps.append(Step(run, y, inputs, native, node))
        return y

    def _new(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, *, last: bool = False) -> Tensor:
        return self.memory.new(shape, dtype, len(self.steps), last=last)

    def _lower(self, node: Node) -> Any:
        if node.target is rules.conv:
            return self._conv(node)
        if node.target is rules.norm:
            return self._norm(node)
        if node.target is rules.attention:
            return self._attention(node)
        return self._alias(node) if node.name in ALIASES else self._by_torch(node)

    def _alias(self, node: Node) -> Any:
        """A view, where memory is as it asks; else a copy."""
        x, name = self.values.get(node.args[0]), node.name
        if name == "item_of" and isinstance(x, (tuple, list)):
            return x[node.args[1]]
        if not isinstance(x, Tensor) or any(rules.is_tensor(arg) for arg in node.inputs[1:]):
            return self._by_torch(node)
        if name in RESHAPES:
            shape = rules.shape(node)
            y = x.reshape(shape)
            if storage_of(y) == storage_of(x):
                return y
            y = self._new(shape, x.dtype)
            self._step(node, _copy, y.view(x.shape), x, native=False)
            return y
        args, kwargs = (mapped(self._meta, tree) for tree in (node.args, node.kwargs))
        y = node.target(*args, **kwargs)
        parts = y if isinstance(y, (tuple, list)) else [y]
        if all(isinstance(part, Tensor) and storage_of(part) == storage_of(x) for part in parts):
            return y
        return self._by_torch(node)

    def _meta(self, leaf: Any) -> Any:
        return self.values[leaf] if isinstance(leaf, Node) else leaf

    def _by_torch(self, node: Node) -> Any:
        """By torch's function, on float32 where we keep bfloat16."""
        operands = [one for one in node.inputs if one in self.values]
        inputs = [self._cast(self.values[one], one.dtype, node) for one in operands]
        if any(not isinstance(value, Tensor) for value in inputs):
            raise NotCaptured(f"{node.name} reads several results at once")
        places = {one: i for i, one in enumerate(operands)}

        def run(*tensors: Tensor, out: Tensor | None = None) -> Any:
            def of(leaf: Any) -> Any:
                if not isinstance(leaf, Node):
                    return leaf
                return tensors[places[leaf]] if leaf in places else self.static[leaf]

            return mapped(of, node.args), mapped(of, node.kwargs)

        if node.shape is None:  # several results: each is a node of its own
            return self._several(node, run, inputs)
        images = [value for value in inputs if value.ndim == 4]
        last = bool(images) and all(_lies_last(value) for value in images)
        y = self._new(rules.shape(node), node.dtype, last=last)
        return self._step(node, _Torch(node, run), y, *inputs, native=False)

    def _several(self, node: Node, run: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """A function with several results: it runs again for each that is used."""
        results: dict[int, Tensor] = {}
        for user in node.users:
            if user.name != "item_of":
                raise NotCaptured(f"results of {node.name} are taken together")
            y = self._new(rules.shape(user), user.dtype)
            results[user.args[1]] = self._step(
                node, _Torch(node, run, item=user.args[1]), y, *inputs, native=False
            )  # fmt: skip
        return tuple(results.get(i) for i in range(max(results) + 1))

    # --- our kernels ---

    def _conv(self, node: Node) -> Tensor:
        x, skip, weights, biases, add, residual, stride, padding, upsample = node.args
        n, k, height, width = rules.shape(node)
        weights, problem = [self.static[weight] for weight in weights], self.problem(node)
        pack = plan_conv(problem)
        packed = self.store.packed(weights, pack)
        bias = None if biases is None else self._vector([self.static[bias] for bias in biases])
        blocked = self._blocked(x)
        dtype = self._wanted(node) if problem.by_terms else torch.float32
        x_dtype = self.values[x].dtype if problem.terms == 1 and not blocked else torch.float32
        image = self.values[x] if blocked else self._image(self.values[x], x_dtype, node)
        other = None if skip is None else self._image(self.values[skip], x_dtype, node)
        rest = None if residual is None else self._image(self._value(residual, node), dtype, node)
        each = None if add is None else self._rows(self._value(add, node), node)
        y = self._new((n, k, height, width), dtype, last=True)

        def run(
            y: Tensor, x: Tensor, skip: Tensor | None, residual: Tensor | None, add: Tensor | None, packed=packed
        ) -> None:
            counts = packed.in_channels, packed.out_channels
            _ops.conv2d_out(y, x, skip, packed.tensor, *counts, bias, add, residual, stride, padding, upsample)

        return self._step(node, run, y, image, other, rest, each, native=True)

    def problem(self, node: Node) -> Problem:
        """Return the shapes and options of a convolution, by which its kernel is chosen."""
        x, skip, weights, _, _, _, stride, padding, upsample = node.args
        n, k, height, width = rules.shape(node)
        channels = rules.shape(x)[1] + (0 if skip is None else rules.shape(skip)[1])
        kernel = 3 if rules.shape(weights[0])[2:] == (3, 3) else 1
        return Problem(n, channels, k, height, width, kernel, stride, padding, upsample, self.terms)

    def _norm(self, node: Node) -> Tensor:
        x, skip, weight, bias, groups, eps, scale_shift, silu = node.args
        dtype = self.dtype if self.values[x].dtype == self.dtype else torch.float32
        images = [None if one is None else self._image(self.values[one], dtype, node) for one in (x, skip)]
        weight, bias = (self.static[one].detach().contiguous() for one in (weight, bias))
        vector = None if scale_shift is None else self._rows(self._value(scale_shift, node), node, dense=True)
        n, c, h, w = rules.shape(node)
        if self._blocks(node):
            y = self._new((n, c // 32, self.terms, h + 2, w + 2, 32), torch.bfloat16)
        else:
            y = self._new((n, c, h, w), dtype, last=True)

        def run(y: Tensor, x: Tensor, skip: Tensor | None, scale_shift: Tensor | None) -> None:
            _ops.group_norm_silu_out(y, x, skip, weight, bias, groups, eps, scale_shift, silu)

        return self._step(node, run, y, *images, vector, native=True)

    def _blocks(self, node: Node) -> bool:
        """Does a norm write blocks of terms, as the convolutions behind it like them?"""
        if self.terms is None or node in self._outputs:
            return False
        if any(one is not None and rules.shape(one)[1] % 32 for one in node.args[:2]):
            return False
        return all(
            rules.is_ours(user, rules.conv)
            and user.args[0] is node
            and user.args[1] is None
            and rules.uses(user, node) == 1
            and self.problem(user).by_terms
            and (self.terms < 3 if self.problem(user).kernel == 3 else self.terms > 1)
            for user in node.users
        )

    def _blocked(self, node: Node) -> bool:
        value = self.values[node]
        return isinstance(value, Tensor) and value.ndim == 6 and rules.is_ours(node, rules.norm)

    def _attention(self, node: Node) -> Tensor:
        *operands, scale = node.args
        n, heads, tokens, d = rules.shape(node)
        terms = self.terms if d % 32 == 0 and d <= 256 else None
        dtype = self.dtype if terms == 1 else torch.float32
        q, k, v = (self._heads(self._value(one, node), dtype, node) for one in operands)
        y = self._new((n, tokens, heads, d), dtype).transpose(1, 2)

        def run(y: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
            _ops.attention_out(y, q, k, v, scale, terms)

        return self._step(node, run, y, q, k, v, native=True)

    # --- how values lie ---

    def _value(self, node: Node, user: Node) -> Tensor:
        """A planned value; that of weights alone is copied into the plan."""
        if node not in self.values:
            static = self.static[node].detach()
            y = self._new(static.shape, static.dtype, last=static.ndim == 4)
            self.values[node] = self._step(user, _Constant(static), y, native=False)
        return self.values[node]

    def _wanted(self, node: Node) -> torch.dtype:
        """The dtype of what our kernels make: float32 for those who read nothing else."""
        if self.dtype == torch.float32:
            return torch.float32
        users = [node]
        for one in users:  # grows
            if one in self._outputs:
                return torch.float32
            for user in one.users:
                if rules.is_ours(user, rules.attention):
                    d = rules.shape(user)[3]
                    if d % 32 or d > 256:
                        return torch.float32
                elif not rules.is_ours(user, rules.conv, rules.norm):
                    if user.name not in ALIASES:
                        return torch.float32
                    users.append(user)
        return self.dtype

    def _cast(self, value: Any, dtype: Any, node: Node) -> Any:
        """The value in that dtype, copied if it has another."""
        if not isinstance(value, Tensor) or value.dtype == dtype:
            return value
        key = storage_of(value), (tuple(value.shape), value.stride(), value.storage_offset(), dtype)
        if key not in self._casts:
            y = self._new(value.shape, dtype, last=_lies_last(value))
            self._casts[key] = self._step(node, _copy, y, value, native=False)
        return self._casts[key]

    def _image(self, value: Tensor, dtype: torch.dtype, node: Node) -> Tensor:
        """[N, C, H, W] in channels_last memory."""
        value = self._cast(value, dtype, node)
        n, c, h, w = value.shape
        if not value.is_contiguous(memory_format=torch.channels_last):
            y = self._new(value.shape, dtype, last=True)
            value = self._step(node, _copy, y, value, native=False)
        return value.as_strided((n, c, h, w), (h * w * c, 1, w * c, c))

    def _rows(self, value: Tensor, node: Node, *, dense: bool = False) -> Tensor:
        """[N, K] with the channels of a sample together."""
        value = self._cast(value, torch.float32, node)
        if not value.is_contiguous() if dense else value.stride(1) != 1:
            value = self._step(node, _copy, self._new(value.shape), value, native=False)
        return value

    def _heads(self, value: Tensor, dtype: torch.dtype, node: Node) -> Tensor:
        """[N, heads, tokens, d] with the channels of a token together."""
        value = self._cast(value, dtype, node)
        if value.stride(3) != 1 and value.shape[3] > 1:
            value = self._step(node, _copy, self._new(value.shape, dtype), value, native=False)
        n, heads, tokens, _ = value.shape
        return value.as_strided(value.shape, (*value.stride()[:3], 1))

    def _vector(self, parts: list[Tensor]) -> Tensor:
        """Biases side by side."""
        parts = [part.detach().contiguous() for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Recording:
    """The calls for one shape of inputs, on their memory."""

    def __init__(self, calls: list[Callable[[], Any]], inputs: list[Tensor], outputs: list[Tensor]):
        self.calls, self.inputs, self.outputs = calls, inputs, outputs

    def run(self) -> list[Tensor]:
        """Compute from what lies in the inputs. Returns tensors of the caller's own."""
        for call in self.calls:
            call()
        return self.results()

    def results(self) -> list[Tensor]:
        """Return copies of the last outputs."""
        return [output.clone(memory_format=torch.contiguous_format) for output in self.outputs]


def _copy(y: Tensor, x: Tensor) -> None:
    y.copy_(x)


class _Constant:
    def __init__(self, value: Tensor):
        self.value = value

    def __call__(self, y: Tensor) -> None:
        y.copy_(self.value)


class _Torch:
    """A node that torch computes: its function, with the arguments that ``arguments`` makes of tensors."""

    def __init__(self, node: Node, arguments: Callable[..., Any], item: int | None = None):
        self.node, self.arguments, self.item = node, arguments, item


def _lies_last(value: Tensor) -> bool:
    """Is it in channels_last order, and in no other?"""
    return value.ndim == 4 and not value.is_contiguous() and value.is_contiguous(memory_format=torch.channels_last)
