"""unCLIP as one object: CLIP, the prior, the decoder and perhaps an upsampler."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..arguments import loaded, run_of
from ..image_to_image import LEVEL, check_stage, sample_and_enlarge
from ..model import Model, check_models, unwrapped
from ..process import checked_count
from ..runtime import Run
from ..sampling import sample, turn
from ..system import System, part_seeds, seeds_of
from . import files
from .clip import CLIP


@dataclass(repr=False)
class UnCLIP(System):
    """Draws pictures of what a text says, of what a picture shows, or of what lies between two (Ramesh et al. 2022).

    clip            embeds pictures and texts
    prior           a model of image embeddings [D], given "text": a text's embedding
    decoder         a model of pictures, given "embedding", of a picture, and "caption", of a text
    upsampler       a model that enlarges them, given "image", as those of a cascade, or None
    guidance        of the decoder, unless told otherwise
    prior_guidance  of the prior
    steps, prior_steps  how many; the upsampler has as many as the decoder
    augmentation    of the upsampler's pictures, in time steps
    name            for file names and titles

    The models see embeddings times sqrt(D), whose elements have a mean square of 1.
    """

    clip: CLIP
    prior: Model
    decoder: Model
    upsampler: Model | None = None
    guidance: float = 2.5
    prior_guidance: float = 2.0
    steps: int = 25
    prior_steps: int = 25
    augmentation: int = LEVEL
    name: str = "unclip"

    def __post_init__(self):
        check_models(prior=self.prior, decoder=self.decoder)
        for part, names in ((self.prior, ("text",)), (self.decoder, ("embedding", "caption"))):
            if tuple(condition.name for condition in part.conditions) != names:
                got = tuple(condition.name for condition in part.conditions)
                raise ValueError(f"{part.name}: expected a model with the conditions {names}, got {got}")

        if self.upsampler is not None:
            check_models(upsampler=self.upsampler)
            check_stage(self.upsampler, self.decoder.shape)

    # --- what it draws ---

    def sample(
        self,
        n: int | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        seeds: Any = None,
        guidance: Any = None,
        prior_guidance: float | None = None,
        steps: Any = None,
        labels: None = None,
        **options: Any,
    ) -> Tensor:
        """Draw pictures [N, 3, H, W] in [-1, 1].

        prompt          a text for all pictures or one for each; None: of anything
        n, seeds        how many, which have the seeds 0..n-1; or the seed of each; default: as many as texts
        guidance        of the decoder by embedding and text; ``prior_guidance`` of the prior by the text
        steps           of the decoder
        options         as :func:`diffkern.sample` takes them, for the decoder and the upsampler; ``augmentation``

        Warns of words that CLIP has not learned. Raises TypeError or ValueError for an argument that does not fit.
        """
        if labels is not None:
            raise ValueError(f"labels: expected None, this model has no classes, got {labels!r}")
        texts = None if prompt is None or isinstance(prompt, str) else list(prompt)
        if n is None and seeds is None and texts is not None:
            n = len(texts)
        seeds = seeds_of(n, seeds)
        if texts is not None and len(texts) != len(seeds):
            raise ValueError(f"prompt: expected a text, or {len(seeds)}, one for each picture, got {len(texts)}")
        if texts is None and prompt is not None:
            texts = [prompt] * len(seeds)
        caption = None if texts is None else self._scaled(self._texts(texts))
        run = run_of(options.pop("run", None), options)
        embedding = self.draw_embeddings(caption, seeds, prior_guidance, batch_size=run.batch_size)
        options["run"] = run
        return self._decode(embedding, caption, seeds, guidance, steps, options)

    def vary(
        self,
        image: Tensor,
        n: int | None = None,
        *,
        seeds: Any = None,
        guidance: Any = None,
        steps: Any = None,
        **options: Any,
    ) -> Tensor:
        """Draw pictures [n, 3, H, W] of what ``image`` [3, H, W] in [-1, 1] shows: those that have its embedding.

        Eight of them, of the seeds 0 to 7, unless n or seeds say otherwise.
        """
        if not isinstance(image, Tensor) or image.ndim != 3:
            got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image: expected a picture [3, H, W], got {got}")
        seeds = seeds_of(8 if n is None and seeds is None else n, seeds)
        embedding = self._scaled(self._images(image[None])).expand(len(seeds), -1)
        return self._decode(embedding, None, seeds, guidance, steps, options)

    def interpolate(
        self, a: Any, b: Any, n: int = 9, *, seed: int = 0, guidance: Any = None, steps: Any = None, **options: Any
    ) -> Tensor:
        """Draw n pictures that lead from ``a`` to ``b``, each a picture [3, H, W], a text, or the seed of a picture.

        Their embeddings are turned into each other. All frames have the noise of one ``seed``.
        """
        checked_count("n", n, 2)
        ends = [self._end(name, end) for name, end in (("a", a), ("b", b))]
        w = torch.linspace(0, 1, n, dtype=torch.float64, device="cpu")
        embedding = self._scaled(turn(*ends, w))
        return self._decode(embedding, None, seeds_of(None, [seed] * n), guidance, steps, options)

    @torch.no_grad()
    def similarity(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """The cosine of each picture [N, 3, H, W] and each of K texts: [N, K]. Its argmax is a zero-shot class."""
        return self._images(images) @ self._texts([texts] if isinstance(texts, str) else texts).T

    @property
    def drawn(self) -> Model:
        return self.upsampler or self.decoder

    @property
    def stages(self) -> dict[int, Model]:
        return {} if self.upsampler is None else {2: self.upsampler}

    def models(self) -> dict[str, Model]:
        """The parts but for CLIP, by name."""
        parts = dict(prior=self.prior, decoder=self.decoder, upsampler=self.upsampler)
        return {name: part for name, part in parts.items() if part is not None}

    def networks(self) -> dict[str, nn.Module]:
        return {"clip": self.clip, **{name: unwrapped(part.network) for name, part in self.models().items()}}

    def description(self) -> dict[str, Any]:
        return files.describe(self)

    # --- its parts ---

    @torch.no_grad()
    def draw_embeddings(
        self, text: Tensor | None, seeds: Tensor, guidance: float | None = None, *, batch_size: int | None = None
    ) -> Tensor:
        """Draw an image embedding for each text's [N, D], or of anything for None: [N, D], of length sqrt(D)."""
        weight = self.prior_guidance if guidance is None else guidance
        given = dict(guidance=1.0) if text is None else dict(text=text, guidance=weight)
        given |= dict(steps=self.prior_steps, batch_size=batch_size, progress=False)
        z = sample(self.prior, seeds=part_seeds(seeds, 1), **given)
        return self._scaled(F.normalize(z, dim=1))

    def _decode(
        self,
        embedding: Tensor,
        caption: Tensor | None,
        seeds: Tensor,
        guidance: Any,
        steps: Any,
        options: dict[str, Any],
    ) -> Tensor:
        given = dict(embedding=embedding, caption=caption, guidance=self.guidance if guidance is None else guidance)
        given |= dict(steps=self.steps if steps is None else steps, level=self.augmentation)
        return sample_and_enlarge(self.decoder, self.stages, seeds, **given, **options)

    def _end(self, name: str, end: Any) -> Tensor:
        """The embedding [D] of a picture, a text or a seed."""
        if isinstance(end, Tensor) and end.ndim == 3:
            return self._images(end[None])[0]
        if isinstance(end, str):
            return self.draw_embeddings(self._scaled(self._texts([end])), seeds_of(1, None))[0]
        if isinstance(end, int) and not isinstance(end, bool):
            return self.draw_embeddings(None, seeds_of(None, [end]))[0]
        raise TypeError(f"{name}: expected a picture [3, H, W], a text or a seed, got {type(end).__name__}")

    @torch.no_grad()
    def _images(self, images: Tensor) -> Tensor:
        return self.clip.embed_images(images)

    @torch.no_grad()
    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.clip.embed_texts(texts)

    def _scaled(self, embedding: Tensor) -> Tensor:
        return F.normalize(embedding, dim=1) * math.sqrt(self.clip.config["features"])


def vary(model: str | os.PathLike | UnCLIP, image: Tensor, n: int | None = None, **options: Any) -> Tensor:
    """Draw n pictures of what ``image`` shows: :meth:`UnCLIP.vary` of a model, or of a name or a file of one."""
    run = run_of(options.pop("run", None), options)
    return _loaded(model, run).vary(image, n, run=run, **options)


def similarity(model: str | os.PathLike | UnCLIP, images: Tensor, texts: Sequence[str]) -> Tensor:
    """The cosine of each picture and each text, [N, K]: :meth:`UnCLIP.similarity` of a model, a name or a file."""
    return _loaded(model, Run()).similarity(images, texts)


def _loaded(model: Any, run: Run) -> UnCLIP:
    model = loaded(model, run)
    if not isinstance(model, UnCLIP):
        raise TypeError(f"model: expected an UnCLIP, or the name or file of one, got {type(model).__name__}")
    return model
