"""Prompts to tokens: the instruction before them, an end token after them, padding on the right."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError

# Paper, section 3.1.
INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial relationships of "
    "the objects:"
)
# Some templates (LLaMA 3.2's) write today's date: a run would have another prefix every day. All get LLaMA's default.
SAME_DAY = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
# Stands for the prompt in a rendered chat template: private-use characters, which no template writes itself.
PLACEHOLDER = "\ue000prompt\ue001"
ENCODE = ("in_step", "ahead")


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Under `text` in the config; see `PromptTokenizer`.

    Attributes:
      encode: where the encoders run in training: "in_step", inside the train step, or "ahead", as a program of their
        own before it. The features are the same.
    """

    max_length: int
    instruction: str
    system_prompt: str = ""
    chat_template: bool = True
    encode: str = "in_step"

    def __post_init__(self):
        if self.encode not in ENCODE:
            raise UserError(f"text.encode={self.encode!r} is unknown: use one of {', '.join(ENCODE)}")


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Tokenises a constant prefix (system prompt + instruction) and the prompts behind it, separately.

    Separately, so that no byte-pair merge crosses the border: the prefix has the same tokens whatever the prompt, its
    length is static, dropping it after the refiners is a slice, and its features can be shared by a whole batch.

    Attributes:
      tokenizer: a transformers tokenizer; its end token closes every prompt.
      max_length: L, tokens a prompt may have, its end token included. Longer ones are cut at their end.
      instruction, system_prompt: text before every prompt; "" leaves it out.
      chat_template: where the tokenizer has a chat template, the prefix is what that template writes up to the prompt:
        the system prompt in its place, then the user's turn, which begins with the instruction. Where it has none, or
        with False, the two are plain text.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    instruction: str = INSTRUCTION
    system_prompt: str = ""
    chat_template: bool = True

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token): set one in its tokenizer_config.json")
        if self.max_length < 1:
            raise UserError(f"text.max_length={self.max_length} leaves no room for the end token: use at least 1")

    @functools.cached_property
    def largest_token(self) -> int:
        """The largest token that a prompt or the prefix can have; special ones that neither has do not count.

        Multi-modal models' tokenizers know tokens of pictures, for which their LLM has no embedding.
        """
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        ordinary = (token for token in self.tokenizer.get_vocab().values() if token not in special)
        return max(*ordinary, self.tokenizer.eos_token_id, *self._prefix, 0)

    def prefix(self) -> np.ndarray:
        """The tokens before every prompt: int32 [P], the begin token first if the tokenizer adds one.

        Raises:
          UserError: if the chat template fails, or changes the user's words.
        """
        return np.asarray(self._prefix, np.int32)

    @functools.cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits over what stands before every prompt and how long one may be."""
        facts = [self._prefix, self.separator, self.max_length]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @functools.cached_property
    def _prefix(self) -> list[int]:
        if self.chat_template and self.tokenizer.chat_template:
            # The template's own special tokens are special here, and the begin token is among them if it wants one.
            text = _without_half_characters(self._chat_prefix())
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        text = " ".join(part for part in (self.system_prompt, self.instruction) if part)
        tokens = self._encode([text])[0] if text else []
        begin = self.tokenizer.bos_token_id
        adds_it = begin is not None and self.tokenizer("", verbose=False)["input_ids"][:1] == [begin]
        return [begin, *tokens] if adds_it else tokens

    def _chat_prefix(self) -> str:
        instruction = f"{self.instruction}{PLACEHOLDER}"
        conversations = [[("user", instruction)]]
        if self.system_prompt:
            # Some templates (Gemma's) have no place for a system prompt and say so: then it opens the user's turn.
            in_turn = ("user", f"{self.system_prompt} {instruction}")
            conversations = [[("system", self.system_prompt), ("user", instruction)], [in_turn]]
        # Those of multi-modal models (LLaVA's) read lists of texts and pictures, and print nothing for a plain string.
        as_text, as_parts = (lambda text: text), (lambda text: [{"type": "text", "text": text}])
        errors = []
        for content, conversation in itertools.product((as_text, as_parts), conversations):
            messages = [{"role": role, "content": content(text)} for role, text in conversation]
            try:
                template = SAME_DAY + self.tokenizer.get_chat_template()
                text = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            except Exception as error:  # a template is a program, and fails in its own way
                errors.append(" ".join(str(error).split())[:200])
                continue
            before, found, _ = text.partition(PLACEHOLDER)
            if not found or not before.rstrip().endswith(self.instruction.rstrip()):
                errors.append("it does not keep the user's words")
            elif self.system_prompt.strip() not in before:  # a template may pass over roles that it does not know
                errors.append("it does not keep the system prompt")
            else:
                return before
        raise UserError(f"the tokenizer's chat template fails ({errors[0]}): set text.chat_template=False")

    @functools.cached_property
    def separator(self) -> str:
        """What makes a prompt's first word the token that it would be behind the instruction.

        A byte-level tokenizer writes the space before a word into its token, so the prompt needs one; a SentencePiece
        tokenizer adds it by itself, and a second one would be a token of its own.
        """
        if not self.instruction:
            return ""
        together = self._encode([f"{self.instruction} a"])[0]
        alone = self._encode([self.instruction])[0]
        for separator in ("", " "):
            if alone + self._encode([f"{separator}a"])[0] == together:
                return separator
        return " "

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """-> {"tokens": int32 [B, L], "mask": bool [B, L], "truncated": bool [B]}.

        Every row keeps at least its end token, so that an empty prompt never gives an all-masked attention row.
        """
        shape = (len(prompts), self.max_length)
        tokens = np.full(shape, self.tokenizer.eos_token_id, np.int32)  # padding is masked: any valid token will do
        mask = np.zeros(shape, bool)
        truncated = np.zeros(len(prompts), bool)
        texts = [p if not p or p.startswith(" ") else f"{self.separator}{p}" for p in prompts]
        for row, ids in enumerate(self._encode(texts)):
            truncated[row] = len(ids) > self.max_length - 1
            ids = [*ids[: self.max_length - 1], self.tokenizer.eos_token_id]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return {"tokens": tokens, "mask": mask, "truncated": truncated}

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        texts = [_without_half_characters(text) for text in texts]
        # A prompt that spells out a special token is text: it must not end the prompt early.
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _without_half_characters(text: str) -> str:
    """Half a surrogate pair, which captions from JSON can hold, is not text: it becomes a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")
