"""The chunked cross-entropy: values, gradients, sharding and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lidit_jax.compile.cost import Costs
from lidit_jax.compile.hlo import Module
from lidit_jax.models.token_loss import token_losses
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules


def inputs(batch, length, width, vocabulary, dtype=np.float32):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(batch, length, width)), dtype)
    kernel = jnp.asarray(random.normal(size=(width, vocabulary)) / width**0.5, jnp.float32)
    return hidden, kernel, jnp.asarray(random.integers(0, vocabulary, (batch, length)), jnp.int32)


def plain(hidden, kernel, targets):
    logits = jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def gradients(loss, hidden, kernel, targets):
    weights = jnp.linspace(0, 1, targets.size).reshape(targets.shape)  # some tokens do not count
    return jax.jit(jax.grad(lambda h, k: jnp.sum(weights * loss(h, k, targets)), (0, 1)))(hidden, kernel)


@pytest.mark.parametrize(("length", "chunk"), [(16, 4), (13, 4), (3, 8), (1, 1)])
def test_values_and_gradients_are_those_of_all_logits_at_once(length, chunk):
    hidden, kernel, targets = inputs(2, length, 24, 50)

    def chunked(h, k, t):
        return token_losses(h, k, t, chunk)

    np.testing.assert_allclose(chunked(hidden, kernel, targets), plain(hidden, kernel, targets), atol=1e-5)
    for ours, theirs in zip(
        gradients(chunked, hidden, kernel, targets), gradients(plain, hidden, kernel, targets), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_bfloat16_sums_in_float32():
    hidden, kernel, targets = inputs(2, 64, 128, 300, jnp.bfloat16)
    losses = token_losses(hidden, kernel, targets, 16)
    assert losses.dtype == jnp.float32
    exact = plain(hidden.astype(jnp.float32), kernel.astype(jnp.bfloat16).astype(jnp.float32), targets)
    np.testing.assert_allclose(losses, exact, atol=1e-4)
    ours = gradients(lambda h, k, t: token_losses(h, k, t, 16), hidden, kernel, targets)
    theirs = gradients(plain, hidden, kernel, targets)
    assert [g.dtype for g in ours] == [jnp.bfloat16, jnp.float32]
    np.testing.assert_allclose(ours[1], theirs[1], atol=0.02 * np.abs(theirs[1]).max())


def test_a_mesh_gives_one_devices_values_and_gradients():
    hidden, kernel, targets = inputs(8, 12, 16, 48)
    alone = jax.jit(lambda *x: token_losses(*x, 4))(hidden, kernel, targets)
    kernel_gradient = gradients(lambda *x: token_losses(*x, 4), hidden, kernel, targets)[1]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh), nn.logical_axis_rules(ShardingRules().pairs()):
        np.testing.assert_allclose(jax.jit(lambda *x: token_losses(*x, 4))(hidden, kernel, targets), alone, atol=1e-5)
        sharded = gradients(lambda *x: token_losses(*x, 4), hidden, kernel, targets)[1]
    np.testing.assert_allclose(sharded, kernel_gradient, atol=1e-5)
    assert sharded.sharding.shard_shape(sharded.shape) == (8, 24)


def test_the_kernels_gradient_is_reduced_once():
    """Not once for each of the 16 chunks: the program has no collective of the kernel's size in its loop."""
    hidden, kernel, targets = inputs(8, 64, 16, 4096)
    with jax.set_mesh(make_mesh({"fsdp": -1})), nn.logical_axis_rules(ShardingRules().pairs()):
        grad = jax.jit(jax.grad(lambda h, k: jnp.sum(token_losses(h, k, targets, 4)), (0, 1)))
        costs = Costs(Module(grad.lower(hidden, kernel).compile().as_text()))
    moved = sum(costs.total().messages.values())
    assert 0 < moved < 4 * kernel.size * 4  # gathered, and its gradient reduced


def test_the_logits_of_a_real_vocabulary_never_exist_at_once():
    """LLaMA 3's vocabulary and LLaVA's context, with a narrow model: the program's memory, which is not run."""
    batch, length, width, vocabulary = 1, 2048, 16, 128_256
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocabulary), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )
    loss = jax.value_and_grad(lambda h, k, t: jnp.sum(token_losses(h, k, t)), (0, 1))
    memory = jax.jit(loss).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < batch * length * vocabulary * 4 / 2
