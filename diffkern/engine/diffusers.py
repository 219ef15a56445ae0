"""diffusers' ``UNet2DModel``, run by the engine of our U-Net."""

from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..networks.diffusers import check_same, from_diffusers
from .unet import Engine
from .watch import Watch


class DiffusersEngine(nn.Module):
    """A ``UNet2DModel`` with its own signature and attributes, so that pipelines take it."""

    def __init__(self, network: nn.Module, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.network, self.dtype = network, dtype
        self._share()
        self._runs()

    def _share(self) -> None:
        """Makes ours of its weights as they are now."""
        self.engine, self._watch = Engine(from_diffusers(self.network), self.dtype), Watch(self.network)
        self._agrees: bool | None = None  # not compared yet

    def _runs(self) -> bool:
        """Are there modules alone that the engine knows, as they are written? ValueError if it computes something else,
        which is looked at once."""
        kinds = {kind.__module__.split(".")[0] for kind in self._watch.kinds}
        if not (kinds <= {"diffusers", "torch"} and self._watch.does_as_written()):
            return False
        if self._agrees is None:
            self._agrees = False
            check_same(self.engine.network, self.network)
            self._agrees = True
        return self._agrees

    def _same(self) -> bool:
        """Does the engine what the network does now?"""
        try:
            if self._watch.changed_members():
                self._share()
            return self._runs()
        except ValueError:  # it is a U-Net of ours no more
            return False

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    def forward(self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, **options) -> Any:
        """As ``UNet2DModel.forward``: ``UNet2DOutput``, or a tuple with ``return_dict=False``."""
        t = timestep
        if isinstance(t, Integral):
            t = torch.tensor(t, dtype=torch.int64, device=sample.device)
        whole = isinstance(t, Tensor) and not t.is_floating_point()
        unlike = not whole or (class_labels is None) != (self.engine.config["num_classes"] is None)
        if unlike or not self._same():
            return self.network(sample, timestep, class_labels, **options)
        out = self.engine(sample, t.expand(len(sample)), class_labels)
        if not options.get("return_dict", True):
            return (out,)
        from diffusers.models.unets.unet_2d import UNet2DOutput

        return UNet2DOutput(sample=out)
