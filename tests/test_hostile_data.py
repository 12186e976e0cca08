"""A single malformed sample or file is counted; it neither stops the run nor hides other samples."""

import csv
import json
import pathlib
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_data import CLASSES, COUNT, data_of, numbered_image, write_array_records, write_tars, write_tfds
from test_tar_source import encode, write_tar

from lidit_jax.data.filters import Candidate, file_name_caption, url_caption
from lidit_jax.data.formats.shards import Unusable, class_name
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.indexed.index import examine
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: bytes(len(b))]
)
def test_a_damaged_array_record_file_is_counted(tmp_path, damage):
    folder = write_array_records(tmp_path / "records")
    file = sorted(folder.glob("*00000-of*"))[0]
    file.write_bytes(damage(file.read_bytes()))
    dataset = open_dataset(data_of("array_record", folder), 8)
    assert len(dataset.source) == COUNT // 2
    assert dataset.broken == {"damaged ArrayRecord file": 1}


def test_a_malformed_tfds_record_is_counted(tmp_path):
    import array_record.python.array_record_module as records

    path = write_tfds(tmp_path / "tfds", texts=False)
    [file] = [name for name in pathlib.Path(path).iterdir() if "array_record" in name.name]
    reader = records.ArrayRecordReader(str(file))
    good = reader.read([*range(COUNT)])
    writer = records.ArrayRecordWriter(str(file), "group_size:1")
    for record in [b"\xff\xff\xff", *good[1:]]:
        writer.write(record)
    writer.close()
    dataset = open_dataset(data_of("tfds", path), 8)
    assert (len(dataset.source), dataset.broken) == (COUNT - 1, {"damaged record": 1})


@pytest.mark.parametrize("make", [lambda n: "a-" * n, lambda n: "a." * n, lambda n: "img" + " " * n + "x"])
def test_no_caption_takes_long_to_filter(make):
    candidate = Candidate({"txt": make(500_000)}, {}, 64, 64)
    started = time.process_time()
    assert url_caption(candidate) is None and file_name_caption(candidate) is None
    assert time.process_time() - started < 10  # took hours without the limit on the length of captions


def test_class_numbers_without_a_name_are_unusable():
    assert class_name("1", CLASSES) == class_name("0000000000001", CLASSES) == "dog"
    assert class_name("--5", CLASSES) == "--5"  # not a number, so it is a class name
    for text in ("2", "-1", "9" * 30, "-0001"):
        with pytest.raises(Unusable, match="class without a name"):
            class_name(text, CLASSES)


def test_unused_columns_are_ignored(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(numbered_image(0)))
    table = {
        "file_name": ["a.png"],
        "text": ["words"],
        "day": pa.array([2_000_000_000], pa.date32()),
        "when": pa.array([1 << 62], pa.timestamp("us")),
        "bytes": pa.array([b"\xff"], pa.binary()),
    }
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    dataset = open_dataset(data_of("folder", tmp_path), 8)
    assert dataset.source[0]["captions"] == {"text": "words"}


def test_a_csv_field_that_is_too_long_is_counted(tmp_path):
    (tmp_path / "a.png").write_bytes(encode(numbered_image(0)))
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), ("a.png", "x" * ((1 << 20) + 1)), ("a.png", "words")])
    dataset = open_dataset(data_of("folder", tmp_path), 8)
    assert (len(dataset.source), dataset.broken) == (1, {"text over 1 MiB": 1})


@pytest.mark.parametrize(
    "forge",
    [
        {"captions": "{"},
        {"captions": "5"},
        {"captions": '{"txt": 5}'},
        {"metadata": "[]"},
        {"metadata": "[" * 100_000},
        {"height": 3, "width": 6148914691236517206},
        "twice",
        "many broken",
    ],
)
def test_a_forged_index_is_rebuilt_also_if_texts_are_read(tmp_path, forge):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    config = data_of("tar", folder, min_side=1)
    expected = open_dataset(config, 8)
    file = folder / "00000.tar.index"
    table = pq.read_table(file)
    if forge == "twice":
        table = pa.concat_tables([table, table])
    elif forge == "many broken":
        facts = json.loads(table.schema.metadata[b"facts"]) | {"broken": {"x": 10**400}}
        table = table.replace_schema_metadata({"facts": json.dumps(facts)})
    else:
        for name, value in forge.items():
            at = table.schema.names.index(name)
            table = table.set_column(at, name, pa.array([value] * len(table), table.schema.field(name).type))
    pq.write_table(table, file)
    got = open_dataset(config, 8)
    assert got.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(got.source.sizes(), expected.source.sizes())


