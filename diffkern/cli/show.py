"""``diffkern show``: a figure of the theory, as a table and a picture."""

import argparse
import inspect
from types import ModuleType
from typing import Any

from ..show import figures
from .options import count
from .plot import check_plot, draw_panels

EXAMPLES = """\
  diffkern show kl
  diffkern show convergence --samplers unipc unipc,order=3 lms --process edm
  diffkern show swiss-roll --steps 500 --out roll.png"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    found = figures()
    lines = (f"  {name:12}{module.__doc__.splitlines()[0]}" for name, module in found.items())
    parser.description = "\n".join((parser.description, "", "figures:", *lines))
    parser.add_argument("figure", metavar="FIGURE", choices=tuple(found), help="its name")
    parser.add_argument("--out", metavar="PNG", help="the picture (default: FIGURE.png)")
    for option, defaults in _options(found).items():
        if option == "progress":
            text = f"neither a progress bar nor lines: of {', '.join(defaults)}"
            parser.add_argument("--no-progress", dest=option, action="store_const", const=False, help=text)
            continue
        kind = type(next(iter(defaults.values())))
        shown = {name: " ".join(value) if kind is tuple else value for name, value in defaults.items()}
        text = f"(default: {', '.join(f'{name} {default}' for name, default in shown.items())})"
        if kind is int:
            parser.add_argument(f"--{option}", type=count, help=f"how many {text}")
        else:
            which = dict(nargs="+", metavar="NAME") if kind is tuple else {}
            parser.add_argument(f"--{option}", help=f"which {text}", **which)
    parser.set_defaults(figures=found)


def run(arguments: argparse.Namespace) -> int:
    given = {}
    for option, defaults in _options(arguments.figures).items():
        value = getattr(arguments, option)
        if value is not None and arguments.figure in defaults:
            given[option] = value
        elif value is not None and option != "progress":  # a figure that shows none is quiet as it is
            raise ValueError(f"{option}: expected none with {arguments.figure}, got {value}")
    path = check_plot(arguments.out or f"{arguments.figure}.png", "out")
    figure = arguments.figures[arguments.figure].figure(**given)
    print(figure.table())
    if path is not None:
        draw_panels(path, figure.panels, figure.across)
        print(path)
    return 0


def _options(found: dict[str, ModuleType]) -> dict[str, dict[str, Any]]:
    """The parameters of all figures, each with its default by figure."""
    options: dict[str, dict[str, Any]] = {}
    for name, module in found.items():
        for parameter in inspect.signature(module.figure).parameters.values():
            options.setdefault(parameter.name, {})[name] = parameter.default
    return options
