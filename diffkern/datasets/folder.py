"""A set as a folder: pictures, and ``metadata.csv`` with a caption and the attributes of each."""

import csv
import os
from pathlib import Path

from PIL import Image

from ..progress import bar as progress_bar
from . import PictureSet, attribute_of


def write(pictures: PictureSet, folder: str | os.PathLike, *, label: str | None = None, progress: bool = False) -> None:
    """Write the pictures as PNG, ``metadata.csv`` (file_name, text, then the attributes) and ``LICENCE.txt``.

    ``label`` is an attribute: each of its classes is then a sub-folder, as image folders have them. Raises ValueError
    for an attribute that the set has not, and for a folder that is not empty.
    """
    attribute_of(type(pictures), label)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: expected a new or an empty folder, got {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "LICENCE.txt").write_text(f"{pictures.licence}\n", encoding="utf-8")
    with (
        (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file,
        progress_bar(len(pictures), "writing", "img", progress) as bar,
    ):
        rows = csv.writer(file)
        rows.writerow(("file_name", "text", *pictures.attributes))
        for i in range(len(pictures)):
            values = pictures.values(i)
            place = Path(values[label].replace("/", "-") if label else "", f"{pictures.stem(i)}.png")
            (folder / place.parent).mkdir(exist_ok=True)
            Image.fromarray(pictures.picture(i)).save(folder / place)
            rows.writerow((place.as_posix(), pictures.caption(i), *values.values()))
            bar.update(1)
