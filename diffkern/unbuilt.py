"""Why the package cannot be imported, and what to do."""

import sys
from pathlib import Path


def explain(error: Exception) -> str:
    """Say in one line what is wrong with the kernels, whose import has ended in that error."""
    folder, reason = Path(__file__).resolve().parent, str(error)
    if not any(folder.glob("_C.*.so")):
        reason = f"there is no _C in {folder}"
        for entry in sys.path:
            installed = Path(entry, "diffkern").resolve()
            if any(installed.glob("_C.*.so")) and (folder.parent / "setup.py").exists():
                return (
                    f"diffkern: {folder} is the source, where nothing is built, and hides the package in {installed}: "
                    "start Python in another folder, or run pip install -e . in the source"
                )
    return f"diffkern: the kernels are not built, or not anew ({reason}): run pip install -e . in its source"
