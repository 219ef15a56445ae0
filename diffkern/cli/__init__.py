"""The command line: each of COMMANDS is a module of this package.

A command's module has ``add_arguments(parser)``, ``EXAMPLES``, and ``run(arguments)``, which returns the exit status.
Only the module of the command that is run is imported: ``diffkern --help`` and ``--version`` need no torch.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from ..progress import tell
from .options import threads

COMMANDS = {
    "sample": "Draw images from a model into a labelled grid.",
    "interpolate": "Draw the images between two.",
    "inpaint": "Make a part of an image anew.",
    "upscale": "Make large pictures of a small one.",
    "restore": "Make pictures of which a damaged one may be what is left.",
    "data": "List the data sets, or write one as a folder of pictures and captions.",
    "train": "Train a model, or resume the run in --out.",
    "export": "Write a checkpoint's averaged weights as a model file to ship.",
    "convert": "Write a checkpoint of another library as a model file.",
    "evaluate": "Measure a model, or a folder of images, against real images.",
    "classifier": "Accuracy of a classifier of noisy images, by noise level; trains one where there is none.",
    "show": "Draw a figure of the theory, and print its numbers.",
    "doctor": "What is this installation, and does it work?",
}


EXAMPLES = """\
examples:
  diffkern sample --steps 20                           16 images from the model that ships: samples.png
  diffkern sample --labels Sneaker --guidance 2 --seeds random
  diffkern train --data photos --size 32 --out run     a model of the images in a folder
  diffkern sample --model run
  diffkern COMMAND --help                              the options of a command, with examples"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for an error (one line on stderr), 130 for Ctrl-C, 141 for a reader
    that left."""
    with _streams():
        try:
            arguments = _parse(sys.argv[1:] if argv is None else argv)
            if arguments.threads is not None:
                import torch

                torch.set_num_threads(arguments.threads)
            status = arguments.run(arguments)
            sys.stdout.flush()
            return status
        except KeyboardInterrupt:
            tell("diffkern: interrupted")
            return 130
        except BrokenPipeError:
            return 141
        except (ImportError, MemoryError, OSError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            message, *_ = str(error).strip().splitlines() or [type(error).__name__]
            tell(f"diffkern: error: {message}")
            return 2


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Within, there are stdout and stderr: closed ones lead nowhere, and text that they cannot encode is escaped.

    Nothing that they hold at the end is an error at the exit: their reader may be gone, or their disk full.
    """
    with contextlib.ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w")))
                stack.callback(setattr, sys, name, None)
            elif isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                try:
                    stream.flush()
                except OSError:
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Parser(argparse.ArgumentParser):
    """Lets :func:`main` say what is wrong, in one line; ``--help`` has the rest."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        "diffkern",
        description="Denoising diffusion: sample, train and evaluate.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"diffkern {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")
    parser.set_defaults(run=lambda _: print(parser.format_help(), end="") or 0, threads=None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name in argv[:1]:
            _fill(command, name)
    return parser.parse_args(argv)


def _fill(command: argparse.ArgumentParser, name: str) -> None:
    """Add the options of the command ``name``; ImportError says in one line why the kernels cannot be imported."""
    import_module("..public", __package__)
    module = import_module(f".{name}", __package__)
    command.epilog = module.EXAMPLES and f"examples:\n{module.EXAMPLES}"
    command.add_argument("--threads", type=threads, help="CPU threads (default: torch's choice)")
    module.add_arguments(command)
    command.set_defaults(run=module.run)
