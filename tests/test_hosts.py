"""Runs on two hosts, simulated by two processes with two CPU devices each."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from environment import XLA_FLAGS
from etils import epath

from lidit_jax.checkpoint import latest_step
from lidit_jax.errors import UserError
from lidit_jax.parallel import hosts as hosts_module
from lidit_jax.parallel.hosts import join_hosts
from lidit_jax.weights.diffusers_vae import load_vae

CONFIG = f"""
import runpy

def get_config():
    config = runpy.run_path("{ROOT}/configs/vae.py")["get_config"]()
    config.data.update(source="shapes", path="", held_out_shards=0, resolution=32)
    config.vae.model.update(block_out_channels=(8, 8), norm_num_groups=4)
    config.vae.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, sample_every=2, warmup_steps=0)
    config.vae.train.tensorboard = False
    config.vae.evaluate.update(num_images=9, batch_size=4, sheet=4)
    config.vae.adversarial = {{"weight": 0.5, "start": 1, "width": 4, "layers": 1}}
    return config
"""
# Leave out what takes long to compile where it does not matter.
NO_DISCRIMINATOR = "--config.vae.adversarial.weight=0.0"
NO_EVALUATION = "--config.vae.evaluate=None"


def start(folder, workdir, devices, process=None, port=None, *options, config=CONFIG, before=""):
    """Starts one of two hosts, or a single one.

    Args:
      folder: where the config file is written.
      workdir: the run's folder.
      devices: number of CPU devices of the process.
      process: index of the host; None: a single host.
      port: port of the coordinator, if there are two hosts.
      *options: further command-line options.
      config: text of the config file.
      before: Python code to run first in the process.
    """
    file = folder / "config.py"
    file.write_text(config)
    flags = f"{XLA_FLAGS} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    if process is not None:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
        environment |= {"JAX_PROCESS_ID": str(process)}
    run = f"{before}\nimport runpy\nrunpy.run_module('lidit_jax.main', run_name='__main__')"
    arguments = [sys.executable, "-c", run, f"--config={file}", f"--workdir={workdir}", *options]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@contextlib.contextmanager
def two_hosts(folder, workdir, devices, *options, config=CONFIG, before=("", "")):
    """Starts both hosts with the arguments of `start`, and kills them at the end of the context if they still run."""
    port, hosts = free_port(), []
    try:
        for process in (0, 1):
            more = {"config": config, "before": before[process]}
            hosts.append(start(folder, workdir, devices, process, port, *options, **more))
        yield hosts
    finally:
        for host in hosts:
            host.kill()


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_train_and_score_the_same_autoencoder_as_one(tmp_path):
    with two_hosts(tmp_path, tmp_path / "two", 2) as hosts:
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)
    assert "host 1 of 2" in errors[1]
    one = start(tmp_path, tmp_path / "one", 4)
    error = one.communicate(timeout=600)[1]
    assert one.returncode == 0, error

    (config, expected), (_, got) = (load_vae(tmp_path / name / "vae") for name in ("one", "two"))
    moved = 0
    for group in ("encoder", "decoder"):
        leaves = [np.asarray(tree[group]["conv_in"]["kernel"]) for tree in (expected, got)]
        np.testing.assert_allclose(leaves[0], leaves[1], atol=1e-4)
        moved += np.abs(leaves[0]).sum()
    assert moved > 0
    scores = [json.loads((tmp_path / name / "reconstruction.json").read_text()) for name in ("one", "two")]
    assert scores[1]["psnr"] == pytest.approx(scores[0]["psnr"], abs=1e-3)
    assert scores[1]["scaling_factor"] == pytest.approx(config.scaling_factor, rel=1e-3)


@pytest.mark.slow
def test_sigterm_at_one_host_saves_on_both_and_one_host_resumes(tmp_path):
    with two_hosts(tmp_path, tmp_path / "run", 2, NO_DISCRIMINATOR, "--config.vae.train.steps=5000") as hosts:
        for line in hosts[0].stderr:
            if line.startswith("vae 5/"):
                break
        hosts[1].send_signal(signal.SIGTERM)
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", errors[0])[1])
    assert f"after step {stopped}, which is saved" in errors[1]
    assert latest_step(tmp_path / "run/training/vae/checkpoints") == stopped
    more = (NO_DISCRIMINATOR, f"--config.vae.train.steps={stopped + 2}")
    alone = start(tmp_path, tmp_path / "run", 4, None, None, *more)
    error = alone.communicate(timeout=600)[1]
    assert alone.returncode == 0, error
    assert f"resuming from step {stopped}" in error


AT_STEP_3 = """
import itertools, time
from lidit_jax.errors import UserError
from lidit_jax.parallel.preemption import Notice
steps, reached = itertools.count(1), Notice.should_stop
def at_step_3(notice):
    if next(steps) == 3:
        {what}
    return reached(notice)
