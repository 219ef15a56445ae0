"""Image files of every mode against the colours that they hold, and large ones against Pillow's own scaling."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffkern.io import image_file
from diffkern.io.image_file import fault, read_square


def read(path, size=4, channels=3):
    out = np.empty((channels, size, size), np.uint8)
    assert fault(path) is None and read_square(path, out) is None
    return out


def colour(image, path, **options):
    """The one colour that a picture of one colour is read as."""
    image.save(path, **options)
    pixels = read(path).reshape(3, -1)
    assert (pixels == pixels[:, :1]).all()
    return tuple(pixels[:, 0].tolist())


RAMP = np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369  # 0, 17 * 257, ..., 255 * 257


@pytest.mark.parametrize("suffix", ["png", "tif", "jp2", "pgm"])
def test_a_16_bit_grey_image_keeps_its_range(tmp_path, suffix):
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}")
    for channels in (1, 3):
        pixels = read(tmp_path / f"a.{suffix}", channels=channels)
        assert (pixels == RAMP // 257).all()


def test_a_16_bit_level_is_divided_by_257_and_rounded(tmp_path, monkeypatch):
    monkeypatch.setattr(image_file, "STRIP", 1 << 12)  # 16 rows at a time
    levels = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "a.png", compress_level=1)
    assert np.array_equal(read(tmp_path / "a.png", 256, 1)[0], np.rint(levels / 257))


def test_a_tiff_says_which_level_is_white(tmp_path):
    file = io.BytesIO()
    Image.fromarray(RAMP).save(file, "TIFF")
    tag = struct.Struct("<HHII")  # tag, type, count, value
    inverted = file.getvalue().replace(tag.pack(262, 3, 1, 1), tag.pack(262, 3, 1, 0))
    (tmp_path / "inverted.tif").write_bytes(inverted)
    assert (read(tmp_path / "inverted.tif")[0] == 255 - RAMP // 257).all()

    with Image.open(file) as image:
        offset = image.tag_v2[273][0]  # of the pixels
    levels = RAMP.reshape(-1) // 16  # 12 bits
    packed = b"".join(int(a << 12 | b).to_bytes(3, "big") for a, b in levels.reshape(-1, 2).astype(int))
    content = bytearray(file.getvalue().replace(tag.pack(258, 3, 1, 16), tag.pack(258, 3, 1, 12)))
    content[offset : offset + len(packed)] = packed
    (tmp_path / "12.tif").write_bytes(content)
    assert (read(tmp_path / "12.tif")[0].reshape(-1) == np.rint(levels / 4095 * 255)).all()


@pytest.mark.parametrize(("dtype", "kind"), [(np.float32, "floats"), (np.int32, "integers")])
def test_levels_without_a_known_range_are_refused_by_the_header(tmp_path, dtype, kind):
    Image.fromarray(RAMP.astype(dtype)).save(tmp_path / "a.tif")
    reason = rf"{kind} (TIFF) without a known range"
    assert fault(tmp_path / "a.tif") == read_square(tmp_path / "a.tif", np.empty((3, 4, 4), np.uint8)) == reason


FLAT = {
    "1": (Image.new("1", (4, 4), 1), "png", (255, 255, 255)),
    "L": (Image.new("L", (4, 4), 90), "png", (90, 90, 90)),
    "CMYK": (Image.new("CMYK", (4, 4), (0, 100, 200, 0)), "tif", (255, 155, 55)),
    "YCbCr": (Image.new("YCbCr", (4, 4), (90, 128, 128)), "tif", (90, 90, 90)),
    "LAB": (Image.new("LAB", (4, 4), (255, 128, 128)), "tif", (255, 255, 255)),
    "LA": (Image.new("LA", (4, 4), (90, 255)), "png", (90, 90, 90)),
    "LA half": (Image.new("LA", (4, 4), (90, 51)), "png", (222, 222, 222)),  # 0.2 * 90 + 0.8 * 255
    "RGBA": (Image.new("RGBA", (4, 4), (9, 90, 200, 255)), "webp", (9, 90, 200)),
    "RGBA half": (Image.new("RGBA", (4, 4), (0, 100, 255, 51)), "png", (204, 224, 255)),
}


@pytest.mark.parametrize(("image", "suffix", "expected"), FLAT.values(), ids=FLAT)
def test_any_mode_becomes_rgb(tmp_path, image, suffix, expected):
    options = {"lossless": True} if suffix == "webp" else {}
    assert colour(image, tmp_path / f"a.{suffix}", **options) == pytest.approx(expected, abs=1)


def test_any_mode_becomes_grey_by_the_weights_of_rgb(tmp_path):
    for k, (image, suffix, expected) in enumerate(FLAT.values()):
        image.save(tmp_path / f"{k}.{suffix}")
        grey = np.dot(expected, (0.299, 0.587, 0.114))
        assert read(tmp_path / f"{k}.{suffix}", channels=1).astype(float) == pytest.approx(grey, abs=1)


@pytest.mark.parametrize("hidden", [(0, 0, 0), (255, 0, 255), (255, 255, 255)])
def test_the_colour_under_transparency_is_white(tmp_path, hidden):
    assert colour(Image.new("RGBA", (4, 4), (*hidden, 0)), tmp_path / "a.png") == (255, 255, 255)


def palette(*colours):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([level for colour in colours for level in colour])
    return image


TRANSPARENT = {
    "palette": (palette((255, 0, 0), (0, 9, 0)), "png", 1),
    "palette of alphas": (palette((255, 0, 0), (0, 9, 0)), "png", b"\xff\0"),
    "gif": (palette((255, 0, 0), (0, 9, 0)), "gif", 1),
    "level": (Image.new("L", (4, 4), 90), "png", 90),
    "level of 16 bits": (Image.fromarray(np.full((4, 4), 1000, np.uint16)), "png", 1000),
    "colour": (Image.new("RGB", (4, 4), (1, 2, 3)), "png", (1, 2, 3)),
}


@pytest.mark.parametrize(("image", "suffix", "transparency"), TRANSPARENT.values(), ids=TRANSPARENT)
def test_a_transparent_colour_is_white(tmp_path, image, suffix, transparency):
    assert colour(image, tmp_path / f"a.{suffix}", transparency=transparency) == (255, 255, 255)
    assert colour(image, tmp_path / f"b.{suffix}") != (255, 255, 255)


def png(bits, kind, row, transparent):
    """A PNG of 2x2 pixels, both rows alike, with a transparent colour."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 2, 2, bits, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + row) * 2)
    chunks = ((b"IHDR", header), (b"tRNS", transparent), (b"IDAT", rows), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in chunks)


