"""Base class of the data sets that the `data` section of a config describes; `open_dataset` returns one."""

import abc
import collections
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from lidit_jax.data.assembler import Assembler, Tokenize
from lidit_jax.data.batch_stream import BatchStream
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.caption_lengths import TokenCounter
from lidit_jax.data.captions import CaptionChooser, is_used, list_field
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.prompt_lengths import PromptLengths
from lidit_jax.data.shapes.captions import LANGUAGES
from lidit_jax.data.stored_features import StoredPrompts
from lidit_jax.errors import UserError


class Dataset(abc.ABC):
    """Filtered sources with their aspect-ratio buckets.

    Attributes:
      buckets: the buckets' sizes.
      broken: number of samples that could not be used, by reason.
      dropped: number of samples that filters dropped, by reason.
      num_examined: number of samples that were examined, including those.
      fields: number of examined samples with each text field, for each source whose fields were counted.
    """

    def __init__(
        self,
        config: DataConfig,
        buckets: tuple[Bucket, ...],
        source_configs: Mapping[str, DataConfig],
        held_out: bool,
        with_captions: bool,
    ):
        """Initializes what all data sets share.

        Args:
          config: the `data` section.
          buckets: the aspect-ratio buckets.
          source_configs: config of each source that is used, by name.
          held_out: as for `open_dataset`.
          with_captions: as for `open_dataset`.
        """
        self.config, self.buckets = config, buckets
        self.broken: collections.Counter[str] = collections.Counter()
        self.dropped: collections.Counter[str] = collections.Counter()
        self.num_examined = 0
        self.fields: dict[str, collections.Counter[str]] = {}
        self._with_captions = with_captions
        self._source_configs = source_configs
        self._weights = None if held_out else config.weights()

    def _check_fields(self, no_samples: str = "no sample") -> None:
        """Raises UserError if the config names a caption field that no sample has.

        Args:
          no_samples: subject of the error message.
        """
        built_in = [name for name, source_config in self._source_configs.items() if source_config.source == "shapes"]
        known = {name: set(fields) for name, fields in self.fields.items()} | dict.fromkeys(built_in, set(LANGUAGES))
        found = set().union(*known.values())
        if not self._with_captions or not found:
            return
        named, not_counted = set(), set()
        for name, source_config in self._source_configs.items():
            fields = named if name in known else not_counted
            if source_config.captions is not None:
                fields.update(source_config.chooser(0.0).used)
        for field in sorted(named - not_counted):
            if list_field(field) not in found:
                available = ", ".join(sorted(found)[:20]) or "none"
                raise UserError(
                    f"data.captions names {field!r}, which {no_samples} has (there are {available}): "
                    f"give --config.data.captions.{field}=0 or correct its name"
                )

    def _choosers(self, dropout: float, join: bool = False) -> tuple[CaptionChooser, ...]:
        return tuple(source_config.chooser(dropout, join) for source_config in self._source_configs.values())

    def _describe_captions(self, sampled: Mapping[str, Mapping[str, int]] = MappingProxyType({})) -> list[str]:
        """Returns log text on which texts are captions and which are not, for each source whose fields were counted.

        Args:
          sampled: for sources whose fields were not counted, number of samples with each field among a few of them.
        """
        if not self._with_captions:
            return []
        lines = []
        for name, found in (*self.fields.items(), *sampled.items()):
            used = self._source_configs[name].chooser(0.0).used
            captions = {field: count for field, count in found.items() if used is None or is_used(field, used)}
            entries = [
                f"{field} (of {list_field(field)})"
                for field in used or ()
                if list_field(field) in found.keys() - captions.keys()
            ]
            named = ", ".join([f"{field} ({count})" for field, count in sorted(captions.items())] + entries)
            others = ", ".join(sorted(found.keys() - captions.keys())[:20])
            of_source = f" of {name}" if len(self._source_configs) > 1 else ""
            not_used = f", not from the other texts {others} (unless data.captions names them)" if others else ""
            of_sampled = " in a few samples" if name in sampled else ""
            lines.append(f"captions{of_source}{of_sampled} from {named or 'none'}{not_used}")
        return lines

    def _describe_left_out(self) -> list[str]:
        """Returns log text on the samples that filters dropped and on the broken ones, with their shares."""
        found = (("left out by filters", self.dropped), ("broken", self.broken))
        return [f"{what} {with_shares(reasons, self.num_examined)}" for what, reasons in found if reasons]

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Text that identifies the samples, their buckets and their order; a run resumes only with equal text."""

    @property
    def holds_latents(self) -> bool:
        """True if batches hold latents ("moments") instead of images."""
        return False

    def stored_prompts(self) -> StoredPrompts | None:
        """Returns the precomputed features of the prompts; None if the data hold none."""
        return None

    @abc.abstractmethod
    def summary(self) -> str:
        """Returns log text: number of samples, share of each bucket, samples left out by reason."""

    @abc.abstractmethod
    def prompt_lengths(self, count_tokens: TokenCounter, num_lengths: int, max_length: int) -> PromptLengths:
        """Counts the prompt tokens of every caption, and chooses the lengths that prompts are padded to.

        With sequential reading, those of the first samples' captions are counted.

        Args:
          count_tokens: counts the tokens of prompts.
          num_lengths: largest number of lengths.
          max_length: longest prompt; longer ones are truncated.
        """

    @abc.abstractmethod
    def check_batch_size(self, batch_size: int) -> None:
        """Raises UserError if a batch of this size cannot be divided over the processes."""

    @abc.abstractmethod
    def smallest_side(self) -> int:
        """Returns the shortest side of an image in a batch, in pixels."""

    @abc.abstractmethod
    def largest_bucket(self) -> Bucket:
        """Returns the bucket with the most samples, in which previews are generated."""

    @abc.abstractmethod
    def captions(self, count: int, seed: int) -> list[str]:
        """Returns captions of up to `count` examples, spread evenly over the data set, without caption dropout."""

    @abc.abstractmethod
    def images(self, count: int) -> list[np.ndarray]:
        """Returns up to `count` images, spread evenly over the data set; broken ones are left out.

        Returns:
          uint8 [H, W, 3] each, resized to its bucket as in batches.

        Raises:
          UserError: all of them are broken, or the data are latents.
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
        prompts: PromptLengths | None = None,
    ) -> BatchStream:
        """Returns an iterator over this process's rows of batches `first`, `first` + 1, ….

        Args:
          batch_size: rows of a batch over all processes.
          seed: seed of the order and the captions; see `Assembler`.
          tokenize: see `Assembler`.
          first: number of the first batch.
          caption_dropout: `dropout` of `CaptionChooser`.
          join_captions: `join` of `CaptionChooser`.
          with_images: see `Assembler`.
          with_captions: see `Assembler`.
          with_features: use the precomputed features of the prompts instead of `tokenize`.
          prompts: what `prompt_lengths` returned, to pad the prompts of a batch to the length that they need; None: pad
            them as `tokenize` does.
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
        return self._loader(assembler, batch_size, first, prompts)

    @abc.abstractmethod
    def _loader(
        self, assembler: Assembler, batch_size: int, first: int, prompts: PromptLengths | None
    ) -> BatchStream: ...


def with_shares(reasons: Mapping[str, int], total: int) -> str:
    """Returns log text on counts by reason, each with its share of `total` samples: "no caption: 3 (50.0%)"."""
    return ", ".join(f"{reason}: {count} ({count / total:.1%})" for reason, count in sorted(reasons.items()))


def spread(total: int, count: int) -> Sequence[int]:
    """Returns up to `count` evenly spaced elements of range(total)."""
    return np.linspace(0, total - 1, min(count, total)).astype(int).tolist()
