"""Conversations about an image: LLaVA's records, and their tokens with the answers to learn marked."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError
from lidit_jax.models.llava import IMAGE_TEXT
from lidit_jax.text.prompts import FIXED_DATE_MACRO, MAX_CHARACTERS, replace_unpaired_surrogates

ROLES = {"human": "user", "gpt": "assistant"}  # LLaVA's names -> those of chat templates
# Marks a text as a conversation in JSON; any other text is a caption, the answer to a question about its image.
MARK = "\ue010"
MAX_TURNS = 256
# Makes a template of an LLM take lists of texts and images, as chats with vision-language models are, beside strings.
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}{%- for message in messages -%}"
    "{%- if message['content'] is string or not message['content'] -%}"
    "{%- set flat.messages = flat.messages + [message] -%}{%- else -%}{%- set parts = namespace(text='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- set parts.text = parts.text + ('" + IMAGE_TEXT + "\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': parts.text}] -%}"
    "{%- endif -%}{%- endfor -%}{%- set messages = flat.messages -%}"
)
# For LLMs without a chat template. Lines, because no tokenizer merges a line break with the word after it.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'].upper() }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:\n{% endif %}"
)


class Turn(NamedTuple):
    """One turn of a conversation.

    Attributes:
      role: "user" or "assistant".
      text: question or answer.
    """

    role: str
    text: str


def parse_record(record: Any, where: str) -> tuple[str, tuple[Turn, ...]]:
    """Returns the image file and the turns of one of LLaVA's records.

    Args:
      record: {"id": …, "image": file, "conversations": [{"from": "human" or "gpt", "value": text}, …]}.
      where: the record's place, for error messages.

    Raises:
      UserError: the record has another form; it has no image, or its text does not name the image exactly once, in a
        question; questions and answers do not alternate, beginning with a question and ending with an answer; or an
        answer is empty.
    """
    if not isinstance(record, Mapping):
        raise UserError(f"{where} is not an object: use LLaVA's form, a list of {{id, image, conversations}}")
    image, turns = record.get("image"), record.get("conversations")
    if not isinstance(image, str) or not image:
        raise UserError(f"{where} has no image: leave out conversations without one")
    if not isinstance(turns, list) or not 2 <= len(turns) <= MAX_TURNS:
        raise UserError(f"{where}: conversations must be a list of 2 to {MAX_TURNS} turns")
    parsed = []
    for number, (turn, role) in enumerate(zip(turns, itertools.cycle(ROLES), strict=False)):
        if not isinstance(turn, Mapping) or turn.get("from") != role or not isinstance(turn.get("value"), str):
            raise UserError(f'{where}, turn {number}: must be {{"from": "{role}", "value": text}}')
        parsed.append(Turn(ROLES[role], turn["value"].strip()))
        if len(parsed[-1].text) > MAX_CHARACTERS:
            raise UserError(f"{where}, turn {number}: has {len(parsed[-1].text)} characters, at most {MAX_CHARACTERS}")
        if role == "gpt" and not parsed[-1].text:
            raise UserError(f"{where}, turn {number}: the answer is empty")
    if len(turns) % 2:
        raise UserError(f"{where}: the last question has no answer")
    found = sum(turn.text.count(IMAGE_TEXT) for turn in parsed if turn.role == "user")
    answers = sum(turn.text.count(IMAGE_TEXT) for turn in parsed if turn.role == "assistant")
    if found != 1 or answers:
        raise UserError(
            f"{where}: {IMAGE_TEXT} occurs {found + answers} times: exactly once, in a question, is allowed"
        )
    return image, tuple(parsed)


def to_text(turns: Sequence[Turn]) -> str:
    """Returns a conversation as one text, which `ConversationTokenizer` takes in place of a caption."""
    return MARK + json.dumps(turns, ensure_ascii=False)


class _Between(NamedTuple):
    """A part of a chat template before a turn.

    Attributes:
      ids: its tokens.
      context: the character that the turn follows; "" after a special token, or at the beginning.
    """

    ids: list[int]
    context: str


@dataclasses.dataclass(frozen=True)
class ConversationTokenizer:
    """Tokenizes conversations about an image in the LLM's own chat template, and marks the answers.

    The parts of the template and the texts of the turns are tokenized separately, so that special tokens spelled out in
    a text stay text, and that no byte-pair merge crosses a boundary.

    Attributes:
      tokenizer: tokenizer of the LLM, with a chat template and the image token.
      image_token: id of the image token.
      tokens_per_image: number of image tokens that stand for the image.
      max_length: L, tokens of a row; longer conversations are truncated.
      question: the user's turn before a caption, without the image.

    Raises:
      UserError: if the chat template fails or alters the text of a turn, or the image fills a row.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token: int
    tokens_per_image: int
    max_length: int
    question: str

    def __post_init__(self):
        if self.max_length <= self.tokens_per_image:
            raise UserError(
                f"max_length={self.max_length} leaves no room beside the {self.tokens_per_image} tokens of an image"
            )
        self._template(2)  # raises where it fails

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Tokenizes captions, and conversations as `to_text` returns them.

        Returns:
          {"tokens": int32 [B, L], "counted": bool [B, L], "truncated": bool [B]}; `counted` marks the tokens of
          answers and of the ends of their turns. Padding repeats the end token, and does not count.
        """
        shape = (len(texts), self.max_length)
        tokens, counted = np.full(shape, self.tokenizer.eos_token_id, np.int32), np.zeros(shape, bool)
        truncated = np.zeros(len(texts), bool)
        for row, text in enumerate(texts):
            turns = self.turns(text)
            ids, answers = self.encode(turns)
            truncated[row] = len(ids) > self.max_length or any(len(turn.text) > MAX_CHARACTERS for turn in turns)
            length = min(len(ids), self.max_length)
            tokens[row, :length], counted[row, :length] = ids[:length], answers[:length]
        return {"tokens": tokens, "counted": counted, "truncated": truncated}

    def turns(self, text: str) -> tuple[Turn, ...]:
        """Returns the turns of a conversation, or those of a caption: the question about the image, and the caption."""
        if text.startswith(MARK):
            return tuple(Turn(*turn) for turn in json.loads(text[len(MARK) :]))
        return Turn("user", f"{IMAGE_TEXT}\n{self.question}"), Turn("assistant", text.strip())

    def surely_fits(self, turns: Sequence[Turn]) -> bool:
        """Returns True if a conversation's texts are so short that its tokens need not be counted."""
        before, ends = self._template(len(turns))
        template = len(before.ids) + sum(len(end) + len(between.ids) for end, between in ends)
        # A token has at least one byte, but for a space that some tokenizers begin a text with.
        texts = sum(len(turn.text.encode("utf-8", "replace")) + 2 for turn in turns)
        return template + self.tokens_per_image + texts <= self.max_length

    def encode(self, turns: Sequence[Turn]) -> tuple[list[int], list[bool]]:
        """Returns the tokens of a conversation, and which of them count."""
        ids, counted = [], []

        def add(part, counts):
            ids.extend(part)
            counted.extend([counts] * len(part))

        before, ends = self._template(len(turns))
        add(before.ids, False)
        context = before.context
        for turn, (end, between) in zip(turns, ends, strict=True):
            is_answer = turn.role == "assistant"
            add(self._encode_turn(turn, context), is_answer)
            add(end, is_answer)
            add(between.ids, False)
            context = between.context
        return ids, counted

    def _encode_turn(self, turn: Turn, context: str) -> list[int]:
        before, image, after = turn.text.partition(IMAGE_TEXT) if turn.role == "user" else (turn.text, "", "")
        ids = self._encode(before, context, split_special_tokens=True)
        if image:
            ids += [self.image_token] * self.tokens_per_image + self._encode(after, "", split_special_tokens=True)
        return ids

    def _encode(self, text: str, context: str, **options: Any) -> list[int]:
        """Tokenizes a text as it is tokenized after `context`: some tokenizers begin a text with a space."""

        def tokenize(text):
            return self.tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"]

        if not text:
            return []
        text = replace_unpaired_surrogates(text[:MAX_CHARACTERS])
        before, both = tokenize(context) if context else [], tokenize(context + text)
        return both[len(before) :] if both[: len(before)] == before else tokenize(text)

    def _template(self, num_turns: int) -> "tuple[_Between, list[tuple[list[int], _Between]]]":
        """Returns the tokens of the chat template around the turns of a conversation.

        Returns:
          The tokens before the first turn; then, for each turn, the tokens of its end, which an answer must learn to
          give, and those between it and the next turn.
        """
        if num_turns not in self._templates:
            before, *after = self._render(num_turns)
            ids = self._encode(before, "")
            self._templates[num_turns] = _Between(ids, self._context(before, ids)), [self._split_end(t) for t in after]
        return self._templates[num_turns]

    @functools.cached_property
    def _templates(self) -> dict[int, Any]:
        return {}

    @functools.cached_property
    def _special(self) -> set[int]:
        return {token for token, added in self.tokenizer.added_tokens_decoder.items() if added.special}

    def _context(self, text: str, ids: list[int]) -> str:
        """Returns the character that a turn after this text follows; "" after nothing or a special token."""
        return text[-1:] if ids and ids[-1] not in self._special else ""

    def _split_end(self, text: str) -> "tuple[list[int], _Between]":
        ids = self._encode(text, "a")  # a turn ends in any character
        first = next((i for i, token in enumerate(ids) if token in self._special), -1)
        return ids[: first + 1], _Between(ids[first + 1 :], self._context(text, ids))

    def _render(self, num_turns: int) -> list[str]:
        """Returns the rendered chat template before, between and after the turns."""
        marks = [f"\ue000turn {i}\ue001" for i in range(num_turns)]
        roles = itertools.cycle(("user", "assistant"))
        errors = []
        for as_list in (False, True):  # templates of multi-modal models take lists
            messages: list[dict[str, Any]] = [
                {"role": role, "content": [{"type": "text", "text": mark}] if as_list else mark}
                for role, mark in zip(roles, marks, strict=False)
            ]
            try:
                template = FIXED_DATE_MACRO + self.tokenizer.get_chat_template()
                text = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
            except MemoryError:
                raise
            except Exception as error:  # a template is a program and can raise anything
                errors.append(" ".join(str(error).split())[:200])
                continue
            parts, rest = [], cast(str, text)  # without `tokenize`, text
            for mark in marks:
                part, found, rest = rest.partition(mark)
                if not found:
                    break
                parts.append(part)
            if len(parts) == num_turns and "\ue000" not in rest:
                return [*parts, rest]
            errors.append("it drops, repeats or alters turns")
        raise UserError(f"the tokenizer's chat template fails ({errors[0]}): use an LLM with another")
