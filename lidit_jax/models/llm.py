"""Decoder-only language models: one module whose config selects LLaMA, Mistral, Qwen, Gemma or Phi-3.

The outputs match transformers' `LlamaModel`, `MistralModel`, `Qwen2Model`, `Qwen3Model`, `GemmaModel`, `Gemma2Model`,
`Gemma3TextModel` and `Phi3Model` (see the parity tests). As a prompt encoder a model runs only up to its third-to-last
block (paper section 5.1); as a language model it runs to its logits.
"""

import dataclasses
from typing import Annotated, Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.initialize import LAYERS, partitioned
from lidit_jax.models.layers import ACTIVATION, ACTIVATIONS, Dense, RMSNorm
from lidit_jax.models.rotary import DEFAULT_THETA, RopeScaling, rotary_tables, rotate
from lidit_jax.models.sharded_matmul import product_precision
from lidit_jax.ranges import (
    Blocks,
    Count,
    CountOrZero,
    Epsilon,
    Size,
    above,
    at_most,
    between,
    check_ranges,
)

# Variance 1 / width. At the width of published models this is close to their standard deviation of 0.02; at a toy
# model's width of 64, a standard deviation of 0.02 would make the blocks' outputs negligible for the first hundred
# steps.
EMBEDDING_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "normal")  # [vocabulary, width]
KERNEL_INIT = nn.initializers.lecun_normal()

# The feature is the output of the third-to-last block (paper section 5.1): the blocks after it are neither run nor
# loaded.
BLOCKS_AFTER_FEATURE = 2
MAX_HEAD_DIM = 65_536  # rotary tables of this size are computed before the shape of any tensor is checked