def test_an_index_with_images_without_texts_is_reused(tmp_path, monkeypatch):
    """Images without texts are the last rows of the index."""
    members = {
        "0.png": encode(numbered_image(0)),
        "1.png": encode(numbered_image(1)),
        "1.txt": b"words",
        "2.png": encode(numbered_image(2)),
    }
    write_tar(tmp_path / "0.tar", members)
    first = examine(TarShards(tmp_path))
    monkeypatch.setattr(TarShards, "scan", lambda self, shard: pytest.fail("scanned again"))
    assert examine(TarShards(tmp_path))[0].digest == first[0].digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": {"txt": "0.5"}}, "data.captions.txt='0.5' must be a number"),
        ({"captions": {"txt": None}}, "data.captions.txt=None must be a number"),
        ({"class_names": "a\0b"}, "cannot be read"),
        ({"path": "{3..1}.tar"}, "names no file: its braces count down"),
    ],
)
def test_invalid_data_settings_raise_a_one_line_error(tmp_path, change, message):
    folder = write_tars(tmp_path / "tar", 4)
    with pytest.raises(UserError, match=message):
        open_dataset(data_of(**{"source": "tar", "path": folder, **change}), 8)


def test_a_shard_named_twice_is_read_once(tmp_path):
    write_tars(tmp_path, 4)
    assert len(TarShards(f"{tmp_path}/{{00000,00000}}.tar").paths) == 1


def test_a_byte_order_mark_is_not_part_of_a_class_name(tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffcat\ndog\n".encode())
    write_tar(tmp_path / "0.tar", {"0.png": encode(numbered_image(0)), "0.cls": b"0"})
    dataset = open_dataset(data_of("tar", tmp_path, class_names=str(tmp_path / "names.txt")), 8)
    assert dataset.source[0]["captions"] == {"class": "cat"}


def test_a_damaged_image_alone_in_its_bucket_is_replaced_from_another(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 256, 3), dtype=np.uint8)
    data = encode(noise, "JPEG")
    members = {"wide.jpg": data[: len(data) * 2 // 3], "wide.txt": b"wide"}
    for i in range(20):
        members |= {f"{i}.png": encode(numbered_image(0)), f"{i}.txt": b"square"}
    write_tar(tmp_path / "0.tar", members)
    dataset = open_dataset(data_of("tar", tmp_path, max_aspect=4.0), 8)
    loader = dataset.batches(4, 0, None, with_captions=True)
    batches = [next(loader) for _ in range(30)]
    loader.close()
    assert {batch["image"].shape[1:3] for batch in batches} == {(32, 32), (16, 64)}
    assert {text for batch in batches for text in batch["caption"]} == {"square"}
    assert loader.broken["damaged image"] > 0


def test_renamed_classes_are_noticed(tmp_path):
    for name in CLASSES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encode(numbered_image(0)))
    first = open_dataset(data_of("folder", tmp_path), 8)
    (tmp_path / "cat").rename(tmp_path / "bird")
    second = open_dataset(data_of("folder", tmp_path), 8)
    assert second.fingerprint != first.fingerprint
    assert sorted(second.captions(2, 0)) == ["bird", "dog"]


def nested(depth: int) -> bytes:
    return b'{"caption": "words", "x": ' + b"[" * depth + b"]" * depth + b"}"


def test_json_that_is_nested_too_deeply_is_counted(tmp_path):
    """At a depth of 980 the parser succeeds, and encoding or pickling the metadata would fail."""
    files = {}
    for depth in (10, 500, *range(900, 1000, 10)):
        files |= {f"{depth}.png": encode(numbered_image(0)), f"{depth}.json": nested(depth)}
    write_tar(tmp_path / "0.tar", files)
    dataset = open_dataset(data_of("tar", tmp_path), 8)
    assert (len(dataset.source), dataset.broken) == (1, {"unreadable json": 11})
