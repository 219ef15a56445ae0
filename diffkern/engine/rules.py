"""Rewriting rules: a captured graph, with our kernels' calls in the place of torch's.

Each rule is a function of the graph that replaces one pattern. :func:`rewrite` applies them in the order in which they
stand here. Calls of ours are nodes whose target is one of four functions, ``conv``, ``norm``, ``attention`` and
``tokens``. They are names with a signature: :mod:`diffkern.engine.plan` makes memory and kernels of them.

A node's role says what it depends on: "static" on weights alone, "small" on time steps and labels besides, "main" on
images. Rules look at main nodes; the weights that they take are static.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .capture import name_of, sweep
from .words import words

Node = fx.Node


def conv(x, skip, weights, biases, add, residual, stride, padding, upsample):
    """``ops.conv2d`` by the weights [K, C, k, k] or [K, C] side by side. add: [N, K]."""


def norm(x, skip, weight, bias, groups, eps, scale_shift, silu):
    """``ops.group_norm_silu`` of x and skip side by side. scale_shift: [N, 2C]."""


def attention(q, k, v, scale):
    """``ops.attention``."""


OURS = (conv, norm, attention)

VIEWS = words(
    "view reshape transpose permute flatten unflatten unsqueeze squeeze swapaxes swapdims movedim moveaxis mT T t",
)
"""Functions that only say anew how elements are counted, so that they can be turned back."""


def rewrite(graph: fx.Graph) -> None:
    """Apply every rule, in place."""
    assign_roles(graph)
    for rule in (no_ops, group_norms, scale_shifts, silus, convolutions, linears, token_images, paddings, upsamplings):
        rule(graph)
        sweep(graph)
    for rule in (attentions, side_by_side, added_vectors, residuals, concatenations):
        rule(graph)
        sweep(graph)


def assign_roles(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.op == "placeholder":
            shape = node.meta["shape"]
            node.meta["role"] = "small" if len(shape) <= 1 else "main"
        elif node.op != "output":
            node.meta["role"] = _role(node.all_input_nodes)


def _role(inputs: Iterable[Node]) -> str:
    roles = {node.meta["role"] for node in inputs}
    return "main" if "main" in roles else "small" if "small" in roles else "static"


# --- nodes ---


def is_call(node: Any, *names: str) -> bool:
    """A main node that calls a function of one of these names?"""
    called = isinstance(node, Node) and node.op in ("call_function", "call_method") and node.meta["role"] == "main"
    return called and node.target not in OURS and name_of(node.target) in names


def is_ours(node: Any, *targets: Callable) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def calls(graph: fx.Graph, *names: str) -> Iterator[Node]:
    """As they are now: rules change the graph."""
    return (node for node in list(graph.nodes) if not node._erased and is_call(node, *names))


def ours(graph: fx.Graph, *targets: Callable) -> Iterator[Node]:
    return (node for node in list(graph.nodes) if not node._erased and is_ours(node, *targets))


def shape(node: Node) -> tuple[int, ...]:
    return node.meta["shape"]


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("dtype"), torch.dtype)


def is_float(*nodes: Any) -> bool:
    return all(is_tensor(node) and node.meta["dtype"] == torch.float32 for node in nodes)


def is_static(*nodes: Any) -> bool:
    return all(is_float(node) and node.meta["role"] == "static" for node in nodes if node is not None)


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def bound(node: Node, names: str, **defaults: Any) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**defaults, **dict(zip(names.split(), node.args, strict=False)), **node.kwargs}


def make(before: Node, target: Callable, args: tuple, shape: tuple[int, ...], **kwargs: Any) -> Node:
    """A new call in front of ``before``, of float32."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, kwargs)
    node.meta.update(shape=tuple(shape), dtype=torch.float32, role=_role(node.all_input_nodes))
    return node


def replace(old: Node, new: Node) -> None:
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


# --- rules ---


NO_OPS = words(
    "contiguous clone detach data to float type_as alias identity expand view reshape flatten",
    "dropout dropout1d dropout2d dropout3d feature_dropout alpha_dropout",  # no random one: they are not captured
)
"""Functions that give their input back, if its shape and dtype are those of the result."""


