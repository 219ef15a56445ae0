"""``diffkern data``: which data sets there are, and one of them as a folder."""

import argparse
import sys

from ..datasets import FOLDER, SPLITS, sets
from ..datasets.folder import write
from ..progress import tell
from .options import count

WRITTEN = 10_000  # pictures at most, unless --n asks for more

EXAMPLES = """\
  diffkern data                                         # the sets, their attributes and licences
  diffkern data faces --n 1000 --size 64 --out faces64
  diffkern data faces --n 1000 --label hair --out hair  # a sub-folder a class
  diffkern data emoji --size 64 --split all --out emoji64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("set", nargs="?", metavar="SET", choices=tuple(sets()), help=f"one of {', '.join(sets())}")
    parser.add_argument("--out", metavar="FOLDER", help="write pictures, metadata.csv and LICENCE.txt there")
    parser.add_argument("--n", type=count, help=f"how many pictures (default: all, and {WRITTEN:,} at most)")
    parser.add_argument("--size", type=count, help="of a side, in pixels (default: faces 64, emoji 32)")
    parser.add_argument("--split", choices=SPLITS, help="train is without what is held out (default: train)")
    parser.add_argument("--seed", type=int, help="of what is drawn (default: 0)")
    parser.add_argument("--drop", type=float, metavar="P", help="chance of each part of a caption to be left out (0)")
    parser.add_argument("--label", metavar="ATTRIBUTE", help="a sub-folder for each class of this attribute")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="neither a progress bar nor lines")


def run(arguments: argparse.Namespace) -> int:
    names = ("n", "size", "split", "seed", "drop")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.out is None:
        given = [name for name in (*options, "label") if getattr(arguments, name) is not None]
        if given:
            raise ValueError(f"{given[0]}: expected none without --out, got {getattr(arguments, given[0])}")
        print("\n\n".join(_told(name) for name in sets() if arguments.set in (None, name)))
        return 0
    if arguments.set is None:
        raise ValueError(f"set: expected one of {', '.join(sets())} with --out, got none")
    made = sets()[arguments.set]
    pictures = made.fetch(**options)
    if arguments.n is None:
        pictures.n = min(pictures.n, WRITTEN)
    write(pictures, arguments.out, label=arguments.label, progress=arguments.progress)
    tell(f"{len(pictures):,} pictures of {pictures.size}x{pictures.size}; licence: {pictures.licence}")
    print(arguments.out)
    return 0


def _told(name: str) -> str:
    """Describe a set: what it is, how much of it there is, its attributes and licence."""
    made = sets()[name]
    about = sys.modules[made.__module__].__doc__.splitlines()[0]
    packed = sum(path.stat().st_size for path in FOLDER.glob(f"{name}*") if path.suffix != ".py")
    counts = ", ".join(f"{split} {made(split=split).available():,}" for split in SPLITS[:2])
    attributes = ", ".join(f"{key} ({len(classes):,})" for key, classes in made.attributes.items())
    return "\n".join(
        (
            f"{name}: {about}",
            f"  pictures    {counts}",
            f"  attributes  {attributes}",
            f"  packed      {packed / 1e6:.1f} MB",
            f"  licence     {made.licence}",
        )
    )
