"""Sources of the images that are measured, a dataset or a model, and their features, block after block."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..arguments import check_guided, guidance_of, sampler_of
from ..data import Dataset
from ..guidance import Guidance
from ..images import to_uint8
from ..io.files import digest_of, read, write
from ..model import Model, unwrapped
from ..process import checked_count
from ..progress import bar as progress_bar
from ..samplers import SAMPLERS, Sampler
from ..sampling import Step, sample
from .feature_network import FeatureNetwork
from .loss import in_proportion, labels_of

VERSIONS = {"diffkern": __version__, "torch": torch.__version__}
BLOCK = 500  # images whose features are made, and kept in a cache, at a time


class Pictures:
    """The first ``n`` images of a dataset (None: all), in the order of :func:`in_proportion`."""

    def __init__(self, data: Dataset, n: int | None = None, name: str = "images"):
        self.data, self.name, self.steps = data, name, None
        self.n = checked_count("n", len(data) if n is None else n, 2)
        if self.n > len(data):
            raise ValueError(f"n: expected at most {len(data)}, got {n}")
        self.order = in_proportion(data.labels, len(data))[: self.n]
        self.wanted, self.classes = None if data.labels is None else data.labels[self.order], data.classes
        self.shape = data.shape

    @property
    def description(self) -> dict[str, Any]:
        return {
            "images": self.n,
            "of": len(self.data),
            "fingerprint": self.data.fingerprint,
            "resize": self.data.resize,
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Return all that the images are a function of, except for their number."""
        return {"fingerprint": self.data.fingerprint}

    def blocks(self, first: int = 0, update: Callable[[int], Any] | None = None) -> Iterator[tuple[Tensor, float]]:
        """The images from the ``first`` on, uint8 [at most BLOCK, C, H, W], each with the seconds that it took.

        update  called with a number of images that are done
        """
        for index in self.order[first:].split(BLOCK):
            yield self.data.images[index], 0.0
            if update is not None:
                update(len(index))


class Drawn:
    """The samples of a model of the seeds 0..n-1, as pixels.

    like        the data that the model is to draw: labels come in the proportions in which they have them, in the order
                of :func:`in_proportion`; None, or without labels: the classes in turn
    sampler, steps, guidance, batch_size, dtype  as :func:`diffkern.sample` takes them. Images depend on the batch size
                to rounding
    options     of the sampler: ``order=3``

    Raises TypeError or ValueError for arguments by which nothing can be drawn, before anything is.
    """

    def __init__(
        self,
        model: Model,
        n: int,
        *,
        sampler: str | Sampler | Callable[..., Any],
        steps: int,
        like: Dataset | None = None,
        guidance: float | Guidance = 1.0,
        batch_size: int = 100,
        dtype: torch.dtype | None = None,
        **options: Any,
    ):
        self.sampler, self.options = sampler_of(sampler), options
        self.model, self.name, self.steps = model, self.sampler.name, steps
        self.n, self.guidance = checked_count("n", n, 2), guidance
        self.batch_size, self.dtype = min(n, checked_count("batch_size", batch_size)), dtype  # a batch is filled up
        self.shape = model.shape if model.codec is None else None
        self.labels, self.wanted = labels_like(like, model, self.n)
        self._like, self.classes = (None, None) if self.wanted is None else (like.fingerprint, like.classes)
        program = self.sampler.trace(model.schedule.grid(steps), model.prediction, **options)
        self._steps = sum(row.begins for row in program.rows)
        check_guided(guidance_of(guidance, model, model.device), self.labels, model, self.n)

    @property
    def description(self) -> dict[str, Any]:
        guidance = self.guidance
        if isinstance(guidance, Guidance):
            named = guidance.classifier is None or isinstance(guidance.classifier, str | os.PathLike)
            guidance = repr(guidance) if named and guidance.network is None and guidance.measurement is None else None
        labels = "none" if self.labels is None else "in turn" if self.wanted is None else "as frequent as in the data"
        return {
            "images": self.n,
            "model": self.model.name,
            "weights": digest_of(self.model.network) if isinstance(unwrapped(self.model.network), nn.Module) else None,
            "sampler": self.name,
            "steps": self.steps,
            **({"options": {name: repr(value) for name, value in self.options.items()}} if self.options else {}),
            "guidance": guidance,
            "clip": repr(self.model.clip),
            "seeds": f"0..{self.n - 1}",
            "labels": labels,
            "batch_size": self.batch_size,
            "dtype": str(self.dtype or torch.float32).removeprefix("torch."),
        }

    @property
    def identity(self) -> dict[str, Any]:
        """Return all that the images are a function of, except for their number. TypeError for an unknown part."""
        found = {name: value for name, value in self.description.items() if name not in ("images", "seeds")}
        unknown = [name for name in ("weights", "guidance") if found[name] is None] + ["codec"] * bool(self.model.codec)
        unknown += ["sampler"] * (SAMPLERS.get(self.name) is not self.sampler)  # of a function, the name alone
        if unknown:
            raise TypeError(f"cache: expected a model that can be told from others, got one of unknown {unknown[0]}")
        model = {
            field.name: repr(getattr(self.model, field.name)) for field in fields(Model) if field.name != "network"
        }
        return {**found, **model, "labels": self._like, "device": self.model.device.type}

    def blocks(self, first: int = 0, update: Callable[[int], Any] | None = None) -> Iterator[tuple[Tensor, float]]:
        """As those of :class:`Pictures`; whole batches of ``sample``. A batch counts step by step, as parts of it."""
        size = max(1, BLOCK // self.batch_size) * self.batch_size
        for start in range(first, self.n, size):
            rows, begun = range(start, min(start + size, self.n)), time.perf_counter()
            x = sample(
                self.model,
                seeds=rows,
                labels=None if self.labels is None else self.labels[rows.start : rows.stop],
                sampler=self.sampler,
                steps=self.steps,
                **self.options,
                guidance=self.guidance,
                batch_size=self.batch_size,
                dtype=self.dtype,
                progress=False,
                callback=update and self._counter(update),
            )
            seconds = time.perf_counter() - begun
            yield torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2).contiguous(), seconds

    def _counter(self, update: Callable[[int], Any]) -> Callable[[Step], None]:
        """A callback of ``sample`` that counts images as their steps are done."""
        told = 0

        def count(step: Step) -> None:
            nonlocal told
            n = step.images.stop - step.images.start
            done = step.images.start + n * min(step.index + 1, self._steps) // self._steps
            update(done - told)
            told = done

        return count


