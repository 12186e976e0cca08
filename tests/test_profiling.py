"""Traces of training steps: which steps they hold, where they lie, and the names in them."""

import jax
import pytest
from etils import epath
from test_train import make_trainer, run

from lidit_jax.errors import UserError
from lidit_jax.profiling import StepProfiler, parse_steps
from lidit_jax.train_config import TrainConfig


def traced_steps(file):
    """Returns the numbers of the steps that a trace holds, in order."""
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


def trace_files(folder):
    return sorted((folder / "plugins/profile").glob("*/*"))


@pytest.mark.parametrize(
    "text", ["5", "5:", ":5", "5:5", "6:5", "-1:5", "1:2:3", "a:b", "1e3:2e3", "١:٢", "1" * 16 + ":2"]
)
def test_steps_in_another_form_are_rejected(text):
    with pytest.raises(UserError, match="train.profile=.*: give START:STOP, such as 100:105"):
        parse_steps(text)


def test_steps_after_the_last_are_rejected():
    with pytest.raises(UserError, match="train.profile=10:12 begins after the last of train.steps=10"):
        TrainConfig(10, 8, 0.1, profile="10:12")


def test_the_steps_asked_for_are_traced(tmp_path):
    run(tmp_path, make_trainer(profile="3:6", log_every=4))
    [file] = trace_files(tmp_path)
    assert file.relative_to(tmp_path).parts == ("plugins", "profile", "steps_3_6", "host_00000.xplane.pb")
    assert traced_steps(file) == [3, 4, 5]


def test_a_trace_ends_with_the_training(tmp_path):
    """The run stops after step 4 and resumes from it: the first trace has the steps before, the second those after."""
    run(tmp_path, make_trainer(steps=4, profile="3:100"))
    [file] = trace_files(tmp_path)
    assert traced_steps(file) == [3]
    run(tmp_path, make_trainer(steps=6, profile="3:100"))
    assert traced_steps(file) == [4, 5]
    run(tmp_path, make_trainer(steps=7, profile="3:5"))  # all of them lie in the past
    assert traced_steps(file) == [4, 5]


@pytest.mark.parametrize(("host", "all_hosts", "files"), [(0, False, 1), (1, False, 0), (1, True, 1)])
def test_only_the_first_host_is_traced_unless_all_are_asked_for(tmp_path, monkeypatch, host, all_hosts, files):
    monkeypatch.setattr("lidit_jax.profiling.jax.process_index", lambda: host)
    profiler = StepProfiler(range(3, 4), epath.Path(tmp_path), all_hosts)
    for step in range(6):
        profiler.before(step, None)
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            jax.numpy.zeros(3).block_until_ready()
        if profiler.ends_after(step):
            profiler.close()
    assert [file.name for file in trace_files(tmp_path)] == [f"host_{host:05}.xplane.pb"] * files
    assert all(traced_steps(file) == [3] for file in trace_files(tmp_path))
