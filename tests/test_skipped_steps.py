"""Steps whose loss or gradient is not finite: what they leave unchanged, and how they are logged."""

import re

import jax
import numpy as np
import pytest
from test_files import strict_json
from test_train import Numbers, assert_equal_trees, make_trainer, run, still_task

from lidit_jax.checkpoint import latest_step
from lidit_jax.errors import UserError
from lidit_jax.optimizer import learning_rate

BAD = (1, 3, 4, 5)  # of steps 0 to 11, logged every three steps: one of the first interval, all of the second


def test_non_finite_steps_are_skipped_and_counted(tmp_path):
    good = run(tmp_path / "good", make_trainer(steps=4))
    state = run(tmp_path / "bad", make_trainer(steps=7), lambda first: Numbers(first, range(4, 7)))
    assert int(state.skipped) == 3
    assert int(state.step) == 7
    for name in ("params", "ema", "opt_state"):
        assert_equal_trees(getattr(good, name), getattr(state, name))


def test_too_many_non_finite_steps_in_a_row_stop_the_run(tmp_path):
    with pytest.raises(UserError, match="3 steps in a row"):
        run(tmp_path, make_trainer(max_skipped_in_row=3), lambda first: Numbers(first, range(4, 99)))


def test_a_run_whose_every_step_was_skipped_does_not_end_in_success(tmp_path):
    with pytest.raises(UserError, match="toy: the loss or gradient of all 4 steps was not finite"):
        run(tmp_path, make_trainer(steps=4), lambda first: Numbers(first, range(4)))
    assert latest_step(tmp_path / "checkpoints") == 0
    state = run(tmp_path, make_trainer(steps=4), lambda first: Numbers(first, range(1, 4)))
    assert int(state.skipped) == 3


def test_a_run_that_ends_in_weights_that_are_not_finite_does_not_end_in_success(tmp_path):
    trainer = make_trainer(task=still_task(), learning_rate=10.0, weight_decay=1000.0)
    with pytest.raises(UserError, match="still: weights are not finite after step 12"):
        run(tmp_path, trainer)


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """Lines of metrics.jsonl, the printed text, the metrics of each step, and the trainer of a run with bad batches."""
    folder, trainer = tmp_path_factory.mktemp("skipped"), make_trainer(log_every=3, warmup_steps=10)
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("lidit_jax.metrics.print", lambda line, **_: printed.append(line), raising=False)
        run(folder, trainer, lambda first: Numbers(first, BAD))
    state, rows = trainer.init(0), []
    key = jax.random.key(1)
    for number, batch in zip(range(12), Numbers(0, BAD), strict=False):
        state, metrics = trainer.step(state, None, trainer.put(batch), key, number)
        rows.append(jax.device_get(metrics))
    lines = [strict_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return lines, printed, rows, trainer


def test_skipped_steps_are_left_out_of_an_intervals_means_and_counted(logged):
    lines, _, rows, _ = logged
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["skipped_in_interval"] for line in lines] == [1, 3, 0, 0]
    assert [line["skipped"] for line in lines] == [1, 4, 4, 4]
    for line, taken in ((lines[0], (0, 2)), (lines[2], (6, 7, 8)), (lines[3], (9, 10, 11))):
        for name in ("loss", "first"):
            assert line[name] == pytest.approx(np.mean([rows[step][name].mean for step in taken]), rel=1e-6)
        assert line["learning_rate"] == rows[taken[-1]]["learning_rate"] > rows[taken[0]]["learning_rate"]
        assert line["grad_norm"] == pytest.approx(np.mean([rows[step]["grad_norm"] for step in taken]), rel=1e-6)


def test_an_interval_of_only_skipped_steps_has_no_loss_but_a_progress_line(logged):
    lines, printed, _, _ = logged
    assert not lines[1].keys() & {"loss", "first", "grad_norm", "learning_rate"}
    assert lines[1]["samples_per_second"] > 0
    assert re.match(
        r"toy 6/12 \(50%\)  loss -  grad -  lr -  [\d.]+ samples/s  .*  skipped 3 \(4 in all\)  eta", printed[1]
    )
    assert re.match(r"toy 9/12 \(75%\)  loss \d\.\d{4}  grad .*  skipped 0 \(4 in all\)  eta", printed[2])


def test_skipped_steps_compile_nothing_and_the_state_stays_donated(logged):
    trainer = logged[-1]
    state, programs = trainer.init(0), trainer._step._jitted._cache_size()
    for number, batch in zip(range(3), Numbers(0, BAD), strict=False):
        before = state
        state, metrics = trainer.step(state, None, trainer.put(batch), jax.random.key(1), number)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert trainer._step._jitted._cache_size() == programs
    assert int(metrics["skipped"]) == 1


def test_the_logged_learning_rate_is_the_one_of_the_update(tmp_path):
    """Only weight decay changes the kernel, by the factor 1 - rate * decay."""
    changes = {"weight_decay": 0.5, "warmup_steps": 3, "schedule": "cosine", "learning_rate": 0.1}
    trainer = make_trainer(task=still_task(), log_every=1, **changes)
    run(tmp_path, trainer, lambda first: Numbers(first, BAD))
    lines = [strict_json(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}

    state, used, updates = trainer.init(0), {}, 0
    for number, batch in zip(range(12), Numbers(0, BAD), strict=False):
        before = np.asarray(state.params["in"]["kernel"], np.float64)
        state, _ = trainer.step(state, None, trainer.put(batch), jax.random.key(1), number)
        if number in BAD:
            continue
        used[number + 1] = (1 - np.vdot(before, state.params["in"]["kernel"]) / np.vdot(before, before)) / 0.5
        assert found[number + 1] == pytest.approx(float(learning_rate(trainer.config)(updates)), rel=1e-6)
        updates += 1
    assert {int(count) for count in (state.opt_state[0].count, state.opt_state[2].count)} == {updates} == {8}
    assert found == pytest.approx(used, rel=1e-4)
