"""A multi-modal LLM after LLaVA-1.5 (Liu et al. 2023): vision tower, two-layer projector, decoder-only LLM.

The features of an image take the places of the image tokens of its prompt, one for each patch. The logits match those
of transformers' `LlavaForConditionalGeneration` (see the parity tests).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.layers import ACTIVATION, Dense
from lidit_jax.models.llm import KERNEL_INIT, CausalLM, LLMConfig
from lidit_jax.models.vision import VisionConfig, VisionTower

SELECTIONS = ("default", "full")  # transformers' names
IMAGE_TEXT = "<image>"  # the image token's text, and where the image is in LLaVA's records


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """The networks of a multi-modal LLM, and how they are connected.

    Attributes:
      llm: the LLM.
      vision: the full vision tower.
      image_token: token id whose places the image features take.
      feature_layer: hidden state of the vision tower that is read, as transformers counts them.
      select: "default" drops CLIP's class token; "full" takes all tokens.

    Raises:
      UserError: if the tower has no such hidden state, SigLIP's features are to lose a class token that they do not
        have, or the LLM has no embedding for the image token.
    """

    llm: LLMConfig
    vision: VisionConfig
    image_token: int
    feature_layer: int = -2
    select: str = "default"

    def __post_init__(self):
        if self.select not in SELECTIONS:
            raise UserError(f"select={self.select!r:.80} is unknown: use one of {', '.join(SELECTIONS)}")
        if self.select == "default" and not self.vision.is_clip:
            raise UserError("select='default' drops CLIP's class token, which SigLIP does not have: use select='full'")
        if not 0 <= self.image_token < self.llm.vocab_size:
            raise UserError(f"image_token={self.image_token} is outside the vocabulary of {self.llm.vocab_size} tokens")
        self.vision.up_to(self.feature_layer)

    @property
    def tower(self) -> VisionConfig:
        """The vision tower without the blocks after the hidden state that is read."""
        return self.vision.up_to(self.feature_layer)

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches if self.select == "default" else self.vision.num_tokens


class Llava(nn.Module):
    """Projector and LLM; the vision tower, which is not trained, is `image_features`."""

    config: LlavaConfig

    def setup(self):
        llm = self.config.llm
        dtype = jnp.dtype(llm.dtype)
        self.linear_1 = Dense(llm.hidden_size, (None, "embed"), kernel_init=KERNEL_INIT, dtype=dtype)
        self.linear_2 = Dense(llm.hidden_size, ("embed", "embed_out"), kernel_init=KERNEL_INIT, dtype=dtype)
        self.language_model = CausalLM(llm)

    def __call__(self, tokens: jax.Array, features: jax.Array) -> jax.Array:
        """Next-token logits, float32 [B, L, V], of tokens int32 [B, L] and image features [B, N, C]."""
        return self.language_model.logits(self.hidden(tokens, features))

    def hidden(self, tokens: jax.Array, features: jax.Array) -> jax.Array:
        """Returns the input of the output head, [B, L, C].

        Args:
          tokens: int32 [B, L], with `tokens_per_image` image tokens in a row.
          features: the tower's features, [B, N, C_vision].
        """
        projected = self.project(features)
        embeddings = self.language_model.embed(tokens)
        is_image = tokens == self.config.image_token
        # The n-th image token of a row takes the n-th feature.
        number = jnp.clip(jnp.cumsum(is_image, axis=1) - 1, 0, projected.shape[1] - 1)
        placed = jnp.take_along_axis(projected, number[..., None], axis=1)
        x = jnp.where(is_image[..., None], placed.astype(embeddings.dtype), embeddings)
        return self.language_model.hidden(nn.with_logical_constraint(x, ACTIVATION))

    def project(self, features: jax.Array) -> jax.Array:
        """Projects image features into the LLM's embeddings: [B, N, C_vision] -> [B, N, C]."""
        return self.linear_2(nn.gelu(self.linear_1(features), approximate=False))


def image_features(config: LlavaConfig, tower_params: Mapping[str, Any], images: jax.Array) -> jax.Array:
    """Returns the vision tower's features that the projector reads.

    Args:
      config: the multi-modal LLM.
      tower_params: parameters of `VisionTower(config.tower)`.
      images: normalised images, float [B, S, S, 3].

    Returns:
      [B, tokens_per_image, C_vision].
    """
    features: Any = VisionTower(config.tower).apply({"params": tower_params}, images)
    return features[:, 1:] if config.select == "default" else features
