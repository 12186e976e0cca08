"""The index of a shard is built once, rebuilt if it does not fit, and checked against forgery."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stored_data import COUNT, caption, data_of, numbered_image, write_tars
from test_tar_source import encode, write_tar

from lidit_jax.data.filters import no_caption
from lidit_jax.data.formats import index_files
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.indexed.index import IndexOptions, examine
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.sources import BrokenExample
from lidit_jax.errors import UserError


def test_an_index_is_built_once_and_rebuilt_when_its_shard_changes(tmp_path, monkeypatch, caplog):
    folder = write_tars(tmp_path / "tar", 6)
    first = IndexedSource(TarShards(folder))
    assert sorted(os.listdir(folder)) == ["00000.tar", "00000.tar.index", "00001.tar", "00001.tar.index"]

    def no_scan(self, shard):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(TarShards, "scan", no_scan)
        again = IndexedSource(TarShards(folder))
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.sizes(), first.sizes())

    write_tar(folder / "00001.tar", {"9.png": encode(numbered_image(9)), "9.txt": b"nine"})
    changed = IndexedSource(TarShards(folder))
    assert (len(changed), changed[3]["captions"]) == (4, {"txt": "nine"})
    assert changed.fingerprint != first.fingerprint

    for content in (b"", b"PAR1 no parquet PAR1", (folder / "00001.tar.index").read_bytes()[:-9]):
        (folder / "00000.tar.index").write_bytes(content)
        mended = IndexedSource(TarShards(folder))
        assert mended.fingerprint == changed.fingerprint
    assert "not an index" in caplog.text


@pytest.mark.parametrize(
    "forge",
    [
        lambda t: t.set_column(0, "start", pa.array([-1] * len(t), pa.int64())),
        lambda t: t.set_column(2, "height", pa.array([1 << 40] * len(t), pa.int64())),
        lambda t: t.set_column(1, "end", pa.array([1 << 60] * len(t), pa.int64())),
        lambda t: t.set_column(2, "height", pa.array(["4"] * len(t))),
        lambda t: t.replace_schema_metadata({}),
        lambda t: t.replace_schema_metadata({"facts": "[]"}),
        lambda t: t.drop_columns(["end"]),
    ],
)
def test_a_forged_index_is_rebuilt(tmp_path, forge):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    expected = IndexedSource(TarShards(folder))
    path = folder / "00000.tar.index"
    pq.write_table(forge(pq.read_table(path)), path)
    found = IndexedSource(TarShards(folder))
    assert found.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(found.sizes(), expected.sizes())


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "gzip"},
        {"compression": "snappy"},
        {"use_dictionary": False, "column_encoding": {"captions": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"captions": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
)
def test_a_forged_index_that_would_expand_is_rebuilt(tmp_path, caplog, options):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    expected = examine(TarShards(folder), [no_caption])
    path = folder / "00000.tar.index"
    table, rows = pq.read_table(path), 32
    long = json.dumps({"txt": "x" * (1 << 20)})
    columns = {name: pa.array([2 * i + (name == "end") for i in range(rows)], pa.int64()) for name in ("start", "end")}
    columns |= {name: pa.array([4] * rows, pa.int64()) for name in ("height", "width")}
    columns |= {"key": ["key"] * rows, "captions": [long] * rows, "metadata": ["{}"] * rows}
    pq.write_table(pa.table(columns).replace_schema_metadata(table.schema.metadata), path, **options)
    allocated = pa.total_allocated_bytes()
    examined = examine(TarShards(folder), [no_caption])
    assert pa.total_allocated_bytes() - allocated < 1 << 20
    assert examined[0].digest == expected[0].digest
    assert "too large when it is decompressed" in caplog.text or "Parquet page over" in caplog.text


def test_a_forged_index_of_too_many_rows_is_rebuilt(tmp_path):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    expected = examine(TarShards(folder))
    path = folder / "00000.tar.index"
    zeros = pa.array(np.zeros(2_000_000, np.int64))
    table = pa.table(dict.fromkeys(("start", "end", "height", "width"), zeros))
    pq.write_table(table.replace_schema_metadata(pq.read_table(path).schema.metadata), path)
    assert path.stat().st_size < 100_000
    assert examine(TarShards(folder))[0].digest == expected[0].digest


def test_the_most_compressible_texts_are_read_from_their_index(tmp_path, monkeypatch):
    """The bound on the expansion of an index is above that of its compression."""
    image = encode(numbered_image(0))
    files = {}
    for i in range(60):
        files |= {f"{i}.png": image, f"{i}.txt": b"x" * 100_000}
    write_tar(tmp_path / "0.tar", files)
    first = examine(TarShards(tmp_path), [no_caption])
    monkeypatch.setattr(TarShards, "scan", lambda self, shard: pytest.fail("scanned again"))
    assert examine(TarShards(tmp_path), [no_caption])[0].digest == first[0].digest


def test_an_index_with_wrong_places_breaks_its_examples_only(tmp_path):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    examine(TarShards(folder))
    path = folder / "00000.tar.index"
    table = pq.read_table(path)
    starts = table.column("start").to_numpy().copy()
    starts[1] += 512
    pq.write_table(table.set_column(0, "start", pa.array(starts)), path)
    source = IndexedSource(TarShards(folder))
    with pytest.raises(BrokenExample, match="changed since"):
        source[1]
    assert source[2]["captions"]["txt"] == caption(2)


def test_many_shards_are_indexed_by_processes_from_any_first_shard(tmp_path):
    folder = write_tars(tmp_path / "tar", 66, shards=33)
    source = IndexedSource(TarShards(folder), first=20)
    assert len(source) == 66 and len(list(folder.glob("*.index"))) == 33
    assert [source[i]["captions"]["txt"] for i in (0, 1, 65)] == [caption(0), caption(33), caption(65)]


def test_without_write_permission_indexes_serve_one_run(tmp_path, caplog):
    folder = write_tars(tmp_path / "tar", 4)
    (tmp_path / "file").write_text("in the way")
    index_files._warn_once.cache_clear()
    source = IndexedSource(TarShards(folder), options=IndexOptions(str(tmp_path / "file/x")))
    assert len(source) == 4 and "set data.index_dir" in caplog.text
    elsewhere = IndexOptions(str(tmp_path / "indexes"))
    assert len(IndexedSource(TarShards(folder), options=elsewhere)) == 4
    assert len(list((tmp_path / "indexes").glob("*.tar.index"))) == 2
    assert not list(folder.glob("*.index"))


def test_shards_are_read_through_fsspec(tmp_path):
    import fsspec

    memory, local = fsspec.filesystem("memory"), open_dataset(data_of("tar", write_tars(tmp_path / "tar")), 8)
    for path in (tmp_path / "tar").glob("*.tar"):
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())
    try:
        for pattern in ("memory://shards", "memory://shards/*.tar", "memory://shards/{00000..00001}.tar"):
            remote = open_dataset(data_of("tar", pattern), 8)
            assert remote.fingerprint == local.fingerprint, pattern
        assert memory.exists("/shards/00000.tar.index")
        for ours, theirs in zip(remote.source.load(range(COUNT)), local.source.load(range(COUNT)), strict=True):
            assert ours["captions"] == theirs["captions"]
            np.testing.assert_array_equal(ours["image"], theirs["image"])
        memory.rm("/shards/00001.tar")
        assert str(remote.source.load([COUNT - 1])[0]).endswith("unreadable file")
        with pytest.raises(UserError, match="1 of the 2 files"):
            open_dataset(data_of("tar", "memory://shards/{00000..00001}.tar"), 8)
    finally:
        memory.rm("/shards", recursive=True)


def test_an_index_of_an_unknown_compression_is_rebuilt(tmp_path):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    expected = examine(TarShards(folder))
    path = folder / "00000.tar.index"
    codec = b"\x15\x02\x16"  # Snappy, as the footer writes it, and the type of the next field
    assert codec in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(codec, b"\x15\x28\x16"))
    assert examine(TarShards(folder))[0].digest == expected[0].digest
