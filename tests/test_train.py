"""The training loop on a toy task: steps, skipping, accumulation, sharding, checkpoints and exact resuming."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.checkpoint import Checkpoints, latest_step
from lidit_jax.checkpoint_weights import load_weights
from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.batch_stream import STATISTICS, BatchStatistics, BatchStream
from lidit_jax.data.buckets import Bucket
from lidit_jax.errors import UserError
from lidit_jax.metrics import Metrics, Progress, device_memory, duration
from lidit_jax.models.layers import Dense
from lidit_jax.optimizer import learning_rate
from lidit_jax.parallel.chips import chip_of
from lidit_jax.parallel.mesh import make_mesh, resolve_sizes
from lidit_jax.parallel.preemption import Preempted
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.train import train
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import Task, Trainer
from lidit_jax.weighted_mean import WeightedMean

ONE_DEVICE = {"data": 1, "fsdp": 1, "tensor": 1}
PROVENANCE = {"data": "random numbers"}


class Toy(nn.Module):
    dtype: type = jnp.float32

    @nn.compact
    def __call__(self, x):
        x = nn.relu(Dense(16, ("embed", "mlp"), dtype=self.dtype, name="in")(x))
        return Dense(8, ("mlp", "embed"), dtype=self.dtype, name="out")(x)


def toy_task(noise=0.1, dtype=jnp.float32):
    model = Toy(dtype)

    def loss(params, frozen, batch, key, phase):
        target = batch["x"][:, ::-1] + noise * jax.random.normal(key, batch["x"].shape)
        error = model.apply({"params": params}, batch["x"]) - target
        return WeightedMean.over(jnp.square(error).mean(axis=1)), {"first": WeightedMean.over(batch["x"][:, 0])}

    return Task("toy", lambda key: model.init(key, jnp.zeros((1, 8)))["params"], loss)


def still_task():
    """A loss without a gradient, NaN if the batch has a NaN: only weight decay changes the parameters."""

    def loss(params, frozen, batch, key, phase):
        return WeightedMean.over(0.0 * jnp.sum(params["in"]["kernel"]) * batch["x"]), {}

    return Task("still", toy_task().init, loss)


class Numbers(BatchStream):
    """Stream whose batch k has random numbers of seed k; chosen batches have a NaN."""

    def __init__(self, first, bad=range(0)):
        super().__init__("numbers", first, 1.0)
        self.bad = bad

    def _next(self):
        x = np.random.default_rng(self._next_batch).normal(size=(16, 8)).astype(np.float32)
        if self._next_batch in self.bad:
            x[3, 2] = np.nan
        return {"x": x, STATISTICS: BatchStatistics(BatchShape(Bucket(8, 8)), 16)}

    @property
    def shapes(self):
        return (BatchShape(Bucket(8, 8)),)

    def start_prefetch(self):
        pass

    def _stop(self):
        pass


def make_trainer(mesh_sizes=ONE_DEVICE, task=None, **changes):
    values = {"steps": 12, "batch_size": 16, "learning_rate": 1e-2, "ema_decay": 0.9, "log_every": 1}
    devices = jax.devices()[: int(np.prod(list(mesh_sizes.values())))]
    mesh = make_mesh(mesh_sizes, devices)
    return Trainer(
        task or toy_task(), TrainConfig(**{**values, "checkpoint_every": 5, **changes}), mesh, ShardingRules()
    )


def run(folder, trainer, stream=Numbers, provenance=PROVENANCE):
    checkpoints, metrics = Checkpoints(folder / "checkpoints", {}, trainer.config.keep), Metrics(folder)
    try:
        return train(trainer, stream, checkpoints, metrics, seed=0, provenance=provenance)
    finally:
        checkpoints.close()
        metrics.close()


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_resumed_run_is_bit_for_bit_the_run_that_never_stopped(tmp_path, stop):
    whole = run(tmp_path / "whole", make_trainer())

    class Stop(Exception):
        pass

    class Stopping(Numbers):
        def _next(self):
            if self._next_batch == stop:
                raise Stop
            return super()._next()

    with pytest.raises(Stop):
        run(tmp_path / "stopped", make_trainer(checkpoint_every=1), Stopping)
    resumed = run(tmp_path / "stopped", make_trainer())
    assert_equal_trees(whole, resumed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_a_finished_run_started_again_changes_nothing(tmp_path):
    first = run(tmp_path, make_trainer())
    lines = (tmp_path / "metrics.jsonl").read_text()
    assert_equal_trees(first, run(tmp_path, make_trainer()))
    assert (tmp_path / "metrics.jsonl").read_text() == lines


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 4, "tensor": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_mesh_computes_the_losses_and_weights_of_one_device(tmp_path, sizes):
    one = run(tmp_path / "one", make_trainer())
    many = run(tmp_path / "many", make_trainer(sizes))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        jax.device_get(one.params),
        jax.device_get(many.params),
    )
    np.testing.assert_allclose(list(losses(tmp_path / "one").values()), list(losses(tmp_path / "many").values()), 1e-5)
    kernel = many.params["in"]["kernel"]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (8 // sizes["fsdp"], 16 // sizes["tensor"])


def test_a_checkpoint_of_eight_devices_restores_on_one(tmp_path):
    eight = run(tmp_path, make_trainer({"data": 2, "fsdp": 2, "tensor": 2}))
    assert_equal_trees(eight.params, run(tmp_path, make_trainer()).params)


@pytest.mark.parametrize("sizes", [{"data": 1, "fsdp": 4, "tensor": 1}, ONE_DEVICE])
def test_a_run_on_two_by_two_devices_goes_on_with_one_by_four_and_with_one(tmp_path, sizes):
    run(tmp_path / "moved", make_trainer({"data": 2, "fsdp": 2, "tensor": 1}, steps=7))
    moved = run(tmp_path / "moved", make_trainer(sizes))
    stayed = run(tmp_path / "stayed", make_trainer())
    assert int(moved.step) == 12
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        jax.device_get(moved.params),
        jax.device_get(stayed.params),
    )
    found, expected = losses(tmp_path / "moved"), losses(tmp_path / "stayed")
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), 1e-5)


def test_gradients_are_clipped_to_the_norm_before_adam_sees_them():
    trainer = make_trainer(clip_norm=1e-3, ema_decay=0.0)
    state = trainer.init(0)
    batch = trainer.put(next(Numbers(0)))
    key = jax.random.fold_in(jax.random.key(1), 0)
    grads = jax.grad(lambda p: trainer.task.loss(p, None, batch, key, 0)[0].mean)(state.params)
    norm = optax.tree.norm(grads)
    first_moment = trainer.step(state, None, batch, jax.random.key(1), 0)[0].opt_state[0].mu
    expected = jax.tree.map(lambda g: 0.1 * g * 1e-3 / norm, grads)  # (1 - b1) of the clipped gradient
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), first_moment, expected)


@pytest.mark.parametrize(("reduction", "kept"), [("float32", "f32"), ("bfloat16", "bf16")])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_bfloat16_layers_are_reduced_as_the_config_says(reduction, kept, accumulate):
    task = toy_task(dtype=jnp.bfloat16)
    trainer = make_trainer(task=task, gradient_reduction=reduction, accumulate=accumulate)
    batch = {"x": jax.ShapeDtypeStruct((16, 8), jnp.float32)}
    program = trainer.lower(trainer.abstract_state(), None, batch).as_text()
    gradients = re.findall(r"dot_general .*contracting_dims = \[0\] x \[0\].*: .*xbf16>\) -> .*x(\w+)>", program)
    assert gradients == [kept] * 2
    assert make_trainer(task=task).config.gradient_reduction == "float32"


def test_weight_decay_applies_to_matrices_only():
    trainer = make_trainer(task=still_task(), weight_decay=0.5, ema_decay=0.0)
    state = trainer.init(0)
    state = state.replace(params=jax.tree.map(lambda x: x + 1.0, state.params))
    before = jax.device_get(state.params)
    after = trainer.step(state, None, trainer.put(next(Numbers(0))), jax.random.key(1), 0)[0].params
    np.testing.assert_allclose(after["in"]["kernel"], before["in"]["kernel"] * (1 - 1e-2 * 0.5), rtol=1e-6)
    np.testing.assert_array_equal(after["in"]["bias"], before["in"]["bias"])


def test_the_average_follows_its_formula():
    trainer = make_trainer()
    state = trainer.init(0)
    expected = jax.device_get(state.ema)
    for step in range(3):
        state, _ = trainer.step(state, None, trainer.put(next(Numbers(step))), jax.random.key(1), step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, expected, jax.device_get(state.params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.ema, expected)


@settings(max_examples=30)
@given(warmup=st.integers(0, 20), steps=st.integers(30, 100), cosine=st.booleans())
def test_the_learning_rate_warms_up_to_its_value_and_never_exceeds_it(warmup, steps, cosine):
    config = TrainConfig(steps, 8, 0.5, warmup_steps=warmup, schedule="cosine" if cosine else "constant")
    rates = [float(learning_rate(config)(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(0.5)
    assert min(rates) > 0
    assert rates[: max(1, warmup)] == sorted(rates[: max(1, warmup)])
    assert (rates[-1] < 0.1) == cosine


def test_other_data_than_the_checkpoints_is_rejected(tmp_path):
    run(tmp_path, make_trainer(steps=5))
    with pytest.raises(UserError, match="data = 'random numbers', now it is 'others'"):
        run(tmp_path, make_trainer(), provenance={"data": "others"})


def test_weights_are_read_without_the_optimiser(tmp_path):
    state = run(tmp_path, make_trainer())
    for name in ("params", "ema"):
        weights, step = load_weights(tmp_path / "checkpoints", name)
        assert step == 12
        assert_equal_trees(weights, getattr(state, name))


def test_missing_checkpoints_and_weights_are_reported(tmp_path):
    with pytest.raises(UserError, match="no finished checkpoint there"):
        load_weights(tmp_path / "nothing", "ema")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished checkpoint there"):
        load_weights(tmp_path / "empty", "ema")
    run(tmp_path / "raw", make_trainer(ema_decay=0.0))
    with pytest.raises(UserError, match="no 'ema' weights; it has params"):
        load_weights(tmp_path / "raw" / "checkpoints", "ema")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "linear"}, "constant, cosine"),
        ({"batch_size": 0}, "train.batch_size=0 must be at least 1"),
        ({"accumulate": 3}, "not divisible by train.accumulate=3"),
        (
            {"gradient_reduction": "float16"},
            "train.gradient_reduction='float16' is unknown: use one of float32, bfloat16",
        ),
    ],
)
def test_invalid_training_values_are_rejected(changes, message):
    with pytest.raises(UserError, match=message):
        make_trainer(**changes)


def test_a_batch_that_the_devices_do_not_divide_is_rejected():
    with pytest.raises(UserError, match="multiple of 8"):
        make_trainer({"data": 8, "fsdp": 1, "tensor": 1}, batch_size=12)


@settings(max_examples=100)
@given(data=st.integers(1, 6), fsdp=st.integers(1, 6), tensor=st.integers(1, 6), hole=st.integers(0, 2))
def test_a_missing_mesh_size_is_inferred(data, fsdp, tensor, hole):
    shape = (data, fsdp, tensor)
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    sizes[("data", "fsdp", "tensor")[hole]] = -1
    assert resolve_sizes(sizes, data * fsdp * tensor) == shape


@pytest.mark.parametrize("sizes", [{"data": 3, "fsdp": -1}, {"data": 16}, {"data": -1, "fsdp": -1}, {"data": 0}])
def test_meshes_that_do_not_fit_are_rejected(sizes):
    with pytest.raises(UserError, match="mesh"):
        resolve_sizes(sizes, 8)


def test_durations_are_formatted_for_reading():
    assert [duration(s) for s in (5, 65, 3725)] == ["0m05s", "1m05s", "1h02m"]


def test_mfu_is_model_flops_over_the_peak_of_the_chips(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("lidit_jax.metrics.time.monotonic", lambda: now[0])
    progress = Progress("lidit", 0, 10, 4, peak=2e12)
    for _ in range(4):
        progress.worked(3e12)
    with progress.paused():
        now[0] += 50
    now[0] += 10
    speed = progress.speed(4)
    assert speed["tflops_per_second"] == pytest.approx(1.2)
    assert speed["mfu"] == pytest.approx(0.6)
    progress.print(4, {"loss": 1, "grad_norm": 1, "learning_rate": 1, "skipped": 0, "skipped_in_interval": 0})
    assert "1.2 TFLOP/s (MFU 60%)" in capsys.readouterr().err
    now[0] += 10
    assert "mfu" not in progress.speed(8)  # no FLOPs were counted


@pytest.mark.parametrize(
    ("kind", "name"), [("TPU v5", "v5p"), ("TPU v5 lite", "v5e"), ("TPU v4", "v4"), ("NVIDIA H200", "H200")]
)
def test_chips_are_known_by_their_kind(kind, name):
    assert chip_of(types.SimpleNamespace(device_kind=kind)).name == name
    assert chip_of(jax.devices()[0]) is None


def test_the_time_left_covers_the_stages_to_come_and_says_that_it_is_rough(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("lidit_jax.metrics.time.monotonic", lambda: now[0])
    progress = Progress("llama", 0, 10, 4, later_steps=110.0)
    now[0] += 4
    progress.speed(4)
    values = {"loss": 1, "grad_norm": 1, "learning_rate": 1, "skipped": 0, "memory_gb": 3.21, "peak_memory_gb": 12.34}
    progress.print(4, values)
    assert capsys.readouterr().err.endswith("memory 3.2 GB (peak 12.3)  eta 0m06s, all stages about 1m56s\n")


def test_the_memory_in_use_and_its_peak_are_those_of_the_fullest_device_where_they_are_known(monkeypatch):
    def device(number, stats):
        return types.SimpleNamespace(id=number, memory_stats=lambda: stats)

    devices = [
        device(4, {"bytes_in_use": 2e9, "peak_bytes_in_use": 3e9}),
        device(6, {"bytes_in_use": 1e9, "peak_bytes_in_use": 5e9}),
        device(7, None),
    ]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    used = {"memory_gb": 2.0, "memory_gb/device_4": 2.0, "memory_gb/device_6": 1.0}
    peaks = {"peak_memory_gb": 5.0, "peak_memory_gb/device_4": 3.0, "peak_memory_gb/device_6": 5.0}
    assert device_memory() == used | peaks
    monkeypatch.setattr(jax, "local_devices", lambda: devices[:1])
    assert device_memory() == {"memory_gb": 2.0, "peak_memory_gb": 3.0}
    monkeypatch.setattr(jax, "local_devices", lambda: devices[2:])
    assert device_memory() == {}


def test_every_checkpoint_is_announced_with_its_path_when_it_is_written(tmp_path, caplog):
    caplog.set_level("INFO", "lidit_jax")
    run(tmp_path, make_trainer(keep=5))
    saved = [message for message in caplog.messages if message.startswith("saved ")]
    assert saved == [f"saved {tmp_path}/checkpoints/{step}" for step in (5, 10, 12)]


def test_sigterm_while_a_step_is_evaluated_saves_the_step(tmp_path):
    trainer = make_trainer(sample_every=4)

    def evaluate(state, step):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError

    stopping = make_trainer(sample_every=4, task=dataclasses.replace(trainer.task, evaluate=evaluate))
    with pytest.raises(Preempted, match="toy: stopped by SIGTERM after step 4, which is saved"):
        run(tmp_path, stopping)
    assert latest_step(tmp_path / "checkpoints") == 4


def test_sigterm_saves_the_step_and_the_next_start_resumes_bit_for_bit(tmp_path):
    whole = run(tmp_path / "whole", make_trainer())

    class Preempting(Numbers):
        def _next(self):
            if self._next_batch == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._next()

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="toy: stopped by SIGTERM after step 7, which is saved; run it again to resume"):
        run(tmp_path / "stopped", make_trainer(), Preempting)
    assert signal.getsignal(signal.SIGTERM) is before
    assert latest_step(tmp_path / "stopped/checkpoints") == 7
    assert_equal_trees(whole, run(tmp_path / "stopped", make_trainer()))
    assert losses(tmp_path / "whole") == losses(tmp_path / "stopped")


def test_a_broken_connection_while_saving_is_not_a_user_error(tmp_path, monkeypatch):
    def broken(self, step, **options):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(ocp.CheckpointManager, "save", broken)
    with pytest.raises(ConnectionResetError):  # exit code 1, after which launch scripts restart a run
        run(tmp_path, make_trainer())


def test_a_full_disk_is_reported_and_the_last_checkpoint_is_kept(tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def full(self, step, **options):
        if step == 10:
            raise OSError(28, "No space left on device")
        return save(self, step, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(
        UserError, match="can't be written, .* of step 5, is kept: .*No space left on device: free disk space"
    ):
        run(tmp_path, make_trainer())
    monkeypatch.undo()
    assert latest_step(tmp_path / "checkpoints") == 5
    assert int(run(tmp_path, make_trainer()).step) == 12


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
import test_train
from orbax.checkpoint._src.path import atomicity

finalize = atomicity.AtomicRenameTemporaryPath.finalize

async def killed(self, *arguments, **options):
    if self.get_final().name == "10":  # all is written, but not under its name yet
        os.kill(os.getpid(), signal.SIGKILL)
    await finalize(self, *arguments, **options)

atomicity.AtomicRenameTemporaryPath.finalize = killed
test_train.run(Path(sys.argv[1]), test_train.make_trainer())
"""


@pytest.mark.slow
def test_a_run_killed_while_it_saves_keeps_the_checkpoint_before(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [path.name for path in (tmp_path / "killed/checkpoints").iterdir()]
    assert "5" in left and "10" not in left and len(left) > 1  # the unfinished checkpoint is beside it
    assert latest_step(tmp_path / "killed/checkpoints") == 5
    assert_equal_trees(run(tmp_path / "whole", make_trainer()), run(tmp_path / "killed", make_trainer()))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
