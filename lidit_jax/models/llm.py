"""Decoder-only language models of the LLaMA and Qwen1.5/2 type: RMSNorm, rotary positions, grouped queries, SwiGLU.

Numerically these are transformers' `LlamaModel` and `Qwen2Model` (the parity tests compare them). As a prompt encoder
a model runs only up to its third-to-last block (paper section 3.1); as a language model it runs to its logits.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import dot_product_attention
from lidit_jax.models.layers import Dense, RMSNorm
from lidit_jax.models.rotary import rotary_tables, rotate

# Variance 1 / width. At the families' widths it is about their 0.02; at a toy's 64 their 0.02 itself would leave
# every block next to silent for the first hundred steps.
EMBEDDING_INIT = nn.initializers.variance_scaling(1.0, "fan_out", "normal")  # [vocabulary, width]
KERNEL_INIT = nn.initializers.lecun_normal()

# The feature is the output of the third-to-last block: these many blocks at the end are neither run nor loaded.
BLOCKS_AFTER_FEATURE = 2


@dataclasses.dataclass(frozen=True)
class LLMConfig:
    """Sizes under the names of transformers' config.json.

    Attributes:
      attention_bias: biases on query, key and value (Qwen1.5 and Qwen2 have them, LLaMA does not).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
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
        return dataclasses.replace(self, num_hidden_layers=self.num_hidden_layers - BLOCKS_AFTER_FEATURE)


@flax.struct.dataclass
class PrefixCache:
    """Keys (after RoPE) and values of a prefix that all sequences of a batch share: each [blocks, P, K, D]."""

    key: jax.Array
    value: jax.Array


class LLMBlock(nn.Module):
    """Pre-norm causal self-attention and SwiGLU."""

    config: LLMConfig

    @nn.compact
    def __call__(self, x: jax.Array, cache: PrefixCache, cos: jax.Array, sin: jax.Array):
        """x [B, L, C], this block's cache [P, K, D], cos and sin [L, D] -> (x [B, L, C], (key, value) [B, L, K, D])."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        dense = {"use_bias": False, "kernel_init": KERNEL_INIT, "dtype": dtype}

        h = RMSNorm(config.rms_norm_eps, name="input_layernorm")(x)
        y, key_value = self._attention(h, cache, cos, sin)
        x = x + Dense(config.hidden_size, ("heads", "embed"), **dense, name="o_proj")(y)

        h = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm")(x)
        gate = Dense(config.intermediate_size, ("embed", "mlp"), **dense, name="gate_proj")(h)
        up = Dense(config.intermediate_size, ("embed", "mlp"), **dense, name="up_proj")(h)
        x = x + Dense(config.hidden_size, ("mlp", "embed"), **dense, name="down_proj")(nn.silu(gate) * up)
        return x, key_value

    def _attention(self, x, cache, cos, sin):
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        batch, length, _ = x.shape

        def project(name, num_heads):
            y = Dense(
                num_heads * config.head_dim,
                ("embed", "heads"),
                use_bias=config.attention_bias,
                kernel_init=KERNEL_INIT,
                dtype=dtype,
                name=name,
            )(x)
            return y.reshape(batch, length, num_heads, config.head_dim)

        query = rotate(project("q_proj", config.num_attention_heads), cos, sin)
        key = rotate(project("k_proj", config.num_key_value_heads), cos, sin)
        value = project("v_proj", config.num_key_value_heads)

        prefix_length = cache.key.shape[0]
        # A prompt's query sees the whole prefix and the prompt up to itself.
        mask = jnp.arange(prefix_length + length) <= prefix_length + jnp.arange(length)[:, None]  # [L, P + L]
        y = dot_product_attention(
            query,
            _after_prefix(cache.key, key),
            _after_prefix(cache.value, value),
            mask=mask[None, None],
            implementation=config.attention,
        )
        return y.reshape(batch, length, -1), (key, value)


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
            in_axes=(0, nn.broadcast, nn.broadcast),
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
        config = self.config
        cache = self._empty_cache() if cache is None else cache
        positions = cache.key.shape[1] + jnp.arange(tokens.shape[1])
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)
        x = self.embed_tokens[tokens].astype(jnp.dtype(config.dtype))  # [B, L, C]
        return self.layers(x, cache, cos, sin)

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
            return jnp.matmul(x, self.model.embed_tokens.T)
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
