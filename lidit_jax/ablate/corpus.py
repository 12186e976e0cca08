"""Training text of the miniature ablations' language models: captions of scenes, and instructed descriptions.

Base models read captions alone. For tuned ones, a share of the documents has the instruction before the caption and,
after it, an answer that follows the instruction: it names every object's size, colour, shape and position. A next-token
model then learns two ways to read a caption, as text to continue and as something to describe, like the paper's
instruction-tuned LLMs. The answers are text about scenes; no image is read, so nothing here is multi-modal.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

from lidit_jax.data.assembler import BatchShape
from lidit_jax.data.batch_stream import STATISTICS, BatchStatistics, BatchStream
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.shapes.scene import Scene
from lidit_jax.data.shapes.source import ShapesSource
from lidit_jax.text.prompts import PromptTokenizer

_NO_IMAGES = BatchShape(Bucket(0, 0))


@dataclasses.dataclass(frozen=True)
class Document:
    """A training document.

    Attributes:
      caption: of a scene.
      answer: follows the caption in documents that start with the instruction; "" in the others.
    """

    caption: str
    answer: str


class Corpus:
    """One document per scene of the source; document i depends on i alone."""

    def __init__(self, source: ShapesSource, captions: Mapping[str, float], instructed_share: float):
        """Sets up the corpus; reads nothing.

        Args:
          source: scenes with captions.
          captions: language -> how often captions in it are chosen.
          instructed_share: share of the documents with instruction and answer; the captions do not depend on it.
        """
        self._source, self._choose, self._instructed_share = source, CaptionChooser(captions), instructed_share

    @property
    def fingerprint(self) -> str:
        return (
            f"corpus of {self._source.fingerprint} with {dict(self._choose.fields)}, "
            f"{self._instructed_share} instructed"
        )

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Document:
        rng = np.random.default_rng((self._source.seed, index, 1))
        [example] = self._source.describe([index])
        instructed = rng.random() < self._instructed_share
        return Document(
            self._choose(example["captions"], rng), describe(self._source.scene(index)) if instructed else ""
        )


def describe(scene: Scene) -> str:
    """Describes a scene object by object, in the captions' order: "a small red circle at the top left, …"."""
    return ", ".join(f"a {item.size} {item.color} {item.shape} {_place(item.x, item.y)}" for item in scene.objects)


def _place(x: float, y: float) -> str:
    """Names a position in the unit square: "at the top left", "at the middle"."""
    across = "left" if x < 0.4 else "right" if x > 0.6 else ""
    down = "top" if y < 0.4 else "bottom" if y > 0.6 else ""
    return f"at the {' '.join(word for word in (down, across) if word) or 'middle'}"


class DocumentTokenizer:
    """Tokenises documents so that they begin with the tokens of an encoded prompt, with and without the instruction."""

    def __init__(self, plain: PromptTokenizer, instructed: PromptTokenizer, length: int):
        """Sets up the tokenizers.

        Args:
          plain: tokenizes prompts without the instruction.
          instructed: tokenizes prompts with it.
          length: tokens of a document; longer ones are truncated.
        """
        self._plain, self._instructed, self._length = plain, instructed, length

    def __call__(self, documents: Sequence[Document]) -> dict[str, np.ndarray]:
        """Returns {"tokens": int32 [B, L], "mask": bool [B, L]}, padded on the right."""
        tokens = np.full((len(documents), self._length), self._plain.tokenizer.eos_token_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, ids in enumerate(self._tokens(documents)):
            ids = ids[: self._length]
            tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
        return {"tokens": tokens, "mask": mask}

    def _tokens(self, documents: Sequence[Document]) -> list[list[int]]:
        is_instructed = [bool(document.answer) for document in documents]
        captions, answers = [document.caption for document in documents], [document.answer for document in documents]
        plain, instructed, answered = (
            [row[is_there].tolist() for row, is_there in zip(found["tokens"], found["mask"], strict=True)]
            for found in (self._plain(captions), self._instructed(captions), self._instructed(answers))
        )
        begin, instruction = self._plain.prefix().tolist(), self._instructed.prefix().tolist()
        return [
            instruction + instructed[row] + answered[row] if is_instructed[row] else begin + plain[row]
            for row in range(len(documents))
        ]


class DocumentStream(BatchStream):
    """Stream of token batches: batch k holds documents k B to (k + 1) B - 1; every process gets its rows."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: DocumentTokenizer,
        batch_size: int,
        first_batch: int,
        rows: range,
    ):
        """Starts at batch `first_batch`.

        Args:
          corpus: the documents.
          tokenizer: of the documents.
          batch_size: over all processes.
          first_batch: number of the first batch.
          rows: this process's rows of a batch.
        """
        super().__init__(corpus.fingerprint, first_batch, max_broken=0.0)
        self._corpus, self._tokenizer, self._batch_size, self._rows = corpus, tokenizer, batch_size, rows
        self._batches: Any = None

    def _make(self, batch: int) -> dict[str, Any]:
        first = batch * self._batch_size
        numbers = range(first + self._rows.start, first + self._rows.stop)
        tokenized = self._tokenizer([self._corpus[number % len(self._corpus)] for number in numbers])
        return tokenized | {STATISTICS: BatchStatistics(_NO_IMAGES, len(numbers))}

    @property
    def shapes(self) -> tuple[BatchShape, ...]:
        return (_NO_IMAGES,)

    def start_prefetch(self) -> None:
        if self._batches is None:
            numbers = grain.MapDataset.range(self._next_batch, 1 << 31)
            options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
            self._batches = iter(numbers.map(self._make).to_iter_dataset(options))

    def report(self) -> dict[str, float]:
        return {}  # there are no buckets

    def _next(self) -> dict[str, Any]:
        return next(self._batches)

    def _stop(self) -> None:
        self._batches = None
