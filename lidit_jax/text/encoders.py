"""The frozen prompt encoders, side by side: tokens in, features out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lidit_jax.errors import UserError
from lidit_jax.models.flops import TextLengths, llm_forward, t5_forward
from lidit_jax.models.lidit import TextFeatures
from lidit_jax.models.llm import LLM, LLMConfig, PrefixCache
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.parallel.rules import replicated
from lidit_jax.text.prompts import PromptTokenizer


class PromptEncoder(Protocol):
    """What every kind of encoder can do. `frozen` is what its `freeze` returned: arrays alone, a jitted step's input.

    Attributes:
      hidden_size: D, the width of its features.
      lead: rows of what `encode_prompts` gives that come before the prompts'; 0 where all prompts share their prefix.
      tokenizer: prompts -> tokens, mask.
    """

    tokenizer: PromptTokenizer

    @property
    def hidden_size(self) -> int: ...

    @property
    def lead(self) -> int: ...

    def freeze(self, params: Any) -> Any:
        """The arrays that encoding needs, from the model's parameters."""

    def encode_prompts(self, frozen: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """tokens int32 [B, L], mask bool [B, L] -> what depends on the prompts alone: [B, L or P + L, D]."""

    def features(self, frozen: Any, encoded: jax.Array, mask: jax.Array) -> TextFeatures:
        """What `encode_prompts` gave -> prefix and prompts."""

    def shared_prefix(self, frozen: Any) -> jax.Array | None:
        """[P, D], the prefix's features where all prompts share them."""

    def prefix_length(self, frozen: Any) -> int:
        """P, tokens before every prompt."""

    def flops(self, prompts: int, length: int, prefix: int) -> int:
        """Of encoding so many prompts of `length` tokens behind `prefix` tokens; see `models/flops.py`."""


@flax.struct.dataclass
class FrozenLLM:
    """Weights up to the third-to-last block, and the prefix's features and cache."""

    params: Any
    prefix_features: jax.Array  # [P, D]
    prefix_cache: PrefixCache


@dataclasses.dataclass(frozen=True)
class LLMTextEncoder:
    """One LLM as a prompt encoder: its third-to-last block's output (paper section 5.1).

    `config` is the whole model's; what runs is `config.as_encoder()`. Being causal, the LLM computes the prefix once
    for all prompts.
    """

    config: LLMConfig
    tokenizer: PromptTokenizer

    def __post_init__(self):
        _check_vocabulary(self.tokenizer, self.config.vocab_size)
        length = len(self.tokenizer.prefix()) + self.tokenizer.max_length
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"system prompt, instruction and text.max_length={self.tokenizer.max_length} make {length} tokens, the "
                f"LLM was made for {self.config.max_position_embeddings}: lower text.max_length"
            )

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def lead(self) -> int:
        return 0

    @property
    def model(self) -> LLM:
        return LLM(self.config.as_encoder())

    def freeze(self, params: Any) -> FrozenLLM:
        tokens = self.tokenizer.prefix()
        apply = jax.jit(
            lambda p, t: self.model.apply({"params": p}, t, method=LLM.prefix), out_shardings=_everywhere(params)
        )
        features, cache = apply(params, tokens)
        return FrozenLLM(params=params, prefix_features=features, prefix_cache=cache)

    def encode_prompts(self, frozen: FrozenLLM, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        del mask  # causal: no token sees the padding after it
        encoded = self.model.apply({"params": frozen.params}, tokens, frozen.prefix_cache)
        return jax.lax.stop_gradient(encoded)

    def features(self, frozen: FrozenLLM, encoded: jax.Array, mask: jax.Array) -> TextFeatures:
        return TextFeatures(prefix=jax.lax.stop_gradient(frozen.prefix_features), prompt=encoded, mask=mask)

    def shared_prefix(self, frozen: FrozenLLM) -> jax.Array:
        return frozen.prefix_features

    def prefix_length(self, frozen: FrozenLLM) -> int:
        return frozen.prefix_features.shape[0]

    def flops(self, prompts: int, length: int, prefix: int) -> int:
        return llm_forward(self.config.as_encoder(), prompts, length, prefix)


@flax.struct.dataclass
class FrozenT5:
    """The encoder's weights, and the prefix's tokens."""

    params: Any
    prefix: jax.Array  # int32 [P]


@dataclasses.dataclass(frozen=True)
class T5TextEncoder:
    """T5's encoder as a prompt encoder: its last output (the baseline of the paper's Table 3 and Figure 3).

    It is bidirectional: an instruction's features depend on the prompt, so they are computed with each of them.
    """

    config: T5Config
    tokenizer: PromptTokenizer

    def __post_init__(self):
        _check_vocabulary(self.tokenizer, self.config.vocab_size)

    @property
    def hidden_size(self) -> int:
        return self.config.d_model

    @property
    def lead(self) -> int:
        return len(self.tokenizer.prefix())

    def freeze(self, params: Any) -> FrozenT5:
        return FrozenT5(params=params, prefix=jax.device_put(self.tokenizer.prefix(), _everywhere(params)))

    def encode_prompts(self, frozen: FrozenT5, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        shape = (tokens.shape[0], frozen.prefix.shape[0])
        tokens = jnp.concatenate([jnp.broadcast_to(frozen.prefix, shape), tokens], axis=1)
        mask = jnp.concatenate([jnp.ones(shape, bool), mask], axis=1)
        return jax.lax.stop_gradient(T5Encoder(self.config).apply({"params": frozen.params}, tokens, mask))

    def features(self, frozen: FrozenT5, encoded: jax.Array, mask: jax.Array) -> TextFeatures:
        length = frozen.prefix.shape[0]
        return TextFeatures(prefix=encoded[:, :length], prompt=encoded[:, length:], mask=mask)

    def shared_prefix(self, frozen: FrozenT5) -> None:
        return None

    def prefix_length(self, frozen: FrozenT5) -> int:
        return frozen.prefix.shape[0]

    def flops(self, prompts: int, length: int, prefix: int) -> int:
        return t5_forward(self.config, prompts, prefix + length)


@dataclasses.dataclass(frozen=True)
class StoredEncoding:
    """In an encoder's place where its features were computed ahead of training: nothing is left to encode.

    `frozen` is the instruction's features [P, D] alone.

    Attributes:
      lead: rows before the prompt's that every prompt has of its own; see `data/stored_features.py`.
    """

    hidden_size: int
    lead: int

    def features(self, frozen: jax.Array, encoded: jax.Array, mask: jax.Array) -> TextFeatures:
        prefix = encoded[:, : self.lead] if self.lead else frozen
        return TextFeatures(prefix=prefix, prompt=encoded[:, self.lead :], mask=mask)

    def prefix_length(self, frozen: jax.Array) -> int:
        return self.lead or frozen.shape[0]

    def flops(self, prompts: int, length: int, prefix: int) -> int:
        return 0


def tokenize(encoders: Mapping[str, PromptEncoder], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """All encoders' tokens of a batch of prompts: {"<name>/tokens": int32 [B, L], "<name>/mask": bool [B, L], …}."""
    arrays = {}
    for name, encoder in encoders.items():
        for key, value in encoder.tokenizer(prompts).items():
            arrays[f"{name}/{key}"] = value
    return arrays


def encode_ahead(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """A batch that `tokenize` filled, with every encoder's "<name>/encoded" in place of its tokens."""
    batch = dict(batch)
    for name, encoder in encoders.items():
        tokens = batch.pop(f"{name}/tokens")
        batch[f"{name}/encoded"] = encoder.encode_prompts(frozen[name], tokens, batch[f"{name}/mask"])
    return batch


def encode(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> list[TextFeatures]:
    """The features of every encoder, in the order of `encoders`; pure, to be called inside a jitted step.

    Args:
      batch: from `tokenize`, or from `encode_ahead`, which leaves nothing to compute.
    """
    features = []
    for name, encoder in encoders.items():
        mask, encoded = batch[f"{name}/mask"], batch.get(f"{name}/encoded")
        if encoded is None:
            encoded = encoder.encode_prompts(frozen[name], batch[f"{name}/tokens"], mask)
        features.append(encoder.features(frozen[name], encoded, mask))
    return features


def truncated_prompts(encoders: Mapping[str, PromptEncoder], prompts: Sequence[str]) -> dict[str, int]:
    """How many of the prompts each encoder cuts at their end, because they are longer than its `max_length`."""
    return {name: int(encoder.tokenizer(prompts)["truncated"].sum()) for name, encoder in encoders.items()}


def text_work(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], count: int, prompts: Mapping[str, int]
) -> tuple[int, list[TextLengths]]:
    """Operations of encoding so many prompts, and the lengths of their features.

    Args:
      frozen: the encoders' arrays, by name.
      prompts: tokens of a prompt, by encoder.
    """
    total, lengths = 0, []
    for name, encoder in encoders.items():
        prefix = encoder.prefix_length(frozen[name])
        lengths.append(TextLengths(prefix, prompts[name], encoder.hidden_size, not encoder.lead))
        total += encoder.flops(count, prompts[name], prefix)
    return total, lengths


def _everywhere(params: Any) -> jax.sharding.Sharding:
    """Whole on every device that has a part of the parameters."""
    sharding = jax.tree.leaves(params)[0].sharding
    return replicated(sharding.mesh) if isinstance(sharding, NamedSharding) else sharding


def _check_vocabulary(tokenizer: PromptTokenizer, vocab_size: int) -> None:
    if tokenizer.largest_token >= vocab_size:  # JAX would read the last embedding for tokens beyond it
        raise UserError(
            f"the tokenizer has tokens up to {tokenizer.largest_token}, the model has {vocab_size} embeddings: they do "
            "not belong together"
        )