@pytest.mark.parametrize(
    ("bits", "kind", "row", "transparent", "other"),
    [
        (1, 0, b"\x40", struct.pack(">H", 1), 0),  # pixels 0 and 1
        (2, 0, b"\x10", struct.pack(">H", 1), 0),
        (4, 0, b"\x35", struct.pack(">H", 5), 51),
        (16, 2, struct.pack(">6H", 5140, 5140, 5140, 7710, 7710, 7710), struct.pack(">3H", 7710, 7710, 7710), 20),
    ],
)
def test_a_transparent_colour_of_other_than_8_bits_is_found(tmp_path, bits, kind, row, transparent, other):
    (tmp_path / "a.png").write_bytes(png(bits, kind, row, transparent))
    assert read(tmp_path / "a.png", 2)[:, 0].tolist() == [[other, 255]] * 3


# --- large images ---


def as_pillow_scales(path, size, channels):
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)).reshape(size, size, -1)


def photograph(width, height):
    """Soft shapes, an edge and grain, in colours that do not saturate."""
    random = np.random.default_rng(0)
    soft = Image.fromarray(random.integers(50, 200, (9, 12, 3), dtype=np.uint8)).resize((width, height))
    pixels = np.asarray(soft) + random.integers(-20, 21, (height, width, 1))
    pixels[height // 3 : height // 2, width // 4 :] //= 3
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(603, 801), (1030, 517)])
def test_a_jpeg_decoded_at_a_fraction_is_within_one_level(tmp_path, size, channels):
    photograph(*size).save(tmp_path / "a.jpg", quality=90)
    expected = as_pillow_scales(tmp_path / "a.jpg", 16, channels)
    pixels = read(tmp_path / "a.jpg", 16, channels).transpose(1, 2, 0)
    assert abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("size", [(603, 401), (401, 603)])
def test_strips_change_nothing_by_more_than_a_level(tmp_path, monkeypatch, mode, size):
    photograph(*size).convert(mode).save(tmp_path / "a.png", compress_level=1)
    expected = read(tmp_path / "a.png", 16)
    monkeypatch.setattr(image_file, "LARGE", 1 << 10)
    monkeypatch.setattr(image_file, "STRIP", 1 << 12)
    assert abs(read(tmp_path / "a.png", 16).astype(int) - expected).max() <= 1
    assert np.array_equal(expected.transpose(1, 2, 0), as_pillow_scales(tmp_path / "a.png", 16, 3))


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright_whichever_way_it_was_taken(tmp_path, monkeypatch, orientation, large):
    if large:
        monkeypatch.setattr(image_file, "LARGE", 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("png", "jpg", "tif"):
        photograph(40, 30).save(tmp_path / f"a.{suffix}", exif=exif)
        expected = as_pillow_scales(tmp_path / f"a.{suffix}", 8, 3)
        assert abs(read(tmp_path / f"a.{suffix}", 8).transpose(1, 2, 0).astype(int) - expected).max() <= 1


def test_a_line_of_pixels_is_cut_to_its_middle(tmp_path, monkeypatch):
    line = np.zeros((1, 4001), np.uint8)
    line[0, 2000] = 200
    Image.fromarray(line).save(tmp_path / "a.png")
    expected = as_pillow_scales(tmp_path / "a.png", 4, 1)[:, :, 0]
    for large in (image_file.LARGE, 0):
        monkeypatch.setattr(image_file, "LARGE", large)
        assert np.array_equal(read(tmp_path / "a.png", 4, 1)[0], expected)
    assert expected.max() > 190


def reason(path):
    return read_square(path, np.empty((3, 4, 4), np.uint8))


def test_what_pillow_takes_for_a_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert fault(tmp_path / "a.png").startswith("Image size (10000 pixels) exceeds limit of 8000 pixels")


def test_an_image_that_does_not_fit_in_memory_is_an_error_of_its_file(tmp_path, monkeypatch):
    def load(image):
        raise MemoryError

    Image.new("L", (4, 4)).save(tmp_path / "a.bmp")
    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert reason(tmp_path / "a.bmp") == "one that does not fit in memory"


def test_damage_is_a_reason_in_one_line(tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:60])
    assert fault(tmp_path / "cut.png") is None and "truncated" in reason(tmp_path / "cut.png")
    (tmp_path / "empty.png").write_bytes(b"")
    assert fault(tmp_path / "empty.png") == "a file that Pillow does not identify"
    assert fault(tmp_path / "none.png").startswith("[Errno 2] No such file")
