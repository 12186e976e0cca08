"""All kinds of sources return the same images and captions; their errors; training on each of them."""

import collections
import io
import json
import pathlib

import numpy as np
import pytest
from conftest import load_config, tiny_config
from etils import epath
from stored_data import (
    CLASSES,
    COUNT,
    caption,
    data_of,
    numbered_image,
    write_array_records,
    write_tfds,
    write_tfds_samples,
)
from test_tar_source import encode, write_tar

from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError
from lidit_jax.stages.run import run_stages

KINDS = ("tar", "embedded", "array_record", "tfds", "jsonl", "csv", "parquet")


# --- kinds of sources -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_returns_the_same_images_and_captions(stored, kind):
    dataset = open_dataset(stored[kind], 8)
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
        np.testing.assert_array_equal(found[caption(i)], numbered_image(i))
    assert set(dataset.captions(5, 0)) <= set(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 1])
def test_every_kind_of_source_feeds_the_loader_also_from_worker_processes(stored, kind, workers):
    if workers and kind in ("csv", "parquet"):
        pytest.skip("as jsonl")
    dataset = open_dataset(build(DataConfig, vars(stored[kind]) | {"num_workers": workers}, "data"), 8)
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
        (path / f"{i}.png").write_bytes(encode(numbered_image(i)))
    files = {}
    for i in range(COUNT):
        files |= {f"{i:03}.png": encode(numbered_image(i)), f"{i:03}.cls": str(i % 2).encode()}
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
        captions = collections.Counter(open_dataset(config, 8).captions(COUNT, 0))
        assert captions == {"a photo of cat": COUNT // 2, "a photo of dog": COUNT // 2}, config.source


def test_broken_rows_of_a_folder_are_counted_by_reason(tmp_path):
    (tmp_path / "good.png").write_bytes(encode(numbered_image(0)))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
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
    dataset = open_dataset(data_of("folder", tmp_path), 8)
    assert dataset.broken == {
        "unreadable json": 1,
        "file outside the folder": 2,
        "no image": 1,
        "empty image": 1,
        "unreadable image": 1,
        "no column 'file_name'": 1,
    }
    assert len(dataset.source) == 1
    (tmp_path / "captions.jsonl").unlink()
    (tmp_path / "captions.csv").write_bytes(b"file_name,text\ngood.png,fine\ngood.png,K\xe4se\n")
    dataset = open_dataset(data_of("folder", tmp_path), 8)
    assert (len(dataset.source), dataset.broken) == (1, {"caption not in UTF-8": 1})


def test_damaged_records_are_counted_and_other_files_rejected(tmp_path, stored):
    path = pathlib.Path(stored["array_record"].path) / "part.array_record-00000-of-00002"
    data = bytearray(path.read_bytes())
    place = data.find(b"\x89PNG")
    data[40:] = data[40:] if place < 0 else data[40:place] + bytes(30) + data[place + 30 :]
    (tmp_path / "damaged.array_record").write_bytes(data)
    dataset = None
    try:
        dataset = open_dataset(data_of("array_record", tmp_path), 8)
    except UserError as error:
        assert "damaged record" in str(error)  # records are compressed together, so one damaged byte may affect all
    assert dataset is None or sum(dataset.broken.values()) + len(dataset.source) == COUNT // 2
    (tmp_path / "damaged.array_record").write_bytes(b"no records" * 1000)
    with pytest.raises(UserError, match="cannot read|no usable sample"):
        open_dataset(data_of("array_record", tmp_path), 8)
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(tmp_path / "damaged.array_record"), "group_size:1")
    for record in (b"\xff" * 40, b""):
        writer.write(record)
    writer.close()
    with pytest.raises(UserError, match="not a tf.train.Example: 1.*no feature 'image'|no feature 'image'.*Example: 1"):
        open_dataset(data_of("array_record", tmp_path), 8)


def test_features_of_records_that_are_neither_image_nor_text_are_ignored(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1")
    for texts in ([b"one"], [b"one", b"two"], [b"K\xe4se"]):
        example = tf_example_pb2.Example()
        feature = example.features.feature
        feature["image"].bytes_list.value.append(encode(numbered_image(0)))
        feature["caption"].bytes_list.value.extend(texts)
        feature["mask"].bytes_list.value.append(encode(numbered_image(1)))
        feature["raw_mask"].bytes_list.value.append(bytes(100))
        feature["audio"].float_list.value.extend([0.5] * 100)
        feature["box"].float_list.value.extend([0.0, 0.0, 1.0, 1.0])
        feature["score"].float_list.value.append(3)
        feature["empty"].SetInParent()
        writer.write(example.SerializeToString())
    writer.close()
    dataset = open_dataset(data_of("array_record", tmp_path), 8)
    assert dataset.broken == {"caption not in UTF-8": 1}
    found = dataset.source.describe(range(2))
    assert [example["captions"] for example in found] == [
        {"caption": "one"},
        {"caption/0": "one", "caption/1": "two"},
    ]
    assert [example["metadata"] for example in found] == [{"score": 3.0}] * 2


def test_features_of_tfds_that_are_neither_image_nor_text_are_not_decoded(tmp_path):
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            "mask": tfds.features.Image(shape=(None, None, 1)),
            "audio": tfds.features.Audio(),
            "video": tfds.features.Video(shape=(None, 8, 8, 3)),
            "box": tfds.features.BBoxFeature(),
            "tensor": tfds.features.Tensor(shape=(100, 100), dtype=np.float32),
            "ragged": tfds.features.Sequence(tfds.features.Sequence(np.int64)),
            "objects": tfds.features.Sequence({"label": tfds.features.ClassLabel(names=CLASSES), "area": np.int64}),
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
            "about": {"title": tfds.features.Text(), "score": np.float32},
            "label": tfds.features.ClassLabel(names=CLASSES),
        }
    )
    sample = {
        "image": io.BytesIO(encode(numbered_image(0))),
        "mask": np.zeros((300, 300, 1), np.uint8),
        "audio": np.zeros(1000, np.int64),
        "video": np.zeros((2, 8, 8, 3), np.uint8),
        "box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
        "tensor": np.zeros((100, 100), np.float32),
        "ragged": [[1, 2], [3]],
        "objects": [{"label": "cat", "area": 5}] * 3,
        "captions": [{"text": "one", "id": 1}, {"text": "two", "id": 2}],
        "about": {"title": "a title", "score": 4},
        "label": "dog",
    }
    path = write_tfds_samples(tmp_path, features, [sample])
    [example] = open_dataset(data_of("tfds", path), 8).source.describe([0])
    assert example["captions"] == {
        "captions/text/0": "one",
        "captions/text/1": "two",
        "about/title": "a title",
        "class": "dog",
    }
    assert example["metadata"] == {"about/score": 4.0}
    with pytest.raises(UserError, match="has the images image, mask: name one with --config.data.image_key"):
        open_dataset(data_of("tfds", path, image_key="photo"), 8)


