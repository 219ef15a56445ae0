"""Portraits drawn from 63 parts and 21 colours: 24.2 million faces, each with its attributes, at any size.

The parts are those of "Personas by Draftbit" (https://personas.draftbit.com), CC BY 4.0, as DiceBear publishes them.
"""

import json
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np

from . import DATASET_STREAM, FOLDER, PictureSet, atlas, on_white, rasterized, renderer, shrunk, words, words_of

SIDE = 64  # pixels of a packed face; the smaller sizes that divide it are averages of these
PACKED = {"train": 1536, "test": 512}
"""The first faces of seed 0 of each split are in ``faces.webp``, one split after the other."""

PART = {  # attribute: the key in faces.json, x and y in a picture of 64 x 64; drawn in this order
    "eyes": ("eyes", 20, 24),
    "hair": ("hair", 2, 2),
    "clothes": ("body", 11, 44),
    "mouth": ("mouth", 23, 36),
    "nose": ("nose", 24, 28),
    "beard": ("facialHair", 14, 26),
}
CLASSES: dict[str, dict[str, str]] = {  # attribute: name of the class, the part's key or the colour
    "skin": {
        "very light": "eeb4a4", "light": "e7a391", "medium-light": "e5a07e", "medium": "d78774",
        "medium-dark": "b16a5b", "dark": "92594b", "very dark": "623d36",
    },
    "hair": {
        "long hair": "long", "side-shaved hair": "sideShave", "short combover": "shortCombover",
        "curly high top": "curlyHighTop", "bob": "bobCut", "curly hair": "curly", "pigtails": "pigtails",
        "curly bun": "curlyBun", "buzz cut": "buzzcut", "bob with bangs": "bobBangs", "no hair": "bald",
        "little hair": "balding", "cap": "cap", "undercut bun": "bunUndercut", "fade": "fade", "beanie": "beanie",
        "straight bun": "straightBun", "very long hair": "extraLong", "combover with sideburns": "shortComboverChops",
        "mohawk": "mohawk",
    },
    "hair_colour": {
        "black": "362c47", "brown": "6c4545", "red": "e15c66", "pink": "e16381", "orange": "f27d65",
        "ginger": "f29c65", "white": "dee1f5",
    },
    "eyes": {
        "open eyes": "open", "closed eyes": "sleep", "wink": "wink", "glasses": "glasses", "happy eyes": "happy",
        "sunglasses": "sunglasses",
    },
    "nose": {"round nose": "mediumRound", "small nose": "smallRound", "wrinkled nose": "wrinkles"},
    "mouth": {
        "smile": "smile", "frown": "frown", "open mouth": "surprise", "pacifier": "pacifier", "big smile": "bigSmile",
        "smirk": "smirk", "full lips": "lips",
    },
    "beard": {
        "no beard": "none", "beard": "beardMustache", "moustache": "pyramid", "walrus moustache": "walrus",
        "goatee": "goatee", "stubble": "shadow", "soul patch": "soulPatch",
    },
    "clothes": {"shirt": "squared", "sweater": "rounded", "top": "small", "checkered shirt": "checkered"},
    "clothes_colour": {
        "blue": "456dff", "turquoise": "54d7c7", "purple": "7555ca", "green": "6dbb58", "red": "e24553",
        "yellow": "f3b63a", "pink": "f55d81",
    },
}  # fmt: skip
CHANCES = {"beard": (12, 1, 1, 1, 1, 1, 1)}
"""How often a class is drawn, where not all are equally likely: two faces in three have no beard."""

UNCOLOURED = ("no hair", "cap", "beanie")  # hair whose colour is hardly seen
NO_ARTICLE = ("clothes", "eyes", "glasses", "hair", "lips", "pigtails", "skin", "stubble", "sunglasses")

HELD_OUT = (
    (("hair", "mohawk"), ("eyes", "glasses")),
    (("hair", "pigtails"), ("mouth", "pacifier")),
    (("hair", "cap"), ("eyes", "sunglasses")),
    (("mouth", "big smile"), ("clothes", "checkered shirt")),
    (("skin", "medium"), ("clothes_colour", "yellow")),
)
"""Pairs of attributes that no face of the split "train" has, and of which every face of "test" has one."""


