"""``diffkern doctor``: the installation, and whether it works."""

import argparse

from .. import doctor

EXAMPLES = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(arguments: argparse.Namespace) -> int:
    return doctor.main()