_RopeTheta = Annotated[float, above(1), at_most(1e12)]


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Hyper-parameters of an LLM, named as in transformers' config.json where it has the same field.

    Attributes:
      vocab_size: number of token embeddings.
      hidden_size: width of the model.
      intermediate_size: inner width of the FFN.
      num_hidden_layers: number of blocks.
      num_attention_heads: query heads.
      num_key_value_heads: key and value heads; divides num_attention_heads.
      head_dim: head size; 0 is hidden_size / num_attention_heads.
      max_position_embeddings: context length of the model in tokens.
      rope_theta: base of the rotary frequencies.
      rope_scaling: context extension of the rotary frequencies (LLaMA 3.1, Qwen2.5, Gemma 3); None for none.
      local_rope_theta: rotary base of the sliding-window layers, which are not scaled (Gemma 3); None is the same base
        and scaling as elsewhere.
      rms_norm_eps: epsilon of every RMSNorm.
      attention_bias: biases on query, key and value (Qwen1.5, Qwen2).
      attention_output_bias: bias on the attention's output projection (an option of LLaMA's config).
      mlp_bias: biases in the FFN (an option of LLaMA's config).
      qk_norm: RMSNorm of queries and keys over the head size (Qwen3, Gemma 3).
      hidden_act: activation on the FFN's gate, one of `ACTIVATIONS`.
      sandwich_norm: RMSNorm after attention and FFN as well as before them (Gemma 2 and 3).
      embedding_scale: factor on the embeddings (Gemma: sqrt(hidden_size)).
      attention_scale: factor on the logits; 0 is 1 / sqrt(head_dim) (Gemma 2 and 3: 1 / sqrt(query_pre_attn_scalar)).
      attention_softcap: logit softcap, see `dot_product_attention` (Gemma 2); 0 disables it.
      sliding_window: number of tokens, itself included, that a token attends to in the blocks with a sliding window.
      sliding_layers: True for each block with a sliding window; empty if no block has one.
      tie_word_embeddings: use the embeddings as the output head of `CausalLM`.
      remat: rematerialise each block in the backward pass.
      attention: attention implementation, see `dot_product_attention`.
      dtype: compute dtype.

    Raises:
      UserError: if a value is not supported or two do not fit together.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Blocks
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Annotated[int, between(0, MAX_HEAD_DIM)] = 0
    max_position_embeddings: Count = 4096
    rope_theta: _RopeTheta = DEFAULT_THETA
    rope_scaling: RopeScaling | None = None
    local_rope_theta: _RopeTheta | None = None
    rms_norm_eps: Epsilon = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sandwich_norm: bool = False
    embedding_scale: Annotated[float, above(0), at_most(1e6)] = 1.0
    attention_scale: Annotated[float, between(0, 1e3)] = 0.0
    attention_softcap: Annotated[float, between(0, 1e6)] = 0.0
    sliding_window: CountOrZero = 0
    sliding_layers: tuple[bool, ...] = ()
    tie_word_embeddings: bool = False
    remat: bool = False
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_ranges(self, "")
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim % 2 or not self.head_dim:
            raise UserError(
                f"head_dim={self.head_dim} is not a positive even number, as rotary positions require: change it, "
                f"hidden_size={self.hidden_size} or num_attention_heads={self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act={self.hidden_act!r:.80} is not supported: use one of {', '.join(ACTIVATIONS)}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_hidden_layers:
            raise UserError(
                f"sliding_layers has {len(self.sliding_layers)} entries, expected one for each of "
                f"num_hidden_layers={self.num_hidden_layers}"
            )
        if any(self.sliding_layers) and self.sliding_window < 1:
            raise UserError(
                f"sliding_window={self.sliding_window} must be at least 1 in a model with sliding-window layers"
            )

    def as_encoder(self) -> "LLMConfig":
        """Returns the config of the same model without the blocks after its third-to-last one.

        Raises:
          UserError: if the model has fewer than 3 blocks.
        """
        if self.num_hidden_layers <= BLOCKS_AFTER_FEATURE:
            raise UserError(
                f"num_hidden_layers={self.num_hidden_layers}: the feature is the third-to-last block's output, "
                "so an LLM needs at least 3 blocks"
            )
        return self.first_blocks(self.num_hidden_layers - BLOCKS_AFTER_FEATURE)

    def first_blocks(self, count: int) -> "LLMConfig":
        """Returns the config of the same model with only its first `count` blocks."""
        return dataclasses.replace(self, num_hidden_layers=count, sliding_layers=self.sliding_layers[:count])


@flax.struct.dataclass
class PrefixCache:
    """Key-value cache of a prefix that all sequences of a batch share; each array is [blocks, P, K, D].

    Attributes:
      key: keys, after RoPE.
      value: values.
    """

    key: jax.Array
    value: jax.Array


@flax.struct.dataclass
class RotaryAndMask:
    """Rotary tables and attention mask of a block.

    Attributes:
      cos: cosines, float32 [L, D].
      sin: sines, float32 [L, D].
      mask: which tokens of prefix and prompt each of the L tokens attends to, bool [L, P + L]; None: all up to itself,
        which attention kernels support.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None


class LLMBlock(nn.Module):
    """Pre-norm causal self-attention and gated FFN; with `sandwich_norm` their outputs are normalised too."""

    config: LLMConfig

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cache: PrefixCache,
        is_sliding: jax.Array,
        full: RotaryAndMask,
        sliding: RotaryAndMask | None,
    ):
        """x [B, L, C], this block's prefix cache [P, K, D] -> (x [B, L, C], (key, value) [B, L, K, D]).

        Args:
          x: input of the block.
          cache: keys and values of the prefix.
          is_sliding: bool scalar, True if this block has a sliding window.
          full: rotary tables and mask of blocks that attend to all earlier tokens.
          sliding: rotary tables and mask of blocks with a sliding window; None if the model has none.
        """
        x = nn.with_logical_constraint(x, ACTIVATION)
        positions = full
        if sliding is not None:
            positions = jax.tree.map(lambda a, b: jnp.where(is_sliding, a, b), sliding, full)
        y, key_value = self._attention(self._norm("input_layernorm")(x), cache, positions)
        x = x + self._post_norm("attention_out_norm", y)
        y = self._feed_forward(self._norm("feed_forward_norm")(x))
        return x + self._post_norm("feed_forward_out_norm", y), key_value

    def _norm(self, name):
        return RMSNorm(self.config.rms_norm_eps, name=name)

    def _post_norm(self, name, y):
        return self._norm(name)(y) if self.config.sandwich_norm else y

    def _dense(self, name, features, axes, use_bias):
        dtype = jnp.dtype(self.config.dtype)
        return Dense(features, axes, use_bias=use_bias, kernel_init=KERNEL_INIT, dtype=dtype, name=name)

    def _feed_forward(self, x):
        config = self.config
        gate = self._dense("gate_proj", config.intermediate_size, ("embed", "mlp"), config.mlp_bias)(x)
        up = self._dense("up_proj", config.intermediate_size, ("embed", "mlp"), config.mlp_bias)(x)
        down = self._dense("down_proj", config.hidden_size, ("mlp", "embed"), config.mlp_bias)
        return down(ACTIVATIONS[config.hidden_act](gate) * up)

    def _attention(self, x, cache, positions):
        config = self.config
        batch, length, _ = x.shape

        def project(name, num_heads):
            y = self._dense(name, num_heads * config.head_dim, ("embed", "heads"), config.attention_bias)(x)
            return y.reshape(batch, length, num_heads, config.head_dim)

        query = project("q_proj", config.num_attention_heads)
        key = project("k_proj", config.num_key_value_heads)
        value = project("v_proj", config.num_key_value_heads)
        if config.qk_norm:
            query, key = self._norm("q_norm")(query), self._norm("k_norm")(key)
        query, key = rotate(query, positions.cos, positions.sin), rotate(key, positions.cos, positions.sin)
        y = dot_product_attention(
            query,
            _prepend_prefix(cache.key, key),
            _prepend_prefix(cache.value, value),
            mask=None if positions.mask is None else positions.mask[None, None],
            is_causal=positions.mask is None,
            scale=config.attention_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap,
            implementation=config.attention,
        )
        out = self._dense("o_proj", config.hidden_size, ("heads", "embed"), config.attention_output_bias)
        return out(y.reshape(batch, length, -1)), (key, value)


class LLM(nn.Module):
    """A causal language model without its final norm and output head.

    Padding on the right needs no mask: the causal mask hides it from all real tokens.
    """

    config: LLMConfig

    def setup(self):
        config = self.config
        init = partitioned(EMBEDDING_INIT, ("vocab", "embed"))
        self.embed_tokens = self.param("embed_tokens", init, (config.vocab_size, config.hidden_size), jnp.float32)
        block = nn.remat(LLMBlock, prevent_cse=False) if config.remat else LLMBlock
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: LAYERS},
        )(config)

    def __call__(self, tokens: jax.Array, cache: PrefixCache | None = None) -> jax.Array:
        """Returns the last block's output, before the final norm: tokens int32 [B, L] -> [B, L, C].

        Args:
          tokens: int32 [B, L].
          cache: keys and values of the prefix before the tokens; None for no prefix.
        """
        return self._blocks(self.embed(tokens), cache)[0]

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings of tokens, the input of the first block: int32 [B, L] -> [B, L, C]."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        x = self.embed_tokens[tokens].astype(dtype)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, dtype)  # transformers also rounds the factor to the dtype
        return x

    def from_embeddings(self, x: jax.Array) -> jax.Array:
        """Returns the last block's output for embeddings, some of which may be features of an image: [B, L, C]."""
        return self._blocks(x, None)[0]

    def prefix(self, tokens: jax.Array) -> tuple[jax.Array, PrefixCache]:
        """Encodes a shared prefix, int32 [P]: returns its features [P, C] and the cache for the prompts after it."""
        if not tokens.shape[0]:  # no begin token and no instruction; attention kernels reject zero queries
            return jnp.zeros((0, self.config.hidden_size), jnp.dtype(self.config.dtype)), self._empty_cache()
        x, (key, value) = self._blocks(self.embed(tokens[None]), None)
        return x[0], PrefixCache(key=key[:, 0], value=value[:, 0])

    def _blocks(self, x, cache):
        config = self.config
        cache = self._empty_cache() if cache is None else cache
        is_sliding = jnp.array(config.sliding_layers or (False,) * config.num_hidden_layers)
        full, sliding = self._rotary_and_masks(cache.key.shape[1], x.shape[1])
        x = nn.with_logical_constraint(x, ACTIVATION)
        return self.layers(x, cache, is_sliding, full, sliding)

    def _rotary_and_masks(self, prefix_length: int, length: int) -> tuple[RotaryAndMask, RotaryAndMask | None]:
        """Returns the rotary tables and masks of the full-attention blocks, and of the sliding-window blocks if any."""
        config = self.config
        positions = prefix_length + jnp.arange(length)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        distances = positions[:, None] - jnp.arange(prefix_length + length)  # [L, P + L], query minus key position
        if not any(config.sliding_layers):
            is_plain = not prefix_length and not config.attention_softcap
            return RotaryAndMask(cos, sin, None if is_plain else distances >= 0), None
        full = RotaryAndMask(cos, sin, distances >= 0)
        if config.local_rope_theta is not None:
            cos, sin = rotary_tables(positions, config.head_dim, config.local_rope_theta)
        return full, RotaryAndMask(cos, sin, (distances >= 0) & (distances < config.sliding_window))

    def _empty_cache(self):
        config = self.config
        shape = (config.num_hidden_layers, 0, config.num_key_value_heads, config.head_dim)
        empty = jnp.zeros(shape, jnp.dtype(config.dtype))
        return PrefixCache(key=empty, value=empty)


class CausalLM(nn.Module):
    """An `LLM` with its final norm and output head, for training on next-token prediction (the demo)."""

    config: LLMConfig

    def setup(self):
        config = self.config
        self.model = LLM(config)
        self.norm = RMSNorm(config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Dense(
                config.vocab_size, ("embed", "vocab"), use_bias=False, kernel_init=KERNEL_INIT, dtype=jnp.float32
            )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [B, L] -> next-token logits, float32 [B, L, vocab_size]."""
        return self.logits(self.hidden(self.embed(tokens)))

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Returns the embeddings of tokens: int32 [B, L] -> [B, L, C]."""
        return self.model.embed(tokens)

    def hidden(self, embeddings: jax.Array) -> jax.Array:
        """Returns the input of the output head: embeddings [B, L, C] -> [B, L, C]."""
        return self.norm(self.model.from_embeddings(embeddings))

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns next-token logits: the result of `hidden`, [B, L, C] -> float32 [B, L, vocab_size]."""
        x = hidden.astype(jnp.float32)
        if self.config.tie_word_embeddings:
            return jnp.matmul(x, self.model.embed_tokens.T, precision=product_precision(x.dtype))
        return self.lm_head(x)


def encoder_params(params: Any) -> Any:
    """Returns the parameters of `LLM(config.as_encoder())` from those of a `CausalLM`, without the last two blocks."""
    model = params["model"]
    layers = jax.tree.map(lambda x: x[: x.shape[0] - BLOCKS_AFTER_FEATURE], model["layers"])
    return {"embed_tokens": model["embed_tokens"], "layers": layers}


def _prepend_prefix(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """Prepends the shared prefix [P, K, D] to every row of x [B, L, K, D]: [B, P + L, K, D]."""
    prefix = jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape))
    return jnp.concatenate([prefix, x], axis=1)
