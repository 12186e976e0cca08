"""Reads the size and the orientation of a PNG, JPEG or WebP from its header, at a bounded cost.

The bytes are untrusted. Pillow's parsers decompress texts and colour profiles, keep every segment and every EXIF entry,
and allocate a canvas of the size that a WebP claims. Here nothing is decompressed or kept, and a header with too many
parts is rejected.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

import numpy as np

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Parts (chunks, segments) that a file may have, whatever its length, and bytes for each one above: walking through a
# million empty chunks would take as long as decoding hundreds of images. PNGs of many short chunks have 8 KiB in each.
_MAX_PARTS, _BYTES_PER_PART = 1024, 256
_MAX_EXIF_BYTES = 1 << 16  # the length of a JPEG's segment; the orientation is near the start
_ORIENTATION_TAG = 0x0112
_TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)
_START_OF_FRAME = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xDA, 0xD9, 0xE1
_COMPARED_BYTES = 1 << 16  # at once: they stay in the processor's cache
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))  # JPEG markers that are not followed by a segment


class BrokenImage(Exception):
    """An image that cannot be used; the message gives the reason in a few words."""


class ImageHeader(NamedTuple):
    """Facts that the header of an image states.

    Attributes:
      format: format of the file.
      height: height in pixels as stored, before the image is turned upright.
      width: width in pixels as stored.
      orientation: EXIF orientation, 1 to 8.
      num_channels: number of channels of a JPEG.
    """

    format: Literal["PNG", "JPEG", "WEBP"]
    height: int
    width: int
    orientation: int = 1
    num_channels: int = 3

    @property
    def is_transposed(self) -> bool:
        """True if turning the image upright exchanges its height and width."""
        return self.orientation in _TRANSPOSED_ORIENTATIONS

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width of the image when it is upright."""
        return (self.width, self.height) if self.is_transposed else (self.height, self.width)


def read_header(file: BinaryIO) -> ImageHeader:
    """Reads the header of an image; the format is detected from the content, not from the file's name.

    Raises:
      BrokenImage: the file is not a PNG, JPEG or WebP, or its header is damaged or has too many parts.
    """
    start = file.read(12)
    try:
        if start.startswith(PNG_SIGNATURE):
            return _read_png(file)
        if start.startswith(b"\xff\xd8\xff"):
            return _read_jpeg(file)
        if start.startswith(b"RIFF") and start.endswith(b"WEBP"):
            return _read_webp(file)
    except struct.error as error:  # the file ends within its header
        raise BrokenImage("unreadable image") from error
    raise BrokenImage("unreadable image")


def png_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yields the (kind, start of the data, length of the data) of every chunk, up to the end of the PNG.

    Raises:
      BrokenImage: the PNG ends too early or has too many chunks.
      struct.error: the file ends within the header of a chunk.
    """
    position, kind, count = len(PNG_SIGNATURE), b"", 0
    while kind != b"IEND":
        file.seek(position)
        length, kind = struct.unpack(">I4s", file.read(8))
        yield kind, position + 8, length
        position += 12 + length
        count += 1
        _check_parts(count, position)


def _check_parts(count: int, num_bytes: int) -> None:
    if count > _MAX_PARTS + num_bytes // _BYTES_PER_PART:
        raise BrokenImage("image file of too many parts")


def _read_png(file: BinaryIO) -> ImageHeader:
    size, orientation = None, 1
    for kind, start, length in png_chunks(file):
        if size is None:
            if kind != b"IHDR" or length != 13:
                break
            data = file.read(17)
            width, height, checksum = struct.unpack(">II5xI", data)
            if zlib.crc32(b"IHDR" + data[:13]) != checksum:
                break
            size = height, width
        elif kind == b"eXIf":
            file.seek(start)
            orientation = _orientation(file.read(min(length, _MAX_EXIF_BYTES)))
        elif kind == b"IDAT":
            return ImageHeader("PNG", *size, orientation)
    raise BrokenImage("unreadable image")


def _read_jpeg(file: BinaryIO) -> ImageHeader:
    frame, orientation = None, None
    for marker, start, length in _jpeg_segments(file):
        if marker == _START_OF_SCAN:
            break
        file.seek(start)
        if marker in _START_OF_FRAME:
            frame = struct.unpack(">BHHB", file.read(6))
        elif marker == _APP1 and orientation is None and file.read(6) == b"Exif\0\0":
            orientation = _orientation(file.read(length - 6))
    if frame is None or frame[0] != 8 or frame[3] not in (1, 3, 4):
        raise BrokenImage("unreadable image")
    return ImageHeader("JPEG", frame[1], frame[2], orientation or 1, frame[3])


def _jpeg_segments(file: BinaryIO) -> Iterator[tuple[int, int, int]]:
    """Yields the (marker, start of the data, length of the data) of the segments up to the first scan's."""
    position, marker, count = 2, 0, 0
    while marker != _START_OF_SCAN:
        file.seek(position)
        count += 1
        _check_parts(count, position)
        prefix, marker, length = struct.unpack(">BBH", file.read(4))
        if prefix != 0xFF or marker == _END_OF_IMAGE:
            raise BrokenImage("unreadable image")
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker in _WITHOUT_LENGTH:
            position += 2
        else:
            if length < 2:
                raise BrokenImage("unreadable image")
            yield marker, position + 4, length - 2
            position += 2 + length


