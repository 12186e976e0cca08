"""Folders of latents say which of their texts are captions."""

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from stored_data import data_of

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.precomputed import MANIFEST, Manifest, to_record
from lidit_jax.files import write_json


def test_a_folder_of_latents_says_which_texts_are_captions(tmp_path):
    writer = ArrayRecordWriter(str(tmp_path / "0.array_record"), "group_size:1")
    for i in range(3):
        captions = {"caption/0": f"one {i}", "caption/1": f"two {i}", "synthetic": f"three {i}"}
        writer.write(to_record(str(i), captions, np.zeros((8, 8, 2), np.float16), {}, []))
    writer.close()
    manifest = Manifest("data", "vae", "float16", 4, 1, (Bucket(32, 32),), files=(("0.array_record", 0, 3),))
    write_json(epath.Path(tmp_path) / MANIFEST, manifest.to_json())
    summary = open_dataset(data_of("precomputed", tmp_path, max_aspect=1.0), 32).summary()
    assert "captions in a few samples from caption (3), synthetic (3)" in summary
    config = data_of("precomputed", tmp_path, max_aspect=1.0, captions={"synthetic": 1.0})
    assert "from synthetic (3), not from the other texts caption (" in open_dataset(config, 32).summary()
    assert "captions" not in open_dataset(config, 32, with_captions=False).summary()
