"""The same pictures and captions from every kind of source, mixtures of them, and what is wrong with them."""

import collections
import csv
import io
import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import load_config, tiny_config
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tar_source import encode, write_tar

from lidit_jax import stages
from lidit_jax.config import build
from lidit_jax.data import index
from lidit_jax.data.batch_plan import BatchPlan
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.index import IndexPlan, examine
from lidit_jax.data.indexed_source import IndexedSource
from lidit_jax.data.sources import BrokenExample
from lidit_jax.data.tar_shards import TarShards
from lidit_jax.errors import UserError

COUNT = 14
CLASSES = ("cat", "dog")


def picture(i: int) -> np.ndarray:
    return np.full((40, 40 + 20 * (i % 2), 3), 10 * i % 250, np.uint8)


def caption(i: int) -> str:
    return f"picture {i} 图"


def write_tars(folder: pathlib.Path, count: int = COUNT, shards: int = 2) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        files = {}
        for i in range(shard, count, shards):
            files |= {f"{i:03}.png": encode(picture(i)), f"{i:03}.txt": caption(i).encode()}
            files |= {f"{i:03}.json": json.dumps({"score": i, "license": "free"}).encode()}
        write_tar(folder / f"{shard:05}.tar", files)
    return folder


def write_array_records(folder: pathlib.Path, texts: bool = True) -> pathlib.Path:
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder.mkdir()
    for shard in range(2):
        writer = ArrayRecordWriter(str(folder / f"part.array_record-0000{shard}-of-00002"), "group_size:1")
        for i in range(shard, COUNT, 2):
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["image"].bytes_list.value.append(encode(picture(i)))
            feature["score"].float_list.value.append(i)
            if texts:
                feature["caption"].bytes_list.value.append(caption(i).encode())
            else:
                feature["label"].int64_list.value.append(i % 2)
            writer.write(example.SerializeToString())
        writer.close()
    return folder


def write_tfds(folder: pathlib.Path, texts: bool = True) -> str:
    import tensorflow_datasets as tfds

    folder.mkdir()
    words = {"caption": tfds.features.Text()} if texts else {"label": tfds.features.ClassLabel(names=CLASSES)}

    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder

            def _info(self):
                features = {"image": tfds.features.Image(), "score": np.float32, **words}
                return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

            def _split_generators(self, manager):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for i in range(COUNT):
                    word = {"caption": caption(i)} if texts else {"label": i % 2}
                    yield i, {"image": io.BytesIO(encode(picture(i))), "score": i, **word}

    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def write_folder(folder: pathlib.Path, kind: str) -> pathlib.Path:
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for i in range(COUNT):
        (folder / f"pictures/{i}.png").write_bytes(encode(picture(i)))
        rows.append({"file_name": f"pictures/{i}.png", "text": caption(i), "score": i})
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif kind == "csv":
        with (folder / "captions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "some.parquet")
    return folder


def data_of(source: str, path, **more) -> DataConfig:
    return build(DataConfig, {"source": source, "path": str(path), "resolution": 32, "max_aspect": 2.0, **more}, "data")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, DataConfig]:
    """The pictures in every format."""
    folder = tmp_path_factory.mktemp("stored")
    return {
        "tar": data_of("tar", write_tars(folder / "tar")),
        "array_record": data_of("array_record", write_array_records(folder / "records")),
        "tfds": data_of("tfds", write_tfds(folder / "tfds")),
        **{kind: data_of("folder", write_folder(folder / kind, kind)) for kind in ("jsonl", "csv", "parquet")},
    }


KINDS = ("tar", "array_record", "tfds", "jsonl", "csv", "parquet")


