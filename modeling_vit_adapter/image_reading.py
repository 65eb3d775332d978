"""Pictures of every kind as upright 8-bit RGB: files, PIL images, arrays."""

import os
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# What Pillow's decoders raise on damaged data, besides OSError.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file as upright 8-bit RGB (the first frame of an animation).

    Raises:
        ValueError: there is no such file, or it holds no picture that can be read whole; the sentence says which.
    """
    name = os.fspath(path)
    if os.path.isdir(name):
        raise ValueError(f"{name}: a picture was expected, but this is a folder")
    if not os.path.isfile(name):
        raise ValueError(f"{name}: there is no such file")
    if os.path.getsize(name) == 0:
        raise ValueError(f"{name}: the file is empty (0 bytes)")
    try:
        with Image.open(name) as image:
            image.load()
            return to_rgb(image)
    except UnidentifiedImageError:
        raise ValueError(f"{name}: not a picture, {_looks_like(name)}") from None
    except Image.DecompressionBombError:
        raise ValueError(
            f"{name}: more pixels than Pillow reads from a file that may be a decompression bomb; "
            "if you trust the file, raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except DAMAGED as error:
        raise ValueError(f"{name}: the picture cannot be read whole ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image of any mode as upright 8-bit RGB.

    The EXIF orientation is applied, transparent parts lie over white, and more than 8 bits are brought to 8 by their
    range (`to_bytes`), where Pillow's own conversion would clip them to white.

    Raises:
        ValueError: the mode has no conversion to RGB (LAB), or values are not finite.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        image = Image.fromarray(to_bytes(np.asarray(image)))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_bytes(values: np.ndarray) -> np.ndarray:
    """Picture values of any type as 8 bits, by the range they use; nothing is clipped.

    uint8 stays, bool becomes 0 and 255, and uint16 uses its whole range (0 to 65535). Of other types, the range is the
    first that holds all values of 0 to 1 (floating point only), 0 to 255, 0 to 65535, their own minimum to maximum.

    Raises:
        ValueError: values are not finite.
    """
    if values.dtype == np.uint8 or values.size == 0:
        return values.astype(np.uint8)
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    low, high = _range_of(values)
    return np.rint((values.astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)


def _range_of(values: np.ndarray) -> tuple[float, float]:
    """What shall be black and what white."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "u" and size == 2:
        return 0, 65535
    smallest, largest = float(values.min()), float(values.max())
    if not np.isfinite([smallest, largest]).all():
        raise ValueError("a picture's values must be finite, but some are NaN or infinite")
    for high in (1, 255, 65535) if kind == "f" else (255, 65535):
        if smallest >= 0 and largest <= high:
            return 0, high
    return smallest, largest if largest > smallest else smallest + 1


def _looks_like(name: str) -> str:
    with open(name, "rb") as file:
        start = file.read(512).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "but a web page or other markup: download it again"
    return "or of a format that Pillow does not know"
