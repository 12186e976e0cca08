"""Parquet files with embedded images: columns of every type, random access, streams, remote files, damaged files."""

import collections
import itertools
import json
import pathlib
import time

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored_data import CLASSES, COUNT, caption, data_of, numbered_image, write_parquet
from test_streams import captions_of, loader_on
from test_tar_source import encode

from lidit_jax.data.formats import files, parquet_files, row_cache
from lidit_jax.data.formats.parquet_shards import ParquetShards
from lidit_jax.data.formats.shards import Unusable
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.streamed import sample_stream
from lidit_jax.errors import UserError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(count: int) -> pa.Array:
    return pa.array([{"bytes": encode(numbered_image(i)), "path": None} for i in range(count)], IMAGE)


def write(path: pathlib.Path, columns, metadata=None, **options) -> pathlib.Path:
    table = pa.table(columns)
    pq.write_table(table.replace_schema_metadata(metadata) if metadata else table, path, **options)
    return path


def noise(count: int, side: int = 40) -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


# --- columns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (pa.array(["one", "two"]).dictionary_encode(), {"text": "two"}),
        (pa.array(["one", "two"], pa.string_view()), {"text": "two"}),
        (pa.array(["one", "two"], pa.large_string()), {"text": "two"}),
        (pa.array([b"one", b"two"], pa.binary()), {"text": "two"}),
        (pa.array([b"one", b"two"], pa.large_binary()), {"text": "two"}),
        (pa.array([["one"], ["two", "zwei"]]), {"text/0": "two", "text/1": "zwei"}),
        (pa.array([["one"], ["two"]], pa.large_list(pa.large_string())), {"text": "two"}),
        (pa.array([{"long": "one"}, {"long": "two", "short": "2"}]), {"text/long": "two", "text/short": "2"}),
        (pa.array([None, "two"]), {"text": "two"}),
    ],
)
def test_texts_of_every_type_are_captions(tmp_path, texts, expected):
    write(tmp_path / "x.parquet", {"image": images(2), "text": texts})
    [_, sample] = ParquetShards(tmp_path).read([(0, 0, 1), (0, 1, 2)])
    assert sample.captions == expected


def test_columns_that_are_neither_image_nor_text_nor_number_are_not_read(tmp_path, monkeypatch):
    columns = {
        "image": images(2),
        "text": ["one", "two"],
        "mask": images(2),
        "embedding": [[0.5] * 100] * 2,
        "when": pa.array([1 << 62] * 2, pa.timestamp("us")),
        "score": [3, 4],
        "good": [True, False],
    }
    write(tmp_path / "x.parquet", columns)
    shards = ParquetShards(tmp_path, "image")
    [sample] = shards.read([(0, 1, 2)])
    assert (sample.captions, sample.metadata) == ({"text": "two"}, {"score": 4, "good": False})
    assert "embedding" not in str(shards._columns) and "when" not in str(shards._columns)


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_images_in_a_plain_binary_column_are_found_by_their_content(tmp_path, kind):
    encoded = [encode(numbered_image(i)) for i in range(3)]
    columns = {"key": ["0", "1", "2"], "note": pa.array([b"a", b"b", b"c"]), "jpg": pa.array(encoded, kind)}
    write(tmp_path / "x.parquet", columns | {"caption": ["a", "b", "c"]})
    dataset = open_dataset(data_of("parquet", tmp_path), 8)
    for i, example in enumerate(dataset.source.load(range(3))):
        np.testing.assert_array_equal(example["image"], numbered_image(i))
        assert example["captions"]["caption"] == "abc"[i]


@pytest.mark.parametrize(
    ("columns", "image_key", "message"),
    [
        ({"text": ["a"]}, "", r"image columns \(none; there are text \(string\)\): name one with .*image_key"),
        ({"a": images(1), "b": images(1)}, "", r"image columns a, b: name one with --config.data.image_key"),
        ({"a": images(1)}, "b", r"data.image_key='b' is not an image column .* \(there are a \(struct<bytes"),
        ({"a": images(1), "b": ["x"]}, "b", r"data.image_key='b' is not an image column"),
    ],
)
def test_a_missing_or_ambiguous_image_column_raises_a_one_line_error(tmp_path, columns, image_key, message):
    write(tmp_path / "x.parquet", columns)
    with pytest.raises(UserError, match=message) as error:
        open_dataset(data_of("parquet", tmp_path, image_key=image_key), 8)
    assert "\n" not in str(error.value)


