"""The frozen prompt encoders, side by side: tokens in, third-to-last block's features out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import numpy as np

from lidit_jax.errors import UserError
from lidit_jax.models.lidit import TextFeatures
from lidit_jax.models.llm import LLM, LLMConfig, PrefixCache
from lidit_jax.text.prompts import PromptTokenizer


@flax.struct.dataclass
class FrozenEncoder:
    """The arrays of one encoder: weights up to the third-to-last block, and the prefix's features and cache."""

    params: Any
    prefix_features: jax.Array  # [P, D]
    prefix_cache: PrefixCache


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """One LLM as a prompt encoder. `config` is the whole model's; what runs is `config.as_encoder()`."""

    config: LLMConfig
    tokenizer: PromptTokenizer

    def __post_init__(self):
        if self.tokenizer.vocab_size > self.config.vocab_size:  # JAX would read the last embedding for tokens beyond it
            raise UserError(
                f"the tokenizer has {self.tokenizer.vocab_size} tokens, the LLM has embeddings for "
                f"{self.config.vocab_size}: they do not belong together"
            )

    @property
    def model(self) -> LLM:
        return LLM(self.config.as_encoder())

    def freeze(self, params: Any) -> FrozenEncoder:
        """Encodes the prefix once: a causal model's prefix does not depend on what follows it."""
        tokens = self.tokenizer.prefix()
        apply = jax.jit(lambda p, t: self.model.apply({"params": p}, t, method=LLM.prefix))
        features, cache = apply(params, tokens)
        return FrozenEncoder(params=params, prefix_features=features, prefix_cache=cache)

    def encode(self, frozen: FrozenEncoder, tokens: jax.Array, mask: jax.Array) -> TextFeatures:
        """tokens int32 [B, L], mask bool [B, L] -> features; pure, to be called inside a jitted step."""
        prompt = self.model.apply({"params": frozen.params}, tokens, frozen.prefix_cache)
        return TextFeatures(
            prefix=jax.lax.stop_gradient(frozen.prefix_features), prompt=jax.lax.stop_gradient(prompt), mask=mask
        )


def tokenize(encoders: Mapping[str, TextEncoder], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """All encoders' tokens of a batch of prompts: {"<name>/tokens": int32 [B, L], "<name>/mask": bool [B, L], …}."""
    arrays = {}
    for name, encoder in encoders.items():
        for key, value in encoder.tokenizer(prompts).items():
            arrays[f"{name}/{key}"] = value
    return arrays


def encode(
    encoders: Mapping[str, TextEncoder], frozen: Mapping[str, FrozenEncoder], batch: Mapping[str, jax.Array]
) -> list[TextFeatures]:
    """The features of every encoder, in the order of `encoders`, from a batch that `tokenize` filled."""
    return [
        encoder.encode(frozen[name], batch[f"{name}/tokens"], batch[f"{name}/mask"])
        for name, encoder in encoders.items()
    ]
