"""Damage that the owner of an image format reports is rejected, and hostile images cost little."""

import io
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_tar_source import SIDE_BY_SIDE, encode, png_chunk, smooth, with_chunk

from lidit_jax.data.formats import decoding
from lidit_jax.data.indexed.index import MAX_PIXELS


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damage_that_libjpeg_reports_is_rejected_in_every_color_space(mode, progressive):
    data = encode(Image.fromarray(smooth(200, 300)).convert(mode), "JPEG", progressive=progressive)
    assert decoding.decode(data, MAX_PIXELS).shape == (200, 300, 3)
    damaged = bytearray(data)
    damaged[-300:-240] = np.random.default_rng(0).bytes(60)
    for broken in (bytes(damaged), data[: len(data) * 2 // 3], data[:-2]):
        with pytest.raises(decoding.BrokenImage, match="damaged image"):
            decoding.decode(broken, MAX_PIXELS)


def test_every_flipped_bit_of_a_png_is_noticed():
    data = with_chunk(encode(SIDE_BY_SIDE), b"tEXt", b"note\0words")
    for position in range(8, len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(decoding.BrokenImage):
            decoding.decode(bytes(flipped), MAX_PIXELS)


@pytest.mark.parametrize("cut", [1, 12, 30])
def test_a_png_without_its_end_is_damaged(cut):
    with pytest.raises(decoding.BrokenImage, match="damaged image"):
        decoding.decode(encode(SIDE_BY_SIDE)[:-cut], MAX_PIXELS)


def test_an_indexed_png_without_its_palette_is_damaged():
    colors = Image.fromarray(np.array([[[200, 30, 30], [30, 60, 200]]], np.uint8)).convert("P", palette=Image.ADAPTIVE)
    png = encode(colors)
    start = png.index(b"PLTE") - 4
    end = start + 12 + int.from_bytes(png[start : start + 4], "big")
    assert abs(decoding.decode(png, 1000)[0, 0].astype(int) - [200, 30, 30]).max() < 3
    with pytest.raises(decoding.BrokenImage, match="damaged image"):
        decoding.decode(png[:start] + png[end:], 1000)


def test_png_chunks_out_of_order_are_damaged():
    png = encode(Image.fromarray(SIDE_BY_SIDE).quantize(4))
    late = [(b"IDAT", b""), (b"IHDR", png[16:29]), (b"PLTE", bytes(6)), (b"ABCD", b"")]
    for chunk in (png_chunk(*one) for one in late):
        with pytest.raises(decoding.BrokenImage, match="damaged image"):
            decoding.decode(png[:-12] + png_chunk(b"tEXt", b"a\0b") + chunk + png[-12:], MAX_PIXELS)


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP", b"tEXt", b"eXIf"])
def test_large_texts_and_profiles_in_a_png_cost_nothing(kind, place):
    compressed = zlib.compress(bytes(1 << 24))
    prefix = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}.get(kind)
    chunk = png_chunk(kind, prefix + compressed if prefix else b"a\0" + b"x" * (1 << 22))
    png = encode(SIDE_BY_SIDE)
    data = png[:33] + chunk + png[33:] if place == "before" else png[:-12] + chunk + png[-12:]
    tracemalloc.start()
    assert decoding.read_size(io.BytesIO(data), MAX_PIXELS) == (8, 12)
    assert tracemalloc.get_traced_memory()[1] < 1 << 18
    tracemalloc.stop()
    np.testing.assert_array_equal(decoding.decode(data, MAX_PIXELS), SIDE_BY_SIDE)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_an_animation_is_its_first_frame(format):
    frames = [Image.new("RGB", (12, 8), color) for color in ("red", "green", "blue")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert (decoding.decode(data, MAX_PIXELS) == (255, 0, 0)).all()


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(
    st.sampled_from(["<", ">"]),
    st.lists(st.tuples(st.sampled_from([0x010F, 0x0112]), *map(st.integers, [0, 0, 0], [13, 2, 9])), max_size=4),
)
@pytest.mark.filterwarnings("ignore:Metadata Warning")
def test_the_orientation_is_read_as_in_pillow(order, entries):
    exif = struct.pack(order + "2sHIH", b"II" if order == "<" else b"MM", 42, 8, len(entries))
    for tag, kind, count, value in entries:
        packed = struct.pack(order + "HH", value, 0) if kind == 3 else struct.pack(order + "I", value)
        exif += struct.pack(order + "HHI", tag, kind, count) + packed
    data = with_chunk(encode(SIDE_BY_SIDE), b"eXIf", exif + bytes(4))
    theirs = Image.Exif()
    theirs.load(b"Exif\0\0" + exif + bytes(4))
    value = theirs.get(0x0112, 1)
    if not [one for one in entries if one[0] == 0x0112 and one[1:3] not in ((3, 1), (4, 1))]:
        transposed = value in (5, 6, 7, 8)
        assert decoding.read_size(io.BytesIO(data), MAX_PIXELS) == ((12, 8) if transposed else (8, 12))


# --- images that would take long --------------------------------------------------------------------------------


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    body = b"".join(kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def animated_webp(side: int, frames: int) -> bytes:
    size = struct.pack("<I", side - 1)[:3]
    image = encode(Image.new("RGB", (2, 2)), "WEBP", lossless=True)[12:]
    frame = bytes(6) + b"\1\0\0" * 2 + bytes(4) + image
    header = (b"VP8X", b"\2\0\0\0" + size + size)
    return webp(header, (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * frames)


def exif_bomb() -> bytes:
    """Returns EXIF data with thousands of entries, each of which refers to all of the data."""
    count = 5000
    entries = b"".join(struct.pack(">HHII", 0x8000 + i, 7, 60_000, 8) for i in range(count))
    return struct.pack(">2sHIH", b"MM", 42, 8, count) + entries + bytes(65_000 - 10 - len(entries))


def with_extra_scans(jpeg: bytes, count: int) -> bytes:
    tables = jpeg.rfind(b"\xff\xc4", 0, jpeg.rfind(b"\xff\xda"))
    return jpeg[:-2] + jpeg[tables:-2] * count + jpeg[-2:]


PNG, JPEG = encode(SIDE_BY_SIDE), encode(SIDE_BY_SIDE, "JPEG")
MANY = 200_000


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (PNG[:33] + png_chunk(b"tEXt", b"") * MANY + PNG[33:], "too many parts"),
        (PNG[:-12] + png_chunk(b"IDAT", b"") * MANY + PNG[-12:], "too many parts"),
        (PNG[:-12] + png_chunk(b"tEXt", b"") * MANY + PNG[-12:], "too many parts"),
        (JPEG[:2] + b"\xff\xfe\0\2" * MANY + JPEG[2:], "too many parts"),
        (JPEG[:2] + b"\xff" * MANY + JPEG[2:], "too many parts"),
        (JPEG[:2] + b"\xff\xd0" * MANY + JPEG[2:], "too many parts"),
        (animated_webp(4, 20_000), "too many parts"),
        (animated_webp(16_383, 1), "too many pixels"),
        (with_extra_scans(encode(smooth(1024, 1024), "JPEG", progressive=True), 100), "too many scans"),
    ],
    ids=[
        "png texts",
        "png data",
        "png end",
        "jpeg segments",
        "jpeg fill",
        "jpeg restarts",
        "frames",
        "canvas",
        "scans",
    ],
)
def test_images_that_would_take_long_are_rejected(data, reason):
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(decoding.BrokenImage, match=reason):
        decoding.decode(data, MAX_PIXELS)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert time.process_time() - started < 1


def test_bombs_in_exif_data_are_not_unpacked():
    exif = exif_bomb()
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 8) + b"Exif\0\0" + exif
    for data in (with_chunk(PNG, b"eXIf", exif), JPEG[:2] + segment + JPEG[2:]):
        tracemalloc.start()
        assert decoding.read_size(io.BytesIO(data), MAX_PIXELS) == (8, 12)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_scans_are_counted_in_the_image_alone():
    """A phone's photo may have a video after it, in which any bytes occur."""
    data = encode(smooth(64, 64), "JPEG", progressive=True)
    np.testing.assert_array_equal(
        decoding.decode(data + b"\xff\xda" * 100, MAX_PIXELS), decoding.decode(data, MAX_PIXELS)
    )
    comment = b"\xff\xfe" + struct.pack(">H", 402) + b"\xff\xda" * 200
    assert decoding.decode(data[:2] + comment + data[2:], MAX_PIXELS).shape == (64, 64, 3)
