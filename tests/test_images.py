"""Images out: every pixel where it belongs, and settings that come back as they went in."""

import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from diffkern.images import (
    captions,
    from_pixels,
    grid,
    layout,
    read_settings,
    save_gif,
    save_npz,
    save_png,
    to_pixels,
    to_uint8,
)

SETTINGS = {"seeds": [0, 2**64 - 1, -1], "sampler": "ddim", "eta": 0.5, "labels": None, "versions": {"torch": "2"}}


def solid(*levels: int, channels: int = 1, size: int = 4) -> torch.Tensor:
    """One image a grey level."""
    return (torch.tensor(levels) / 127.5 - 1)[:, None, None, None].expand(-1, channels, size, size)


def test_bytes_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert np.array_equal(to_uint8(levels.float() / 127.5 - 1)[0, :, :, 0], levels[0, 0])
    assert torch.equal(to_pixels(from_pixels(levels)), levels)


def test_values_out_of_range_are_clamped():
    assert to_uint8(torch.tensor([-3.0, 3.0]).reshape(2, 1, 1, 1)).ravel().tolist() == [0, 255]


def test_an_image_that_is_not_finite_is_no_image():
    x = torch.zeros(4, 1, 2, 2)
    x[1, 0, 1, 1], x[3, 0, 0, 0] = torch.nan, -torch.inf
    for draw in (to_uint8, grid):
        with pytest.raises(ValueError, match="^x: expected finite images, got NaN or infinity in 2 of 4$"):
            draw(x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, ["a", "b", "c", "a class with a long name", ""]], ids=["bare", "labelled"])
def test_the_grid_shows_each_image_in_its_place(channels, labels):
    levels = [10, 60, 110, 160, 210]
    image = grid(solid(*levels, channels=channels), labels, columns=3, scale=5)
    assert image.mode == ("L" if channels == 1 else "RGB")
    text = 0 if labels is None else 14
    assert image.size == (3 * 24 + 4, 2 * (24 + text) + 4)
    pixels = np.asarray(image.convert("L"))
    for i, level in enumerate(levels):
        top, left = 4 + i // 3 * (24 + text), 4 + i % 3 * 24
        assert (pixels[top : top + 20, left : left + 20] == level).all()
        below = pixels[top + 20 : top + 24 + text, left : left + 20]
        assert (below.min() < 128) == bool(labels and labels[i])  # ink where there is a label, and only there


def test_the_grid_keeps_the_text_within_its_image():
    image = np.asarray(grid(solid(0, 0, size=8), ["", "an extraordinarily long name of a class"], columns=1, scale=8))
    assert (image[:, :4] == 255).all() and (image[:, -4:] == 255).all()


def text_below(label: str) -> np.ndarray:
    """The pixels of the label of one image, 200 wide."""
    return np.asarray(grid(solid(0, size=1), [label], scale=200))[204:]


@pytest.mark.parametrize(
    ("label", "shown"),
    [
        ("caf\u00e9", "cafe"),  # the font has no accents: the base letter
        ("cafe\u0301", "cafe"),
        ("\u732b", r"\u732b"),  # nor Chinese: the escape, not a box
        ("a\U0001f431", r"a\U0001f431"),
        ("\ud800", r"\ud800"),
        ("two\nlines\r\nor\tthree", "two lines or three"),
        ("\u200bcat\ufe0f", "cat"),
    ],
)
def test_a_label_is_one_line_of_what_the_font_has(label, shown):
    assert np.array_equal(text_below(label), text_below(shown))
    assert not np.array_equal(text_below(label), text_below("\uffff" * len(shown)))


def test_a_class_that_the_font_cannot_spell_is_shown_by_its_number():
    classes = ("caf\u00e9", "\u732b", "a\nb", "", "\U0001f431 cat")
    assert captions(classes, [4, 3, 2, 1, 0, -1]) == ["4", "3", "a b", "1", "cafe", ""]


def test_a_label_of_any_length_is_cut_to_its_image():
    assert np.array_equal(text_below("m" * 10**6), text_below("m" * 300))


