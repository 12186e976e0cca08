"""Writes the same images and captions in every storage format that a source reads."""

import csv
import io
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from test_tar_source import encode, write_tar

from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig

COUNT = 14
CLASSES = ("cat", "dog")


def numbered_image(i: int) -> np.ndarray:
    return np.full((40, 40 + 20 * (i % 2), 3), 10 * i % 250, np.uint8)


def caption(i: int) -> str:
    return f"image {i} 图"


def write_tars(folder: pathlib.Path, count: int = COUNT, shards: int = 2) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    for shard in range(shards):
        files = {}
        for i in range(shard, count, shards):
            files |= {f"{i:03}.png": encode(numbered_image(i)), f"{i:03}.txt": caption(i).encode()}
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
            feature["image"].bytes_list.value.append(encode(numbered_image(i)))
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

    words = {"caption": tfds.features.Text()} if texts else {"label": tfds.features.ClassLabel(names=CLASSES)}
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "score": np.float32, **words})
    samples = []
    for i in range(COUNT):
        word = {"caption": caption(i)} if texts else {"label": i % 2}
        samples.append({"image": io.BytesIO(encode(numbered_image(i))), "score": i, **word})
    return write_tfds_samples(folder, features, samples)


def write_tfds_samples(folder: pathlib.Path, features, samples: Sequence[dict[str, Any]]) -> str:
    """Prepares a TFDS data set and returns its folder."""
    import tensorflow_datasets as tfds

    folder.mkdir(exist_ok=True)
    with tfds.core.registered.skip_registration():

        class Tiny(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            pkg_dir_path = folder

            def _info(self):
                return self.dataset_info_from_configs(features=features)

            def _split_generators(self, manager):
                return {"train": enumerate(samples)}

            def _generate_examples(self):
                raise NotImplementedError

    builder = Tiny(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_path)


def write_folder(folder: pathlib.Path, kind: str) -> pathlib.Path:
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(COUNT):
        (folder / f"images/{i}.png").write_bytes(encode(numbered_image(i)))
        rows.append({"file_name": f"images/{i}.png", "text": caption(i), "score": i})
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


def write_parquet(folder: pathlib.Path, count: int = COUNT, shards: int = 2, **options) -> pathlib.Path:
    """Writes images as Hugging Face data sets embed them."""
    folder.mkdir(exist_ok=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard in range(shards):
        numbers = range(shard, count, shards)
        images = [{"bytes": encode(numbered_image(i)), "path": f"{i}.png"} for i in numbers]
        columns = {"image": pa.array(images, image), "text": list(map(caption, numbers)), "score": list(numbers)}
        pq.write_table(pa.table(columns), folder / f"{shard:05}.parquet", **{"row_group_size": 3, **options})
    return folder


def data_of(source: str, path, **more) -> DataConfig:
    return build(DataConfig, {"source": source, "path": str(path), "resolution": 32, "max_aspect": 2.0, **more}, "data")
