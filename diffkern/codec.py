"""Codecs: between images and what a model diffuses. Pixels need none; latents have an autoencoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Codec:
    """Between images [N, ...] and latents, which are (encode(images) - shift) scale.

    encode, decode  of the autoencoder
    shift, scale    so that the latents have mean 0 and deviation 1
    """

    encode: Callable[[Tensor], Tensor] = lambda x: x
    decode: Callable[[Tensor], Tensor] = lambda x: x
    scale: float = 1.0
    shift: float = 0.0

    def to_model(self, images: Tensor) -> Tensor:
        """Return the latents of images, shifted and scaled as the model diffuses them."""
        x = self.encode(images)
        x = x - self.shift if self.shift else x
        return x * self.scale if self.scale != 1 else x

    def to_images(self, x: Tensor) -> Tensor:
        """The images of what the model has drawn."""
        x = x / self.scale if self.scale != 1 else x
        return self.decode(x + self.shift if self.shift else x)

    @classmethod
    def from_diffusers(cls, autoencoder: Any) -> "Codec":
        """The codec of an autoencoder of diffusers', as ``AutoencoderKL``, ``AutoencoderTiny`` or ``VQModel``.

        An image's latents are the mean of what its encoder tells, and nothing is drawn. Scale and shift are those of
        its config. Raises TypeError for what has no ``encode`` and ``decode``, ValueError for a config of means and
        deviations by channel.
        """
        config = getattr(autoencoder, "config", None)
        if config is None or not all(callable(getattr(autoencoder, name, None)) for name in ("encode", "decode")):
            raise TypeError(f"autoencoder: expected one of diffusers', got {type(autoencoder).__name__}")
        for name in ("latents_mean", "latents_std"):
            if config.get(name) is not None:
                raise ValueError(f"{name}: expected None, for latents have one scale, got {config[name]}")

        def encode(images: Tensor) -> Tensor:
            told = autoencoder.encode(images)
            return told.latent_dist.mode() if "latent_dist" in told else told.latents

        def decode(latents: Tensor) -> Tensor:
            return autoencoder.decode(latents).sample

        return cls(encode, decode, config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0)
