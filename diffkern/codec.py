"""Codecs: between images and what a model diffuses. Pixels need none; latents have an autoencoder."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """encode: images [N, ...] -> latents; decode: back; scale: times the latents, so that their deviation is 1."""

    encode: Callable[[Tensor], Tensor] = lambda x: x
    decode: Callable[[Tensor], Tensor] = lambda x: x
    scale: float = 1.0

    def to_model(self, images: Tensor) -> Tensor:
        """What the model diffuses, of images."""
        return self.encode(images) * self.scale if self.scale != 1 else self.encode(images)

    def to_images(self, x: Tensor) -> Tensor:
        """The images of what the model has drawn."""
        return self.decode(x / self.scale if self.scale != 1 else x)
