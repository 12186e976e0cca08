"""Attention maps of a module: which tokens attend to which, recomputed from the module's own queries and keys.

Fused attention kernels return only the product of weights and values, so the weights are computed again here.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from lidit_jax.models.layers import Attention, rotate_query_and_key
from lidit_jax.models.rotary import RotaryTables
from lidit_jax.models.sharded_matmul import product_precision

COLLECTION = "attention_maps"


@functools.partial(jax.jit, static_argnums=0)
def attention_maps(module: nn.Module, params: Any, *inputs: Any) -> dict[str, jax.Array]:
    """Computes the weights of every `Attention` called in `module.apply({"params": params}, *inputs)`; jitted.

    Args:
      module: a refiner, or `TextCondition`, which contains all refiners. `DiT` and `LIDiT` are not supported, because
        intermediates cannot leave their `nn.scan` over the blocks.
      params: parameters of the module.
      *inputs: inputs of the module's call.

    Returns:
      float32 [B, H, Lq, Lk] by the path of the attention in the module, such as "token_refiner_0/block_1/attention".
      The weights [b, h, q] of a query sum to 1; those of padded keys are 0.
    """
    outputs: dict[tuple[str, ...], jax.Array] = {}

    def watch(call, args, kwargs, context):
        output = call(*args, **kwargs)
        called = context.module
        if isinstance(called, Attention):
            # A variable and not a dict, as a rematerialised block is a transformation of its own.
            called.sow(COLLECTION, "weights", _weights(called, outputs, *args, **kwargs))
        elif isinstance(called.parent, Attention):  # projections and norms, which return before their attention does
            outputs[called.path] = output
        return output

    with nn.intercept_methods(watch):
        _, variables = module.apply({"params": params}, *inputs, mutable=[COLLECTION])
    sown = flatten_dict(variables[COLLECTION], sep="/")
    return {path.removesuffix("weights").rstrip("/"): weights for path, (weights,) in sown.items()}


def _weights(
    attention: Attention,
    outputs: Mapping[tuple[str, ...], jax.Array],
    x: jax.Array,
    context: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    rotary: RotaryTables | None = None,
    context_rotary: RotaryTables | None = None,
) -> jax.Array:
    """Computes the softmax weights of one attention, float32 [B, H, Lq, Lk].

    Args:
      attention: the module.
      outputs: outputs of its projections and norms by module path.
      x: see `Attention`; the same for the remaining arguments.
      context: see `x`.
      key_mask: see `x`.
      rotary: see `x`.
      context_rotary: see `x`.
    """

    def heads(name: str) -> jax.Array:
        projected = outputs[(*attention.path, f"{name}_norm" if attention.layers.qk_norm else name)]
        return projected.reshape(*projected.shape[:2], attention.layers.num_heads, -1)

    # [B, Lq, H, D], [B, Lk, H, D]
    query, key = rotate_query_and_key(heads("query"), heads("key"), rotary, context_rotary)
    options = {"precision": product_precision(query.dtype), "preferred_element_type": jnp.float32}
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, **options) * query.shape[-1] ** -0.5
    mask = jnp.ones(logits.shape[-2:], bool)
    if attention.is_causal:
        mask = jnp.tril(mask)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    return jax.nn.softmax(logits, where=mask)
