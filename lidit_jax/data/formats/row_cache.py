"""Keeps the rows of the row groups of Parquet files that were read last."""

import collections
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from lidit_jax.data.formats.parquet_files import until_damage

_CACHE_BYTES = 1 << 28
_CACHED_GROUP_BYTES = 1 << 26


class RowCache:
    """Rows of row groups that were read last, in bounded memory. Pickled without them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple, tuple[list[dict[str, Any]], int]] = collections.OrderedDict()
        self._bytes = 0

    def __reduce__(self):
        return RowCache, ()

    def rows(
        self, key: tuple, read: Callable[[], Iterator[dict[str, Any]]], wanted: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """Returns rows of a row group.

        Args:
          key: identifies the row group.
          read: returns an iterator over its rows.
          wanted: ascending numbers of the rows.

        Returns:
          {number: row}, without rows that do not exist.
        """
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                rows = self._groups[key][0]
                return {number: rows[number] for number in wanted if number < len(rows)}
        found, rows, size = {}, [], 0
        for number, row in enumerate(until_damage(read())):
            if number in wanted:
                found[number] = row
            if rows is not None:
                rows.append(row)
                size += _memory(row)
                if size > _CACHED_GROUP_BYTES:
                    rows = None
            if rows is None and number >= wanted[-1]:
                return found
        if rows is not None:
            self._add(key, rows, size)
        return found

    def _add(self, key: tuple, rows: list[dict[str, Any]], size: int) -> None:
        with self._lock:
            if key not in self._groups:
                self._groups[key] = rows, size
                self._bytes += size
            while self._bytes > _CACHE_BYTES:
                self._bytes -= self._groups.popitem(last=False)[1][1]


def _memory(value: Any) -> int:
    """Returns about how many bytes a value takes."""
    if isinstance(value, Mapping):
        return 200 + sum(map(_memory, value.values()))
    if isinstance(value, list):
        return 100 + sum(map(_memory, value))
    return 100 + (len(value) if isinstance(value, bytes | str) else 0)
