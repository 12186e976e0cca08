"""Prompts to tokens: the instruction before them, an end token after them, padding on the right."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError

# Paper, section 3.1.
INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial relationships of "
    "the objects:"
)


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Tokenises a constant prefix (system prompt + instruction) and the prompts behind it, separately.

    Separately, so that no byte-pair merge crosses the border: the prefix has the same tokens whatever the prompt, its
    length is static, dropping it after the refiners is a slice, and its features can be shared by a whole batch.

    Attributes:
      tokenizer: a transformers tokenizer; its end token closes every prompt.
      max_length: L, tokens a prompt may have, its end token included. Longer ones are cut at their end.
      instruction, system_prompt: text before every prompt; "" leaves it out.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    instruction: str = INSTRUCTION
    system_prompt: str = ""

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token): set one in its tokenizer_config.json")
        if self.max_length < 1:
            raise UserError(f"text.max_length={self.max_length} leaves no room for the end token: use at least 1")

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def prefix(self) -> np.ndarray:
        """The tokens before every prompt: int32 [P], the begin token first if the tokenizer has one."""
        text = " ".join(part for part in (self.system_prompt, self.instruction) if part)
        tokens = self._encode([text])[0] if text else []
        if self.tokenizer.bos_token_id is not None:
            tokens = [self.tokenizer.bos_token_id, *tokens]
        return np.asarray(tokens, np.int32)

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """-> {"tokens": int32 [B, L], "mask": bool [B, L], "truncated": bool [B]}.

        Every row keeps at least its end token, so that an empty prompt never gives an all-masked attention row.
        """
        shape = (len(prompts), self.max_length)
        tokens = np.full(shape, self.tokenizer.eos_token_id, np.int32)  # padding is masked: any valid token will do
        mask = np.zeros(shape, bool)
        truncated = np.zeros(len(prompts), bool)
        for row, ids in enumerate(self._encode(prompts)):
            truncated[row] = len(ids) > self.max_length - 1
            ids = [*ids[: self.max_length - 1], self.tokenizer.eos_token_id]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return {"tokens": tokens, "mask": mask, "truncated": truncated}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # Half a surrogate pair, which captions from JSON can hold, is not text: it becomes a question mark.
        texts = [text.encode("utf-8", "replace").decode("utf-8") for text in texts]
        # A prompt that spells out a special token is text: it must not end the prompt early.
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
