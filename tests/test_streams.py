"""Shards read from end to end: no sample lost, equal batches for any number of hosts, exact resuming."""

import collections
import io
import json
import re
import shutil
import tarfile

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from stored_data import data_of, write_tars
from test_compile_ahead import compilations
from test_precompute import losses
from test_tar_source import encode, write_tar

from lidit_jax.checkpoint import Checkpoints
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.formats import files
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data.streamed import sample_stream
from lidit_jax.errors import UserError
from lidit_jax.stages.run import run_stages


def streamed(path, **options) -> DataConfig:
    return data_of("tar", path, sequential=True, **options)


def write_shards(folder, counts, size=lambda shard, i: (40, 40)):
    """Writes shards: shard s holds images with keys "s/i", of a single colour, which compress well."""
    folder.mkdir(exist_ok=True)
    for shard, count in enumerate(counts):
        members = {}
        for i in range(count):
            members[f"{i}.png"] = encode(np.full((*size(shard, i), 3), i % 256, np.uint8))
            members[f"{i}.txt"] = f"{shard}/{i}".encode()
        write_tar(folder / f"{shard:03}.tar", members)
    return folder


def captions_of(loader, count: int) -> list[list[str]]:
    found = [next(loader)["caption"] for _ in range(count)]
    loader.close()
    return found


