"""Checkpoints whose files were changed: verified by their manifest, passed over for the one before, never trusted."""

import json
import logging
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from etils import epath
from etils.epath import backend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lidit_jax import checkpoint, manifest
from lidit_jax.checkpoint import Checkpoints, finished_steps
from lidit_jax.checkpoint_weights import load_weights, open_weights
from lidit_jax.errors import UserError
from lidit_jax.manifest import MANIFEST_FILE, DamagedError, verify, write_manifest

logger = logging.getLogger("lidit_jax.checkpoint")
PROVENANCE = {"data": "random numbers"}
SHAPES = {"step": ((), jnp.int32), "params": ((40,), jnp.float32), "ema": ((8, 3), jnp.float32)}


def state_of(step):
    rng = np.random.default_rng(step)
    trees = {name: {"w": jnp.asarray(rng.normal(size=SHAPES[name][0]).astype("f"))} for name in ("params", "ema")}
    return trees | {"step": jnp.int32(step)}


def abstract_state():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state_of(0))


def save(folder, *steps):
    checkpoints = Checkpoints(folder, {"name": "tiny"})
    for step in steps:
        checkpoints.save(step, state_of(step), PROVENANCE, {"next_batch": step, "fingerprint": "x"})
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, of steps 3 and 7; shared, so tests change copies."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save(folder, 3, 7)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return epath.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.fixture(autouse=True)
def propagated(monkeypatch):
    """The command lines stop the propagation of log lines, in this process too if a test runs one."""
    monkeypatch.setattr(logging.getLogger("lidit_jax"), "propagate", True)


def restore(folder, strict=False):
    checkpoints = Checkpoints(folder, {}, strict=strict)
    try:
        return checkpoints.restore(abstract_state(), PROVENANCE)
    finally:
        checkpoints.close()


def arrays_of(folder):
    with open_weights(folder, "params") as weights:
        return weights.step, {"params": {"w": np.asarray(weights["w",])}}


def assert_is_of(state, step):
    for name in state.keys() & SHAPES.keys():
        jax.tree.map(np.testing.assert_array_equal, state[name], state_of(step)[name])


def test_every_file_that_is_restored_from_is_in_the_manifest(saved):
    listed = json.loads((saved / "7" / MANIFEST_FILE).read_text())["files"]
    files = {str(file.relative_to(saved / "7")) for file in (saved / "7").rglob("*") if file.is_file()}
    assert files - listed.keys() == {MANIFEST_FILE, *manifest.WRITTEN_LATER}
    assert {"facts/metadata", "data/process_00000.json", "state/_METADATA", "state/manifest.ocdbt"} <= listed.keys()
    assert verify(epath.Path(saved / "7"))


FLIPS = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 999), FLIPS), min_size=1, max_size=3))
def test_flipped_bytes_never_give_other_values(saved, flips):
    files = sorted(file for file in (saved / "7").rglob("*") if file.is_file())
    before = {}
    for number, changes in flips:
        file = files[number % len(files)]
        before[file] = before.get(file, file.read_bytes())
        content = bytearray(file.read_bytes())
        for place, mask in changes:
            content[int(place * len(content))] ^= mask
        file.write_bytes(content)
    changed = {str(file.relative_to(saved / "7")) for file, old in before.items() if file.read_bytes() != old}
    logger.disabled = True
    try:
        step, weights = arrays_of(saved)
    finally:
        logger.disabled = False
        for file, content in before.items():
            file.write_bytes(content)
    assert_is_of(weights, step)
    assert step == (7 if changed <= set(manifest.WRITTEN_LATER) else 3)


def flip(folder, pattern):
    file = max(folder.glob(pattern), key=lambda file: file.stat().length)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def add_process(folder):
    position = json.dumps({"next_batch": 7, "fingerprint": "y"})
    (folder / "data/process_00001.json").write_text(position)


def remove_weights(folder):
    for file in list(folder.glob("state/d/*")):
        file.unlink()


def link_out(folder):
    outside = folder.parent / "outside"
    (folder / "facts/metadata").rename(outside)
    os.symlink(outside, folder / "facts/metadata")


