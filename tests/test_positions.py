"""Tests properties of the position embeddings, with the grids and head sizes of the real configs."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.models import embeddings
from hypothesis import given, settings
from hypothesis import strategies as st

from lidit_jax.errors import UserError
from lidit_jax.models import positions
from lidit_jax.models.dit import DiT
from lidit_jax.models.layers import Attention, LayerConfig
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.positions import grid_coordinates, parse_position, rope_tables, sincos_embedding
from lidit_jax.models.rotary import rotate
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, shardings

EVERY_TOKEN_APART = ("sincos", "rope", "conv+sincos", "conv+rope", "sincos+rope", "conv+sincos+rope")


def test_kinds_are_joined_by_plus():
    assert parse_position("conv") == ("conv",)
    assert parse_position("sincos+rope") == ("sincos", "rope")
    for wrong in ("", "table", "conv+", "conv,rope", "rope+rope", "Conv", "conv + rope"):
        with pytest.raises(UserError, match="model.position="):
            parse_position(wrong)


def test_head_sizes_that_rope_cannot_split_are_rejected():
    sizes = {"depth": 1, "hidden_size": 12, "num_heads": 2}
    with pytest.raises(UserError, match="not divisible by 4"):
        LIDiTConfig(**sizes, position="sincos+rope")
    LIDiTConfig(**sizes, position="sincos")
    with pytest.raises(UserError, match="position_grid=0"):
        LIDiTConfig(**sizes, position="sincos", position_grid=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 4), st.integers(1, 64))
def test_coordinates_keep_the_layout_at_a_multiple_of_the_resolution(height, width, factor, reference_side):
    with jax.disable_jit():
        coarse = grid_coordinates(height, width, reference_side)
        fine = grid_coordinates(height * factor, width * factor, reference_side)
    for axis, of_fine in zip(coarse, fine, strict=True):
        np.testing.assert_allclose(of_fine.reshape(-1, factor).mean(1), axis, atol=1e-4)
        np.testing.assert_allclose(axis, -axis[::-1], atol=1e-4)


def test_neighbours_are_one_apart_on_the_reference_grid_whatever_the_aspect_ratio():
    for height, width in ((16, 16), (8, 32), (32, 8)):
        for axis in grid_coordinates(height, width, 16):
            np.testing.assert_allclose(np.diff(axis), 1.0, rtol=1e-6)


@pytest.mark.parametrize("features", [1152, 2816])
def test_sincos_equals_diffusers_at_our_coordinates(features, monkeypatch):
    monkeypatch.setattr(positions, "THETA", 10_000.0)  # the constant in diffusers
    actual = np.asarray(sincos_embedding(6, 10, features, 8))
    rows, columns = (torch.from_numpy(np.array(axis)) for axis in grid_coordinates(6, 10, 8))
    expected = [
        embeddings.get_1d_sincos_pos_embed_from_grid(features // 2, axis, output_type="pt").numpy()
        for axis in (rows, columns)
    ]
    np.testing.assert_allclose(
        actual[..., : features // 2], np.broadcast_to(expected[0][:, None], (6, 10, features // 2)), atol=1e-5
    )
    np.testing.assert_allclose(
        actual[..., features // 2 :], np.broadcast_to(expected[1][None], (6, 10, features // 2)), atol=1e-5
    )


@pytest.mark.parametrize("head_dim", [72, 64])
def test_rope_equals_diffusers_on_each_axis(head_dim):
    x = np.random.default_rng(0).standard_normal((1, 60, 2, head_dim)).astype(np.float32)
    actual = rotate(jnp.asarray(x), *rope_tables(6, 10, head_dim, 8))
    pairs = x.reshape(1, 60, 2, 2, 2, head_dim // 4)  # [..., half, axis, pair]
    rotated = []
    for axis, coordinates in enumerate(grid_coordinates(6, 10, 8)):
        tokens = np.broadcast_to(coordinates[:, None] if axis == 0 else coordinates[None], (6, 10)).reshape(-1)
        cos, sin = embeddings.get_1d_rotary_pos_embed(
            head_dim // 2, torch.from_numpy(tokens.copy()), theta=100.0, use_real=True, repeat_interleave_real=False
        )
        of_axis = torch.from_numpy(pairs[..., axis, :].reshape(1, 60, 2, head_dim // 2)).transpose(1, 2)
        turned = embeddings.apply_rotary_emb(of_axis, (cos, sin), use_real_unbind_dim=-2)
        rotated.append(turned.transpose(1, 2).reshape(1, 60, 2, 2, head_dim // 4).numpy())
    np.testing.assert_allclose(actual, np.stack(rotated, axis=-2).reshape(x.shape), atol=1e-5)


@functools.cache
def logits_of_equal_tokens(side, head_dim):
    """Returns attention logits between equal tokens at all positions, [N, N]."""
    query, key = np.random.default_rng(0).standard_normal((2, 1, 1, 1, head_dim)).astype(np.float32)
    tables, shape = rope_tables(side, side, head_dim, side), (1, side * side, 1, head_dim)
    query, key = (rotate(jnp.broadcast_to(x, shape), *tables)[0, :, 0] for x in (query, key))
    return np.asarray(query @ key.T)


@pytest.mark.parametrize(("side", "head_dim"), [(16, 72), (32, 64)])
def test_rope_logits_depend_on_the_offset_alone(side, head_dim):
    logits = logits_of_equal_tokens(side, head_dim).reshape(side, side, side, side)
    np.testing.assert_allclose(logits[1:, 1:, 1:, 1:], logits[:-1, :-1, :-1, :-1], atol=1e-4)
    assert np.ptp(logits[side // 2, side // 2]) > 1


def dit(position, grid, *, heads=1, head_dim=32, depth=2):
    return DiT(
        LIDiTConfig(
            depth=depth,
            hidden_size=heads * head_dim,
            num_heads=heads,
            patch_size=1,
            latent_channels=4,
            position=position,
            position_grid=grid,
            remat="none",
            dtype="float32",
        )
    )


def conditions(model, batch=1, seed=0):
    """Returns text [B, 2, C], its mask and the conditioning vector."""
    text, vector = np.random.default_rng(seed).standard_normal((2, 1, 2, model.config.hidden_size)).astype(np.float32)

    def rows(x):
        return jnp.broadcast_to(x, (batch, *x.shape[1:]))

    return rows(text), jnp.ones((batch, 2), bool), rows(vector[:, 0])


def random_params(model, latents):
    """Returns random parameters, none of which is zero, made by NumPy since `init` would compile."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), latents, *conditions(model)))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), shapes)


