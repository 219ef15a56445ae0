"""Image folders: which files are read as which class, what is left out and told, and the errors of many files."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern.data import image_folder, load_dataset
from diffkern.io import image_folder as folders
from diffkern.io.image_folder import find_images, natural, readable_suffixes


def paint(path, colour=0, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


def files(root):
    """The paths below ``root`` of each class."""
    return {name: [str(path.relative_to(root)) for path in paths] for name, paths in find_images(root).files.items()}


def test_sub_folders_are_classes_in_alphabetical_order(tmp_path):
    paint(tmp_path / "red" / "1.png", (255, 0, 0))
    paint(tmp_path / "blue" / "b.PNG", (0, 0, 255))
    paint(tmp_path / "blue" / "a.bmp", (0, 0, 128))
    (tmp_path / "blue" / "notes.txt").write_text("no image")
    data = image_folder(tmp_path, size=8)
    assert data.classes == ("blue", "red") and data.labels.tolist() == [0, 0, 1]
    assert data.images[:, :, 4, 4].tolist() == [[0, 0, 128], [0, 0, 255], [255, 0, 0]]


def test_label_k_of_numbered_folders_is_class_k(tmp_path):
    for label in range(12):
        paint(tmp_path / str(label) / "1.png", (label, 0, 0))
    data = image_folder(tmp_path, size=2)
    assert data.classes == tuple(map(str, range(12))) and data.labels.tolist() == list(range(12))
    assert data.images[:, 0, 0, 0].tolist() == list(range(12))


def test_numbers_in_names_sort_as_numbers_and_the_rest_as_text():
    names = ["b", "a10", "a9", "a09", "B", "10", "9", "a9b2", "a9b10", "n02", "n01", ""]
    assert sorted(names, key=natural) == ["", "9", "10", "B", "a09", "a9", "a9b2", "a9b10", "a10", "b", "n01", "n02"]


def test_images_without_sub_folders_have_no_labels(tmp_path):
    paint(tmp_path / "1.png", (10, 20, 30))
    data = load_dataset(tmp_path, size=4)
    assert data.labels is None and data.classes is None
    assert torch.equal(
        data.images, torch.tensor([10, 20, 30], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 4, 4)
    )


def test_the_centre_is_cut_out_and_scaled(tmp_path):
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 200  # the middle third is the centre square
    Image.fromarray(stripes).save(tmp_path / "wide.png")
    Image.fromarray(stripes.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert (image_folder(tmp_path, size=8).images == 200).all()
    assert image_folder(tmp_path, size=4).images.float().mean() == pytest.approx(200, abs=6)  # edges blend a little


def test_more_images_than_a_thread_takes_at_a_time_stay_in_order(tmp_path, capsys):
    names = [f"{k:03}.png" for k in range(3 * folders.BLOCK + 1)]
    for k, name in enumerate(names):
        paint(tmp_path / name, (k, 0, 0), size=(2, 2))
    assert image_folder(tmp_path, size=2, progress=True).images[:, 0, 0, 0].tolist() == list(range(len(names)))
    assert capsys.readouterr() == ("", "")  # no bar without a terminal


# --- what is left out ---


def test_what_programs_leave_behind_is_no_class_and_no_image(tmp_path):
    for name in ("cat/a.png", "dog/b.png", ".ipynb_checkpoints/a-checkpoint.png", "cat/.ipynb_checkpoints/a.png"):
        paint(tmp_path / name)
    for name in ("__MACOSX/cat/._a.png", "cat/._a.png", "@eaDir/a.png", "dog/@eaDir/b.png", "lost+found/c.png"):
        paint(tmp_path / name)
    for name in ("cat/Thumbs.db", "desktop.ini", ".DS_Store"):
        (tmp_path / name).write_bytes(b"\0")
    assert files(tmp_path) == {"cat": ["cat/a.png"], "dog": ["dog/b.png"]}
    assert find_images(tmp_path).notes() == (
        "left out: 2 hidden files, 2 hidden folders, 2 system files, 4 system folders",
    )


def test_a_flat_folder_beside_a_hidden_one_is_flat(tmp_path):
    paint(tmp_path / "a.png")
    paint(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.png")
    assert files(tmp_path) == {None: ["a.png"]}


def test_every_suffix_that_pillow_decodes_is_read(tmp_path):
    suffixes = ["bmp", "jfif", "jpe", "jpeg", "mpo", "png", "tga", "webp"]
    suffixes += ["avif"] if ".avif" in readable_suffixes() else []
    for suffix in suffixes:
        Image.new("RGB", (8, 8), (90, 90, 90)).save(
            tmp_path / f"{suffix}.{suffix}", format="JPEG" if suffix == "mpo" else None
        )
    data = image_folder(tmp_path, size=4)
    assert len(data) == len(suffixes) and (data.images.int() - 90).abs().max() <= 1
    assert not readable_suffixes() & {".eps", ".h5", ".hdf", ".mpg", ".pdf", ".txt", ".wmf"}


def test_the_rest_is_counted_by_suffix(tmp_path):
    paint(tmp_path / "cat" / "a.png")
    paint(tmp_path / "dog" / "a.png")
    for name in ("cat/a.txt", "dog/b.TXT", "cat/README", "labels.json"):
        (tmp_path / name).write_text("")
    (tmp_path / "raw").mkdir()
    (tmp_path / "cat" / "b.png").symlink_to("nowhere")
    (tmp_path / "cat" / "itself").symlink_to("itself")
    os.mkfifo(tmp_path / "cat" / "c.png")
    data = image_folder(tmp_path, size=4)  # does not wait for the pipe's writer
    assert data.summary == (
        "data: 2 images of 3x4x4, 2 classes (cat 1, dog 1); "
        "left out: 4 files not images (.txt 2, .json 1, no suffix 1), 2 broken links, 1 special file, "
        "1 folder without images (raw)"
    )


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (["images/1.png", "images/deep/2.png"], "a single class; to train on what is in it, give {}/images"),
        (["train/a/1.png", "test/a/1.png"], "the classes are splits by their names; to train on one, give {}/train"),
        (["Test/a/1.png", "val/a/1.png"], "the classes are splits by their names; to train on one, give {}/Test"),
        (["train/1.png", "car/1.png"], None),
    ],
)
def test_a_wrapper_folder_is_warned_of(tmp_path, names, warning):
    for name in names:
        paint(tmp_path / name)
    notes = find_images(tmp_path).notes()
    assert notes == (() if warning is None else (f"warning: {warning.format(tmp_path)}",))


# --- links ---


def test_links_to_folders_are_followed(tmp_path):
    paint(tmp_path / "data" / "cat" / "a.png")
    for name in ("b.png", "c.png"):
        paint(tmp_path / "more" / name)
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "more")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "more")
    assert files(tmp_path / "data") == {
        "cat": ["cat/a.png", "cat/more/b.png", "cat/more/c.png"],
        "dog": ["dog/b.png", "dog/c.png"],
    }


def test_no_loop_of_links_reads_an_image_twice_or_of_another_class(tmp_path):
    root = tmp_path / "data"
    paint(root / "cat" / "deep" / "a.png")
    paint(root / "dog" / "b.png")
    paint(tmp_path / "outside.png")
    for link, target in (
        ("cat/deep/up", root / "cat"),
        ("cat/again", root / "cat" / "deep"),
        ("cat/root", root),
        ("cat/out", tmp_path),
        ("all", root),
    ):
        (root / link).symlink_to(target)
    found = find_images(root)
    assert {name: [path.name for path in paths] for name, paths in found.files.items()} == {
        "cat": ["a.png"],
        "dog": ["b.png"],
    }
    assert found.others == {"repeated folder": 5} and found.empty == ["all"]


# --- errors ---


def test_images_at_both_levels_are_refused_by_their_names(tmp_path):
    paint(tmp_path / "1.png")
    paint(tmp_path / "sub" / "1.png")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"expected images in sub-folders.*got both: 1.png beside the folders sub$"):
        image_folder(tmp_path)


def test_a_folder_without_images_says_what_it_has(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"")
    paint(tmp_path / ".hidden" / "a.png")
    message = (
        r"expected images \(.png, .jpg ...\), got none; left out: 1 file not an image \(.heic 1\), 1 hidden folder$"
    )
    with pytest.raises(ValueError, match=message):
        image_folder(tmp_path)


def test_a_broken_image_is_an_error_with_its_name(tmp_path):
    paint(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/1.png: expected an image, got "):
        image_folder(tmp_path)


def test_all_broken_images_are_told_at_once_and_ten_by_name(tmp_path):
    paint(tmp_path / "cat" / "good.png", size=(40, 40))
    content = (tmp_path / "cat" / "good.png").read_bytes()
    for k in range(12):
        (tmp_path / "cat" / f"{k:02}.png").write_bytes(content[:60])  # the header is whole
    with pytest.raises(ValueError, match="12 files that cannot be read: ") as error:
        image_folder(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: expected images, got 12 files") and message.endswith(") and 2 more")
    assert message.count("truncated") == 10 and "cat/00.png (" in message and "\n" not in message


def test_a_bad_header_is_told_before_any_image_is_decoded(tmp_path, monkeypatch):
    paint(tmp_path / "a.png")
    (tmp_path / "z.png").write_bytes(b"")
    monkeypatch.setattr(folders, "read_square", lambda *arguments: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="z.png: expected an image, got a file that Pillow does not identify"):
        image_folder(tmp_path)


def test_more_pixels_than_memory_are_an_error_of_the_size(tmp_path):
    paint(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"size: expected images that fit in memory, got 1 of 3x\d+x\d+$"):
        image_folder(tmp_path, size=1 << 40)