def test_class_labels_are_captions_by_the_names_in_the_metadata(tmp_path):
    features = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": images(3), "label": [0, 1, 2]}
    write(tmp_path / "x.parquet", columns, metadata)
    dataset = open_dataset(data_of("parquet", tmp_path, class_template="a photo of {}"), 8)
    assert sorted(dataset.captions(2, 0)) == ["a photo of cat", "a photo of dog"]
    assert dataset.broken == {"class without a name": 1}
    (tmp_path / "names.txt").write_text("x\ny\nz\n")
    for wrong in (metadata, {"huggingface": "["}, {"huggingface": '{"info": {"features": {"label": 5}}}'}):
        write(tmp_path / "x.parquet", columns, wrong)
        dataset = open_dataset(data_of("parquet", tmp_path, class_names=str(tmp_path / "names.txt")), 8)
        assert sorted(dataset.captions(3, 0)) == ["x", "y", "z"]


def test_images_without_captions_train_an_autoencoder(tmp_path):
    for compression in ("snappy", "none"):
        write(tmp_path / "x.parquet", {"image": images(3)}, compression=compression)
        dataset = open_dataset(data_of("parquet", tmp_path), 8, with_captions=False)
        assert len(dataset.images(3)) == 3


def test_unusable_rows_are_counted_by_reason(tmp_path):
    rows = [
        {"bytes": encode(numbered_image(0)), "path": "a.png"},
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "a.png"},
        {"bytes": b"junk", "path": "a.png"},
    ]
    columns = {"image": pa.array(rows, IMAGE), "text": ["words"] * len(rows)}
    expected = {"image given by a path alone": 1, "no image": 2, "empty image": 1, "unreadable image": 1}
    for compression in ("snappy", "none"):
        write(tmp_path / "x.parquet", columns, compression=compression)
        dataset = open_dataset(data_of("parquet", tmp_path), 8)
        assert (len(dataset.source), dataset.broken) == (1, expected)
        assert dataset.source[0]["captions"] == {"text": "words"}


def test_numbers_of_a_column_are_filtered_by(tmp_path):
    write_parquet(tmp_path)
    dataset = open_dataset(data_of("parquet", tmp_path, min_aesthetic=5, aesthetic_key="score"), 8)
    assert dataset.dropped == {"score under 5": 5}


def test_splits_in_one_folder_are_not_mixed(tmp_path):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / f"{name}.parquet", {"image": images(1), "text": ["a"]})
    assert len(ParquetShards(tmp_path).paths) == 2
    assert len(ParquetShards(tmp_path, split="test").paths) == 1
    assert len(ParquetShards(f"{tmp_path}/test-*.parquet").paths) == 1
    with pytest.raises(UserError, match="has the splits test, train: name one with --config.data.split"):
        ParquetShards(tmp_path, split="validation")


def test_files_called_like_splits_are_not_mixed(tmp_path):
    for name in ("train", "test", "val"):
        write(tmp_path / f"{name}.parquet", {"image": images(1), "text": ["a"]})
    assert [pathlib.Path(path).name for path in ParquetShards(tmp_path).paths] == ["train.parquet"]
    assert [pathlib.Path(path).name for path in ParquetShards(tmp_path, split="validation").paths] == ["val.parquet"]


def test_the_last_files_can_be_held_out(tmp_path):
    write_parquet(tmp_path)
    config = data_of("parquet", tmp_path, held_out_shards=1)
    kept, held_out = open_dataset(config, 8), open_dataset(config, 8, held_out=True)
    assert set(kept.captions(COUNT, 0)).isdisjoint(held_out.captions(COUNT, 0))
    with pytest.raises(UserError, match="has 2 shards, too few to hold some out"):
        open_dataset(data_of("parquet", tmp_path, held_out_shards=2), 8)