Source = Pictures | Drawn


def labels_like(data: Dataset | None, model: Model, n: int) -> tuple[Tensor | None, Tensor | None]:
    """(the label of each of n samples as the model counts, and as the data do); None where there is none."""
    if model.classes is None:
        return None, None
    if data is None or data.labels is None:
        return labels_in_turn(model, n), None
    order = in_proportion(data.labels, len(data))
    index = order[torch.arange(n, dtype=torch.int64, device="cpu") % len(data)]
    return labels_of(data, model)[index], data.labels[index]


def labels_in_turn(model: Model, n: int) -> Tensor | None:
    """int64 [n]: 0, 1, 2, ... and from the first class again; None for a model without classes."""
    return None if model.classes is None else torch.arange(n, dtype=torch.int64, device="cpu") % len(model.classes)


@dataclass(frozen=True, eq=False)
class Features:
    """The features [n, D] and logits [n, K] (or None) of a source's images, float32; and the seconds to draw them."""

    features: Tensor
    logits: Tensor | None
    seconds: float = 0.0

    @classmethod
    def of(cls, blocks: list[Mapping[str, Tensor]], seconds: float) -> "Features":
        joined = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        return cls(joined["features"], joined.get("logits"), seconds)

    def first(self, n: int) -> "Features":
        return Features(self.features[:n], None if self.logits is None else self.logits[:n])


def extract(
    source: Source, network: FeatureNetwork, *, cache: str | os.PathLike | None = None, progress: bool = True
) -> Features:
    """Make the features of all images of ``source``. They take 4 (D + K) bytes an image, and no image is kept.

    cache  a folder that keeps each block: an interrupted call goes on where it was. Raises TypeError for what cannot be
           told from other images or networks by its weights
    """
    folder = None if cache is None else Path(cache, _key(source, network))
    blocks, done, seconds = [], 0, 0.0
    while folder is not None and done < source.n and (path := folder / f"{done:09}.safetensors").exists():
        description, tensors = read(path)
        if done + description["images"] > source.n:
            tensors = {name: tensor[: source.n - done] for name, tensor in tensors.items()}
        blocks.append(tensors)
        seconds += description["seconds"] * len(tensors["features"]) / description["images"]
        done += len(tensors["features"])
    with progress_bar(source.n, f"features of {source.name}", "img", progress, initial=done) as bar:
        for images, took in source.blocks(done, bar.update if progress else None):
            features, logits = network(images)
            block = {"features": features} | ({} if logits is None else {"logits": logits})
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                write(folder / f"{done:09}.safetensors", {"images": len(images), "seconds": took}, block)
            blocks.append(block)
            seconds, done = seconds + took, done + len(images)
    return Features.of(blocks, seconds)


def _key(source: Source, network: FeatureNetwork) -> str:
    if network.digest is None:
        raise TypeError(f"cache: expected a feature network with weights, by which to tell it, got {network.name}")
    known = {"images": source.identity, "network": [network.digest, network.resize], "versions": VERSIONS}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
