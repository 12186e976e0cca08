"""LI-DiT: several frozen LLMs' features, refined and fused, condition a diffusion transformer (paper Figure 5)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import check_implementation
from lidit_jax.models.dit import REMAT_POLICIES, DiT
from lidit_jax.models.layers import Dense, RMSNorm, TimestepEmbedder, check_dtype
from lidit_jax.models.positions import ROPE, parse_position
from lidit_jax.models.refiners import CollaborativeRefiner, LinguisticTokenRefiner, text_rotary_tables

FUSIONS = ("collaborative", "concatenate")


@flax.struct.dataclass
class TextFeatures:
    """What one frozen encoder says of a batch of prompts.

    Attributes:
      prefix: features of the system prompt and the instruction. An LLM, being causal, gives every prompt the same ones,
        and they have no batch axis: [P, D]; a bidirectional encoder (T5) gives each prompt its own: [B, P, D]. P may
        be 0.
      prompt: [B, L, D], features of the prompts, padded on the right.
      mask: bool [B, L], True on the prompt's tokens; at least one per row (the end token).
    """

    prefix: jax.Array
    prompt: jax.Array
    mask: jax.Array

    @property
    def prefix_length(self) -> int:
        """P."""
        return self.prefix.shape[-2]

    def positions(self) -> jax.Array:
        """int32 [P + L]: 0 at the prompt's first token, negative before it."""
        return jnp.arange(-self.prefix_length, self.prompt.shape[1])


@dataclasses.dataclass(frozen=True)
class LIDiTConfig:
    """Sizes and switches of LI-DiT (paper Table 7; the switches are those of Tables 2, 3, 5 and 6).

    Attributes:
      refiner_blocks: blocks of each linguistic token refiner (paper: 2); 0 removes it.
      refiner_gated, refiner_causal: Table 5's and Table 3's switches.
      refiner_rotary: rotary positions in both refiners' attentions (ours), counted from the prompt's first token, so
        that the same words of two LLMs are near each other whatever comes before them.
      position: how the image's tokens know where they are: "conv" (paper), "sincos", "rope" (ours), or several joined
        by "+"; see `models/positions.py`.
      position_grid: side in tokens of the square grid on which neighbours are 1 apart for "sincos" and "rope": the one
        of the resolution that is trained first. Fine-tuning at another resolution keeps it, and so keeps the layout.
      refiner_qk_norm: RMSNorm of queries and keys in the refiners too (ours: the paper states it for the DiT's layers
        alone, section 3.2); it bounds their logits in bfloat16.
      fusion: "collaborative" (collaborative refiner, then concatenation) or "concatenate".
      collaborative_blocks: blocks of the collaborative refiner (paper: 1).
      refiner_mlp_ratio: FFN width of the refiners over their width (ours: 4, as in the DiT).
      remat: what a block keeps for its backward pass, one of `REMAT_POLICIES`.
      scan_unroll: DiT blocks per turn of the loop over them; more compiles longer and, on a CPU, runs a little faster.
    """

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int = 2
    latent_channels: int = 16
    mlp_ratio: float = 4.0
    position: str = "conv+sincos+rope"
    position_grid: int = 16
    refiner_blocks: int = 2
    refiner_gated: bool = True
    refiner_causal: bool = False
    refiner_rotary: bool = True
    refiner_qk_norm: bool = False
    refiner_mlp_ratio: float = 4.0
    fusion: str = "collaborative"
    collaborative_blocks: int = 1
    remat: str = "full"
    scan_unroll: int = 1
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}"
            )
        for name in ("mlp_ratio", "refiner_mlp_ratio"):
            if int(self.hidden_size * getattr(self, name)) < 1:
                raise UserError(f"model.{name}={getattr(self, name)} leaves no width: use a larger one")
        if self.hidden_size < 4:
            raise UserError(f"model.hidden_size={self.hidden_size} is too small: use at least 4")
        if self.scan_unroll < 1:
            raise UserError(f"model.scan_unroll={self.scan_unroll} must be at least 1")
        if self.refiner_rotary and self.hidden_size // self.num_heads % 2:
            raise UserError(
                f"model.hidden_size / model.num_heads = {self.hidden_size // self.num_heads} is odd, which rotary "
                "positions cannot be: choose other sizes, or model.refiner_rotary=False"
            )
        if ROPE in parse_position(self.position) and self.hidden_size // self.num_heads % 4:
            raise UserError(
                f"model.hidden_size / model.num_heads = {self.hidden_size // self.num_heads} is not divisible by 4, as "
                "'rope' needs: choose other sizes, or another model.position"
            )
        if self.position_grid < 1:
            raise UserError(f"model.position_grid={self.position_grid} must be at least 1")
        check_dtype("model.dtype", self.dtype)
        check_implementation(self.attention)
        if self.fusion not in FUSIONS:
            raise UserError(f"model.fusion={self.fusion!r} is unknown: use one of {', '.join(FUSIONS)}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat!r} is unknown: use one of {', '.join(REMAT_POLICIES)}")