def loader_on(dataset, monkeypatch, process_index=0, process_count=1, first=0, batch_size=8):
    monkeypatch.setattr("jax.process_index", lambda: process_index)
    monkeypatch.setattr("jax.process_count", lambda: process_count)
    return dataset.batches(batch_size, 3, None, first=first, with_captions=True, caption_dropout=0.2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Eight shards with different numbers of samples and aspect ratios."""
    folder = tmp_path_factory.mktemp("streams") / "shards"
    sizes = ((40, 40), (40, 60), (60, 40))
    return write_shards(folder, (7, 12, 5, 9, 11, 6, 8, 10), lambda shard, i: sizes[(shard * i) % 3])


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(1, 9), min_size=4, max_size=8),
    streams=st.sampled_from([1, 2, 4]),
    waiting=st.integers(8, 60),
    seed=st.integers(0, 1000),
)
def test_in_every_epoch_of_a_stream_each_sample_comes_once(tmp_path_factory, counts, streams, waiting, seed):
    folder = write_shards(tmp_path_factory.mktemp("epochs"), counts)
    dataset = open_dataset(streamed(folder, streams=streams, shuffle_buffer=waiting), 8)
    batches = captions_of(dataset.batches(8, seed, None, with_captions=True), 20)
    rows, seen = 8 // streams, set()
    for stream in range(streams):
        drawn = [caption for batch in batches for caption in batch[stream * rows : (stream + 1) * rows]]
        mine = set(drawn)
        # All samples of some shards, and no shard in part.
        assert {int(caption.split("/")[0]) for caption in mine}.isdisjoint(seen)
        seen |= {int(caption.split("/")[0]) for caption in mine}
        size = sum(counts[shard] for shard in {int(caption.split("/")[0]) for caption in mine})
        if len(drawn) >= 2 * size:
            assert len(mine) == size
        for start in range(0, len(drawn) - size + 1, size):
            assert len(set(drawn[start : start + size])) == size
    assert len(seen) == len(counts) or streams < len(counts)


def test_the_order_changes_with_epoch_and_seed(shards):
    dataset = open_dataset(streamed(shards, streams=1), 8)
    first, second = (captions_of(dataset.batches(4, seed, None, with_captions=True), 8) for seed in (0, 1))
    assert first != second
    assert sorted(sum(first, [])) != sum(first, [])


def test_every_sample_read_is_in_a_batch_or_in_a_buffer(shards):
    """Holds even if the bucket shares of a stream differ from those of the data set."""
    dataset = open_dataset(streamed(shards, streams=4, shuffle_buffer=64), 8)
    loader = dataset.batches(8, 0, None, with_captions=True)
    drawn = collections.Counter(caption for _ in range(50) for caption in next(loader)["caption"])
    state = json.loads(json.dumps(loader.get_state()))
    read = TarShards(str(shards))
    waiting = collections.Counter()
    done = collections.Counter()  # number of epochs in which a shard was read completely
    for [saved] in state["streams"].values():
        places = [tuple(place) for _, *place in saved["buffer"]]
        waiting.update(sample.captions["txt"] for sample in read.read(places))
    total = drawn + waiting
    # Within a stream, all samples were read equally often, except in the current epoch.
    for shard in range(8):
        counts = {count for caption, count in total.items() if caption.startswith(f"{shard}/")}
        assert max(counts) - min(counts) <= 1
        done[shard] = min(counts)
    assert min(done.values()) >= 3
    assert loader.report()["data/borrowed"] > 0
    loader.close()


@pytest.mark.parametrize("process_count", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 0), (4, 3)])
def test_hosts_threads_and_prefetching_do_not_change_batches(shards, monkeypatch, process_count, num_threads, prefetch):
    plain = open_dataset(streamed(shards, num_threads=1, prefetch=0), 8)
    expected = captions_of(loader_on(plain, monkeypatch), 12)
    dataset = open_dataset(streamed(shards, num_threads=num_threads, prefetch=prefetch), 8)
    parts = [captions_of(loader_on(dataset, monkeypatch, p, process_count), 12) for p in range(process_count)]
    assert [sum(rows, []) for rows in zip(*parts, strict=True)] == expected


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stop=st.integers(0, 30), hosts=st.sampled_from([(1, 4), (4, 1), (2, 2), (8, 4)]), part=st.sampled_from([1, 3000])
)
def test_streams_resume_at_any_point_on_any_number_of_hosts(shards, stop, hosts, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_stream, "SECTION_BYTES", part)
        dataset = open_dataset(streamed(shards, shuffle_buffer=40), 8)
        expected = captions_of(loader_on(dataset, patch), stop + 10)
        states, before, after = [], [], []
        for process in range(hosts[0]):
            loader = loader_on(dataset, patch, process, hosts[0])
            before.append([next(loader)["caption"] for _ in range(stop)])
            states.append(json.loads(json.dumps(loader.get_state())))
            loader.close()
        for process in range(hosts[1]):
            loader = loader_on(dataset, patch, process, hosts[1], first=stop)
            if stop:
                loader.restore(states)
            after.append(captions_of(loader, 10))
    assert [sum(rows, []) for rows in zip(*before, strict=True)] == expected[:stop]
    assert [sum(rows, []) for rows in zip(*after, strict=True)] == expected[stop:]


def test_a_checkpoint_keeps_the_place_of_every_host(shards, tmp_path, monkeypatch):
    """Through Orbax, including a loader that was restored but has not returned a batch yet."""
    dataset = open_dataset(streamed(shards), 8)
    loader = loader_on(dataset, monkeypatch)
    expected = [next(loader)["caption"] for _ in range(9)]
    checkpoints = Checkpoints(tmp_path, {})
    state = {"weight": jnp.zeros(3)}
    checkpoints.save(9, state, {}, loader.get_state())
    checkpoints.wait()
    expected += captions_of(loader, 5)
    _, positions = checkpoints.restore(state, {})
    checkpoints.close()
    resumed = loader_on(dataset, monkeypatch, first=9)
    resumed.restore(positions)
    assert resumed.get_state() == positions[0]
    assert captions_of(resumed, 5) == expected[9:]


def test_mixed_streams_keep_their_weights_and_resume(shards, tmp_path):
    other = write_shards(tmp_path / "other", (6, 7, 8, 9, 5, 6, 7, 8), lambda shard, i: (40, 40))
    mixture = {
        "a": {"weight": 3.0, "path": str(shards)},
        "b": {"weight": 1.0, "path": str(other)},
    }
    dataset = open_dataset(streamed("", mixture=mixture), 8)
    loader = dataset.batches(16, 0, lambda captions: {}, with_captions=True)
    drawn = [next(loader) for _ in range(40)]
    state = json.loads(json.dumps(loader.get_state()))
    expected = captions_of(loader, 4)
    resumed = dataset.batches(16, 0, None, first=40, with_captions=True)
    resumed.restore([state])
    assert captions_of(resumed, 4) == expected
    # All images of the second source are square; of the first, just over half.
    square = np.mean([batch["image"].shape[1] == batch["image"].shape[2] for batch in drawn])
    first = dataset._shares.sum(1)
    np.testing.assert_allclose(first, [0.75, 0.25])
    assert square == pytest.approx(dataset._shares.sum(0)[1], abs=0.1)
    with pytest.raises(UserError, match="unknown numbers of samples: give each a weight"):
        open_dataset(streamed("", mixture={"a": {"path": str(shards)}, "b": {"path": str(other)}}), 8)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(1, 20_000))
def test_scanning_a_shard_in_sections_yields_all_of_its_samples(shards, length):
    tar, start, found = TarShards(str(shards)), 0, []
    while start is not None:
        items = tar.scan(1, start, length)
        while True:
            try:
                found.append(next(items))
            except StopIteration as end:
                start = end.value
                break
    whole = list(tar.scan(1))
    assert [(place, sample.key) for place, sample in found] == [(place, sample.key) for place, sample in whole]


def test_unusable_samples_are_counted_and_replaced(tmp_path):
    members = {}
    for i in range(40):
        data = encode(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        score = json.dumps({"aesthetic": 9 if i % 4 else 1}).encode()
        members |= {f"{i:02}.png": data[:2000] if i % 10 == 3 else data, f"{i:02}.json": score}
        if i != 5:
            members[f"{i:02}.txt"] = f"{i:02}".encode()
    members["40.txt"] = b"no image"
    for shard in ("0", "1"):
        write_tar(tmp_path / f"{shard}.tar", members)
    (tmp_path / "1.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:-40_000])
    config = streamed(tmp_path, min_aesthetic=4.7)
    dataset = open_dataset(config, 8)
    assert dataset.dropped == {"aesthetic under 4.7": 19, "no caption": 2}
    assert dataset.broken == {"no image": 1, "truncated tar": 1, "truncated file": 1}
    loader = dataset.batches(4, 0, None, with_captions=True)
    captions = {caption for _ in range(30) for caption in next(loader)["caption"]}
    good = {f"{i:02}" for i in range(40) if i % 4 and i % 10 != 3 and i != 5}
    assert captions == good
    assert loader.broken["damaged image"] > 0
    assert loader.dropped["aesthetic under 4.7"] > 9
    loader.close()


def test_an_image_file_far_larger_than_its_pixels_is_read_when_it_is_used(tmp_path):
    image = Image.fromarray(np.full((40, 40, 3), 7, np.uint8))
    encoded, texts = io.BytesIO(), PngInfo()
    texts.add_text("Comment", "x" * (3 << 19))
    image.save(encoded, "PNG", pnginfo=texts)
    write_tar(tmp_path / "0.tar", {"0.png": encoded.getvalue(), "0.txt": b"a"})
    dataset = open_dataset(streamed(tmp_path), 8)
    [reader] = dataset._readers
    scanned = reader.shards.scan(0)
    place, sample = next(scanned)
    assert not reader.check(0, (0, *place), sample, sample_stream.ReadStatistics()).sample.image.getvalue()
    [found] = dataset.images(1)
    loader = dataset.batches(2, 0, None)
    np.testing.assert_array_equal(next(loader)["image"], [found, found])
    assert not loader.broken
    loader.close()
    assert (found == 7).all()


def test_too_much_broken_input_stops_the_stream(tmp_path):
    """All images but the first of each shard are broken, which only decoding reveals."""
    for shard in range(2):
        members = {}
        for i in range(30):
            data = encode(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
            members |= {f"{i}.png": data if i % 3 == 0 else data[:2000], f"{i}.txt": b"a"}
        write_tar(tmp_path / f"{shard}.tar", members)
    loader = open_dataset(streamed(tmp_path, max_broken=0.1), 8).batches(4, 0, None)
    with pytest.raises(UserError, match="samples cannot be used .damaged image: "):
        for _ in range(1000):
            next(loader)
    loader.close()


@pytest.mark.parametrize(
    ("change", "batch_size", "hosts", "message"),
    [
        ({"streams": 3}, 8, 1, "data.streams=3: 8 shards, a batch of 8 and 1 hosts need .* use one of 1, 2, 4, 8"),
        ({"streams": 16}, 16, 1, "data.streams=16: 8 shards"),
        ({}, 48, 16, "data.streams=8: .* make more and smaller shards, or give --config.data.sequential=False"),
        ({}, 9, 2, "batch_size=9 is not a multiple of 2 processes"),
        ({"shuffle_buffer": 4}, 8, 1, "data.shuffle_buffer=4 is below the batch size of 8"),
    ],
)
def test_incompatible_stream_settings_raise_a_one_line_error(shards, monkeypatch, change, batch_size, hosts, message):
    dataset = open_dataset(streamed(shards, **change), 8)
    monkeypatch.setattr("jax.process_count", lambda: hosts)
    with pytest.raises(UserError, match=message):
        dataset.check_batch_size(batch_size)


def test_every_place_that_a_scan_yields_can_be_read_again(tmp_path):
    """Includes a sample with a repeated file name."""
    members = []
    for i in range(10):
        members += [(f"{i}.png", encode(np.full((40, 40, 3), i, np.uint8)))] * (2 if i == 4 else 1)
        members.append((f"{i}.txt", str(i).encode()))
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    shards = TarShards(str(tmp_path))
    found = list(shards.scan(0))
    assert "repeated file name" in found
    samples = [one for one in found if one != "repeated file name"]
    again = shards.read([(0, *place) for place, _ in samples])
    assert [sample.captions for sample in again] == [sample.captions for _, sample in samples]


def test_other_shards_replace_one_without_usable_samples(tmp_path, caplog):
    folder = write_shards(tmp_path / "shards", [6] * 4)
    (folder / "002.tar").write_bytes(b"\0" * 2000)
    dataset = open_dataset(streamed(folder), 8)
    loader = dataset.batches(4, 0, None, with_captions=True)
    first = [next(loader)["caption"] for _ in range(20)]
    state = json.loads(json.dumps(loader.get_state()))
    expected = captions_of(loader, 10)
    assert {caption.split("/")[0] for batch in first for caption in batch} == {"0", "1", "3"}
    assert "002.tar': reading other shards instead" in caplog.text
    resumed = dataset.batches(4, 0, None, first=20, with_captions=True)
    resumed.restore([state])
    assert captions_of(resumed, 10) == expected


def test_shards_without_usable_samples_raise_a_one_line_error(tmp_path):
    folder = write_shards(tmp_path / "shards", [6] * 2)
    loader = open_dataset(streamed(folder), 8).batches(2, 0, None)
    for tar in folder.glob("*.tar"):
        tar.write_bytes(b"\0" * tar.stat().st_size)
    with pytest.raises(UserError, match="no usable sample, last in .*: fix the data, or loosen the filters"):
        next(loader)
    loader.close()


def test_the_limit_on_broken_samples_is_a_share_of_what_was_read(tmp_path):
    """Filling a large buffer for the first batch reads many windows of samples."""
    image = encode(np.zeros((8, 8, 3), np.uint8))
    members = {f"{i}.{kind}": (image if i % 10 else b"junk") if kind == "png" else b"a"
               for i in range(1200) for kind in ("png", "txt")}  # fmt: skip
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", members)
    loader = open_dataset(streamed(tmp_path, shuffle_buffer=4000, streams=2, max_broken=0.15), 8).batches(8, 0, None)
    for _ in range(5):
        next(loader)
    assert loader.broken["unreadable image"] > 400
    loader.close()


def test_broken_images_of_a_batch_get_distinct_replacements(tmp_path):
    members = {}
    for i in range(60):
        data = encode(np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8))
        members |= {f"{i}.png": data[:2000] if i % 3 == 0 else data, f"{i}.txt": str(i).encode()}
    write_tar(tmp_path / "0.tar", members)
    batches = captions_of(open_dataset(streamed(tmp_path), 8).batches(8, 0, None, with_captions=True), 5)
    assert [len(set(batch)) for batch in batches] == [8] * 5


def test_images_are_enlarged_only_if_there_are_no_others(tmp_path):
    """The second shard has only wide images, half of them too low for the square bucket."""
    write_shards(tmp_path / "s", (20, 20), lambda shard, i: (48, 48) if shard == 0 else (48 if i % 2 else 24, 96))
    found = {}
    for allowed in (True, False):
        dataset = open_dataset(streamed(tmp_path / "s", allow_enlarging=allowed, streams=2), 8)
        loader = dataset.batches(4, 0, None, with_captions=True)
        squares = [batch["caption"] for batch in (next(loader) for _ in range(40)) if batch["image"].shape[1] == 32]
        loader.close()
        found[allowed] = {caption for batch in squares for caption in batch if caption.startswith("1/")}
    low = {f"1/{i}" for i in range(0, 20, 2)}
    assert found[True] & low and found[False]
    assert not found[False] & low


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"next_batch": -1}, "position in the data is damaged"),
        ({"next_batch": "x"}, "position in the data is damaged"),
        ({"plan": "other"}, "the checkpoint was saved with other data streams"),
        ({"plan": None}, "the checkpoint was saved with other data streams"),
        ({"fingerprint": None}, "are not those of the checkpoint"),
        ({"streams": {"0": None}}, "position in the data is damaged"),
        ({"streams": {"0": [{"stream": [0] * 6, "buffer": []}]}}, "position in the data is damaged .*missing"),
        ({"streams": []}, "position in the data is damaged"),
    ],
)
def test_a_damaged_position_raises_and_changes_nothing(shards, change, message):
    dataset = open_dataset(streamed(shards), 8)
    loader = dataset.batches(8, 3, None, with_captions=True)
    expected = [next(loader)["caption"] for _ in range(2)]
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
    other = dataset.batches(8, 3, None, with_captions=True)
    with pytest.raises(UserError, match=message):
        other.restore([state | change])
    assert captions_of(other, 2) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"stream": [0, 0, 99, 0, 0, 0]},
        {"stream": [99, 0, 0, 0, 0, 0]},
        {"stream": [0, 0, 0, 0, 10**9, 0]},
        {"stream": [0, -1, 0, 0, 0, 0]},
        {"stream": "x"},
        {"buffer": [[0, 99, 0, 10]]},
        {"buffer": [[0, 0, 0, 10**15]]},
        {"buffer": [[0, 0, 10, 0]]},
        {"buffer": [[0, 0, 0.5, 10]]},
        {"buffer": 5},
    ],
)
def test_invalid_positions_raise_a_user_error(shards, change):
    dataset = open_dataset(streamed(shards), 8)
    loader = dataset.batches(8, 3, None)
    next(loader)
    state = json.loads(json.dumps(loader.get_state()))
    loader.close()
    state["streams"]["2"][0] |= change
    loader = dataset.batches(8, 3, None)
    with pytest.raises(UserError, match="damaged|changed since the checkpoint"):
        loader.restore([state])
        next(loader)
    loader.close()


def test_a_failing_disk_is_not_taken_for_a_broken_image(shards, monkeypatch):
    loader = open_dataset(streamed(shards), 8).batches(8, 3, None)
    read = files._LocalFile.read

    def fails(self, offset, size):
        if size not in (3, 512):  # captions and tar headers
            raise OSError(5, "Input/output error")
        return read(self, offset, size)

    monkeypatch.setattr(files._LocalFile, "read", fails)
    with pytest.raises(UserError, match="cannot read .*Input/output error"):
        next(loader)
    loader.close()


def test_only_tar_and_parquet_files_can_be_streamed(stored):
    with pytest.raises(UserError, match="data.sequential requires data.source='tar' or 'parquet', not 'folder'"):
        data_of("folder", stored["jsonl"].path, sequential=True)
    with pytest.raises(UserError, match="the filters leave none of the 14 samples of .*: loosen them"):
        open_dataset(streamed(stored["tar"].path, min_side=100), 8)


def test_resuming_with_changed_shards_is_rejected(shards, tmp_path):
    folder = write_tars(tmp_path / "tar", 20)
    dataset = open_dataset(streamed(folder), 8)
    loader = dataset.batches(4, 0, None)
    next(loader)
    state = loader.get_state()
    loader.close()
    with pytest.raises(UserError, match="are not those of the checkpoint"):
        open_dataset(streamed(shards), 8).batches(4, 0, None).restore([state])
    for tar in folder.glob("*.tar"):
        tar.write_bytes(b"\0" * tar.stat().st_size)
    resumed = dataset.batches(4, 0, None, first=1)
    resumed.restore([state])
    with pytest.raises(UserError, match="changed since the checkpoint was written"):
        next(resumed)


def test_a_run_on_streams_resumes_to_the_losses_of_one_that_never_stopped(trained_workdir, tmp_path, capsys):
    config = tiny_config()
    folder = write_tars(tmp_path / "tar", 30)
    config.data.update(source="tar", path=str(folder), max_aspect=2.0)
    with config.unlocked():
        config.data.sequential = True
        del config.evaluate
    with config.ignore_type():
        config.data.captions = None
    for name in config.encoders:
        config.encoders[name].weights = str(trained_workdir / "encoders" / name)
    config.vae.weights = str(trained_workdir / "vae")
    with compilations() as compiled:
        run_stages(config, epath.Path(tmp_path / "run"))
    assert sum("_take_step" in name for name in compiled) == 2  # the third bucket is empty
    assert re.search(r"lidit: compiling bucket 24x40 \(\d of \d\)", capsys.readouterr().err)
    whole = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/training/lidit/checkpoints/6")
    with config.unlocked():
        config.train.compile_ahead = False  # this option may change when a run resumes
    run_stages(config, epath.Path(tmp_path / "run"))
    assert "programs before step" not in capsys.readouterr().err
    assert losses(tmp_path / "run") == whole + whole[4:]
    lines = (tmp_path / "run/training/lidit/metrics.jsonl").read_text().splitlines()
    shares = [{key for key in json.loads(line) if key.startswith("bucket/")} for line in lines]
    assert all(shares)
    assert not list(folder.glob("*.index"))
