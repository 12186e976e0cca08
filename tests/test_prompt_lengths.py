"""Static prompt lengths: short prompts meet in a batch, and results do not depend on the length they are padded to."""

import collections
import dataclasses
import itertools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from conftest import tiny_config
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_data import data_of, numbered_image
from test_tar_source import encode, write_tar

from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.caption_lengths import CaptionLengths
from lidit_jax.data.formats import index_files
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.prompt_lengths import MULTIPLE, StreamedPromptLengths, choose_lengths
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.precompute.latents import precompute
from lidit_jax.stages.lidit import lidit_task
from lidit_jax.stages.run import run_stages
from lidit_jax.text.encoders import PromptTokenCounter, tokenize

MAX_LENGTH = 64
WORDS = (3, 9, 20, 40, 90)  # of the captions


class CountWords:
    """One token a word, and the end token; remembers which prompts it has counted."""

    digest = "words"

    def __init__(self):
        self.counted = []

    def __call__(self, prompts):
        self.counted += prompts
        return np.array([len(prompt.split()) + 1 for prompt in prompts])


def tokenize_words(captions):
    mask = np.zeros((len(captions), MAX_LENGTH), bool)
    tokens = np.zeros((len(captions), MAX_LENGTH), np.int32)
    for row, caption in enumerate(captions):
        words = [zlib.crc32(word.encode()) % 1000 + 1 for word in caption.split()][: MAX_LENGTH - 1] + [1]
        tokens[row, : len(words)], mask[row, : len(words)] = words, True
    return {"it/tokens": tokens, "it/mask": mask, "it/truncated": mask.all(1)}


def write_data(folder, count=40, shards=2):
    """Writes images in two buckets; all have a short text, two of three a synthetic one, which may be long."""
    folder.mkdir()
    for shard in range(shards):
        files = {}
        for i in range(shard, count, shards):
            texts = {"txt": f"{i} short caption"}
            if i % 3:
                texts["synthetic"] = " ".join([str(i), *["word"] * (WORDS[i % 5] - 1)])
            files |= {f"{i:03}.png": encode(numbered_image(i)), f"{i:03}.json": json.dumps(texts).encode()}
        write_tar(folder / f"{shard:05}.tar", files)
    return folder


SHARES = {"txt": 0.25, "synthetic": 0.75}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prompts") / "tar")


def loader_of(folder, num_lengths=3, batch_size=8, count_tokens=None, first=0, dropout=0.0, data=None, **more):
    dataset = open_dataset(data_of("tar", folder, captions=SHARES, **(data or {})), 8)
    prompts = dataset.prompt_lengths(count_tokens or CountWords(), num_lengths, MAX_LENGTH)
    options = {"with_captions": True, "prompts": prompts, "first": first, "caption_dropout": dropout}
    return dataset.batches(batch_size, 3, tokenize_words, **options, **more), prompts


def take(loader, number):
    batches = []
    for batch in itertools.islice(loader, number):
        batches.append(batch | {"shape": loader.shape})
    loader.close()
    return batches


def mean_padded(counts, lengths):
    return sum(count * min(one for one in lengths if one >= tokens) for tokens, count in enumerate(counts) if count)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=100), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_no_other_lengths_need_less_padding(counts, num_lengths):
    counts = np.array([0, *counts, 1])
    found = choose_lengths(counts.astype(float), num_lengths)
    max_length = len(counts) - 1
    candidates = [*range(MULTIPLE, max_length, MULTIPLE), max_length]
    choices = itertools.chain(*(itertools.combinations(candidates[:-1], n) for n in range(num_lengths)))
    best = min(mean_padded(counts, (*choice, max_length)) for choice in choices)
    assert set(found) <= set(candidates) and found[-1] >= max_length and len(found) <= num_lengths
    assert mean_padded(counts, found) == best


def test_lengths_end_at_the_longest_prompt():
    counts = np.zeros(257)
    counts[[20, 21, 80, 100]] = 1
    assert choose_lengths(counts, 1) == (112,)
    assert choose_lengths(counts, 3) == (32, 80, 112)
    assert choose_lengths(counts, 8) == (32, 80, 112)  # no length without prompts


