"""The training step (LLMs, VAE, LI-DiT) gives one device's losses on every mesh and on two hosts, also when resumed."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import tiny_config
from etils import epath
from test_hosts import two_hosts

from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.stages.run import run_stages
from lidit_jax.trained_model import load

FROM_JSON = """
import json
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads({text!r}))
"""


def lidit_config(trained, mesh, steps):
    """Returns the tiny demo's config with trained encoders and VAE, so that only LI-DiT is trained."""
    config = tiny_config()
    with config.unlocked():
        for name, encoder in config.encoders.items():
            encoder.update(weights=str(trained / "encoders" / name), dtype="float32")
        config.vae.weights = str(trained / "vae")
        del config.evaluate
    config.model.dtype = "float32"
    config.train.update(steps=steps, checkpoint_every=20, learning_rate=1e-3, schedule="constant")
    config.mesh.update(dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)))
    return config


def run(trained, workdir, mesh, steps=20):
    """Trains on the first devices, as many as the mesh takes, and returns {step: loss}."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[: int(np.prod(mesh))]
        patch.setattr("lidit_jax.stages.run.make_mesh", lambda sizes: make_mesh(sizes, devices))
        run_stages(lidit_config(trained, mesh, steps), epath.Path(workdir))
    return losses(workdir)


def run_on_two_hosts(trained, folder, workdir, steps):
    """Trains in two processes of four devices each, with data=2 and fsdp=4, and returns {step: loss}."""
    config = lidit_config(trained, (2, 4, 1), steps)
    config.train.sample_every = steps  # sampling works on two hosts too
    text = json.dumps(config.to_dict())
    with two_hosts(folder, workdir, 4, config=FROM_JSON.format(text=text)) as hosts:
        errors = [host.communicate(timeout=600)[1] for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)
    return losses(workdir)


def losses(workdir):
    [file] = (workdir / "training").glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def alone(trained_workdir, tmp_path_factory):
    """{step: loss} of steps 1 to 40 on one device."""
    return run(trained_workdir, tmp_path_factory.mktemp("alone"), (1, 1, 1), steps=40)


def first(losses, steps):
    assert len(losses) >= steps
    return {step: loss for step, loss in losses.items() if step <= steps}


@pytest.mark.slow
def test_data_parallelism_on_eight_devices_gives_one_devices_losses(trained_workdir, alone, tmp_path):
    assert run(trained_workdir, tmp_path / "run", (8, 1, 1)) == pytest.approx(first(alone, 20), rel=1e-5)


@pytest.mark.slow
def test_a_mesh_gives_one_devices_losses_and_resumes_on_fewer_devices(trained_workdir, alone, tmp_path):
    assert run(trained_workdir, tmp_path / "run", (4, 2, 1)) == pytest.approx(first(alone, 20), rel=1e-5)
    assert run(trained_workdir, tmp_path / "run", (1, 4, 1), 22) == pytest.approx(first(alone, 22), rel=1e-5)


def test_a_mesh_generates_one_devices_images(trained_workdir, tmp_path):
    model = load(trained_workdir, devices=jax.devices()[:1])
    experiment, alone, params = model.experiment, model.pipeline, model.params
    sampling = dataclasses.replace(experiment.sample, batch_size=3, decode_pixels=3 * 32 * 32)
    prompts, seeds = ["a red circle", "", "a blue square above a green circle"], [5, 6, 7]
    expected = alone(params, prompts, seeds, 32, 32, sampling)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    sharded = experiment.pipeline(mesh, ShardingRules())
    got = sharded(jax.device_put(params, replicated(mesh)), prompts, seeds, 32, 32, sampling)
    assert got.shape == (3, 32, 32, 3)
    assert np.abs(got.astype(int) - expected).max() <= 1  # sums in another order round differently


@pytest.mark.slow
def test_two_hosts_resume_from_a_mesh_of_eight_with_one_devices_losses(trained_workdir, alone, tmp_path):
    assert run(trained_workdir, tmp_path / "run", (2, 2, 2)) == pytest.approx(first(alone, 20), rel=1e-5)
    assert run_on_two_hosts(trained_workdir, tmp_path, tmp_path / "run", 40) == pytest.approx(alone, rel=1e-5)
