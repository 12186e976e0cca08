"""Flash attention on TPUs: adapts JAX's Pallas splash attention kernel to this project's shapes and shardings.

The kernel (`jax.experimental.pallas.ops.tpu.splash_attention`) never writes the logits to HBM. It runs on one device,
on lengths that are multiples of its block size. Here lengths are padded to blocks, padding and key mask become segment
ids, and `shard_map` runs the kernel on each device's samples and heads.
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

# Block lengths are multiples of the lanes of a vector register.
LANES = 128
# Longest block. Larger blocks re-read less memory; the smallest chip's VMEM holds 1024 x 1024 float32 logits.
LONGEST_BLOCK = 1024
# Tokens are the minor axis of queries, keys and values. Heads of 64 or 72 features would fill about half of the 128
# lanes of a tile, so that norms, rotations and transposes before the kernel would move twice the bytes: for a block of
# the 10B model, 66 GB where this moves 45 GB (TPU compiler, v6e).
_LAYOUTS = dict.fromkeys(("q_layout", "k_layout", "v_layout"), splash.QKVLayout.SEQ_MINOR)
# Checkpoint name of the kernel's results, for rematerialisation policies.
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
    """Computes `attention.dot_product_attention` with the splash kernel, forward and backward.

    Batch and heads are sharded by the current mesh and logical axis rules.

    Args:
      query: [B, Lq, H, D].
      key: [B, Lk, K, D]; K divides H.
      value: [B, Lk, K, D].
      key_mask: bool [B, Lk]. A row without any True key yields the mean of the values.
      is_causal: if True, query i attends to keys 0..i only.
      scale: factor on the logits; None is 1 / sqrt(D).
      interpret: run the kernel in Pallas' interpreter, on any platform: correct but slow.

    Returns:
      [B, Lq, H, D] in the dtype of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)  # the kernel does not scale the logits
    is_masked = key_mask is not None
    if key_mask is None:
        key_mask = jnp.ones(key.shape[:2], bool)
    else:
        # In rows without a True key the kernel's gradients would be wrong by orders of magnitude. Such rows attend to
        # all keys with equal logits instead, which equals a softmax of logits that are all masked.
        has_keys = jnp.any(key_mask, axis=-1)
        query = jnp.where(has_keys[:, None, None, None], query, 0)
        key_mask = key_mask | ~has_keys[:, None]
    attend = functools.partial(_attend_on_device, is_masked=is_masked, is_causal=is_causal, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        batch = _mesh_axes(mesh, "batch", query.shape[0])
        heads = _mesh_axes(mesh, "heads", math.gcd(query.shape[2], key.shape[2]))
        tokens, mask = PartitionSpec(batch, None, heads, None), PartitionSpec(batch, None)
        attend = jax.shard_map(attend, in_specs=(tokens, tokens, tokens, mask), out_specs=tokens, check_vma=False)
    return attend(query, key, value, key_mask)


def _mesh_axes(mesh: jax.sharding.AbstractMesh, name: str, size: int):
    """Returns the mesh axes of a logical axis, or None (replicated) if they do not divide its size."""
    [axes] = nn.logical_to_mesh_axes((name,)) or (None,)
    return axes if size % num_shards(mesh, axes) == 0 else None


def _attend_on_device(query, key, value, key_mask, *, is_masked, is_causal, interpret):
    """Runs the kernel on one device's samples and heads; the query is already scaled."""
    (_, query_length, num_heads, _), key_length = query.shape, key.shape[1]
    query_block, key_block = _block_length(query_length), _block_length(key_length)
    query, key, value = (
        _pad_to_block(x, block).swapaxes(1, 2)  # [B, H, L, D]
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
            **_LAYOUTS,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=CHECKPOINT_NAME,
        interpret=interpret,
    )
    if is_masked or shape[1] > key_length:
        # A query attends to the keys with its own segment id: all queries have 1, keys 1 or (masked, padding) 0.
        query_ids = jnp.ones(shape[0], jnp.int32)
        key_ids = _pad_to_block(key_mask, key_block).astype(jnp.int32)

        def attend(q, k, v, sample_key_ids):
            return kernel(q, k, v, splash.SegmentIds(query_ids, sample_key_ids))

        y = jax.vmap(attend)(query, key, value, key_ids)
    else:
        y = jax.vmap(kernel)(query, key, value)
    return y.swapaxes(1, 2)[:, :query_length]


def _block_length(length: int) -> int:
    """Returns the shortest block length that covers `length` with the fewest blocks."""
    return math.ceil(length / math.ceil(length / LONGEST_BLOCK) / LANES) * LANES


def _pad_to_block(x: jax.Array, block: int) -> jax.Array:
    """Pads axis 1 with zeros to a multiple of the block: [B, L, ...] -> [B, L', ...]."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2))
