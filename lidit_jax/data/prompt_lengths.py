"""Static prompt lengths: which captions are padded to which length, so that short prompts meet in a batch.

The lengths are a few, chosen so that the fewest tokens of all prompts are padding. Which caption of an example a row
uses is decided ahead of the batch, too: a batch then has captions of one length, which every host knows from the
batch's number.
"""

import abc
import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from lidit_jax.data.caption_lengths import CaptionLengths, TokenCounter
from lidit_jax.data.captions import CaptionChooser, fields_of
from lidit_jax.data.shared_array import SharedArray
from lidit_jax.errors import UserError

MULTIPLE = 16  # of every length but `max_length`: the rows of a bfloat16 tile of a TPU


class PromptLengths(abc.ABC):
    """The lengths that a data set's prompts are padded to.

    Attributes:
      lengths: the lengths, ascending.
    """

    def __init__(self, tokens: np.ndarray, weights: np.ndarray, num_lengths: int, max_length: int):
        """Chooses the lengths.

        Args:
          tokens: tokens of each caption, int [captions].
          weights: how often each occurs, in any unit, float [captions].
          num_lengths: largest number of lengths.
          max_length: longest prompt; longer ones are truncated.
        """
        tokens = np.minimum(tokens, max_length)
        self.lengths = choose_lengths(np.bincount(tokens, weights=weights, minlength=max_length + 1), num_lengths)
        indices = self.indices(tokens)
        shares = np.bincount(indices, weights=weights, minlength=len(self.lengths)) / weights.sum()
        padded = np.average(np.array(self.lengths)[indices], weights=weights)
        parts = ", ".join(f"{length} {share:.0%}" for length, share in zip(self.lengths, shares, strict=True))
        self._summary = (
            f"prompts have {np.average(tokens, weights=weights):.1f} tokens on average and are padded to {parts}, on "
            f"average to {padded:.1f} in place of {max_length}"
        )

    def indices(self, tokens: np.ndarray) -> np.ndarray:
        """Returns the index in `lengths` of the length that prompts of so many tokens are padded to."""
        return np.searchsorted(self.lengths, np.minimum(tokens, self.lengths[-1]))

    def summary(self) -> str:
        """Returns log text: the share of the prompts that are padded to each length."""
        return self._summary

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Text that identifies the order of the captions; a run resumes only with equal text."""


class IndexedPromptLengths(PromptLengths):
    """All captions of a data set with random access, and their lengths. Picklable; safe to read from threads."""

    def __init__(
        self,
        captions: Sequence[CaptionLengths],
        choosers: Sequence[CaptionChooser],
        num_examples: Sequence[int],
        num_lengths: int,
        max_length: int,
    ):
        """Chooses the lengths.

        Args:
          captions: token counts of each source's captions.
          choosers: the caption chooser of each source, for the captions' probabilities.
          num_examples: number of examples of each source.
          num_lengths: largest number of lengths.
          max_length: longest prompt; longer ones are truncated.

        Raises:
          UserError: no example has a caption.
        """
        found = CaptionLengths.concatenate(captions, num_examples)
        shares = np.concatenate(
            [caption_shares(*source) for source in zip(captions, choosers, strict=True)] or [np.zeros(0)]
        )
        if not shares.any():
            raise UserError("no example has any of the caption fields: see data.captions")
        found, shares = found.where(shares > 0), shares[shares > 0]
        super().__init__(found.tokens, shares, num_lengths, max_length)
        distinct, share_indices = np.unique(shares, return_inverse=True)
        self._distinct_shares, self._names = distinct, found.names
        self._examples = SharedArray(found.rows)
        self._share_indices = SharedArray(share_indices.astype(_smallest(len(distinct))))
        self._name_indices = SharedArray(found.name_indices.astype(_smallest(len(found.names))))
        self._length_indices = SharedArray(self.indices(found.tokens).astype(np.uint8))

    @property
    def examples(self) -> np.ndarray:
        """Index of each caption's example, int64 [captions]."""
        return self._examples.array

    @property
    def shares(self) -> np.ndarray:
        """Probability of each caption among those of its example, float64 [captions]."""
        return self._distinct_shares[self._share_indices.array]

    @property
    def length_indices(self) -> np.ndarray:
        """Index in `lengths` of the length that each caption is padded to, uint8 [captions]."""
        return self._length_indices.array

    def length_of(self, caption: int) -> int:
        """Returns the length that a caption is padded to."""
        return self.lengths[self._length_indices.array[caption]]

    def names_of(self, captions: Sequence[int]) -> list[str]:
        """Returns the names of captions within their examples."""
        return [self._names[self._name_indices.array[caption]] for caption in captions]

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self._examples.array.tobytes())
        for array in (self._name_indices.array, self._length_indices.array, self.shares):
            digest.update(array.tobytes())
        return f"prompts of {', '.join(map(str, self.lengths))} tokens ({digest.hexdigest()[:16]})"


