"""Which tokens look at which: the attention weights of a model's call, from its own queries and keys.

Attention's kernels compute weights and values in one piece and hand out their product alone.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.models.layers import Attention, rotate_query_and_key
from lidit_jax.models.products import product_precision
from lidit_jax.models.rotary import RotaryTables


@functools.partial(jax.jit, static_argnums=0)
def attention_maps(module: nn.Module, params: Any, *inputs: Any) -> dict[str, jax.Array]:
    """The weights of every `Attention` that `module.apply({"params": params}, *inputs)` goes through; jitted.

    Args:
      module: of the refiners, or `TextCondition`, which holds them all. Nothing leaves the loop over DiT's blocks
        (`nn.scan`), so `DiT` and `LIDiT` will not do.

    Returns:
      {path of the attention in the module, as "token_refiner_0/block_1/attention": float32 [B, H, Lq, Lk]}. The weights
      of a query, [b, h, q], sum to 1; those of padding are 0.
    """
    outputs: dict[tuple[str, ...], jax.Array] = {}
    maps: dict[str, jax.Array] = {}

    def watch(call, args, kwargs, context):
        output = call(*args, **kwargs)
        called = context.module
        if isinstance(called, Attention):
            maps["/".join(called.path)] = _weights(called, outputs, *args, **kwargs)
        elif isinstance(called.parent, Attention):  # its projections and norms, which end before it does
            outputs[called.path] = output
        return output

    with nn.intercept_methods(watch):
        module.apply({"params": params}, *inputs)
    return maps


def _weights(
    attention: Attention,
    outputs: Mapping[tuple[str, ...], jax.Array],
    x: jax.Array,
    context: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    rotary: RotaryTables | None = None,
    context_rotary: RotaryTables | None = None,
) -> jax.Array:
    """What `Attention` does between its projections and the values; the last arguments are those of its call."""

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