class Faces(PictureSet):
    """Faces whose attributes are drawn independently: uniformly, but that two in three have no beard.

    A face is a function of ``(seed, i)`` and of the split, anywhere. "train" never has the pairs :data:`HELD_OUT`;
    "test" has one in every face. Faces of "train" and another seed are held-out faces of the same distribution.

    Needs resvg-py (``pip install diffkern[faces]``), but for the first 1,536 faces of "train" and 512 of "test" of seed
    0, at 64, 32, 16 and 8 pixels and below. Raises ImportError where it needs that and there is none.
    """

    licence = 'CC BY 4.0, "Personas by Draftbit" (https://personas.draftbit.com), redrawn'
    attributes = {name: tuple(classes) for name, classes in CLASSES.items()}

    def __init__(self, n: int | None = None, size: int = SIDE, **options: Any):
        super().__init__(n, size, **options)
        if SIDE % size or self.n > self.packed:
            renderer()

    @property
    def packed(self) -> int:
        """How many of the first faces are in the packed file."""
        return PACKED.get(self.split, 0) if self.seed == 0 else 0

    def available(self) -> int:
        if find_spec("resvg_py") is None:
            return self.packed or 1
        return 1000 if self.split == "test" else 1_000_000

    def values(self, i: int) -> dict[str, str]:
        numbers = draw(np.array([i]), self.seed, self.split)[0].tolist()
        return {name: classes[number] for (name, classes), number in zip(self.attributes.items(), numbers, strict=True)}

    def picture(self, i: int) -> np.ndarray:
        if SIDE % self.size:
            return render(svg(self.values(i)), self.size)
        if i < self.packed:
            first = 0 if self.split == "train" else PACKED["train"]
            return shrunk(atlas("faces.webp", SIDE)[first + i], self.size)
        return shrunk(render(svg(self.values(i)), SIDE), self.size)

    def caption(self, i: int) -> str:
        return describe(self.values(i), dict(zip(self.attributes, self.kept(i, len(self.attributes)), strict=True)))

    @classmethod
    def vocabulary(cls) -> tuple[str, ...]:
        names = (name for classes in cls.attributes.values() for name in classes if name != "no beard")
        others = {"a", "an", "and", "clothes", "face", "skin", "with"}
        return tuple(sorted(others.union(*map(words_of, names))))


def draw(index: np.ndarray, seed: int, split: str) -> np.ndarray:
    """Draw the attributes of faces ``index`` [N] by Philox: the number of each one's class, int64 [N, 9]."""
    drawn = np.empty((len(index), len(CLASSES)), np.int64)
    left, attempt = np.arange(len(index)), 0
    while len(left):  # a face of "train" that has a held-out pair is drawn again
        blocks = [words(index[left], 4 * attempt + block, DATASET_STREAM, seed) for block in range(3)]
        w = np.concatenate(blocks, 1)  # uint64 [N, 12]
        for k, (name, classes) in enumerate(CLASSES.items()):
            ends = np.cumsum(CHANCES.get(name, (1,) * len(classes)))
            drawn[left, k] = np.searchsorted(ends, below(w[:, k], int(ends[-1])), side="right")
        if split == "test":
            which = below(w[:, -1], len(HELD_OUT))
            for number, pair in enumerate(PAIRS):
                for k, value in pair:
                    drawn[left[which == number], k] = value
        if split != "train":
            break
        has = np.zeros(len(left), bool)
        for (a, first), (b, second) in PAIRS:
            has |= (drawn[left, a] == first) & (drawn[left, b] == second)
        left, attempt = left[has], attempt + 1
    return drawn


PAIRS = [
    [(list(CLASSES).index(attribute), list(CLASSES[attribute]).index(name)) for attribute, name in pair]
    for pair in HELD_OUT
]
"""HELD_OUT in numbers."""


def below(word: np.ndarray, count: int) -> np.ndarray:
    """Turn words of 32 bits, as uint64 [N], into integers of 0..count-1, int64 [N]."""
    return (word * np.uint64(count) >> np.uint64(32)).astype(np.int64)


def describe(values: dict[str, str], kept: dict[str, bool]) -> str:
    """Write the caption of a face from the attributes that are ``kept``: "a face with a black bob, a smile, ..."."""
    hair = values["hair"]
    colour = values["hair_colour"] if kept["hair_colour"] and hair not in UNCOLOURED else ""
    parts = []
    if kept["skin"]:
        parts.append(f"{values['skin']} skin")
    if kept["hair"]:
        parts.append(f"{hair[:-4]}{colour} hair" if colour and hair.endswith(" hair") else f"{colour} {hair}".strip())
    elif colour:
        parts.append(f"{colour} hair")
    parts += [values[name] for name in ("eyes", "nose", "mouth") if kept[name]]
    if kept["beard"] and values["beard"] != "no beard":
        parts.append(values["beard"])
    if kept["clothes"] or kept["clothes_colour"]:
        colour = values["clothes_colour"] if kept["clothes_colour"] else ""
        parts.append(f"{colour} {values['clothes'] if kept['clothes'] else 'clothes'}".strip())
    parts = [_with_article(part) for part in parts]
    if not parts:
        return "a face"
    return f"a face with {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}"


def _with_article(part: str) -> str:
    last = part.split(" with ")[0].split()[-1]
    if last in NO_ARTICLE:
        return part
    return f"{'an' if part[0] in 'aeiou' else 'a'} {part}"


@cache
def _parts() -> dict[str, Any]:
    return json.loads((FOLDER / "faces.json").read_text())


def svg(values: dict[str, str]) -> str:
    """Write a face as an SVG of 64 x 64."""
    parts = _parts()
    body = parts["face"]
    for name, (key, x, y) in PART.items():
        part = CLASSES[name][values[name]]
        if part != "none":
            body += f'<g transform="translate({x} {y})">{parts[key][part]}</g>'
    for mark, name in (("@skin@", "skin"), ("@hair@", "hair_colour"), ("@clothing@", "clothes_colour")):
        body = body.replace(mark, "#" + CLASSES[name][values[name]])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIDE} {SIDE}" fill="none">{body}</svg>'


def render(text: str, size: int) -> np.ndarray:
    """Draw an SVG over white: uint8 [size, size, 3]. Raises ImportError without resvg-py."""
    return on_white(rasterized(text, size))
