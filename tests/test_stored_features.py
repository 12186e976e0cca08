"""Caption features computed ahead of training: training on them equals training on the captions."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from test_precompute import changed, config, losses  # noqa: F401

from lidit_jax import experiment
from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.indexed.dataset import IndexedDataset
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.precomputed import PrecomputedSource, to_record
from lidit_jax.data.stored_features import DTYPES, load_tensors
from lidit_jax.errors import UserError
from lidit_jax.precompute.latents import precompute
from lidit_jax.stages.run import run_stages
from lidit_jax.text.load_encoder import load_encoder


@pytest.fixture(scope="module")
def two_kinds(config, t5_folder):  # noqa: F811
    """Config with an LLM, whose prefix all prompts share, and a T5, which computes a prefix per prompt."""
    two = config.copy_and_resolve_references()
    two.encoders.qwen.weights = str(t5_folder)
    two.text.max_length = 5  # truncates some captions
    two.data.max_aspect = 1.0  # a single bucket, so that each run compiles one program
    return two


@pytest.fixture(scope="module")
def folder(two_kinds, tmp_path_factory):
    out = epath.Path(tmp_path_factory.mktemp("features") / "out")
    precompute(two_kinds, out, batch_size=8, dtype="float32", with_features=True)
    return out


def dataset_of(config, folder, **more) -> IndexedDataset:  # noqa: F811
    return open_dataset(data_of(config, folder, **more), 8)


def data_of(config, folder, **more) -> DataConfig:  # noqa: F811
    data = experiment.Experiment(config, epath.Path("unused")).data
    return build(DataConfig, vars(data) | {"source": "precomputed", "path": str(folder)} | more, "data")


def test_training_on_features_is_training_on_the_captions(two_kinds, folder, tmp_path, monkeypatch):
    assert (folder / "features.safetensors").exists()
    run_stages(two_kinds, epath.Path(tmp_path / "captions"))
    ahead = changed(two_kinds, source="precomputed", path=str(folder))
    monkeypatch.setattr(experiment, "load_encoder", lambda *_, **__: pytest.fail("the encoders are not needed"))
    run_stages(ahead, epath.Path(tmp_path / "features"))
    np.testing.assert_allclose(losses(tmp_path / "features"), losses(tmp_path / "captions"), rtol=1e-5)
    lines = [(tmp_path / name / "training/lidit/metrics.jsonl").read_text() for name in ("captions", "features")]
    cut = [[json.loads(line)["truncated_prompts"] for line in text.splitlines()] for text in lines]
    assert cut[0] == cut[1] and max(cut[0]) > 0


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_what_the_encoders_give(two_kinds, folder, workers):
    dataset = dataset_of(two_kinds, folder, num_workers=workers)
    loader = dataset.batches(8, 0, None, caption_dropout=0.3, with_captions=True, with_features=True)
    batch = next(loader)
    loader.close()
    assert "" in batch["caption"]
    part = experiment.Experiment(two_kinds, epath.Path("unused"))
    stored = dataset.stored_prompts()
    for name in ("llama", "qwen"):
        encoder, frozen = load_encoder(part.encoder_folder(name), part.prompt_tokenizer, dtype="float32")
        tokens = encoder.tokenizer(batch["caption"])
        expected = np.asarray(encoder.encode_prompts(frozen, tokens["tokens"], tokens["mask"]))
        np.testing.assert_array_equal(batch[f"{name}/mask"], tokens["mask"])
        np.testing.assert_array_equal(batch[f"{name}/truncated"], tokens["truncated"])
        lead = encoder.lead
        assert (lead > 0) == (name == "qwen")
        valid = np.concatenate([np.ones((8, lead), bool), tokens["mask"]], axis=1)
        got = batch[f"{name}/encoded"]
        assert got.shape == expected.shape
        np.testing.assert_allclose(got[valid], expected[valid], atol=1e-5 * np.abs(expected).max())
        assert not got[~valid].any()
        if not lead:
            np.testing.assert_allclose(stored.prefix[name], frozen.prefix_features, atol=1e-5)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_features_are_stored_bit_for_bit(dtype):
    features = np.random.default_rng(0).normal(size=(3, 8)).astype(DTYPES[dtype])
    record = to_record("key", {"txt": "words"}, np.zeros((1, 1, 2), np.float16), {("llama", "txt"): features}, [])
    got = load_tensors(record)["features/llama/txt"]
    assert got.dtype == features.dtype
    assert got.tobytes() == features.tobytes()


def test_the_latents_alone_can_be_used(two_kinds, folder):
    dataset = dataset_of(two_kinds, folder, features=False)
    assert dataset.stored_prompts() is None
    assert set(dataset.source[0]) == {"key", "captions", "metadata", "moments"}
    dataset.check_features({})


def test_features_of_other_encoders_or_texts_are_rejected(two_kinds, folder, trained_workdir, tmp_path):
    ahead = changed(two_kinds, source="precomputed", path=str(folder))
    other = ahead.copy_and_resolve_references()
    other.encoders.qwen.weights = str(trained_workdir / "encoders" / "qwen")
    with pytest.raises(UserError, match=r"of other encoders, or of other texts around the prompts \(qwen differ\)"):
        run_stages(other, epath.Path(tmp_path / "run"))
    other = ahead.copy_and_resolve_references()
    other.text.instruction = "Describe:"
    with pytest.raises(UserError, match=r"\(llama, qwen differ\): name those, compute the features again, or give"):
        run_stages(other, epath.Path(tmp_path / "run"))
    with pytest.raises(UserError, match="the mixture's latents hold the features of different encoders"):
        parts = {"a": {}, "b": {"features": False}}
        dataset_of(two_kinds, folder, mixture=parts).stored_prompts()
    assert not (tmp_path / "run").exists()


def test_errors_say_what_features_require(two_kinds, tmp_path):
    missing = two_kinds.copy_and_resolve_references()
    missing.encoders.llama.weights = ""
    with pytest.raises(UserError, match="give --config.encoders.llama.weights=FOLDER"):
        precompute(missing, epath.Path(tmp_path / "out"), batch_size=8, dtype="float32", with_features=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lead": -1}, "not what `python -m lidit_jax.precompute` writes"),
        ({"hidden_size": 17}, "missing or damaged"),
        ({"dtype": "float64"}, "not what `python -m lidit_jax.precompute` writes"),
        ({"dtype": "bfloat16"}, "missing or damaged"),
    ],
)
def test_forged_encoder_fingerprints_are_rejected(two_kinds, folder, tmp_path, change, message):
    for file in folder.iterdir():
        (epath.Path(tmp_path) / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["encoders"]["llama"] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message):
        dataset_of(two_kinds, tmp_path)


def test_a_record_whose_features_do_not_fit_is_a_broken_example(two_kinds, folder):
    source: PrecomputedSource = dataset_of(two_kinds, folder).source
    facts = source.encoders["llama"]
    source.encoders = source.encoders | {"llama": dataclasses.replace(facts, max_length=2)}
    found = source.load(range(len(source)))
    assert all(getattr(example, "reason", "") == "damaged record" for example in found)
