"""Split, repeated and damaged samples are counted and left out; too many of them stop a run."""

import numpy as np
import pytest
from stored_data import data_of, numbered_image
from test_tar_source import encode, write_tar

from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError


def test_samples_that_are_split_or_repeated_are_counted_and_left_out(tmp_path):
    png = encode(numbered_image(0))
    names = ["a.png", "a.txt", "b.png", "c.png", "c.txt", "b.txt", "a.png", "a.txt", "d.png", "d.txt", "d.txt"]
    with (tmp_path / "0.tar").open("wb") as file:
        for i, name in enumerate(names):
            write_tar(tmp_path / "one", {name: png if name.endswith("png") else f"text {i}".encode()})
            size = 512 + -(-len(png if name.endswith("png") else b"text 0") // 512) * 512
            file.write((tmp_path / "one").read_bytes()[:size])
        file.write(bytes(1024))
    dataset = open_dataset(data_of("tar", tmp_path), 8)
    assert [one["captions"]["txt"] for one in dataset.source.describe(range(3))] == ["text 1", "text 4", "text 9"]
    assert dataset.broken == {"sample split by another key": 1, "repeated key": 1, "repeated file name": 1}


def test_too_much_broken_input_stops_the_run(tmp_path, caplog):
    files = {}
    for i in range(1000):
        files |= {f"{i:04}.png": encode(numbered_image(0)) if i < 700 else b"broken", f"{i:04}.txt": b"x"}
    write_tar(tmp_path / "0.tar", files)
    with pytest.raises(UserError, match=r"300 of 1000 samples cannot be used \(unreadable image: 300\).*max_broken"):
        open_dataset(data_of("tar", tmp_path), 8)
    dataset = open_dataset(data_of("tar", tmp_path, max_broken=0.3), 8)
    assert dataset.broken == {"unreadable image": 300}
    assert "broken unreadable image: 300" in dataset.summary()


def test_too_many_images_found_broken_while_reading_stop_the_loader(tmp_path):
    files = {}
    for i in range(200):
        data = encode(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        files |= {f"{i:03}.png": data if i % 2 else data[: len(data) // 2], f"{i:03}.txt": b"x"}
    write_tar(tmp_path / "0.tar", files)
    loader = open_dataset(data_of("tar", tmp_path, max_broken=0.1), 8).batches(8, 0, None)
    with pytest.raises(UserError, match=r"10\d of \d+ samples cannot be used \(damaged image: 10\d\)"):
        for _ in range(100):
            next(loader)
    loader.close()
