"""The emoji at 64 x 64, from the packages of npm that publish them."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..progress import tell
from . import on_white, rasterized, renderer
from .emoji import Thing

SIDE = 64

SOURCES = {  # style: the package with its version, the folder of its pictures or "" for one file of SVG
    "noto": ("emoji-datasource-google@16.0.0", "img/google/64"),
    "twemoji": ("emoji-datasource-twitter@16.0.0", "img/twitter/64"),
    "fluent 3d": ("@lobehub/fluent-emoji-3d@1.1.0", "assets"),
    "fluent flat": ("@iconify-json/fluent-emoji-flat@1.2.6", ""),
    "noto v1": ("@iconify-json/noto-v1@1.2.5", ""),
    "emojione": ("@iconify-json/emojione@1.2.3", ""),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", ""),
}
MEGABYTES = 200  # that npm unpacks


def download(things: Sequence[Thing], pairs: Sequence[tuple[int, str]]) -> np.ndarray:
    """Return the pictures of ``pairs`` [K] of a thing's number and a style: uint8 [K, 64, 64, 3].

    npm downloads into a folder that is deleted afterwards; nothing of the packages runs. Raises FileNotFoundError
    without npm, RuntimeError where it fails, ImportError without resvg-py.
    """
    renderer()
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("emoji: expected npm, which downloads the drawings, got none: apt-get install npm")
    packages = [package for package, _ in SOURCES.values()]
    tell(f"downloading with npm, {MEGABYTES} MB unpacked, deleted afterwards: {', '.join(packages)}")
    with tempfile.TemporaryDirectory(prefix="diffkern-emoji-") as folder:
        options = ("--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund", "--no-save", "--loglevel=error")
        done = subprocess.run([npm, "install", *options, *packages], capture_output=True, text=True, cwd=folder)
        if done.returncode:
            reason, *_ = [line for line in done.stderr.splitlines() if line.strip()] or [f"status {done.returncode}"]
            raise RuntimeError(f"emoji: expected npm to download {len(packages)} packages, got {reason}")
        return drawn(Path(folder, "node_modules"), things, pairs)


def drawn(modules: Path, things: Sequence[Thing], pairs: Sequence[tuple[int, str]]) -> np.ndarray:
    """Draw the pictures of ``pairs`` from a folder ``node_modules``: uint8 [K, 64, 64, 3]. Raises RuntimeError."""
    found = {(number, style): picture for style in SOURCES for number, picture in of_style(modules, style, things)}
    lacking = [pair for pair in pairs if pair not in found]
    if lacking:
        number, style = lacking[0]
        got = f"{len(lacking):,} fewer, as {things[number].label} in {style}"
        raise RuntimeError(f"emoji: expected the {len(pairs):,} pictures of the packages, got {got}")
    return np.stack([found[pair] for pair in pairs])


def of_style(modules: Path, style: str, things: Sequence[Thing]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each thing's number with its picture [64, 64, 3], once."""
    package, pictures = SOURCES[style]
    folder = modules / package.rpartition("@")[0]
    numbers = {thing.code: number for number, thing in enumerate(things)}
    if pictures:
        for path in sorted((folder / pictures).iterdir()):
            number = numbers.get(code_of(path.stem))
            if number is not None:
                with Image.open(path) as image:
                    yield number, on_white(_fitted(image.convert("RGBA")))
        return
    slugs = {slug(thing.label): number for number, thing in enumerate(things)}
    compact = {name.replace("-", ""): number for name, number in slugs.items()}
    seen = set()
    for code, name, text in _icons(folder):
        number = numbers.get(code, slugs.get(name, compact.get(name.replace("-", ""))))
        if number is not None and number not in seen:
            seen.add(number)
            yield number, on_white(rasterized(text, SIDE))


HEAD = f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIDE}" height="{SIDE}"'


def code_of(text: str) -> str:
    """Return code points in upper case without the variation selector, which fonts write or leave out."""
    return "-".join(part for part in text.upper().split("-") if part != "FE0F")


def slug(label: str) -> str:
    """Write a label as a name of an icon: "flag: France" as flag-france."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub("['’]", "", label.lower())).strip("-")


def _fitted(image: Image.Image) -> np.ndarray:
    """Average an image with alpha down to 64 x 64: uint8 [64, 64, 4]."""
    if image.size == (SIDE, SIDE):
        return np.asarray(image)
    return np.asarray(image.convert("RGBa").resize((SIDE, SIDE), Image.Resampling.BOX).convert("RGBA"))


def _icons(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the icons of a package of Iconify: the code points, or "" where it tells none; the name; and the SVG."""
    icons = json.loads((folder / "icons.json").read_text())
    chars = folder / "chars.json"
    codes = {name: code_of(code) for code, name in json.loads(chars.read_text()).items()} if chars.exists() else {}
    aliases = {name: alias["parent"] for name, alias in icons.get("aliases", {}).items() if set(alias) == {"parent"}}
    for name in (*icons["icons"], *aliases):
        icon = icons["icons"].get(aliases.get(name, name))
        if icon is None:
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{left} {top} {width} {height}"
        yield codes.get(name, ""), name, f'<svg {HEAD} viewBox="{box}">{icon["body"]}</svg>'