class StreamedPromptLengths(PromptLengths):
    """Lengths chosen for the first samples of a data set that is read sequentially.

    Attributes:
      count_tokens: counts the tokens of prompts.
      shares: share of all rows of each source, bucket and length, float64 [sources, buckets, lengths].
    """

    def __init__(
        self,
        captions: Sequence[CaptionLengths],
        choosers: Sequence[CaptionChooser],
        buckets: Sequence[np.ndarray],
        shares: np.ndarray,
        count_tokens: TokenCounter,
        num_lengths: int,
        max_length: int,
    ):
        """Chooses the lengths.

        Args:
          captions: token counts of the captions of each source's first samples.
          choosers: the caption chooser of each source, for the captions' probabilities.
          buckets: index of the bucket of each of these samples, by source, int [samples].
          shares: share of all rows of each source and bucket, float64 [sources, buckets].
          count_tokens: counted these tokens.
          num_lengths: largest number of lengths.
          max_length: longest prompt; longer ones are truncated.
        """
        self.count_tokens, tokens, weights = count_tokens, [], []
        for number, (source, chooser) in enumerate(zip(captions, choosers, strict=True)):
            of_samples = np.bincount(buckets[number], minlength=shares.shape[1])  # [buckets]
            bucket_of_caption = buckets[number][source.rows]
            of_sample = shares[number] / np.maximum(of_samples, 1)  # share of all rows of each sample of a bucket
            weights.append(caption_shares(source, chooser) * of_sample[bucket_of_caption])
            tokens.append(source.tokens)
        super().__init__(np.concatenate(tokens), np.concatenate(weights), num_lengths, max_length)
        self.shares = np.zeros((*shares.shape, len(self.lengths)))
        for number, source in enumerate(captions):
            cells = buckets[number][source.rows], self.indices(source.tokens)
            np.add.at(self.shares[number], cells, weights[number])

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(self.shares.tobytes() + self.count_tokens.digest.encode()).hexdigest()[:16]
        return f"prompts of {', '.join(map(str, self.lengths))} tokens ({digest})"


def choose_lengths(counts: np.ndarray, num_lengths: int) -> tuple[int, ...]:
    """Chooses the lengths to which the fewest padding tokens are added in all, by dynamic programming.

    Args:
      counts: number of prompts of each length, float [max_length + 1], in any unit; not all 0.
      num_lengths: largest number of lengths, at least 1.

    Returns:
      The lengths, ascending: multiples of `MULTIPLE`, or max_length. The last holds the longest prompt.
    """
    max_length = len(counts) - 1
    longest = int(np.flatnonzero(counts)[-1])
    steps = min(-(-longest // MULTIPLE), -(-max_length // MULTIPLE))
    candidates = np.minimum(np.arange(1, steps + 1) * MULTIPLE, max_length)
    # prompts[i]: number of prompts of at most candidates[i - 1] tokens.
    prompts = np.concatenate([[0.0], np.cumsum(counts)[candidates]])
    # cost[j]: tokens, padding included, of prompts up to candidate j, the longest length so far.
    cost = np.concatenate([[0.0], np.full(steps, np.inf)])
    previous: list[np.ndarray] = []
    for _ in range(min(num_lengths, steps)):
        total = cost[:, None] + (prompts[None, 1:] - prompts[:, None]) * candidates[None]  # [from, to]
        total = np.where(np.arange(steps + 1)[:, None] <= np.arange(steps)[None], total, np.inf)
        previous.append(total.argmin(0))
        cost = np.concatenate([[0.0], total.min(0)])
    chosen, end = [], steps
    for choice in reversed(previous):
        if not end:
            break
        start = int(choice[end - 1])
        if prompts[end] > prompts[start]:  # otherwise no prompt has this length
            chosen.append(int(candidates[end - 1]))
        end = start
    return tuple(sorted(chosen))


def caption_shares(captions: CaptionLengths, chooser: CaptionChooser) -> np.ndarray:
    """Returns the probability of each caption among those of its example, float64 [captions]; 0 for other texts."""
    shares = np.zeros(len(captions.rows))
    of_names: dict[bytes, list[float]] = {}  # examples with the same captions share their probabilities
    starts = np.flatnonzero(np.diff(captions.rows, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(shares)], strict=True):
        key = captions.name_indices[start:stop].tobytes()
        if key not in of_names:
            names = [captions.names[i] for i in captions.name_indices[start:stop]]
            texts = dict.fromkeys(names, "a caption")
            weights = chooser.shares(texts) if fields_of(texts, chooser.used) else {}
            of_names[key] = [weights.get(name, 0.0) / sum(weights.values()) if weights else 0.0 for name in names]
        shares[start:stop] = of_names[key]
    return shares


def _smallest(count: int) -> np.dtype:
    """Returns the smallest unsigned dtype that holds 0 to count - 1."""
    return np.min_scalar_type(max(count - 1, 0))