# --- kinds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_pictures_and_captions(stored, kind):
    dataset = Dataset(stored[kind], 8)
    source = dataset.source
    assert len(source) == COUNT and not dataset.broken
    found = {}
    for example, size in zip(source.load(range(COUNT)), source.sizes(), strict=True):
        assert example["image"].shape == (*size, 3)
        [text] = (example["captions"][name] for name in ("txt", "text", "caption") if name in example["captions"])
        found[text] = example["image"]
        assert float(example["metadata"].get("score", example["captions"].get("score"))) == int(text.split()[1])
    assert sorted(found) == sorted(map(caption, range(COUNT)))
    for i in range(COUNT):
        np.testing.assert_array_equal(found[caption(i)], picture(i))
    assert set(dataset.captions(5, 0)) <= set(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_every_kind_of_source_feeds_the_loader_also_from_worker_processes(stored, kind, workers):
    if workers and kind in ("csv", "parquet"):
        pytest.skip("as jsonl")
    dataset = Dataset(build(DataConfig, vars(stored[kind]) | {"num_workers": workers}, "data"), 8)
    batches = dataset.batches(4, 0, None, with_captions=True)
    for batch in (next(batches), next(batches)):
        assert batch["image"].shape[1:] in {(32, 32, 3), (24, 40, 3)}
        for image, text in zip(batch["image"], batch["caption"], strict=True):
            assert (image == 10 * int(text.split()[1])).all()
    batches.close()


def test_classes_become_captions_through_the_template(tmp_path, stored):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    for i in range(COUNT):
        path = tmp_path / f"classes/{CLASSES[i % 2]}"
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{i}.png").write_bytes(encode(picture(i)))
    files = {}
    for i in range(COUNT):
        files |= {f"{i:03}.png": encode(picture(i)), f"{i:03}.cls": str(i % 2).encode()}
    (tmp_path / "tar").mkdir()
    write_tar(tmp_path / "tar/0.tar", files)
    template = {"class_template": "a photo of {}"}
    configs = [
        data_of("folder", tmp_path / "classes", **template),
        data_of("tar", tmp_path / "tar", class_names=str(names), **template),
        data_of("array_record", write_array_records(tmp_path / "r", False), class_names=str(names), **template),
        data_of("tfds", write_tfds(tmp_path / "tfds", False), **template),
    ]
    for config in configs:
        captions = collections.Counter(Dataset(config, 8).captions(COUNT, 0))
        assert captions == {"a photo of cat": COUNT // 2, "a photo of dog": COUNT // 2}, config.source


def test_what_is_wrong_with_rows_of_a_folder_is_counted(tmp_path):
    (tmp_path / "good.png").write_bytes(encode(picture(0)))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    rows = [
        '{"file_name": "good.png", "text": "fine"}',
        "no json",
        '{"file_name": "../good.png", "text": "x"}',
        '{"file_name": "/etc/passwd", "text": "x"}',
        '{"file_name": "none.png", "text": "x"}',
        '{"file_name": "empty.png", "text": "x"}',
        '{"file_name": "text.png", "text": "x"}',
        '{"text": "x"}',
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    dataset = Dataset(data_of("folder", tmp_path), 8)
    assert dataset.broken == {
        "unreadable json": 1,
        "file outside the folder": 2,
        "no picture": 1,
        "empty picture": 1,
        "unreadable picture": 1,
        "no column 'file_name'": 1,
    }
    assert len(dataset.source) == 1
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.csv").write_bytes(b"file_name,text\ngood.png,fine\ngood.png,K\xe4se\n")
    dataset = Dataset(data_of("folder", tmp_path), 8)
    assert (len(dataset.source), dataset.broken) == (1, {"caption not in UTF-8": 1})


def test_damaged_records_are_counted_and_other_files_refused(tmp_path, stored):
    path = pathlib.Path(stored["array_record"].path) / "part.array_record-00000-of-00002"
    data = bytearray(path.read_bytes())
    place = data.find(b"\x89PNG")
    data[40:] = data[40:] if place < 0 else data[40:place] + bytes(30) + data[place + 30 :]
    (tmp_path / "damaged.array_record").write_bytes(data)
    dataset = None
    try:
        dataset = Dataset(data_of("array_record", tmp_path), 8)
    except UserError as error:
        assert "damaged record" in str(error)  # compressed, so one damage may take them all
    assert dataset is None or sum(dataset.broken.values()) + len(dataset.source) == COUNT // 2
    (tmp_path / "damaged.array_record").write_bytes(b"no records" * 1000)
    with pytest.raises(UserError, match="cannot read|no usable sample"):
        Dataset(data_of("array_record", tmp_path), 8)
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "damaged.array_record"), "group_size:1")
    for record in (b"\xff" * 40, b""):
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match="not a tf.train.Example: 1.*no feature 'image'|no feature 'image'.*Example: 1"):
        Dataset(data_of("array_record", tmp_path), 8)


