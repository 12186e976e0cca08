"""Decoder-only language models: one module that is, by its configuration, a LLaMA, Mistral, Qwen or Gemma.

Numerically these are transformers' `LlamaModel`, `MistralModel`, `Qwen2Model`, `Qwen3Model`, `GemmaModel`,
`Gemma2Model` and `Gemma3TextModel` (the parity tests compare them). As a prompt encoder a model runs only up to its
third-to-last block (paper section 5.1); as a language model it runs to its logits.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.layers import ACTIVATION, ACTIVATIONS, Dense, RMSNorm
from lidit_jax.models.products import product_precision
from lidit_jax.models.rotary import DEFAULT_THETA, RopeScaling, rotary_tables, rotate

# Variance 1 / width. At the families' widths it is about their 0.02; at a toy's 64 their 0.02 itself would leave
# every block next to silent for the first hundred steps.
EMBEDDING_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "normal")  # [vocabulary, width]
KERNEL_INIT = nn.initializers.lecun_normal()

# The feature is the output of the third-to-last block: these many blocks at the end are neither run nor loaded.
BLOCKS_AFTER_FEATURE = 2


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Sizes and switches, under the names of transformers' config.json where it has one.

    Attributes:
      head_dim: 0 is hidden_size / num_attention_heads.
      max_position_embeddings: tokens of context that the model was made for.
      rope_scaling: how the context was stretched (LLaMA 3.1, Qwen2.5, Gemma 3); None: not at all.
      local_rope_theta: rotary base of the sliding-window layers, unscaled, where it differs (Gemma 3).
      attention_bias: biases on query, key and value (Qwen1.5, Qwen2).
      attention_output_bias, mlp_bias: biases on the attention's output and the FFN (switches of LLaMA).
      qk_norm: RMSNorm of queries and keys over the head size (Qwen3, Gemma 3).
      hidden_act: one of `ACTIVATIONS`, on the FFN's gate.
      sandwich_norm: RMSNorm after attention and FFN as well as before (Gemma 2 and 3).
      embedding_scale: factor on the embeddings (Gemma: sqrt(hidden_size)).
      attention_scale: factor on the logits; 0 is 1 / sqrt(head_dim) (Gemma 2 and 3: 1 / sqrt(query_pre_attn_scalar)).
      attention_softcap: see `dot_product_attention` (Gemma 2); 0: none.
      sliding_window: tokens, itself included, that a token sees in the layers that `sliding_layers` marks.
      sliding_layers: one bool a block; empty: none slides.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    max_position_embeddings: int = 4096
    rope_theta: float = DEFAULT_THETA
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    hidden_act: str = "silu"
    sandwich_norm: bool = False
    embedding_scale: float = 1.0
    attention_scale: float = 0.0
    attention_softcap: float = 0.0
    sliding_window: int = 0
    sliding_layers: tuple[bool, ...] = ()
    tie_word_embeddings: bool = False
    remat: bool = False
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"num_attention_heads={self.num_attention_heads} is not divisible by "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.rope_theta <= 1 or (self.local_rope_theta or DEFAULT_THETA) <= 1:
            raise UserError(f"rope_theta={self.rope_theta}: rotary positions need a base above 1")
        if self.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act={self.hidden_act!r:.80} is not supported: use one of {', '.join(ACTIVATIONS)}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_hidden_layers:
            raise UserError(f"{len(self.sliding_layers)} layer types for num_hidden_layers={self.num_hidden_layers}")
        if any(self.sliding_layers) and self.sliding_window < 1:
            raise UserError(f"sliding_window={self.sliding_window}: layers that slide need one of at least 1")

    def as_encoder(self) -> "LLMConfig":
        """The same model cut off after its third-to-last block.

        Raises:
          UserError: if there is no such block.
        """
        if self.num_hidden_layers <= BLOCKS_AFTER_FEATURE:
            raise UserError(
                f"num_hidden_layers={self.num_hidden_layers}: the feature is the third-to-last block's output, "
                "so an LLM needs at least 3 blocks"
            )
        return self.first_blocks(self.num_hidden_layers - BLOCKS_AFTER_FEATURE)

    def first_blocks(self, count: int) -> "LLMConfig":
        """The same model cut off after its first `count` blocks."""
        return dataclasses.replace(self, num_hidden_layers=count, sliding_layers=self.sliding_layers[:count])


@flax.struct.dataclass
class PrefixCache:
    """Keys (after RoPE) and values of a prefix that all sequences of a batch share: each [blocks, P, K, D]."""

    key: jax.Array
    value: jax.Array


@flax.struct.dataclass
class Places:
    """What a block knows of where its tokens are: rotary tables [L, D] and which of prefix and prompt each sees."""

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array  # bool [L, P + L]


class LLMBlock(nn.Module):
    """Pre-norm causal self-attention and gated FFN; with `sandwich_norm` each is normalised after as well."""

    config: LLMConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: PrefixCache, slides: jax.Array, everywhere: Places, nearby: Places | None):
        """x [B, L, C], this block's cache [P, K, D], `slides` bool scalar: whether it sees `nearby` or `everywhere`.

        Returns:
          (x [B, L, C], (key, value) [B, L, K, D]).
        """
        x = nn.with_logical_constraint(x, ACTIVATION)
        places = everywhere
        if nearby is not None:
            places = jax.tree.map(lambda near, far: jnp.where(slides, near, far), nearby, everywhere)
        y, key_value = self._attention(self._norm("input_layernorm")(x), cache, places)
        x = x + self._after("attention_out_norm", y)
        y = self._feed_forward(self._norm("feed_forward_norm")(x))
        return x + self._after("feed_forward_out_norm", y), key_value

    def _norm(self, name):
        return RMSNorm(self.config.rms_norm_eps, name=name)

    def _after(self, name, y):
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

    def _attention(self, x, cache, places):
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
        query, key = rotate(query, places.cos, places.sin), rotate(key, places.cos, places.sin)
        y = dot_product_attention(
            query,
            _after_prefix(cache.key, key),
            _after_prefix(cache.value, value),
            mask=places.mask[None, None],
            scale=config.attention_scale or config.head_dim**-0.5,
            softcap=config.attention_softcap,
            implementation=config.attention,
        )
        out = self._dense("o_proj", config.hidden_size, ("heads", "embed"), config.attention_output_bias)
        return out(y.reshape(batch, length, -1)), (key, value)


class LLM(nn.Module):
    """A causal language model. Padding on the right needs no mask: no real token ever sees what comes after it."""

    config: LLMConfig

    def setup(self):
        config = self.config
        init = nn.with_logical_partitioning(EMBEDDING_INIT, ("vocab", "embed"))
        self.embed_tokens = self.param("embed_tokens", init, (config.vocab_size, config.hidden_size), jnp.float32)
        block = nn.remat(LLMBlock, prevent_cse=False) if config.remat else LLMBlock
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=config.num_hidden_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(config)

    def __call__(self, tokens: jax.Array, cache: PrefixCache | None = None) -> jax.Array:
        """The last block's output, before the final norm: int32 [B, L] -> [B, L, C]; `cache`: what comes before."""
        return self._blocks(tokens, cache)[0]

    def prefix(self, tokens: jax.Array) -> tuple[jax.Array, PrefixCache]:
        """A shared prefix, int32 [P] -> its features [P, C] and the cache that prompts after it attend to."""
        if not tokens.shape[0]:  # no begin token and no instruction: attention kernels do not take zero queries
            return jnp.zeros((0, self.config.hidden_size), jnp.dtype(self.config.dtype)), self._empty_cache()
        x, (key, value) = self._blocks(tokens[None], None)
        return x[0], PrefixCache(key=key[:, 0], value=value[:, 0])

    def _blocks(self, tokens, cache):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        cache = self._empty_cache() if cache is None else cache
        slides = jnp.array(config.sliding_layers or (False,) * config.num_hidden_layers)
        everywhere, nearby = self._places(cache.key.shape[1], tokens.shape[1])
        x = self.embed_tokens[tokens].astype(dtype)  # [B, L, C]
        x = nn.with_logical_constraint(x, ACTIVATION)
        if config.embedding_scale != 1.0:
            x = x * jnp.asarray(config.embedding_scale, dtype)  # rounded to the dtype first, as transformers does
        return self.layers(x, cache, slides, everywhere, nearby)

    def _places(self, prefix_length: int, length: int) -> tuple[Places, Places | None]:
        """For blocks that see everything before a token and, if there are any, for those with a sliding window."""
        config = self.config
        positions = prefix_length + jnp.arange(length)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        back = positions[:, None] - jnp.arange(prefix_length + length)  # [L, P + L], how far back a key is
        everywhere = Places(cos, sin, back >= 0)
        if not any(config.sliding_layers):
            return everywhere, None
        if config.local_rope_theta is not None:
            cos, sin = rotary_tables(positions, config.head_dim, config.local_rope_theta)
        return everywhere, Places(cos, sin, (back >= 0) & (back < config.sliding_window))

    def _empty_cache(self):
        config = self.config
        shape = (config.num_hidden_layers, 0, config.num_key_value_heads, config.head_dim)
        empty = jnp.zeros(shape, jnp.dtype(config.dtype))
        return PrefixCache(key=empty, value=empty)


class CausalLM(nn.Module):
    """An `LLM` with its final norm and head: what the demo trains on next-token prediction."""

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
        x = self.norm(self.model(tokens)).astype(jnp.float32)
        if self.config.tie_word_embeddings:
            return jnp.matmul(x, self.model.embed_tokens.T, precision=product_precision(x.dtype))
        return self.lm_head(x)


def encoder_params(params: Any) -> Any:
    """From a trained `CausalLM`'s parameters, those of `LLM(config.as_encoder())`: the last two blocks dropped."""
    model = params["model"]
    layers = jax.tree.map(lambda x: x[: x.shape[0] - BLOCKS_AFTER_FEATURE], model["layers"])
    return {"embed_tokens": model["embed_tokens"], "layers": layers}


def _after_prefix(prefix: jax.Array, x: jax.Array) -> jax.Array:
    """prefix [P, K, D] before every row of x [B, L, K, D] -> [B, P + L, K, D]."""
    prefix = jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape))
    return jnp.concatenate([prefix, x], axis=1)