def test_a_scale_by_which_pillow_would_not_open_the_grid_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert layout(1, 8, 8, labelled=False, scale=11).size == (96, 96)  # 9216 of twice 5000 pixels
    with pytest.raises(ValueError, match=r"^scale: expected a grid of at most 10000 pixels, got \(104, 104\) by 12$"):
        grid(solid(0, size=8), scale=12)
    assert grid(solid(*[0] * 4, size=8)).size == (2 * 68 + 4, 2 * 68 + 4)  # nobody asked for more than the default


def test_a_grid_is_about_square_and_its_images_64_pixels_wide():
    assert grid(solid(*[0] * 10, size=32)).size == (4 * 68 + 4, 3 * 68 + 4)


def test_png_settings_come_back(tmp_path):
    save_png(grid(solid(1, 2)), tmp_path / "a.png", SETTINGS)
    assert read_settings(tmp_path / "a.png") == SETTINGS
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(image, grid(solid(1, 2)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_gif_has_every_frame_for_its_time(tmp_path):
    frames = [grid(solid(level), scale=2) for level in (0, 100, 200)]
    save_gif(frames, tmp_path / "a.gif", milliseconds=50, hold=1000)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        shown = [(np.asarray(f.convert("L"))[6, 6], f.info["duration"]) for f in ImageSequence.Iterator(gif)]
    assert shown == [(0, 50), (100, 50), (200, 1000)]


def test_a_gif_in_colour_keeps_its_colours(tmp_path):
    x = torch.tensor([1.0, -1.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 4, 4)
    save_gif([grid(x, scale=2), grid(-x, scale=2)], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.convert("RGB").getpixel((6, 6)) == pytest.approx((255, 0, 128), abs=2)


def test_npz_holds_the_arrays_without_pickle(tmp_path):
    save_npz(tmp_path / "a.npz", images=to_uint8(solid(1, 2)), seeds=np.array([3, 4]), settings="{}")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert sorted(arrays) == ["images", "seeds", "settings"]
        assert arrays["images"].shape == (2, 4, 4, 1) and arrays["seeds"].tolist() == [3, 4]


def plain_png(folder):
    Image.new("L", (2, 2)).save(folder / "plain.png")
    return read_settings(folder / "plain.png")


BAD = {
    "two channels": (lambda f: to_uint8(torch.zeros(1, 2, 4, 4)), ValueError, r"x: expected \[N, 1 or 3, H, W\], got"),
    "no batch": (lambda f: to_uint8(torch.zeros(1, 4, 4)), ValueError, r"x: expected .*, got \(1, 4, 4\)"),
    "no image": (lambda f: grid(torch.zeros(0, 1, 4, 4)), ValueError, "x: expected at least one image, got none"),
    "labels": (lambda f: grid(solid(0, 1), ["a"]), ValueError, "labels: expected 2, one an image, got 1"),
    "columns": (lambda f: grid(solid(0), columns=0), ValueError, "columns: expected at least 1, got 0"),
    "scale": (lambda f: grid(solid(0), scale=-1), ValueError, "scale: expected at least 1, got -1"),
    "wide columns": (lambda f: layout(10**9, 8, 8, labelled=True, columns=10**8), ValueError, "columns: expected"),
    "wide scale": (lambda f: grid(solid(0), scale=10**9), ValueError, "scale: expected .* 536870911"),
    "wide gif": (lambda f: save_gif([Image.new("L", (65536, 1))], f / "a.gif"), ValueError, "frames: expected at most"),
    "a pipe": (lambda f: (os.mkfifo(f / "p"), read_settings(f / "p")), ValueError, "expected a file, got a"),
    "no frames": (lambda f: save_gif([], f / "a.gif"), ValueError, "frames: expected at least one, got none"),
    "objects": (lambda f: save_npz(f / "a.npz", x=np.array([{}])), TypeError, "x: expected numbers or text, got"),
    "no settings": (plain_png, ValueError, "plain.png: expected a PNG written by diffkern"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD)
def test_bad_images_say_what_was_expected(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)