def num_distinct_tokens(position, side, head_dim):
    """Counts distinct tokens of constant latents, by their values before the blocks or their attention logits."""
    model = dit(position, side, depth=1)
    latents = jnp.ones((1, side, side, 4))
    params = random_params(model, latents)
    apply = jax.jit(functools.partial(model.apply, mutable="intermediates"))
    tokens = np.asarray(apply({"params": params}, latents, *conditions(model))[1]["intermediates"]["tokens"][0][0])
    if "rope" in position:
        tokens = np.concatenate([tokens, logits_of_equal_tokens(side, head_dim)], axis=1)
    return len(np.unique(np.round(tokens / np.abs(tokens).max(), 4), axis=0))


@pytest.mark.parametrize("side", [5, 16, 32])
def test_conv_alone_distinguishes_25_tokens_on_any_grid(side):
    """The limit of the paper's position embedding, and the reason for the other ones."""
    assert num_distinct_tokens("conv", side, 64) == 25


@pytest.mark.parametrize(("side", "head_dim"), [(16, 72), (32, 64)])
@pytest.mark.parametrize("position", EVERY_TOKEN_APART)
def test_every_other_position_distinguishes_all_tokens(position, side, head_dim):
    assert num_distinct_tokens(position, side, head_dim) == side * side


