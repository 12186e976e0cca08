"""The two refiners of the LLM-infused diffuser (paper section 3.1, Figure 5 left).

`LinguisticTokenRefiner` compensates for the causal mask of an LLM: full self-attention lets early tokens attend to
later ones. `CollaborativeRefiner` lets the features of several LLMs attend to one another. Both start as the identity,
because every sublayer ends in a gate that starts at zero.

Ours, where the paper gives no detail:
- RMSNorm before every sublayer.
- The optional RMSNorm of queries and keys (`qk_norm`): the paper states QK-norm only for the diffusion transformer,
  section 3.2.
- Rotary positions (the paper shows none in the refiners). Without them a token can locate its neighbours, or the same
  word in another LLM's branch, only by the position information that LLM features happen to contain.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.models.layers import ACTIVATION, Attention, FeedForward, LayerConfig, Modulation, RMSNorm, modulate
from lidit_jax.models.remat import rematerialised
from lidit_jax.models.rotary import RotaryTables, rotary_tables

# Prompts are short: with a base of 100, a third of the angles complete a turn within thirty tokens, with the LLMs'
# 10,000 a sixth, so attention learns to find neighbouring tokens sooner. The slowest angle needs more than 500 tokens
# for a turn, so all positions are distinct.
ROTARY_THETA = 100.0


def text_rotary_tables(positions: jax.Array, head_dim: int) -> RotaryTables:
    """Returns the refiners' rotary tables for positions int [L]: cos and sin, float32 [L, head_dim] each."""
    return rotary_tables(positions, head_dim, ROTARY_THETA)


class LinguisticTokenRefinerBlock(nn.Module):
    """Self-attention -> gate -> FFN -> gate, each with a residual. Gates only: no shift or scale before a sublayer.

    Attributes:
      layers: hyper-parameters of the attention and the FFN.
      gated: False removes the gates (Table 5, without the gate).
      is_causal: True restores the causal mask (Table 3, with a causal mask).
    """

    layers: LayerConfig
    gated: bool = True
    is_causal: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, key_mask: jax.Array, conditioning: jax.Array, rotary: RotaryTables | None = None
    ) -> jax.Array:
        """x [B, L, C], key_mask bool [B, L], conditioning [B, C], rotary tables of L positions -> [B, L, C].

        The conditioning is the sum of pooled text and timestep embedding; `rotary=None` disables rotary positions.
        """
        x = nn.with_logical_constraint(x, ACTIVATION)
        attention = Attention(self.layers, self.is_causal, name="attention")
        feed_forward = FeedForward(self.layers, name="feed_forward")
        attention_gate = feed_forward_gate = jnp.ones((1, 1), jnp.float32)
        if self.gated:
            gates = Modulation(2, x.shape[-1], dtype=self.layers.dtype, name="gates")
            attention_gate, feed_forward_gate = gates(conditioning)  # [B, C] each
        h = RMSNorm(name="attention_norm")(x)
        x = x + _gate(attention_gate, attention(h, key_mask=key_mask, rotary=rotary))
        return x + _gate(feed_forward_gate, feed_forward(RMSNorm(name="feed_forward_norm")(x)))


class LinguisticTokenRefiner(nn.Module):
    """`num_blocks` refiner blocks on the features of one LLM (paper: 2)."""

    num_blocks: int
    layers: LayerConfig
    gated: bool = True
    is_causal: bool = False

    @nn.compact
    def __call__(
        self, x: jax.Array, key_mask: jax.Array, conditioning: jax.Array, rotary: RotaryTables | None = None
    ) -> jax.Array:
        """x [B, L, C] -> [B, L, C]; see `LinguisticTokenRefinerBlock`."""
        block = rematerialised(LinguisticTokenRefinerBlock, self.layers.remat)
        for i in range(self.num_blocks):
            x = block(self.layers, self.gated, self.is_causal, name=f"block_{i}")(x, key_mask, conditioning, rotary)
        return x


class CollaborativeRefinerBranch(nn.Module):
    """One LLM's branch: cross-attention to the other branches, then an FFN; scale+shift before and gate after each."""

    layers: LayerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        others: jax.Array,
        others_mask: jax.Array,
        conditioning: jax.Array,
        rotary: RotaryTables | None = None,
        others_rotary: RotaryTables | None = None,
    ) -> jax.Array:
        """x [B, L, C], others [B, M, C], others_mask bool [B, M], conditioning [B, C] -> [B, L, C].

        `rotary` and `others_rotary` are tables of L and of M positions; None disables rotary positions.
        """
        x = nn.with_logical_constraint(x, ACTIVATION)
        attention = Attention(self.layers, name="cross_attention")
        feed_forward = FeedForward(self.layers, name="feed_forward")
        modulation = Modulation(6, x.shape[-1], dtype=self.layers.dtype, name="modulation")(conditioning)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = modulation

        h = modulate(RMSNorm(name="attention_norm")(x).astype(jnp.float32), shift_1, scale_1)
        others = RMSNorm(name="context_norm")(others)
        y = attention(h.astype(self.layers.dtype), others, others_mask, rotary, others_rotary)
        x = x + _gate(gate_1, y)
        h = modulate(RMSNorm(name="feed_forward_norm")(x).astype(jnp.float32), shift_2, scale_2)
        return x + _gate(gate_2, feed_forward(h.astype(self.layers.dtype)))


class CollaborativeRefiner(nn.Module):
    """`num_blocks` blocks in which every branch attends to all other branches (paper: 1).

    Branches are refined in parallel: in a block each attends to the other branches' inputs, not to their outputs. With
    a single LLM there are no other branches, and the refiner is the identity, without parameters.
    """

    num_blocks: int
    layers: LayerConfig

    @nn.compact
    def __call__(
        self,
        branches: Sequence[jax.Array],
        key_masks: Sequence[jax.Array],
        conditionings: Sequence[jax.Array],
        rotary: Sequence[RotaryTables] | None = None,
    ) -> list[jax.Array]:
        """Per LLM: features [B, L_i, C], key mask bool [B, L_i], conditioning [B, C] -> features [B, L_i, C].

        `rotary` has tables of L_i positions for each LLM; None disables rotary positions.
        """
        branches = list(branches)
        if len(branches) == 1:
            return branches
        make_branch = rematerialised(CollaborativeRefinerBranch, self.layers.remat)
        for block in range(self.num_blocks):
            refined = []
            for i, x in enumerate(branches):
                others = jnp.concatenate(_without(i, branches), axis=1)
                others_mask = jnp.concatenate(_without(i, key_masks), axis=1)
                tables: tuple[RotaryTables | None, RotaryTables | None] = (None, None)
                if rotary is not None:
                    tables = (rotary[i], jax.tree.map(lambda *others: jnp.concatenate(others), *_without(i, rotary)))
                branch = make_branch(self.layers, name=f"block_{block}_branch_{i}")
                refined.append(branch(x, others, others_mask, conditionings[i], *tables))
            branches = refined
        return branches


def _without(i: int, items: Sequence[Any]) -> list[Any]:
    return [item for j, item in enumerate(items) if j != i]


def _gate(gate: jax.Array, y: jax.Array) -> jax.Array:
    """Multiplies y [B, L, C] by one gate vector per sample, [B, C], in float32; returns the dtype of y."""
    return (gate[:, None] * y.astype(jnp.float32)).astype(y.dtype)