def test_a_batch_has_prompts_of_one_length_and_the_smallest_that_holds_them(folder):
    loader, prompts = loader_of(folder)
    assert prompts.lengths == (16, 32, 64)
    seen = set()
    for batch in take(loader, 60):
        shape = batch["shape"]
        words = np.array([min(len(caption.split()) + 1, MAX_LENGTH) for caption in batch["caption"]])
        assert batch["it/tokens"].shape == batch["it/mask"].shape == (8, shape.prompt_length)
        assert batch["image"].shape[1:3] == shape.bucket
        np.testing.assert_array_equal(batch["it/mask"].sum(1), words)
        np.testing.assert_array_equal([prompts.lengths[i] for i in np.searchsorted(prompts.lengths, words)], shape[1])
        seen.add(shape)
    assert seen == set(loader.shapes) and {shape.prompt_length for shape in seen} == {16, 32, 64}


def test_every_caption_occurs_as_often_as_without_lengths(folder):
    """Each image equally often, and each of its captions by its share, exactly, over enough epochs."""
    loader, prompts = loader_of(folder, batch_size=10)
    counts = collections.Counter(caption for batch in take(loader, 1600) for caption in batch["caption"])
    images, short = collections.Counter(), collections.Counter()
    for caption, count in counts.items():
        images[caption.split()[0]] += count
        short[caption.split()[0]] += count * caption.endswith("short caption")
    assert len(images) == 40 and max(images.values()) / min(images.values()) < 1.06  # 400 each on average
    for i in range(40):
        expected = 0.25 if i % 3 else 1.0
        assert short[str(i)] / images[str(i)] == pytest.approx(expected, abs=0.02)
    assert prompts.shares.sum() == pytest.approx(40)


def test_shares_of_shapes_are_logged(folder):
    loader, _ = loader_of(folder)
    for _ in range(400):
        next(loader)
    logged = loader.report()
    loader.close()
    for prefix, of_shape in (("bucket/", lambda shape: shape.bucket), ("prompt_length/", lambda shape: shape[1])):
        expected = collections.Counter()
        for shape, share in loader.shares.items():
            expected[f"{prefix}{of_shape(shape)}"] += share
        found = {name: value for name, value in logged.items() if name.startswith(prefix)}
        assert found == {name: pytest.approx(share, abs=0.03) for name, share in expected.items()}


def test_a_batch_is_a_function_of_its_number_on_any_number_of_hosts_and_workers(folder):
    expected = take(loader_of(folder, dropout=0.2)[0], 12)
    resumed = take(loader_of(folder, dropout=0.2, first=7)[0], 5)
    in_workers = take(loader_of(folder, dropout=0.2, data={"num_workers": 1})[0], 12)
    for found, wanted in ((resumed, expected[7:]), (in_workers, expected)):
        for one, other in zip(found, wanted, strict=True):
            assert one["caption"] == other["caption"] and one["shape"] == other["shape"]
            np.testing.assert_array_equal(one["it/tokens"], other["it/tokens"])
            np.testing.assert_array_equal(one["image"], other["image"])
    assert any("" in batch["caption"] for batch in expected)


@pytest.mark.parametrize("process_count", [2, 4])
def test_hosts_read_their_rows_of_batches_of_the_same_shape(folder, process_count, monkeypatch):
    expected = take(loader_of(folder)[0], 10)
    parts = []
    monkeypatch.setattr(jax, "process_count", lambda: process_count)
    for process in range(process_count):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        parts.append(take(loader_of(folder)[0], 10))
    for rows, batch in zip(zip(*parts, strict=True), expected, strict=True):
        assert {part["shape"] for part in rows} == {batch["shape"]}
        assert [caption for part in rows for caption in part["caption"]] == batch["caption"]


def test_tokens_are_counted_once_and_again_if_what_they_depend_on_changes(tmp_path):
    folder = write_data(tmp_path / "tar", shards=1)
    first = CountWords()
    loader_of(folder, count_tokens=first)
    assert len(first.counted) == 40 + 26
    again = CountWords()
    loader_of(folder, count_tokens=again, num_lengths=2)
    assert not again.counted
    other = CountWords()
    other.digest = "another tokenizer"
    loader_of(folder, count_tokens=other)
    assert len(other.counted) == 66
    filtered = CountWords()
    loader_of(folder, count_tokens=filtered, data={"drop_aspect_over": 1.2})  # half of the images
    assert len(filtered.counted) == 33
    texts = {"txt": "new", "synthetic": "also new"}
    write_tar(folder / "00000.tar", {"0.png": encode(numbered_image(0)), "0.json": json.dumps(texts).encode()})
    changed = CountWords()
    loader_of(folder, count_tokens=changed)
    assert sorted(changed.counted) == ["also new", "new"]