@pytest.mark.parametrize(("side", "head_dim"), [(16, 72), (32, 64)])
def test_the_tpu_kernel_gives_the_same_with_rope(side, head_dim):
    """Compares one block with the interpreted splash kernel to the same block with XLA's attention."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, side * side, head_dim)), jnp.float32)
    tables, outputs = rope_tables(side, side, head_dim, side), {}
    for implementation in ("xla", "splash"):
        attention = Attention(LayerConfig(1, qk_norm=True, attention=implementation))
        params = jax.jit(lambda x, a=attention: a.init(jax.random.key(0), x))(x)
        outputs[implementation] = jax.jit(lambda p, x, a=attention: a.apply(p, x, rotary=tables))(params, x)
    np.testing.assert_allclose(outputs["splash"], outputs["xla"], atol=2e-5)


def test_positions_are_the_same_on_a_mesh():
    model, side = dit("conv+sincos+rope", 8, heads=2, head_dim=16), 16
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((4, side, side, 4)), jnp.float32)
    params = random_params(model, latents[:1])
    inputs = (latents, *conditions(model, 4))

    def apply(params, *inputs):
        return model.apply({"params": params}, *inputs)

    expected = jax.jit(apply)(params, *inputs)
    mesh, rules = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), ShardingRules()
    boxed = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    placed = jax.device_put(params, shardings(boxed, mesh, rules))
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules.pairs()):
        actual = jax.jit(apply)(placed, *jax.device_put(inputs, batch_sharding(mesh, rules)))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def fixed_image(height, width):
    """Returns a smooth image without symmetries, [H, W, 4], as a function of coordinates in the unit area."""
    rows, columns = grid_coordinates(height, width, 1)
    x, y = np.meshgrid(columns, rows)
    waves = [np.sin(3 * x + 1), np.cos(4 * y - 1), np.sin(4 * x * y + x), x - y]
    return jnp.asarray(np.stack(waves, axis=-1), jnp.float32)


@functools.cache
def model_of_fixed_image(position, steps=100, side=16):
    """Trains a small model to generate one image from pure noise on 16x16 tokens; returns its error by grid size."""
    model = dit(position, side)
    target = fixed_image(side, side)
    text = conditions(model, 2)
    optimizer = optax.adam(3e-3)

    def loss(params, key):
        noise = jax.random.normal(key, (2, side, side, 4))
        return jnp.mean((model.apply({"params": params}, noise, *text) - target) ** 2)

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(key, steps))[0][0]

    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, side, side, 4)), *conditions(model)))
    params = train(params["params"], jax.random.key(1))

    def relative_error(height, width):
        """Returns the mean squared error relative to that of the best constant."""
        image = fixed_image(height, width)
        noise = jax.random.normal(jax.random.key(2), (2, height, width, 4))
        output = jax.jit(model.apply)({"params": params}, noise, *text)
        return float(jnp.mean((output - image) ** 2) / jnp.mean((image - image.mean((0, 1))) ** 2))

    return relative_error


def test_a_small_model_learns_a_fixed_image_on_16x16_tokens():
    assert model_of_fixed_image(LIDiTConfig.position)(16, 16) < 0.1


@pytest.mark.slow
def test_with_conv_alone_it_stays_near_the_best_constant():
    """Shows that the test above can fail."""
    assert model_of_fixed_image("conv")(16, 16) > 0.5


@pytest.mark.parametrize(("height", "width"), [(24, 24), (32, 32), (12, 20)])
def test_the_learned_layout_is_kept_at_another_resolution(height, width):
    assert model_of_fixed_image(LIDiTConfig.position)(height, width) < 0.2


def test_all_positions_are_covered():
    """A new kind must be added to the parameters of the tests above."""
    kinds = positions.KINDS
    joined = {frozenset(c) for n in range(1, len(kinds) + 1) for c in itertools.combinations(kinds, n)}
    assert joined == {frozenset(parse_position(name)) for name in (*EVERY_TOKEN_APART, "conv")}
