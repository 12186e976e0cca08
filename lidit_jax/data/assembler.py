"""Examples to a batch: captions drawn and tokenised, pictures stacked."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.sources import Example
from lidit_jax.data.stored_features import StoredPrompts
from lidit_jax.errors import UserError

Tokenize = Callable[[list[str]], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Assembler:
    """Examples of one bucket, read and fitted, to a batch: captions drawn and tokenised, pictures stacked. Picklable.

    It gives {"image": uint8 [B, H, W, 3], **tokenize(captions)}; of a source of latents, "moments" [B, h, w, 2C] in
    place of "image".

    Attributes:
      buckets: the picture sizes; each example goes to the nearest in aspect.
      seed: 0 to 2^64 - 1; with the batch's number and the row it decides order, captions and dropout.
      choosers: of each source of a `ConcatenatedSource`, or of the one.
      tokenize: B captions -> arrays with that many rows. None: captions are not trained on.
      stored: in place of `tokenize` where the examples have their captions' features.
      with_captions: also give "caption", a list of B strings.
      with_images: give "image"; without, for language models, no picture is decoded.
    """

    buckets: tuple[Bucket, ...]
    seed: int
    choosers: tuple[CaptionChooser, ...]
    tokenize: Tokenize | None
    stored: StoredPrompts | None = None
    with_captions: bool = False
    with_images: bool = True

    def __post_init__(self):
        if not 0 <= self.seed < 1 << 64:
            raise UserError(f"seed={self.seed}: it is 0 to 2^64 - 1")

    def __call__(self, batch: int, first_row: int, examples: Sequence[Example]) -> dict[str, Any]:
        """Args: batch, first_row: which batch it is, and which of its rows the first example."""
        elements: dict[str, Any] = {}
        if self.tokenize or self.stored or self.with_captions:
            generators = _RowGenerators(self.seed, batch)
            drawn = [
                self.choosers[example.get("source", 0)].draw(example["captions"], generators.of_row(first_row + row))
                for row, example in enumerate(examples)
            ]
            fields, captions = zip(*drawn, strict=True)
            if self.stored:
                elements |= self.stored(examples, fields)
            elif self.tokenize:
                elements |= self.tokenize(list(captions))
            if self.with_captions:
                elements["caption"] = list(captions)
        if self.with_images:
            content = "moments" if "moments" in examples[0] else "image"
            elements[content] = np.stack([example[content] for example in examples])
        return elements


def shapes_in_bucket(
    shapes: Mapping[str, tuple[int, ...]], bucket: Bucket, other: Bucket
) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a batch -> those of a batch of another bucket."""
    found = dict(shapes)
    for content in ("image", "moments"):
        if content in shapes:
            rows, height, width, channels = shapes[content]  # of moments in latent cells: fractions of the bucket's
            height, width = height * other.height // bucket.height, width * other.width // bucket.width
            found[content] = (rows, height, width, channels)
    return found


class _RowGenerators:
    """One random stream for each row of a batch, the same whichever process reads the row.

    A counter-based generator is moved to the row's place: seeding a new one would cost more than a tiny picture.
    """

    def __init__(self, seed: int, batch: int):
        self._batch = batch
        self._bits = np.random.Philox(key=seed)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def of_row(self, row: int) -> np.random.Generator:
        """Valid until the next call."""
        self._state["state"]["counter"][:] = (0, row, self._batch, 0)
        self._state["buffer_pos"] = 4  # nothing is left over from the row before
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        return self._generator