@pytest.mark.parametrize("damage", ["cut", "rows", "names", "tokens", "types"])
def test_damaged_or_forged_counts_are_counted_again(tmp_path, damage):
    folder = write_data(tmp_path / "tar", shards=1)
    _, expected = loader_of(folder)
    [file] = folder.glob("*.lengths-*")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-40])
    else:
        table = index_files.read_table(str(file), ("row", "name", "tokens"), None)
        columns = {name: table.column(name).to_numpy().copy() for name in table.schema.names}
        if damage == "rows":
            columns["row"][-1] = 1 << 40
        elif damage == "names":
            columns["name"][0] = -1
        elif damage == "tokens":
            columns["tokens"][0] = 1 << 62
        else:
            columns["tokens"] = columns["tokens"].astype(np.float64)
        index_files.write_table(pa.table(columns, metadata=table.schema.metadata), str(file))
    again = CountWords()
    _, found = loader_of(folder, count_tokens=again)
    assert len(again.counted) == 66 and found.fingerprint == expected.fingerprint


def test_counts_lie_in_the_folder_of_the_indexes(tmp_path):
    folder = write_data(tmp_path / "tar")
    loader_of(folder, data={"index_dir": str(tmp_path / "indexes")})
    assert not list(folder.glob("*.lengths-*")) and len(list((tmp_path / "indexes").glob("*.lengths-*"))) == 2


def test_captions_that_are_longer_than_they_were_counted_are_truncated_and_said_to_be(folder):
    class TooFew(CountWords):
        digest = "too few"

        def __call__(self, prompts):
            return np.full(len(prompts), 2)

    loader, _ = loader_of(folder, count_tokens=TooFew())
    for batch in take(loader, 30):
        words = np.array([len(caption.split()) + 1 for caption in batch["caption"]])
        assert batch["it/tokens"].shape[1] == batch["shape"].prompt_length == 16
        np.testing.assert_array_equal(batch["it/truncated"], words > 16)
        np.testing.assert_array_equal(batch["it/mask"].sum(1), np.minimum(words, 16))
        assert (batch["it/tokens"][np.arange(8), batch["it/mask"].sum(1) - 1] == 1).all()  # the end token


