"""Makes the packed files of the sets: ``python -m diffkern.datasets.pack NODE_MODULES``, a maintainer's command.

The folder holds the packages of ``emoji_sources.SOURCES``, emojibase-data@17.0.0 and emojilib@4.0.3 as npm installs
them. For the faces alone no folder is needed.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from . import FOLDER, emoji, emoji_sources, faces, shrunk, words_of

COLUMNS = 44  # pictures in a row of a packed file

SLANG = """
adorbs ass awesome babe bae bestie bff bro dunno fml gb haha hehe homie huh idk ily jk lmao lol md meh mwah ng nope oh
omg pa pga phew rofl sassy sexy shh slay smh st tbt twinsies ugh virgin wc whoa wip woah woohoo wow xoxo yay yolo zen
zzz
"""
NOT_SEEN = """
again ask at charge cost counterpart do doing done favor fine for forgot get getting here identical if it know knows
last maybe me meaning or other remove seriously special still the there type unified unspecified what whatever who you
"""
JUDGEMENTS = "crazy criminal fail gross hairless ignorance pest silly villain weird"
LEFT_OUT = frozenset(f"{SLANG} {NOT_SEEN} {JUDGEMENTS}".split())
"""Tags that were left out when the list was read."""


def read(modules: Path) -> list[emoji.Thing]:
    """Read the things, with the tags that at least three of them have, before the styles of each are known."""
    keywords = json.loads((modules / "emojilib/dist/emoji-en-US.json").read_text())
    things = []
    for entry in json.loads((modules / "emojibase-data/en/data.json").read_text()):
        if "group" in entry:  # the letters of flags have none
            symbol = entry["emoji"]
            own = keywords.get(symbol, keywords.get(symbol.replace("\ufe0f", ""), []))
            tags = {tag.replace("_", " ").replace("’", "'").lower() for tag in (*entry.get("tags", ()), *own)}
            code, label = emoji_sources.code_of(entry["hexcode"]), entry["label"].lower()
            things.append(emoji.Thing(code, label, emoji.GROUPS[entry["group"]], tuple(sorted(tags)), ()))
    counts = Counter(tag for thing in things for tag in thing.tags)

    def kept(thing: emoji.Thing) -> tuple[str, ...]:
        said = set(words_of(thing.label))
        return tuple(
            tag
            for tag in thing.tags
            if counts[tag] >= 3
            and re.fullmatch("[a-z]{2}[a-z' -]*", tag)
            and not set(words_of(tag)) <= said
            and tag not in LEFT_OUT
        )

    return [emoji.Thing(thing.code, thing.label, thing.group, kept(thing), ()) for thing in things]


def pack_emoji(modules: Path) -> None:
    """Write ``emoji.tsv`` and a picture of each style."""
    things = read(modules)
    drawn = {style: dict(emoji_sources.of_style(modules, style, things)) for style in emoji_sources.SOURCES}
    lines = ["code\tlabel\tgroup\ttags\tstyles"]
    for number, thing in enumerate(things):
        styles = [style for style, pictures in drawn.items() if number in pictures]
        if styles:
            lines.append("\t".join((thing.code, thing.label, thing.group, ",".join(thing.tags), ",".join(styles))))
    (FOLDER / "emoji.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for style, pictures in drawn.items():
        write([shrunk(pictures[number], emoji.SIDE) for number in sorted(pictures)], emoji.file_of(style))


def pack_faces() -> None:
    """Write the first faces of each split."""
    drawn = []
    for split, count in faces.PACKED.items():
        made = faces.Faces(count, faces.SIDE, split=split)
        drawn += [faces.render(faces.svg(made.values(i)), faces.SIDE) for i in range(count)]
    write(drawn, "faces.webp")


def write(pictures: list[np.ndarray], name: str) -> None:
    """Write pictures in rows as one file, without loss."""
    side, rows = len(pictures[0]), -(-len(pictures) // COLUMNS)
    cells = np.full((rows * COLUMNS, side, side, 3), 255, np.uint8)
    cells[: len(pictures)] = pictures
    whole = cells.reshape(rows, COLUMNS, side, side, 3).swapaxes(1, 2).reshape(rows * side, COLUMNS * side, 3)
    Image.fromarray(whole).save(FOLDER / name, lossless=True, quality=100, method=6)
    print(name, len(pictures), (FOLDER / name).stat().st_size, flush=True)


if __name__ == "__main__":
    pack_faces()
    if sys.argv[1:]:
        pack_emoji(Path(sys.argv[1]))
