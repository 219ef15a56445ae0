"""The loss of a run as a picture."""

import math
from collections.abc import Callable, Sequence

from ..images import font

WIDTH, HEIGHT = 640, 400  # pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 28, 28  # margins, for the text
COLOURS = ((31, 119, 180), (214, 39, 40))
"""The colours of the first curve, the second, ..."""
GREY, BLACK = (225, 225, 225), (0, 0, 0)
MOST_TICKS = 6

Curve = Sequence[tuple[float, float]]
"""(step, loss), steps rising."""


def loss_plot(curves: dict[str, Curve]):
    """Draw curves by name, in the order of :data:`COLOURS`, over steps as a ``PIL.Image``.

    Losses have a log scale if all are > 0. Those that are not finite are left out. Raises ValueError for curves without
    a finite point.
    """
    from PIL import Image, ImageDraw

    curves = {name: [point for point in curve if math.isfinite(point[1])] for name, curve in curves.items()}
    colours = dict(zip(curves, COLOURS, strict=False))
    steps, losses = ([point[i] for curve in curves.values() for point in curve] for i in (0, 1))
    if not steps:
        raise ValueError("curves: expected at least one finite point, got none")
    scale = math.log if min(losses) > 0 else float
    across = _axis(min(steps), max(steps), LEFT, WIDTH - RIGHT, float)
    up = _axis(min(losses), max(losses), HEIGHT - BOTTOM, TOP, scale)
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    for loss in ticks(min(losses), max(losses), log=scale is math.log):
        draw.line((LEFT, up(loss), WIDTH - RIGHT, up(loss)), GREY)
        draw.text((LEFT - 6, up(loss)), f"{loss:g}", BLACK, font=font(), anchor="rm")
    for step in ticks(min(steps), max(steps)):
        draw.line((across(step), TOP, across(step), HEIGHT - BOTTOM), GREY)
        draw.text((across(step), HEIGHT - BOTTOM + 6), f"{step:,.0f}", BLACK, font=font(), anchor="mt")
    draw.rectangle((LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM), outline=BLACK)
    right = WIDTH - RIGHT
    for name in reversed([name for name, curve in curves.items() if curve]):
        draw.text((right, TOP - 8), f"{name} loss", colours[name], font=font(), anchor="rs")
        right -= int(font().getlength(f"{name} loss")) + 16
    for name, curve in curves.items():
        draw.line([(across(step), up(loss)) for step, loss in (*curve, *curve[-1:])], colours[name], width=1)
    return image


def _axis(low: float, high: float, first: float, last: float, scale: Callable[[float], float]):
    """From values to pixels: ``low`` is at ``first``, ``high`` at ``last``; in the middle where they are one."""
    a, b = scale(low), scale(high)
    if a == b:
        return lambda value: (first + last) / 2
    return lambda value: first + (scale(value) - a) / (b - a) * (last - first)


def ticks(low: float, high: float, *, log: bool = False) -> list[float]:
    """Round numbers in [low, high], at most ``MOST_TICKS``: equal steps of 1, 2 or 5; with ``log`` and 10 or more from
    end to end, powers of 10 or these times 1, 2 and 5."""
    if low == high:
        return [low]
    if log and high / low >= 10:
        exponents = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        for every, factors in ((1, (1, 2, 5)), *((every, (1,)) for every in range(1, len(exponents) + 1))):
            found = [m * 10.0**k for k in exponents if k % every == 0 for m in factors if low <= m * 10.0**k <= high]
            if len(found) <= MOST_TICKS:
                return found
    rough = (high - low) / MOST_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(k * step, 12) for k in range(math.ceil(low / step), math.floor(high / step) + 1)]
