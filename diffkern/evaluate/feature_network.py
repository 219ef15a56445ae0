"""Feature networks to compare images by: one's own, the standard Inception, or a small classifier."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..images import from_pixels, to_pixels
from ..io.files import check_regular, digest_of
from ..model import checked_device
from ..networks.modes import evaluating
from .classifier import CLASSIFIER, Classifier, load_classifier

INCEPTION = "inception:"
"""The prefix of the name of a file with the standard Inception's weights."""

INCEPTION_LAYERS = ["2048", "logits_unbiased"]  # of Heusel et al. 2017, and of the Inception Score


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Images [N, C, H, W], uint8 -> features [N, D] and logits [N, K] or None, float32 on the CPU.

    network   float32 [N, C, H, W] in [-1, 1], on ``device`` -> features [N, D], or (features, logits)
    name      as the protocol tells it
    digest    SHA-256 of its weights or its file, in hexadecimal; None: unknown
    resize    what it does to the size of an image, in words
    shape     (C, H, W) of the images that it takes; None: any
    classes   whether its logits are of the classes of the data that samples are compared with
    """

    network: Callable[[Tensor], Any]
    name: str
    digest: str | None = None
    resize: str = "none"
    shape: tuple[int, ...] | None = None
    classes: bool = False
    device: torch.device | str = "cpu"

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """ValueError, in the name of an argument, for images of a shape that the network does not take."""
        if self.shape is not None and tuple(shape) != self.shape:
            raise ValueError(f"{name}: expected images of the feature network's shape {self.shape}, got {tuple(shape)}")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        with evaluating(self.network):
            out = self.network(from_pixels(images).to(self.device))
        found = out if isinstance(out, tuple | list) else (out,)
        names = ("features", "logits")
        if not 1 <= len(found) <= 2:
            raise ValueError(f"features: expected features, or (features, logits), got {len(found)} outputs")
        for name, x in zip(names, found, strict=False):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name}: expected a tensor from the feature network, got {type(x).__name__}")
            if x.ndim != 2 or len(x) != len(images) or not x.is_floating_point():
                raise ValueError(f"{name}: expected floats [{len(images)}, D], got {x.dtype} {tuple(x.shape)}")
            if not x.isfinite().all():
                raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
        features, logits = (*(x.float().cpu() for x in found), None)[:2]
        return features, logits


def feature_network(source: Any = CLASSIFIER, device: torch.device | str | None = None) -> FeatureNetwork:
    """Make a :class:`FeatureNetwork` of what the command line or a caller names.

    source  "inception:PATH": the standard Inception of torch-fidelity with the weights in that file
            a file of TorchScript, or of torch.export (.pt2) for any N, called with images in [-1, 1] on the device; it
            gives features [N, D], or (features, logits [N, K])
            a file of a :class:`Classifier` (.safetensors); None given: the one of Fashion-MNIST that ships
            any callable that does what such a file does; a module is not moved: it is on ``device`` already
    device  None: the CPU

    Raises TypeError, ValueError, FileNotFoundError, or ImportError without torch-fidelity.
    """
    device = checked_device(device)
    if isinstance(source, FeatureNetwork):
        return source
    if isinstance(source, Classifier):
        return _of_classifier(source.to(device), "a classifier", digest_of(source), device)
    if isinstance(source, str | os.PathLike):
        text = os.fspath(source)
        if text.startswith(INCEPTION):
            return _inception(text.removeprefix(INCEPTION), device)
        check_regular(text)
        if text.endswith(".safetensors"):
            net, accuracy = load_classifier(text)
            name = f"{Path(text).name}, a classifier of {accuracy:.2%} test accuracy"
            return _of_classifier(net.to(device), name, _digest(text), device)
        return FeatureNetwork(_compiled(text, device), Path(text).name, _digest(text), device=device)
    if not callable(source):
        raise TypeError(f"features: expected a file or a callable, got {type(source).__name__}")
    name = getattr(source, "__qualname__", type(source).__name__)
    digest = digest_of(source) if isinstance(source, nn.Module) else None
    return FeatureNetwork(source, name, digest, device=device)


def _of_classifier(net: Classifier, name: str, digest: str, device: torch.device) -> FeatureNetwork:
    def features_and_logits(x: Tensor) -> tuple[Tensor, Tensor]:
        features = net.features(x)
        return features, net.out(features)

    net.eval()
    shape = net.convs[0].in_channels, 32, 32
    return FeatureNetwork(features_and_logits, name, digest, shape=shape, classes=True, device=device)


def _compiled(path: str, device: torch.device) -> nn.Module:
    try:
        if path.endswith(".pt2"):
            return torch.export.load(path).module()
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: expected a file of TorchScript or torch.export, got {reason[:200]}") from None


def _inception(path: str, device: torch.device) -> FeatureNetwork:
    """The network of Heusel et al. 2017, converted from TensorFlow, as torch-fidelity has it."""
    check_regular(path)
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise ImportError("features: expected torch-fidelity, got none: pip install diffkern[fidelity]") from None
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torch-fidelity itself runs what a pickle says
        net = FeatureExtractorInceptionV3("inception", INCEPTION_LAYERS, feature_extractor_weights_path=path)
    except (AttributeError, RuntimeError, TypeError, ValueError, OSError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: expected weights of torch-fidelity's Inception, got {reason[:200]}") from None
    net.to(device)

    def features_and_logits(x: Tensor) -> tuple[Tensor, ...]:
        return net(to_pixels(x.expand(-1, 3, -1, -1)))  # grey is three times the same

    resize = "bilinear to 299x299 as TensorFlow 1 does, grey three times"
    return FeatureNetwork(features_and_logits, "Inception of torch-fidelity", _digest(path), resize, device=device)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
