"""The part that the commands share which draw pictures of one that is given: seeds, sampler, and the grid."""

import argparse
from typing import Any

import torch
from torch import Tensor

from .. import images, ops
from ..samplers import SAMPLERS
from .options import add_grid, add_network, add_seeds, count, dtype_of, fresh_seeds, seed_ranges
from .outputs import check_file


def add_drawing(parser: argparse.ArgumentParser, out: str, n: int, steps: int, sampler: str | None = None) -> None:
    """Add the options that :class:`Drawing` reads, with their defaults. ``sampler`` None: unipc."""
    add_seeds(parser, n)
    parser.add_argument("--sampler", choices=SAMPLERS, default=sampler, help=f"(default: {sampler or 'unipc'})")
    parser.add_argument("--steps", type=count, default=steps, help=f"of each model (default: {steps})")
    add_network(parser)
    add_grid(parser, out)


class Drawing:
    """The pictures that a command is to draw.

    seeds    int64 [N]
    options  of ``diffkern.sample``
    """

    def __init__(self, arguments: argparse.Namespace, n: int):
        """``n``: how many pictures, unless the options say otherwise. Raises OSError or ValueError."""
        check_file("out", arguments.out, ".png")
        self.arguments, self._ranges = arguments, seed_ranges(arguments.seeds, arguments.n, n)
        self.seeds = torch.cat([ops.as_seeds(numbers, "cpu") for numbers in self._ranges])
        self.options: dict[str, Any] = dict(
            seeds=self.seeds,
            sampler=arguments.sampler,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            dtype=dtype_of(arguments.dtype),
            progress=arguments.progress,
        )

    def write(self, x: Tensor, settings: tuple[str, ...], given: Tensor | None = None) -> None:
        """Write the grid of pictures [N, C, H, W], with the options named in ``settings`` in it, and print its name.

        given  a picture [C, H, W] to stand before them, in one row unless the options say otherwise
        """
        arguments, columns = self.arguments, self.arguments.columns
        if given is not None:
            x = torch.cat((given[None], x.cpu()))
            columns = columns or len(x)
        told = {name: getattr(arguments, name) for name in (*settings, "sampler", "steps")}
        grid = images.grid(x, columns=columns, scale=arguments.scale)
        images.save_png(grid, arguments.out, told | {"seeds": self.seeds.tolist()})
        print(*fresh_seeds(arguments.seeds, self._ranges), arguments.out, sep="\n")
