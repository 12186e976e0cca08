"""Precomputed latents: training on them equals training on the images, and mismatched data or models are rejected."""

import json
import os

import jax
import numpy as np
import pytest
import safetensors.numpy
from conftest import tiny_config
from etils import epath
from stored_data import write_tars
from test_tar_source import encode, write_tar

from lidit_jax import experiment
from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.precomputed import PrecomputedSource
from lidit_jax.errors import UserError
from lidit_jax.precompute.latents import _write_output, precompute
from lidit_jax.preview.contact_sheet import draw_contact_sheet
from lidit_jax.stages.run import run_stages


@pytest.fixture(scope="module")
def config(trained_workdir, tmp_path_factory):
    """Config with tar shards in three buckets and the encoders and VAE of the tiny demo."""
    config = tiny_config()
    folder = write_tars(tmp_path_factory.mktemp("data") / "tar", 30)
    config.data.update(source="tar", path=str(folder), max_aspect=2.0)
    with config.ignore_type():
        config.data.captions = None
    for name in config.encoders:
        config.encoders[name].weights = str(trained_workdir / "encoders" / name)
    config.vae.weights = str(trained_workdir / "vae")
    config.train.update(steps=3)
    with config.unlocked():
        del config.evaluate
    return config


def changed(config, **data):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.update(**data)
    return config


@pytest.fixture(scope="module")
def latents(config, tmp_path_factory):
    out = epath.Path(tmp_path_factory.mktemp("latents") / "out")
    precompute(config, out, batch_size=8, dtype="float32")
    return out


