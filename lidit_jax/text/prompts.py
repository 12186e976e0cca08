"""Tokenizes prompts: instruction before each prompt, end token after it, padding on the right."""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Annotated, Any, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError
from lidit_jax.ranges import Size, between, check_ranges

# The instruction of the paper, section 3.1.
INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial relationships of "
    "the objects:"
)
# Some chat templates (LLaMA 3.2's) insert today's date, which would change the prefix every day. A fixed date, LLaMA's
# default, keeps the prefix constant.
FIXED_DATE_MACRO = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
# Longer prompts are truncated before they are tokenised, which may cost far more than their length suggests.
MAX_CHARACTERS = 1 << 16
# Marks the prompt's position in a rendered chat template; private-use characters do not occur in templates.
PLACEHOLDER = "\ue000prompt\ue001"


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The `text` section of a config.

    Attributes:
      max_length: see `PromptTokenizer`.
      instruction: see `PromptTokenizer`.
      system_prompt: see `PromptTokenizer`.
      chat_template: see `PromptTokenizer`.
      num_lengths: number of lengths that prompts are padded to in training, chosen from the data so that the fewest
        tokens are padding; a batch has prompts of one length, and each length is one more program to compile for every
        bucket. 1: pad all prompts to `max_length`, which needs no look at the captions ahead of training.
    """

    max_length: Size
    instruction: str
    system_prompt: str = ""
    chat_template: bool = True
    num_lengths: Annotated[int, between(1, 16)] = 1

    def __post_init__(self):
        check_ranges(self, "text.")


@dataclasses.dataclass(frozen=True)
class PromptTokenizer:
    """Tokenizes a constant prefix (system prompt and instruction) and, separately, the prompts after it.

    Because they are separate, no byte-pair merge crosses the boundary: the prefix tokens do not depend on the prompt,
    their number is static, the prefix is dropped after the refiners with a slice, and a batch can share its features.

    Attributes:
      tokenizer: a transformers tokenizer; its end token ends every prompt.
      max_length: L, the largest number of tokens of a prompt, end token included; longer prompts are truncated.
      instruction: text before every prompt; "" for none.
      system_prompt: text before the instruction; "" for none.
      chat_template: if True and the tokenizer has a chat template, the prefix is the rendered template up to the
        prompt: the system prompt in its turn, then the user's turn, which starts with the instruction. Otherwise the
        prefix is plain text.

    Raises:
      UserError: if the tokenizer has no end token, or max_length is less than 1.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: Size
    instruction: str = INSTRUCTION
    system_prompt: str = ""
    chat_template: bool = True

    def __post_init__(self):
        if self.tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end token (eos_token): set one in its tokenizer_config.json")
        check_ranges(self, "text.")

    @functools.cached_property
    def largest_token(self) -> int:
        """The largest token id in a prefix or a prompt, without special tokens that occur in neither.

        Tokenizers of multi-modal models have special image tokens for which the LLM has no embedding.
        """
        special = {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}
        ordinary = (token for token in self.tokenizer.get_vocab().values() if token not in special)
        return max(*ordinary, self.tokenizer.eos_token_id, *self._prefix, 0)

    def prefix(self) -> np.ndarray:
        """Returns the tokens before every prompt, int32 [P], with a begin token if the tokenizer adds one.

        Raises:
          UserError: if the chat template fails, or alters the instruction or the system prompt.
        """
        return np.asarray(self._prefix, np.int32)

    def prefix_text(self) -> str:
        """Returns the text before every prompt, with its special tokens; raises as `prefix` does."""
        text = self.tokenizer.decode(self._prefix, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return cast(str, text)  # of one sequence

    @property
    def uses_chat_template(self) -> bool:
        """True if the prefix is rendered by the tokenizer's chat template."""
        return bool(self.chat_template and self.tokenizer.chat_template)

    @functools.cached_property
    def digest(self) -> str:
        """Hash (16 hexadecimal digits) of the prefix tokens, the separator and the maximum prompt length."""
        facts = [self._prefix, self.separator, self.max_length]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def suffix(self) -> np.ndarray:
        """Returns the tokens between a prompt and a generated answer, int32 [S]; none without a chat template.

        They end the user's turn and begin the model's. Encoders do not read them.

        Raises:
          UserError: as `prefix` does.
        """
        text = self._render_chat(with_answer=True)[1] if self.uses_chat_template else ""
        return np.asarray(self._encode_template(text), np.int32)

    @functools.cached_property
    def _prefix(self) -> list[int]:
        if self.uses_chat_template:
            return self._encode_template(self._render_chat()[0])
        text = " ".join(part for part in (self.system_prompt, self.instruction) if part)
        tokens = self._encode([text])[0] if text else []
        begin = self.tokenizer.bos_token_id
        adds_begin = begin is not None and self.tokenizer("", verbose=False)["input_ids"][:1] == [begin]
        return [begin, *tokens] if adds_begin else tokens

    def _encode_template(self, text: str) -> list[int]:
        """Tokenizes a part of a rendered chat template, which spells its special tokens out, the begin token too."""
        text = replace_unpaired_surrogates(text)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []

    def _render_chat(self, with_answer: bool = False) -> tuple[str, str]:
        """Returns the rendered chat template before and after the prompt.

        Args:
          with_answer: whether the model's turn begins after the user's.
        """
        instruction = f"{self.instruction}{PLACEHOLDER}"
        conversations = [[("user", instruction)]]
        if self.system_prompt:
            # Some templates (Gemma's) raise for a system role: then the system prompt starts the user's turn.
            single_turn = ("user", f"{self.system_prompt} {instruction}")
            conversations = [[("system", self.system_prompt), ("user", instruction)], [single_turn]]
        # Templates of multi-modal models (LLaVA's) take lists of text and image items, and render a string as nothing.
        errors = []
        for as_list, conversation in itertools.product((False, True), conversations):
            messages: list[dict[str, Any]] = [
                {"role": role, "content": [{"type": "text", "text": text}] if as_list else text}
                for role, text in conversation
            ]
            try:
                template = FIXED_DATE_MACRO + self.tokenizer.get_chat_template()
                rendered = self.tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=with_answer
                )
            except MemoryError:
                raise
            except Exception as error:  # a template is a program and can raise anything
                errors.append(" ".join(str(error).split())[:200])
                continue
            before, found, after = cast(str, rendered).partition(PLACEHOLDER)  # without `tokenize`, text
            if not found or not before.rstrip().endswith(self.instruction.rstrip()):
                errors.append("it alters the text of the user's turn")
            elif self.system_prompt.strip() not in before:  # a template may ignore roles that it does not know
                errors.append("it drops or alters the system prompt")
            else:
                return before, after
        raise UserError(f"the tokenizer's chat template fails ({errors[0]}): set text.chat_template=False")

    @functools.cached_property
    def separator(self) -> str:
        """Text before a prompt that gives its first word the same token as in running text after the instruction.

        A byte-level tokenizer includes the space before a word in the word's token, so the prompt needs a leading
        space. A SentencePiece tokenizer adds one itself, and a second space would become a separate token.
        """
        if not self.instruction:
            return ""
        running_text = self._encode([f"{self.instruction} a"])[0]
        instruction = self._encode([self.instruction])[0]
        for separator in ("", " "):
            if instruction + self._encode([f"{separator}a"])[0] == running_text:
                return separator
        return " "

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokenizes prompts, without the prefix.

        Every row has at least its end token, so that an empty prompt does not yield a fully masked attention row.

        Returns:
          {"tokens": int32 [B, L], "mask": bool [B, L], "truncated": bool [B]}.
        """
        shape = (len(prompts), self.max_length)
        tokens = np.full(shape, self.tokenizer.eos_token_id, np.int32)  # padding is masked: any valid token works
        mask = np.zeros(shape, bool)
        truncated = np.zeros(len(prompts), bool)
        texts = self._separated(prompts)
        for row, ids in enumerate(self._encode([text[:MAX_CHARACTERS] for text in texts])):
            truncated[row] = len(ids) > self.max_length - 1 or len(texts[row]) > MAX_CHARACTERS
            ids = [*ids[: self.max_length - 1], self.tokenizer.eos_token_id]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return {"tokens": tokens, "mask": mask, "truncated": truncated}

    def count(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns the number of tokens of each prompt, end token included, at most `max_length`: int64 [B]."""
        ids = self._encode([text[:MAX_CHARACTERS] for text in self._separated(prompts)])
        return np.array([min(len(row) + 1, self.max_length) for row in ids], np.int64)

    @functools.cached_property
    def count_digest(self) -> str:
        """Hash (16 hexadecimal digits) of what the token counts depend on: tokenizer, separator, `max_length`."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content = cast(Any, tokenizer).backend_tokenizer.to_str()
        else:
            content = repr((type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
        facts = [content, self.separator, self.max_length]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def _separated(self, prompts: Sequence[str]) -> list[str]:
        return [p if not p or p.startswith(" ") else f"{self.separator}{p}" for p in prompts]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        texts = [replace_unpaired_surrogates(text) for text in texts]
        # A special token spelled out in a prompt is tokenized as text, so that it cannot end the prompt early.
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def replace_unpaired_surrogates(text: str) -> str:
    """Replaces unpaired surrogates, which JSON captions can contain and tokenizers reject, by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")