def test_the_only_image_of_a_tfds_data_set_is_used_whatever_its_name(tmp_path):
    import tensorflow_datasets as tfds

    words = {"caption": tfds.features.Text()}
    features = tfds.features.FeaturesDict({"inputs": {"photo": tfds.features.Image()}, **words})
    sample = {"inputs": {"photo": io.BytesIO(encode(numbered_image(3)))}, "caption": "one"}
    path = write_tfds_samples(tmp_path / "a", features, [sample])
    dataset = open_dataset(data_of("tfds", path), 8)
    assert dataset.captions(1, 0) == ["one"]

    path = write_tfds_samples(tmp_path / "b", tfds.features.FeaturesDict(words), [{"caption": "one"}])
    with pytest.raises(UserError, match="has no image: its features are caption"):
        open_dataset(data_of("tfds", path), 8)


# --- invalid configs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "tar", "path": "{nowhere}/*.tar"}, "no file matches"),
        ({"source": "tar", "path": "nothing://bucket/x.tar"}, "cannot be read: Protocol not known"),
        ({"source": "tfds", "path": "no_such_set"}, "TFDS data set 'no_such_set'"),
        ({"source": "tfds", "split": "validation"}, "split 'validation'"),
        ({"source": "tfds", "image_key": "photo"}, "has the images image: name one with --config.data.image_key"),
        ({"source": "array_record", "image_key": "jpg"}, r"no feature 'jpg' \(there are caption, image, score\)"),
        ({"source": "array_record", "path": "gs://bucket/x"}, "can only be read from a disk"),
        ({"source": "folder", "path": "{nowhere}"}, "does not exist"),
        ({"source": "tar", "captions": {"txt": 1, "synthetic": 1}}, "data.captions names 'synthetic', which no sample"),
        ({"source": "tar", "min_aesthetic": 4.7}, "no aesthetic: 14; there are texts license, txt; metadata lic"),
        ({"source": "tar", "min_side": 50}, "side under 50 px: 14"),
        ({"source": "tar", "class_names": "{nowhere}"}, "data.class_names=.* cannot be read"),
        ({"source": "tar", "held_out_shards": 2}, "has 2 shards, too few to hold some out"),
        ({"source": "tar", "max_broken": 2.0}, "data.max_broken=2.0 must be from 0 to 1"),
        ({"source": "tar", "mixture": {"one": {"weight": 1.0}, "two": {}}}, "give every source a weight above 0"),
        ({"source": "tar", "mixture": {"one": {"resolution": 64}}}, "data.mixture.one.resolution is unknown"),
        ({"source": "tar", "mixture": {"one": {"min_side": "x"}}}, "data.mixture.one.min_side is 'x'"),
        ({"source": "tar", "mixture": {"one": {"weight": 0}}}, "data.mixture.one.weight=0 must be above 0"),
    ],
)
def test_unusable_data_raise_a_one_line_error(stored, tmp_path, change, message):
    base = {"path": getattr(stored.get(change["source"]), "path", "")}
    change = {key: value.format(nowhere=tmp_path / "none") if isinstance(value, str) else value
              for key, value in change.items()}  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        open_dataset(data_of(**{**base, **change}), 8)
    assert "\n" not in str(error.value)


# --- training runs ----------------------------------------------------------------------------------------------


@pytest.mark.slow  # the loader is tested above with every kind, and a run sees its batches alone
@pytest.mark.parametrize("kind", ["embedded", "jsonl"])
def test_the_emoji_config_trains_on_embedded_images_and_on_a_folder(stored, trained_workdir, tmp_path, kind):
    config, tiny = load_config("emoji"), tiny_config()
    config.data.update(source=stored[kind].source, path=stored[kind].path)
    for name in config.encoders:
        config.encoders[name] = tiny.encoders.llama.copy_and_resolve_references()
    config.vae.model.update(tiny.vae.model)
    config.vae.train.update(tiny.vae.train)
    if kind != "jsonl":  # one kind trains all networks, the other LI-DiT alone
        for name in config.encoders:
            config.encoders[name].weights = str(trained_workdir / "encoders" / name)
        config.vae.weights = str(trained_workdir / "vae")
    config.model.update(tiny.model)
    config.train.update(steps=3, batch_size=8, sample_every=0, log_every=1)
    config.sample.update(tiny.sample)
    run_stages(config, epath.Path(tmp_path / "run"))
    lines = (tmp_path / "run/training/lidit/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