def losses(workdir) -> list[float]:
    lines = (workdir / "training/lidit/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow  # test_stored_features.py covers the same path, with features
def test_training_on_latents_is_training_on_the_images(config, latents, tmp_path):
    assert sorted(path.name for path in latents.iterdir()) == [
        "001-000000.array_record",
        "002-000000.array_record",
        "manifest.json",
    ]
    run_stages(config, epath.Path(tmp_path / "images"))
    ahead = changed(config, source="precomputed", path=str(latents))
    run_stages(ahead, epath.Path(tmp_path / "latents"))
    np.testing.assert_allclose(losses(tmp_path / "latents"), losses(tmp_path / "images"), rtol=1e-5)
    assert len(losses(tmp_path / "latents")) == 3


def test_batches_hold_the_same_examples_in_the_same_order(config, latents):
    sets = [
        open_dataset(experiment.Experiment(one, epath.Path("unused")).data, 8)
        for one in (config, changed(config, source="precomputed", path=str(latents)))
    ]
    loaders = [one.batches(8, 0, None, with_captions=True, caption_dropout=0.1) for one in sets]
    for _ in range(6):
        images, moments = (next(loader) for loader in loaders)
        assert moments["caption"] == images["caption"]
        height, width = images["image"].shape[1:3]
        assert moments["moments"].shape == (8, height // 8, width // 8, 32)
    for loader in loaders:
        loader.close()


def test_half_the_bytes_are_close_to_all(config, latents, tmp_path):
    precompute(config, epath.Path(tmp_path / "half"), batch_size=3, dtype="float16")
    buckets = open_dataset(experiment.Experiment(config, epath.Path("unused")).data, 8).buckets
    whole, half = (PrecomputedSource(str(folder), buckets) for folder in (latents, tmp_path / "half"))
    for ours, theirs in zip(whole.load(range(30)), half.load(range(30)), strict=True):
        assert theirs["moments"].dtype == np.float16
        np.testing.assert_allclose(theirs["moments"], ours["moments"], rtol=2e-3, atol=1e-3)


def test_an_interrupted_run_goes_on_and_makes_the_same_files(config, latents, tmp_path, monkeypatch):
    out = epath.Path(tmp_path / "out")
    written = []

    def stop_before_the_second(file, *arguments):
        written.append(file.name)
        if len(written) == 2:
            raise KeyboardInterrupt
        _write_output(file, *arguments)

    monkeypatch.setattr("lidit_jax.precompute.latents._write_output", stop_before_the_second)
    with pytest.raises(KeyboardInterrupt):
        precompute(config, out, batch_size=8, dtype="float32")
    with pytest.raises(UserError, match="incomplete: run `python -m lidit_jax.precompute` again"):
        open_dataset(experiment.Experiment(changed(config, source="precomputed", path=str(out)), out).data, 8)
    with pytest.raises(UserError, match="holds latents with dtype=float32, now float16: use another --out"):
        precompute(config, out, batch_size=8, dtype="float16")
    with pytest.raises(UserError, match="out holds latents without the features of llama, which --features now adds"):
        precompute(config, out, batch_size=8, dtype="float32", with_features=True)
    precompute(config, out, batch_size=8, dtype="float32")
    assert written == ["001-000000.array_record", "002-000000.array_record", "002-000000.array_record"]
    assert (out / "manifest.json").read_text() == (latents / "manifest.json").read_text()
    before = {path.name: os.stat(path).st_mtime_ns for path in out.iterdir()}
    precompute(config, out, batch_size=8, dtype="float32")
    assert {path.name: os.stat(path).st_mtime_ns for path in out.iterdir()} == before


def test_broken_images_are_left_out(config, tmp_path):
    files = {}
    for i in range(8):
        data = encode(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        files |= {f"{i}.png": data if i != 3 else data[: len(data) // 2], f"{i}.txt": str(i).encode()}
    write_tar(tmp_path / "0.tar", files)
    precompute(changed(config, path=str(tmp_path)), epath.Path(tmp_path / "out"), batch_size=8, dtype="float16")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (manifest["left_out"], [count for _, _, count in manifest["files"]]) == (1, [7])


def test_what_does_not_belong_together_is_refused(config, latents, trained_workdir, tmp_path):
    ahead = changed(config, source="precomputed", path=str(latents))
    run = epath.Path(tmp_path / "run")
    theirs = "computed for 3 buckets from 40x24 to 24x40, multiples of 8 px, the run has 1 bucket from 32x32 to 32x32"
    for change in ({"max_aspect": 1.0}, {"bucket_multiple": 16}):
        with pytest.raises(UserError, match=f"{theirs}.*: use the same .* data.bucket_multiple, or compute"):
            run_stages(changed(ahead, **change), run)
    other = ahead.copy_and_resolve_references()
    other.vae.weights = str(tmp_path / "vae")
    epath.Path(tmp_path / "vae").mkdir()
    for file in (trained_workdir / "vae").iterdir():
        file.copy(epath.Path(tmp_path / "vae") / file.name)
    values = json.loads((tmp_path / "vae/config.json").read_text())
    (tmp_path / "vae/config.json").write_text(json.dumps(values | {"scaling_factor": 0.5}))
    with pytest.raises(UserError, match="computed by another VAE"):
        run_stages(other, run)
    own = ahead.copy_and_resolve_references()
    own.vae.weights = ""
    with pytest.raises(UserError, match=r"give --config\.vae\.weights=FOLDER"):
        run_stages(own, run)
    with pytest.raises(UserError, match=r"give --config\.vae\.weights=FOLDER"):
        precompute(own, run, 8, "float16")
    with pytest.raises(UserError, match="holds latents, no images"):
        draw_contact_sheet(ahead, epath.Path(tmp_path / "sheet.png"), 8)
    with pytest.raises(UserError, match=r"manifest.json: does not exist: create it with"):
        run_stages(changed(ahead, path=str(tmp_path / "none")), run)
    with pytest.raises(UserError, match="is not empty and holds no latents"):
        precompute(config, epath.Path(tmp_path / "vae"), 8, "float16")
    assert not run.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values | {"format": 4}, "format 4 is unknown, this version reads 1 to 3"),
        (lambda values: values | {"format": 2}, "of format 2, which holds texts that are no captions"),
        (lambda values: values | {"files": [["../x", 0, 3]]}, "invalid values"),
        (lambda values: values | {"files": [["001-000000.array_record", 99, 3]]}, "invalid values"),
        (lambda values: values | {"dtype": "object"}, "invalid values"),
        (lambda values: {"format": 1}, "not what `python -m lidit_jax.precompute` writes"),
        (lambda values: [], "not what"),
        (lambda values: values | {"cell": "8"}, "invalid values"),
        (lambda values: values | {"channels": None}, "invalid values"),
        (lambda values: values | {"buckets": [[float("inf"), 8]]}, "not what"),
        (lambda values: values | {"encoders": {"llama": {"lead": 0.0}}}, "not what"),
        (lambda values: values | {"files": [["001-000000.array_record", 1, 3]]}, "15 records instead of 3"),
    ],
)
def test_a_forged_manifest_is_refused(config, latents, tmp_path, change, message):
    folder = epath.Path(tmp_path / "forged")
    folder.mkdir()
    for file in latents.iterdir():
        file.copy(folder / file.name)
    values = change(json.loads((latents / "manifest.json").read_text()))
    (folder / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=message):
        open_dataset(experiment.Experiment(changed(config, source="precomputed", path=str(folder)), folder).data, 8)


def test_a_damaged_record_is_another_ones_place(config, latents, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    buckets = open_dataset(experiment.Experiment(config, epath.Path("unused")).data, 8).buckets
    folder = epath.Path(tmp_path / "damaged")
    folder.mkdir()
    for file in latents.iterdir():
        file.copy(folder / file.name)
    writer = ArrayRecordWriter(str(folder / "001-000000.array_record"), "group_size:1")
    for record in [b"", b"\xff" * 50, json.dumps({}).encode(), *[b"x"] * 12]:
        writer.write(record)
    writer.close()
    source = PrecomputedSource(str(folder), buckets)
    assert [str(one).rpartition(": ")[2] for one in source.load(range(3))] == ["damaged record"] * 3
    assert source.load([20])[0]["moments"].shape[-1] == 32
    assert jax.tree.leaves(source.describe([20]))


def test_folders_of_latents_are_mixed_but_not_with_images(config, latents):
    ahead = {"source": "precomputed", "path": str(latents)}
    data = experiment.Experiment(config, epath.Path("unused")).data
    mixed = open_dataset(build(DataConfig, vars(data) | {"mixture": {"a": ahead, "b": ahead}}, "data"), 8)
    assert len(mixed.source) == 60 and mixed.holds_latents
    loader = mixed.batches(8, 0, None, with_captions=True)
    assert next(loader)["moments"].shape[-1] == 32
    loader.close()
    with pytest.raises(UserError, match="the mixture has images and latents"):
        open_dataset(build(DataConfig, vars(data) | {"mixture": {"a": ahead, "b": {}}}, "data"), 8)


def test_latents_of_classes_hold_the_caption_in_its_template(config, tmp_path):
    (tmp_path / "data/dog").mkdir(parents=True)
    (tmp_path / "data/dog/0.png").write_bytes(encode(np.zeros((40, 40, 3), np.uint8)))
    classes = changed(config, source="folder", path=str(tmp_path / "data"), class_template="a photo of {}")
    precompute(classes, epath.Path(tmp_path / "out"), 8, "float16")
    ahead = changed(classes, source="precomputed", path=str(tmp_path / "out"))
    dataset = open_dataset(experiment.Experiment(ahead, epath.Path("unused")).data, 8)
    assert dataset.captions(1, 0) == ["a photo of dog"]


ODD_TEXTS = [
    *({"key": "a", "captions": captions} for captions in ([], None, {}, {"txt": 5}, {"txt": ""}, {"url": "x"}, "abc")),
    *([], 5, None, {}, {"key": "a"}),
]


def test_records_with_odd_texts_are_broken_examples(config, latents, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    manifest = json.loads((latents / "manifest.json").read_text())
    texts = [json.dumps(text).encode() for text in ODD_TEXTS] + [b"[" * 100_000, b"\xff", b""]
    [name, bucket, _] = manifest["files"][0]
    height, width = manifest["buckets"][bucket]
    moments = np.zeros((height // 8, width // 8, 32), np.float32)
    good = json.dumps({"key": "good", "captions": {"txt": "words"}}).encode()
    records = [(text, moments) for text in texts] + [(good, moments * np.nan), (good, moments)]
    writer = ArrayRecordWriter(os.fspath(tmp_path / name), "group_size:1")
    for text, array in records:
        writer.write(safetensors.numpy.save({"moments": array, "text": np.frombuffer(text, np.uint8)}))
    writer.close()
    manifest["files"] = [[name, bucket, len(records)]]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    ahead = changed(config, source="precomputed", path=str(tmp_path))
    dataset = open_dataset(experiment.Experiment(ahead, epath.Path("unused")).data, 8)
    reasons = [getattr(example, "reason", None) for example in dataset.source.load(range(len(records)))]
    assert reasons[-1] is None
    assert set(reasons[:-1]) == {"damaged record", "unreadable json", "no caption"}
