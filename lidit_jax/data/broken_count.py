"""Counts broken samples and stops a run that meets too many of them."""

import collections
import logging
from collections.abc import Mapping, Sequence

from lidit_jax.errors import UserError

_MAX_LOGGED = 10
# Number of examples to which the limit `max_broken` applies.
BROKEN_WINDOW = 1000

_log = logging.getLogger(__name__)


class BrokenCount:
    """Counts broken examples by reason, logs the first few, and raises when there are too many."""

    def __init__(self, max_broken: float, consequence: str = "using another one instead"):
        """Starts counting from zero.

        Args:
          max_broken: largest share of broken examples in a window of `BROKEN_WINDOW` examples.
          consequence: what happens to a broken example, for the log message.
        """
        self._consequence = consequence
        self.by_reason: collections.Counter[str] = collections.Counter()
        self._max_broken, self._read_in_window, self._broken_in_window = max_broken, 0, 0

    def add(self, read: int, broken: Sequence[tuple[str, str]]) -> None:
        """Adds examples that were read.

        Args:
          read: number of examples read.
          broken: (key, reason) of each broken one among them.

        Raises:
          UserError: too many examples of the current window are broken.
        """
        for key, reason in broken:
            self.by_reason[reason] += 1
            if self.by_reason.total() <= _MAX_LOGGED:
                _log.warning("example %r: %s; %s", key, reason, self._consequence)
        self._read_in_window += read
        self._broken_in_window += len(broken)
        # A single batch can read more than one window, when it fills a shuffle buffer.
        if self._broken_in_window > self._max_broken * max(BROKEN_WINDOW, self._read_in_window):
            raise UserError(_too_many_broken(self._broken_in_window, self._read_in_window, self.by_reason))
        if self._read_in_window >= BROKEN_WINDOW:
            self._read_in_window = self._broken_in_window = 0


def check_broken(num_samples: int, broken: Mapping[str, int], max_broken: float) -> None:
    """Raises UserError if too many samples of a data set are broken.

    The limit is a share of at least `BROKEN_WINDOW` samples, so a small data set may lose a larger share.
    """
    count = sum(broken.values())
    if count > max_broken * max(num_samples, BROKEN_WINDOW):
        raise UserError(_too_many_broken(count, num_samples, broken))


def _too_many_broken(count: int, read: int, broken: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{reason}: {number}" for reason, number in collections.Counter(broken).most_common(5))
    return (
        f"{count} of {read} samples cannot be used ({reasons}): fix the data, or raise --config.data.max_broken, the "
        f"share of broken samples that is allowed in {BROKEN_WINDOW}"
    )
