"""Decodes images (PNG, JPEG, WebP) to 8-bit RGB, and reads their size from the header alone.

The bytes are untrusted: no other format is tried, and the number of pixels, and whatever else makes decoding slow, is
checked before anything is decoded. Damage that the format's own library reports makes an image unusable: libjpeg-turbo
decodes all JPEGs, because Pillow ignores its warnings (it also takes two thirds of the time, and can halve an image
while decoding it), and the checksums of PNGs are verified here, because Pillow ignores those of the pixels.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import simplejpeg
from PIL import Image

from lidit_jax.data.formats.image_headers import (
    PNG_SIGNATURE,
    BrokenImage,
    ImageHeader,
    exceeds_scans,
    png_chunks,
    read_header,
)

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
# Encoders of progressive JPEGs write about ten scans; each takes as long as a pass over all pixels.
_MAX_SCANS = 32
# Longest side: of JPEGs, of what other formats allow too. Decoders take a time per row, and rows may be of one pixel.
_MAX_SIDE = 65_535
# Chunks that a PNG needs, in order; they and transparency (tRNS) determine its pixels. Texts, colour profiles and the
# further frames of an animation do not.
_NEEDED_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
_PNG_COLOR_TYPE, _INDEXED = 25, 3  # offset in the file, and its value for images with a palette


def read_size(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Returns the height and width of the image that `decode` would return, from the header alone.

    Raises:
      BrokenImage: the file is not a PNG, JPEG or WebP, its header is damaged, or it has more than `max_pixels`.
    """
    return _read_header(file, max_pixels).upright_size


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
    header = _read_header(io.BytesIO(data), max_pixels)
    if expected is not None and header.upright_size != tuple(expected):
        raise BrokenImage("changed since it was indexed")
    if header.format == "JPEG":
        image = _decode_jpeg(data, header, at_least)
    else:
        image = _decode_with_pillow(_pixels_of_png(data) if header.format == "PNG" else data, header)
    return np.ascontiguousarray(_TO_UPRIGHT[header.orientation](image))


def _read_header(file: BinaryIO, max_pixels: int) -> ImageHeader:
    header = read_header(file)
    if header.height * header.width > max_pixels:
        raise BrokenImage("too many pixels")
    if max(header.height, header.width) > _MAX_SIDE:
        raise BrokenImage("side over 65535 px")
    if not header.height * header.width:
        raise BrokenImage("unreadable image")
    return header


def _decode_jpeg(data: bytes, header: ImageHeader, at_least: tuple[int, int] | None) -> np.ndarray:
    """Decodes a JPEG as it is stored (not turned upright), at reduced size if `at_least` allows."""
    if exceeds_scans(data, _MAX_SCANS):
        raise BrokenImage("JPEG of too many scans")
    scaling = {}
    if at_least:
        height, width = at_least[::-1] if header.is_transposed else at_least
        # Scaling factors under 2 are no faster than full size.
        scaling = {"min_height": height, "min_width": width, "min_factor": 2}
    try:
        if header.num_channels < 4:
            return simplejpeg.decode_jpeg(data, "RGB", **scaling)
        ink = simplejpeg.decode_jpeg(data, "CMYK", **scaling)
    except ValueError as error:
        raise BrokenImage("damaged image") from error
    return np.asarray(Image.fromarray(255 - ink, "CMYK").convert("RGB"))  # stored inverted, as Adobe does


def _pixels_of_png(data: bytes) -> bytes:
    """Returns a PNG without the chunks that do not determine its pixels.

    Raises:
      BrokenImage: a checksum is wrong, the end or the palette is missing, or a chunk is out of order or unknown and not
        optional.
    """
    view, kept, needed, previous = memoryview(data), [PNG_SIGNATURE], -1, b""
    for kind, start, length in _whole_chunks(data):
        end = start + length + 4
        if zlib.crc32(view[start - 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise BrokenImage("damaged image")
        if kind[:1].isupper():
            if kind not in _NEEDED_CHUNKS[needed + 1 :] and not kind == previous == b"IDAT":
                raise BrokenImage("damaged image")
            if kind == b"IDAT" and data[_PNG_COLOR_TYPE] == _INDEXED and needed < _NEEDED_CHUNKS.index(b"PLTE"):
                raise BrokenImage("damaged image")  # as libpng does; Pillow would take the indices for grey
            needed = _NEEDED_CHUNKS.index(kind)
        if kind in _NEEDED_CHUNKS or kind == b"tRNS" and needed < _NEEDED_CHUNKS.index(b"IDAT"):
            kept.append(view[start - 8 : end])
        previous = kind
    return b"".join(kept)


def _whole_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    try:
        for kind, start, length in png_chunks(io.BytesIO(data)):
            if start + length + 4 > len(data):
                raise BrokenImage("damaged image")
            yield kind, start, length
    except struct.error as error:
        raise BrokenImage("damaged image") from error


def _decode_with_pillow(data: bytes, header: ImageHeader) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            if image.size != (header.width, header.height):
                raise BrokenImage("damaged image")
            image.load()
            return np.array(_to_rgb(image))
    except Image.DecompressionBombError as error:
        raise BrokenImage("too many pixels") from error
    except (MemoryError, BrokenImage):
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to IndexError on damaged data
        raise BrokenImage("damaged image") from error


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