# --- configs that cannot work -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "tar", "path": "{nowhere}/*.tar"}, "no file matches"),
        ({"source": "tar", "path": "nothing://bucket/x.tar"}, "cannot be read: Protocol not known"),
        ({"source": "tfds", "path": "no_such_set"}, "TFDS data set 'no_such_set'"),
        ({"source": "tfds", "split": "validation"}, "split 'validation'"),
        ({"source": "tfds", "image_key": "picture"}, "has the pictures image: name one with --config.data.image_key"),
        ({"source": "array_record", "image_key": "jpg"}, r"no feature 'jpg' \(there are caption, image, score\)"),
        ({"source": "array_record", "path": "gs://bucket/x"}, "read from a disk alone"),
        ({"source": "folder", "path": "{nowhere}"}, "does not exist"),
        ({"source": "tar", "captions": {"txt": 1, "synthetic": 1}}, "data.captions names 'synthetic', which no sample"),
        ({"source": "tar", "min_aesthetic": 4.7}, "no aesthetic: 14; there are captions license, txt; metadata lic"),
        ({"source": "tar", "min_side": 50}, "side under 50 px: 14"),
        ({"source": "tar", "class_names": "{nowhere}"}, "data.class_names=.* cannot be read"),
        ({"source": "tar", "held_out_shards": 2}, "has 2 shards, too few to hold some out"),
        ({"source": "tar", "max_broken": 2.0}, "data.max_broken=2.0 is a share"),
        ({"source": "tar", "mixture": {"one": {"weight": 1.0}, "two": {}}}, "give every source a weight above 0"),
        ({"source": "tar", "mixture": {"one": {"resolution": 64}}}, "data.mixture.one.resolution is unknown"),
        ({"source": "tar", "mixture": {"one": {"min_side": "x"}}}, "data.mixture.one.min_side is 'x'"),
    ],
)
def test_data_that_can_not_be_used_are_said_in_one_line(stored, tmp_path, change, message):
    base = {"path": getattr(stored.get(change["source"]), "path", "")}
    change = {key: value.format(nowhere=tmp_path / "none") if isinstance(value, str) else value
              for key, value in change.items()}  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        Dataset(data_of(**{**base, **change}), 8)
    assert "\n" not in str(error.value)


# --- mixtures ---------------------------------------------------------------------------------------------------


@settings(derandomize=True, max_examples=40)
@given(
    counts=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)).filter(any), min_size=1, max_size=3),
    weights=st.lists(st.floats(0.05, 4), min_size=3, max_size=3),
    batch_size=st.integers(1, 9),
)
def test_a_mixture_keeps_its_weights_and_every_source_its_epochs(counts, weights, batch_size):
    weights = weights[: len(counts)]
    buckets = np.concatenate([np.repeat([0, 1], pair) for pair in counts])
    sources = np.repeat(np.arange(len(counts)), [sum(pair) for pair in counts])
    plan = BatchPlan(buckets, batch_size, 3, sources, weights)
    streams, rows = collections.defaultdict(list), np.zeros(len(counts))
    for batch in range(120):
        bucket, indices = plan(batch)
        assert (buckets[indices] == bucket).all()
        for i in indices.tolist():
            streams[bucket, sources[i]].append(i)
            rows[sources[i]] += 1
    for (bucket, source), stream in streams.items():
        size = counts[source][bucket]
        for start in range(0, len(stream) - size + 1, size):
            assert len(set(stream[start : start + size])) == size
    expected = np.array(weights) / sum(weights) * rows.sum()
    np.testing.assert_allclose(rows, expected, atol=batch_size * 4 + 8)


