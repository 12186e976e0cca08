"""A step of accumulated micro-batches equals the step of the full batch, whatever their weights."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import ONE_DEVICE, make_trainer, run, toy_task

from lidit_jax.diffusion.losses import diffusion_loss
from lidit_jax.diffusion.schedules import DDPM
from lidit_jax.models.layers import Dense
from lidit_jax.models.llm import LLMConfig
from lidit_jax.stages.language_model import language_model_task
from lidit_jax.trainer import Task

MICRO_BATCHES = 4
LENGTH = 256  # caption length in configs/1b.py and 10b.py


def test_accumulated_micro_batches_equal_the_full_batch(tmp_path):
    whole = run(tmp_path / "whole", make_trainer(task=toy_task(noise=0.0)))
    parts = run(tmp_path / "parts", make_trainer(task=toy_task(noise=0.0), accumulate=4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, parts.params)


# --- captions of very different lengths --------------------------------------------------------------------------


def lm_task():
    config = LLMConfig(64, 16, 24, 1, 2, 1, tie_word_embeddings=True, dtype="float32")
    return language_model_task("lm", config, types.SimpleNamespace(prefix=lambda: np.array([1, 2, 3], np.int32)))


def captions(lengths):
    """A batch whose row r belongs to micro-batch r % 4; longer captions have more tokens of equal value."""
    lengths = np.resize(lengths, 8)
    tokens = np.random.default_rng(0).integers(0, 60, (8, LENGTH)).astype(np.int32)
    tokens[:, 2:200] = 7
    return {"lm/tokens": tokens, "lm/mask": np.arange(LENGTH) < lengths[:, None]}


def take_step(trainer, batch):
    """Returns gradient and metrics of a first step; Adam's first moment is (1 - b1) times the unclipped gradient."""
    state = jax.device_put(start(trainer), trainer.state_shardings)
    with jax.set_mesh(trainer.mesh):
        after, metrics = trainer.step(state, None, trainer.put(batch), jax.random.key(1), 0)
    return jax.device_get((jax.tree.map(lambda m: 10 * m, after.opt_state[0].mu), metrics))


@functools.cache
def start(trainer):
    """Scales up the embeddings: at random weights all tokens are equally likely, and the loss ignores their number."""
    state = jax.device_get(trainer.init(0))

    def scale(path, leaf):
        return 3.0 * leaf if "embed_tokens" in jax.tree_util.keystr(path) else leaf

    return state.replace(params=jax.tree_util.tree_map_with_path(scale, state.params))


@pytest.fixture(scope="module")
def whole_trainer():
    return make_trainer(task=lm_task(), clip_norm=0.0, batch_size=8)


@pytest.fixture(scope="module", params=[ONE_DEVICE, {"data": 1, "fsdp": 2, "tensor": 1}], ids=["one", "mesh"])
def parts_trainer(request):
    return make_trainer(request.param, task=lm_task(), clip_norm=0.0, batch_size=8, accumulate=MICRO_BATCHES)


@pytest.mark.parametrize("lengths", [(256, 2, 9, 3), (1, 0, 0, 256)], ids=["uneven", "some without a token"])
def test_micro_batches_of_uneven_captions_equal_the_full_batch(whole_trainer, parts_trainer, lengths):
    batch = captions(lengths)
    (expected, whole), (found, parts) = take_step(whole_trainer, batch), take_step(parts_trainer, batch)
    assert parts["loss"].weight == whole["loss"].weight == batch["lm/mask"].sum()
    assert parts["loss"].mean == pytest.approx(whole["loss"].mean, rel=1e-5)
    assert parts["perplexity"].value() == pytest.approx(whole["perplexity"].value(), rel=1e-4)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest), found, expected)


def test_captions_of_the_test_above_tell_a_mean_of_means_from_the_mean(whole_trainer):
    batch = captions((256, 2, 9, 3))
    whole = take_step(whole_trainer, batch)[1]["loss"].mean
    of_micro_batches = []
    for i in range(MICRO_BATCHES):
        inside = (np.arange(8) % MICRO_BATCHES == i)[:, None]
        of_micro_batches.append(take_step(whole_trainer, batch | {"lm/mask": batch["lm/mask"] & inside})[1]["loss"])
    # Far more than the 1e-5 by which the losses of the test above may differ.
    assert abs(np.mean([loss.mean for loss in of_micro_batches]) / whole - 1) > 0.03


def test_a_batch_without_a_token_has_no_loss_and_no_gradient(parts_trainer):
    gradient, metrics = take_step(parts_trainer, captions((0,)))
    assert (metrics["loss"].mean, metrics["loss"].weight, metrics["skipped"]) == (0.0, 0.0, 0)
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# --- the diffusion loss ------------------------------------------------------------------------------------------


class Denoiser(nn.Module):
    @nn.compact
    def __call__(self, x, timesteps):
        steps = jnp.broadcast_to(timesteps[:, None, None, None] / 1000, (*x.shape[:3], 1))
        x = nn.tanh(Dense(8, ("embed", "mlp"), name="in")(jnp.concatenate([x, steps], axis=-1)))
        return Dense(4, ("mlp", "embed"), name="out")(x)


def test_micro_batches_of_the_diffusion_loss_equal_the_full_batch_with_the_same_noise():
    """Latents are 32x32; the 4 samples of a micro-batch leave some quarters of the schedule empty."""
    model, schedule = Denoiser(), DDPM()

    def init(key):
        return model.init(key, jnp.zeros((1, 32, 32, 4)), jnp.zeros(1))["params"]

    def loss(params, frozen, batch, key, phase):
        return diffusion_loss(schedule, lambda x, t: model.apply({"params": params}, x, t), batch["x"], key)

    trainer = make_trainer(task=Task("denoiser", init, loss), clip_norm=0.0, accumulate=MICRO_BATCHES)
    x0 = np.random.default_rng(0).normal(size=(16, 32, 32, 4)).astype(np.float32)
    found, metrics = take_step(trainer, {"x": x0})

    times, noise = np.zeros(16, np.int32), np.zeros_like(x0)
    for i in range(MICRO_BATCHES):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(1), 0), i))
        times[i::MICRO_BATCHES] = schedule.sample_times(keys[0], 4)
        noise[i::MICRO_BATCHES] = jax.random.normal(keys[1], (4, 32, 32, 4))

    def whole(params):
        prediction = model.apply({"params": params}, schedule.add_noise(x0, noise, times), times.astype(np.float32))
        per_sample = jnp.mean(jnp.square(prediction - noise), axis=(1, 2, 3))
        return per_sample.mean(), per_sample

    (value, per_sample), expected = jax.value_and_grad(whole, has_aux=True)(start(trainer).params)
    assert metrics["loss"].weight == 16
    assert metrics["loss"].mean == pytest.approx(float(value), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)
    quarters = np.stack([times // 250 == k for k in range(4)])  # [4, 16]
    per_micro_batch = quarters.reshape(4, -1, MICRO_BATCHES).any(axis=1)
    assert not per_micro_batch.all()
    for k, inside in enumerate(quarters, 1):
        quarter = metrics[f"loss_quarter_{k}"]
        assert quarter.weight == inside.sum()
        if inside.any():
            assert quarter.mean == pytest.approx(np.asarray(per_sample)[inside].mean(), rel=1e-5)
