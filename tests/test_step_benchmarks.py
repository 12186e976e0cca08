"""Tests the benchmarks of a training step and of sampling: PyTorch must compute the same numbers as JAX."""

import dataclasses
import os
import re
import subprocess
import sys

import flax
import jax
import numpy as np
import pytest
import torch
from absl import flags
from conftest import ROOT, load_config, tiny_config
from environment import XLA_FLAGS

from lidit_jax.benchmarks import pytorch_baseline, sample, train_step, workload
from lidit_jax.diffusion import samplers
from lidit_jax.diffusion.schedules import DDPM, RectifiedFlow
from lidit_jax.errors import UserError
from lidit_jax.models.flops import TextLengths
from lidit_jax.models.lidit import LIDiT
from lidit_jax.parallel.mesh import make_mesh

TEXT = {"a": TextLengths(3, 7, 24), "b": TextLengths(2, 5, 16)}


@pytest.fixture(autouse=True)
def one_thread():
    """Limits PyTorch to one thread: for such small arrays, synchronising threads costs more than it gains."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_device(monkeypatch):
    """Builds meshes of one device instead of the test suite's eight virtual CPU devices."""
    monkeypatch.setattr("lidit_jax.parallel.mesh.make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:1]))


def tiny_workload(text=None, ddpm=False, **model):
    """Returns a workload of eight samples and its experiment."""
    config = tiny_config()
    if ddpm:
        config.diffusion, config.sample.sampler = {"name": "ddpm"}, "dpmpp_2m"
    config.model.update(model)
    found, experiment = workload.from_config(config, batch=8)
    text = text or TEXT
    changes = {"text": text, "text_dtypes": dict.fromkeys(text, "float32")}
    return dataclasses.replace(found, height=4, width=6, **changes), experiment


def assert_close(actual, expected, tolerance):
    """Compares with an absolute tolerance relative to the largest expected value."""
    expected = np.asarray(expected, np.float32)
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize(
    ("text", "model", "tolerance"),
    [
        ({}, {"patch_size": 2}, 1e-5),
        ({"a": TEXT["a"]}, {"refiner_causal": True, "remat": "full"}, 1e-5),
        ({"a": TEXT["a"], "t5": TextLengths(4, 6, 8, False)}, {"fusion": "concatenate", "refiner_gated": False}, 1e-5),
        (TEXT | {"c": TEXT["a"]}, {"collaborative_blocks": 2, "refiner_rotary": False, "refiner_blocks": 1}, 1e-5),
        ({}, {"dtype": "bfloat16"}, 5e-2),
    ],
)
def test_pytorch_predicts_what_jax_predicts(text, model, tolerance):
    work, _ = tiny_workload(text, **model)
    ours, features = LIDiT(work.model), work.features()
    assert not all(llm.mask.all() for llm in features)  # some prompts are padded
    latents, timesteps = work.noise(), np.linspace(0, 999, work.batch, dtype=np.float32)
    params = random_params(ours, latents, timesteps, features)
    expected = jax.jit(ours.apply)({"params": params}, latents, timesteps, features)

    torch_model = pytorch_baseline.from_flax(
        work.model, work.text_widths, params, dtype=getattr(torch, work.model.dtype)
    )
    arguments = pytorch_baseline.channels_first(latents), torch.from_numpy(timesteps)
    with torch.no_grad():
        actual = torch_model(*arguments, **workload.torch_features(work, "cpu")).sample
    assert_close(actual.movedim(1, -1), expected, tolerance)


def random_params(model, *arguments):
    """Returns normal parameters, so that no gate is zero; by NumPy, which compiles nothing."""
    shapes = flax.linen.unbox(jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"])
    random = np.random.default_rng(3)
    return jax.tree.map(lambda x: 0.2 * random.standard_normal(x.shape, np.float32), shapes)


def test_pytorch_learns_what_jax_learns(one_device):
    work, experiment = tiny_workload(ddpm=True)
    config = dataclasses.replace(experiment.train, clip_norm=0.1, weight_decay=1.0)  # both have an effect
    trainer, batch = train_step.make_trainer(work, config, experiment.config.mesh)
    state, key, text = trainer.init(0), jax.random.key(1), workload.torch_features(work, "cpu")
    before = jax.device_get(state.params)
    start = pytorch_baseline.state_dict_from_flax(work.model, before)
    torch_models = []
    for remat in ("none", "full", "dots"):
        model = dataclasses.replace(work.model, remat=remat)
        torch_models.append(
            pytorch_baseline.Trainer(pytorch_baseline.from_flax(model, work.text_widths, before), config)
        )
    for number in range(2):
        arrays = train_step.random_inputs(work, batch["moments"], key, number)
        [inputs] = pytorch_baseline.split_steps({name: array[None] for name, array in arrays.items()})
        rate = float(trainer.learning_rate(number))
        with jax.set_mesh(trainer.mesh):
            state, metrics = trainer.step(state, trainer.task.frozen, batch, key, number)
        assert metrics["grad_norm"] > config.clip_norm
        for torch_model in torch_models:
            loss, norm = torch_model.step(inputs, text, rate)
            assert loss.item() == pytest.approx(float(metrics["loss"].mean), rel=1e-5)
            assert norm.item() == pytest.approx(float(metrics["grad_norm"]), rel=1e-4)
    ours = [
        pytorch_baseline.state_dict_from_flax(work.model, jax.device_get(tree)) for tree in (state.params, state.ema)
    ]
    for torch_model in torch_models:
        names = [name for name, _ in torch_model.model.named_parameters()]
        assert set(names) == set(start)
        for expected, actual in zip(ours, (torch_model.params, torch_model.ema), strict=True):
            for name, now in zip(names, actual, strict=True):
                assert_close(now.detach().numpy() - start[name], expected[name] - start[name], 1e-2)


def test_flops_are_those_that_the_task_counts(one_device):
    work, experiment = tiny_workload({"a": TEXT["a"], "t5": TextLengths(4, 6, 8, False)})
    trainer, batch = train_step.make_trainer(work, experiment.train, experiment.config.mesh)
    assert 3 * work.forward_flops(work.batch) == trainer.task.flops(batch)


def test_contestants_of_sampling_return_the_same_latents(tmp_path):
    work, _ = tiny_workload()
    arguments = work, "euler", 3, 4.0
    expected = sample.ours(*arguments, folder=tmp_path)()
    assert expected.shape == work.latents_shape
    assert_close(sample.pytorch(*arguments, folder=tmp_path, device="cpu", compiled=False)(), expected, 1e-4)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("ddim", DDPM()), ("dpmpp_2m", DDPM(prediction="v")), ("euler", RectifiedFlow()), ("heun", RectifiedFlow())],
)
def test_pytorch_takes_the_steps_of_a_jax_sampler(name, schedule):
    class Model(torch.nn.Module):
        def forward(self, x, timesteps, return_dict):
            return (predict(x, timesteps),)

    def predict(x, timesteps):
        return 0.5 * x**2 + timesteps[:, None] / 1000

    noise, table = np.random.default_rng(0).standard_normal((2, 3), np.float32), samplers.step_table(name, schedule, 4)
    expected = samplers.sample(name, schedule, predict, noise, 4)
    drawn = pytorch_baseline.Sampler(Model(), table, schedule.prediction, 1.0)(torch.from_numpy(noise), {})
    assert_close(drawn, expected, 1e-5)


