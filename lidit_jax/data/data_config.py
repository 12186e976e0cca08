"""The `data` section of a config."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lidit_jax.config import build
from lidit_jax.data.buckets import Bucket, make_buckets
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.shapes.layout import SceneLayout
from lidit_jax.errors import UserError

SOURCES = ("shapes", "tar", "array_record", "tfds", "folder", "precomputed")
# What an entry of a mixture may set for itself.
PER_SOURCE = (
    *("source", "path", "split", "data_dir", "image_key", "class_names", "num_examples", "held_out_shards", "features"),
    *("index_dir", "weight", "captions", "class_template", "min_aesthetic", "aesthetic_key", "min_side"),
    *("drop_aspect_over", "drop_low_quality_captions"),
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Under `data` in the config.

    Attributes:
      source: "shapes" (built in), "tar" (img2dataset / webdataset shards), "array_record" (of tf.train.Example), "tfds"
        (a TensorFlow data set), "folder" (pictures with a captions file, or in a folder for each class) or
        "precomputed" (latents that `python -m lidit_jax.precompute` wrote).
      path: where it is: a folder, a file, a glob, a brace range, on a disk or (tar) wherever fsspec reaches; of "tfds"
        the data set's name.
      mixture: name -> what differs from this section for one of several sources, `weight` and what `PER_SOURCE` lists.
      weight: in a mixture, this source's share of the pictures, in any unit; None for all: as many as they have.
      split, data_dir: of "tfds".
      image_key: of "tfds" and "array_record", the feature with the picture; "": the only one, "image".
      class_names: file with a class's name a line, for classes that are numbers.
      features: of "precomputed", whether the prompts' features are used, where the folder has them.
      num_examples: of "shapes".
      layout: of "shapes", "quadrants" (up to 4 objects, each in its part of the image) or "free" (up to 6, anywhere).
      object_shares: of "shapes", how often scenes have 1, 2, … objects, in any unit; None: the layout's own.
      object_scale: of layout "free", factor on the objects' sizes: 1 is made for 64 px, less for more pixels.
      overlaps: of layout "free", share of the scenes of two or more objects where one partly hides another.
      held_out_shards: of "tar", how many of the last shards are kept from training, for evaluation. Of "shapes" nothing
        need be kept: its held-out scenes are others than any training's.
      index_dir: where the shards' indexes are kept; "": each beside its shard.
      sequential: of "tar": read the shards from end to end, without indexes. It starts at once, and reads every byte
        once an epoch; but it shuffles within buffers alone, and counts what is left out only as it meets it.
      streams: of sequential reading, how many parts the shards are dealt out to; each has its rows of every batch.
        They divide the batch, and the hosts divide them. 0: the most that divide the batch, up to 256 and a shard each.
      shuffle_buffer: of sequential reading, samples that wait in memory, on all hosts together; 0: four batches of
        every group.
      resolution: side in pixels of a square picture; groups of other aspect ratios have about the same area.
      max_aspect: longest side over shortest of the buckets; 1 makes all images square.
      bucket_multiple: pixels that both sides of every bucket are a multiple of; larger values give fewer buckets, and
        so fewer shapes to compile. A multiple of the cell (VAE down-sampling times patch size) that divides
        `resolution`; 0: the cell itself, which gives the most buckets.
      allow_enlarging: False drops pictures that are smaller than their group.
      captions: caption field -> how often it is drawn (original and synthetic captions mixed); None: the usual fields.
      class_template: text around the field "class", e.g. "a photo of {}"; "" for none.
      caption_dropout: probability of the empty prompt, for classifier-free guidance.
      min_aesthetic, aesthetic_key: filter on a score in the metadata; None keeps all.
      min_side: filter on the picture's shorter side in pixels; 0 keeps all.
      drop_aspect_over: filter on longest side over shortest; None keeps all.
      drop_low_quality_captions: filter on captions that are URLs, file names or lists of tags.
      max_broken: share of a thousand samples that may be broken (cut off, damaged, …) before the run stops.
      num_threads, num_workers, prefetch: of the loader; they change nothing but its speed. Sequential reading has
        threads alone.
    """

    source: str
    resolution: int
    path: str = ""
    mixture: Mapping[str, Any] | None = None
    weight: float | None = None
    split: str = "train"
    data_dir: str = ""
    image_key: str = ""
    class_names: str = ""
    features: bool = True
    num_examples: int = 1_000_000
    layout: str = "quadrants"
    object_shares: Sequence[float] | None = None
    object_scale: float = 1.0
    overlaps: float = 0.0
    held_out_shards: int = 0
    index_dir: str = ""
    sequential: bool = False
    streams: int = 0
    shuffle_buffer: int = 0
    max_aspect: float = 1.0
    bucket_multiple: int = 0
    allow_enlarging: bool = True
    captions: Mapping[str, float] | None = None
    class_template: str = ""
    caption_dropout: float = 0.1
    min_aesthetic: float | None = None
    aesthetic_key: str = "aesthetic"
    min_side: int = 0
    drop_aspect_over: float | None = None
    drop_low_quality_captions: bool = False
    max_broken: float = 0.2
    num_threads: int = 2
    num_workers: int = 0
    prefetch: int = 4

    def __post_init__(self):
        if self.mixture:
            self.parts()  # raises for what is wrong with them
            return
        if self.source not in SOURCES:
            raise UserError(f"data.source={self.source!r} is unknown: use one of {', '.join(SOURCES)}")
        layout = self.scene_layout  # raises for impossible scenes
        if self.source == "shapes" and self.layout == "free":
            layout.check_canvas(self.resolution, self.resolution)
        if self.source != "shapes" and not self.path:
            raise UserError(f"data.path is empty: give --config.data.path={_PATHS[self.source]}")
        if self.held_out_shards < 0 or (self.held_out_shards and self.source != "tar"):
            raise UserError(
                f"data.held_out_shards={self.held_out_shards} goes with data.source='tar' alone, and is 0 or more: "
                "give --config.data.held_out_shards=0"
            )
        if not 0 <= self.max_broken <= 1:
            raise UserError(f"data.max_broken={self.max_broken} is a share of the samples, 0 to 1")
        if self.source == "shapes" and (self.min_aesthetic is not None or self.min_side > self.resolution):
            raise UserError("data.source='shapes' has no scores and one size: leave min_aesthetic and min_side out")
        if self.sequential and self.source != "tar":
            raise UserError(
                f"data.sequential goes with data.source='tar', not {self.source!r}: those have random access"
            )
        for name in ("num_threads", "num_workers", "prefetch", "streams", "shuffle_buffer"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name}={getattr(self, name)} must not be negative")
        self.chooser(0.0)  # raises for impossible captions

    @property
    def scene_layout(self) -> SceneLayout:
        """Options of the scenes of "shapes"."""
        return SceneLayout(self.layout, self.object_shares, self.object_scale, self.overlaps)

    @property
    def holds_out(self) -> bool:
        """Whether there are pictures that training does not see."""
        return any(part.source == "shapes" or part.held_out_shards > 0 for part in self.parts().values())

    def parts(self) -> dict[str, "DataConfig"]:
        """The mixture's sources, each with what it shares with this section; without a mixture, this one alone."""
        if not self.mixture:
            return {"data": self}
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = {}
        for name, changes in self.mixture.items():
            where = f"data.mixture.{name}"
            if not isinstance(changes, Mapping):
                raise UserError(f"config key {where} is {changes!r:.80}: it must be of type dict")
            for key in changes:
                if key not in PER_SOURCE:
                    raise UserError(f"config key {where}.{key} is unknown; known are {', '.join(PER_SOURCE)}")
            parts[name] = build(DataConfig, {**shared, "mixture": None, **changes}, where)
        given = [part.weight is not None for part in parts.values()]
        if (
            any(given)
            and not all(given)
            or any(given)
            and not all(0 < part.weight < math.inf for part in parts.values())
        ):
            raise UserError("data.mixture: give every source a weight above 0, or none of them")
        return parts

    def buckets(self, cell: int) -> tuple[Bucket, ...]:
        """Returns the aspect-ratio buckets, by ascending aspect; see `make_buckets`.

        Args:
          cell: pixels that both sides of every image must be multiples of (VAE down-sampling times patch size).

        Raises:
          UserError: `bucket_multiple` cannot be used (the message names those that can), or nothing fits the cell.
        """
        multiple = self.bucket_multiple or cell
        sizes = {
            size: make_buckets(self.resolution, size, self.max_aspect)
            for size in range(cell, self.resolution + 1, cell)
            if self.resolution % size == 0 and 1 <= self.max_aspect <= (self.resolution // size) ** 2
        }
        if not sizes:
            return make_buckets(self.resolution, cell, self.max_aspect)  # raises: resolution or max_aspect is wrong
        if multiple not in sizes:
            choices = ", ".join(
                f"{size} ({len(buckets)} bucket{'s' * (len(buckets) > 1)})" for size, buckets in sizes.items()
            )
            raise UserError(
                f"data.bucket_multiple={multiple} does not work with data.resolution={self.resolution}, "
                f"data.max_aspect={self.max_aspect:g} and cells of {cell} px: use one of {choices}"
            )
        return sizes[multiple]

    def weights(self) -> list[float] | None:
        """Of the mixture's sources; None where none are given."""
        weights = [part.weight for part in self.parts().values()]
        return None if weights[0] is None or not self.mixture else weights

    def chooser(self, dropout: float, join: bool = False) -> CaptionChooser:
        # Precomputed captions are in their templates already.
        template = "" if self.source == "precomputed" else self.class_template.replace("{}", "{class}")
        return CaptionChooser(self.captions, dropout, {"class": template} if template else {}, join)


_PATHS = {
    "tar": "FOLDER_OF_TAR_SHARDS",
    "array_record": "FOLDER_OF_ARRAY_RECORD_FILES",
    "tfds": "NAME_OF_THE_DATA_SET",
    "folder": "FOLDER_OF_PICTURES",
    "precomputed": "FOLDER_OF_LATENTS",
}
