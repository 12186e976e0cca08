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
    is_causal: bool = False,
    implementation: str = "auto",
) -> jax.Array:
    """Attention with a float32 softmax.

    Args:
      query: [B, Lq, H, D].
      key, value: [B, Lk, K, D]; K divides H (grouped queries).
      key_mask: bool [B, Lk], True where a key may be attended to (padding is False). A row without any True key is
        the caller's mistake: it yields the mean of the values, never NaN.
      mask: bool, broadcastable to [B, H, Lq, Lk]; joined with `key_mask`.
      is_causal: query i sees keys 0..i.
      implementation: "xla", "cudnn" (NVIDIA, half precision) or "auto", which leaves the choice to XLA.

    Returns:
      [B, Lq, H, D] in the dtype of `query`.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :]  # [B, 1, 1, Lk]
        mask = key_mask if mask is None else jnp.logical_and(mask, key_mask)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=is_causal,
        implementation=None if implementation == "auto" else implementation,
    )