# --- random access ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_dictionary": False}, {"data_page_version": "2.0"}, {"data_page_size": 1000, "write_batch_size": 2},
     {"use_dictionary": False, "column_encoding": {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}}],
)  # fmt: skip
def test_rows_in_any_order_equal_those_read_from_end_to_end(tmp_path, compression, options):
    encoded = noise(8)
    encoded = [*encoded, *encoded[:2], None]  # repeated images are stored once in a dictionary
    columns = {"image": [{"bytes": data} for data in encoded], "text": list("abcdefghijk")}
    write(tmp_path / "x.parquet", columns, compression=compression, row_group_size=6, **options)
    shards = ParquetShards(tmp_path)
    scanned = list(shards.scan(0))
    assert scanned[-1] == "no image" and len(scanned) == len(encoded)
    order = np.random.default_rng(1).permutation(len(encoded)).tolist() * 2
    for row, sample in zip(order, shards.read([(0, row, row + 1) for row in order]), strict=True):
        if encoded[row] is None:
            assert str(sample) == "no image"
        else:
            assert (sample.image.read(), sample.captions["text"]) == (encoded[row], "abcdefghijk"[row])
            assert scanned[row][0] == (row, row + 1)


def test_an_uncompressed_image_is_read_alone(tmp_path, monkeypatch):
    encoded = noise(30)
    columns = {"image": [{"bytes": data} for data in encoded], "text": list(map(str, range(30)))}
    write(tmp_path / "x.parquet", columns, compression={"image.bytes": "none", "text": "snappy"})
    shards = ParquetShards(tmp_path)
    shards.read([(0, 0, 1)])
    read, requested = files.RangeReader.read, []

    def count(self, ranges):
        requested.extend(end - start for _, start, end in ranges)
        return read(self, ranges)

    monkeypatch.setattr(files.RangeReader, "read", count)
    [sample] = shards.read([(0, 20, 21)])
    assert sample.image.read() == encoded[20] and requested == [len(encoded[20])]


def test_slow_random_access_is_said(tmp_path, caplog):
    columns = {"image": [{"bytes": data} for data in noise(4, 500)], "text": list("abcd")}
    for compression, warns in (("snappy", True), ("none", False)):
        caplog.clear()
        write(tmp_path / "x.parquet", columns, compression=compression)
        open_dataset(data_of("parquet", tmp_path), 8)
        assert ("compressed in row groups of up to 3 MB" in caplog.text) == warns
        open_dataset(data_of("parquet", tmp_path, sequential=True), 8)
        assert caplog.text.count("row groups") == warns


def test_row_groups_that_are_too_large_to_keep_are_read_up_to_the_row(tmp_path, monkeypatch):
    write_parquet(tmp_path, shards=1, row_group_size=100, compression="snappy")
    monkeypatch.setattr(row_cache, "_CACHED_GROUP_BYTES", 300)
    shards = ParquetShards(tmp_path)
    found = shards.read([(0, row, row + 1) for row in (9, 2, 13)])
    assert [sample.captions["text"] for sample in found] == [caption(9), caption(2), caption(13)]
    assert not shards._cache._groups


def test_the_cache_of_row_groups_stays_within_its_limit(tmp_path, monkeypatch):
    write_parquet(tmp_path, shards=1, compression="snappy")
    monkeypatch.setattr(row_cache, "_CACHE_BYTES", 5000)
    shards = ParquetShards(tmp_path)
    for row in range(COUNT):
        [sample] = shards.read([(0, row, row + 1)])
        assert sample.captions["text"] == caption(row)
        assert shards._cache._bytes == sum(size for _, size in shards._cache._groups.values()) <= 5000


