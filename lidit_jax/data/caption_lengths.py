"""Counts the prompt tokens of every caption of a source, once: the counts are kept beside the data."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.formats.index_files import facts_of, read_table, write_table

_VERSION = 1
_COLUMNS = ("row", "name", "tokens")
_SCHEMA = pa.schema([(column, pa.int64()) for column in _COLUMNS])
_TEXTS_AT_ONCE = 4096  # tokenized in one call, on all cores
_MAX_TOKENS = 1 << 20


class TokenCounter(Protocol):
    """Counts tokens of prompts.

    Attributes:
      digest: text that identifies what the counts depend on; counts are kept under it.
    """

    @property
    def digest(self) -> str: ...

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Returns the tokens of each prompt, int [N], end token included; the largest number over all encoders."""


@dataclasses.dataclass(frozen=True)
class CaptionLengths:
    """Token counts of the captions of a source.

    Attributes:
      names: names of captions.
      rows: int64 [M], index of each caption's example, in ascending order.
      name_indices: int64 [M], index of its name in `names`.
      tokens: int64 [M], its prompt tokens.
    """

    names: tuple[str, ...]
    rows: np.ndarray
    name_indices: np.ndarray
    tokens: np.ndarray

    @classmethod
    def count(cls, captions: Iterable[Mapping[str, str]], count_tokens: TokenCounter) -> "CaptionLengths":
        """Counts the tokens of captions, {name: text} of each example."""
        texts = ((row, name, text) for row, found in enumerate(captions) for name, text in found.items())
        counts: list[tuple[int, str, int]] = []
        while chunk := list(itertools.islice(texts, _TEXTS_AT_ONCE)):
            tokens = count_tokens([text for _, _, text in chunk]).tolist()
            counts += [(row, name, count) for (row, name, _), count in zip(chunk, tokens, strict=True)]
        return cls._from_counts(counts)

    @classmethod
    def of(cls, tokens: Iterable[Mapping[str, int]]) -> "CaptionLengths":
        """Returns counts that are known, {name: tokens} of each example."""
        counts = [(row, name, count) for row, found in enumerate(tokens) for name, count in found.items()]
        return cls._from_counts(counts)

    @classmethod
    def _from_counts(cls, counts: Sequence[tuple[int, str, int]]) -> "CaptionLengths":
        """Returns the counts of captions, (row, name, tokens) of each."""
        names = {name: number for number, name in enumerate(dict.fromkeys(name for _, name, _ in counts))}
        columns = np.array([(row, names[name], count) for row, name, count in counts], np.int64).reshape(-1, 3)
        return cls(tuple(names), columns[:, 0], columns[:, 1], columns[:, 2])

    @classmethod
    def concatenate(cls, parts: Sequence["CaptionLengths"], sizes: Sequence[int]) -> "CaptionLengths":
        """Returns the counts of consecutive parts of a source, each with its number of examples."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        numbers = {name: number for number, name in enumerate(names)}
        starts = np.cumsum([0, *sizes])
        renamed = [np.array([numbers[name] for name in part.names], np.int64) for part in parts]
        return cls(
            names,
            np.concatenate([part.rows + start for part, start in zip(parts, starts[:-1], strict=True)]),
            np.concatenate([new[part.name_indices] for part, new in zip(parts, renamed, strict=True)]),
            np.concatenate([part.tokens for part in parts]),
        )

    def where(self, chosen: np.ndarray) -> "CaptionLengths":
        """Returns the counts of some captions, bool [M]."""
        return dataclasses.replace(
            self, rows=self.rows[chosen], name_indices=self.name_indices[chosen], tokens=self.tokens[chosen]
        )

    def write(self, path: str, digest: str) -> None:
        """Writes the counts, under a digest of what they depend on; without write permission, warns once."""
        facts = {"version": _VERSION, "digest": digest, "names": self.names}
        columns = [self.rows, self.name_indices, self.tokens]
        write_table(pa.table(columns, schema=_SCHEMA.with_metadata({"facts": json.dumps(facts)})), path)

    @classmethod
    def read(cls, path: str, digest: str, num_examples: int) -> "CaptionLengths | None":
        """Reads counts of `num_examples` examples; returns None if there are none of this digest."""
        table = read_table(path, _COLUMNS, not_before=None)
        if table is None:
            return None
        facts = facts_of(table)
        if (facts.get("version"), facts.get("digest")) != (_VERSION, digest) or table.schema.types != _SCHEMA.types:
            return None
        names, columns = facts.get("names"), [table.column(name) for name in _COLUMNS]
        if not _are_names(names) or any(column.null_count for column in columns):
            return None
        rows, name_indices, tokens = (column.to_numpy() for column in columns)
        in_bounds = (rows >= 0) & (rows < num_examples) & (name_indices >= 0) & (name_indices < len(names))
        in_bounds &= (tokens >= 1) & (tokens <= _MAX_TOKENS)
        if not in_bounds.all() or (np.diff(rows) < 0).any():
            return None
        return cls(tuple(names), rows, name_indices, tokens)


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def digest_of(data: str, chooser: CaptionChooser, count_tokens: TokenCounter) -> str:
    """Returns a digest of what token counts depend on.

    Args:
      data: digest of the examples.
      chooser: tells which texts are captions, and has their templates.
      count_tokens: counts the tokens.
    """
    used = None if chooser.used is None else sorted(chooser.used)
    facts = [_VERSION, data, used, sorted(chooser.templates.items()), count_tokens.digest]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
