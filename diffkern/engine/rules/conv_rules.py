"""Convolutions and linear layers, and the padding and upsampling in front of them."""

import math
from typing import Any

import torch

from ..graph import Graph, Node
from .nodes import (
    bound,
    calls,
    chain,
    conv,
    is_call,
    is_float,
    is_static,
    make,
    only_user,
    ours,
    replace,
    shape,
    through,
)


def convolutions(graph: Graph) -> None:
    """3x3 with padding 1, and 1x1; stride 1 or 2. Of 3x3 without padding, all that stand behind ``F.pad``."""
    for node in calls(graph, "conv2d", "conv1d", "conv3x3"):
        name = node.name
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
        padded = kernel == (3, 3) and padding[0] == 0 and x.name == "pad"
        if last == 4 and fits and stride[0] in (1, 2) and (padded or sizes == shape(node)[2:]):
            biases = None if bias is None else (bias,)
            args = (x, None, (weight,), biases, None, None, stride[0], padding[0], False)
            replace(node, make(node, conv, args, shape(node)))


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value) * (2 // len(value))


def _replace_by_tokens(node: Node, x: Node, weight: Node, bias: Node | None) -> None:
    """A 1x1 convolution of [N, C, tokens]."""
    n, c, tokens = shape(x)
    k = shape(weight)[0]
    image = make(node, torch.reshape, (x, (n, c, 1, tokens)), (n, c, 1, tokens))
    flat = make(node, torch.reshape, (weight, (k, c)), (k, c))
    biases = None if bias is None else (bias,)
    y = make(node, conv, (image, None, (flat,), biases, None, None, 1, 0, False), (n, k, 1, tokens))
    replace(node, make(node, torch.reshape, (y, (n, k, tokens)), (n, k, tokens)))


def linears(graph: Graph) -> None:
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


def token_images(graph: Graph) -> None:
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


def paddings(graph: Graph) -> None:
    """Zeros at the right and below, in front of a strided convolution, which reads them there anyway."""
    for node in ours(graph, conv):
        x, stride, padding = node.args[0], node.args[6], node.args[7]
        if padding != 0 or shape(node.args[2][0])[2:] != (3, 3):
            continue
        given = bound(x, "input pad mode value", mode="constant", value=None)
        if is_call(x, "pad") and tuple(given["pad"]) == (0, 1, 0, 1) and given["mode"] == "constant" and stride == 2:
            inner = given["input"]
            if not given["value"] and tuple(-(-size // 2) for size in shape(inner)[2:]) == shape(node)[2:]:
                node.set_args((inner, *node.args[1:]))
                continue
        _by_torch(node)


def _by_torch(node: Node) -> None:
    """A convolution that our kernel has not after all."""
    x, _, (weight,), biases, _, _, stride, padding, _ = node.args
    bias = None if biases is None else biases[0]
    replace(node, make(node, torch.conv2d, (x, weight, bias, stride, padding), shape(node)))


def upsamplings(graph: Graph) -> None:
    """A doubled image, nearest neighbour, in front of a convolution."""
    for node in ours(graph, conv):
        x, stride = node.args[0], node.args[6]
        if not is_call(x, "interpolate", "upsample_nearest2d") or stride != 1 or only_user(x) is not node:
            continue
        given = bound(x, "input size scale_factor mode", size=None, scale_factor=None, mode="nearest")
        inner = given["input"]
        doubled = [2 * size for size in shape(inner)[2:]] == list(shape(x)[2:])
        if given["mode"] == "nearest" and doubled and x.name == "interpolate":
            node.set_args((inner, *node.args[1:8], True))
