"""Decodes images (PNG, JPEG, WebP) to 8-bit RGB, and reads their size from the header alone.

The bytes are untrusted: no other format is tried, and the number of pixels is checked before anything is decoded.
libjpeg-turbo decodes ordinary JPEGs: it takes two thirds of Pillow's time, can halve an image while decoding it, and
reports damage that Pillow ignores. Pillow decodes everything else.
"""

import io
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from lidit_jax.errors import UserError

# Pillow has dozens of little-used decoders. The format is detected from the content, not the file name, so a GIF named
# .png is rejected like any other format.
_FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION_TAG = 0x0112
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)
# EXIF orientation -> transform that turns an array [H, W, 3] upright.
_TO_UPRIGHT = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


class BrokenImage(Exception):
    """An image that cannot be used; the message gives the reason in a few words."""


def read_size(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Returns the height and width of the image that `decode` would return, from the header alone.

    Raises:
      BrokenImage: the file is not a PNG, JPEG or WebP, its header is damaged, or it has more than `max_pixels`.
    """
    image = _open(file, max_pixels)
    width, height = image.size
    return (width, height) if _orientation(image) in _TRANSPOSED_ORIENTATIONS else (height, width)


def decode(
    data: bytes, max_pixels: int, at_least: tuple[int, int] | None = None, expected: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes an image as a viewer shows it: upright (EXIF), first frame, transparency on white, no colour profiles.

    16-bit values are rounded to 8 bits; CMYK is converted by Pillow's simple formula.

    Args:
      data: the encoded image.
      max_pixels: largest number of pixels.
      at_least: height and width that suffice: a JPEG may be decoded at a size reduced by a power of two, but no side
        gets smaller than this. (The decoder omits the higher frequencies, which is sharper than averaging pixels.)
      expected: height and width that the image must have at full size.

    Returns:
      uint8 [H, W, 3].

    Raises:
      BrokenImage: as for `read_size`, or the data are damaged, or the size is not the expected one.
    """
    size, orientation, image = _upright_jpeg_size(data, max_pixels), 1, None
    if size is None:
        image = _open(io.BytesIO(data), max_pixels)
        orientation = _orientation(image)
        size = image.size if orientation in _TRANSPOSED_ORIENTATIONS else image.size[::-1]
    if expected is not None and size != tuple(expected):
        raise BrokenImage("changed since it was indexed")
    if image is None or image.format == "JPEG" and image.mode in ("RGB", "L"):
        return np.ascontiguousarray(_TO_UPRIGHT[orientation](_decode_jpeg(data, at_least, orientation)))
    try:
        image.load()
        rgb = _to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged data
        raise BrokenImage("damaged image") from error
    return np.ascontiguousarray(_TO_UPRIGHT[orientation](np.array(rgb)))


def _upright_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Returns the height and width of a colour or grey JPEG without EXIF; None for any other image, left to Pillow."""
    if not data.startswith(b"\xff\xd8\xff") or _has_exif(data):
        return None
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if colors not in ("YCbCr", "RGB", "Gray"):
        return None
    if height * width > max_pixels:
        raise BrokenImage("too many pixels")
    return height, width


def _has_exif(data: bytes) -> bool:
    """Returns True if a JPEG has an EXIF segment before its image data, or malformed segments."""
    position = 2
    while data[position : position + 1] == b"\xff":
        kind, length = data[position + 1 : position + 2], int.from_bytes(data[position + 2 : position + 4], "big")
        if kind == b"\xda":  # start of scan: the image data begin
            return False
        if kind == b"\xe1" and data[position + 4 : position + 10] == b"Exif\0\0":
            return True
        position += 2 + length
    return True


def _decode_jpeg(data: bytes, at_least: tuple[int, int] | None, orientation: int) -> np.ndarray:
    """Decodes a JPEG as it is stored (not turned upright), at reduced size if `at_least` allows."""
    scaling = {}
    if at_least:
        height, width = at_least[::-1] if orientation in _TRANSPOSED_ORIENTATIONS else at_least
        # Scaling factors under 2 are no faster than full size.
        scaling = {"min_height": height, "min_width": width, "min_factor": 2}
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **scaling)
    except ValueError as error:
        raise BrokenImage("damaged image") from error


def _open(file: BinaryIO, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BrokenImage("too many pixels") from error
    except (MemoryError, UserError):  # the file cannot be read; not the image's fault
        raise
    except Exception as error:  # as in `decode`
        raise BrokenImage("unreadable image") from error
    if image.width * image.height > max_pixels:
        raise BrokenImage("too many pixels")
    if not image.width * image.height:
        raise BrokenImage("unreadable image")
    return image


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 to 8, from what `Image.open` read.

    `getexif` would decode a whole PNG to look for EXIF data at its end.
    """
    encoded = image.info.get("exif")
    if not encoded:
        return 1
    exif = Image.Exif()
    try:
        exif.load(encoded)
        orientation = int(exif.get(_ORIENTATION_TAG, 1))
        return orientation if orientation in _TO_UPRIGHT else 1
    except Exception:  # damaged EXIF data do not make the image unusable: assume that it is upright
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey to 8 bits; Pillow would clip it at 255."""
    grey = np.asarray(image).astype(np.int64)
    scaled = (np.clip(grey, 0, 65535) + 128) // 257
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