class LIDiT(nn.Module):
    """The trainable model: refiners and DiT. Frozen LLMs and the VAE are outside of it."""

    config: LIDiTConfig

    @nn.compact
    def __call__(self, latents: jax.Array, timesteps: jax.Array, text: Sequence[TextFeatures]) -> jax.Array:
        """Predicts the schedule's target (noise, v or velocity) for noised latents.

        Args:
          latents: [B, H, W, C].
          timesteps: [B], in [0, 1000).
          text: one `TextFeatures` an LLM.

        Returns:
          float32 [B, H, W, C].
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)
        time = TimestepEmbedder(config.hidden_size, name="timestep_embedder")(timesteps)  # [B, C]

        condition, mask, pooled = TextCondition(config, name="text_condition")(text, time)
        self.sow("intermediates", "condition", condition)
        dit = DiT(
            depth=config.depth,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            patch_size=config.patch_size,
            out_channels=config.latent_channels,
            position=config.position,
            position_grid=config.position_grid,
            mlp_ratio=config.mlp_ratio,
            remat=config.remat,
            scan_unroll=config.scan_unroll,
            implementation=config.attention,
            dtype=dtype,
            name="dit",
        )
        return dit(latents, condition, mask, time + pooled)

    def init_params(self, text_widths: Sequence[int], key: jax.Array) -> Any:
        """Random parameters, boxed with their logical axes.

        Args: text_widths: D of each LLM.
        """
        side = 2 * self.config.patch_size
        text = [
            TextFeatures(prefix=jnp.zeros((1, width)), prompt=jnp.zeros((1, 1, width)), mask=jnp.ones((1, 1), bool))
            for width in text_widths
        ]
        latents = jnp.zeros((1, side, side, self.config.latent_channels))
        return self.init(key, latents, jnp.zeros((1,)), text)["params"]


class TextCondition(nn.Module):
    """Per LLM: project -> linguistic token refiner; then collaborative refiner -> truncate -> concatenate."""

    config: LIDiTConfig

    @nn.compact
    def __call__(self, text: Sequence[TextFeatures], time: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """text of n LLMs, time [B, C] -> condition [B, sum L_i, C], mask bool [B, sum L_i], pooled text [B, C]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        refiner = {"num_heads": config.num_heads, "mlp_ratio": config.refiner_mlp_ratio}
        refiner |= {"qk_norm": config.refiner_qk_norm, "implementation": config.attention, "dtype": dtype}

        branches, masks, pooled = [], [], []
        rotary = None
        if config.refiner_rotary:
            head_dim = config.hidden_size // config.num_heads
            rotary = [text_rotary_tables(features.positions(), head_dim) for features in text]
        for i, features in enumerate(text):
            x, mask = FeatureProjection(config.hidden_size, dtype, name=f"project_{i}")(features)  # [B, P + L, C]
            pooled.append(PooledText(config.hidden_size, name=f"pool_{i}")(x, mask))  # [B, C]
            ltr = LinguisticTokenRefiner(
                config.refiner_blocks,
                gated=config.refiner_gated,
                is_causal=config.refiner_causal,
                **refiner,
                name=f"token_refiner_{i}",
            )
            branches.append(ltr(x, mask, time + pooled[-1], rotary and rotary[i]))
            masks.append(mask)

        if config.fusion == "collaborative":
            cr = CollaborativeRefiner(config.collaborative_blocks, **refiner, name="collaborative_refiner")
            branches = cr(branches, masks, [time + p for p in pooled], rotary)

        # Only now, after the refiners have used them, the system prompt and the instruction are dropped.
        branches = [x[:, features.prefix_length :] for x, features in zip(branches, text, strict=True)]
        condition = jnp.concatenate(branches, axis=1)
        mask = jnp.concatenate([features.mask for features in text], axis=1)
        return condition, mask, sum(pooled)


class FeatureProjection(nn.Module):
    """RMS-normalised LLM features, projected to the DiT's width: the refiners at LLM width would double the 1B model.

    A prefix without a batch axis is projected once for the whole batch.
    """

    hidden_size: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: TextFeatures) -> tuple[jax.Array, jax.Array]:
        """-> x [B, P + L, C], mask bool [B, P + L] (the prefix is never padding)."""
        norm = RMSNorm(name="norm")
        dense = Dense(self.hidden_size, ("llm_embed", "embed"), dtype=self.dtype, name="dense")
        batch, prefix_length = features.prompt.shape[0], features.prefix_length
        prefix = dense(norm(features.prefix))  # [P, C] or [B, P, C]
        prompt = dense(norm(features.prompt))  # [B, L, C]
        # In float32, for its transpose: the sum of the shared prefix's gradient over all samples.
        prefix = jnp.broadcast_to(prefix.astype(jnp.float32), (batch, *prefix.shape[-2:])).astype(self.dtype)
        mask = jnp.concatenate([jnp.ones((batch, prefix_length), bool), features.mask], axis=1)
        return jnp.concatenate([prefix, prompt], axis=1), mask


class PooledText(nn.Module):
    """Masked mean over the tokens, then a two-layer MLP (ours).

    It joins the timestep embedding; with several LLMs, the DiT's conditioning is the sum of theirs (ours).
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
    """Number of scalars in a tree of arrays or of `jax.ShapeDtypeStruct`."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