def write_over(folder):
    folder.rmtree()
    folder.write_text("x")


def move_and_link(folder):
    folder.rename(folder.parent.parent / "moved")
    os.symlink(folder.parent.parent / "moved", folder)


DAMAGE = {
    "flipped weights": (lambda folder: flip(folder, "state/d/*"), "other contents"),
    "flipped position": (lambda folder: flip(folder, "data/process_*"), "other contents"),
    "a longer file": (
        lambda folder: (folder / "facts/metadata").write_text(json.dumps(PROVENANCE) + " "),
        "bytes instead",
    ),
    "missing weights": (remove_weights, "is missing"),
    "another position": (add_process, "not in its manifest"),
    "no manifest": (lambda folder: (folder / MANIFEST_FILE).unlink(), "manifest.json is missing"),
    "link": (link_out, "is a link"),
    "empty folder": (lambda folder: (folder.rmtree(), folder.mkdir()), "provenance can't be read"),
    "a file in its place": (write_over, "it is not a folder"),
    "a link in its place": (move_and_link, "it is a link"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(copy, caplog, kind):
    change, message = DAMAGE[kind]
    change(copy / "7")
    for load in (
        lambda: arrays_of(copy),
        lambda: load_weights(copy, "params")[::-1],
        lambda: (3, restore(copy)[0]),  # last, because it renames the damaged one
    ):
        caplog.clear()
        step, state = load()
        assert step == 3
        assert_is_of(state if "params" in state else {"params": state}, 3)
        said = [record.getMessage() for record in caplog.records if record.name == "lidit_jax.checkpoint"]
        assert "checkpoint of step 7 is damaged" in said[0] and message in said[0] and "\n" not in said[0]
    assert finished_steps(copy) == [3] and (copy / "damaged-7").exists()


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"[" * 100_000, b'{"item_handlers": 1}', "folder"])
def test_the_one_file_that_is_not_verified_is_not_needed(copy, content):
    file = copy / "7/_CHECKPOINT_METADATA"
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(content)
    state, [position] = restore(copy)
    assert position["next_batch"] == 7
    assert_is_of(state, 7)


def test_a_step_that_is_damaged_again_replaces_what_was_set_aside(copy):
    shutil.copytree(copy / "7", copy.parent / "intact")
    for number, change in enumerate((write_over, move_and_link, write_over)):
        if number:
            shutil.copytree(copy.parent / "intact", copy / "7")
        change(copy / "7")
        assert_is_of(restore(copy)[0], 3)
    assert (copy / "damaged-7").read_text() == "x"


