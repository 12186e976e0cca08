"""A run on two hosts, played by two processes with two CPU devices each."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from lidit_jax.weights.diffusers_vae import load_vae

HOST = """
import runpy
import sys
import jax
process, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
if port != "0":
    jax.distributed.initialize(f"localhost:{port}", 2, process)
from etils import epath
from lidit_jax import stages
config = runpy.run_path("configs/vae.py")["get_config"]()
config.data.update(source="shapes", path="", held_out_shards=0, resolution=32)
config.vae.model.update(block_out_channels=(8, 8), norm_num_groups=4)
config.vae.train.update(steps=3, batch_size=8, log_every=1, checkpoint_every=2, sample_every=2, warmup_steps=0)
config.vae.evaluate.update(num_images=9, batch_size=4, sheet=4)
config.vae.adversarial.update(weight=0.5, start=1, width=4, layers=1)
assert jax.device_count() == 4
stages.run(config, epath.Path(workdir))
"""


def start(process, port, workdir, devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
    arguments = [sys.executable, "-c", HOST, str(process), str(port), str(workdir)]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_two_hosts_train_and_judge_the_autoencoder_that_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [start(process, port, tmp_path / "two", 2) for process in (0, 1)]
    errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)
    one = start(0, 0, tmp_path / "one", 4)
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
