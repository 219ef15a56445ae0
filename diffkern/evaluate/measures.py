"""All measures of one or several sets of samples, against the same data, from one pass over their features."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from torch import Tensor

from ..data import Dataset
from .detection import DECAY, detector
from .feature_network import FeatureNetwork
from .frechet import Moments, frechet_distance
from .nearest import K_DENSITY, K, nearest, neighbours, share_nearer
from .score import inception_score
from .sources import VERSIONS, Drawn, Features, Pictures, Source, extract

MOST = 10_000
"""Images of each set whose neighbours are compared, and that the detector gets."""

SPLITS = 10  # parts of the samples that have an Inception Score each

HELD_OUT = "held-out images"
"""The name of the row of data that the model has not seen."""


@dataclass(eq=False)
class Sets:
    """The inputs of a measure: features and statistics of the data, and features of the samples ``drawn``."""

    real: Features
    moments: Moments  # of the data
    unseen: Tensor | None  # the distances of held-out data to their nearest training examples
    drawn: Features
    wanted: Tensor | None  # the class of each sample, as the logits count; None where they do not count so

    @cached_property
    def pair(self) -> tuple[Tensor, Tensor]:
        """As many features of data as of samples, at most :data:`MOST`."""
        m = min(len(self.real.features), len(self.drawn.features), MOST)
        return self.real.features[:m], self.drawn.features[:m]


def _distance(sets: Sets) -> dict[str, float]:
    return {"distance": frechet_distance(sets.drawn.features, sets.moments)}


def _neighbours(sets: Sets) -> dict[str, float]:
    real, drawn = sets.pair
    return asdict(neighbours(real, drawn)) if len(real) > max(K, K_DENSITY) else {}


def _score(sets: Sets) -> dict[str, float]:
    if sets.drawn.logits is None or len(sets.drawn.logits) < SPLITS:
        return {}
    mean, std = inception_score(sets.drawn.logits, SPLITS)
    return {"score": mean, "score_std": std}


def _detector(sets: Sets) -> dict[str, float]:
    real, drawn = sets.pair
    if len(real) < 4:
        return {}
    found = detector(real, drawn)
    return {"detector": found.accuracy, "detector_low": found.low, "detector_high": found.high}


def _copying(sets: Sets) -> dict[str, float]:
    if sets.unseen is None:
        return {}
    return {"copying": share_nearer(nearest(sets.real.features, sets.drawn.features[:MOST]), sets.unseen)}


def _agreement(sets: Sets) -> dict[str, float]:
    if sets.wanted is None:
        return {}
    return {"agreement": (sets.drawn.logits.argmax(1) == sets.wanted).double().mean().item()}


MEASURES: dict[str, Callable[[Sets], dict[str, float]]] = {
    "distance": _distance,
    "neighbours": _neighbours,
    "score": _score,
    "detector": _detector,
    "copying": _copying,
    "agreement": _agreement,
}
"""By name: a function that gives named numbers, or none where they cannot be had."""


@dataclass(frozen=True)
class Row:
    """The measurements of ``n`` images.

    name        of the sampler, of the images, or :data:`HELD_OUT`
    steps       of the sampler, or None
    dimensions  of the features
    values      by name: "distance", "precision", "recall", "density", "coverage", "score", "score_std", "detector",
                "detector_low", "detector_high", "copying", "agreement": those that could be had
    seconds     that an image took to draw, without its features; None where none was drawn
    """

    name: str
    steps: int | None
    n: int
    dimensions: int
    values: dict[str, float]
    seconds: float | None


def evaluate(
    sources: Source | Sequence[Source],
    data: Dataset,
    network: FeatureNetwork,
    *,
    held_out: Dataset | None = None,
    measures: Iterable[str] = tuple(MEASURES),
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> Iterator[Row]:
    """Measure sets of samples against ``data``; a row as soon as it is known.

    sources   :class:`Drawn` or :class:`Pictures`
    data      what the model was trained on
    network   a :class:`FeatureNetwork`, as :func:`feature_network` makes it
    held_out  data that the model has not seen. As many of them as there are samples have a row of their own before
              these, the floor: no model should do better. There is none where there are fewer
    measures  names of :data:`MEASURES`
    cache     a folder that keeps features, by which an interrupted call goes on where it was

    The call raises TypeError or ValueError for arguments that do not fit. The iterator does the work.
    """
    sources = (sources,) if isinstance(sources, Pictures | Drawn) else tuple(sources)
    measures = tuple(measures)
    for name in measures:
        if name not in MEASURES:
            raise ValueError(f"measures: expected some of {', '.join(MEASURES)}, got {name!r}")
    network.check("data", data.shape)
    if held_out is not None and held_out.shape != data.shape:
        raise ValueError(f"held_out: expected images of shape {data.shape}, got {held_out.shape}")
    for source in sources:
        if source.shape not in (None, data.shape):
            raise ValueError(f"sources: expected images of shape {data.shape}, got {source.shape}")
    return _rows(sources, data, network, held_out, measures, dict(cache=cache, progress=progress))


def _rows(
    sources: Sequence[Source],
    data: Dataset,
    network: FeatureNetwork,
    held_out: Dataset | None,
    measures: Sequence[str],
    options: dict,
) -> Iterator[Row]:
    real = extract(Pictures(data, name="the data"), network, **options)
    moments, unseen, distances = Moments.of(real.features), None, None
    if held_out is not None and sources:
        most = Pictures(held_out, min(len(held_out), max(source.n for source in sources)), HELD_OUT)
        unseen = extract(most, network, **options)
        if "copying" in measures:
            distances = nearest(real.features, unseen.features[:MOST])

    def row(images: Source, drawn: Features, distances: Tensor | None) -> Row:
        named = images.wanted is not None and images.classes == data.classes
        known = network.classes and drawn.logits is not None and named and drawn.logits.shape[1] == len(data.classes)
        sets, values = Sets(real, moments, distances, drawn, images.wanted if known else None), {}
        for name in measures:
            values |= MEASURES[name](sets)
        seconds = drawn.seconds / images.n if isinstance(images, Drawn) else None
        return Row(images.name, images.steps, images.n, drawn.features.shape[1], values, seconds)

    floors = set()
    for source in sources:
        if unseen is not None and source.n <= len(held_out) and source.n not in floors:
            floors.add(source.n)
            yield row(Pictures(held_out, source.n, HELD_OUT), unseen.first(source.n), None)
        yield row(source, extract(source, network, **options), distances)


def protocol(data: Dataset, network: FeatureNetwork, held_out: Dataset | None = None) -> dict[str, dict]:
    """Return what numbers depend on besides the samples, fit for JSON: only numbers of one protocol are comparable."""
    return {
        "data": Pictures(data).description,
        "held_out": None if held_out is None else Pictures(held_out).description,
        "features": {"network": network.name, "sha256": network.digest, "resize": network.resize},
        "neighbours": {"k": K, "k_density": K_DENSITY, "images of each set": f"as many as samples, {MOST} at most"},
        "score": {"splits": SPLITS},
        "detector": {"kind": "logistic regression", "weight decay": DECAY, "halves": "one is fitted to, one tried"},
        "versions": VERSIONS,
    }
