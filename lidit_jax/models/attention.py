"""Scaled dot-product attention: the only entry point, which picks the XLA, splash (TPU) or cuDNN kernel."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.sharded_matmul import product_precision
from lidit_jax.models.splash_attention import LANES, splash_attention

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
# Smallest number of logits per head, with lengths padded to blocks, for which the TPU kernel pays for its padding. They
# are padded because all buckets of a resolution should use one kernel: at 256 px, images of 192x320 have 240 tokens.
SPLASH_LOGITS = 256 * 256


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
    """Computes scaled dot-product attention with a float32 softmax.

    With float32 inputs the matrix products run in full float32 precision, on accelerators too.

    Args:
      query: [B, Lq, H, D].
      key: [B, Lk, K, D]; K divides H (grouped-query attention).
      value: [B, Lk, K, D].
      key_mask: bool [B, Lk], True where a key may be attended to (padding is False). Every row should have a True key;
        a row without one yields the mean of the values, not NaN.
      mask: bool, broadcastable to [B, H, Lq, Lk]; combined with `key_mask` by a logical and.
      bias: float, broadcastable to [B, H, Lq, Lk], added to the scaled logits (T5's relative positions).
      is_causal: if True, query i attends to keys 0..i only.
      scale: factor on the logits; None is 1 / sqrt(D).
      softcap: logits become softcap * tanh(logits / softcap) before the mask (Gemma 2); 0 disables it. Softcapped
        attention always runs in XLA, unless `implementation` is "splash", which rejects it.
      implementation: "xla" (any platform), "splash" (the TPU kernel; interpreted elsewhere, which is slow), "cudnn"
        (NVIDIA, half precision) or "auto", see `select_implementation`.

    Returns:
      [B, Lq, H, D] in the dtype of `query`.

    Raises:
      UserError: if the implementation is unknown, or is "splash" with a mask, bias, softcap or (on TPUs) float32.
      ValueError: if `softcap` is combined with `bias` or `is_causal`.
    """
    check_implementation(implementation)
    is_plain = mask is None and bias is None and not softcap
    if implementation == "auto":
        is_masked = key_mask is not None
        implementation = select_implementation(_platform(), query, key, is_plain=is_plain, is_masked=is_masked)
    if implementation == "splash":
        if not is_plain:
            raise UserError(
                "attention='splash' supports no bias, softcap or mask over queries and keys: use 'auto' or 'xla'"
            )
        interpret = _platform() != "tpu"
        if not interpret and query.dtype == jnp.float32:
            raise UserError(
                "attention='splash' would multiply float32 in bfloat16: use 'auto' or 'xla', or dtype='bfloat16'"
            )
        return splash_attention(
            query, key, value, key_mask=key_mask, is_causal=is_causal, scale=scale, interpret=interpret
        )
    if key_mask is not None:
        key_mask = key_mask[:, None, None, :]  # [B, 1, 1, Lk]
        mask = key_mask if mask is None else jnp.logical_and(mask, key_mask)
    if softcap:
        if bias is not None or is_causal:
            raise ValueError(f"softcap={softcap} cannot be combined with bias or is_causal: use mask instead")
        return _softcapped_attention(query, key, value, mask, scale, softcap)
    # jax.nn.dot_product_attention has no precision argument; it uses the ambient default.
    is_float32 = query.dtype == jnp.float32
    with jax.default_matmul_precision("highest") if is_float32 else contextlib.nullcontext():
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            bias=bias,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            implementation="cudnn" if implementation == "cudnn" else "xla",
        )


def check_implementation(implementation: str) -> None:
    """Raises UserError if `implementation` is not one of `IMPLEMENTATIONS`."""
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention={implementation!r:.80} is unknown: use one of {', '.join(IMPLEMENTATIONS)}")


def select_implementation(platform: str, query: jax.Array, key: jax.Array, *, is_plain: bool, is_masked: bool) -> str:
    """Selects the implementation for "auto".

    Args:
      platform: "tpu", "nvidia" or any other platform.
      query: [B, Lq, H, D]; only its shape and dtype are used.
      key: [B, Lk, K, D]; only its shape is used.
      is_plain: True if there is no bias, no softcap and no mask over queries and keys.
      is_masked: True if there is a key mask.

    Returns:
      "splash", "cudnn" or "xla".
    """
    is_float32 = query.dtype == jnp.float32  # kernels multiply in half precision
    num_logits = math.prod(-(-x.shape[1] // LANES) * LANES for x in (query, key))
    if platform == "tpu" and is_plain and not is_float32 and num_logits >= SPLASH_LOGITS:
        return "splash"
    # cuDNN needs the key mask expanded to a full [Lq, Lk] bias, which costs most of what flash attention saves.
    fits_cudnn = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    if platform == "nvidia" and is_plain and not is_masked and fits_cudnn:
        return "cudnn"
    return "xla"


def _platform() -> str:
    """Returns the platform of the current mesh, which may be of absent devices (AOT compilation), or of this process.

    An NVIDIA GPU that cuDNN's kernels support is "nvidia", any other GPU "gpu".
    """
    mesh = jax.sharding.get_abstract_mesh()
    platform = mesh.abstract_device.platform if mesh.abstract_device else jax.default_backend()
    if platform in ("gpu", "cuda"):
        # AMD GPUs report "gfx90a" and the like; cuDNN's attention kernels need NVIDIA compute capability 8.0.
        capability = getattr(jax.local_devices()[0], "compute_capability", "")
        return "nvidia" if re.fullmatch(r"\d+\.\d+", capability) and float(capability) >= 8 else "gpu"
    return platform


def _softcapped_attention(query, key, value, mask, scale, softcap):
    """Computes attention with capped logits, for which jax.nn.dot_product_attention has no hook."""
    batch, length, num_heads, head_dim = query.shape
    grouped = query.reshape(batch, length, key.shape[2], -1, head_dim)  # [B, Lq, K, H / K, D]
    precision = product_precision(query.dtype)
    logits = jnp.einsum("bqkgd,bmkd->bkgqm", grouped, key, precision=precision, preferred_element_type=jnp.float32)
    logits = logits * (head_dim**-0.5 if scale is None else scale)
    logits = softcap * jnp.tanh(logits / softcap)
    if mask is not None:
        full = jnp.broadcast_to(mask, (batch, num_heads, length, key.shape[1]))
        full = full.reshape(batch, key.shape[2], -1, length, key.shape[1])
        logits = jnp.where(full, logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    y = jnp.einsum("bkgqm,bmkd->bqkgd", weights, value, precision=precision)
    return y.reshape(batch, length, num_heads, head_dim).astype(query.dtype)
