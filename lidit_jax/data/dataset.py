"""From the `data` section of a config to batches: sources, filters, aspect-ratio groups, captions."""

import abc
import collections
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from lidit_jax.data.assembler import Assembler, Tokenize
from lidit_jax.data.batch_stream import BatchStream
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.stored_features import StoredPrompts
from lidit_jax.errors import UserError


class Dataset(abc.ABC):
    """Filtered sources with their aspect-ratio groups; `open_dataset` makes one.

    Attributes:
      buckets: the groups' sizes.
      broken, dropped: samples left out, by reason: what could not be used, and what the filters dropped.
    """

    def __init__(
        self,
        config: DataConfig,
        buckets: tuple[Bucket, ...],
        parts: Mapping[str, DataConfig],
        held_out: bool,
        with_captions: bool,
    ):
        """As `open_dataset`. Args: parts: the sources of the config's mixture that are used, by name."""
        self.config, self.buckets = config, buckets
        self.broken: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self._with_captions = with_captions
        self._parts = parts
        self._weights = None if held_out else config.weights()

    def _check_fields(self, found: Mapping[str, int], nobody: str = "no sample") -> None:
        """Raises UserError for a caption field that the config names and no sample has, if any has one at all."""
        if not self._with_captions or not found:
            return
        named = {field for part in self._parts.values() for field in part.chooser(0.0).used or ()}
        for field in sorted(named):
            if field not in found:
                there = ", ".join(sorted(found)[:20]) or "none"
                raise UserError(
                    f"data.captions names {field!r}, which {nobody} has (there are {there}): "
                    f"give --config.data.captions.{field}=0 or mend its name"
                )

    def _choosers(self, dropout: float, join: bool = False) -> tuple[CaptionChooser, ...]:
        return tuple(part.chooser(dropout, join) for part in self._parts.values())

    def _left_out(self) -> list[str]:
        """For the log."""
        found = (("left out by filters", self.dropped), ("broken", self.broken))
        return [
            f"{what} {', '.join(f'{reason}: {count}' for reason, count in sorted(reasons.items()))}"
            for what, reasons in found
            if reasons
        ]

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Of what is in it and how it is grouped and ordered."""

    @property
    def holds_latents(self) -> bool:
        """Whether batches hold latents ("moments") in place of pictures."""
        return False

    def stored_prompts(self) -> StoredPrompts | None:
        """How batches get the prompts' features, where the data hold them."""
        return None

    @abc.abstractmethod
    def summary(self) -> str:
        """For the log: how many pictures, which share in which group, what was left out and why."""

    @abc.abstractmethod
    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError for one that cannot be made by so many hosts."""

    @abc.abstractmethod
    def smallest_side(self) -> int:
        """Of the pictures as they come in batches, in pixels."""

    @abc.abstractmethod
    def largest_bucket(self) -> Bucket:
        """The group with the most pictures: what previews are drawn in."""

    @abc.abstractmethod
    def captions(self, count: int, seed: int) -> list[str]:
        """Captions of up to `count` examples, spread over the source; none dropped."""

    @abc.abstractmethod
    def pictures(self, count: int) -> list[np.ndarray]:
        """Up to `count` pictures, spread over the source: uint8 [H, W, 3] each, as in batches; broken ones left out.

        Raises:
          UserError: all are broken, or the data are latents.
        """

    def batches(
        self,
        batch_size: int,
        seed: int,
        tokenize: Tokenize | None,
        *,
        first: int = 0,
        caption_dropout: float = 0.0,
        join_captions: bool = False,
        with_images: bool = True,
        with_captions: bool = False,
        with_features: bool = False,
    ) -> BatchStream:
        """This process's rows of batches first, first + 1, …; see `Assembler` and `CaptionChooser`.

        Args: with_features: the prompts' stored features in place of `tokenize`.
        """
        assembler = Assembler(
            self.buckets,
            seed,
            self._choosers(caption_dropout, join_captions),
            tokenize,
            self.stored_prompts() if with_features else None,
            with_captions=with_captions,
            with_images=with_images,
        )
        return self._loader(assembler, batch_size, first, jax.process_index(), jax.process_count())

    @abc.abstractmethod
    def _loader(
        self, assembler: Assembler, batch_size: int, first: int, process_index: int, process_count: int
    ) -> BatchStream: ...


def spread(total: int, count: int) -> Sequence[int]:
    """Up to `count` of range(total), evenly."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
