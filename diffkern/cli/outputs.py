"""Files that a command is asked to write."""

from pathlib import Path

from ..io.files import check_writable


def check_file(name: str, path: str, suffix: str = "") -> None:
    """ValueError or OSError unless a file can be written there: before minutes of work, not after."""
    if not path.lower().endswith(suffix):
        raise ValueError(f"{name}: expected a file name that ends in {suffix}, got {path!r}")
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{name}: expected a file in an existing folder, got {path!r}")
    check_writable(path)
