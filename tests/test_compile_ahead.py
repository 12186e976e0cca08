"""Compiling the step for every bucket before the first step leaves nothing to compile at later steps."""

import contextlib
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored_data import data_of, write_tars
from test_train import ONE_DEVICE, assert_equal_trees, make_trainer, run

from lidit_jax.checkpoint import latest_step
from lidit_jax.data.assembler import BatchShape, reshaped
from lidit_jax.data.batch_stream import STATISTICS, BatchStatistics, BatchStream
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.parallel.preemption import Preempted
from lidit_jax.trainer import Task
from lidit_jax.weighted_mean import WeightedMean

BUCKETS = (Bucket(24, 8), Bucket(16, 16))
EIGHT_DEVICES = {"data": 2, "fsdp": 4, "tensor": 1}
NO_EMA = {"ema_decay": 0.0, "checkpoint_every": 50}


class Images(BatchStream):
    """Stream that cycles through the buckets; it records how many programs were compiled before each batch."""

    def __init__(self, first, buckets=BUCKETS, compiled=(), seen=None):
        super().__init__("images", first, 1.0)
        self._buckets, self._compiled, self._seen = buckets, compiled, [] if seen is None else seen

    @property
    def shapes(self):
        return tuple(map(BatchShape, self._buckets))

    def _next(self):
        self._seen.append(len(self._compiled))
        bucket = self._buckets[self._next_batch % len(self._buckets)]
        image = np.random.default_rng(self._next_batch).normal(size=(8, *bucket, 3)).astype(np.float32)
        return {"image": image, "label": image.sum(axis=(1, 2, 3)), STATISTICS: BatchStatistics(BatchShape(bucket), 8)}

    def start_prefetch(self):
        pass

    def _stop(self):
        pass


def image_task(phases=()):
    """A task that fits colours to a label, weighted by the phase."""

    def loss(params, frozen, batch, key, phase):
        found = jnp.mean(batch["image"], axis=(1, 2)) @ params["kernel"]
        return WeightedMean.over((1 + phase) * jnp.square(found[:, 0] - batch["label"])), {}

    def init(key):
        return {"kernel": jax.random.normal(key, (3, 1))}

    return Task("toy", init, loss, phases=phases)


def trainer_of(mesh=ONE_DEVICE, phases=(), steps=5, **changes):
    return make_trainer(mesh, image_task(phases), steps=steps, batch_size=8, **NO_EMA, **changes)


@pytest.fixture(scope="module")
def trainer():
    """A trainer of five steps in two phases, shared so that its compiled programs are."""
    return trainer_of(phases=(2,))


@contextlib.contextmanager
def compilations():
    """Records the names of the functions that XLA compiles within the context."""
    found = []

    def listen(event, duration, **facts):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(str(facts.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def compiled_by(folder, trainer, buckets=BUCKETS):
    """Returns the number of programs compiled before each batch, and that of `_take_step`."""
    seen = []
    with compilations() as compiled:
        run(folder, trainer, lambda first: Images(first, buckets, compiled, seen))
    return seen, sum("_take_step" in name for name in compiled)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, EIGHT_DEVICES])
def test_nothing_is_compiled_after_the_first_step_in_any_bucket_phase_or_resumed_run(tmp_path, mesh):
    phases, buckets = (3, 5), len(BUCKETS)
    seen, steps = compiled_by(tmp_path, trainer_of(mesh, phases, steps=5))
    assert steps == 2 * buckets  # the third phase is not reached
    assert seen[0] < seen[1] and seen[1:] == [seen[1]] * 4
    seen, steps = compiled_by(tmp_path, trainer_of(mesh, phases, steps=8))
    assert steps == buckets  # only the third is left
    assert seen[0] < seen[1] and seen[1:] == [seen[1]] * 2


