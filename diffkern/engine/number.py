"""A number that a network gets and may hand to torch, and that says when Python looks into it."""

from collections.abc import Callable
from typing import Any

from .words import words


class Number:
    """An int or a float of a call, while a network is captured.

    It is of the number's own class and does what that does. Functions of torch take it as it is: there the graph knows
    it. Arithmetic and comparison call ``noticed``: what a graph would hold of their results is one value.
    """

    noticed: Callable[[], Any]

    @staticmethod
    def of(value: int | float, noticed: Callable[[], Any]) -> "Number":
        number = (_Int if type(value) is int else _Float)(value)
        number.noticed = noticed
        return number


READING = words(
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow neg pos abs",
    "lt le gt ge eq ne bool int float index round trunc floor ceil lshift rlshift rshift rrshift and rand or ror",
    "xor rxor invert complex hash",
)


def _methods(base: type) -> dict[str, Callable[..., Any]]:
    def noticing(method: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: Any, *others: Any) -> Any:
            self.noticed()
            return method(self, *others)

        return read

    names = [f"__{name}__" for name in READING]
    return {name: noticing(getattr(base, name)) for name in names if hasattr(base, name)}


_Int = type("int", (Number, int), _methods(int))
_Float = type("float", (Number, float), _methods(float))


def plain(value: Any) -> Any:
    """The number that a :class:`Number` is; anything else as it is."""
    if isinstance(value, _Int):
        return int.__int__(value)
    if isinstance(value, _Float):
        return float.__float__(value)
    return value
