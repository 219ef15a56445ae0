"""Is this process the command ``diffkern``?"""

import sys
from itertools import pairwise
from pathlib import Path


def is_command() -> bool:
    """Tell whether the process is ``python -m diffkern``, or the program ``diffkern`` beside its Python."""
    if sys.argv[:1] == ["-m"]:  # Python is still looking for the module
        return ("-m", "diffkern") in pairwise(sys.orig_argv)
    program = Path(*sys.argv[:1])
    return program.name == "diffkern" and program.resolve().parent == Path(sys.executable).parent.resolve()
