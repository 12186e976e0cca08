"""Request of `recaption`: its models and their settings."""

import dataclasses
import re

from lidit_jax.data.formats.shards import BOOKKEEPING, CLASS_FIELD, CLASS_NUMBER_FIELD
from lidit_jax.errors import UserError

# Names that readers of a sample's json take for something else than a caption.
RESERVED = frozenset((*BOOKKEEPING, CLASS_FIELD, CLASS_NUMBER_FIELD, "txt"))


@dataclasses.dataclass(frozen=True)
class RecaptionRequest:
    """Models and how they are used.

    Attributes:
      weights: vision-language model that writes the captions: a folder, or its name on the hub; None for no captions.
      question: what the model is asked of each image.
      field: caption field of its answers.
      max_tokens: longest answer in tokens.
      batch_size: images per batch.
      clip: CLIP model of the aesthetic scores: a folder, or its name on the hub; None for no scores.
      aesthetic_head: safetensors file with the linear layers of the scores; goes with `clip`.

    Raises:
      UserError: nothing is asked for, one of `clip` and `aesthetic_head` is missing, or the field has no name that a
        config can state.
    """

    weights: str | None = None
    question: str = "Describe this image in detail."
    field: str = "synthetic"
    max_tokens: int = 256
    batch_size: int = 8
    clip: str | None = None
    aesthetic_head: str | None = None

    def __post_init__(self) -> None:
        for name in ("weights", "clip", "aesthetic_head"):
            if getattr(self, name) == "":
                raise UserError(f"--{name} is empty: name a model, or leave the flag out")
        if (self.clip is None) != (self.aesthetic_head is None):
            raise UserError("aesthetic scores need both --clip=MODEL and --aesthetic_head=FILE.safetensors")
        if self.weights is None and self.clip is None:
            raise UserError(
                "nothing to do: give --weights=MODEL for captions, or --clip and --aesthetic_head for scores"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", self.field):
            raise UserError(f"--field={self.field!r:.80} can't name captions: use letters, digits and underscores")
        if self.field in RESERVED:
            raise UserError(f"--field={self.field} has another meaning in a sample: use another name")
        if self.weights is not None and not self.question.strip():
            raise UserError("--question is empty: say what the model should write of an image")


def parse_part(text: str) -> tuple[int, int]:
    """Parses "NUMBER/COUNT", with 0 <= NUMBER < COUNT.

    Raises:
      UserError: it is anything else.
    """
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--part={text!r:.80} must be NUMBER/COUNT with NUMBER from 0 to COUNT - 1, such as 0/8")
    return int(found[1]), int(found[2])
