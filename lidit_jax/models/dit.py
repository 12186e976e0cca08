"""The diffusion transformer of LI-DiT (paper section 3.3, Figure 5 right): latents and text in, noise out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models import splash_attention
from lidit_jax.models.layers import (
    ACTIVATION,
    ZERO_INIT,
    Attention,
    Conv,
    Dense,
    FeedForward,
    Modulation,
    layer_norm,
    modulate,
)

_kernels = jax.checkpoint_policies.save_only_these_names(splash_attention.CHECKPOINT_NAME)
_dots = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _kernels
)
_dots_to_host = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")


def _offload_dots(primitive, *arguments, **options):
    # JAX joins only policies that say yes or no.
    return _kernels(primitive, *arguments, **options) or _dots_to_host(primitive, *arguments, **options)


# What a rematerialised block keeps for its backward pass.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,  # keeps the block's input alone: least memory, one more forward
    "dots": _dots,  # keeps the matrix products' results, and the attention kernel's
    # As "dots", but the products' results wait in the host's memory.
    "offload": _offload_dots,
    "none": None,  # no rematerialisation
}


class ConvPositionEmbedding(nn.Module):
    """A convolutional ResBlock on the grid of tokens, in place of a table of positions.

    Its zero padding is what tells a token where the borders are, at any resolution. The inner width is a quarter of
    the outer (ours), so that the block stays under one percent of the model.
    """

    bottleneck: int = 4
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, h, w, C] -> [B, h, w, C]."""
        features = x.shape[-1]
        inner = features // self.bottleneck
        h = Conv(inner, ("embed", "conv_out"), dtype=self.dtype, name="conv_in")(nn.silu(layer_norm(x)))
        h = Conv(features, ("conv_out", "embed"), dtype=self.dtype, name="conv_out")(nn.silu(layer_norm(h)))
        return x + h


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, FFN; each between scale+shift and a gate (nine vectors in all)."""

    num_heads: int
    mlp_ratio: float = 4.0
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, text: jax.Array, text_mask: jax.Array, conditioning: jax.Array
    ) -> tuple[jax.Array, None]:
        """x [B, N, C], text [B, M, C], text_mask bool [B, M], conditioning [B, C] -> (x [B, N, C], None)."""
        x = nn.with_logical_constraint(x, ACTIVATION)
        attention = {"qk_norm": True, "implementation": self.implementation, "dtype": self.dtype}
        self_attention = Attention(self.num_heads, **attention, name="self_attention")
        cross_attention = Attention(self.num_heads, **attention, name="cross_attention")
        feed_forward = FeedForward(self.mlp_ratio, dtype=self.dtype, name="feed_forward")
        vectors = Modulation(9, x.shape[-1], dtype=self.dtype, name="modulation")(conditioning)

        def sublayer(x, layer, shift, scale, gate):
            y = layer(modulate(layer_norm(x), shift, scale).astype(self.dtype))
            return x + (gate[:, None] * y.astype(jnp.float32)).astype(x.dtype)

        x = sublayer(x, self_attention, *vectors[0:3])
        x = sublayer(x, lambda h: cross_attention(h, text, key_mask=text_mask), *vectors[3:6])
        x = sublayer(x, feed_forward, *vectors[6:9])
        return x, None  # (carry, nothing collected): the signature that nn.scan wants


class DiT(nn.Module):
    """Patchify, position ResBlock, `depth` blocks under one scan, adaLN output. Any size that the patch divides."""

    depth: int
    hidden_size: int
    num_heads: int
    patch_size: int
    out_channels: int
    mlp_ratio: float = 4.0
    remat: str = "full"
    scan_unroll: int = 1
    implementation: str = "auto"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, latents: jax.Array, text: jax.Array, text_mask: jax.Array, conditioning: jax.Array) -> jax.Array:
        """latents [B, H, W, C_in], text [B, M, C], text_mask bool [B, M], conditioning [B, C] -> [B, H, W, C_out].

        Raises:
          UserError: if the patch size divides not both sides of the latents.
        """
        batch, height, width, _ = latents.shape
        patch = self.patch_size
        if height % patch or width % patch:
            raise UserError(f"latents of {height}x{width} are not divisible by patch_size={patch}")
        h, w = height // patch, width // patch

        x = patchify(latents, patch)  # [B, h, w, patch^2 C_in]
        x = Dense(self.hidden_size, (None, "embed"), dtype=self.dtype, name="patch_embedding")(x)
        x = ConvPositionEmbedding(dtype=self.dtype, name="position_embedding")(x)
        x = x.reshape(batch, h * w, self.hidden_size)  # [B, N, C]

        x, _ = self._blocks()(x, text, text_mask, conditioning)

        shift, scale = Modulation(2, self.hidden_size, dtype=self.dtype, name="final_modulation")(conditioning)
        x = modulate(layer_norm(x), shift, scale)
        # float32: the prediction's error is measured in float32, and its last product is small.
        x = Dense(patch * patch * self.out_channels, ("embed", None), kernel_init=ZERO_INIT, name="output")(x)
        return unpatchify(x.reshape(batch, h, w, -1), patch)

    def _blocks(self):
        policy = REMAT_POLICIES[self.remat]
        block = LIDiTBlock if policy is None else nn.remat(LIDiTBlock, policy=policy, prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=self.scan_unroll,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(self.num_heads, self.mlp_ratio, self.implementation, self.dtype, name="blocks")


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, h*p, w*p, C] -> [B, h, w, p*p*C]."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height // patch, width // patch, patch * patch * channels)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
    """[B, h, w, p*p*C] -> [B, h*p, w*p, C]; the inverse of `patchify`."""
    batch, h, w, features = x.shape
    channels = features // (patch * patch)
    x = x.reshape(batch, h, w, patch, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, h * patch, w * patch, channels)
