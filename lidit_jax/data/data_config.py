"""The `data` section of a config: where samples come from, how they are filtered, bucketed and captioned."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Annotated

from lidit_jax.config import build
from lidit_jax.data.buckets import Bucket, make_buckets
from lidit_jax.data.captions import USUAL_FIELDS, CaptionChooser
from lidit_jax.data.shapes.layout import SceneLayout
from lidit_jax.errors import UserError
from lidit_jax.ranges import (
    Count,
    CountOrZero,
    Finite,
    Positive,
    Share,
    Weight,
    above,
    at_least,
    below,
    between,
    check_ranges,
)

MAX_SIDE = 2**16  # pixels of an image
MAX_WORKERS = 4096

SOURCES = ("shapes", "tar", "parquet", "array_record", "tfds", "folder", "precomputed", "llava")
# Sources of shards that can be read from end to end, or held out.
_SHARDED = ("tar", "parquet")
# Fields that an entry of `mixture` may set.
PER_SOURCE = (
    *("source", "path", "split", "data_dir", "image_key", "class_names", "num_examples", "held_out_shards", "features"),
    *("index_dir", "weight", "captions", "class_template", "min_aesthetic", "aesthetic_key", "min_side"),
    *("drop_aspect_over", "drop_low_quality_captions"),
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` section of a config.

    Attributes:
      source: "shapes" (built in), "tar" (img2dataset or webdataset shards), "parquet" (files with embedded images, as
        of Hugging Face data sets), "array_record" (of tf.train.Example), "tfds" (a TensorFlow Datasets data set),
        "folder" (images with a captions file, or one folder per class), "precomputed" (latents written by
        `python -m lidit_jax.precompute`) or "llava" (conversations about images, for the `llava` section alone).
      resolution: side of the square bucket in pixels; buckets of other aspect ratios have about the same area.
      path: folder, file, glob pattern or brace range, on a disk or, for "tar" and "parquet", at any fsspec URL
        (gs://…, hf://…); for "tfds", the name of the data set.
      mixture: several sources, by name; each entry holds the fields that differ from this section, of those in
        `PER_SOURCE`.
      weight: in a mixture, this source's share of the samples, in any unit; None for every source: in proportion to
        their numbers of samples.
      split: split of a "tfds" source, or of a "parquet" or "folder" source that has several (files or folders named
        train, validation and test).
      data_dir: data folder of a "tfds" source; for "llava", the folder that images are relative to.
      image_key: column or feature that holds the image in a "parquet", "tfds" or "array_record" source; "": the only
        column with images (parquet), the only image feature or the one called "image" (tfds), "image" (array_record).
      class_names: file with one class name per line, for sources whose classes are numbers; without it a number is no
        caption.
      features: use the prompts' features of a "precomputed" source, if its folder has them.
      num_examples: number of scenes of a "shapes" source.
      layout: scenes of a "shapes" source: "quadrants" (up to 4 objects, each in its quadrant of the image) or "free"
        (up to 6 objects, anywhere).
      object_shares: for "shapes", how often scenes have 1, 2, … objects, in any unit; None: the layout's default.
      object_scale: for layout "free", factor on the size of objects; 1 suits 64 px, larger images need less.
      overlaps: for layout "free", share of the scenes of two or more objects where one partly hides another.
      held_out_shards: for "tar" and "parquet", number of shards, from the last, that are kept from training for
        evaluation. A "shapes" source needs none: its held-out scenes are never training scenes.
      index_dir: folder for the shards' indexes; "": each index lies beside its shard.
      sequential: for "tar" and "parquet", read shards from end to end without indexes. Training starts at once, and
        every byte is read once per epoch; but shuffling happens only within buffers, and unusable samples are counted
        only when met.
      streams: for sequential reading, number of streams that the shards are distributed over; each provides fixed
        rows of every batch. It must divide the batch size and be a multiple of the number of hosts. 0: the largest
        divisor of the batch size that is at most 256 and leaves every stream a shard.
      shuffle_buffer: for sequential reading, number of samples held in memory, over all hosts; 0: four batches per
        bucket.
      max_aspect: largest ratio of the longer to the shorter side of a bucket; 1 makes all images square.
      bucket_multiple: number of pixels that divides both sides of every bucket; larger values give fewer buckets, and
        so fewer shapes to compile. It must divide `resolution` and be a multiple of the size multiple (down-sampling of
        the VAE times patch size); 0: the size multiple itself, which gives the most buckets.
      allow_enlarging: if False, drop images that are smaller than their bucket.
      captions: weight of each caption field (original and synthetic captions mixed); nested texts are named as
        "json/caption", entries of a list as "caption/0". Other texts of a sample are never captions. None:
        the usual fields (`captions.USUAL_FIELDS`); for "shapes" and "precomputed", which hold only captions, all.
      class_template: text around the field "class", e.g. "a photo of {}"; "" for none.
      caption_dropout: probability of the empty prompt, for classifier-free guidance.
      min_aesthetic: lowest score that is kept; None keeps all.
      aesthetic_key: key of that score in the metadata.
      min_side: smallest shorter side of an image, in pixels, that is kept; 0 keeps all.
      drop_aspect_over: largest ratio of the longer to the shorter side that is kept; None keeps all.
      drop_low_quality_captions: drop samples whose captions are URLs, file names or tag lists.
      max_broken: share of a window of 1,000 samples that may be broken (truncated, damaged, …) before the run stops.
      num_threads: threads that read and decode; affects only the speed.
      num_workers: worker processes; affects only the speed. Sequential reading uses threads alone.
      prefetch: batches to prefetch; affects only the speed.
    """

    source: str
    resolution: Annotated[int, between(1, MAX_SIDE)]
    path: str = ""
    mixture: Mapping[str, "DataConfig"] | None = None
    weight: Positive | None = None
    split: str = "train"
    data_dir: str = ""
    image_key: str = ""
    class_names: str = ""
    features: bool = True
    num_examples: Count = 1_000_000
    layout: str = "quadrants"
    object_shares: Sequence[float] | None = None
    object_scale: Annotated[float, above(0), below(100)] = 1.0
    overlaps: Share = 0.0
    held_out_shards: CountOrZero = 0
    index_dir: str = ""
    sequential: bool = False
    streams: CountOrZero = 0
    shuffle_buffer: CountOrZero = 0
    max_aspect: Annotated[float, at_least(1)] = 1.0
    bucket_multiple: CountOrZero = 0
    allow_enlarging: bool = True
    captions: Mapping[str, Weight] | None = None
    class_template: str = ""
    caption_dropout: Share = 0.1
    min_aesthetic: Finite | None = None
    aesthetic_key: str = "aesthetic"
    min_side: CountOrZero = 0
    drop_aspect_over: Annotated[float, at_least(1)] | None = None
    drop_low_quality_captions: bool = False
    max_broken: Share = 0.2
    num_threads: Annotated[int, between(0, MAX_WORKERS)] = 2
    num_workers: Annotated[int, between(0, MAX_WORKERS)] = 0
    prefetch: Annotated[int, between(0, MAX_WORKERS)] = 4

    def __post_init__(self):
        check_ranges(self, "data.")
        if self.mixture:
            self.source_configs()  # validates every source
            return
        if self.source not in SOURCES:
            raise UserError(f"data.source={self.source!r} is unknown: use one of {', '.join(SOURCES)}")
        layout = self.scene_layout  # validates the scene options
        if self.source == "shapes" and self.layout == "free":
            layout.check_canvas(self.resolution, self.resolution)
        if self.source != "shapes" and not self.path:
            instead = "; without data, train on the built-in scenes with --config=shapes"
            raise UserError(
                f"data.path is empty: give --config.data.path={_PATHS[self.source]}, see docs/data.md"
                + ("" if self.source == "llava" else instead)
            )
        if self.held_out_shards and self.source not in _SHARDED:
            raise UserError(
                f"data.held_out_shards={self.held_out_shards} must be 0 unless data.source='tar' or 'parquet': "
                "give --config.data.held_out_shards=0"
            )
        if self.source == "shapes" and (self.min_aesthetic is not None or self.min_side > self.resolution):
            raise UserError(
                f"data.source='shapes' has no aesthetic scores and only images of {self.resolution} px: leave out "
                f"data.min_aesthetic (now {self.min_aesthetic}) and data.min_side (now {self.min_side})"
            )
        if self.sequential and self.source not in _SHARDED:
            raise UserError(
                f"data.sequential requires data.source='tar' or 'parquet', not {self.source!r}, which has random "
                "access: give --config.data.sequential=False"
            )
        self.chooser(0.0)  # validates the caption options

    @property
    def scene_layout(self) -> SceneLayout:
        """Scene options of the "shapes" source."""
        return SceneLayout(self.layout, self.object_shares, self.object_scale, self.overlaps)

    @property
    def holds_out(self) -> bool:
        """True if some samples are held out from training."""
        return any(config.source == "shapes" or config.held_out_shards > 0 for config in self.source_configs().values())

    def source_configs(self) -> dict[str, "DataConfig"]:
        """Returns the config of each source of the mixture, by name; without a mixture, {"data": self}.

        Raises:
          UserError: an entry of the mixture is invalid, or only some sources have a weight.
        """
        if not self.mixture:
            return {"data": self}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        source_configs = {}
        for name, changes in self.mixture.items():
            where = f"data.mixture.{name}"
            if not isinstance(changes, Mapping):
                raise UserError(f"config key {where} is {changes!r:.80}: it must be of type dict")
            for key in changes:
                if key not in PER_SOURCE:
                    raise UserError(f"config key {where}.{key} is unknown; known are {', '.join(PER_SOURCE)}")
            try:
                source_configs[name] = build(DataConfig, {**shared, "mixture": None, **changes}, where)
            except UserError as error:
                field = rf"--config\.data\.(?=(?:{'|'.join(PER_SOURCE)})\b)"
                raise UserError(re.sub(field, f"--config.{where}.", str(error))) from error
        given = [config.weight is not None for config in source_configs.values()]
        if any(given) and not all(given):
            raise UserError("data.mixture: give every source a weight above 0, or none of them")
        return source_configs

    def buckets(self, size_multiple: int) -> tuple[Bucket, ...]:
        """Returns the aspect-ratio buckets, by ascending aspect; see `make_buckets`.

        Args:
          size_multiple: number that divides both sides of every image, in pixels (VAE down-sampling times patch size).

        Raises:
          UserError: `bucket_multiple` cannot be used (the message lists the values that can), or no bucket fits.
        """
        multiple = self.bucket_multiple or size_multiple
        sizes = {
            size: make_buckets(self.resolution, size, self.max_aspect)
            for size in range(size_multiple, self.resolution + 1, size_multiple)
            if self.resolution % size == 0 and 1 <= self.max_aspect <= (self.resolution // size) ** 2
        }
        if not sizes:
            return make_buckets(self.resolution, size_multiple, self.max_aspect)  # raises the UserError
        if multiple not in sizes:
            choices = ", ".join(
                f"{size} ({len(buckets)} bucket{'s' * (len(buckets) > 1)})" for size, buckets in sizes.items()
            )
            raise UserError(
                f"data.bucket_multiple={multiple} does not work with data.resolution={self.resolution}, "
                f"data.max_aspect={self.max_aspect:g} and cells of {size_multiple} px: use one of {choices}"
            )
        return sizes[multiple]

    def weights(self) -> list[float] | None:
        """Returns the weight of each source of the mixture; None without a mixture or without weights."""
        weights = [config.weight for config in self.source_configs().values()]
        return None if weights[0] is None or not self.mixture else weights

    def chooser(self, dropout: float, join: bool = False) -> CaptionChooser:
        """Returns the caption chooser of this source; see `CaptionChooser` for the arguments."""
        # Precomputed captions already include their template.
        template = "" if self.source == "precomputed" else self.class_template.replace("{}", "{class}")
        fields = self.captions
        if fields is None and self.source not in ("shapes", "precomputed", "llava"):
            fields = dict.fromkeys(USUAL_FIELDS, 1.0)
        return CaptionChooser(fields, dropout, {"class": template} if template else {}, join)


_PATHS = {
    "tar": "FOLDER_OF_TAR_SHARDS",
    "parquet": "FOLDER_OF_PARQUET_FILES",
    "array_record": "FOLDER_OF_ARRAY_RECORD_FILES",
    "tfds": "NAME_OF_THE_DATA_SET",
    "folder": "FOLDER_OF_IMAGES",
    "precomputed": "FOLDER_OF_LATENTS",
    "llava": "FILE_OF_CONVERSATIONS",
}