def exceeds_scans(data: bytes, limit: int) -> bool:
    """Returns True if a JPEG has more than `limit` scans; each costs as much as a pass over all pixels."""
    if _count_scan_markers(data) <= limit:
        return False  # the usual case; more of these bytes may also be in metadata, or in a video after the image
    position, scans, size = 2, 0, len(data)
    while scans <= limit and position + 4 <= size:
        marker = data[position + 1]
        if marker == _END_OF_IMAGE:
            return False
        if marker in _WITHOUT_LENGTH or marker in (0x00, 0xFF):
            position += 1 if marker == 0xFF else 2
        else:
            scans += marker == _START_OF_SCAN
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        position = data.find(b"\xff", position)
        if position < 0:
            return False
    return scans > limit


def _count_scan_markers(data: bytes) -> int:
    """Returns how often the bytes FF DA occur; several times faster than `data.count`, in constant memory."""
    markers, count = np.frombuffer(data, np.uint8), 0
    for first in range(0, len(data), _COMPARED_BYTES):
        block = markers[first : first + _COMPARED_BYTES + 1]
        count += int(np.count_nonzero((block[:-1] == 0xFF) & (block[1:] == _START_OF_SCAN)))
    return count


def _read_webp(file: BinaryIO) -> ImageHeader:
    file.seek(12)
    kind, _, data = struct.unpack("<4sI10s", file.read(18))
    if kind == b"VP8 " and data[3:6] == b"\x9d\x01\x2a":
        width, height = struct.unpack("<HH", data[6:10])
        return ImageHeader("WEBP", height & 0x3FFF, width & 0x3FFF)
    if kind == b"VP8L" and data[0] == 0x2F:
        bits = int.from_bytes(data[1:5], "little")
        return ImageHeader("WEBP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind != b"VP8X":
        raise BrokenImage("unreadable image")
    width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (4, 7))
    has_exif, orientation = data[0] & 0x08, 1
    for kind, start, length in _webp_chunks(file):
        if kind == b"EXIF" and has_exif:
            file.seek(start)
            orientation = _orientation(file.read(min(length, _MAX_EXIF_BYTES)).removeprefix(b"Exif\0\0"))
            break
    return ImageHeader("WEBP", height, width, orientation)


def _webp_chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yields the (kind, start of the data, length of the data) of every chunk, such as the frames of an animation."""
    size, position, count = file.seek(0, io.SEEK_END), 12, 0
    while position + 8 <= size:
        file.seek(position)
        kind, length = struct.unpack("<4sI", file.read(8))
        yield kind, position + 8, length
        position += 8 + length + length % 2
        count += 1
        _check_parts(count, position)


def _orientation(exif: bytes) -> int:
    """Returns the orientation in EXIF data (a TIFF header and its first directory); 1 if there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        [directory] = struct.unpack_from(order + "I", exif, 4)
        [count] = struct.unpack_from(order + "H", exif, directory)
        for position in range(directory + 2, directory + 2 + 12 * count, 12):
            tag, kind, number = struct.unpack_from(order + "HHI", exif, position)
            if tag == _ORIENTATION_TAG and (kind, number) in ((3, 1), (4, 1)):  # SHORT or LONG
                [value] = struct.unpack_from(order + ("H" if kind == 3 else "I"), exif, position + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1
