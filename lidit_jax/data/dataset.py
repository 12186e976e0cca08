"""From the `data` section of a config to batches: source, filters, aspect-ratio groups, captions."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lidit_jax.data import filters
from lidit_jax.data.batch_plan import BatchPlan
from lidit_jax.data.buckets import Bucket, assign, make_buckets, resize_to_cover_and_crop
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.loader import make_loader
from lidit_jax.data.shapes import HELD_OUT_SEED, ShapesSource
from lidit_jax.data.sources import BrokenExample, Source, SubsetSource, describe
from lidit_jax.data.tar_source import TarSource
from lidit_jax.errors import UserError

logger = logging.getLogger(__name__)

SOURCES = ("shapes", "tar")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Under `data` in the config.

    Attributes:
      source: "shapes" (built in) or "tar" (img2dataset / webdataset shards at `path`).
      path: a folder of .tar files, one file, a glob or a brace range.
      num_examples: of "shapes".
      held_out_shards: of "tar", how many of the last shards are kept from training, for evaluation. Of "shapes" nothing
        need be kept: its held-out scenes are others than any training's.
      resolution: side in pixels of a square picture; groups of other aspect ratios have about the same area.
      max_aspect: longest side over shortest of the groups; 1 makes all pictures square.
      captions: caption field -> how often it is drawn (original and synthetic captions mixed).
      class_template: text around the field "class", e.g. "a photo of {}"; "" for none.
      caption_dropout: probability of the empty prompt, for classifier-free guidance.
      min_aesthetic, aesthetic_key: filter on a score in the metadata; None keeps all.
      min_side: filter on the picture's shorter side in pixels; 0 keeps all.
      drop_low_quality_captions: filter on captions that are URLs, file names or lists of tags.
      num_threads, num_workers, prefetch: of the loader; they change nothing but its speed.
    """

    source: str
    resolution: int
    path: str = ""
    num_examples: int = 1_000_000
    held_out_shards: int = 0
    max_aspect: float = 1.0
    captions: Mapping[str, float] | None = None
    class_template: str = ""
    caption_dropout: float = 0.1
    min_aesthetic: float | None = None
    aesthetic_key: str = "aesthetic"
    min_side: int = 0
    drop_low_quality_captions: bool = False
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        if self.source not in SOURCES:
            raise UserError(f"data.source={self.source!r} is unknown: use one of {', '.join(SOURCES)}")
        if self.source == "tar" and not self.path:
            raise UserError("data.path is empty: give --config.data.path=FOLDER_OF_TAR_SHARDS")
        if self.held_out_shards < 0 or (self.held_out_shards and self.source != "tar"):
            raise UserError(
                f"data.held_out_shards={self.held_out_shards} goes with data.source='tar' alone, and is 0 or more: "
                "give --config.data.held_out_shards=0"
            )
        self.chooser(0.0)  # raises for impossible captions

    @property
    def holds_out(self) -> bool:
        """Whether there are pictures that training does not see."""
        return self.source == "shapes" or self.held_out_shards > 0

    def chooser(self, dropout: float, join: bool = False) -> CaptionChooser:
        template = self.class_template.replace("{}", "{class}")
        return CaptionChooser(self.captions, dropout, {"class": template} if template else {}, join)


