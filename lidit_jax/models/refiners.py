"""The two refiners of the LLM-infused diffuser (paper section 3.2, Figure 5 left).

`LinguisticTokenRefiner` undoes the causal mask: full self-attention lets early tokens see later ones.
`CollaborativeRefiner` lets several LLMs' features read one another.
Both start as the identity, because every sublayer ends in a gate that starts at zero.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.models.layers import Attention, FeedForward, Modulation, RMSNorm, modulate


class LinguisticTokenRefinerBlock(nn.Module):
    """Self-attention -> gate -> FFN -> gate, each with a residual. Gates only: no shift or scale before a sublayer.

    `gated=False` leaves the gates out (Table 5, last row) and `is_causal=True` restores the causal mask (Table 3).
    """

    num_heads: int
    mlp_ratio: float = 4.0
    gated: bool = True
    is_causal: bool = False
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array, conditioning: jax.Array) -> jax.Array:
        """x [B, L, C], key_mask bool [B, L], conditioning (pooled text + timestep) [B, C] -> [B, L, C]."""
        attention = Attention(
            self.num_heads,
            is_causal=self.is_causal,
            implementation=self.implementation,
            dtype=self.dtype,
            name="attention",
        )
        feed_forward = FeedForward(self.mlp_ratio, dtype=self.dtype, name="feed_forward")
        attention_gate = feed_forward_gate = jnp.ones((1, 1), jnp.float32)
        if self.gated:
            gates = Modulation(2, x.shape[-1], dtype=self.dtype, name="gates")
            attention_gate, feed_forward_gate = gates(conditioning)  # [B, C] each
        x = x + _gate(attention_gate, attention(RMSNorm(name="attention_norm")(x), key_mask=key_mask))
        return x + _gate(feed_forward_gate, feed_forward(RMSNorm(name="feed_forward_norm")(x)))


class LinguisticTokenRefiner(nn.Module):
    """`num_blocks` refiner blocks over one LLM's features (the paper: 2)."""

    num_blocks: int
    num_heads: int
    mlp_ratio: float = 4.0
    gated: bool = True
    is_causal: bool = False
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, key_mask: jax.Array, conditioning: jax.Array) -> jax.Array:
        for i in range(self.num_blocks):
            block = LinguisticTokenRefinerBlock(
                self.num_heads,
                self.mlp_ratio,
                self.gated,
                self.is_causal,
                self.implementation,
                self.dtype,
                name=f"block_{i}",
            )
            x = block(x, key_mask, conditioning)
        return x


class CollaborativeRefinerBranch(nn.Module):
    """One LLM's branch: cross-attention to the other branches, then FFN; scale and shift before, gate after each."""

    num_heads: int
    mlp_ratio: float = 4.0
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, others: jax.Array, others_mask: jax.Array, conditioning: jax.Array) -> jax.Array:
        """x [B, L, C], others [B, M, C], others_mask bool [B, M], conditioning [B, C] -> [B, L, C]."""
        attention = Attention(
            self.num_heads, implementation=self.implementation, dtype=self.dtype, name="cross_attention"
        )
        feed_forward = FeedForward(self.mlp_ratio, dtype=self.dtype, name="feed_forward")
        modulation = Modulation(6, x.shape[-1], dtype=self.dtype, name="modulation")(conditioning)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation

        h = modulate(RMSNorm(name="attention_norm")(x).astype(jnp.float32), shift_1, scale_1)
        others = RMSNorm(name="context_norm")(others)
        x = x + _gate(gate_1, attention(h.astype(self.dtype), others, key_mask=others_mask))
        h = modulate(RMSNorm(name="feed_forward_norm")(x).astype(jnp.float32), shift_2, scale_2)
        return x + _gate(gate_2, feed_forward(h.astype(self.dtype)))


class CollaborativeRefiner(nn.Module):
    """`num_blocks` rounds in which every branch reads all the others at once (the paper: 1).

    Branches are refined in parallel: in a round each reads what the others held before the round. With a single LLM
    there is nobody to read, and the refiner is the identity, without parameters.
    """

    num_blocks: int
    num_heads: int
    mlp_ratio: float = 4.0
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, branches: Sequence[jax.Array], key_masks: Sequence[jax.Array], conditionings: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Per LLM: features [B, L_i, C], key mask bool [B, L_i], conditioning [B, C] -> features [B, L_i, C]."""
        branches = list(branches)
        if len(branches) == 1:
            return branches
        for block in range(self.num_blocks):
            refined = []
            for i, x in enumerate(branches):
                others = jnp.concatenate([b for j, b in enumerate(branches) if j != i], axis=1)
                others_mask = jnp.concatenate([m for j, m in enumerate(key_masks) if j != i], axis=1)
                branch = CollaborativeRefinerBranch(
                    self.num_heads, self.mlp_ratio, self.implementation, self.dtype, name=f"block_{block}_branch_{i}"
                )
                refined.append(branch(x, others, others_mask, conditionings[i]))
            branches = refined
        return branches


def _gate(gate: jax.Array, y: jax.Array) -> jax.Array:
    """One gate vector a sample, [B, C], over y [B, L, C]; float32 product, result in the dtype of y."""
    return (gate[:, None] * y.astype(jnp.float32)).astype(y.dtype)