def test_without_a_warm_up_each_program_is_compiled_on_first_use_and_computes_the_same(tmp_path, trainer):
    seen = []
    with compilations() as compiled:
        lazy = trainer_of(phases=(2,), compile_ahead=False)
        without = run(tmp_path / "without", lazy, lambda first: Images(first, BUCKETS, compiled, seen))
    assert sum("_take_step" in name for name in compiled) == 2 * len(BUCKETS)
    assert seen == sorted(set(seen))  # two buckets in the first phase, then two in the second
    assert_equal_trees(without, run(tmp_path / "with", trainer, Images))


def test_one_bucket_is_compiled_once_and_at_its_first_step(tmp_path, capsys):
    seen, steps = compiled_by(tmp_path, trainer_of(steps=3), BUCKETS[:1])
    assert steps == 1 and seen[1:] == [seen[1]] * 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "compil" in line]
    assert lines == ["toy: compiling bucket 24x8 (1 of 1)", lines[1]] and lines[1].startswith("toy: compiled in 0m")


def test_batches_without_images_have_one_shape_for_all_buckets(tmp_path, capsys):
    class Words(Images):
        def _next(self):
            elements = super()._next()
            return {"words": elements.pop("image")[:, :8, :8], **elements}

    task = image_task()

    def loss(params, frozen, batch, *more):
        return task.loss(params, frozen, {**batch, "image": batch["words"]}, *more)

    trainer = make_trainer(ONE_DEVICE, Task("toy", task.init, loss), steps=3, batch_size=8, **NO_EMA)
    with compilations() as compiled:
        run(tmp_path, trainer, Words)
    assert sum("_take_step" in name for name in compiled) == 1
    assert capsys.readouterr().err.count("toy: compiling the step\n") == 1


def test_the_progress_lines_show_what_compiles_before_it_does(tmp_path, capsys):
    run(tmp_path, trainer_of(phases=(2,)), Images)
    lines = [line for line in capsys.readouterr().err.splitlines() if "compil" in line]
    assert lines[0].startswith("toy: compiling 4 programs before step 1 (train.compile_ahead=False compiles each")
    assert lines[1] == "toy: compiling bucket 24x8 (1 of 2), phase 1 of 2"
    assert lines[4].startswith("toy: compiling bucket 16x16 (2 of 2), phase 2 of 2, eta 0m")
    assert lines[5].startswith("toy: compiled in 0m") and len(lines) == 6


def test_compiling_on_first_use_is_said_and_counts_in_no_speed(tmp_path, capsys, monkeypatch):
    trainer, clock = trainer_of(steps=4, compile_ahead=False), [0.0]
    monkeypatch.setattr("lidit_jax.metrics.time.monotonic", lambda: clock[0])
    compile_one, take = trainer.compile, trainer.step
    monkeypatch.setattr(trainer, "compile", lambda *a: clock.__setitem__(0, clock[0] + 1000) or compile_one(*a))
    monkeypatch.setattr(trainer, "step", lambda *a: clock.__setitem__(0, clock[0] + 1) or take(*a))
    run(tmp_path, trainer, Images)
    error = capsys.readouterr().err
    assert [f"compiling bucket {bucket} ({i} of 2)" in error for i, bucket in enumerate(BUCKETS, 1)] == [True] * 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_per_second"] for line in lines] == [8.0] * 4
    assert "eta 0m03s" in error


def test_sigterm_during_the_warm_up_ends_it_and_the_next_start_is_the_run_that_never_stopped(
    tmp_path, trainer, monkeypatch
):
    compiled = []

    def and_stop(batch, phase):
        compiled.append((batch["image"].shape, phase))
        if len(compiled) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as changed:
        changed.setattr(trainer, "compile", and_stop)
        changed.setattr(trainer, "is_compiled", lambda *arguments: False)
        with pytest.raises(Preempted, match="toy: stopped by SIGTERM before step 1; run it again to resume"):
            run(tmp_path / "stopped", trainer, Images)
    assert compiled == [((8, 24, 8, 3), 0), ((8, 16, 16, 3), 0), ((8, 24, 8, 3), 1)]
    assert latest_step(tmp_path / "stopped/checkpoints") == 0
    resumed = run(tmp_path / "stopped", trainer, Images)
    assert_equal_trees(resumed, run(tmp_path / "whole", trainer, Images))


