"""Mixtures of sources: weights, epochs, filters and captions, independent of the number of hosts."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_data import COUNT
from test_tar_source import encode

from lidit_jax.config import build
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.indexed.batch_plan import BatchPlan
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError


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
    dataset = open_dataset(config, 8)
    assert dataset.dropped == {"aspect over 1.2": COUNT // 2}
    assert "mixed of pairs 7 images, 75%; classes 6 images, 25%" in dataset.summary()

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
    assert counts["image"] / counts["a"] == pytest.approx(3, rel=0.35)
    assert counts[""] == pytest.approx(32, abs=15)
    monkeypatch.undo()

    # Resumes in the middle, on another number of hosts.
    resumed = dataset.batches(8, 0, None, with_captions=True, caption_dropout=0.2, first=13)
    assert [next(resumed)["caption"] for _ in range(5)] == captions[13:18]
    resumed.close()


def test_an_error_of_a_source_names_its_own_fields_on_the_command_line():
    sources = {"scenes": {}, "pairs": {"source": "tar"}}
    with pytest.raises(UserError, match=r"^data.mixture.pairs.path is empty: give --config.data.mixture.pairs.path="):
        build(DataConfig, {"source": "shapes", "resolution": 32, "mixture": sources}, "data")


def test_the_captions_of_a_source_whose_texts_are_not_counted_are_not_missing(stored):
    mixture = {"pairs": {"captions": {"txt": 1.0}}, "scenes": {"source": "shapes", "captions": {"en": 1.0}}}
    config = build(DataConfig, vars(stored["tar"]) | {"mixture": mixture, "num_examples": 4}, "data")
    assert len(open_dataset(config, 8).source) == COUNT + 4
    mixture["pairs"]["captions"] = {"text": 1.0, "txt": 1.0}
    with pytest.raises(UserError, match="data.captions names 'text', which no sample has"):
        open_dataset(build(DataConfig, vars(config) | {"mixture": mixture}, "data"), 8)


def test_a_mixture_without_weights_is_its_sources_one_after_the_other(stored):
    mixture = {"tar": {}, "folder": {"source": "folder", "path": stored["csv"].path}}
    dataset = open_dataset(build(DataConfig, vars(stored["tar"]) | {"mixture": mixture}, "data"), 8)
    assert len(dataset.source) == 2 * COUNT
    one = next(loader := dataset.batches(8, 0, None))["image"]
    loader.close()
    assert one.shape[0] == 8
