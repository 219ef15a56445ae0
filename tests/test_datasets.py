"""The sets of pictures: the same anywhere, drawn as they say, held out as they say, packed as they are drawn."""

import csv
import hashlib
import json
import pickle
import shutil
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern import cli
from diffkern.data import Items, image_folder, load_dataset, picture_set
from diffkern.datasets import FOLDER, Labelled, emoji, emoji_sources, faces, sets, words_of
from diffkern.datasets.emoji import Emoji
from diffkern.datasets.faces import Faces

needs_resvg = pytest.mark.skipif(find_spec("resvg_py") is None, reason="resvg-py is not installed")


@pytest.fixture
def no_resvg(monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(faces, "find_spec", lambda name: None)


# --- every set ---


@pytest.mark.parametrize("name", sets())
def test_a_set_is_as_it_says(name):
    """Items, captions and their words, attributes, and a pickle for the processes that read ahead."""
    made = sets()[name]
    pictures = pickle.loads(pickle.dumps(made(20, 32, split="test", drop=0.5)))
    item = pictures[-1]
    assert len(pictures) == 20 and item["x"].shape == (3, 32, 32) and item["x"].dtype == torch.uint8
    with pytest.raises(IndexError):
        pictures[20]
    vocabulary = set(made.vocabulary())
    for i in range(20):
        assert set(words_of(pictures.caption(i))) <= vocabulary
        assert all(pictures.values(i)[key] in classes for key, classes in made.attributes.items())
    assert set(pictures.values(0)) == set(made.attributes)
    assert len({pictures.stem(i) for i in range(20)}) == 20


@pytest.mark.parametrize("name", sets())
def test_the_notices_name_every_packed_file(name):
    text = (FOLDER / "THIRD_PARTY.md").read_text()
    packed = [path.name for path in FOLDER.glob(f"{name}*") if path.suffix != ".py"]
    assert packed and all(f"`{file}`" in text for file in packed)


BAD = {
    "n": (lambda: Faces(0), "n: expected at least 1, got 0"),
    "size": (lambda: Faces(1, 1.5), "size: expected an int, got float"),
    "seed": (lambda: Faces(1, seed="a"), "seed: expected an int, got str"),
    "split": (lambda: Emoji(split="val"), "split: expected one of train, test, all, got 'val'"),
    "drop": (lambda: Emoji(drop=2), "drop: expected a probability, got 2"),
    "emoji's size": (lambda: Emoji(size=64), "size: expected one that divides 32, .*, got 64: diffkern data emoji"),
    "fetched size": (lambda: Emoji.fetch(size=48), "size: expected one that divides 64, got 48"),
    "attribute": (lambda: load_dataset("faces:beards"), "attribute: expected one of skin, .*, got 'beards'"),
    "grey": (lambda: load_dataset("emoji", channels=1), "channels: expected 3, those of 'emoji', got 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_told_by_name(name):
    call, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


# --- faces ---


def test_a_face_is_the_same_anywhere():
    known = hashlib.sha256()
    for split in ("train", "test", "all"):
        for seed, i in ((0, 0), (0, 1535), (7, 10**12)):
            values = dict(zip(faces.CLASSES, faces.draw(np.array([i]), seed, split)[0].tolist(), strict=True))
            known.update(repr(values).encode())
    assert known.hexdigest()[:16] == "19a3a4e57af11828"
    pictures = Faces(2, drop=0.5)
    assert hashlib.sha256(faces.svg(pictures.values(0)).encode()).hexdigest()[:16] == "2dd6289d28dd1d91"
    assert pictures.caption(1) == "a face with orange hair, sunglasses, a big smile and a shirt"
    assert Faces(2).caption(1) == (
        "a face with very dark skin, an orange short combover, sunglasses, a wrinkled nose, a big smile and a yellow "
        "shirt"
    )


def test_attributes_are_uniform_but_for_beards():
    """Chi-square of the counts of 20,000 faces, below the 99.99 % quantile of each."""
    drawn = faces.draw(np.arange(20_000), 0, "all")
    for k, (name, classes) in enumerate(faces.CLASSES.items()):
        share = np.array(faces.CHANCES.get(name, (1,) * len(classes)), float)
        expected = 20_000 * share / share.sum()
        chi_square = ((np.bincount(drawn[:, k], minlength=len(classes)) - expected) ** 2 / expected).sum()
        freedom = len(classes) - 1
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5 + 12, name
    rows = np.corrcoef(drawn.T.astype(float))
    assert np.abs(rows - np.eye(len(rows))).max() < 0.04


def test_the_splits_of_faces_never_overlap():
    for split, share in (("train", 0.0), ("test", 1.0)):
        drawn = faces.draw(np.arange(5000), 3, split)
        held = [(drawn[:, a] == x) & (drawn[:, b] == y) for (a, x), (b, y) in faces.PAIRS]
        assert np.any(held, 0).mean() == share
    assert all(pair.mean() > 0.15 for pair in held)


OWN = dict(skin="medium", hair="long hair", hair_colour="black", eyes="open eyes", nose="small nose", mouth="smile")
OWN |= dict(beard="stubble", clothes="top", clothes_colour="red")
CAPTIONS = {  # the end of "a face with ..": attributes unlike OWN's, and those that are left out
    "medium skin, long black hair, open eyes, a small nose, a smile, stubble and a red top": ({}, ""),
    "medium skin, a cap, stubble and red clothes": ({"hair": "cap"}, "hair_colour eyes nose mouth clothes"),
    "orange hair, open eyes, a small nose and a smile": (
        {"hair": "bob", "hair_colour": "orange"},
        "hair skin clothes_colour clothes beard",
    ),
    "an orange mohawk": (
        {"hair": "mohawk", "hair_colour": "orange"},
        "skin eyes nose mouth beard clothes clothes_colour",
    ),
}


@pytest.mark.parametrize("told", CAPTIONS)
def test_captions_tell_what_is_kept(told):
    values, dropped = CAPTIONS[told]
    kept = {name: name not in dropped.split() for name in faces.CLASSES}
    assert faces.describe(OWN | values, kept) == f"a face with {told}"
    assert faces.describe(OWN, dict.fromkeys(faces.CLASSES, False)) == "a face"


@needs_resvg
def test_packed_faces_are_the_drawn_ones():
    for split, i in (("train", 0), ("train", 1535), ("test", 511)):
        pictures = Faces(faces.PACKED[split], split=split)
        drawn = faces.render(faces.svg(pictures.values(i)), 64).astype(int)
        assert np.abs(drawn - pictures.picture(i)).max() <= 2, (split, i)
        assert pictures.picture(i).std() > 20
    low = Faces(1, 16).picture(0).astype(float)
    assert np.abs(low - Faces(1).picture(0).reshape(16, 4, 16, 4, 3).mean((1, 3))).max() <= 0.5
    assert Faces(1, 100).picture(0).shape == (100, 100, 3)


def test_packed_faces_need_no_resvg(no_resvg):
    assert len(Faces()) == 1536 and Faces(split="test")[511]["x"].float().std() > 20
    for make in (lambda: Faces(1537), lambda: Faces(1, 48), lambda: Faces(1, seed=1), lambda: Faces(split="all")):
        with pytest.raises(ImportError, match=r"expected resvg-py, .*, got none: run pip install 'diffkern\[faces\]'"):
            make()


# --- emoji ---


def test_emoji_are_what_the_table_says():
    assert len(emoji.THINGS) == 1911 and len(emoji.pairs("all")) == 10_039
    assert len({thing.label for thing in emoji.THINGS}) == 1911
    for style in emoji.STYLES:
        assert len(emoji.places(style)) <= len(emoji.atlas(emoji.file_of(style), 32)) < len(emoji.places(style)) + 44
    tags = [tag for thing in emoji.THINGS for tag in thing.tags]
    assert all(tag.isascii() and tag[0].isalpha() for tag in tags)
    assert not {"sexy", "lol", "weird"} & set(tags)


def test_the_splits_of_emoji_never_overlap_and_hold_out_a_twentieth():
    train, test = set(emoji.pairs("train")), set(emoji.pairs("test"))
    assert not train & test and train | test == set(emoji.pairs("all"))
    assert 0.04 < len(test) / 10_039 < 0.06
    assert {thing for thing, _ in train} == set(range(1911)) and {style for _, style in test} == set(emoji.STYLES)
    assert hashlib.sha256(repr(emoji.pairs("test")).encode()).hexdigest()[:16] == "059cc1efacc538b0"


def test_an_emoji_has_its_colour_and_its_caption():
    number = next(k for k, thing in enumerate(emoji.THINGS) if thing.label == "red heart")
    pictures = Emoji(split="all")
    for i, (thing, style) in enumerate(emoji.pairs("all")):
        if thing == number:
            red, green, blue = pictures.picture(i)[8:20, 10:22].reshape(-1, 3).mean(0)
            assert red > 1.5 * max(green, blue), style  # the gloss of some is white
            label, tag = pictures.caption(i).removesuffix(f" in {style} style").split(", ")
            assert label == "red heart" and tag in emoji.THINGS[number].tags
    again = Emoji(3 * len(pictures), split="all", drop=1.0)
    assert again.caption(len(pictures) + i) == emoji.THINGS[-1].label


def test_half_of_the_parts_are_dropped_by_noise():
    pictures = Emoji(2000, drop=0.5)
    captions = [pictures.caption(i) for i in range(2000)]
    assert 900 < sum("style" in caption for caption in captions) < 1100
    assert captions[7] != Emoji(2000, drop=0.5, seed=1).caption(7) or captions[:50] == captions[50:100]


def test_emoji_are_read_from_a_folder(tmp_path):
    pictures = Emoji(5)
    for i in range(5):
        Image.fromarray(pictures.picture(i).repeat(2, 0).repeat(2, 1)).save(tmp_path / f"{pictures.stem(i)}.png")
    large = Emoji(5, 64, folder=tmp_path)
    assert large.picture(4).shape == (64, 64, 3)
    assert np.array_equal(Emoji(5, 32, folder=tmp_path).picture(4), pictures.picture(4))
    with pytest.raises(
        FileNotFoundError, match=r"expected the pictures that diffkern data emoji writes, .* without 1 "
    ):
        Emoji(6, 64, folder=tmp_path)
    with pytest.raises(ValueError, match="size: expected one that divides 64, .*, got 48"):
        Emoji(5, 48, folder=tmp_path)


@needs_resvg
def test_icons_and_files_of_packages_become_pictures(tmp_path):
    """A package of icons with code points, names and an alias; and a folder of pictures, one larger than 64 x 64."""
    things = [emoji.Thing("2764", "red heart", "symbols", (), ()), emoji.Thing("1F1EB", "flag: X", "flags", (), ())]
    icons, files = tmp_path / "@iconify-json/noto-v1", tmp_path / "@lobehub/fluent-emoji-3d/assets"
    files.mkdir(parents=True), icons.mkdir(parents=True)
    square = {"body": '<rect width="8" height="16" fill="#f00"/>'}
    aliases = {"flag-x": {"parent": "other"}, "turned": {"parent": "other", "hFlip": True}}
    table = {"width": 16, "height": 16, "icons": {"a": square, "other": square}, "aliases": aliases}
    (icons / "icons.json").write_text(json.dumps(table))
    (icons / "chars.json").write_text(json.dumps({"2764-fe0f": "a"}))
    Image.new("RGBA", (128, 128), (0, 0, 255, 128)).save(files / "2764-fe0f.webp", lossless=True)
    found = dict(emoji_sources.of_style(tmp_path, "noto v1", things))
    assert sorted(found) == [0, 1]
    assert found[0][5, 5].tolist() == [255, 0, 0] and found[0][5, 40].tolist() == [255, 255, 255]
    ((number, picture),) = emoji_sources.of_style(tmp_path, "fluent 3d", things)
    assert number == 0 and picture.shape == (64, 64, 3) and picture[9, 9].tolist() == [127, 127, 255]


@needs_resvg
def test_without_npm_larger_emoji_are_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match="emoji: expected npm, which downloads the drawings, got none"):
        Emoji.fetch(size=64)


# --- where they are used ---


def test_sets_are_loaded_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = load_dataset("emoji:style", split="test", size=8)
    assert data.classes == emoji.STYLES and data.shape == (3, 8, 8) and len(data) == len(emoji.pairs("test"))
    labels = [emoji.STYLES.index(style) for _, style in emoji.pairs("test")]
    assert data.labels.tolist() == labels
    items = picture_set("faces:hair", size=16)
    assert isinstance(items, Items) and items.names == ("x", "label") and items.shape == (3, 16, 16)
    assert items.fingerprint == "Faces train seed 0 size 16" and items.classes == Faces.attributes["hair"]
    assert Items(Faces(3, transform=Labelled(None, None))).labelled is False
    (tmp_path / "faces").mkdir()
    with pytest.raises(ValueError, match="data: expected ./faces or the set faces, got 'faces:hair', which could be"):
        load_dataset("faces:hair")


def test_the_command_lists_the_sets(capsys):
    assert cli.main(["data"]) == 0
    told = capsys.readouterr().out
    assert all(made.licence in told and name in told for name, made in sets().items())


def test_the_command_writes_a_folder_that_image_folders_and_tables_read(tmp_path, capsys):
    out = str(tmp_path / "faces")
    assert cli.main(["data", "faces", "--n", "12", "--size", "32", "--label", "beard", "--out", out]) == 0
    data = image_folder(out, size=32)
    with open(f"{out}/metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(data) == 12 and set(data.classes) == {row["beard"] for row in rows}
    pictures = Faces(12, 32)
    for i, row in enumerate(rows):
        assert row["text"] == pictures.caption(i) and row["file_name"] == f"{row['beard']}/{i:07d}.png"
        assert np.array_equal(np.asarray(Image.open(f"{out}/{row['file_name']}")), pictures.picture(i))
    assert "Draftbit" in (tmp_path / "faces" / "LICENCE.txt").read_text()
    assert cli.main(["data", "faces", "--n", "1", "--out", out]) == 2
    assert "out: expected a new or an empty folder" in capsys.readouterr().err
    assert cli.main(["data", "faces", "--n", "1"]) == 2 and cli.main(["data", "--out", out]) == 2
