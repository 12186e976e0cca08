"""Images of one prompt share its encoding, and are otherwise unchanged."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.pipeline import MAX_SEED, NotFiniteError, _key, _seed_words
from lidit_jax.text.batch_prompts import SharedPrompts
from lidit_jax.text.encoders import LLMTextEncoder
from lidit_jax.trained_model import TrainedModel, load

PROMPTS = ["a red circle", "红色圆形", "a blue square above a green circle"]


def test_seeds_have_63_bits_and_those_of_32_keep_their_keys():
    small, large = [0, 1, 7, 2**32 - 1], [2**32, 2**32 + 1, 2**33, MAX_SEED]
    keys = jax.random.key_data(jax.vmap(_key)(_seed_words(small + large)))
    expected = jax.random.key_data(jax.vmap(jax.random.key)(np.asarray(small, np.uint32)))
    np.testing.assert_array_equal(keys[:4], expected)
    assert len({tuple(key) for key in keys.tolist()}) == len(small + large)


@pytest.fixture(scope="module")
def loaded(trained_workdir):
    """Experiment, pipeline and parameters."""
    model = load(trained_workdir, devices=jax.devices()[:1])
    return model.experiment, model.pipeline, model.params


@pytest.fixture(scope="module")
def expected(loaded):
    """Four images for each prompt, each with its own copy of the prompt."""
    run, pipeline, params = loaded
    repeated = [prompt for prompt in PROMPTS for _ in range(4)]
    return pipeline(params, repeated, range(12), 32, 32, dataclasses.replace(run.sample, batch_size=12))


@given(
    shards=st.integers(1, 4),
    per_shard=st.integers(1, 6),
    images_per_prompt=st.integers(1, 9),
    is_guided=st.booleans(),
    num_prompts=st.integers(1, 9),
)
@settings(max_examples=200)
def test_every_row_finds_its_prompt_among_those_of_its_device(
    shards, per_shard, images_per_prompt, is_guided, num_prompts
):
    images, prompts = shards * per_shard, [f"prompt {i}" for i in range(num_prompts)]
    shared = SharedPrompts(images, images_per_prompt, is_guided, shards)
    found = []
    for start in range(0, num_prompts * images_per_prompt, images):
        encoded, places = shared.batch(prompts, start)
        assert len(encoded) == shared.encoded
        rows = np.asarray(encoded).reshape(shards, -1)  # [S, E]
        rows = np.take_along_axis(rows, places.reshape(shards, -1), axis=1).flatten()
        assert (rows[images:] == "").all() and len(rows) == images * (2 if is_guided else 1)
        found += list(rows[:images])
    repeated = [prompt for prompt in prompts for _ in range(images_per_prompt)]
    assert found[: len(repeated)] == repeated and not any(found[len(repeated) :])


@pytest.mark.parametrize(
    ("images", "images_per_prompt", "is_guided", "shards", "encoded"),
    [
        (16, 4, True, 1, 4 + 1),
        (16, 1, True, 1, 16 + 1),
        (16, 4, False, 1, 4),
        (16, 16, True, 1, 1 + 1),
        (16, 64, True, 1, 1 + 1),
        (4, 3, False, 1, 2),
        (16, 4, True, 8, 8),  # a device has four rows, of one prompt or of none
        (16, 1, True, 8, 8 * 4),
    ],
)
def test_a_prompt_is_encoded_once_on_a_device(images, images_per_prompt, is_guided, shards, encoded):
    assert SharedPrompts(images, images_per_prompt, is_guided, shards).encoded == encoded


# All images of a prompt in one batch; prompts split between batches; more images of a prompt than a batch has.
@pytest.mark.parametrize("batch_size", [12, 6, 3])
def test_images_that_share_an_encoded_prompt_equal_those_that_do_not(loaded, expected, batch_size, monkeypatch):
    run, pipeline, params = loaded
    pipeline = dataclasses.replace(pipeline)  # nothing is compiled yet
    encode_prompts, rows = LLMTextEncoder.encode_prompts, []
    monkeypatch.setattr(
        LLMTextEncoder,
        "encode_prompts",
        lambda self, frozen, tokens, mask: (rows.append(len(tokens)), encode_prompts(self, frozen, tokens, mask))[1],
    )
    how = dataclasses.replace(run.sample, batch_size=batch_size)
    got = pipeline(params, PROMPTS, range(12), 32, 32, how, images_per_prompt=4)
    assert np.abs(got.astype(int) - expected).max() <= 1
    prompts_at_once = {12: 3, 6: 2, 3: 2}[batch_size]
    assert rows == [prompts_at_once + 1] * len(pipeline.encoders)  # traced once


def test_a_mesh_samples_the_same_images_of_a_prompt_as_one_device(loaded, expected):
    run, _, params = loaded
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    spread = run.pipeline(mesh, ShardingRules())
    how = dataclasses.replace(run.sample, batch_size=8)
    got = spread(jax.device_put(params, replicated(mesh)), PROMPTS, range(12), 32, 32, how, images_per_prompt=4)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_flops_and_the_lowered_program_share_prompts_too(loaded):
    run, pipeline, params = loaded
    how = dataclasses.replace(run.sample, batch_size=8)
    one, four = (pipeline.flops(32, 32, how, images_per_prompt) for images_per_prompt in (1, 4))
    encoder_flops = sum(
        encoder.flops(1, encoder.tokenizer.max_length, encoder.prefix_length(pipeline.frozen["encoders"][name]))
        for name, encoder in pipeline.encoders.items()
    )
    assert one - four == (9 - 3) * encoder_flops
    tokens = pipeline.lower(params, 32, 32, how, images_per_prompt=4).in_avals[0][2]
    assert {shape.shape[0] for shape in jax.tree.leaves(tokens)} == {3}


def test_an_image_that_is_not_finite_is_an_error_that_names_its_seed(loaded):
    run, pipeline, params = loaded
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    with pytest.raises(NotFiniteError, match="the image of seed 5 has values that are not finite"):
        pipeline(broken, PROMPTS[:1], [5], 32, 32, run.sample)


def test_a_number_of_seeds_other_than_one_per_image_is_rejected(loaded):
    run, pipeline, params = loaded
    with pytest.raises(ValueError, match="3 seeds for 3 prompts with 4 images each"):
        pipeline(params, PROMPTS, range(3), 32, 32, run.sample, images_per_prompt=4)


def test_a_trained_model_needs_only_prompts(loaded):
    run, pipeline, params = loaded
    model, side = TrainedModel(*loaded), run.data.resolution
    images = model(PROMPTS[:2])
    assert images.shape == (2, side, side, 3)
    sampling = dataclasses.replace(run.sample, batch_size=2)  # no rows of padding
    np.testing.assert_array_equal(images, pipeline(params, PROMPTS[:2], [0, 1], side, side, sampling))


def test_a_trained_models_options_replace_the_configs(loaded, monkeypatch):
    run, pipeline, _ = loaded
    calls = []
    monkeypatch.setattr(
        type(pipeline), "__call__", lambda self, *arguments, **options: calls.append((*arguments[1:], options))
    )
    TrainedModel(*loaded)(PROMPTS[:1], [7, 8], height=48, images_per_prompt=2, steps=3)
    sampling = dataclasses.replace(run.sample, steps=3, batch_size=2)
    assert calls == [(PROMPTS[:1], [7, 8], 48, run.data.resolution, sampling, 2, {"negative_prompt": ""})]


def test_a_trained_model_takes_one_prompt_or_several_but_not_none(loaded, monkeypatch):
    calls = []
    monkeypatch.setattr(type(loaded[1]), "__call__", lambda self, *arguments, **_: calls.append(arguments[1:3]))
    model = TrainedModel(*loaded)
    model(PROMPTS[0])
    model(PROMPTS)
    assert calls == [(PROMPTS[:1], range(1)), (PROMPTS, range(3))]
    with pytest.raises(ValueError, match="prompts is empty"):
        model([])