Notice.should_stop = at_step_3
"""
GONE = "another host of the run stopped or cannot be reached"
# Fault of a host -> (code that causes it, its exit status, message with which the other host ends).
FAULTS = {
    "killed": (AT_STEP_3.format(what="import os; os.kill(os.getpid(), 9)"), -9, GONE),
    "failed": (AT_STEP_3.format(what="raise UserError('its disk is gone')"), 2, GONE),
    "waits for ever": (AT_STEP_3.format(what="time.sleep(10_000)"), None, "no progress in 60 s"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "faulty"), [*((fault, 1) for fault in FAULTS), ("killed", 0)])
def test_a_fault_of_one_host_ends_the_other_with_a_message(tmp_path, fault, faulty):
    code, status, message = FAULTS[fault]
    more = [NO_DISCRIMINATOR, NO_EVALUATION, "--config.vae.train.steps=5000"]
    if fault == "waits for ever":
        more += ["--config.vae.train.stalled_after=60.0"]  # longer than a busy host needs to compile
    short_timeout = "from lidit_jax.parallel import hosts\nhosts.HEARTBEAT_TIMEOUT_S = 30\n"
    config = CONFIG.replace("steps=3,", "steps=3, stalled_after=1800.0,")
    before = [short_timeout + (code if process == faulty else "") for process in (0, 1)]
    with two_hosts(tmp_path, tmp_path / "run", 2, *more, config=config, before=before) as hosts:
        hosts[faulty].wait(600)
        begun = time.monotonic()
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert hosts[0].returncode != 0 and hosts[1].returncode != 0
    if fault == "failed":
        assert "error: its disk is gone" in errors[faulty]
    if fault == "waits for ever":  # the host that notices first prints where it waits
        assert any(message in error and re.search("in train|in at_step_3", error) for error in errors), "\n".join(
            errors
        )
        return
    assert hosts[faulty].returncode == status
    survivor = errors[1 - faulty]
    assert time.monotonic() - begun < 60, survivor  # seconds, and what a busy machine adds
    assert "Traceback" not in survivor and "stack trace" not in survivor
    assert survivor.splitlines()[-1].startswith(f"error: {message}")
    assert re.search("Traceback|Terminating process", (tmp_path / f"run/trace_host{1 - faulty}.txt").read_text())


RELAYED = """
import os, sys
from etils import epath
from lidit_jax.parallel.stderr_relay import ABORT, relay_stderr
relay_stderr(epath.Path(sys.argv[1]))
print("before", file=sys.stderr, flush=True)
os.write(2, b"W1 a warning\\nF2 client.h] " + ABORT + b". This most likely\\n")
os.write(2, b"*** Check failure stack trace: ***\\n    @ 0x7f\\n")
os.abort()
"""


@pytest.mark.parametrize("folder", [".", "missing"])
def test_an_abort_of_jax_is_one_line_and_its_trace_a_file(tmp_path, folder):
    file = tmp_path / folder / "trace.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", RELAYED, str(file)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    lines = done.stderr.splitlines()
    assert lines[:2] == ["before", "W1 a warning"] and lines[-1].startswith(f"error: {GONE}")
    if folder == ".":
        assert len(lines) == 3 and file.read_text().splitlines()[-1] == "    @ 0x7f"
    else:
        assert "    @ 0x7f" in lines and "can't be written: No such file" in lines[-1]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "UNKNOWN: Gloo context initialization failed:\n timed out",
            "another host of the run stopped or cannot be reach",
        ),
        ("INTERNAL: a bug", "RuntimeError: INTERNAL: a bug"),
    ],
)
def test_an_error_of_a_host_is_one_line_and_its_trace_a_file(tmp_path, monkeypatch, capsys, message, line):
    left = []
    monkeypatch.setattr(hosts_module, "leave", left.append)
    for folder in (tmp_path, None, tmp_path / "missing"):
        try:
            raise RuntimeError(message)
        except RuntimeError as error:
            hosts_module.leave_with_trace(error, folder and epath.Path(folder))
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith(f"error: {line}") and left.pop() == 1
        assert (len(lines) == 1) == (folder == tmp_path)  # elsewhere the trace comes first
    assert "Traceback" in (tmp_path / "trace_host0.txt").read_text()


def test_hosts_that_cannot_be_reached_are_reported(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(UserError, match="other hosts were not found .*: set JAX_COORDINATOR_ADDRESS"):
        join_hosts()
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS")
    join_hosts()  # no other host is named: does nothing
    join_hosts(False)