def test_sizes_come_from_the_config_and_from_what_is_given():
    demo, _ = workload.from_config(load_config("shapes"))
    assert (demo.latents_shape, demo.text["qwen"]) == ((32, 4, 4, 16), TextLengths(4, 28, 128))
    paper, experiment = workload.from_config(load_config("1b"), batch=64, resolution=512, prefix_tokens=50)
    assert (paper.latents_shape, paper.text_widths) == ((64, 64, 64, 16), [4096, 4096])
    assert paper.text["llama3"].prefix == 50 and paper.text_dtypes["llama3"] == paper.model.dtype == "bfloat16"
    assert experiment.train.batch_size == 64
    with pytest.raises(UserError, match="--resolution=100 is not a multiple of 16: use 96"):
        workload.from_config(load_config("1b"), resolution=100)
    with pytest.raises(UserError, match="VAE alone"):
        workload.from_config(load_config("vae", "shards"))


def run(name, *arguments):
    """Runs the command on one device with the least possible work."""
    command = [sys.executable, "-m", f"lidit_jax.benchmarks.{name}", "--rounds=1", "--batch=2", *arguments]
    environment = dict(os.environ) | {"XLA_FLAGS": XLA_FLAGS, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("train_step", "--resolution=33", "not a multiple"),
        ("sample", "--sampler=ddim", "does not support"),
        ("sample", "--guidance=nan", "--guidance=nan is not a finite number"),
    ],
)
def test_a_users_mistake_ends_in_one_line(name, argument, message):
    done = run(name, argument)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(("module", "own"), [(train_step, "steps_a_round"), (sample, "guidance")])
def test_the_help_lists_the_flags_that_both_commands_have(module, own):
    listed = {flag.name for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)}
    assert listed >= {"config", "batch", "resolution", "rounds", "torch", own}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train_step", "sample"])
def test_the_benchmark_compares_three_that_agree(name):
    done = run(name, "--config=configs/shapes.py", "--config.model.depth=1", "--config.model.refiner_blocks=1")
    assert done.returncode == 0, done.stderr
    for way in ("lidit_jax", "PyTorch", "PyTorch compiled"):
        assert re.search(rf"^{way} +[\d.]+ +[\d.e+]+ +[\d.e-]+ +[\d.]+ x +\d+$", done.stdout, re.MULTILINE), done.stdout
    differences = re.findall(r"(?:differ by|norms by) (\S+)(?: of the largest|$)", done.stdout, re.MULTILINE)
    assert len(differences) == (4 if name == "train_step" else 2), done.stdout
    assert max(map(float, differences)) < 1e-3
