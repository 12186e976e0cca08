"""Cross-entropy over a large vocabulary, without the logits of all tokens at once."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.models.sharded_matmul import cast_and_gather, product_precision
from lidit_jax.parallel.rules import GRADIENT_SCOPE, constrain, num_shards

HEAD_AXES = ("embed", "vocab")  # logical axes of the output head's kernel
CHUNK = 128  # tokens of a sequence whose logits exist at once


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_losses(hidden: jax.Array, kernel: jax.Array, targets: jax.Array, chunk: int = CHUNK) -> jax.Array:
    """Returns the negative log-likelihood of every target, in nats: float32 [B, L].

    Logits exist for `chunk` tokens of each sequence at once, in float32, forward and backward: with a vocabulary of
    128k, those of 2,048 tokens would take 1 GB a sequence. The backward pass computes them again. The kernel is
    gathered once, and each device sums its gradient over all chunks, in float32, before the devices' sums are reduced
    once.

    Args:
      hidden: input of the output head, [B, L, C]; its dtype is that of the products, which accumulate in float32.
      kernel: kernel of the output head, [C, V].
      targets: int32 [B, L].
      chunk: tokens of a sequence whose logits exist at once.
    """
    return _forward(hidden, kernel, targets, chunk)[0]


def _forward(hidden, kernel, targets, chunk):
    gathered = cast_and_gather(kernel, HEAD_AXES, hidden.dtype)

    def losses_of(x_and_targets):
        x, target = x_and_targets
        logits = _logits(x, gathered)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
        return normaliser - chosen, normaliser

    chunks = _split(hidden, chunk), _split(targets, chunk)
    with jax.named_scope("output_head"):
        losses, normaliser = jax.lax.map(losses_of, chunks)
    length = hidden.shape[1]
    # The empty array carries the stored dtype, which must be a JAX type.
    residuals = hidden, gathered, targets, normaliser, jnp.zeros((0,), kernel.dtype)
    return _join(losses, length), residuals


def _backward(chunk, residuals, cotangent):
    hidden, gathered, targets, normaliser, stored = residuals
    # A leading axis over the shards of the batch keeps the devices' sums apart: XLA would reduce a sum over the batch
    # in every iteration.
    shards = _batch_shards(hidden.shape[0])

    def of_shards(x):
        return constrain(x.reshape(shards, -1, *x.shape[1:]), ("batch", *[None] * x.ndim))

    def gradients_of(kernel_gradient, chunk_inputs):
        x, target, normaliser, cotangent = chunk_inputs
        probabilities = jnp.exp(_logits(x, gathered) - normaliser[..., None])
        is_target = target[..., None] == jnp.arange(gathered.shape[1])
        logits_gradient = ((probabilities - is_target) * cotangent[..., None]).astype(x.dtype)
        precision = product_precision(x.dtype)
        x_gradient = jnp.matmul(logits_gradient, gathered.T, precision=precision)
        kernel_gradient += jax.lax.dot_general(
            of_shards(x),
            of_shards(logits_gradient),
            (((1, 2), (1, 2)), ((0,), (0,))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return constrain(kernel_gradient, ("batch", None, "vocab")), x_gradient

    chunks = _split(hidden, chunk), _split(targets, chunk), normaliser, _split(cotangent, chunk)
    with jax.named_scope("output_head"), jax.named_scope(GRADIENT_SCOPE):
        zeros = constrain(jnp.zeros((shards, *gathered.shape), jnp.float32), ("batch", None, "vocab"))
        kernel_gradient, x_gradient = jax.lax.scan(gradients_of, zeros, chunks)
        kernel_gradient = constrain(jnp.sum(kernel_gradient, axis=0), HEAD_AXES).astype(stored.dtype)
    return _join(x_gradient, hidden.shape[1]), kernel_gradient, None


token_losses.defvjp(_forward, _backward)


def _batch_shards(rows: int) -> int:
    """Returns the number of shards of a batch of `rows` rows in the current mesh; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not nn.get_logical_axis_rules():
        return 1
    [axes] = nn.logical_to_mesh_axes(("batch",)) or (None,)
    shards = num_shards(mesh, axes)
    return shards if rows % shards == 0 else 1


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel, precision=product_precision(x.dtype), preferred_element_type=jnp.float32)


def _split(x: jax.Array, chunk: int) -> jax.Array:
    """Returns [B, L, …] as [chunks, B, chunk, …], padded with zeros."""
    padding = [(0, 0), (0, -x.shape[1] % chunk)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, padding)
    return jnp.swapaxes(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 0, 1)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_split`."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]
