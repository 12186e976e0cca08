"""The parts of a run's time sum to the time that its processes lived, and repeated steps are lost."""

import contextlib
import errno
import json
import os
import signal
import time

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from test_train import PROVENANCE, Numbers, make_trainer

from lidit_jax import goodput as goodput_module
from lidit_jax.checkpoint import Checkpoints
from lidit_jax.goodput import GOODPUT_FILE, PARTS, Goodput
from lidit_jax.metrics import Metrics
from lidit_jax.parallel.preemption import Preempted
from lidit_jax.train import train


class Clock:
    """Stands for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput_module, "time", clock)
    return clock


def parts(**seconds):
    return pytest.approx({**dict.fromkeys(PARTS, 0.0), **seconds})


def read(folder):
    return json.loads((folder / GOODPUT_FILE).read_text())


def test_inner_contexts_take_their_time_from_outer_ones(clock):
    goodput = Goodput(age=3.0)
    clock.now += 1
    with goodput.timed("evaluating"):
        clock.now += 2
        with goodput.timed("compiling"):
            clock.now += 4
        clock.now += 8
    with goodput.training("lidit", 0):
        clock.now += 16
        goodput.attribute("waiting_for_data", 5)
    clock.now += 32
    assert goodput.seconds() == parts(starting=36, evaluating=10, compiling=4, training=11, waiting_for_data=5)
    assert goodput.share() == pytest.approx(11 / 66)
    assert goodput.summary() == (
        "goodput 17% of 1m06s: "
        "training 0m11s, waiting for data 0m05s, compiling 0m04s, evaluating 0m10s, starting 0m36s"
    )


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.floats(0, 1e4), st.booleans()), max_size=20))
def test_the_parts_sum_to_the_time_whatever_is_timed(steps):
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(goodput_module, "time", clock)
        goodput, entered = Goodput(age=2.0), []
        for part, seconds, enters in steps:
            if enters:
                entered.append(goodput.timed(part))
                entered[-1].__enter__()
            elif entered:
                entered.pop().__exit__(None, None, None)
            clock.now += seconds
        assert sum(goodput.seconds().values()) == pytest.approx(2 + sum(seconds for _, seconds, _ in steps))


def start(folder, clock, first, last, saved=(), seconds=1.0):
    """Takes the steps `first` + 1 to `last`, and is killed: nothing is written after the last one."""
    goodput = Goodput(epath.Path(folder))
    clock.now += 10  # starting
    goodput.entered = goodput.training("lidit", first)  # kept: deleting the context would leave it
    goodput.entered.__enter__()
    for step in range(first + 1, last + 1):
        clock.now += seconds
        goodput.stepped(step)
        if step in saved:
            goodput.saved()
    goodput._write()
    return goodput


def test_steps_that_are_taken_again_are_lost(tmp_path, clock):
    start(tmp_path, clock, 0, 17, saved=(5, 10))
    clock.now += 100  # nothing runs
    start(tmp_path, clock, 10, 14, seconds=2.0)
    found = read(tmp_path)
    assert found["seconds"] == parts(starting=20, training=10 + 8, lost=7)
    assert (found["wall_seconds"], found["stopped_seconds"], found["starts"]) == (45, 100, 2)
    assert found["goodput"] == 18 / 45
    # The checkpoint of step 10 was damaged: the one before is restored.
    start(tmp_path, clock, 5, 6)
    assert read(tmp_path)["seconds"] == parts(starting=30, training=5 + 1, lost=7 + 8 + 5)
    # Nothing was saved: everything is lost.
    start(tmp_path, clock, 0, 1)
    assert read(tmp_path)["seconds"] == parts(starting=40, training=1, lost=20 + 6)


def test_without_its_checkpoint_the_time_of_a_step_is_estimated_from_its_neighbours(tmp_path, clock):
    start(tmp_path, clock, 0, 20, saved=(10, 20))
    start(tmp_path, clock, 13, 13)
    assert read(tmp_path)["seconds"] == parts(starting=20, training=13, lost=7)


def test_a_checkpoint_newer_than_the_record_loses_nothing(tmp_path, clock):
    start(tmp_path, clock, 0, 10, saved=(5,))
    start(tmp_path, clock, 15, 16)
    assert read(tmp_path)["seconds"] == parts(starting=20, training=11)


def test_waiting_for_data_in_lost_steps_is_lost_too(tmp_path, clock):
    goodput = start(tmp_path, clock, 0, 4, saved=(2,))
    goodput.attribute("waiting_for_data", 1.5)
    goodput._write()
    start(tmp_path, clock, 2, 2)
    assert read(tmp_path)["seconds"] == parts(starting=20, training=2, lost=2)


def test_networks_are_counted_separately(tmp_path, clock):
    goodput = Goodput(epath.Path(tmp_path))
    for name in ("llama", "lidit"):
        with goodput.training(name, 0):
            clock.now += 5
            goodput.stepped(5)
            goodput.saved()
            clock.now += 2
            goodput.stepped(7)
    goodput._write()
    with Goodput(epath.Path(tmp_path)) as goodput, goodput.training("lidit", 5):
        clock.now += 1
    found = read(tmp_path)
    assert found["seconds"] == parts(training=7 + 5 + 1, lost=2)
    assert found["networks"]["llama"]["training"] == 7


@pytest.mark.parametrize(
    "change",
    [
        lambda found: "no object",
        lambda found: {**found, "seconds": {}},
        lambda found: {**found, "seconds": {**found["seconds"], "lost": "1"}},
        lambda found: {**found, "seconds": {**found["seconds"], "lost": -5.0}},
        lambda found: {**found, "seconds": {**found["seconds"], "lost": True}},
        lambda found: {**found, "starts": -1},
        lambda found: {**found, "updated": 1e300},
        lambda found: {**found, "networks": []},
        lambda found: {**found, "networks": {"lidit": {"step": 1}}},
        lambda found: {**found, "networks": {"lidit": {**found["networks"]["lidit"], "marks": [[9, 0.0, 0.0]]}}},
        lambda found: {**found, "networks": {"lidit": {**found["networks"]["lidit"], "marks": [[1, 0, 0], [1, 0, 0]]}}},
        lambda found: {**found, "networks": {"lidit": {**found["networks"]["lidit"], "marks": [["1", 0.0, 0.0]]}}},
    ],
)
def test_a_damaged_record_is_said_and_counted_anew(tmp_path, clock, caplog, change):
    start(tmp_path, clock, 0, 7, saved=(5,))
    (tmp_path / GOODPUT_FILE).write_text(json.dumps(change(read(tmp_path))))
    start(tmp_path, clock, 5, 6)
    assert "goodput.json is damaged" in caplog.text
    assert read(tmp_path)["seconds"] == parts(starting=10, training=1)


def test_a_file_that_is_no_json_is_said_and_counted_anew(tmp_path, clock, caplog):
    (tmp_path / GOODPUT_FILE).write_text("{")
    start(tmp_path, clock, 0, 1)
    assert "goodput.json is damaged" in caplog.text
    assert read(tmp_path)["starts"] == 1


def test_a_record_that_cannot_be_written_is_said_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def fails(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(goodput_module, "write_json", fails)
        patch.setattr(goodput_module, "WRITE_EVERY_S", (0.01, 0.01))
        with Goodput(epath.Path(tmp_path)) as goodput:
            time.sleep(0.2)
    assert len(caplog.records) == 1 and "No space left on device); trying again" in caplog.text
    goodput._write()
    assert read(tmp_path)["starts"] == 1


def test_a_preempted_and_resumed_training_is_measured_in_full(tmp_path):
    """The steps wait for their data, which take longer than they do; nothing is lost, because SIGTERM saves."""

    class Slow(Numbers):
        def _next(self):
            time.sleep(0.05)
            if self._next_batch == 6 and stops:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._next()

    lived = 0.0
    for stops in (True, False):
        trainer, metrics = make_trainer(log_every=3), Metrics(tmp_path)
        checkpoints = Checkpoints(tmp_path / "checkpoints", {})
        started = time.monotonic()
        with Goodput(epath.Path(tmp_path)) as goodput, pytest.raises(Preempted) if stops else contextlib.nullcontext():
            train(trainer, Slow, checkpoints, metrics, seed=0, provenance=PROVENANCE, goodput=goodput)
        lived += time.monotonic() - started
        checkpoints.close()
        metrics.close()
    found = read(tmp_path)
    seconds = found["seconds"]
    assert sum(seconds.values()) == pytest.approx(found["wall_seconds"])
    assert found["wall_seconds"] == pytest.approx(lived, abs=1.0)
    assert found["starts"] == 2 and seconds["lost"] == 0
    assert seconds["waiting_for_data"] > 0.3  # the first batch of an interval always waits
    assert min(seconds[part] for part in ("training", "compiling", "saving", "restoring")) > 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["goodput"] < 1 for line in lines)
