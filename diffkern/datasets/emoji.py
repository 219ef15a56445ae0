"""1,911 things in the drawings of seven free emoji fonts, 10,039 pictures, with their names, tags and styles.

The pictures are packed at 32 x 32. ``diffkern data emoji --size 64 --out FOLDER`` makes them at 64 x 64 from npm.
"""

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import DATASET_STREAM, FOLDER, PictureSet, atlas, shrunk, words, words_of

SIDE = 32  # pixels of a packed picture
STYLES = ("noto", "twemoji", "fluent 3d", "fluent flat", "noto v1", "emojione", "fxemoji")
GROUPS = (
    "smileys", "people", "components", "animals", "food", "travel", "activities", "objects", "symbols", "flags",
)  # fmt: skip
"""Unicode's groups, in its order."""

HELD_OUT = 0.05
"""The share of (thing, style) pairs that the split "test" has and "train" has not."""

HELD_OUT_STEP = 2**30


@dataclass(frozen=True)
class Thing:
    """A row of ``emoji.tsv``: the code points that it is in Unicode, its English name, group and tags; who drew it."""

    code: str
    label: str
    group: str
    tags: tuple[str, ...]
    styles: tuple[str, ...]


def read_things() -> tuple[Thing, ...]:
    """Read ``emoji.tsv``."""
    rows = (line.split("\t") for line in (FOLDER / "emoji.tsv").read_text(encoding="utf-8").splitlines()[1:])
    return tuple(
        Thing(code, label, group, tuple(filter(None, tags.split(","))), tuple(styles.split(",")))
        for code, label, group, tags, styles in rows
    )


THINGS = read_things()


class Emoji(PictureSet):
    """Emoji: item i is picture i modulo their number, its caption the name, one tag and the style.

    5 % of the pairs of a thing and a style are held out as "test": never a thing as a whole.
    Pictures are 32 x 32 or of a size that divides 32. With ``folder``, which ``diffkern data emoji`` wrote, they are of
    its size or one that divides that. Raises ValueError for others, FileNotFoundError for a folder without pictures.

    folder  pictures to read instead of the packed ones
    """

    licence = "CC BY 4.0, Apache 2.0 and MIT by style; names and tags MIT"
    attributes = {"style": STYLES, "group": GROUPS, "thing": tuple(thing.label for thing in THINGS)}

    def __init__(
        self, n: int | None = None, size: int = SIDE, *, folder: str | os.PathLike | None = None, **options: Any
    ):
        super().__init__(n, size, **options)
        self.drawn: np.ndarray | None = None  # of all pairs, [K, S, S, 3], where they were downloaded
        self.files = None if folder is None else _files(Path(folder))
        if folder is not None:
            self._check_files(folder)
        elif SIDE % size:
            raise ValueError(
                f"size: expected one that divides {SIDE}, the size of the packed pictures, got {size}: "
                f"diffkern data emoji --size 64 --out FOLDER makes larger ones, for folder="
            )

    def available(self) -> int:
        return len(pairs(self.split))

    def picture(self, i: int) -> np.ndarray:
        pair = self._pair(i)
        if self.files is not None:
            return shrunk(_read(self.files[self.stem(i)]), self.size)
        if self.drawn is not None:
            return shrunk(self.drawn[numbers()[pair]], self.size)
        thing, style = pair
        return shrunk(atlas(file_of(style), SIDE)[places(style)[thing]], self.size)

    def values(self, i: int) -> dict[str, str]:
        thing, style = self._pair(i)
        return {"style": style, "group": THINGS[thing].group, "thing": THINGS[thing].label}

    def caption(self, i: int) -> str:
        thing, style = self._pair(i)
        tagged, styled = self.kept(i, 2)
        tags = THINGS[thing].tags
        which = self.noise(i, 0)[0] * len(tags) >> 32
        tag = [tags[which]] if tagged and tags else []
        return ", ".join((THINGS[thing].label, *tag)) + (f" in {style} style" if styled else "")

    def stem(self, i: int) -> str:
        thing, style = self._pair(i)
        return f"{THINGS[thing].code}-{style.replace(' ', '-')}"

    @classmethod
    def vocabulary(cls) -> tuple[str, ...]:
        texts = (*(text for thing in THINGS for text in (thing.label, *thing.tags)), *STYLES, "in style")
        return tuple(sorted({word for text in texts for word in words_of(text)}))

    @classmethod
    def fetch(cls, size: int = SIDE, **arguments: Any) -> "Emoji":
        """Make the set; above 32 x 32 by npm and resvg-py, at most at 64 x 64, the size of two of the styles."""
        if SIDE % size == 0:
            return cls(size=size, **arguments)
        from . import emoji_sources

        if emoji_sources.SIDE % size:
            raise ValueError(f"size: expected one that divides {emoji_sources.SIDE}, got {size}")
        made = cls(size=SIDE, **arguments)
        made.size, made.drawn = size, emoji_sources.download(THINGS, pairs("all"))
        return made

    def _pair(self, i: int) -> tuple[int, str]:
        found = pairs(self.split)
        return found[i % len(found)]

    def _check_files(self, folder: str | os.PathLike) -> None:
        place = os.fspath(folder)
        lacking = [stem for stem in map(self.stem, range(min(self.n, self.available()))) if stem not in self.files]
        if lacking:
            got = f"{place!r} without {len(lacking):,} of them, as {lacking[0]}.png"
            raise FileNotFoundError(f"folder: expected the pictures that diffkern data emoji writes, got {got}")
        side = len(_read(self.files[self.stem(0)]))
        if side % self.size:
            raise ValueError(f"size: expected one that divides {side}, that of {place!r}, got {self.size}")


@cache
def pairs(split: str) -> tuple[tuple[int, str], ...]:
    """Return the pictures of a split: the number of a thing and a style of it, things in their order."""
    every = [(number, style) for number, thing in enumerate(THINGS) for style in thing.styles]
    index = np.array([number * 8 + STYLES.index(style) for number, style in every])
    drawn = words(index, HELD_OUT_STEP, DATASET_STREAM, 0)[:, 0] < HELD_OUT * 2**32
    shown = {number for (number, _), out in zip(every, drawn, strict=True) if not out}
    found = [
        pair
        for pair, out in zip(every, drawn.tolist(), strict=True)
        if split == "all" or (out and pair[0] in shown) == (split == "test")  # a thing is never held out as a whole
    ]
    return tuple(found)


@cache
def numbers() -> dict[tuple[int, str], int]:
    """Return the number of each picture in the split "all"."""
    return {pair: number for number, pair in enumerate(pairs("all"))}


@cache
def places(style: str) -> dict[int, int]:
    """Return where the things that a style has are in its packed file."""
    having = (number for number, thing in enumerate(THINGS) if style in thing.styles)
    return {number: place for place, number in enumerate(having)}


def file_of(style: str) -> str:
    return f"emoji-{style.replace(' ', '-')}.webp"


def _files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in folder.rglob("*.png")}


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))