def test_broken_images_are_replaced_by_those_whose_captions_fit(tmp_path):
    folder = write_data(tmp_path / "tar", count=60)
    whole = encode(numbered_image(1))
    damaged = whole[: len(whole) // 2]
    for tar in sorted(folder.glob("*.tar")):  # the same sizes: indexes stay valid, but half of the images are damaged
        content = tar.read_bytes()
        for i in range(1, 60, 4):
            image = encode(numbered_image(i))
            content = content.replace(image, image[: len(damaged)] + b"\0" * (len(image) - len(damaged)))
        tar.write_bytes(content)
    loader, _ = loader_of(folder, data={"max_broken": 1.0})
    for batch in take(loader, 40):
        words = [len(caption.split()) + 1 for caption in batch["caption"]]
        assert max(min(words), 1) <= batch["it/mask"].sum(1).max() <= batch["shape"].prompt_length
    assert loader.broken


def test_mixtures_keep_their_weights(tmp_path):
    first, second = write_data(tmp_path / "a"), write_data(tmp_path / "b", count=10)
    mixture = {"a": {"path": str(first), "weight": 1.0}, "b": {"path": str(second), "weight": 3.0}}
    dataset = open_dataset(data_of("tar", "", mixture=mixture, captions=SHARES), 8)
    prompts = dataset.prompt_lengths(CountWords(), 3, MAX_LENGTH)
    loader = dataset.batches(16, 3, tokenize_words, prompts=prompts, with_captions=True)
    captions = [caption for batch in take(loader, 200) for caption in batch["caption"]]
    small = sum(int(caption.split()[0]) < 10 for caption in captions) / len(captions)
    assert small == pytest.approx(0.75 + 0.25 * 10 / 40, abs=0.02)


def test_the_fingerprint_changes_with_the_lengths(folder):
    fingerprints = {loader_of(folder, num_lengths=n)[1].fingerprint for n in (1, 2, 3)}
    assert len(fingerprints) == 3
    assert loader_of(folder)[1].fingerprint in fingerprints


SEQUENTIAL = {"sequential": True, "streams": 2}


def test_sequential_reading_has_batches_of_one_length(folder):
    loader, prompts = loader_of(folder, data=SEQUENTIAL)
    assert prompts.lengths == loader_of(folder)[1].lengths
    assert prompts.shares.sum() == pytest.approx(1)
    seen, truncated = collections.Counter(), 0
    for batch in take(loader, 150):
        words = np.array([min(len(caption.split()) + 1, MAX_LENGTH) for caption in batch["caption"]])
        length = batch["shape"].prompt_length
        assert batch["it/tokens"].shape == (8, length)
        np.testing.assert_array_equal(batch["it/mask"].sum(1), np.minimum(words, length))
        truncated += (words > length).sum()
        seen[batch["shape"]] += 1
    assert set(seen) == set(loader.shapes) and len({shape.prompt_length for shape in seen}) == 3
    assert truncated == 0


def test_with_sequential_reading_captions_occur_by_their_shares(folder):
    loader, _ = loader_of(folder, data=SEQUENTIAL)
    captions = [caption for batch in take(loader, 400) for caption in batch["caption"]]
    images = collections.Counter(caption.split()[0] for caption in captions)
    assert max(images.values()) - min(images.values()) <= 16  # 80 each; some wait in the buffers
    several = [caption for caption in captions if int(caption.split()[0]) % 3]
    short = sum(caption.endswith("short caption") for caption in several)
    assert short / len(several) == pytest.approx(0.25, abs=0.04)


def test_sequential_reading_resumes_with_the_same_captions(folder):
    loader, prompts = loader_of(folder, data=SEQUENTIAL, dropout=0.1)
    first = [next(loader) for _ in range(7)]
    state = json.loads(json.dumps(loader.get_state()))
    expected = take(loader, 8)
    resumed, _ = loader_of(folder, data=SEQUENTIAL, dropout=0.1)
    resumed.restore([state])
    for one, other in zip(take(resumed, 8), expected, strict=True):
        assert one["caption"] == other["caption"] and one["shape"] == other["shape"]
        np.testing.assert_array_equal(one["image"], other["image"])
    assert len(first) == 7
    others, _ = loader_of(folder, data=SEQUENTIAL, num_lengths=2)
    with pytest.raises(UserError, match="other data streams"):
        others.restore([state])


def test_a_stream_without_short_prompts_reads_on_and_then_truncates(tmp_path):
    """The first samples have short captions, from which the lengths and shares are estimated; the later ones long."""
    folder = tmp_path / "tar"
    folder.mkdir()
    files = {}
    for i in range(400):
        caption = f"{i} short" if i < 30 or i % 100 == 0 else " ".join([str(i), *["word"] * 30])
        files |= {f"{i:03}.png": encode(numbered_image(0)), f"{i:03}.txt": caption.encode()}
    write_tar(folder / "0.tar", files)
    dataset = open_dataset(data_of("tar", folder, sequential=True, max_aspect=1.0, shuffle_buffer=8), 8)
    prompts = StreamedPromptLengths(
        *([CaptionLengths.of([{"txt": 2}, {"txt": 31}])], dataset._choosers(0.0), [np.array([0, 0])]),
        *(np.ones((1, 1)), CountWords(), 2, MAX_LENGTH),
    )
    loader = dataset.batches(8, 3, tokenize_words, prompts=prompts, with_captions=True)
    truncated = 0
    for batch in take(loader, 40):
        words = np.array([len(caption.split()) + 1 for caption in batch["caption"]])
        np.testing.assert_array_equal(batch["it/truncated"], words > batch["shape"].prompt_length)
        truncated += batch["it/truncated"].sum()
    assert truncated and loader.report()["data/borrowed"] >= truncated


def test_counts_of_parts_are_concatenated_by_name():
    parts = [CaptionLengths.of([{"a": 3}, {}, {"a": 4, "b": 5}]), CaptionLengths.of([{"b": 7, "a": 1}])]
    found = CaptionLengths.concatenate(parts, [3, 1])
    names = [found.names[i] for i in found.name_indices]
    assert list(zip(found.rows.tolist(), names, found.tokens.tolist(), strict=True)) == [
        *((0, "a", 3), (2, "a", 4), (2, "b", 5)),
        *((3, "b", 7), (3, "a", 1)),
    ]


# --- with encoders ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(trained_workdir, t5_folder, tmp_path_factory):
    """A config of tar shards with long captions, whose encoders are an LLM and a T5."""
    config = tiny_config()
    config.data.update(source="tar", path=str(write_data(tmp_path_factory.mktemp("data") / "tar")))
    with config.ignore_type():
        config.data.captions = SHARES
    config.encoders.llama.weights = str(trained_workdir / "encoders" / "llama")
    config.encoders.qwen.weights = str(t5_folder)
    config.vae.weights = str(trained_workdir / "vae")
    config.data.max_aspect = 2.0
    config.text.max_length = MAX_LENGTH
    config.train.update(steps=5)
    with config.unlocked():
        config.text.num_lengths = 3
        del config.evaluate
    return config


def test_the_loss_and_its_gradient_do_not_depend_on_the_length(config):
    """At the longest prompt of the real configs, 256 tokens, beside the 32 that short captions need."""
    config = config.copy_and_resolve_references()
    config.text.max_length = 256
    with config.unlocked():
        for name in ("llama", "qwen"):
            config.encoders[name].dtype = "float32"
    part = Experiment(config, epath.Path("unused"))
    pipeline = part.pipeline(make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1]))
    task = lidit_task(part.model, part.schedule, pipeline.encoders, pipeline.vae, pipeline.frozen)
    captions = ["a red circle", "", "a blue square above a red circle", "图"]
    batch = tokenize(pipeline.encoders, captions) | {
        "image": np.stack([np.full((32, 32, 3), i * 60, np.uint8) for i in range(4)])
    }
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), x.dtype), shapes)

    @jax.jit
    def value_and_grad(batch):
        return jax.value_and_grad(lambda p: task.loss(p, task.frozen, batch, jax.random.key(2), 0)[0].mean)(params)

    short = {key: value[:, :32] if value.ndim == 2 else value for key, value in batch.items()}
    loss, grads = value_and_grad(batch)
    short_loss, short_grads = value_and_grad(short)
    np.testing.assert_allclose(short_loss, loss, rtol=1e-6)
    norm = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads))
    for one, other in zip(jax.tree.leaves(short_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * norm)
    assert task.flops(short) < task.flops(batch) / 2


def test_a_run_compiles_all_shapes_ahead_and_trains_on_them(config, tmp_path, capfd, caplog):
    config = config.copy_and_resolve_references()
    config.data.max_aspect = 1.0
    config.text.num_lengths = 2
    with caplog.at_level("INFO"):
        run_stages(config, epath.Path(tmp_path))
    printed = capfd.readouterr().err
    assert "tokens (2 of 2)" in printed and "compiling 2 programs before step 1" in printed
    assert "in place of 64" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "training/lidit/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5 and any(key.startswith("prompt_length/") for line in lines for key in line)


def test_features_have_the_lengths_of_the_captions(config, tmp_path):
    folder = epath.Path(tmp_path / "latents")
    precompute(config, folder, batch_size=8, dtype="float32", with_features=True)
    part = Experiment(config, epath.Path("unused"))
    count_tokens = PromptTokenCounter(part.load_encoders()[0])
    images = open_dataset(part.data, part.size_multiple())
    expected = images.prompt_lengths(count_tokens, 3, MAX_LENGTH)
    changed = dataclasses.replace(part.data, source="precomputed", path=str(folder))
    latents = open_dataset(changed, part.size_multiple())
    found = latents.prompt_lengths(CountNothing(), 3, MAX_LENGTH)
    assert found.lengths == expected.lengths and found.summary() == expected.summary()
    loader = latents.batches(8, 0, None, with_features=True, prompts=found)
    lead = part.load_encoders()[0]["qwen"].lead
    for batch in take(loader, 6):
        length = batch["shape"].prompt_length
        assert batch["llama/encoded"].shape[1] == length and batch["qwen/encoded"].shape[1] == lead + length
        assert batch["shape"] in {BatchShape(shape.bucket, shape.prompt_length) for shape in loader.shapes}
    for file in folder.glob("*.lengths"):  # as in a folder of an earlier version
        file.unlink()
    again = latents.prompt_lengths(CountNothing(), 3, MAX_LENGTH)
    assert again.fingerprint == found.fingerprint and len(list(folder.glob("*.lengths"))) == 2


class CountNothing:
    digest = "nothing"

    def __call__(self, prompts):
        raise AssertionError("the features have their lengths")
