"""From the `data` section of a config to batches: sources, filters, aspect-ratio groups, captions."""

import collections
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lidit_jax.data.buckets import Bucket, assign, make_buckets
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.index import IndexPlan, examine
from lidit_jax.data.indexed_source import IndexedSource
from lidit_jax.data.loader import Assembler, Loader, check_broken, make_loader, make_plan
from lidit_jax.data.precomputed import PrecomputedSource
from lidit_jax.data.shapes import HELD_OUT_SEED, ShapesSource
from lidit_jax.data.sources import BrokenExample, ConcatenatedSource, Source
from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], Mapping[str, np.ndarray]]


class Dataset:
    """Filtered sources with their aspect-ratio groups.

    Attributes:
      buckets: the groups' sizes.
      source: random access to the pictures.
      broken, dropped: samples left out, by reason: what could not be used, and what the filters dropped.
    """

    def __init__(self, config: DataConfig, cell: int, held_out: bool = False, with_captions: bool = True):
        """Args:
          cell: pixels that both sides of every picture must be multiples of (latent cell times patch).
          held_out: the pictures kept from training, in place of those for it.
          with_captions: whether captions are trained on; an autoencoder has no use for them.

        Raises:
          UserError: if there is no data, the filters leave nothing, too much is broken, no sample has a caption field
            that the config names, or the resolution is no multiple of `cell`.
        """
        self.config = config
        self.buckets = make_buckets(config.resolution, cell, config.max_aspect)
        self.broken, self.dropped = collections.Counter(), collections.Counter()
        self._with_captions = with_captions
        parts = config.parts()
        if held_out:
            parts = {name: part for name, part in parts.items() if part.holds_out}
        fields: collections.Counter[str] = collections.Counter()
        sources, looked_at = [], 0
        for part in parts.values():
            source = self._open(part, held_out)
            sources.append(source)
            if isinstance(source, IndexedSource):
                self.broken += source.broken
                self.dropped += source.dropped
                looked_at += source.looked_at
                fields += source.fields
        check_broken(looked_at, self.broken, config.max_broken)
        if with_captions and fields:
            self._check_fields(parts, fields)
        self.source: Source = sources[0] if len(sources) == 1 else ConcatenatedSource(sources)
        self._names = list(parts)
        self._weights = None if held_out else config.weights()
        self._parts, self._sources = tuple(parts.values()), sources
        self.bucket_of_example = assign(self.source.sizes(), self.buckets)

    def _open(self, part: DataConfig, held_out: bool) -> Source:
        if part.source == "shapes":
            seed = HELD_OUT_SEED if held_out else 0
            return ShapesSource(part.num_examples, part.resolution, part.resolution, seed)
        if part.source == "precomputed":
            return PrecomputedSource(part.path, self.buckets)
        shards = part.shards(held_out)
        filters = part.filters(self.buckets, self._with_captions)
        # Each process begins elsewhere, so that together they make the missing indexes once.
        first = len(shards.paths) * jax.process_index() // jax.process_count()
        return IndexedSource(shards, examine(shards, filters, IndexPlan(part.index_dir), first))

    @staticmethod
    def _check_fields(parts: Mapping[str, DataConfig], found: collections.Counter[str]) -> None:
        named = {field for part in parts.values() for field in part.chooser(0.0).used or ()}
        for field in sorted(named):
            if field not in found:
                there = ", ".join(sorted(found)[:20]) or "none"
                raise UserError(
                    f"data.captions names {field!r}, which no sample has (there are {there}): "
                    f"give --config.data.captions.{field}=0 or mend its name"
                )

    @property
    def fingerprint(self) -> str:
        """Of what is in it and how it is grouped and ordered."""
        sizes = " ".join(str(bucket) for bucket in self.buckets)
        order = f" by {self._weights}" if self._weights else ""
        return f"{self.source.fingerprint} in {sizes}{order}"

    def summary(self) -> str:
        """For the log: how many pictures, which share in which group, what was left out and why."""
        shares = make_plan(self.source, self.buckets, 1, 0, self._weights).shares()
        groups = [f"{bucket} {100 * share:.0f}%" for bucket, share in zip(self.buckets, shares, strict=False) if share]
        lines = [f"data: {len(self.source)} pictures; groups {', '.join(groups)}"]
        if len(self._names) > 1:
            counts = np.bincount(self.source.source_of_example)
            rows = self._weights or counts.tolist()
            mixed = [
                f"{name} {count} pictures, {100 * weight / sum(rows):.0f}%"
                for name, count, weight in zip(self._names, counts, rows, strict=True)
            ]
            lines.append(f"mixed of {'; '.join(mixed)}")
        for what, reasons in (("left out by filters", self.dropped), ("broken", self.broken)):
            if reasons:
                lines.append(f"{what} {', '.join(f'{reason}: {count}' for reason, count in sorted(reasons.items()))}")
        return "; ".join(lines)

    @property
    def holds_latents(self) -> bool:
        """Whether batches hold latents ("moments") in place of pictures."""
        return self.source.content == "moments"

    def check_latents(self, vae_digest: str) -> None:
        """Raises UserError for latents that another VAE made than the one with this digest."""
        for part, source in zip(self._parts, self._sources, strict=True):
            if isinstance(source, PrecomputedSource) and source.manifest.vae != vae_digest:
                raise UserError(
                    f"{part.path}: made by another VAE (digest {source.manifest.vae}) than vae.weights names "
                    f"({vae_digest}): name that one, or compute the latents anew"
                )

    def smallest_side(self) -> int:
        """Of the pictures as they come in batches, in pixels."""
        return min(min(self.buckets[i]) for i in np.unique(self.bucket_of_example))

    def largest_bucket(self) -> Bucket:
        """The group with the most pictures: what previews are drawn in."""
        return self.buckets[int(np.bincount(self.bucket_of_example).argmax())]

    def captions(self, count: int, seed: int) -> list[str]:
        """Captions of up to `count` examples, spread over the source; none dropped."""
        choosers = self._choosers(0.0)
        rng = np.random.default_rng(seed)
        examples = self.source.describe(self._spread(count))
        return [
            choosers[example.get("source", 0)](example["captions"], rng)
            for example in examples
            if not isinstance(example, BrokenExample)
        ]

    def pictures(self, count: int) -> list[np.ndarray]:
        """Up to `count` pictures, spread over the source: uint8 [H, W, 3] each, as in batches; broken ones left out.

        Raises:
          UserError: all are broken, or the data are latents.
        """
        if self.holds_latents:
            raise UserError(
                "data.source='precomputed' holds latents, no pictures to look at: name the pictures' source"
            )
        pictures = []
        for index in self._spread(count):
            [example] = self.source.load([index], self.buckets[self.bucket_of_example[index]])
            if isinstance(example, BrokenExample):
                logger.warning("%s; it is left out", example)
            else:
                pictures.append(example["image"])
        if not pictures:
            raise UserError(f"none of the {len(self.source)} pictures can be read: check the data's files")
        return pictures

    def _choosers(self, dropout: float, join: bool = False) -> tuple[CaptionChooser, ...]:
        return tuple(part.chooser(dropout, join) for part in self._parts)

    def _spread(self, count: int) -> list[int]:
        return np.linspace(0, len(self.source) - 1, min(count, len(self.source))).astype(int).tolist()

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
    ) -> Loader:
        """This process's rows of batches first, first + 1, …: `make_loader`, and `CaptionChooser` for the captions."""
        config = self.config
        assembler = Assembler(
            self.buckets,
            seed,
            self._choosers(caption_dropout, join_captions),
            tokenize,
            with_captions=with_captions,
            with_images=with_images,
        )
        return make_loader(
            self.source,
            assembler,
            batch_size,
            weights=self._weights,
            num_threads=config.num_threads,
            num_workers=config.num_workers,
            prefetch=config.prefetch,
            max_broken=config.max_broken,
            first_batch=first,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
