"""Data sets as code: captioned pictures, each set a module of this package.

A set is a subclass of :class:`PictureSet`. The name of its module is the name of the set, and the first line of the
module's docstring is its description. Nothing else lists it: training, evaluation and ``diffkern data`` find it here.
"""

import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar

import numpy as np
import torch

from ..philox import words

FOLDER = Path(__file__).parent

DATASET_STREAM = 7
"""The Philox stream of all that a set draws: attributes, captions, and which pairs are held out."""

CAPTION = 2**31
"""The step from which on the captions draw. Smaller ones are the sets' own."""

SPLITS = ("train", "test", "all")


class PictureSet(ABC):
    """Captioned pictures: a map-style dataset whose item i is a function of ``(seed, i)`` alone.

    An item is a dict of "x", uint8 [3, size, size]; "caption", a str; and "attributes", the class of each attribute by
    name. ``transform`` makes of it what training is to read.

    n          how many items; a set of fewer pictures begins again, with other captions. Default: as many as it has
    size       of a side, in pixels
    split      "train"; "test", what is held out from training; or "all"
    seed       of what is drawn
    drop       the chance that a caption leaves out a part: 0 tells all, 1 only what the picture is of
    transform  a function of the item

    Raises TypeError or ValueError that names the argument.

    A set defines the class variables and the methods up to :meth:`vocabulary`; see ``faces.py``.
    """

    licence: ClassVar[str]  # of the pictures, in a line; THIRD_PARTY.md has the notices
    attributes: ClassVar[Mapping[str, tuple[str, ...]]]  # their names, and the names of the classes of each

    def __init__(
        self,
        n: int | None = None,
        size: int = 32,
        *,
        split: str = "train",
        seed: int = 0,
        drop: float = 0.0,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ):
        for name, value in (("n", 1 if n is None else n), ("size", size)):
            if type(value) is not int:
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if type(seed) is not int:
            raise TypeError(f"seed: expected an int, got {type(seed).__name__}")
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if not 0 <= drop <= 1:
            raise ValueError(f"drop: expected a probability, got {drop}")
        self.size, self.split, self.seed, self.drop, self.transform = size, split, seed, drop, transform
        self.n = self.available() if n is None else n

    # --- what a set defines ---

    @abstractmethod
    def available(self) -> int:
        """Return how many different pictures there are, or as many as a long run sees."""

    @abstractmethod
    def picture(self, i: int) -> np.ndarray:
        """Return picture i: uint8 [size, size, 3]."""

    @abstractmethod
    def values(self, i: int) -> dict[str, str]:
        """Return the class of each attribute of picture i, by the attribute's name."""

    @abstractmethod
    def caption(self, i: int) -> str:
        """Return the caption of picture i; :meth:`kept` draws which of its parts it has."""

    def stem(self, i: int) -> str:
        """Return a name for the file of picture i, without its suffix."""
        return f"{i:07d}"

    @classmethod
    @abstractmethod
    def vocabulary(cls) -> tuple[str, ...]:
        """Return every word that a caption of the set can have, sorted."""

    @classmethod
    def fetch(cls, **arguments: Any) -> "PictureSet":
        """Make the set with what its arguments need to be downloaded, as ``diffkern data`` does."""
        return cls(**arguments)

    # --- what all sets share ---

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Any:
        i = range(self.n)[i]  # IndexError beyond the end
        x = torch.from_numpy(np.ascontiguousarray(self.picture(i).transpose(2, 0, 1)))
        item = {"x": x, "caption": self.caption(i), "attributes": self.values(i)}
        return item if self.transform is None else self.transform(item)

    @property
    def fingerprint(self) -> str:
        """Return what makes the pictures, by which a run that is resumed tells whether its data are the same."""
        return f"{type(self).__name__} {self.split} seed {self.seed} size {self.size}"

    def noise(self, i: int, step: int) -> list[int]:
        """Return four words of 32 bits: a function of the seed, the item and the step."""
        return words(np.array([i]), step, DATASET_STREAM, self.seed)[0].tolist()

    def kept(self, i: int, parts: int) -> list[bool]:
        """Draw which of the parts of caption i it has."""
        drawn = [word for block in range(-(-parts // 4)) for word in self.noise(i, CAPTION + block)]
        return [word >= self.drop * 2**32 for word in drawn[:parts]]


class Labelled:
    """A transform: keeps x, with the number of its class of ``attribute`` as "label", or without a label for None."""

    def __init__(self, attribute: str | None, classes: tuple[str, ...] | None):
        self.attribute = attribute
        self.labels = {name: label for label, name in enumerate(classes or ())}

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        if self.attribute is None:
            return {"x": item["x"]}
        return {"x": item["x"], "label": self.labels[item["attributes"][self.attribute]]}


def sets() -> dict[str, type[PictureSet]]:
    """Return the sets by name."""
    found = {}
    for module in iter_modules(__path__):
        members = vars(import_module(f".{module.name}", __name__)).values()
        for member in members:
            if isinstance(member, type) and issubclass(member, PictureSet) and member.__module__.endswith(module.name):
                found[module.name] = member
    return found


def attribute_of(made: type[PictureSet], attribute: str | None) -> tuple[str, ...] | None:
    """Return the classes of an attribute of a set, None for None. Raises ValueError for one that it has not."""
    if attribute is None:
        return None
    if attribute not in made.attributes:
        expected = ", ".join(made.attributes)
        raise ValueError(f"attribute: expected one of {expected}, got {attribute!r}")
    return made.attributes[attribute]


def words_of(text: str) -> list[str]:
    """Return the words of a caption, in lower case: letters and digits, and apostrophes between them."""
    return re.findall(r"[^\W_]+(?:['’][^\W_]+)*", text.lower())


def shrunk(pixels: np.ndarray, size: int) -> np.ndarray:
    """Average a picture [S, S, 3] uint8 over equal squares: [size, size, 3] uint8. ``size`` divides S."""
    side = len(pixels) // size
    if side == 1:
        return pixels
    sums = pixels.reshape(size, side, size, side, 3).sum((1, 3), dtype=np.uint32)
    return ((sums + side * side // 2) // (side * side)).astype(np.uint8)


def on_white(rgba: np.ndarray) -> np.ndarray:
    """Composite uint8 [..., 4] over white: uint8 [..., 3]."""
    alpha = rgba[..., 3:].astype(np.uint32)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


@cache
def atlas(name: str, size: int) -> np.ndarray:
    """Read a packed file, pictures in rows from the top left, the last row filled up: uint8 [K, size, size, 3]."""
    from PIL import Image

    with Image.open(FOLDER / name) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    return pixels.reshape(rows, size, columns, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)


def renderer() -> Any:
    """Return the module resvg_py. Raises ImportError without it."""
    try:
        import resvg_py
    except ImportError:
        raise ImportError(
            "data: expected resvg-py, which draws the pictures that are not packed, got none: "
            "run pip install 'diffkern[faces]'"
        ) from None
    return resvg_py


def rasterized(svg: str, size: int) -> np.ndarray:
    """Draw an SVG: uint8 [size, size, 4], alpha last and not multiplied in. Raises ImportError without resvg-py."""
    from PIL import Image

    png = renderer().svg_to_bytes(svg_string=svg, width=size, height=size)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGBA"))