def no_ops(graph: fx.Graph) -> None:
    """What gives its input back: dropout in eval mode, ``x / 1``, ``contiguous``, ``clone``, ``detach``."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not node.args or not is_tensor(node.args[0]):
            continue
        x, name = node.args[0], name_of(node.target)
        if not is_tensor(node) or (shape(x), x.meta["dtype"]) != (shape(node), node.meta["dtype"]):
            continue
        number = node.args[1] if len(node.args) == 2 and not node.kwargs else None
        by_one = name in ("mul", "div") and isinstance(number, (int, float)) and number == 1
        if by_one or name in NO_OPS:
            replace(node, x)


def group_norms(graph: fx.Graph) -> None:
    """``F.group_norm``, and ``ops.group_norm_silu`` with all that it does besides."""
    for node in calls(graph, "group_norm"):
        given = bound(node, "input num_groups weight bias eps", weight=None, bias=None, eps=1e-5)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if weight is None or bias is None or not is_static(weight, bias) or not is_float(x):
            continue
        groups, eps = given["num_groups"], given["eps"]
        if len(shape(x)) == 4:
            replace(node, make(node, norm, (x, None, weight, bias, groups, eps, None, False), shape(x)))
        elif len(shape(x)) == 3:
            n, c, tokens = shape(x)
            image = make(node, torch.unsqueeze, (x, 2), (n, c, 1, tokens))
            y = make(node, norm, (image, None, weight, bias, groups, eps, None, False), shape(image))
            replace(node, make(node, torch.squeeze, (y, 2), shape(x)))
    for node in calls(graph, "group_norm_silu"):
        x, weight, bias, groups, eps, scale_shift, add, residual, silu = node.args
        y = only_user(node)
        if not (is_call(y, "item_of") and y.args[1] == 0 and len(shape(x)) == 4):
            continue
        if not (is_static(weight, bias) and is_float(x)):
            continue
        if add is not None:
            vector = make(node, torch.reshape, (add, (*shape(add), 1, 1)), (*shape(add), 1, 1))
            x = make(node, torch.add, (x, vector), shape(x))
        new = make(node, norm, (x, None, weight, bias, groups, eps, scale_shift, silu), shape(x))
        if residual is not None:
            new = make(node, torch.add, (new, residual), shape(x))
        replace(y, new)


def scale_shifts(graph: fx.Graph) -> None:
    """``norm(x) * (1 + scale) + shift``, of one vector each sample."""
    for node in ours(graph, norm):
        product = only_user(node)
        if node.args[6] is not None or node.args[7] or not _of_two(product, "mul", node):
            continue
        slope = _other(product, node)
        total = only_user(product)
        if not (is_call_of_any(slope, "add") and _of_two(total, "add", product)):
            continue
        ones = [value for value in slope.args if not isinstance(value, Node) and value == 1]
        scales = [value for value in slope.args if isinstance(value, Node)]
        shift = _other(total, product)
        n, c = shape(node)[:2]
        if len(slope.args) != 2 or slope.kwargs or len(ones) != 1 or len(scales) != 1:
            continue
        if not is_float(*scales, shift) or any(shape(vector) != (n, c, 1, 1) for vector in (*scales, shift)):
            continue
        flat = [make(total, torch.reshape, (vector, (n, c)), (n, c)) for vector in (*scales, shift)]
        both = make(total, torch.cat, (flat, 1), (n, 2 * c))
        replace(total, make(total, norm, (*node.args[:6], both, False), shape(node)))


def is_call_of_any(node: Any, *names: str) -> bool:
    """As ``is_call``, for a node of any role."""
    return isinstance(node, Node) and node.op in ("call_function", "call_method") and name_of(node.target) in names


def _of_two(node: Any, name: str, one: Node) -> bool:
    """Is it the sum or product of ``one`` and another tensor?"""
    return is_call(node, name) and len(node.args) == 2 and not node.kwargs and is_float(*node.args) and one in node.args


def _other(node: Node, one: Node) -> Node:
    a, b = node.args
    return b if a is one else a


def silus(graph: fx.Graph) -> None:
    """SiLU behind a group norm."""
    for node in ours(graph, norm):
        y = only_user(node)
        if not node.args[7] and is_call(y, "silu") and shape(y) == shape(node):
            replace(y, make(y, norm, (*node.args[:7], True), shape(node)))
            continue
        views, y = chain(node)
        if not node.args[7] and views and is_call(y, "silu"):  # behind the views of a norm over tokens
            new = make(views[0], norm, (*node.args[:7], True), shape(node))
            views[0].replace_input_with(node, new)
            replace(y, views[-1])


def convolutions(graph: fx.Graph) -> None:
    """3x3 with padding 1, and 1x1; stride 1 or 2. Of 3x3 without padding, all that stand behind ``F.pad``."""
    for node in calls(graph, "conv2d", "conv1d", "conv3x3"):
        name = name_of(node.target)
        names = "input weight bias stride padding dilation groups"
        given = bound(node, names, bias=None, stride=1, padding=1 if name == "conv3x3" else 0, dilation=1, groups=1)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if not (is_float(x) and is_static(weight, bias)) or given["groups"] != 1 or isinstance(given["padding"], str):
            continue
        stride, padding, dilation = (_pair(given[key]) for key in ("stride", "padding", "dilation"))
        kernel, last = shape(weight)[2:], len(shape(x))
        if dilation != (1, 1) or stride[0] != stride[1] or padding[0] != padding[1]:
            continue
        if name == "conv1d":
            if last == 3 and kernel == (1,) and stride == (1, 1) and padding == (0, 0):
                _replace_by_tokens(node, x, weight, bias)
            continue
        fits = (kernel == (3, 3) and padding[0] <= 1) or (kernel == (1, 1) and padding[0] == 0)
        sizes = tuple(-(-size // stride[0]) for size in shape(x)[2:])
        padded = kernel == (3, 3) and padding[0] == 0 and name_of(x.target) == "pad"
        if last == 4 and fits and stride[0] in (1, 2) and (padded or sizes == shape(node)[2:]):
            biases = None if bias is None else (bias,)
            args = (x, None, (weight,), biases, None, None, stride[0], padding[0], False)
            replace(node, make(node, conv, args, shape(node)))


def _replace_by_tokens(node: Node, x: Node, weight: Node, bias: Node | None) -> None:
    """A 1x1 convolution of [N, C, tokens]."""
    n, c, tokens = shape(x)
    k = shape(weight)[0]
    image = make(node, torch.reshape, (x, (n, c, 1, tokens)), (n, c, 1, tokens))
    flat = make(node, torch.reshape, (weight, (k, c)), (k, c))
    biases = None if bias is None else (bias,)
    y = make(node, conv, (image, None, (flat,), biases, None, None, 1, 0, False), (n, k, 1, tokens))
    replace(node, make(node, torch.reshape, (y, (n, k, tokens)), (n, k, tokens)))


def linears(graph: fx.Graph) -> None:
    """A linear layer: the 1x1 convolution of an image [N, C, 1, tokens]."""
    images: dict[Node, Node] = {}
    for node in calls(graph, "linear"):
        given = bound(node, "input weight bias", bias=None)
        x, weight, bias = given["input"], given["weight"], given["bias"]
        if not (is_float(x) and is_static(weight, bias)) or len(shape(x)) < 2 or len(shape(weight)) != 2:
            continue
        *samples, tokens, c = shape(x)
        n, k = math.prod(samples), shape(weight)[0]
        if x not in images:
            rows = make(node, torch.reshape, (x, (n, 1, tokens, c)), (n, 1, tokens, c))
            images[x] = make(node, torch.permute, (rows, (0, 3, 1, 2)), (n, c, 1, tokens))
        biases = None if bias is None else (bias,)
        y = make(node, conv, (images[x], None, (weight,), biases, None, None, 1, 0, False), (n, k, 1, tokens))
        rows = make(node, torch.permute, (y, (0, 2, 3, 1)), (n, 1, tokens, k))
        replace(node, make(node, torch.reshape, (rows, shape(node)), shape(node)))


def chain(node: Node) -> tuple[list[Node], Node | None]:
    """(the views behind a node, each the only user of the one before; the only user of the last)."""
    views: list[Node] = []
    while is_call((user := only_user(views[-1] if views else node)), *VIEWS) and is_tensor(user):
        views.append(user)
    return views, user


def through(views: Iterable[Node], memory: torch.Tensor) -> torch.Tensor | None:
    """What the views show of that memory; None where they copy."""
    for view in views:
        name = name_of(view.target)
        if name in ("view", "reshape"):
            y = memory.reshape(shape(view))
        elif view.op == "call_method":
            y = getattr(memory, view.target)(*view.args[1:], **view.kwargs)
        else:
            y = view.target(memory, *view.args[1:], **view.kwargs)
        if y.untyped_storage()._cdata != memory.untyped_storage()._cdata:
            return None
        memory = y
    return memory


def token_images(graph: fx.Graph) -> None:
    """A linear layer whose tokens are made an image of is a 1x1 convolution of their image."""
    for node in ours(graph, conv):
        n, k, height, _ = shape(node)
        if height != 1 or len(shape(node.args[2][0])) != 2:
            continue
        views, _ = chain(node)
        memory = torch.empty(n, shape(node)[3], 1, k, dtype=torch.float32, device="meta").permute(0, 3, 2, 1)
        for count in range(len(views), 0, -1):
            last = views[count - 1]
            image = through(views[:count], memory) if len(shape(last)) == 4 else None
            if image is None or image.shape[:2] != (n, k) or 1 in image.shape[2:]:
                continue
            if image.is_contiguous(memory_format=torch.channels_last):
                x, size = node.args[0], (n, shape(node.args[0])[1], *shape(last)[2:])
                pixels = make(last, torch.permute, (x, (0, 2, 3, 1)), tuple(shape(x)[i] for i in (0, 2, 3, 1)))
                rows = make(last, torch.reshape, (pixels, (n, *size[2:], size[1])), (n, *size[2:], size[1]))
                seen = make(last, torch.permute, (rows, (0, 3, 1, 2)), size)
                replace(last, make(last, conv, (seen, *node.args[1:]), shape(last)))
                break


def paddings(graph: fx.Graph) -> None:
    """Zeros at the right and below, in front of a strided convolution, which reads them there anyway."""
    for node in ours(graph, conv):
        x, stride, padding = node.args[0], node.args[6], node.args[7]
        if padding != 0 or shape(node.args[2][0])[2:] != (3, 3):
            continue
        given = bound(x, "input pad mode value", mode="constant", value=None)
        if is_call(x, "pad") and tuple(given["pad"]) == (0, 1, 0, 1) and given["mode"] == "constant" and stride == 2:
            inner = given["input"]
            if not given["value"] and tuple(-(-size // 2) for size in shape(inner)[2:]) == shape(node)[2:]:
                node.update_arg(0, inner)
                continue
        _by_torch(node)


def _by_torch(node: Node) -> None:
    """A convolution that our kernel has not after all."""
    x, _, (weight,), biases, _, _, stride, padding, _ = node.args
    bias = None if biases is None else biases[0]
    replace(node, make(node, torch.conv2d, (x, weight, bias, stride, padding), shape(node)))


def upsamplings(graph: fx.Graph) -> None:
    """A doubled image, nearest neighbour, in front of a convolution."""
    for node in ours(graph, conv):
        x, stride = node.args[0], node.args[6]
        if not is_call(x, "interpolate", "upsample_nearest2d") or stride != 1 or only_user(x) is not node:
            continue
        given = bound(x, "input size scale_factor mode", size=None, scale_factor=None, mode="nearest")
        inner = given["input"]
        doubled = [2 * size for size in shape(inner)[2:]] == list(shape(x)[2:])
        if given["mode"] == "nearest" and doubled and name_of(x.target) == "interpolate":
            node.update_arg(0, inner)
            node.update_arg(8, True)


def attentions(graph: fx.Graph) -> None:
    """``F.scaled_dot_product_attention`` without a mask, and ``ops.attention``."""
    for node in calls(graph, "scaled_dot_product_attention"):
        names = "query key value attn_mask dropout_p is_causal"
        given = bound(node, names, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False)
        q, k, v = given["query"], given["key"], given["value"]
        plain = given["attn_mask"] is None and not given["is_causal"] and given["dropout_p"] == 0
        if plain and _is_attention(q, k, v):
            replace(node, make(node, attention, (q, k, v, given["scale"]), shape(node)))
    for node in calls(graph, "attention"):
        y = only_user(node)
        if is_call(y, "item_of") and y.args[1] == 0 and _is_attention(*node.args[:3]):
            replace(y, make(node, attention, node.args, shape(y)))


def _is_attention(q: Node, k: Node, v: Node) -> bool:
    return is_float(q, k, v) and len(shape(q)) == 4 and shape(k) == shape(v) and (
        shape(q)[:2] == shape(k)[:2] and shape(q)[3] == shape(k)[3] and min(shape(q)) > 0 and shape(k)[2] > 0
    )  # fmt: skip


def side_by_side(graph: fx.Graph) -> None:
    """Linear layers of one input that attention gets, q, k and v: one product."""
    groups: dict[Any, list[Node]] = {}
    for node in ours(graph, conv):
        x, skip, weights, biases, add, residual, *_ = node.args
        linear = len(shape(weights[0])) == 2 and (skip, add, residual) == (None, None, None)
        if linear and is_ours(chain(node)[1], attention):
            groups.setdefault((x, biases is None), []).append(node)
    for (x, bare), nodes in groups.items():
        if len(nodes) == 1:
            continue
        weights = tuple(weight for node in nodes for weight in node.args[2])
        biases = None if bare else tuple(bias for node in nodes for bias in node.args[3])
        widths = [shape(node)[1] for node in nodes]
        n, _, *size = shape(nodes[0])
        y = make(nodes[0], conv, (x, None, weights, biases, None, None, 1, 0, False), (n, sum(widths), *size))
        _advance(y, (*weights, *(biases or ())))
        for i, node in enumerate(nodes):
            args = (y, 1, sum(widths[:i]), widths[i])
            replace(node, make(node, torch.narrow, args, shape(node)))


def _advance(node: Node, needed: Iterable[Node]) -> None:
    """Move what a node needs, which depends on weights alone, in front of it."""
    for one in needed:
        for before in (*one.all_input_nodes, one):
            if before.op != "placeholder" and not _stands_before(before, node):
                _advance(before, before.all_input_nodes)
                node.prepend(before)


def _stands_before(a: Node, b: Node) -> bool:
    return a < b


def added_vectors(graph: fx.Graph) -> None:
    """A vector each sample, added to every pixel that a convolution gives: the time embedding."""
    for node in calls(graph, "add"):
        if len(node.args) != 2 or node.kwargs or not is_float(*node.args):
            continue
        for y, vector in (node.args, node.args[::-1]):
            n, c, *_ = shape(node)
            alone = is_ours(y, conv) and only_user(y) is node and y.args[4] is None and y.args[5] is None
            if alone and shape(vector) == (n, c, 1, 1) and shape(y) == shape(node):
                flat = make(node, torch.reshape, (vector, (n, c)), (n, c))
                replace(node, make(node, conv, (*y.args[:4], flat, *y.args[5:]), shape(node)))
                break


def residuals(graph: fx.Graph) -> None:
    """A sum with what a convolution gives, also where views lie between the two."""
    for node in calls(graph, "add"):
        if len(node.args) != 2 or node.kwargs or not is_float(*node.args):
            continue
        for y, other in (node.args, node.args[::-1]):
            if shape(y) != shape(other) or y is other:
                continue
            source, views = y, []
            while is_call(source, *VIEWS) and only_user(source) is not None and is_tensor(source.args[0]):
                views.append(source)
                source = source.args[0]
            if not (is_ours(source, conv) and only_user(source) is not None and source.args[5] is None):
                continue
            if only_user(y) is not node:
                continue
            for view in views:  # back to the convolution's own shape
                other = _turned_back(node, view, other)
                if other is None:
                    break
            if other is None:
                continue
            y = make(node, conv, (*source.args[:5], other, *source.args[6:]), shape(source))
            for view in reversed(views):
                with graph.inserting_before(node):
                    again = graph.create_node(view.op, view.target, (y, *view.args[1:]), view.kwargs)
                again.meta.update(view.meta)
                y = again
            replace(node, y)
            break


def _turned_back(before: Node, view: Node, y: Node) -> Node | None:
    """The view, undone."""
    x = view.args[0]
    if name_of(view.target) in ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"):
        return make(before, torch.reshape, (y, shape(x)), shape(x))
    sizes = range(2, 2 + len(shape(x)))  # all different, so that they tell where each dimension went
    seen = through([view], torch.empty(*sizes, dtype=torch.float32, device="meta")) if view.op else None
    if seen is None:
        return None
    return make(before, torch.permute, (y, tuple(list(seen.shape).index(size) for size in sizes)), shape(x))


def concatenations(graph: fx.Graph) -> None:
    """Two images side by side, which norms and convolutions read as two."""
    for node in calls(graph, "cat"):
        given = bound(node, "tensors dim", dim=0)
        parts, dim = given.get("tensors"), given.get("dim")
        if len(parts) != 2 or len(shape(node)) != 4 or dim not in (1, -3) or not is_float(*parts):
            continue
        reads = all(
            is_ours(user, norm, conv) and user.args[0] is node and user.args[1] is None and _uses(user, node) == 1
            for user in node.users
        )
        if reads:
            for user in list(node.users):
                user.args = (*parts, *user.args[2:])


def _uses(user: Node, node: Node) -> int:
    count = 0

    def visit(one: Node) -> Node:
        nonlocal count
        count += one is node
        return one

    fx.map_arg((user.args, user.kwargs), visit)
    return count
