import bz2
import collections
import datetime
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lidit_jax.data.buckets import Bucket, resize_to_cover_and_crop
from lidit_jax.data.filters import no_caption
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.indexed.index import MAX_PIXELS, IndexOptions
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.data.sources import BrokenExample
from lidit_jax.data.streamed.sample_stream import ReadStatistics, SampleReader, SampleStream
from lidit_jax.errors import UserError

SHARED = pathlib.Path(os.environ.get("LIDIT_SHARED", pathlib.Path(__file__).parents[2] / "shared"))
EMOJI = SHARED / "data" / "fxemoji"
needs_emoji = pytest.mark.skipif(not EMOJI.is_dir(), reason=f"no {EMOJI}: set LIDIT_SHARED to the shared folder")

SIDE_BY_SIDE = np.array([[[200, 30, 30], [30, 60, 200]]], np.uint8).repeat(8, axis=0).repeat(6, axis=1)  # [8, 12, 3]


def tar_source(path, max_pixels: int = MAX_PIXELS) -> IndexedSource:
    shards = TarShards(path)
    return IndexedSource(shards, [no_caption], IndexOptions(max_pixels=max_pixels))


def find_shards(path) -> tuple[str, ...]:
    return TarShards(path).paths


def encode(image: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_tar(path: pathlib.Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> pathlib.Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_one(tmp_path, data: bytes, extension: str = "png") -> np.ndarray:
    source = tar_source(write_tar(tmp_path / "one.tar", {f"a.{extension}": data, "a.txt": b"a picture"}))
    image = source[0]["image"]
    assert image.dtype == np.uint8
    assert image.shape == (*source.sizes()[0], 3)
    return image


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """Returns the PNG with one more chunk right after its header."""
    return png[:33] + png_chunk(kind, body) + png[33:]


# --- layout -----------------------------------------------------------------------------------------------------


def test_captions_come_from_txt_and_json_but_not_from_bookkeeping(tmp_path):
    note = {"caption": "from json", "url": "http://x/y.png", "status": "success", "score": 5.5, "empty": " "}
    files = {
        "0.png": encode(SIDE_BY_SIDE),
        "0.txt": "\ufeffrotes Quadrat 红\n".encode(),
        "0.json": json.dumps(note).encode(),
    }
    example = tar_source(write_tar(tmp_path / "a.tar", files))[0]
    assert example["key"] == "0"
    assert example["captions"] == {"txt": "rotes Quadrat 红", "caption": "from json"}
    assert example["metadata"] == note
    np.testing.assert_array_equal(example["image"], SIDE_BY_SIDE)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_format_is_read_with_long_and_non_ascii_names(tmp_path, format):
    keys = ["0001", "folder/" * 12 + "image", "字/形"]
    keys += [] if format == tarfile.USTAR_FORMAT else ["x" * 180]
    pairs = [{f"{key}.png": encode(SIDE_BY_SIDE), f"{key}.txt": key.encode()} for key in keys]
    source = tar_source(write_tar(tmp_path / "a.tar", {k: v for pair in pairs for k, v in pair.items()}, format))
    assert [source[i]["key"] for i in range(len(source))] == keys
    assert [source[i]["captions"]["txt"] for i in range(len(source))] == keys


def test_links_folders_and_other_files_are_not_samples(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("0.png", tarfile.SYMTYPE), ("1.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        for name, data in {
            "._2.png": b"x",
            "2.pickle": b"x",
            "2.jpeg": encode(SIDE_BY_SIDE, "JPEG"),
            "2.txt": b"b",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    source = tar_source(tmp_path / "a.tar")
    assert [one["key"] for one in source.describe(range(len(source)))] == ["2"]


def test_a_path_is_a_folder_a_file_a_glob_or_a_brace_range(tmp_path):
    for number in range(4):
        write_tar(tmp_path / f"{number:05}.tar", {f"{number}.png": encode(SIDE_BY_SIDE), f"{number}.txt": b"x"})
    every = tuple(str(tmp_path / f"{number:05}.tar") for number in range(4))
    assert find_shards(tmp_path) == every
    assert find_shards(every[2]) == every[2:3]
    assert find_shards(f"{tmp_path}/0000[12].tar") == every[1:3]
    assert find_shards(f"{tmp_path}/{{00000..00003}}.tar") == every
    assert find_shards(f"{tmp_path}/{{00001,00003}}.tar") == every[1::2]
    assert len(tar_source(f"{tmp_path}/{{00001..00002}}.tar")) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nowhere", "does not exist"),
        ("empty", "holds no .tar"),
        ("*.tar", "no file matches"),
        ("{0..2}.tar", "3 of the 3 files"),
        ("{0..99999999999}.tar", "more than"),
    ],
)
def test_a_path_without_tars_raises_a_one_line_error(tmp_path, name, says):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=says) as error:
        tar_source(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_folder_whose_files_are_one_level_down_says_where(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards/0.tar", {"0.png": encode(SIDE_BY_SIDE)})
    with pytest.raises(UserError, match=r"holds no \.tar file, but '[^ ]*/shards' does: name that with data.path"):
        tar_source(tmp_path)


def test_a_tar_without_captions_says_what_was_found(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {f"{i}.png": encode(SIDE_BY_SIDE) for i in range(3)})
    message = r"none of the 3 samples.*has a caption \(no caption: 3; there are texts \(none\)"
    with pytest.raises(UserError, match=message):
        tar_source(tar)


@pytest.mark.parametrize(
    ("compress", "found"),
    [
        (lambda data: b"?" + data, "not a tar"),
        (lambda data: b"PK\3\4" + data, r"not a tar but a zip archive \(unpack it first\)"),
        (gzip.compress, r"not a tar but compressed with gzip \(unpack it first\)"),
        (bz2.compress, r"not a tar but compressed with bzip2 \(unpack it first\)"),
        (lzma.compress, r"not a tar but compressed with xz \(unpack it first\)"),
    ],
    ids=["noise", "zip", "gzip", "bzip2", "xz"],
)
def test_a_file_that_is_not_a_tar_is_reported_as_such(tmp_path, compress, found):
    (tmp_path / "a.tar").write_bytes(compress(os.urandom(3000)))
    with pytest.raises(UserError, match=f"{found}: 1"):
        tar_source(tmp_path / "a.tar")


def test_the_fingerprint_follows_the_content_and_not_the_place(tmp_path):
    first = {"0.png": encode(SIDE_BY_SIDE), "0.txt": b"one"}
    prints = []
    for folder, files in (("a", first), ("b", first), ("c", first | {"0.txt": b"two"}), ("d", first | {"1.txt": b"x"})):
        (tmp_path / folder).mkdir()
        prints.append(tar_source(write_tar(tmp_path / folder / "0.tar", files)).fingerprint)
    assert prints[0] == prints[1]
    assert prints[2] != prints[0]
    assert prints[3] == prints[0]


# --- names and kinds of members ---------------------------------------------------------------------------------


def write_members(path: pathlib.Path, names: Sequence[str]) -> pathlib.Path:
    """Writes a tar of images and texts, which may repeat names; each text is the name of its file."""
    png = encode(SIDE_BY_SIDE)
    with tarfile.open(path, "w") as tar:
        for name in names:
            data = png if name.lower().endswith(".png") else b"{}" if name.endswith(".json") else name.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read_captions(path: pathlib.Path) -> tuple[dict[str, str], collections.Counter, collections.Counter]:
    """Returns {key: caption} of the usable samples, and the numbers of broken and dropped ones."""
    source = tar_source(path)
    examples = [source[i] for i in range(len(source))]
    return {one["key"]: one["captions"]["txt"] for one in examples}, source.broken, source.dropped


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_are_not_utf_8_stay_distinct(tmp_path, format):
    names = [b"caf\xe8.png", b"caf\xe8.json", b"caf\xe9.png", b"caf\xe9.txt"]
    with tarfile.open(tmp_path / "a.tar", "w", format=format, encoding="latin-1") as tar:
        for name in names:
            data = encode(SIDE_BY_SIDE) if name.endswith(b"png") else b"{}"
            info = tarfile.TarInfo(name.decode("latin-1"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    captions, broken, dropped = read_captions(tmp_path / "a.tar")
    assert captions == {"café" if format == tarfile.PAX_FORMAT else "caf\\xe9": "{}"}
    assert (broken, dropped) == ({}, {"no caption": 1})


@pytest.mark.parametrize(
    ("names", "captions", "broken", "dropped"),
    [
        (["a.0.png", "a.0.txt", "a.1.png", "a.1.txt"], {"a.0": "a.0.txt", "a.1": "a.1.txt"}, {}, 0),
        (["a.b.png", "a.b.txt"], {"a.b": "a.b.txt"}, {}, 0),
        (["a.image.png", "a.txt"], {"a": "a.txt"}, {}, 0),
        (["a.txt", "a.image.png", "a.url.txt"], {"a": "a.txt"}, {}, 0),
        (["a.png", "a.mask.png", "a.txt"], {"a": "a.txt"}, {}, 0),
        (["a.1.png", "a.1.txt", "a.png", "a.txt"], {"a.1": "a.1.txt", "a": "a.txt"}, {}, 0),
        (["a.l.png", "a.r.png", "a.txt", "b.png", "b.txt"], {"b": "b.txt"}, {"several images with one key": 1}, 0),
        (["a.0.png", "a.1.png", "a.0.txt", "b.png", "b.txt"], {"b": "b.txt"}, {"sample split by another key": 1}, 1),
        (["a.txt", "a.0.png", "a.0.txt"], {"a.0": "a.0.txt"}, {"no image": 1}, 0),
        (["a.json", "a.0.png", "a.0.txt"], {"a": "a.0.txt"}, {}, 0),
        (["v1.5_a.png", "v1.5_b.txt", "b.png", "b.txt"], {"b": "b.txt"}, {"no image": 1}, 1),
        (["a.PNG", "a.TXT"], {"a": "a.TXT"}, {}, 0),
        (["a.avif", "a.caption", "b.gif", "b.txt", "c.png", "c.txt"], {"c": "c.txt"}, {"no image": 2}, 0),
        (["a.png", "a.npy", "a.txt", "LICENSE", "._a.png", "__MACOSX/a.txt", ".x/b.png"], {"a": "a.txt"}, {}, 0),
        (["./a.png", "./a.txt"], {"./a": "./a.txt"}, {}, 0),
    ],
)
def test_names_with_several_dots_are_read_or_counted(tmp_path, names, captions, broken, dropped):
    found = read_captions(write_members(tmp_path / "a.tar", names))
    assert found == (captions, broken, {"no caption": dropped} if dropped else {})
    assert_read_from_end_to_end(tmp_path / "a.tar", tar_source(tmp_path / "a.tar"))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    st.lists(
        st.tuples(*map(st.sampled_from, ["ab", ["", ".0", ".1"], ["png", "txt", "json", "npy"]])),
        min_size=1,
        max_size=9,
    )
)
def test_no_image_is_lost_uncounted_or_gets_the_caption_of_another(tmp_path_factory, parts):
    names = ["".join([key, middle, ".", extension]) for key, middle, extension in parts]
    members = [tar_member(name, data=b"{}" if name.endswith("json") else name.encode()) for name in names]
    path = tmp_path_factory.getbasetemp() / "names.tar"
    path.write_bytes(b"".join(members) + bytes(1024))
    shards, samples, reasons = TarShards(path), [], []
    for found in shards.scan(0):
        if isinstance(found, str):
            reasons.append(found)
            continue
        place, sample = found
        samples.append(sample.key)
        image, captions = sample.image.read(), sample.captions
        stem = image.decode().removesuffix(".png")
        assert captions in ({}, {"txt": stem + ".txt"}, {"txt": stem.partition(".")[0] + ".txt"})
        [again] = shards.read([(0, *place)])
        assert (again[:3], again.image.read()) == (sample[:3], image)
    assert len(samples) == len(set(samples))
    assert reasons or {key.partition(".")[0] for key in samples} == {key for key, _, _ in parts}


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", sparse_map: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[482] = bool(sparse_map)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + sparse_map + data + bytes(-len(data) % 512)


def pax_records(records: dict[str, str]) -> bytes:
    lines = []
    for keyword, value in records.items():
        line = f" {keyword}={value}\n".encode()
        length = next(n for n in range(len(line), len(line) + 9) if n == len(line) + len(str(n)))
        lines.append(str(length).encode() + line)
    return b"".join(lines)


def test_links_and_sparse_files_are_counted_and_what_follows_is_read(tmp_path):
    png, sparse_map = encode(SIDE_BY_SIDE), bytes(504) + b"\1" + bytes(7) + bytes(512)
    images = [
        tar_member("0.png", data=png),
        tar_member("1.png", tarfile.LNKTYPE),
        tar_member("2.png", tarfile.SYMTYPE),
        tar_member("3.png", b"S", png, sparse_map),
        tar_member("pax", b"x", pax_records({"GNU.sparse.major": "1", "GNU.sparse.name": "4.png", "path": "x/y.png"}))
        + tar_member("y.png", data=png),
        tar_member("5.png", b"W", png),
        tar_member("6.png", data=png),
    ]
    members = [image + tar_member(f"{number}.txt", data=b"words") for number, image in enumerate(images)]
    (tmp_path / "a.tar").write_bytes(b"".join(members) + bytes(1024))
    captions, broken, _ = read_captions(tmp_path / "a.tar")
    assert captions == {"0": "words", "6": "words"}
    assert broken == {
        "link instead of a file": 2,
        "sparse file in the tar": 2,
        "unknown kind of file in the tar": 1,
    }


def test_archives_that_are_appended_are_read(tmp_path):
    parts = [write_members(tmp_path / "part", [f"{key}.png", f"{key}.txt"]).read_bytes() for key in "abc"]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    expected = {key: f"{key}.txt" for key in "abc"}
    assert read_captions(tmp_path / "a.tar") == (expected, {}, {})
    assert_read_from_end_to_end(tmp_path / "a.tar", tar_source(tmp_path / "a.tar"))
    (tmp_path / "b.tar").write_bytes(b"".join(parts) + os.urandom(600))
    assert read_captions(tmp_path / "b.tar") == (expected, {"unknown data after the tar": 1}, {})


def test_a_tar_of_zeros_ends(tmp_path):
    start = write_members(tmp_path / "part", ["a.png", "a.txt"]).read_bytes()
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(start)
        file.truncate(1 << 40)
    assert read_captions(tmp_path / "a.tar") == ({"a": "a.txt"}, {"tar with over 16 MiB of zeros": 1}, {})


@pytest.mark.parametrize(
    "extensions",
    [
        tar_member("x", b"x", b"5 a=\n" * 200_000),
        tar_member("x", b"x", b"12 path=a.b\n") * 2_000,
        tar_member("x", b"L", b"a.png\0") * 2_000,
        tar_member("x", b"L", b"a" * 5000 + b".png"),
        tar_member("x", b"g", b"5 a=\n") * 2_000,
        tar_member("x", b"S", b"", sparse_map=(bytes(504) + b"\1" + bytes(7)) * 40_000),
    ],
    ids=["records", "pax headers", "long names", "long name", "global headers", "sparse maps"],
)
def test_headers_that_would_take_long_are_damage(tmp_path, extensions):
    first = tar_member("0.png", data=encode(SIDE_BY_SIDE)) + tar_member("0.txt", data=b"words")
    (tmp_path / "a.tar").write_bytes(first + extensions + first + bytes(1024))
    started = time.process_time()
    assert read_captions(tmp_path / "a.tar") == ({"0": "words"}, {"damaged tar": 1}, {})
    assert time.process_time() - started < 1


@pytest.mark.parametrize("name", ["a.{}.npy", "a.{}.txt", "._{}"])
def test_a_sample_of_too_many_files_is_counted(tmp_path, name):
    fillers = b"".join(tar_member(name.format(number)) for number in range(300))
    image, text = tar_member("a.png", data=encode(SIDE_BY_SIDE)), tar_member("a.txt", data=b"words")
    other = tar_member("b.png", data=encode(SIDE_BY_SIDE)) + tar_member("b.txt", data=b"words")
    (tmp_path / "a.tar").write_bytes(image + fillers + text + other)
    assert read_captions(tmp_path / "a.tar") == ({"b": "words"}, {"sample of over 256 files": 1}, {})


def test_hundreds_of_samples_may_share_the_first_part_of_their_key(tmp_path):
    """As in a shard of v1.5_00001.png, v1.5_00001.txt and so on."""
    image = encode(SIDE_BY_SIDE)
    members = [tar_member(f"v1.5_{i}.png", data=image) + tar_member(f"v1.5_{i}.txt", data=b"words") for i in range(500)]
    (tmp_path / "a.tar").write_bytes(b"".join(members))
    source = tar_source(tmp_path / "a.tar")
    assert (len(source), source[400]["key"], source.broken) == (500, "v1.5_400", {})


# --- kinds of images --------------------------------------------------------------------------------------------


def test_grey_one_bit_and_palette_images_become_rgb(tmp_path):
    colors = Image.fromarray(SIDE_BY_SIDE)
    for mode in ("L", "1", "P"):
        image = colors.quantize(4) if mode == "P" else colors.convert(mode)
        np.testing.assert_array_equal(read_one(tmp_path, encode(image)), np.array(image.convert("RGB")))


def test_cmyk_jpegs_keep_their_colors(tmp_path):
    image = read_one(tmp_path, encode(Image.fromarray(SIDE_BY_SIDE).convert("CMYK"), "JPEG", quality=95), "jpg")
    np.testing.assert_allclose(image[:, [1, 10]], SIDE_BY_SIDE[:, [1, 10]], atol=12)


def test_transparency_is_shown_on_white_for_every_encoding_of_it(tmp_path):
    alpha = np.zeros((8, 12, 1), np.uint8)
    alpha[:, 6:] = 255
    rgba = Image.fromarray(np.concatenate([SIDE_BY_SIDE, alpha], axis=2), "RGBA")
    palette = Image.fromarray((alpha[..., 0] // 255), "P")
    palette.putpalette([9, 9, 9, 30, 60, 200])
    ways = {
        "RGBA": encode(rgba),
        "WebP": encode(rgba, "WEBP", lossless=True),
        "palette": encode(palette, transparency=0),
        "RGB with a transparent color": encode(SIDE_BY_SIDE, transparency=(200, 30, 30)),
    }
    for way, data in ways.items():
        image = read_one(tmp_path, data, "webp" if way == "WebP" else "png")
        assert (image[:, :6] == 255).all(), way
        assert (image[:, 6:] == SIDE_BY_SIDE[:, 6:]).all(), way


def test_half_transparent_grey_is_mixed_with_white(tmp_path):
    image = read_one(tmp_path, encode(Image.merge("LA", [Image.new("L", (5, 4), 100), Image.new("L", (5, 4), 128)])))
    np.testing.assert_allclose(image, 255 + (100 - 255) * 128 / 255, atol=1)


def test_transparent_one_bit_and_grey_colors_are_white(tmp_path):
    for mode, color in (("1", 0), ("L", 70)):
        assert (read_one(tmp_path, encode(Image.new(mode, (4, 4), color), transparency=color)) == 255).all(), mode


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    image = read_one(tmp_path, encode(Image.fromarray(grey)))
    np.testing.assert_array_equal(image[..., 1], np.round(grey / 257))
    transparent = with_chunk(encode(Image.fromarray(grey)), b"tRNS", b"\0\0")
    assert (read_one(tmp_path, transparent)[0, 0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_images_are_turned_upright_and_their_size_known_without_decoding(tmp_path, orientation, format):
    # Transform that a camera applies to an upright [H, W] image before storing it, for each EXIF orientation.
    upright = SIDE_BY_SIDE.copy()
    upright[:4, :6] = (30, 160, 60)
    store = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: np.rot90(x),
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 95} if format == "JPEG" else {}
    data = encode(np.ascontiguousarray(store(upright)), format, exif=exif.tobytes(), **options)
    image = read_one(tmp_path, data, format.lower())
    assert image.shape == upright.shape
    corners = np.ix_([1, 6], [1, 10])
    np.testing.assert_allclose(image[corners].astype(int), upright[corners], atol=40 if format == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_leaves_the_image_as_it_is(tmp_path):
    data = with_chunk(encode(SIDE_BY_SIDE), b"eXIf", b"MM\0*\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(read_one(tmp_path, data), SIDE_BY_SIDE)


def test_formats_are_detected_by_content_and_others_rejected(tmp_path):
    files = {
        "0.png": encode(SIDE_BY_SIDE, "GIF"),
        "1.png": encode(SIDE_BY_SIDE, "JPEG"),
        "2.jpg": encode(SIDE_BY_SIDE, "TIFF"),
    }
    files |= {f"{i}.txt": b"x" for i in range(3)}
    files = dict(sorted(files.items()))
    source = tar_source(write_tar(tmp_path / "a.tar", files))
    assert [source[i]["key"] for i in range(len(source))] == ["1"]
    assert source.broken == {"unreadable image": 2}


def smooth(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 31) * 90 + y / height * 60, np.cos((x + y) / 40) * 100, np.sin(y / 23) * 80]
    return (np.stack(waves, axis=2) + 110).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
@pytest.mark.parametrize(("size", "decoded"), [((256, 400), (64, 100)), ((250, 130), (125, 65)), ((70, 70), (70, 70))])
def test_a_large_jpeg_is_decoded_at_a_reduced_size_that_still_suffices(orientation, size, decoded):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = smooth(*(size if orientation < 5 else size[::-1]))
    options = {} if orientation == 1 else {"exif": exif.tobytes()}
    data = encode(stored, "JPEG", quality=97, **options)
    whole = decoding.decode(data, MAX_PIXELS, expected=size)
    assert whole.shape == (*size, 3)
    small = decoding.decode(data, MAX_PIXELS, at_least=(64, 64))
    assert small.shape == (*decoded, 3)
    bucket = Bucket(64, 64)
    ours, theirs = (resize_to_cover_and_crop(image, bucket).astype(float) for image in (small, whole))
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 3
    with pytest.raises(decoding.BrokenImage, match="changed since"):
        decoding.decode(data, MAX_PIXELS, expected=(size[0], size[1] + 1))


def test_damage_inside_a_jpeg_is_rejected_even_if_it_can_be_decoded():
    data = bytearray(encode(smooth(200, 300), "JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 60] = np.random.default_rng(0).bytes(60)
    Image.open(io.BytesIO(bytes(data))).load()  # Pillow reports no damage
    with pytest.raises(decoding.BrokenImage, match="damaged image"):
        decoding.decode(bytes(data), MAX_PIXELS)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_decode_as_in_pillow_up_to_rounding(mode):
    data = encode(Image.fromarray(smooth(90, 70)).convert(mode), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decoding.decode(data, MAX_PIXELS).astype(int) - expected).max() <= 1
    with pytest.raises(decoding.BrokenImage, match="too many pixels"):
        decoding.decode(data, 90 * 70 - 1)


# --- hostile input ----------------------------------------------------------------------------------------------


def test_an_image_of_a_single_column_costs_nothing():
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1 << 16, 8, 2, 0, 0, 0))
    with pytest.raises(decoding.BrokenImage, match="side over 65535 px"):
        decoding.read_size(io.BytesIO(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")), 1 << 26)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_decompression_bombs_are_rejected_by_their_header(tmp_path, side):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(bytes(1_000_000)))
    files = {"0.png": bomb, "0.txt": b"bomb", "1.png": encode(SIDE_BY_SIDE), "1.txt": b"fine"}
    source = tar_source(write_tar(tmp_path / "a.tar", files))
    assert (len(source), source.broken) == (1, {"too many pixels": 1})


def test_the_caller_sets_the_pixel_limit(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"0.png": encode(SIDE_BY_SIDE), "0.txt": b"x"})
    assert len(tar_source(tar, max_pixels=96)) == 1
    with pytest.raises(UserError, match="too many pixels: 1"):
        tar_source(tar, max_pixels=95)


def test_unusable_samples_are_left_out_and_counted_by_reason(tmp_path):
    png = encode(SIDE_BY_SIDE)
    files = {
        "empty.png": b"",
        "empty.txt": b"x",
        "blank.png": png,
        "blank.txt": b" \n",
        "alone.txt": b"x",
        "latin.png": png,
        "latin.txt": "Käse".encode("latin-1"),
        "json.png": png,
        "json.json": b'{"caption": "x"',
        "deep.png": png,
        "deep.json": b"[" * 200_000,
        "list.png": png,
        "list.json": b'["x"]',
        "long.png": png,
        "long.txt": b"x" * (1 << 21),
        "header.png": png[:20],
        "header.txt": b"x",
        "good.png": png,
        "good.json": b'{"caption": "half a \\ud83d pair"}',
    }
    source = tar_source(write_tar(tmp_path / "a.tar", files))
    assert [source[i]["key"] for i in range(len(source))] == ["good"]
    assert source[0]["captions"]["caption"] == "half a ? pair"
    assert source.broken == {
        "empty image": 1,
        "no image": 1,
        "caption not in UTF-8": 1,
        "unreadable json": 3,
        "text over 1 MiB": 1,
        "unreadable image": 1,
    }
    assert source.dropped == {"no caption": 1}


def test_damaged_pixels_behind_a_good_header_raise_broken_example(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for format in ("PNG", "JPEG"):
        data = encode(noise, format)
        files = {"a.png": data[: len(data) // 2], "a.txt": b"x", "b.png": data, "b.txt": b"y"}
        source = tar_source(write_tar(tmp_path / f"{format}.tar", files))
        with pytest.raises(BrokenExample, match="'a': damaged image"):
            source[0]
        assert source[1]["key"] == "b"


def small_tar(tmp_path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    files = {
        "0.png": encode(noise[0]),
        "0.txt": b"first",
        "1.jpg": encode(noise[1], "JPEG", exif=Image.Exif().tobytes()),
        "1.json": b'{"caption": "second", "score": 5}',
        "folder/" * 15 + "2.webp": encode(noise[2], "WEBP"),
        "folder/" * 15 + "2.txt": b"third",
        "3.png": encode(Image.fromarray(noise[0]).quantize(8), transparency=1),
        "3.txt": b"fourth",
    }
    return write_tar(tmp_path / "small.tar", files).read_bytes()


def read_all(path) -> int:
    """Returns the number of examples that can be read; may raise UserError only."""
    pathlib.Path(f"{path}.index").unlink(missing_ok=True)  # two writes may have equal modification times
    source = tar_source(path)
    readable = 0
    for index in range(len(source)):
        try:
            example = source[index]
        except BrokenExample:
            continue
        assert example["image"].shape == (*source.sizes()[index], 3)
        [fitted] = source.load([index], Bucket(8, 8))
        assert fitted["image"].shape == (8, 8, 3)
        readable += 1
    assert_read_from_end_to_end(path, source)
    return readable


def assert_read_from_end_to_end(path, source) -> None:
    """Checks that scanning from end to end without the index yields the same samples."""
    stream = SampleStream(SampleReader(TarShards(path), (Bucket(8, 8),), (no_caption,)), [[0]], (0,))
    statistics = ReadStatistics()
    entries = [stream.next(statistics) for _ in range(len(source))]
    keys = [example["key"] for example in source.describe(range(len(source)))]
    assert [entry.sample.key for entry in entries] == keys
    assert [entry.size for entry in entries] == list(map(tuple, source.sizes().tolist()))
    assert {entry.epoch for entry in entries} == {0}


def test_a_tar_truncated_anywhere_keeps_its_complete_samples(tmp_path):
    whole = small_tar(tmp_path)
    with tarfile.open(tmp_path / "small.tar") as tar:
        ends = [member.offset_data + member.size for member in tar.getmembers()]
    for length in range(1, len(whole), 701):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        pairs = sum(end <= length for end in ends) // 2
        if pairs:
            assert read_all(tmp_path / "cut.tar") == pairs
        else:
            with pytest.raises(UserError, match="truncated"):
                tar_source(tmp_path / "cut.tar")


def test_a_truncated_tar_is_counted(tmp_path):
    whole = small_tar(tmp_path)
    with tarfile.open(tmp_path / "small.tar") as tar:
        second = tar.getmembers()[2]
    (tmp_path / "cut.tar").write_bytes(whole[: second.offset_data + 100])
    assert tar_source(tmp_path / "cut.tar").broken == {"truncated tar": 1, "truncated file": 1}


def test_a_damaged_header_in_the_middle_is_counted_and_not_taken_for_the_end(tmp_path):
    whole = bytearray(small_tar(tmp_path))
    with tarfile.open(tmp_path / "small.tar") as tar:
        whole[tar.getmembers()[4].offset + 5] ^= 1
    (tmp_path / "damaged.tar").write_bytes(whole)
    source = tar_source(tmp_path / "damaged.tar")
    assert (len(source), source.broken) == (2, {"damaged tar": 1})


def test_forged_sizes_end_the_walk(tmp_path):
    whole = small_tar(tmp_path)
    for size in (b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12, b"-0000001000\0", b"0x000000010\0"):
        header = bytearray(whole[:512])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (tmp_path / "forged.tar").write_bytes(bytes(header) + whole[512:])
        with pytest.raises(UserError, match="no usable sample"):
            tar_source(tmp_path / "forged.tar")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return folder / "fuzzed.tar", small_tar(folder)


@settings(max_examples=1000, derandomize=True, deadline=datetime.timedelta(seconds=20), database=None)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=12)), max_size=6),
    mend_headers=st.booleans(),
    cut=st.floats(0.2, 1),
)
def test_a_mutated_tar_works_or_raises_user_error_or_broken_example(fuzzed, changes, mend_headers, cut):
    path, whole = fuzzed
    data = bytearray(whole)
    for place, content in changes:
        start = int(place * len(data))
        data[start : start + len(content)] = content
    data = data[: max(int(cut * len(data)), 1) if cut < 0.9 else len(data)]
    if mend_headers:  # otherwise the checksum would catch every change to a header
        for start in range(0, len(data) - 511, 512):
            if data[start + 257 : start + 262] == b"ustar":
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
    path.write_bytes(data)
    try:
        read_all(path)
    except UserError as error:
        assert "\n" not in str(error)


# --- reading from threads and processes -------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    for shard in range(20):  # more files than a thread keeps open
        files = {}
        for i in range(shard * 5, shard * 5 + 5):
            files |= {f"{i:03}.png": encode(np.full((4 + i % 3, 5, 3), i, np.uint8)), f"{i:03}.txt": str(i).encode()}
        write_tar(tmp_path / f"{shard:02}.tar", files)
    return tar_source(tmp_path)


def test_threads_read_the_right_images_concurrently(numbered):
    wrong = []

    def read(seed):
        for i in np.random.default_rng(seed).permutation(len(numbered)).tolist():
            example = numbered[i]
            if not ((example["image"] == i).all() and example["captions"]["txt"] == str(i)):
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_files_are_closed_when_their_thread_ends(numbered):
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("no /proc")
    thread = threading.Thread(target=lambda: [numbered[i] for i in range(len(numbered))])
    thread.start()
    thread.join()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_source_survives_pickling_after_use(numbered):
    np.testing.assert_array_equal(numbered[7]["image"], 7)
    copy = pickle.loads(pickle.dumps(numbered))  # trusted bytes
    assert copy.fingerprint == numbered.fingerprint
    np.testing.assert_array_equal(copy.sizes(), numbered.sizes())
    np.testing.assert_array_equal(copy[42]["image"], 42)


def test_a_vanished_shard_breaks_its_examples_only(numbered, tmp_path):
    (tmp_path / "03.tar").unlink()
    with pytest.raises(BrokenExample, match="unreadable file"):
        numbered[17]
    assert numbered[20]["key"] == "020"


# --- real data --------------------------------------------------------------------------------------------------


@needs_emoji
def test_all_of_the_emoji_shards_is_read(tmp_path):
    shards = TarShards(EMOJI / "{00000..00003}.tar")
    source = IndexedSource(shards, options=IndexOptions(str(tmp_path)))
    assert len(source) == 928
    assert source.broken == {}
    assert source.sizes().min() >= 50
    assert source.sizes().max() <= 193
    for index in range(0, 928, 13):
        example = source[index]
        assert example["image"].shape == (example["metadata"]["height"], example["metadata"]["width"], 3)
        assert example["captions"]["txt"]
    assert len(collections.Counter(one["key"] for one in source.describe(range(928)))) == 928
