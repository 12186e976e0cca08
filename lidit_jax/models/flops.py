"""Analytic FLOP counts of the models, for MFU: two FLOPs per multiply-add of a matrix product or a convolution.

Norms, softmax, activations and modulation are not counted, as is usual: they are under two per cent of the FLOPs.
Unless a docstring says otherwise, a function counts one forward pass.
"""

import dataclasses
from collections.abc import Sequence

from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llava import LlavaConfig
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.positions import CONV, parse_position
from lidit_jax.models.t5 import T5Config
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vision import VisionConfig

FREQUENCY_FEATURES = 256  # sinusoids of the timestep embedding
# Forward and backward FLOPs as a multiple of the forward ones: the backward pass has two products for each forward
# product, one for the gradient of the inputs and one for that of the weights.
FORWARD_AND_BACKWARD = 3


@dataclasses.dataclass(frozen=True)
class TextLengths:
    """Sequence lengths and feature width of the text from one encoder.

    Attributes:
      prefix: number of prefix tokens (system prompt and instruction).
      prompt: number of prompt tokens.
      width: width of the encoder features.
      shares_prefix: True if all prompts of a batch share one set of prefix features (LLMs), which is computed once and
        projected once per batch.
    """

    prefix: int
    prompt: int
    width: int
    shares_prefix: bool = True

    @property
    def total(self) -> int:
        return self.prefix + self.prompt


def dense(tokens: int, features_in: int, features_out: int) -> int:
    """FLOPs of a linear layer."""
    return 2 * tokens * features_in * features_out


def attention_products(queries: int, keys: int, features: int) -> int:
    """FLOPs of both attention products: queries times keys, and weights times values."""
    return 4 * queries * keys * features


def feed_forward(tokens: int, width: int, ratio: float) -> int:
    """FLOPs of a two-layer feed-forward network with an inner width of `ratio` times the outer."""
    return 2 * dense(tokens, width, int(width * ratio))


