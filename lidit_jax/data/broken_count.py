"""How much of the data may be broken before a run stops."""

import collections
import logging
from collections.abc import Mapping, Sequence

from lidit_jax.errors import UserError

_MAX_LOGGED = 10
# The limit on broken examples is a share of so many.
BROKEN_WINDOW = 1000

_log = logging.getLogger(__name__)


class BrokenCount:
    """What was found broken while reading, by reason; says the first of them, and when it is too much."""

    def __init__(self, max_broken: float, consequence: str = "another one took its place"):
        """Args:
        max_broken: share of every `BROKEN_WINDOW` examples.
        consequence: for the log.
        """
        self._consequence = consequence
        self.by_reason: collections.Counter[str] = collections.Counter()
        self._max_broken, self._read_in_window, self._broken_in_window = max_broken, 0, 0

    def add(self, read: int, broken: Sequence[tuple[str, str]]) -> None:
        """(key, reason) of the broken ones among `read` examples.

        Raises:
          UserError: it is too much.
        """
        for key, reason in broken:
            self.by_reason[reason] += 1
            if self.by_reason.total() <= _MAX_LOGGED:
                _log.warning("example %r: %s; %s", key, reason, self._consequence)
        self._read_in_window += read
        self._broken_in_window += len(broken)
        # One batch may have had more read than a window, where a buffer was filled for it.
        if self._broken_in_window > self._max_broken * max(BROKEN_WINDOW, self._read_in_window):
            raise UserError(_too_many_broken(self._broken_in_window, self._read_in_window, self.by_reason))
        if self._read_in_window >= BROKEN_WINDOW:
            self._read_in_window = self._broken_in_window = 0


def check_broken(looked_at: int, broken: Mapping[str, int], max_broken: float) -> None:
    """Raises UserError where too many samples of a data set cannot be used; a small one may lose more of them."""
    count = sum(broken.values())
    if count > max_broken * max(looked_at, BROKEN_WINDOW):
        raise UserError(_too_many_broken(count, looked_at, broken))


def _too_many_broken(count: int, read: int, broken: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {number}" for reason, number in collections.Counter(broken).most_common(5))
    return (
        f"{count} of {read} samples cannot be used ({reasons}): mend the data, or raise --config.data.max_broken, the "
        f"share of {BROKEN_WINDOW} samples that may be broken"
    )
