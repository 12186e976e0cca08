"""Assembles examples into a batch: samples and tokenizes their captions, stacks their images."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.sources import Example
from lidit_jax.data.stored_features import StoredPrompts
from lidit_jax.errors import UserError

Tokenize = Callable[[list[str]], Mapping[str, np.ndarray]]


class BatchShape(NamedTuple):
    """Determines the shapes of a batch's arrays; each batch shape is one program to compile.

    Attributes:
      bucket: size of the images.
      prompt_length: tokens that every prompt is padded to; 0: `text.max_length`.
    """

    bucket: Bucket
    prompt_length: int = 0

    def __str__(self) -> str:
        return f"{self.bucket}, {self.prompt_length} tokens" if self.prompt_length else str(self.bucket)


class PlannedCaptions(NamedTuple):
    """Captions of a batch whose prompts are padded to one length; longer ones are truncated.

    Attributes:
      names: name of each row's caption.
      length: tokens that the prompts are padded to.
    """

    names: Sequence[str]
    length: int


@dataclasses.dataclass(frozen=True)
class Assembler:
    """Assembles examples of one bucket, already resized to it, into a batch. Picklable.

    A batch is {"image": uint8 [B, H, W, 3], **tokenize(captions)}. Sources of precomputed latents give "moments"
    [B, h, w, 2C] instead of "image".

    Attributes:
      buckets: image sizes; each example goes to the bucket with the nearest aspect ratio.
      seed: 0 to 2^64 - 1; seed, batch number and row determine the order, the captions and the caption dropout.
      choosers: one per source of a `ConcatenatedSource`; a single one for any other source.
      tokenize: maps B captions to arrays with B rows; None if captions are not trained on.
      stored: used instead of `tokenize` if the examples hold precomputed features of their captions.
      with_captions: also return "caption", a list of B strings.
      with_images: return "image"; if False (language models), no image is decoded.
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
            raise UserError(f"seed={self.seed} is out of range: use 0 to 2^64 - 1")

    def __call__(
        self, batch: int, first_row: int, examples: Sequence[Example], planned: PlannedCaptions | None = None
    ) -> dict[str, Any]:
        """Assembles consecutive rows of a batch.

        Args:
          batch: number of the batch.
          first_row: row of the first example within the batch.
          examples: the examples of these rows.
          planned: their captions, before caption dropout, and the length of the prompts; None: sample the captions, and
            pad the prompts as `tokenize` does.

        Returns:
          The arrays described above, with one row per example.

        Raises:
          UserError: an example lacks its planned caption, or its features are longer than planned.
        """
        elements: dict[str, Any] = {}
        if self.tokenize or self.stored or self.with_captions:
            generators = _RowGenerators(self.seed, batch)
            names = planned.names if planned else [None] * len(examples)
            sampled = [
                self.choosers[example.get("source", 0)].sample(
                    example["captions"], generators.for_row(first_row + row), name
                )
                for row, (example, name) in enumerate(zip(examples, names, strict=True))
            ]
            fields, captions = zip(*sampled, strict=True)
            if self.stored:
                elements |= self.stored(examples, fields, planned.length if planned else None)
            elif self.tokenize:
                tokenized = self.tokenize(list(captions))
                elements |= _shortened(tokenized, planned.length) if planned else tokenized
            if self.with_captions:
                elements["caption"] = list(captions)
        if self.with_images:
            content = "moments" if "moments" in examples[0] else "image"
            elements[content] = np.stack([example[content] for example in examples])
        return elements


def _shortened(tokenized: Mapping[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    """Returns the arrays of `tokenize` with prompts of at most `length` tokens; longer ones are truncated.

    The result is that of tokenizing with this as the maximum length: a truncated prompt keeps its end token.
    """
    found = {name: array[:, :length] if array.ndim == 2 else array for name, array in tokenized.items()}
    for key, mask in tokenized.items():
        name, _, kind = key.rpartition("/")
        if kind == "mask" and mask.shape[1] > length and (longer := mask[:, length]).any():
            tokens, rows = tokenized[f"{name}/tokens"], np.flatnonzero(longer)
            found[f"{name}/tokens"] = found[f"{name}/tokens"].copy()
            found[f"{name}/tokens"][rows, -1] = tokens[rows, mask[rows].sum(1) - 1]
            found[f"{name}/truncated"] = found[f"{name}/truncated"] | longer
    return found


def reshaped(shapes: Mapping[str, tuple[int, ...]], shape: BatchShape, other: BatchShape) -> dict[str, tuple[int, ...]]:
    """Converts the array shapes of a batch of shape `shape` to those of a batch of shape `other`."""
    found = dict(shapes)
    for content in ("image", "moments"):
        if content in shapes:
            rows, height, width, channels = shapes[content]  # for moments in latent cells, so scale by the ratio
            height = height * other.bucket.height // shape.bucket.height
            width = width * other.bucket.width // shape.bucket.width
            found[content] = (rows, height, width, channels)
    for name, (rows, *sizes) in shapes.items():
        if name.endswith(("/tokens", "/mask", "/encoded")):  # the latter may hold a prefix, too
            found[name] = (rows, sizes[0] + other.prompt_length - shape.prompt_length, *sizes[1:])
    return found


class _RowGenerators:
    """One random stream per row of a batch, independent of the process that reads the row.

    Sets the counter of one counter-based generator for each row: seeding a new generator would cost more than decoding
    a tiny image.
    """

    def __init__(self, seed: int, batch: int):
        self._batch = batch
        self._bits = np.random.Philox(key=seed)
        self._state = self._bits.state
        self._generator = np.random.Generator(self._bits)

    def for_row(self, row: int) -> np.random.Generator:
        """Returns the generator of a row, which is valid until the next call."""
        self._state["state"]["counter"][:] = (0, row, self._batch, 0)
        self._state["buffer_pos"] = 4  # discard numbers buffered for the previous row
        self._state["has_uint32"] = 0
        self._bits.state = self._state
        return self._generator