def test_a_file_that_has_changed_breaks_its_examples_only(tmp_path):
    shards = ParquetShards(write_parquet(tmp_path))
    write(tmp_path / "00000.parquet", {"image": images(1), "text": ["a"]})
    (tmp_path / "00001.parquet").unlink()
    reopened = ParquetShards(tmp_path)
    assert str(reopened.read([(0, 5, 6)])[0]) == "changed since it was indexed"
    assert str(shards.read([(1, 5, 6)])[0]) == "unreadable file"


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    return write_parquet(tmp_path_factory.mktemp("parquet"), 60, shards=8)


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_streams_give_equal_batches_on_any_number_of_hosts(parquet, monkeypatch, process_count):
    dataset = open_dataset(data_of("parquet", parquet, sequential=True), 8)
    expected = captions_of(loader_on(dataset, monkeypatch), 12)
    parts = [captions_of(loader_on(dataset, monkeypatch, p, process_count), 12) for p in range(process_count)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == expected


def test_in_every_epoch_of_a_stream_each_row_comes_once(parquet):
    dataset = open_dataset(data_of("parquet", parquet, sequential=True, streams=1, max_aspect=1.0), 8)
    loader = dataset.batches(4, 0, None, with_captions=True)
    drawn = collections.Counter(sum(captions_of(loader, 30), []))
    assert drawn == dict.fromkeys(map(caption, range(60)), 2)


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stop=st.integers(1, 30), hosts=st.sampled_from([(1, 4), (4, 1), (2, 2)]), part=st.sampled_from([1, 500, 1 << 26])
)
def test_streams_resume_at_any_row_on_any_number_of_hosts(parquet, stop, hosts, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_stream, "SECTION_BYTES", part)
        dataset = open_dataset(data_of("parquet", parquet, sequential=True, shuffle_buffer=40), 8)
        expected = captions_of(loader_on(dataset, patch), stop + 5)
        states, after = [], []
        for process in range(hosts[0]):
            loader = loader_on(dataset, patch, process, hosts[0])
            for _ in range(stop):
                next(loader)
            states.append(json.loads(json.dumps(loader.get_state())))
            loader.close()
        for process in range(hosts[1]):
            loader = loader_on(dataset, patch, process, hosts[1], first=stop)
            loader.restore(states)
            after.append(captions_of(loader, 5))
    assert [sum(rows, []) for rows in zip(*after, strict=True)] == expected[stop:]


def test_a_position_between_row_groups_is_rejected(parquet):
    shards = ParquetShards(parquet)
    for start in (2, 1000, 1 << 61):
        with pytest.raises(UserError, match=f"has no row group at row {start}"):
            list(shards.scan(0, start, 1))


def test_row_groups_may_be_empty_and_sections_never_end_where_they_began(tmp_path):
    table = pa.table({"image": images(3), "text": list("abc")})
    with pq.ParquetWriter(tmp_path / "x.parquet", table.schema) as writer:
        for rows in (table[:0], table[:2], table[:0], table[2:]):
            writer.write_table(rows)
    shards, starts = ParquetShards(tmp_path), [0]
    assert [one[1].captions["text"] for one in shards.scan(0)] == ["a", "b", "c"]
    while starts[-1] is not None and len(starts) < 9:
        section = shards.scan(0, starts[-1], 1)
        while True:
            try:
                next(section)
            except StopIteration as end:
                starts.append(end.value)
                break
    assert starts == [0, 2, None]


def test_indexed_batches_are_equal_for_any_number_of_hosts_and_resume(parquet, monkeypatch):
    dataset = open_dataset(data_of("parquet", parquet), 8)
    loader = loader_on(dataset, monkeypatch)
    expected = [next(loader)["caption"] for _ in range(3)]
    state = json.loads(json.dumps(loader.get_state()))
    expected += captions_of(loader, 4)
    parts = [captions_of(loader_on(dataset, monkeypatch, p, 2), 7) for p in range(2)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == expected
    resumed = loader_on(open_dataset(data_of("parquet", parquet), 8), monkeypatch)
    resumed.restore([state])
    assert captions_of(resumed, 4) == expected[3:]


# --- remote files -----------------------------------------------------------------------------------------------


class Hub(MemoryFileSystem):
    """Stands in for huggingface_hub's HfFileSystem."""

    protocol = "hf"
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("hf://"))


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Writes the common images to memory:// and hf://, and returns their local folder."""
    folder = write_parquet(tmp_path / "parquet")
    monkeypatch.setitem(_registry, "hf", Hub)
    for filesystem in (fsspec.filesystem("memory"), fsspec.filesystem("hf")):
        for file in folder.glob("*.parquet"):
            filesystem.pipe_file(f"/datasets/me/set/{file.name}", file.read_bytes())
    yield folder
    fsspec.filesystem("memory").rm("/datasets", recursive=True)
    Hub.store.clear()


