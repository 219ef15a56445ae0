"""The documentation as a site: `make docs`. Its source is the repository, so that links are the same as there."""

import itertools
import re

import diffkern

project, author, release = "diffkern", "the diffkern authors", diffkern.__version__
copyright = author
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]

root_doc = "README"
include_patterns = [
    "README.md",
    "docs/**",
    "diffkern/models/*.md",
    "diffkern/classifiers/*.md",
    "diffkern/datasets/*.md",
]
exclude_patterns = ["docs/**.py"]
html_theme, html_title = "furo", "diffkern"
html_static_path: list[str] = []

myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

CONTENTS = """
```{toctree}
:hidden:
:caption: Use
docs/using
docs/how-to
docs/data
docs/training
docs/evaluating
docs/checkpoints
docs/other_tools
docs/install
docs/faq
docs/glossary
```
```{toctree}
:hidden:
:caption: Systems
docs/systems
docs/figures
docs/noise
```
```{toctree}
:hidden:
:caption: Inside
docs/reference
docs/kernels
docs/engine
docs/code
docs/results
docs/cuda_on_paper
docs/changelog
```
```{toctree}
:hidden:
:caption: Models and data
:glob:
diffkern/models/*
diffkern/classifiers/*
diffkern/datasets/*
```
"""
SYSTEMS = """
```{toctree}
:hidden:
:glob:
systems/*
```
"""


def add_contents(app, name: str, source: list[str]) -> None:
    """Add the table of contents, which a page of the repository needs not."""
    source[0] += {"README": CONTENTS, "docs/systems": SYSTEMS}.get(name, "")


ENTRY = re.compile(r"([\w.*-]+(?:, [\w.*-]+)*)  +(\S.*)", re.DOTALL)  # name  what it is
MARKUP = re.compile(r"(``.+?``|:\w+:`.+?`)", re.DOTALL)
SPECIAL = re.compile(r"([*|`]|_\b)")


def as_markup(app, what, name, obj, options, lines: list[str]) -> None:
    """Turn a docstring, which is written to be read as it is, into reStructuredText."""
    blocks = "\n".join(lines).split("\n\n")
    lines[:] = "\n\n".join(map(marked_up, blocks)).split("\n")


def marked_up(block: str) -> str:
    """Columns of names and what they are become definitions, and other indented lines stay as they are. In the rest,
    only roles and code in double backquotes are markup."""
    entries = [ENTRY.fullmatch(item) for item in re.split(r"\n(?=\S)", block)]
    if all(entries):
        return "\n".join(
            f"``{name}``\n    {escaped(' '.join(text.split()))}" for name, text in map(re.Match.groups, entries)
        )
    parts = []
    for indented, rows in itertools.groupby(block.splitlines(), lambda row: row.startswith(" ")):
        text = "\n".join(rows)
        parts.append(f"::\n\n{text}" if indented else escaped(re.sub("::$", ":", text)))
    return "\n\n".join(parts)


def escaped(text: str) -> str:
    return "".join(part if k % 2 else SPECIAL.sub(r"\\\1", part) for k, part in enumerate(MARKUP.split(text)))


def setup(app) -> None:
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_markup)