def test_mixed_sources_keep_their_own_captions_and_filters_and_do_not_depend_on_hosts(stored, tmp_path, monkeypatch):
    for i in range(6):
        (tmp_path / "dog").mkdir(exist_ok=True)
        (tmp_path / f"dog/{i}.png").write_bytes(encode(np.full((40, 40, 3), 250, np.uint8)))
    mixture = {
        "pairs": {"weight": 3.0, "drop_aspect_over": 1.2},
        "classes": {"source": "folder", "path": str(tmp_path), "weight": 1.0, "class_template": "a photo of {}"},
    }
    config = build(DataConfig, vars(stored["tar"]) | {"mixture": mixture}, "data")
    dataset = Dataset(config, 8)
    assert dataset.dropped == {"aspect over 1.2": COUNT // 2}
    assert "mixed of pairs 7 pictures, 75%; classes 6 pictures, 25%" in dataset.summary()

    def batches(process_count: int) -> list:
        parts = []
        for process in range(process_count):
            monkeypatch.setattr("jax.process_index", lambda process=process: process)
            monkeypatch.setattr("jax.process_count", lambda: process_count)
            loader = dataset.batches(8, 0, None, with_captions=True, caption_dropout=0.2)
            parts.append([next(loader) for _ in range(20)])
            state = loader.get_state()
            loader.close()
        assert state["next_batch"] == 20
        return [[text for part in batch for text in part["caption"]] for batch in zip(*parts, strict=True)]

    captions = batches(1)
    assert captions == batches(2) == batches(4) == batches(8)
    counts = collections.Counter(text.partition(" ")[0] for batch in captions for text in batch)
    assert counts["picture"] / counts["a"] == pytest.approx(3, rel=0.35)
    assert counts[""] == pytest.approx(32, abs=15)
    monkeypatch.undo()

    # A restart in the middle, on another number of hosts.
    resumed = dataset.batches(8, 0, None, with_captions=True, caption_dropout=0.2, first=13)
    assert [next(resumed)["caption"] for _ in range(5)] == captions[13:18]
    resumed.close()


def test_a_mixture_without_weights_is_its_sources_one_after_the_other(stored):
    mixture = {"tar": {}, "folder": {"source": "folder", "path": stored["csv"].path}}
    dataset = Dataset(build(DataConfig, vars(stored["tar"]) | {"mixture": mixture}, "data"), 8)
    assert len(dataset.source) == 2 * COUNT
    one = next(loader := dataset.batches(8, 0, None))["image"]
    loader.close()
    assert one.shape[0] == 8


# --- indexes ----------------------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_again_when_its_shard_changed(tmp_path, monkeypatch, caplog):
    folder = write_tars(tmp_path / "tar", 6)
    first = IndexedSource(TarShards(folder), examine(TarShards(folder)))
    assert sorted(os.listdir(folder)) == ["00000.tar", "00000.tar.index", "00001.tar", "00001.tar.index"]

    def no_scan(self, shard):
        raise AssertionError("scanned again")

    with monkeypatch.context() as patch:
        patch.setattr(TarShards, "scan", no_scan)
        again = IndexedSource(TarShards(folder), examine(TarShards(folder)))
    assert again.fingerprint == first.fingerprint
    np.testing.assert_array_equal(again.sizes(), first.sizes())

    write_tar(folder / "00001.tar", {"9.png": encode(picture(9)), "9.txt": b"nine"})
    changed = IndexedSource(TarShards(folder), examine(TarShards(folder)))
    assert (len(changed), changed[3]["captions"]) == (4, {"txt": "nine"})
    assert changed.fingerprint != first.fingerprint

    for content in (b"", b"PAR1 no parquet PAR1", (folder / "00001.tar.index").read_bytes()[:-9]):
        (folder / "00000.tar.index").write_bytes(content)
        mended = IndexedSource(TarShards(folder), examine(TarShards(folder)))
        assert mended.fingerprint == changed.fingerprint
    assert "not an index" in caplog.text


@pytest.mark.parametrize(
    "forge",
    [
        lambda t: t.set_column(0, "start", pa.array([-1] * len(t), pa.int64())),
        lambda t: t.set_column(2, "height", pa.array([1 << 40] * len(t), pa.int64())),
        lambda t: t.set_column(2, "height", pa.array(["4"] * len(t))),
        lambda t: t.replace_schema_metadata({}),
        lambda t: t.replace_schema_metadata({"facts": "[]"}),
        lambda t: t.drop_columns(["end"]),
    ],
)
def test_a_forged_index_is_made_anew(tmp_path, forge):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    expected = IndexedSource(TarShards(folder), examine(TarShards(folder)))
    path = folder / "00000.tar.index"
    pq.write_table(forge(pq.read_table(path)), path)
    found = IndexedSource(TarShards(folder), examine(TarShards(folder)))
    assert found.fingerprint == expected.fingerprint
    np.testing.assert_array_equal(found.sizes(), expected.sizes())


def test_an_index_that_lies_about_places_breaks_its_examples_only(tmp_path):
    folder = write_tars(tmp_path / "tar", 4, shards=1)
    examine(TarShards(folder))
    path = folder / "00000.tar.index"
    table = pq.read_table(path)
    starts = table.column("start").to_numpy().copy()
    starts[1] += 512
    pq.write_table(table.set_column(0, "start", pa.array(starts)), path)
    source = IndexedSource(TarShards(folder), examine(TarShards(folder)))
    with pytest.raises(BrokenExample, match="changed since"):
        source[1]
    assert source[2]["captions"]["txt"] == caption(2)


def test_many_shards_are_indexed_by_processes_and_from_wherever_a_host_begins(tmp_path):
    folder = write_tars(tmp_path / "tar", 66, shards=33)
    source = IndexedSource(TarShards(folder), examine(TarShards(folder), first=20))
    assert len(source) == 66 and len(list(folder.glob("*.index"))) == 33
    assert [source[i]["captions"]["txt"] for i in (0, 1, 65)] == [caption(0), caption(33), caption(65)]


def test_without_the_right_to_write_indexes_are_for_one_run(tmp_path, caplog):
    folder = write_tars(tmp_path / "tar", 4)
    (tmp_path / "file").write_text("in the way")
    index._warn_once.cache_clear()
    source = IndexedSource(TarShards(folder), examine(TarShards(folder), plan=IndexPlan(str(tmp_path / "file/x"))))
    assert len(source) == 4 and "set data.index_dir" in caplog.text
    elsewhere = IndexPlan(str(tmp_path / "indexes"))
    assert len(IndexedSource(TarShards(folder), examine(TarShards(folder), plan=elsewhere))) == 4
    assert len(list((tmp_path / "indexes").glob("*.tar.index"))) == 2
    assert not list(folder.glob("*.index"))


def test_shards_are_read_through_fsspec(tmp_path):
    import fsspec

    memory, local = fsspec.filesystem("memory"), Dataset(data_of("tar", write_tars(tmp_path / "tar")), 8)
    for path in (tmp_path / "tar").glob("*.tar"):
        memory.pipe_file(f"/shards/{path.name}", path.read_bytes())
    try:
        for pattern in ("memory://shards", "memory://shards/*.tar", "memory://shards/{00000..00001}.tar"):
            remote = Dataset(data_of("tar", pattern), 8)
            assert remote.fingerprint == local.fingerprint, pattern
        assert memory.exists("/shards/00000.tar.index")
        for ours, theirs in zip(remote.source.load(range(COUNT)), local.source.load(range(COUNT)), strict=True):
            assert ours["captions"] == theirs["captions"]
            np.testing.assert_array_equal(ours["image"], theirs["image"])
        memory.rm("/shards/00001.tar")
        assert str(remote.source.load([COUNT - 1])[0]).endswith("unreadable file")
        with pytest.raises(UserError, match="1 of the 2 files"):
            Dataset(data_of("tar", "memory://shards/{00000..00001}.tar"), 8)
    finally:
        memory.rm("/shards", recursive=True)


# --- broken samples ---------------------------------------------------------------------------------------------


def test_samples_that_are_split_or_repeated_are_counted_and_left_out(tmp_path):
    png = encode(picture(0))
    names = ["a.png", "a.txt", "b.png", "c.png", "c.txt", "b.txt", "a.png", "a.txt", "d.png", "d.txt", "d.txt"]
    with (tmp_path / "0.tar").open("wb") as file:
        for i, name in enumerate(names):
            write_tar(tmp_path / "one", {name: png if name.endswith("png") else f"text {i}".encode()})
            size = 512 + -(-len(png if name.endswith("png") else b"text 0") // 512) * 512
            file.write((tmp_path / "one").read_bytes()[:size])
        file.write(bytes(1024))
    dataset = Dataset(data_of("tar", tmp_path), 8)
    assert [one["captions"]["txt"] for one in dataset.source.describe(range(3))] == ["text 1", "text 4", "text 9"]
    assert dataset.broken == {"sample split by another key": 1, "repeated key": 1, "repeated file name": 1}


def test_too_much_broken_input_stops_the_run(tmp_path, caplog):
    files = {}
    for i in range(1000):
        files |= {f"{i:04}.png": encode(picture(0)) if i < 700 else b"broken", f"{i:04}.txt": b"x"}
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(UserError, match=r"300 of 1000 samples cannot be used \(unreadable picture: 300\).*max_broken"):
        Dataset(data_of("tar", tmp_path), 8)
    dataset = Dataset(data_of("tar", tmp_path, max_broken=0.3), 8)
    assert dataset.broken == {"unreadable picture": 300}
    assert "broken unreadable picture: 300" in dataset.summary()


def test_too_many_pictures_found_broken_while_reading_stop_the_loader(tmp_path):
    files = {}
    for i in range(200):
        data = encode(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        files |= {f"{i:03}.png": data if i % 2 else data[: len(data) // 2], f"{i:03}.txt": b"x"}
    write_tar(tmp_path / "0.tar", files)
    loader = Dataset(data_of("tar", tmp_path, max_broken=0.1), 8).batches(8, 0, None)
    with pytest.raises(UserError, match=r"10\d of \d+ samples cannot be used \(damaged picture: 10\d\)"):
        for _ in range(100):
            next(loader)
    loader.close()


# --- whole runs -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["array_record", "tfds", "jsonl"])
def test_the_emoji_config_trains_on_every_kind_of_source(stored, tmp_path, kind):
    config, tiny = load_config("emoji"), tiny_config()
    config.data.update(source=stored[kind].source, path=stored[kind].path)
    for name in config.encoders:
        config.encoders[name] = tiny.encoders.llama.copy_and_resolve_references()
    config.vae.model.update(tiny.vae.model)
    config.vae.train.update(tiny.vae.train)
    config.model.update(tiny.model)
    config.train.update(steps=3, batch_size=8, sample_every=0, log_every=1)
    config.sample.update(tiny.sample)
    stages.run(config, epath.Path(tmp_path / "run"))
    lines = (tmp_path / "run/training/lidit/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