def forge_array(folder, key: bytes, content: bytes | None, **metadata):
    """Changes an array's chunk, or its metadata, and writes a manifest that fits."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/state/"}).result()
    if metadata:
        content = json.dumps(json.loads(store.read(key).result().value) | metadata).encode()
    if content is None:
        store.delete_range(tensorstore.KvStore.KeyRange(key, key + b"\0")).result()
    else:
        store.write(key, content).result()
    write_manifest(folder)


@pytest.mark.parametrize("has_manifest", [True, False])
@pytest.mark.parametrize("content", [b"", b"no zstd", None])
def test_a_chunk_that_cannot_be_decoded_is_said_in_one_line(copy, caplog, content, has_manifest):
    forge_array(copy / "7", b"params.w/0", content)
    if not has_manifest:
        (copy / "7" / MANIFEST_FILE).unlink()
        (copy / "7/facts/metadata").write_text(json.dumps(PROVENANCE))
        assert_is_of(load_weights(copy, "params")[0] and restore(copy)[0], 3)
        assert "checkpoint of step 7 is damaged (it can't be read: " in caplog.text
        return
    for load in (lambda: load_weights(copy, "params"), lambda: arrays_of(copy), lambda: restore(copy)):
        with pytest.raises(UserError, match=r"^[^\n]*(step 7 belongs to another model|can't be read)[^\n]*$"):
            load()


@pytest.mark.parametrize("forged", [{"chunks": [2**36]}, {"shape": [2**50], "chunks": [2**50]}, {"shape": [2**50]}])
def test_a_forged_size_is_rejected_before_it_is_allocated(copy, forged):
    forge_array(copy / "7", b"params.w/.zarray", None, **forged)
    for load in (lambda: load_weights(copy, "params", abstract_state()["params"]), lambda: restore(copy)):
        with pytest.raises(UserError, match=r"^[^\n]*(belongs to another model|other names or shapes)[^\n]*$"):
            load()


def test_strict_restoring_stops_at_a_damaged_checkpoint(copy):
    flip(copy / "7", "state/d/*")
    for load in (lambda: load_weights(copy, "ema", strict=True), lambda: restore(copy, strict=True)):
        with pytest.raises(UserError, match=r"step 7 is damaged .*other contents.*strict_restore=False"):
            load()
    assert finished_steps(copy) == [7, 3]


def test_without_an_intact_checkpoint_nothing_starts_from_scratch(copy):
    flip(copy / "7", "state/d/*")
    flip(copy / "3", "facts/*")
    for load in (lambda: load_weights(copy, "ema"), lambda: restore(copy)):
        with pytest.raises(UserError, match=r"no checkpoint is intact: .*step 7.*; .*step 3"):
            load()
    assert finished_steps(copy) == [7, 3]


def test_a_damaged_step_is_saved_again(copy):
    flip(copy / "7", "state/d/*")
    checkpoints = Checkpoints(copy, {}, keep=1)
    state, [position] = checkpoints.restore(abstract_state(), PROVENANCE)
    assert position["next_batch"] == 3
    checkpoints.save(7, state_of(7), PROVENANCE, {"next_batch": 7})
    checkpoints.close()
    assert finished_steps(copy) == [7] and verify(copy / "7")
    assert_is_of(restore(copy)[0], 7)


@pytest.mark.parametrize("has_manifest", [True, False])
def test_another_provenance_is_said_and_is_no_damage(copy, has_manifest):
    if not has_manifest:
        (copy / "7" / MANIFEST_FILE).unlink()
        (copy / "7/facts/metadata").write_text(json.dumps(PROVENANCE))
    checkpoints = Checkpoints(copy, {})
    with pytest.raises(UserError, match=r"checkpoints: the checkpoint of step 7 was trained with data = 'random"):
        checkpoints.restore(abstract_state(), {"data": "others"})
    checkpoints.close()
    assert finished_steps(copy) == [7, 3]


def test_a_checkpoint_from_before_manifests_is_read_and_said(copy, caplog):
    (copy / "7" / MANIFEST_FILE).unlink()
    (copy / "7/facts/metadata").write_text(json.dumps(PROVENANCE))
    assert_is_of(restore(copy)[0], 7)
    [said] = [record.getMessage() for record in caplog.records if record.name == "lidit_jax.checkpoint"]
    assert "has no manifest.json (from an earlier version), so it was not verified" in said
    flip(copy / "7", "state/_METADATA")
    assert_is_of(restore(copy)[0], 3)


NOT_MANIFESTS = ["", "null", "[]", "{", "[" * 100_000, '{"format_version": 1}', '{"format_version": 1, "files": []}']
NOT_MANIFESTS += ['{"format_version": 2, "files": {}}', '{"format_version": 1, "files": {"a": 3}}', "\x00", "9" * 9999]


@pytest.mark.parametrize("text", [*NOT_MANIFESTS, '{"format_version": 1, "files": {"../../x": {"bytes": 1}}}'])
def test_a_manifest_that_is_none_is_damage(copy, text):
    (copy / "7" / MANIFEST_FILE).write_text(text)
    with pytest.raises(DamagedError):
        verify(copy / "7")
    assert load_weights(copy, "ema")[1] == 3


@pytest.mark.parametrize("number", [7.0, True, None, "7", [7], {}])
def test_a_position_other_than_the_step_is_not_resumed_from(copy, number):
    """With a manifest that fits it."""
    (copy / "7/data/process_00000.json").write_text(json.dumps({"next_batch": number, "fingerprint": "x"}))
    (copy / "7" / MANIFEST_FILE).unlink()
    write_manifest(copy / "7")
    with pytest.raises(UserError, match="step 7 belongs to another model or another version .*data positions"):
        restore(copy)


@pytest.mark.parametrize("number", [-1, 10**30, 6])
def test_a_position_of_another_step_is_damage(copy, number):
    """With a manifest that fits it."""
    (copy / "7/data/process_00000.json").write_text(json.dumps({"next_batch": number, "fingerprint": "x"}))
    (copy / "7" / MANIFEST_FILE).unlink()
    write_manifest(copy / "7")
    assert_is_of(restore(copy)[0], 3)


@pytest.mark.parametrize("name", ["20260131", "20260131120000", "9" * 30])
def test_a_copy_of_a_checkpoint_under_another_number_is_set_aside(copy, caplog, name):
    shutil.copytree(copy / "7", copy / name)
    assert load_weights(copy, "ema")[1] == 7
    assert f"step {name} is damaged (its files are those of step 7: it was copied or renamed)" in caplog.text
    assert_is_of(restore(copy)[0], 7)
    save(copy, 8, 9, 10)  # which removes the old ones
    assert sorted(path.name for path in copy.iterdir()) == ["10", "9", f"damaged-{name}"]


@pytest.mark.parametrize("text", ["3", "null", "[[1]]", "[" * 100_000, "{", ""])
@pytest.mark.parametrize("file", ["facts/metadata", "data/process_00000.json", "state/_METADATA"])
def test_any_json_in_a_checkpoint_ends_in_one_line(copy, file, text):
    shutil.rmtree(copy / "3")
    (copy / "7" / file).write_text(text)
    for has_manifest in (False, True):
        (copy / "7" / MANIFEST_FILE).unlink(missing_ok=True)
        if has_manifest:
            write_manifest(copy / "7")
        with pytest.raises(UserError, match=r"^[^\n]{1,600}$"):
            restore(copy)


@pytest.mark.parametrize("name", ["８", "007", "-1", "1e3", "9.orbax-checkpoint-tmp"])
def test_folders_that_are_not_named_like_a_step_are_no_checkpoints(copy, name):
    shutil.copytree(copy / "7", copy / name)
    assert finished_steps(copy) == [7, 3]
    assert_is_of(restore(copy)[0], 7)


def test_saves_that_wait_for_the_one_before_are_said_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(checkpoint, "LONG_WAIT_S", -1.0)
    caplog.set_level(logging.INFO, "lidit_jax")
    save(tmp_path / "checkpoints", 1, 2, 3)
    assert caplog.text.count("until the checkpoint before was written: a larger checkpoint_every") == 1


def test_hosts_share_the_verification(copy):
    flip(copy / "7", "state/d/*")
    found = 0
    for part in range(3):
        try:
            verify(copy / "7", part, 3)
        except DamagedError:
            found += 1
    assert found == 1


def test_checkpoints_in_a_bucket_are_finished_and_verified(copy, monkeypatch):
    """In an object store, whose folders can't be renamed, a file marks a finished checkpoint."""

    class Bucket:
        def __getattr__(self, function):
            def call(path, *arguments, **options):
                arguments = [str(argument).replace("gs://bucket", str(copy)) for argument in arguments]
                result = getattr(backend.os_backend, function)(
                    str(path).replace("gs://bucket", str(copy)), *arguments, **options
                )
                return [file.replace(str(copy), "gs://bucket") for file in result] if function == "glob" else result

            return call

    monkeypatch.setattr(backend, "tf_backend", Bucket())
    bucket = epath.Path("gs://bucket")
    assert finished_steps(bucket) == [7, 3]
    (copy / "7" / MANIFEST_FILE).unlink()
    assert not verify(bucket / "7")
    write_manifest(bucket / "7")
    assert verify(bucket / "7")
    flip(copy / "7", "state/d/*")
    with pytest.raises(DamagedError, match="other contents"):
        verify(bucket / "7")
    (copy / "7/commit_success.txt").unlink()
    assert finished_steps(bucket) == [3]
