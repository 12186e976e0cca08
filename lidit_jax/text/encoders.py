"""The frozen prompt encoders (LLMs and T5): tokens in, features out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

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
    """Interface of the prompt encoders.

    The argument `frozen` is the return value of `freeze`: a tree of arrays, which is passed to jitted steps.

    Attributes:
      hidden_size: D, the width of the features.
      lead: prefix rows per prompt in the output of `encode_prompts` (T5); 0 if all prompts share the prefix.
      tokenizer: turns prompts into tokens and a mask.
    """

    @property
    def tokenizer(self) -> PromptTokenizer: ...

    @property
    def hidden_size(self) -> int: ...

    @property
    def lead(self) -> int: ...

    def freeze(self, params: Any) -> Any:
        """Returns the arrays that encoding needs, from the model's parameters."""

    def encode_prompts(self, frozen: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Encodes prompts: tokens int32 [B, L], mask bool [B, L] -> features [B, lead + L, D]."""

    def features(self, frozen: Any, encoded: jax.Array, mask: jax.Array) -> TextFeatures:
        """Splits the output of `encode_prompts` into prefix and prompt features, and adds a shared prefix."""

    def shared_prefix(self, frozen: Any) -> jax.Array | None:
        """Returns the features [P, D] of a prefix that all prompts share; None if each prompt has its own."""

    def prefix_length(self, frozen: Any) -> int:
        """Returns P, the number of tokens before every prompt."""

    def flops(self, prompts: int, length: int, prefix: int) -> int:
        """Returns the FLOPs of encoding `prompts` prompts of `length` tokens after `prefix` tokens.

        `models/flops.py` says what is counted.
        """


@flax.struct.dataclass
class FrozenLLM:
    """The arrays of an `LLMTextEncoder`.

    Attributes:
      params: weights up to the third-to-last block.
      prefix_features: features of the prefix.
      prefix_cache: keys and values of the prefix in every block.
    """

    params: Any
    prefix_features: jax.Array  # [P, D]
    prefix_cache: PrefixCache


@dataclasses.dataclass(frozen=True)
class LLMTextEncoder:
    """An LLM as a prompt encoder: the output of its third-to-last block (paper section 5.1).

    Because the LLM is causal, the prefix is encoded once for all prompts.

    Attributes:
      config: config of the complete model; `config.as_encoder()` is what runs.
      tokenizer: turns prompts into tokens and a mask.

    Raises:
      UserError: if the tokenizer does not fit the model, or a prompt of text.max_length does not fit its context.
    """

    config: LLMConfig
    tokenizer: PromptTokenizer

    def __post_init__(self):
        _check_vocabulary(self.tokenizer, self.config.vocab_size)
        length = len(self.tokenizer.prefix()) + self.tokenizer.max_length
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"system prompt, instruction and text.max_length={self.tokenizer.max_length} make {length} tokens, "
                f"more than the LLM's context of {self.config.max_position_embeddings}: lower text.max_length"
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
            lambda p, t: self.model.apply({"params": p}, t, method=LLM.prefix), out_shardings=_replicated_like(params)
        )
        features, cache = apply(params, tokens)
        return FrozenLLM(params=params, prefix_features=features, prefix_cache=cache)

    def encode_prompts(self, frozen: FrozenLLM, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        del mask  # the causal mask already hides the padding on the right
        encoded = self.model.apply({"params": frozen.params}, tokens, frozen.prefix_cache)
        return jax.lax.stop_gradient(cast(jax.Array, encoded))

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
    """The arrays of a `T5TextEncoder`.

    Attributes:
      params: weights of the T5 encoder.
      prefix: tokens of the prefix.
    """

    params: Any
    prefix: jax.Array  # int32 [P]


@dataclasses.dataclass(frozen=True)
class T5TextEncoder:
    """A T5 encoder as a prompt encoder: its final output (the baseline of the paper's Table 3 and Figure 3).

    T5 is bidirectional: the features of the prefix depend on the prompt, so the prefix is encoded with each prompt.

    Attributes:
      config: config of the T5 encoder.
      tokenizer: turns prompts into tokens and a mask.

    Raises:
      UserError: if the tokenizer does not fit the model.
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
        return FrozenT5(params=params, prefix=jax.device_put(self.tokenizer.prefix(), _replicated_like(params)))

    def encode_prompts(self, frozen: FrozenT5, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        prefix_shape = (tokens.shape[0], frozen.prefix.shape[0])
        tokens = jnp.concatenate([jnp.broadcast_to(frozen.prefix, prefix_shape), tokens], axis=1)
        mask = jnp.concatenate([jnp.ones(prefix_shape, bool), mask], axis=1)
        encoded = T5Encoder(self.config).apply({"params": frozen.params}, tokens, mask)
        return jax.lax.stop_gradient(cast(jax.Array, encoded))

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
class PrecomputedEncoder:
    """Stands in for an encoder whose features are precomputed: batches hold the output of `encode_prompts`.

    `frozen` is the features [P, D] of the shared prefix (P is 0 if each prompt has its own).

    Attributes:
      hidden_size: D, the width of the features.
      lead: prefix rows per prompt, see `PromptEncoder` and `data/stored_features.py`.
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
    """Tokenizes a batch of prompts for every encoder.

    Returns:
      For each encoder {"<name>/tokens": int32 [B, L], "<name>/mask": bool [B, L], "<name>/truncated": bool [B]}.
    """
    arrays = {}
    for name, encoder in encoders.items():
        for key, value in encoder.tokenizer(prompts).items():
            arrays[f"{name}/{key}"] = value
    return arrays


@dataclasses.dataclass(frozen=True)
class PromptTokenCounter:
    """Counts the tokens of prompts, for `data/caption_lengths.py`: the largest number over several encoders."""

    encoders: Mapping[str, PromptEncoder]

    @property
    def digest(self) -> str:
        return " ".join(encoder.tokenizer.count_digest for encoder in self.encoders.values())

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        return np.max([encoder.tokenizer.count(prompts) for encoder in self.encoders.values()], axis=0)


def encode_batch(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Runs every encoder on a batch from `tokenize`: replaces "<name>/tokens" by "<name>/encoded"."""
    batch = dict(batch)
    for name, encoder in encoders.items():
        tokens = batch.pop(f"{name}/tokens")
        batch[f"{name}/encoded"] = encoder.encode_prompts(frozen[name], tokens, batch[f"{name}/mask"])
    return batch


def encode(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], batch: Mapping[str, jax.Array]
) -> list[TextFeatures]:
    """Computes the features of every encoder; a pure function for use in a jitted step.

    Args:
      encoders: the encoders by name.
      frozen: their arrays by name.
      batch: the output of `tokenize`, or of `encode_batch` if the prompts are encoded already.

    Returns:
      One `TextFeatures` per encoder, in the order of `encoders`.
    """
    features = []
    for name, encoder in encoders.items():
        mask, encoded = batch[f"{name}/mask"], batch.get(f"{name}/encoded")
        if encoded is None:
            with jax.named_scope(f"text_encoders/{name}"):
                encoded = encoder.encode_prompts(frozen[name], batch[f"{name}/tokens"], mask)
        features.append(encoder.features(frozen[name], encoded, mask))
    return features


def truncated_prompts(encoders: Mapping[str, PromptEncoder], prompts: Sequence[str]) -> dict[str, int]:
    """Counts, for each encoder, the prompts that are truncated because they are longer than its `max_length`."""
    return {name: int(encoder.tokenizer(prompts)["truncated"].sum()) for name, encoder in encoders.items()}


def text_flops_and_lengths(
    encoders: Mapping[str, PromptEncoder], frozen: Mapping[str, Any], count: int, prompts: Mapping[str, int]
) -> tuple[int, list[TextLengths]]:
    """Computes the FLOPs of encoding `count` prompts, and the lengths of their features.

    Args:
      encoders: the encoders by name.
      frozen: their arrays by name.
      count: number of prompts.
      prompts: tokens per prompt, by encoder name.

    Returns:
      The FLOPs over all encoders, and one `TextLengths` per encoder.
    """
    total_flops, lengths = 0, []
    for name, encoder in encoders.items():
        prefix = encoder.prefix_length(frozen[name])
        lengths.append(TextLengths(prefix, prompts[name], encoder.hidden_size, not encoder.lead))
        total_flops += encoder.flops(count, prompts[name], prefix)
    return total_flops, lengths


def _replicated_like(params: Any) -> jax.sharding.Sharding:
    """Returns a sharding that replicates an array on all devices of the parameters."""
    sharding = jax.tree.leaves(params)[0].sharding
    return replicated(sharding.mesh) if isinstance(sharding, NamedSharding) else sharding


def _check_vocabulary(tokenizer: PromptTokenizer, vocab_size: int) -> None:
    if tokenizer.largest_token >= vocab_size:  # JAX clamps out-of-range lookups to the last embedding
        raise UserError(
            f"the tokenizer has token ids up to {tokenizer.largest_token}, the model has {vocab_size} embeddings: use "
            "the tokenizer that was saved with the model"
        )
