"""`python -m lidit_jax.check`: one line for each checkpoint and frozen network, exit code 0 or 2."""

import logging

import jax.numpy as jnp
import pytest
from etils import epath
from random_workdirs import make_workdir, random_config

from lidit_jax.check.__main__ import main
from lidit_jax.check.workdir import check_workdir
from lidit_jax.checkpoint import Checkpoints
from lidit_jax.config import read_workdir
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.trained_model import compare_frozen


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Workdir with a checkpoint of step 9 that records the digests; tests undo what they change."""
    workdir = make_workdir(tmp_path_factory.mktemp("run") / "two", random_config())
    run = Experiment(read_workdir(workdir), workdir)
    checkpoints = Checkpoints(run.training_folder("lidit") / "checkpoints", {})
    checkpoints.save(9, {"step": jnp.int32(9)}, {"frozen": run.frozen_digests()}, {"next_batch": 9})
    checkpoints.close()
    return workdir


def test_an_intact_workdir_has_a_line_for_each_checkpoint_and_network(workdir):
    findings = {finding.name.split(" (")[0]: finding for finding in check_workdir(workdir)}
    encoders = {f"encoders.{name}" for name in read_workdir(workdir).encoders}
    assert findings.keys() == {"training/lidit/checkpoints/9", "training/lidit/checkpoints/7", *encoders, "vae"}
    assert {str(finding).rpartition(": ")[2] for finding in findings.values()} == {"intact"}


FILES = {
    "training/lidit/checkpoints/7/state/_METADATA": "training/lidit/checkpoints/7: damaged: state/_METADATA",
    "training/lidit/checkpoints/9/manifest.json": "training/lidit/checkpoints/9: damaged: ",
    "vae/diffusion_pytorch_model.safetensors": "damaged: its digest is",
    "vae/config.json": "damaged: ",
}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found(workdir, name):
    file = workdir / name
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    try:
        [damaged] = [finding for finding in check_workdir(workdir) if finding.is_damaged]
    finally:
        file.write_bytes(content)
    assert FILES[name] in str(damaged)


def test_the_command_prints_the_lines_and_ends_in_an_error_if_one_is_damaged(workdir, capsys, monkeypatch):
    monkeypatch.setattr("lidit_jax.check.__main__.cli.require", lambda name: str(workdir))
    main()
    assert capsys.readouterr().out.count("intact\n") == len(list(check_workdir(workdir)))
    file = workdir / "training/lidit/checkpoints/7/facts/metadata"
    content = file.read_bytes()
    file.write_bytes(b"")
    try:
        with pytest.raises(UserError, match="1 damaged"):
            main()
    finally:
        file.write_bytes(content)
    assert "damaged: facts/metadata has 0 bytes" in capsys.readouterr().out


def test_sampling_says_which_network_has_changed(workdir, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lidit_jax"), "propagate", True)
    checkpoint = workdir / "training/lidit/checkpoints/9"
    run = Experiment(read_workdir(workdir), workdir)
    compare_frozen(run, checkpoint)
    assert not caplog.records
    file = workdir / "vae/diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-9] + bytes([content[-9] ^ 4]) + content[-8:])
    try:
        compare_frozen(run, checkpoint)
    finally:
        file.write_bytes(content)
    [record] = caplog.records
    assert record.getMessage().startswith("vae has changed since LI-DiT was trained with it")


def test_a_folder_without_a_run_is_rejected(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json there"):
        list(check_workdir(epath.Path(tmp_path)))