@pytest.mark.parametrize("protocol", ["memory", "hf"])
@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_remote_files_are_read_as_local_ones(remote, protocol, compression, caplog):
    local = open_dataset(data_of("parquet", write_parquet(remote, compression=compression)), 8)
    for file in remote.glob("*.parquet"):
        fsspec.filesystem(protocol).pipe_file(f"/datasets/me/set/{file.name}", file.read_bytes())
    for path in ("datasets/me/set", "datasets/me/set/*.parquet", "datasets/me/set/{00000..00001}.parquet"):
        dataset = open_dataset(data_of("parquet", f"{protocol}://{path}"), 8)
        assert dataset.fingerprint == local.fingerprint
    for ours, theirs in zip(dataset.source.load(range(COUNT)), local.source.load(range(COUNT)), strict=True):
        assert ours["captions"] == theirs["captions"]
        np.testing.assert_array_equal(ours["image"], theirs["image"])
    streams = [
        captions_of(
            open_dataset(data_of("parquet", path, sequential=True), 8).batches(4, 0, None, with_captions=True), 6
        )
        for path in (remote, f"{protocol}://datasets/me/set")
    ]
    assert streams[0] == streams[1]
    # An index beside a shard on the Hub would be a commit.
    assert fsspec.filesystem(protocol).exists("/datasets/me/set/00000.parquet.index") == (protocol == "memory")


def test_a_remote_file_that_disappears_is_not_taken_for_a_broken_image(remote):
    shards = ParquetShards("memory://datasets/me/set")
    fsspec.filesystem("memory").rm("/datasets/me/set/00001.parquet")
    assert str(shards.read([(1, 0, 1)])[0]) == "unreadable file"
    with pytest.raises(UserError, match="cannot read 'memory://.*00001.parquet'"):
        list(shards.scan(1))


