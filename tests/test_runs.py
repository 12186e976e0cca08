"""Tests a run's lock, compilation cache, estimate of the time left, and final summary."""

import json
import types

import jax
import pytest
from conftest import load_config, tiny_config
from etils import epath

from lidit_jax.config import claim_workdir
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SceneEvaluation
from lidit_jax.experiment import LIDIT, Experiment
from lidit_jax.goodput import Goodput
from lidit_jax.parallel import compilation_cache
from lidit_jax.parallel.compilation_cache import cache_compilations
from lidit_jax.stages import run
from lidit_jax.stages.run import _summary, run_stages
from lidit_jax.stages.work_left import later_steps
from lidit_jax.workdir_lock import LOCK_FILE, lock


def test_a_second_run_in_a_workdir_is_refused_and_writes_nothing(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with lock(workdir / LOCK_FILE, "it"):
        with pytest.raises(UserError, match=r"run is in use by process \d+ on host .* since .*: wait until it ends"):
            run_stages(tiny_config(), workdir)
        assert [path.name for path in workdir.iterdir()] == [LOCK_FILE]
    assert list(workdir.iterdir()) == []


def test_a_workdir_that_can_not_be_written_is_refused_before_the_data_is_opened(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(run, "Experiment", None)
    with pytest.raises(UserError, match=r"--workdir=.*/run: .*/file is a file: name a folder"):
        run_stages(tiny_config(), epath.Path(tmp_path / "file/run"))


@pytest.fixture
def settings(monkeypatch):
    """The settings of JAX that are changed, by name."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.setattr(compilation_cache, "reset_cache", lambda: None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return found


def test_programs_are_kept_apart_for_each_kind_of_cpu_and_within_a_limit(settings, monkeypatch):
    cache_compilations(epath.Path("/run/compiled"))
    folder = settings["jax_compilation_cache_dir"]
    assert folder.startswith("/run/compiled/cpu-") and settings["jax_compilation_cache_max_size"] == 8 << 30
    monkeypatch.setattr(compilation_cache.platform, "machine", lambda: "another")
    cache_compilations(epath.Path("/run/compiled"))
    assert settings["jax_compilation_cache_dir"] != folder


def test_programs_of_accelerators_are_kept_in_buckets(settings, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    cache_compilations(epath.Path("gs://bucket/run/compiled"))
    assert settings["jax_compilation_cache_dir"] == "gs://bucket/run/compiled"
    assert settings["jax_compilation_cache_max_size"] == -1
    assert settings["jax_persistent_cache_enable_xla_caches"] == "none"


@pytest.mark.parametrize("given", ["/cache", ""])
def test_the_environment_says_where_programs_are_kept(settings, monkeypatch, given):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    cache_compilations(epath.Path("/run/compiled"))
    assert settings == {}


def test_cpus_of_several_hosts_keep_no_programs(settings, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    cache_compilations(epath.Path("/run/compiled"))
    assert settings == {}


def test_the_work_left_is_that_of_the_stages_to_come(tmp_path):
    demo = Experiment(load_config("shapes"), epath.Path(tmp_path))
    left = [later_steps(demo, name) for name in ("llama", "qwen", "vae", LIDIT)]
    assert left[0] == pytest.approx(left[1] + 250)  # the two LLMs are alike
    assert left[2] > 0 and left[3] == 0 == later_steps(demo, "another")
    # LI-DiT's 1,350 steps take about two thirds of the demo's time.
    assert 0.5 < left[2] / (left[2] + 1600) < 0.95


def test_the_summary_names_what_there_is_and_the_next_commands(tmp_path):
    workdir = epath.Path(tmp_path / "my run")
    for folder in ("vae", "training/lidit/checkpoints/7"):
        (workdir / folder).mkdir(parents=True)
    lines = _summary(Experiment(tiny_config(), workdir)).splitlines()
    assert lines[0] == f"finished: {workdir}"
    assert lines[1] == "  training/lidit/checkpoints: LI-DiT up to step 7, to sample, resume and fine-tune from"
    assert not any("scores.json" in line for line in lines)
    assert f"python -m lidit_jax.sample --workdir='{workdir}' --out='{workdir}/images'" in lines[-2]
    assert lines[-1].endswith(f"python -m lidit_jax.export --workdir='{workdir}' --out='{workdir}-torch'")
    epath.Path(f"{workdir}-torch").mkdir()  # the folder of an earlier export
    assert _summary(Experiment(tiny_config(), workdir)).endswith("-torch' --overwrite")


def test_a_finished_run_that_can_not_be_written_says_what_it_left_and_writes_nothing(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", logger="lidit_jax")
    workdir, config = epath.Path(tmp_path / "run"), tiny_config()
    for folder in ("vae", "training/lidit/checkpoints/6"):
        (workdir / folder).mkdir(parents=True)
    (workdir / "scores.json").write_text("{}")
    claim_workdir(workdir, config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    monkeypatch.setattr(run, "is_writable", lambda folder: False)
    run_stages(config, workdir)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    lines = caplog.messages[-1].splitlines()
    assert lines[:2] == [f"{workdir} can't be written, and nothing is left to do", f"finished: {workdir}"]
    assert " --out=images " in lines[-2] and lines[-1].endswith(" --out=run-torch")

    def refuse(*arguments):
        raise UserError("can't be written")

    monkeypatch.setattr(run, "lock", refuse)
    config.train.steps = 7  # not finished
    with pytest.raises(UserError, match="can't be written"):
        run_stages(config, workdir)


def test_a_checkpoint_is_evaluated_again_only_with_other_settings_or_weights(tmp_path, monkeypatch):
    workdir, calls = epath.Path(tmp_path), []
    manifest = workdir / "training/lidit/checkpoints/6/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("one")

    def evaluate(*arguments):
        calls.append(arguments)
        (workdir / "scores.json").write_text(json.dumps({"all scenes": {}} | arguments[-1]))

    monkeypatch.setattr(run, "train_lidit", lambda *arguments: (None, types.SimpleNamespace(averaged=None)))
    monkeypatch.setattr(run, "evaluate_scenes", evaluate)
    config, evaluation = tiny_config(), SceneEvaluation(two_objects=8)

    def count() -> int:
        run._train_lidit(Experiment(config, workdir), None, None, None, evaluation, Goodput())
        return len(calls)

    (workdir / "scores.json").write_text('{"all scenes": {}}')  # of an earlier version
    assert (count(), count()) == (1, 1)
    config.sample.batch_size = 4
    assert count() == 1
    config.sample.steps = 3
    assert (count(), count()) == (2, 2)
    evaluation = SceneEvaluation(two_objects=4)
    assert (count(), count()) == (3, 3)
    manifest.write_text("two")
    assert (count(), count()) == (4, 4)
    manifest.parent.rename(manifest.parent.parent / "7")
    assert (count(), count()) == (5, 5)
    assert json.loads((workdir / "scores.json").read_text())["evaluated"]["step"] == 7


def test_the_summary_of_a_vae_says_how_to_use_it(tmp_path):
    config = load_config("vae")
    config.data.path = "shards"
    (tmp_path / "vae").mkdir()
    lines = _summary(Experiment(config, epath.Path(tmp_path))).splitlines()
    assert lines[-1] == f"train LI-DiT with this VAE: give --config.vae.weights={tmp_path}/vae"
