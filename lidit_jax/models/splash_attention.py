"""Attention on TPUs without logits in the chip's memory: the Pallas kernel that JAX ships, made to fit our shapes.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) works on whole blocks of one device. Here lengths are
padded to blocks, the padding and the text's mask become segment numbers, and `shard_map` hands each device its own
samples and heads.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from lidit_jax.parallel.rules import num_shards

# Lengths of blocks are multiples of a register's lanes.
LANES = 128
# The longest block. Larger ones re-read less; the smallest chip's VMEM has room for 1024 x 1024 float32 logits.
LONGEST_BLOCK = 1024
# Of the kernel's results, for policies of rematerialisation.
CHECKPOINT_NAME = "splash_attention"


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `attention.dot_product_attention`, differentiable; sharded by the mesh and the logical rules in force.

    Args:
      query: [B, Lq, H, D].
      key, value: [B, Lk, K, D]; K divides H.
      key_mask: bool [B, Lk]. A row without any True key yields the mean of the values.
      interpret: run the kernel's operations one by one on any platform: correct, and slow.

    Returns:
      [B, Lq, H, D] in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # the kernel scales nothing
    is_masked = key_mask is not None
    if key_mask is None:
        key_mask = jnp.ones(key.shape[:2], bool)
    else:
        # Where no key may be seen the kernel's gradients would be wrong by orders of magnitude. There all keys may be,
        # with equal logits, which is what a softmax of masked logits comes to.
        has_keys = jnp.any(key_mask, axis=-1)
        query = jnp.where(has_keys[:, None, None, None], query, 0)
        key_mask = key_mask | ~has_keys[:, None]
    attend = functools.partial(_attend, is_masked=is_masked, is_causal=is_causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        batch = _axes(mesh, "batch", query.shape[0])
        heads = _axes(mesh, "heads", math.gcd(query.shape[2], key.shape[2]))
        tokens, row = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
        attend = jax.shard_map(attend, in_specs=(tokens, tokens, tokens, row), out_specs=tokens, check_vma=False)
    return attend(query, key, value, key_mask)


def _axes(mesh: jax.sharding.AbstractMesh, name: str, size: int):
    """The mesh axes of a logical axis, if they divide its size: else every device does the whole."""
    [axes] = nn.logical_to_mesh_axes((name,)) or (None,)
    return axes if size % num_shards(mesh, axes) == 0 else None


def _attend(query, key, value, key_mask, *, is_masked, is_causal, interpret):
    """One device's part of `splash_attention`; query is scaled."""
    (_, query_length, num_heads, _), key_length = query.shape, key.shape[1]
    query_block, key_block = _block(query_length), _block(key_length)
    query, key, value = (
        _pad(x, block).swapaxes(1, 2)  # [B, H, L, D]
        for x, block in ((query, query_block), (key, key_block), (value, key_block))
    )
    shape = (query.shape[2], key.shape[2])
    mask = masks.CausalMask(shape) if is_causal else masks.FullMask(shape)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * num_heads),
        block_sizes=splash.BlockSizes(
            block_q=query_block,
            block_kv=key_block,
            block_q_dkv=query_block,
            block_kv_dkv=key_block,
            use_fused_bwd_kernel=True,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )
    if is_masked or shape[1] > key_length:
        # A query sees the keys of its own number: all queries have 1, keys 1 or (masked, padding) 0.
        of_queries, of_keys = jnp.ones(shape[0], jnp.int32), _pad(key_mask, key_block).astype(jnp.int32)
        attend = lambda q, k, v, ids: kernel(q, k, v, splash.SegmentIds(of_queries, ids))  # noqa: E731
        y = jax.vmap(attend)(query, key, value, of_keys)
    else:
        y = jax.vmap(kernel)(query, key, value)
    return y.swapaxes(1, 2)[:, :query_length]


def _block(length: int) -> int:
    """The fewest blocks, and of them the shortest that cover the length."""
    return math.ceil(length / math.ceil(length / LONGEST_BLOCK) / LANES) * LANES


def _pad(x: jax.Array, block: int) -> jax.Array:
    """[B, L, ...] -> [B, L', ...] with zeros up to a multiple of the block."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))
