"""Scaled dot-product attention: the one entry point that every module of the project goes through."""

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("auto", "xla", "cudnn")


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    key_mask: jax.Array | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    implementation: str = "auto",
) -> jax.Array:
    """Attention with a float32 softmax.

    Args:
      query: [B, Lq, H, D].
      key, value: [B, Lk, K, D]; K divides H (grouped queries).
      key_mask: bool [B, Lk], True where a key may be attended to (padding is False). A row without any True key is
        the caller's mistake: it yields the mean of the values, never NaN.
      mask: bool, broadcastable to [B, H, Lq, Lk]; joined with `key_mask`.
      bias: float, broadcastable to [B, H, Lq, Lk], added to the scaled logits (T5's relative positions).
      is_causal: query i sees keys 0..i.
      scale: of the logits; default 1 / sqrt(D).
      softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma 2); 0 leaves them. XLA alone
        computes it, whatever `implementation` says.
      implementation: "xla", "cudnn" (NVIDIA, half precision) or "auto", which leaves the choice to XLA.

    Returns:
      [B, Lq, H, D] in the dtype of `query`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :]  # [B, 1, 1, Lk]
        mask = key_mask if mask is None else jnp.logical_and(mask, key_mask)
    if softcap:
        if bias is not None or is_causal:
            raise ValueError("softcap goes with a mask, not with a bias or is_causal")
        return _softcapped_attention(query, key, value, mask, scale, softcap)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        implementation=None if implementation == "auto" else implementation,
    )


def _softcapped_attention(query, key, value, mask, scale, softcap):
    """jax.nn's attention has no place for a function of the logits."""
    batch, length, num_heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)  # [B, Lq, K, H / K, D]
    logits = jnp.einsum("bqkgd,bmkd->bkgqm", grouped, key, preferred_element_type=jnp.float32)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        full = jnp.broadcast_to(mask, (batch, num_heads, length, key.shape[1]))
        full = full.reshape(batch, key.shape[2], -1, length, key.shape[1])
        logits = jnp.where(full, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    y = jnp.einsum("bkgqm,bmkd->bqkgd", weights, value)
    return y.reshape(batch, length, num_heads, head_dim).astype(query.dtype)
