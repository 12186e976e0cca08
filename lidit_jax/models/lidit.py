"""LI-DiT: a diffusion transformer conditioned on the refined and fused features of frozen LLMs (paper Figure 5)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lidit_jax.models.dit import DiT
from lidit_jax.models.layers import Dense, RMSNorm, TimestepEmbedder
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.refiners import CollaborativeRefiner, LinguisticTokenRefiner, text_rotary_tables


@flax.struct.dataclass
class TextFeatures:
    """Features of a batch of prompts from one frozen encoder.

    Attributes:
      prefix: features of the system prompt and the instruction, P tokens (P may be 0). A causal LLM gives all prompts
        the same prefix features, so they have no batch axis: [P, D]. A bidirectional encoder (T5) gives each prompt
        its own: [B, P, D].
      prompt: features of the prompts, padded on the right, [B, L, D].
      mask: bool [B, L], True on the prompt's tokens; at least one per row (the end token).
    """

    prefix: jax.Array
    prompt: jax.Array
    mask: jax.Array

    @property
    def prefix_length(self) -> int:
        """P, the number of prefix tokens."""
        return self.prefix.shape[-2]

    def positions(self) -> jax.Array:
        """Returns token positions, int32 [P + L]: 0 at the prompt's first token, negative in the prefix."""
        return jnp.arange(-self.prefix_length, self.prompt.shape[1])


class LIDiT(nn.Module):
    """The trainable model: refiners and DiT. The frozen LLMs and the VAE are not part of this module."""

    config: LIDiTConfig

    @nn.compact
    def __call__(self, latents: jax.Array, timesteps: jax.Array, text: Sequence[TextFeatures]) -> jax.Array:
        """Predicts the schedule's target (noise, v or velocity) from noisy latents.

        Args:
          latents: [B, H, W, C].
          timesteps: [B], as `Schedule.model_timesteps` returns them: in [0, 1000] by default.
          text: one `TextFeatures` per encoder.

        Returns:
          float32 [B, H, W, C].
        """
        time = TimestepEmbedder(self.config.hidden_size, name="timestep_embedder")(timesteps)  # [B, C]
        condition, mask, pooled = TextCondition(self.config, name="text_condition")(text, time)
        self.sow("intermediates", "condition", condition)
        return DiT(self.config, name="dit")(latents, condition, mask, time + pooled)

    def init_params(self, text_widths: Sequence[int], key: jax.Array) -> Any:
        """Returns random parameters, boxed with their logical axes.

        Args:
          text_widths: feature width D of each encoder.
          key: random key.
        """
        side = 2 * self.config.patch_size
        text = [
            TextFeatures(prefix=jnp.zeros((1, width)), prompt=jnp.zeros((1, 1, width)), mask=jnp.ones((1, 1), bool))
            for width in text_widths
        ]
        latents = jnp.zeros((1, side, side, self.config.latent_channels))
        return self.init(key, latents, jnp.zeros((1,)), text)["params"]


class TextCondition(nn.Module):
    """Refines and fuses the features of all LLMs into the text condition of the DiT.

    Per LLM: projection, then linguistic token refiner. Then collaborative refiner, truncation to the prompt tokens and
    concatenation.
    """

    config: LIDiTConfig

    @nn.compact
    def __call__(self, text: Sequence[TextFeatures], time: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Features of n LLMs, time [B, C] -> condition [B, sum L_i, C], mask bool [B, sum L_i], pooled text [B, C]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)

        branches, masks, pooled = [], [], []
        rotary = None
        if config.refiner_rotary:
            rotary = [text_rotary_tables(features.positions(), config.head_dim) for features in text]
        for i, features in enumerate(text):
            x, mask = FeatureProjection(config.hidden_size, dtype, name=f"project_{i}")(features)  # [B, P + L, C]
            pooled.append(PooledText(config.hidden_size, name=f"pool_{i}")(x, mask))  # [B, C]
            ltr = LinguisticTokenRefiner(
                config.refiner_blocks,
                config.refiner_layers,
                config.refiner_gated,
                config.refiner_causal,
                name=f"token_refiner_{i}",
            )
            branches.append(ltr(x, mask, time + pooled[-1], rotary[i] if rotary else None))
            masks.append(mask)

        if config.fusion == "collaborative":
            cr = CollaborativeRefiner(config.collaborative_blocks, config.refiner_layers, name="collaborative_refiner")
            branches = cr(branches, masks, [time + p for p in pooled], rotary)

        # The system prompt and the instruction are dropped only here, after the refiners have attended to them.
        branches = [x[:, features.prefix_length :] for x, features in zip(branches, text, strict=True)]
        condition = jnp.concatenate(branches, axis=1)
        mask = jnp.concatenate([features.mask for features in text], axis=1)
        return condition, mask, sum(pooled[1:], start=pooled[0])


class FeatureProjection(nn.Module):
    """RMSNorm of the LLM features and projection to the DiT width (ours).

    Refiners at the LLM's width would double the size of the 1B model. A prefix without a batch axis is projected once
    per batch.
    """

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: TextFeatures) -> tuple[jax.Array, jax.Array]:
        """Features of one LLM -> x [B, P + L, C], mask bool [B, P + L] (always True on the prefix)."""
        norm = RMSNorm(name="norm")
        dense = Dense(self.hidden_size, ("llm_embed", "embed"), dtype=self.dtype, name="dense")
        batch, prefix_length = features.prompt.shape[0], features.prefix_length
        prefix = dense(norm(features.prefix))  # [P, C] or [B, P, C]
        prompt = dense(norm(features.prompt))  # [B, L, C]
        # Broadcast in float32: its transpose sums the gradient of a shared prefix over all samples.
        prefix = jnp.broadcast_to(prefix.astype(jnp.float32), (batch, *prefix.shape[-2:])).astype(self.dtype)
        mask = jnp.concatenate([jnp.ones((batch, prefix_length), bool), features.mask], axis=1)
        return jnp.concatenate([prefix, prompt], axis=1), mask


class PooledText(nn.Module):
    """Mean over the tokens (paper section 3.1), then a two-layer MLP (ours).

    The result is added to the timestep embedding. With several LLMs, the DiT is conditioned on the sum of their pooled
    features (ours).
    """

    hidden_size: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """x [B, L, C], mask bool [B, L] with at least one True a row -> float32 [B, C]."""
        weights = mask.astype(jnp.float32)[..., None]
        mean = jnp.sum(x.astype(jnp.float32) * weights, axis=1) / jnp.sum(weights, axis=1)
        h = Dense(self.hidden_size, ("embed", "mlp"), name="in")(mean)
        return Dense(self.hidden_size, ("mlp", "embed"), name="out")(nn.silu(h))


def num_parameters(params: Any) -> int:
    """Returns the number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
