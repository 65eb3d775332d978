"""Pictures of every kind, whole and damaged, as upright 8-bit RGB."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vit_adapter.modeling_vit_adapter.image_reading import load_image, to_bytes, to_rgb

# 2 x 3 and all pixels different, so that no orientation is mistaken for another.
GREY = np.array([[0, 50, 100], [150, 200, 250]], dtype=np.uint8)
RGB = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=-1)


def _saved(tmp_path: Path, image: Image.Image, name: str, **options: object) -> Path:
    path = tmp_path / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(tmp_path, orientation):
    turned_back = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, 1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = _saved(tmp_path, Image.fromarray(np.ascontiguousarray(turned_back)), "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(load_image(path)), RGB)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (Image.fromarray(GREY), "grey.png"),
        (Image.fromarray(GREY), "grey.tif"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "16_bits.png"),
        (Image.fromarray(GREY.astype(np.uint16) * 257), "16_bits.tif"),
        (Image.fromarray(GREY.astype(np.int32) * 257), "32_bits.tif"),
        (Image.fromarray(GREY.astype(np.float32) / 255), "float_to_1.tif"),
        (Image.fromarray(GREY.astype(np.float32)), "float_to_255.tif"),
        (Image.fromarray(np.dstack([GREY, np.full_like(GREY, 255)]), "LA"), "grey_alpha.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_grey_pictures_of_any_depth_become_three_equal_channels(tmp_path, image, name):
    image = load_image(_saved(tmp_path, image, name))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.dstack([GREY] * 3))


def test_a_palette_picture_keeps_its_colours(tmp_path):
    palette = Image.fromarray(RGB).quantize(6)
    for name in ("palette.png", "palette.gif"):
        np.testing.assert_array_equal(np.asarray(load_image(_saved(tmp_path, palette, name))), RGB)


def test_a_1_bit_picture_is_black_and_white(tmp_path):
    image = load_image(_saved(tmp_path, Image.fromarray(GREY > 100), "bits.png"))
    np.testing.assert_array_equal(np.asarray(image), np.dstack([(GREY > 100) * np.uint8(255)] * 3))


def test_a_cmyk_picture_becomes_rgb():
    cmyk = Image.new("CMYK", (3, 2), (0, 255, 255, 0))
    assert np.unique(np.asarray(to_rgb(cmyk)).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


@pytest.mark.parametrize("form", ["RGBA", "LA", "palette", "tRNS"])
def test_transparent_parts_lie_over_white(tmp_path, form):
    opaque, transparent = (40, 40, 40), (7, 7, 7)
    image = Image.new("RGB", (2, 1), opaque)
    image.putpixel((1, 0), transparent)
    if form == "palette":
        image = image.quantize(2)
        path = _saved(tmp_path, image, "image.png", transparency=image.getpixel((1, 0)))
    elif form == "tRNS":
        path = _saved(tmp_path, image, "image.png", transparency=transparent)
    else:
        image.putalpha(Image.fromarray(np.array([[255, 0]], dtype=np.uint8)))
        path = _saved(tmp_path, image.convert(form), "image.png")
    assert np.asarray(load_image(path)).tolist() == [[list(opaque), [255, 255, 255]]]


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue")]
    path = _saved(tmp_path, frames[0], "frames.gif", save_all=True, append_images=frames[1:])
    assert load_image(path).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 255], dtype=np.uint8), [0, 128, 255]),
        (np.array([False, True]), [0, 255]),
        (np.array([0, 257, 65535], dtype=np.uint16), [0, 1, 255]),
        (np.array([0, 257, 65535], dtype=">u2"), [0, 1, 255]),
        (np.array([0, 100, 255], dtype=np.int64), [0, 100, 255]),
        (np.array([0, 257, 25700], dtype=np.int32), [0, 1, 100]),
        (np.array([0, 0.2, 1.0], dtype=np.float32), [0, 51, 255]),
        (np.array([0, 20.4, 255.0]), [0, 20, 255]),
        (np.array([-1.0, 0.0, 1.0]), [0, 128, 255]),
        (np.array([0.0, 5e4, 1e5]), [0, 128, 255]),
        (np.array([-3.0, -3.0]), [0, 0]),
        (np.zeros((0, 4)), []),
    ],
)
def test_values_are_brought_to_8_bits_by_their_range(values, expected):
    ours = to_bytes(values)
    assert ours.dtype == np.uint8
    assert ours.ravel().tolist() == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="must be finite"):
        to_bytes(np.array([0.5, value, 0.1]))


def _bytes_of(tmp_path: Path, name: str) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return _saved(tmp_path, Image.fromarray(noise), name).read_bytes()


@pytest.mark.parametrize("name", ["whole.jpg", "whole.png", "whole.gif", "whole.tif", "whole.bmp", "whole.webp"])
def test_a_picture_cut_short_is_refused_at_any_length(tmp_path, name):
    content = _bytes_of(tmp_path, name)
    path = tmp_path / f"cut_{name}"
    for share in (0.02, 0.2, 0.5, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        # Pillow warns of what it then refuses.
        with warnings.catch_warnings(), pytest.raises(ValueError, match=f"^{path}: "):
            warnings.simplefilter("ignore")
            load_image(path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no such file"),
        (b"", r"the file is empty \(0 bytes\)"),
        (b"  <!DOCTYPE html><html>404</html>", "web page"),
        (b"\x00\x01 something else", "format that Pillow does not know"),
    ],
)
def test_a_file_that_is_no_picture_is_refused_with_the_reason(tmp_path, content, sentence):
    path = tmp_path / "picture.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path}: .*{sentence}"):
        load_image(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="a picture was expected, but this is a folder"):
        load_image(tmp_path)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = _saved(tmp_path, Image.fromarray(RGB), "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # Pillow raises at more than twice as many
    with pytest.raises(ValueError, match="decompression bomb"):
        load_image(path)