def test_the_watchdog_is_beaten_after_every_program(tmp_path, trainer, monkeypatch):
    beats, compiled = [], []
    monkeypatch.setattr("lidit_jax.train.Watchdog.beat", lambda self: beats.append(len(compiled)))
    compile_one = trainer.compile
    monkeypatch.setattr(trainer, "is_compiled", lambda *arguments: False)
    monkeypatch.setattr(trainer, "compile", lambda *arguments: compiled.append(compile_one(*arguments)))
    run(tmp_path, trainer, Images)
    assert {1, 2, 3, 4} <= set(beats)


def test_the_warm_up_allocates_no_arrays_on_the_devices():
    trainer = trainer_of(EIGHT_DEVICES)
    shape = jax.ShapeDtypeStruct((8, 512, 512, 3), jnp.float32, sharding=trainer.batch_sharding)
    label = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=trainer.batch_sharding)
    with jax.set_mesh(trainer.mesh):
        before = {id(array) for array in jax.live_arrays()}
        trainer.compile({"image": shape, "label": label}, 0)
        made = [array.nbytes for array in jax.live_arrays() if id(array) not in before]
    assert sum(made) < 1e4  # at most constants of the program


def test_batches_of_another_dtype_do_not_use_the_precompiled_program(trainer):
    batch = trainer.put({key: value for key, value in Images(0)._next().items() if key != STATISTICS})
    state = trainer.init(0)
    with jax.set_mesh(trainer.mesh), compilations() as compiled:
        halves = {key: x.astype(jnp.float16) for key, x in batch.items()}
        _, metrics = trainer.step(state, None, halves, jax.random.key(1), 0)
    assert np.isfinite(metrics["loss"].mean) and sum("_take_step" in name for name in compiled) == 1


@pytest.mark.parametrize("sequential", [False, True])
def test_loaders_name_the_buckets_that_have_images_and_that_of_the_last_batch(tmp_path, sequential):
    config = data_of("tar", write_tars(tmp_path / "tar"), sequential=sequential, max_aspect=4.0)
    dataset = open_dataset(config, 8)
    loader = dataset.batches(2, 0, None)
    assert len(dataset.buckets) == 5 and loader.shapes == (BatchShape(Bucket(32, 32)), BatchShape(Bucket(24, 40)))
    shapes = set()
    for batch in itertools.islice(loader, 6):
        assert batch["image"].shape[1:3] == loader.shape.bucket
        shapes.add(loader.shape)
    loader.close()
    assert shapes == set(loader.shapes)


@pytest.mark.parametrize(
    ("resolution", "bucket", "latents"), [(256, Bucket(192, 320), (24, 40)), (512, Bucket(640, 384), (80, 48))]
)
def test_arrays_of_other_batch_shapes_are_those_of_their_images_latents_and_prompts(resolution, bucket, latents):
    square, side = BatchShape(Bucket(resolution, resolution), 256), resolution // 8
    shapes = {"image": (4, *square.bucket, 3), "moments": (4, side, side, 32), "llama3/truncated": (4,)}
    shapes |= {"llama3/tokens": (4, 256), "llama3/mask": (4, 256), "t5/encoded": (4, 30 + 256, 64), "t5/mask": (4, 256)}
    other = BatchShape(bucket, 80)
    found = reshaped(shapes, square, other)
    expected = {"image": (4, *bucket, 3), "moments": (4, *latents, 32), "llama3/truncated": (4,)}
    expected |= {"llama3/tokens": (4, 80), "llama3/mask": (4, 80), "t5/encoded": (4, 30 + 80, 64), "t5/mask": (4, 80)}
    assert found == expected
    assert reshaped(found, other, square) == shapes
    assert reshaped(shapes, BatchShape(square.bucket), BatchShape(bucket))["llama3/tokens"] == (4, 256)
