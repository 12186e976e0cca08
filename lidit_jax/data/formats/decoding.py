"""Encoded pictures (PNG, JPEG, WebP) to 8-bit RGB: the size from the header alone, and the decoded array.

The bytes come from anywhere: no other format is tried, and a picture's pixels are counted before any is decoded.
Ordinary JPEGs are decoded by libjpeg-turbo itself, which takes two thirds of Pillow's time, can halve a picture while
decoding it, and tells of damage that Pillow passes over; all else is Pillow's.
"""

import io
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from lidit_jax.errors import UserError

# Pillow has dozens of little-used decoders; what a file's bytes say counts, not its name, so a GIF named .png is
# refused like any other format.
_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION_TAG = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
# EXIF orientation -> how an array [H, W, 3] is turned upright.
_UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


class BrokenPicture(Exception):
    """A picture that cannot be used; its message says why in a few words."""


def read_size(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Height and width that `decode` would give, from the header alone.

    Raises:
      BrokenPicture: not a PNG, JPEG or WebP, a damaged header, or more than `max_pixels`.
    """
    picture = _open(file, max_pixels)
    width, height = picture.size
    return (width, height) if _orientation(picture) in _SIDEWAYS else (height, width)


def decode(
    data: bytes, max_pixels: int, at_least: tuple[int, int] | None = None, expected: tuple[int, int] | None = None
) -> np.ndarray:
    """The picture as people see it: upright (EXIF), the first frame, transparency on white, colour profiles ignored.

    16-bit values are rounded to 8 bits, CMYK is converted by Pillow's plain formula.

    Args:
      at_least: height and width that are enough: a JPEG may come smaller by a power of two, but not smaller than that
        on either side. (The decoder leaves the higher frequencies out, which is sharper than averaging pixels.)
      expected: height and width that the picture must have before that.

    Returns:
      uint8 [H, W, 3].

    Raises:
      BrokenPicture: as `read_size`, or damaged data, or another size than expected.
    """
    size, orientation, picture = _upright_jpeg_size(data, max_pixels), 1, None
    if size is None:
        picture = _open(io.BytesIO(data), max_pixels)
        orientation = _orientation(picture)
        size = picture.size if orientation in _SIDEWAYS else picture.size[::-1]
    if expected is not None and size != tuple(expected):
        raise BrokenPicture("changed since it was indexed")
    if picture is None or picture.format == "JPEG" and picture.mode in ("RGB", "L"):
        return np.ascontiguousarray(_UPRIGHT[orientation](_decode_jpeg(data, at_least, orientation)))
    try:
        picture.load()
        rgb = _to_rgb(picture)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged data
        raise BrokenPicture("damaged picture") from error
    return np.ascontiguousarray(_UPRIGHT[orientation](np.array(rgb)))


def _upright_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Height and width of a JPEG in colours or grey without EXIF; None for all else, which Pillow looks at."""
    if not data.startswith(b"\xff\xd8\xff") or _has_exif(data):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colors not in ("YCbCr", "RGB", "Gray"):
        return None
    if height * width > max_pixels:
        raise BrokenPicture("too many pixels")
    return height, width


def _has_exif(data: bytes) -> bool:
    """Whether a JPEG has such a segment before its picture, or its segments are out of order."""
    position = 2
    while data[position : position + 1] == b"\xff":
        kind, length = data[position + 1 : position + 2], int.from_bytes(data[position + 2 : position + 4], "big")
        if kind == b"\xda":  # the picture begins
            return False
        if kind == b"\xe1" and data[position + 4 : position + 10] == b"Exif\0\0":
            return True
        position += 2 + length
    return True


def _decode_jpeg(data: bytes, at_least: tuple[int, int] | None, orientation: int) -> np.ndarray:
    """As it is stored, or smaller."""
    smaller = {}
    if at_least:
        height, width = at_least[::-1] if orientation in _SIDEWAYS else at_least
        # Factors under 2 are no faster than decoding in full.
        smaller = {"min_height": height, "min_width": width, "min_factor": 2}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **smaller)
    except ValueError as error:
        raise BrokenPicture("damaged picture") from error


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        picture = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BrokenPicture("too many pixels") from error
    except (MemoryError, UserError):  # of a file that cannot be read
        raise
    except Exception as error:  # as in `decode`
        raise BrokenPicture("unreadable picture") from error
    if picture.width * picture.height > max_pixels:
        raise BrokenPicture("too many pixels")
    if not picture.width * picture.height:
        raise BrokenPicture("unreadable picture")
    return picture


def _orientation(picture: Image.Image) -> int:
    """EXIF orientation, 1 to 8, from what opening read: `getexif` would decode a PNG to look for it at its end."""
    encoded = picture.info.get("exif")
    if not encoded:
        return 1
    exif = Image.Exif()
    try:
        exif.load(encoded)
        orientation = int(exif.get(_ORIENTATION_TAG, 1))
        return orientation if orientation in _UPRIGHT else 1
    except Exception:  # a camera's damaged notes do not make the picture unusable: it is upright as far as we know
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        return _from_16_bits(picture)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _from_16_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey, which Pillow would clip at 255 instead of scaling."""
    grey = np.asarray(picture).astype(np.int64)
    scaled = (np.clip(grey, 0, 65535) + 128) // 257
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
