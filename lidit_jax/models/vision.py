"""Vision towers of multi-modal LLMs: the image encoders of CLIP (Radford et al. 2021) and SigLIP (Zhai et al. 2023).

The outputs match the hidden states of transformers' `CLIPVisionModel` and `SiglipVisionModel` (see the parity tests).
LLaVA reads patch features of an inner block, so a tower runs and loads only the blocks up to it.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.initialize import LAYERS, partitioned
from lidit_jax.models.layers import ACTIVATION, ACTIVATIONS, Conv, Dense
from lidit_jax.ranges import Blocks, Epsilon, Size, check_ranges

EMBEDDING_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Hyper-parameters of a vision tower, named as in transformers' config.json where it has the same field.

    Attributes:
      hidden_size: width of the model.
      intermediate_size: inner width of the MLP.
      num_hidden_layers: number of blocks.
      num_attention_heads: attention heads.
      image_size: height and width of an image in pixels.
      patch_size: height and width of a patch in pixels.
      layer_norm_eps: epsilon of every LayerNorm.
      hidden_act: activation in the MLP, one of `ACTIVATIONS`.
      is_clip: True for CLIP: a class token before the patches, a LayerNorm before the first block and no bias on the
        patch embedding; False for SigLIP, the other way round.
      attention: attention implementation, see `dot_product_attention`.
      dtype: compute dtype.

    Raises:
      UserError: if a value is not supported or two do not fit together.
    """

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Blocks
    num_attention_heads: Size
    image_size: Size
    patch_size: Size
    layer_norm_eps: Epsilon = 1e-5
    hidden_act: str = "quick_gelu"
    is_clip: bool = True
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_ranges(self, "")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}"
            )
        if self.patch_size > self.image_size:
            raise UserError(f"patch_size={self.patch_size} is above image_size={self.image_size}")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act={self.hidden_act!r:.80} is not supported: use one of {', '.join(ACTIVATIONS)}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Number of output tokens: the patches and CLIP's class token."""
        return self.num_patches + self.is_clip

    def up_to(self, layer: int) -> "VisionConfig":
        """Returns the config of the tower without the blocks after hidden state `layer`.

        Args:
          layer: index of a hidden state as transformers counts them: 0 is the input of the first block, -1 the output
            of the last.

        Raises:
          UserError: if there is no such hidden state, or it is the input of the first block.
        """
        blocks = layer if layer >= 0 else self.num_hidden_layers + 1 + layer
        if not 1 <= blocks <= self.num_hidden_layers:
            raise UserError(
                f"layer {layer} of a vision tower with {self.num_hidden_layers} blocks: use 1 to "
                f"{self.num_hidden_layers}, or -1 (the last block's output) to -{self.num_hidden_layers}"
            )
        return dataclasses.replace(self, num_hidden_layers=blocks)


class LayerNorm(nn.Module):
    """LayerNorm with learned scale and shift over the last axis, in float32, returned in the dtype of x."""

    epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.param("weight", partitioned(nn.initializers.ones, ("norm",)), x.shape[-1:], jnp.float32)
        bias = self.param("bias", partitioned(nn.initializers.zeros, ("norm",)), x.shape[-1:], jnp.float32)
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.epsilon)
        return (x32 * weight + bias).astype(x.dtype)


class VisionBlock(nn.Module):
    """Pre-norm bidirectional self-attention and MLP, with biases."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        """[B, N, C] -> ([B, N, C], None for `nn.scan`)."""
        x = nn.with_logical_constraint(x, ACTIVATION)
        x = x + self._attention(LayerNorm(self.config.layer_norm_eps, name="layer_norm1")(x))
        return x + self._mlp(LayerNorm(self.config.layer_norm_eps, name="layer_norm2")(x)), None

    def _dense(self, name, features, axes):
        return Dense(features, axes, dtype=jnp.dtype(self.config.dtype), name=name)

    def _attention(self, x):
        batch, length, width = x.shape
        heads = self.config.num_attention_heads
        query, key, value = (
            self._dense(name, width, ("embed", "heads"))(x).reshape(batch, length, heads, width // heads)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        y = dot_product_attention(query, key, value, implementation=self.config.attention)
        return self._dense("out_proj", width, ("heads", "embed"))(y.reshape(batch, length, width))

    def _mlp(self, x):
        y = self._dense("fc1", self.config.intermediate_size, ("embed", "mlp"))(x)
        return self._dense("fc2", x.shape[-1], ("mlp", "embed"))(ACTIVATIONS[self.config.hidden_act](y))


class VisionTower(nn.Module):
    """The image encoder of CLIP or SigLIP up to its last block's output, without the norm after it."""

    config: VisionConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Normalised images, float [B, S, S, 3], to features [B, N, C] in `config.dtype`, CLIP's class token first."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        patches = Conv(
            config.hidden_size,
            ("conv_in", "conv_out"),
            kernel_size=config.patch_size,
            strides=config.patch_size,
            padding="VALID",
            use_bias=not config.is_clip,
            dtype=dtype,
            name="patch_embedding",
        )(images)
        x = patches.reshape(len(images), config.num_patches, config.hidden_size)
        if config.is_clip:
            init = partitioned(EMBEDDING_INIT, ("norm",))
            class_embedding = self.param("class_embedding", init, (config.hidden_size,), jnp.float32)
            class_token = jnp.broadcast_to(class_embedding.astype(dtype), (len(x), 1, config.hidden_size))
            x = jnp.concatenate([class_token, x], axis=1)
        init = partitioned(EMBEDDING_INIT, (None, "embed"))
        positions = self.param("position_embedding", init, (config.num_tokens, config.hidden_size), jnp.float32)
        x = x + positions.astype(dtype)
        if config.is_clip:
            x = LayerNorm(config.layer_norm_eps, name="pre_layernorm")(x)
        blocks = nn.scan(
            VisionBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )(config, name="layers")
        return blocks(x)[0]