class Dataset:
    """A filtered source with its aspect-ratio groups."""

    def __init__(self, config: DataConfig, cell: int, held_out: bool = False):
        """Args:
          cell: pixels that both sides of every picture must be multiples of (latent cell times patch).
          held_out: the pictures kept from training, in place of those for it.

        Raises:
          UserError: if there is no data, the filters leave nothing, or the resolution is no multiple of `cell`.
        """
        self.config = config
        self.buckets = make_buckets(config.resolution, cell, config.max_aspect)
        self.source, self.dropped = _filtered(_open_source(config, held_out), config)
        self.bucket_of_example = assign(self.source.sizes(), self.buckets)

    @property
    def fingerprint(self) -> str:
        """Of what is in it and how it is grouped."""
        sizes = " ".join(str(bucket) for bucket in self.buckets)
        return f"{self.source.fingerprint} in {sizes}"

    def summary(self) -> str:
        """A line for the log: how many pictures, which share in which group, what was left out and why."""
        plan = BatchPlan(self.bucket_of_example, 1, 0)
        shares = [
            f"{bucket} {100 * share:.0f}%" for bucket, share in zip(self.buckets, plan.shares(), strict=False) if share
        ]
        dropped = ", ".join(f"{reason}: {count}" for reason, count in sorted(self.dropped.items()))
        return f"data: {len(self.source)} pictures; groups {', '.join(shares)}" + (
            f"; left out {dropped}" if dropped else ""
        )

    def smallest_side(self) -> int:
        """Of the pictures as they come in batches, in pixels."""
        return min(min(self.buckets[i]) for i in np.unique(self.bucket_of_example))

    def largest_bucket(self) -> Bucket:
        """The group with the most pictures: what previews are drawn in."""
        return self.buckets[int(np.bincount(self.bucket_of_example).argmax())]

    def captions(self, count: int, seed: int) -> list[str]:
        """Captions of up to `count` examples, spread over the source; none dropped."""
        chooser = self.config.chooser(0.0)
        indices = np.linspace(0, len(self.source) - 1, min(count, len(self.source))).astype(int)
        rng = np.random.default_rng(seed)
        return [chooser(describe(self.source, int(i))["captions"], rng) for i in indices]

    def pictures(self, count: int) -> list[np.ndarray]:
        """Up to `count` pictures, spread over the source: uint8 [H, W, 3] each, as in batches; broken ones left out.

        Raises:
          UserError: all are broken.
        """
        pictures = []
        for index in np.linspace(0, len(self.source) - 1, min(count, len(self.source))).astype(int).tolist():
            try:
                picture = self.source[index]["image"]
            except BrokenExample as error:
                logger.warning("%s; it is left out", error)
                continue
            pictures.append(resize_to_cover_and_crop(picture, self.buckets[self.bucket_of_example[index]]))
        if not pictures:
            raise UserError(f"none of the {len(self.source)} pictures can be read: check the data's files")
        return pictures

    def batches(
        self,
        batch_size: int,
        seed: int,
        tokenize: Callable[[Sequence[str]], Mapping[str, np.ndarray]] | None,
        *,
        first: int = 0,
        caption_dropout: float = 0.0,
        join_captions: bool = False,
        with_images: bool = True,
        with_captions: bool = False,
    ) -> Iterator[dict[str, Any]]:
        """This process's rows of batches first, first + 1, …: `make_loader`, and `CaptionChooser` for the captions."""
        return make_loader(
            self.source,
            self.buckets,
            batch_size,
            seed,
            self.config.chooser(caption_dropout, join_captions),
            tokenize or (lambda captions: {}),
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_threads=self.config.num_threads,
            num_workers=self.config.num_workers,
            prefetch=self.config.prefetch,
            first_batch=first,
            with_images=with_images,
            with_captions=with_captions,
        )


def _open_source(config: DataConfig, held_out: bool) -> Source:
    if config.source == "shapes":
        seed = HELD_OUT_SEED if held_out else 0
        return ShapesSource(config.num_examples, config.resolution, config.resolution, seed)
    first_held_out = -config.held_out_shards or None
    return TarSource(config.path, shards=slice(first_held_out, None) if held_out else slice(first_held_out))


def _filtered(source: Source, config: DataConfig) -> tuple[Source, dict[str, int]]:
    """The source without what the config's filters refuse, and how many went for which reason."""
    report = dict(getattr(source, "report", {}))
    fields = tuple(config.captions) if config.captions else None
    chosen = []
    if config.source == "tar":
        chosen.append(functools.partial(filters.no_caption, fields=fields))
    if config.min_aesthetic is not None:
        chosen.append(
            functools.partial(filters.aesthetic_score, minimum=config.min_aesthetic, key=config.aesthetic_key)
        )
    if config.min_side:
        chosen.append(functools.partial(filters.smallest_side, minimum=config.min_side))
    if config.drop_low_quality_captions:
        for caption_filter in (filters.url_caption, filters.file_name_caption, filters.tag_list_caption):
            chosen.append(functools.partial(caption_filter, fields=fields))
    if not chosen:
        return source, report
    kept, dropped = filters.apply_filters(source, chosen)
    report |= dropped
    return (source if len(kept) == len(source) else SubsetSource(source, kept)), report