# --- damaged and hostile files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda b: b"", "not a Parquet file"),
        (lambda b: b"PAR1PAR1", "not a Parquet file"),
        (lambda b: b[: len(b) // 2], "not a Parquet file"),
        (lambda b: bytes(len(b)), "not a Parquet file"),
        (lambda b: b[:-4] + b"PARE", "encrypted Parquet file"),
        (lambda b: b[:-8] + b"\xff\xff\xff\x7fPAR1", "damaged Parquet footer"),
        (lambda b: b[:-100] + bytes(92) + b[-8:], "damaged Parquet footer"),
        (lambda b: b[:4] + bytes(40) + b[44:], "damaged Parquet page"),
    ],
)
def test_a_damaged_file_is_counted_and_the_others_are_used(tmp_path, damage, reason):
    write_parquet(tmp_path, row_group_size=100)
    file = tmp_path / "00000.parquet"
    file.write_bytes(damage(file.read_bytes()))
    for sequential in (False, True):
        dataset = open_dataset(data_of("parquet", tmp_path, sequential=sequential), 8)
        assert dataset.broken == {reason: 1}
        assert len(dataset.captions(COUNT, 0)) == COUNT // 2
    (tmp_path / "00001.parquet").unlink()
    with pytest.raises(UserError, match=reason) as error:
        open_dataset(data_of("parquet", tmp_path), 8)
    assert "\n" not in str(error.value)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_bytes_raises_anything_but_a_one_line_error(tmp_path, data):
    path = tmp_path / "x.parquet"
    if not path.exists():
        write(path, {"image": images(5), "text": list("abcde")}, row_group_size=3, compression="zstd")
        (tmp_path / "whole").write_bytes(path.read_bytes())
    content = bytearray((tmp_path / "whole").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the changes are in the footer.
        place = data.draw(
            st.one_of(st.integers(0, len(content) - 1), st.integers(len(content) - 900, len(content) - 1))
        )
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        shards = ParquetShards(path)
        found = list(itertools.islice(shards.scan(0), 100))
        again = shards.read([(0, *one[0]) for one in found if not isinstance(one, str)])
    except UserError as error:
        assert "\n" not in str(error)
        return
    for sample, one in zip(again, (one for one in found if not isinstance(one, str)), strict=True):
        assert isinstance(sample, Unusable) or sample.captions == one[1].captions


def test_a_page_that_would_expand_too_far_is_not_decompressed(tmp_path, monkeypatch):
    write(tmp_path / "x.parquet", {"image": images(3), "text": ["x" * (3 << 20)] * 3}, compression="zstd")
    monkeypatch.setattr(parquet_files, "MAX_TEXT_PAGE_BYTES", 1 << 20)
    assert list(ParquetShards(tmp_path).scan(0)) == ["Parquet page over 1 MiB"]


def test_a_text_over_1_mib_is_left_out_or_breaks_its_sample_if_it_is_a_caption(tmp_path):
    long = "x" * ((1 << 20) + 1)
    write(tmp_path / "x.parquet", {"image": images(3), "text": ["a", long, "c"], "html": ["", "", long]})
    found = [one if isinstance(one, str) else one[1].captions for one in ParquetShards(tmp_path).scan(0)]
    assert found == [{"text": "a"}, "text over 1 MiB", {"text": "c"}]


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_files_may_lack_columns_of_the_first_one(tmp_path, compression):
    write(tmp_path / "a.parquet", {"image": images(1), "text": ["a"], "license": ["x"]}, compression=compression)
    write(tmp_path / "b.parquet", {"image": images(2), "text": ["b", "c"]}, compression=compression)
    write(tmp_path / "c.parquet", {"image": images(1)}, compression=compression)
    shards = ParquetShards(tmp_path)
    assert [sample.captions for _, sample in shards.scan(1)] == [{"text": "b"}, {"text": "c"}]
    assert [one.captions for one in shards.read([(1, 1, 2), (2, 0, 1), (0, 0, 1)])] == [
        {"text": "c"},
        {},
        {"text": "a", "license": "x"},
    ]


def test_a_missing_image_column_is_counted_once_a_file(tmp_path):
    write(tmp_path / "a.parquet", {"image": images(2), "text": ["a", "b"]})
    write(tmp_path / "b.parquet", {"photo": images(2), "text": ["a", "b"]}, row_group_size=1)
    assert list(ParquetShards(tmp_path).scan(1)) == ["no column 'image.bytes'"]


def test_texts_that_are_lost_after_indexing_break_their_samples_only(tmp_path):
    file = write(tmp_path / "x.parquet", {"image": images(2), "text": ["some words"] * 2}, compression="none")
    shards = ParquetShards(tmp_path)
    [sample] = shards.read([(0, 0, 1)])
    assert sample.captions == {"text": "some words"}
    content = bytearray(file.read_bytes())
    start = pq.read_metadata(file).row_group(0).column(2).data_page_offset
    content[start : start + 8] = b"\xff" * 8
    file.write_bytes(content)
    shards = ParquetShards(tmp_path)
    assert all(isinstance(one, Unusable) for one in shards.read([(0, 0, 1), (0, 1, 2)]))


def test_one_large_image_for_many_rows_does_not_fill_the_memory(tmp_path):
    image = encode(np.random.default_rng(0).integers(0, 256, (600, 600, 3), dtype=np.uint8))
    same = pa.DictionaryArray.from_arrays(pa.array([0] * 300, pa.int32()), pa.array([image]))
    write(tmp_path / "x.parquet", {"image": same, "text": ["a"] * 300}, store_schema=False)
    assert (tmp_path / "x.parquet").stat().st_size < 2 * len(image)
    shards = ParquetShards(tmp_path)
    pool = pa.default_memory_pool()
    before = pool.bytes_allocated()
    for _ in itertools.islice(shards.scan(0), 100):
        assert pool.bytes_allocated() - before < 40 << 20
    shards.read([(0, 299, 300)])
    assert not shards._cache._groups


def test_the_time_to_read_a_row_grows_with_the_number_of_columns_and_not_with_its_square(tmp_path):
    names = [f"column{i}" for i in range(8000)]
    path = tmp_path / "wide.parquet"
    pq.write_table(pa.table({name: [i] for i, name in enumerate(names)}), path)
    start = time.process_time()
    [row] = parquet_files.ParquetFiles([str(path)]).rows(0, 0, names)
    assert time.process_time() - start < 15  # about 2 seconds; comparing all names with one another takes 60
    assert row == {name: i for i, name in enumerate(names)}


def test_rows_beside_damage_are_read(tmp_path):
    encoded = noise(14)
    columns = {"image": [{"bytes": data} for data in encoded], "text": list("abcdefghijklmn")}
    for compression in ("snappy", "none"):
        file = write(
            tmp_path / "x.parquet",
            columns,
            compression=compression,
            row_group_size=7,
            use_dictionary=False,
            data_page_size=1000,
            write_batch_size=1,
        )
        content = bytearray(file.read_bytes())
        place = content.find(encoded[4][-50:]) + 50  # where the page of the next image begins
        content[place : place + 10] = bytes(10)
        file.write_bytes(content)
        shards = ParquetShards(tmp_path)
        found = list(shards.scan(0))
        assert found[0] == "damaged Parquet page"
        assert [one[0][0] for one in found[1:]] == list(range(7, 14))
        samples = shards.read([(0, row, row + 1) for row in (0, 9)])
        assert str(samples[0]) == "changed since it was indexed" and samples[1].image.read() == encoded[9]