def lidit_forward(
    config: LIDiTConfig, batch_size: int, latent_height: int, latent_width: int, text: Sequence[TextLengths]
) -> int:
    """FLOPs of LI-DiT's forward pass on a batch: refiners and DiT (Figure 5), without the frozen encoders and the VAE.

    Args:
      config: sizes of LI-DiT.
      batch_size: number of samples.
      latent_height: height of the latents, before patchify.
      latent_width: width of the latents, before patchify.
      text: lengths and width of each encoder's features.

    Returns:
      FLOPs of the complete batch.
    """
    width = config.hidden_size
    tokens = latent_height * latent_width // config.patch_size**2
    patch = config.patch_size**2 * config.latent_channels
    condition = sum(lengths.prompt for lengths in text)

    per_sample = dense(1, FREQUENCY_FEATURES, width) + dense(1, width, width)  # timestep embedding
    per_batch = 0
    for lengths in text:
        projection = dense(lengths.prefix, lengths.width, width)
        per_batch += projection if lengths.shares_prefix else batch_size * projection
        per_sample += dense(lengths.prompt, lengths.width, width)
        per_sample += 2 * dense(1, width, width)  # pooled text
        per_sample += config.refiner_blocks * _token_refiner_block(config, lengths.total)
    if config.fusion == "collaborative" and len(text) > 1:
        total = sum(lengths.total for lengths in text)
        for lengths in text:
            branch = _collaborative_branch(config, lengths.total, total - lengths.total)
            per_sample += config.collaborative_blocks * branch

    per_sample += dense(tokens, patch, width)  # patch embedding
    if CONV in parse_position(config.position):
        per_sample += 2 * 9 * dense(tokens, width, width // 4)  # position ResBlock
    per_sample += config.depth * _dit_block(config, tokens, condition)
    per_sample += dense(1, width, 2 * width) + dense(tokens, width, patch)  # output
    return batch_size * per_sample + per_batch


def _token_refiner_block(config: LIDiTConfig, tokens: int) -> int:
    width = config.hidden_size
    gates = dense(1, width, 2 * width) if config.refiner_gated else 0
    self_attention = 4 * dense(tokens, width, width) + attention_products(tokens, tokens, width)
    return gates + self_attention + feed_forward(tokens, width, config.refiner_mlp_ratio)


def _collaborative_branch(config: LIDiTConfig, tokens: int, others: int) -> int:
    width = config.hidden_size
    cross = 2 * dense(tokens, width, width) + 2 * dense(others, width, width)
    cross += attention_products(tokens, others, width)
    return dense(1, width, 6 * width) + cross + feed_forward(tokens, width, config.refiner_mlp_ratio)


def _dit_block(config: LIDiTConfig, tokens: int, condition: int) -> int:
    width = config.hidden_size
    self_attention = 4 * dense(tokens, width, width) + attention_products(tokens, tokens, width)
    cross = 2 * dense(tokens, width, width) + 2 * dense(condition, width, width)
    cross += attention_products(tokens, condition, width)
    modulation = dense(1, width, 9 * width)
    return modulation + self_attention + cross + feed_forward(tokens, width, config.mlp_ratio)


def llm_forward(config: LLMConfig, prompts: int, length: int, prefix: int) -> int:
    """FLOPs of an LLM's blocks on prompts of `length` tokens whose `prefix` tokens are cached.

    Only the prompts' tokens are queries; the cached prefix adds keys and values.
    """
    query_width = config.num_attention_heads * config.head_dim
    key_width = config.num_key_value_heads * config.head_dim
    width = config.hidden_size
    block = 2 * dense(length, width, query_width) + 2 * dense(length, width, key_width)
    block += attention_products(length, prefix + length, query_width)
    block += 3 * dense(length, width, config.intermediate_size)
    return prompts * config.num_hidden_layers * block


def vision_forward(config: VisionConfig, images: int) -> int:
    """FLOPs of a vision tower's blocks and patch embedding."""
    tokens, width = config.num_tokens, config.hidden_size
    block = 4 * dense(tokens, width, width) + attention_products(tokens, tokens, width)
    block += 2 * dense(tokens, width, config.intermediate_size)
    patches = dense(config.num_patches, 3 * config.patch_size**2, width)
    return images * (config.num_hidden_layers * block + patches)


def llava_step(config: LlavaConfig, rows: int, length: int, trains_llm: bool) -> int:
    """FLOPs of a training step of a multi-modal LLM, without rematerialisation.

    Args:
      config: the networks.
      rows: conversations of a batch.
      length: tokens of each, those of the image included.
      trains_llm: False if the projector alone is trained: the backward pass then goes through the LLM, but computes no
        gradients of its weights.
    """
    llm = config.llm
    forward = llm_forward(llm, rows, length, 0) + dense(rows * length, llm.hidden_size, llm.vocab_size)
    tokens = rows * config.tokens_per_image
    projector = dense(tokens, config.vision.hidden_size, llm.hidden_size) + dense(tokens, *[llm.hidden_size] * 2)
    passes = FORWARD_AND_BACKWARD if trains_llm else FORWARD_AND_BACKWARD - 1
    return vision_forward(config.tower, rows) + passes * forward + FORWARD_AND_BACKWARD * projector


def t5_forward(config: T5Config, prompts: int, length: int) -> int:
    """FLOPs of a T5 encoder on sequences of `length` tokens, prefix included."""
    inner = config.num_heads * config.d_kv
    products = 3 if config.gated else 2
    block = 4 * dense(length, config.d_model, inner) + attention_products(length, length, inner)
    return prompts * config.num_layers * (block + products * dense(length, config.d_model, config.d_ff))


def vae_encoder_forward(config: VAEConfig, num_images: int, height: int, width: int) -> int:
    """FLOPs of the autoencoder's encoder on images of height x width pixels."""
    widths = config.block_out_channels
    positions = height * width
    total = 9 * dense(positions, config.in_channels, widths[0])
    features_in = widths[0]
    for index, features in enumerate(widths):
        for _ in range(config.layers_per_block):
            total += _residual_block(positions, features_in, features)
            features_in = features
        if index < len(widths) - 1:
            positions //= 4
            total += 9 * dense(positions, features, features)
    total += 2 * _residual_block(positions, features_in, features_in)
    if config.mid_block_add_attention:
        total += 4 * dense(positions, features_in, features_in) + attention_products(positions, positions, features_in)
    moments = 2 * config.latent_channels
    total += 9 * dense(positions, features_in, moments)
    if config.use_quant_conv:
        total += dense(positions, moments, moments)
    return num_images * total


def _residual_block(positions: int, features_in: int, features: int) -> int:
    shortcut = dense(positions, features_in, features) if features_in != features else 0
    return 9 * dense(positions, features_in, features) + 9 * dense(positions, features, features) + shortcut
