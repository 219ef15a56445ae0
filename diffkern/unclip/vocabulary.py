"""The words that a text encoder knows."""

import difflib
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..datasets import words_of


class UnknownWord(UserWarning):
    """A text has a word that the model has not learned, and that it leaves out."""


class Vocabulary:
    """Words by number, from 1 on; 0 fills up a text that is shorter than another."""

    def __init__(self, words: Sequence[str]):
        self.words = tuple(words)
        self.numbers = {word: number for number, word in enumerate(self.words, 1)}

    def __len__(self) -> int:
        return len(self.words)

    def nearest(self, word: str, n: int = 3) -> list[str]:
        """Return up to ``n`` known words that are spelled nearly as ``word``."""
        return difflib.get_close_matches(word, self.words, n, cutoff=0.5)

    def numbers_of(self, text: str) -> list[int]:
        """The numbers of the words of a text that are known.

        Warns, by :class:`UnknownWord`, of others, which are left out. Raises ValueError for a text without known words.
        """
        if not isinstance(text, str):
            raise TypeError(f"prompt: expected text, got {type(text).__name__}")
        found = words_of(text)
        unknown = [word for word in dict.fromkeys(found) if word not in self.numbers]
        told = "; ".join(f"{word!r} (nearest: {', '.join(self.nearest(word)) or 'none'})" for word in unknown)
        known = [self.numbers[word] for word in found if word in self.numbers]
        if not known:
            raise ValueError(f"prompt: expected words that the model knows, got {told or repr(text)}")
        if unknown:
            warnings.warn(f"prompt: expected words that the model knows, left out {told}", UnknownWord, stacklevel=4)
        return known

    def rows(self, texts: Iterable[str], length: int) -> Tensor:
        """The numbers of the first ``length`` words of each text: [N, length] int64."""
        rows = [self.numbers_of(text)[:length] for text in texts]
        return torch.tensor([row + [0] * (length - len(row)) for row in rows], dtype=torch.int64, device="cpu")
