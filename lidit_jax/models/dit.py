"""The diffusion transformer of LI-DiT (paper section 3.2, Figure 5 right): noised latents and text to the target."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.initialize import LAYERS
from lidit_jax.models.layers import (
    ACTIVATION,
    ZERO_INIT,
    Attention,
    Dense,
    FeedForward,
    LayerConfig,
    Modulation,
    layer_norm,
    modulate,
)
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.positions import (
    CONV,
    ROPE,
    SINCOS,
    ConvPositionEmbedding,
    parse_position,
    rope_tables,
    sincos_embedding,
)
from lidit_jax.models.remat import rematerialised
from lidit_jax.models.rotary import RotaryTables


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text and an FFN, each with scale and shift before it and a gate after it.

    The nine modulation vectors come from the conditioning vector (adaLN).
    """

    layers: LayerConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        conditioning: jax.Array,
        rotary: RotaryTables | None = None,
    ) -> tuple[jax.Array, None]:
        """x [B, N, C], text [B, M, C], text_mask bool [B, M], conditioning [B, C], rotary N positions -> [B, N, C].

        The second output, None, is the empty per-layer output of `nn.scan`.
        """
        x = nn.with_logical_constraint(x, ACTIVATION)
        dtype = self.layers.dtype
        self_attention = Attention(self.layers, name="self_attention")
        cross_attention = Attention(self.layers, name="cross_attention")
        feed_forward = FeedForward(self.layers, name="feed_forward")
        vectors = Modulation(9, x.shape[-1], dtype=dtype, name="modulation")(conditioning)

        def sublayer(x, layer, shift, scale, gate):
            y = layer(modulate(layer_norm(x), shift, scale).astype(dtype))
            return x + (gate[:, None] * y.astype(jnp.float32)).astype(x.dtype)

        x = sublayer(x, lambda h: self_attention(h, rotary=rotary), *vectors[0:3])
        x = sublayer(x, lambda h: cross_attention(h, text, key_mask=text_mask), *vectors[3:6])
        x = sublayer(x, feed_forward, *vectors[6:9])
        return x, None  # nn.scan expects (carry, per-layer output)


class DiT(nn.Module):
    """The diffusion transformer: patchify, position embedding, `depth` blocks in one scan, adaLN output layer.

    Accepts any latent size that the patch size divides.
    """

    config: LIDiTConfig

    @nn.compact
    def __call__(self, latents: jax.Array, text: jax.Array, text_mask: jax.Array, conditioning: jax.Array) -> jax.Array:
        """latents [B, H, W, C_in], text [B, M, C], text_mask bool [B, M], conditioning [B, C] -> [B, H, W, C_in].

        Raises:
          UserError: if the patch size does not divide both sides of the latents.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, height, width, _ = latents.shape
        patch = config.patch_size
        if height % patch or width % patch:
            raise UserError(f"latents of {height}x{width} are not divisible by patch_size={patch}")
        h, w = height // patch, width // patch

        x = patchify(latents, patch)  # [B, h, w, patch^2 C_in]
        x = Dense(config.hidden_size, (None, "embed"), dtype=dtype, name="patch_embedding")(x)  # [B, h, w, C]
        positions, rotary = parse_position(config.position), None
        if SINCOS in positions:
            x = x + sincos_embedding(h, w, config.hidden_size, config.position_grid).astype(x.dtype)
        if CONV in positions:
            x = ConvPositionEmbedding(dtype=dtype, name="position_embedding")(x)
        if ROPE in positions:
            rotary = rope_tables(h, w, config.head_dim, config.position_grid)
        x = x.reshape(batch, h * w, config.hidden_size)  # [B, N, C]
        self.sow("intermediates", "tokens", x)

        x, _ = _scanned_blocks(config)(x, text, text_mask, conditioning, rotary)  # [B, N, C]

        shift, scale = Modulation(2, config.hidden_size, dtype=dtype, name="final_modulation")(conditioning)
        x = modulate(layer_norm(x), shift, scale)
        # In float32: so is the loss, and this product is small.
        x = Dense(patch * patch * config.latent_channels, ("embed", None), kernel_init=ZERO_INIT, name="output")(x)
        return unpatchify(x.reshape(batch, h, w, -1), patch)


def _scanned_blocks(config: LIDiTConfig) -> nn.Module:
    """Returns `config.depth` blocks as one `nn.scan`; their parameters are stacked along a leading axis."""
    scan = nn.scan(
        rematerialised(LIDiTBlock, config.dit_layers.remat, in_scan=True),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast,) * 4,
        length=config.depth,
        unroll=config.scan_unroll,
        metadata_params={nn.PARTITION_NAME: LAYERS},
    )
    return scan(config.dit_layers, name="blocks")


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
