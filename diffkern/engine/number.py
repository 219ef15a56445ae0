"""A number that a network gets and may hand to torch, and that Python refuses to look into."""

from typing import Any

from .words import words


class NumberRead(TypeError):
    """Python computed with a number: what a graph would hold is one value of it."""


class Number:
    """An int or a float of a call, while a network is captured.

    It is of the number's own class, so that a network sees which it is. Only ``torch.tensor`` and other functions of
    torch take it: there the graph knows it. Arithmetic and comparison raise.
    """

    @staticmethod
    def of(value: int | float) -> "Number":
        return (_Int if type(value) is int else _Float)(value)


def _refused(self: Any, *others: Any) -> Any:
    raise NumberRead("its forward computes with a number that it gets")


READING = words(
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow neg pos abs",
    "lt le gt ge eq ne bool int float index round trunc floor ceil lshift rlshift rshift rrshift and rand or ror",
    "xor rxor invert complex hash",
)
_reading = {f"__{name}__": _refused for name in READING}
_Int = type("int", (Number, int), _reading)
_Float = type("float", (Number, float), _reading)


def plain(value: Any) -> Any:
    """The number that a :class:`Number` is; anything else as it is."""
    if isinstance(value, _Int):
        return int.__int__(value)
    if isinstance(value, _Float):
        return float.__float__(value)
    return value
