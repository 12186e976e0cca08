"""Opens the data set that a config names; the only module that depends on the kind of source."""

import functools
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from lidit_jax.data import filters
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.filters import Filter
from lidit_jax.data.formats.folder_shards import FolderShards
from lidit_jax.data.formats.parquet_shards import ParquetShards
from lidit_jax.data.formats.record_shards import ArrayRecordShards, TfdsShards
from lidit_jax.data.formats.shards import CLASS_FIELD, Shards
from lidit_jax.data.formats.tar_shards import TarShards
from lidit_jax.data.indexed.dataset import IndexedDataset
from lidit_jax.data.indexed.index import IndexOptions
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.data.precomputed import PrecomputedSource
from lidit_jax.data.shapes.source import HELD_OUT_SEED, ShapesSource
from lidit_jax.data.sources import Source
from lidit_jax.data.streamed.dataset import StreamedDataset
from lidit_jax.data.streamed.sample_stream import SampleReader
from lidit_jax.errors import UserError
from lidit_jax.files import read_text, split_lines


def open_dataset(config: DataConfig, size_multiple: int, held_out: bool = False, with_captions: bool = True) -> Dataset:
    """Opens the data and examines them: filters, buckets and broken samples.

    Args:
      config: the `data` section of a config.
      size_multiple: pixels that both sides of every image must be multiples of (VAE down-sampling times patch size).
      held_out: open the samples held out from training instead of the training samples.
      with_captions: whether captions are trained on; an autoencoder does not use them.

    Raises:
      UserError: there are no data, the filters drop every sample, too many samples are broken, no sample has a caption
        field that the config names, or the resolution has no buckets (`DataConfig.buckets`).
    """
    if not config.sequential:
        return open_indexed_dataset(config, size_multiple, held_out, with_captions)
    buckets, source_configs = config.buckets(size_multiple), _used_source_configs(config, held_out)
    readers = (
        SampleReader(
            open_shards(source_config, held_out), buckets, tuple(make_filters(source_config, buckets, with_captions))
        )
        for source_config in source_configs.values()
    )
    return StreamedDataset(config, buckets, source_configs, readers, held_out, with_captions)


def open_indexed_dataset(
    config: DataConfig, size_multiple: int, held_out: bool = False, with_captions: bool = True
) -> IndexedDataset:
    """Opens the data as `open_dataset` does, with random access even if `config.sequential` is set."""
    buckets, source_configs = config.buckets(size_multiple), _used_source_configs(config, held_out)
    sources = (
        open_source(source_config, buckets, held_out, with_captions) for source_config in source_configs.values()
    )
    return IndexedDataset(config, buckets, source_configs, sources, held_out, with_captions)


def open_source(config: DataConfig, buckets: Sequence[Bucket], held_out: bool, with_captions: bool) -> Source:
    """Opens a single source, not a mixture, with random access.

    Args:
      config: config of the source, as `DataConfig.source_configs` returns it.
      buckets: the aspect-ratio buckets.
      held_out: as for `open_dataset`.
      with_captions: as for `open_dataset`.
    """
    if config.source == "shapes":
        seed = HELD_OUT_SEED if held_out else 0
        side = config.resolution
        return ShapesSource(config.num_examples, side, side, seed, layout=config.scene_layout)
    if config.source == "precomputed":
        # Image filters were applied when the latents were computed; only the caption still has to be checked.
        captions = [functools.partial(filters.no_caption, fields=config.chooser(0.0).used)] if with_captions else []
        source = PrecomputedSource(config.path, buckets, captions, config.features and with_captions)
        if with_captions and config.captions is None:
            source.check_captions()
        return source
    shards = open_shards(config, held_out)
    if isinstance(shards, ParquetShards):
        shards.warn_of_slow_access()
    # Each process begins at another shard, so that together they build every missing index once.
    first = len(shards.paths) * jax.process_index() // jax.process_count()
    chosen = make_filters(config, buckets, with_captions)
    return IndexedSource(shards, chosen, IndexOptions(config.index_dir), first)


def open_shards(config: DataConfig, held_out: bool = False) -> Shards:
    """Returns the reader of the files at `config.path`, for any source but shapes and precomputed."""
    names = _class_names(config.class_names) if config.class_names else ()
    first_held_out = -config.held_out_shards or None
    chosen = slice(first_held_out, None) if held_out else slice(first_held_out)
    if config.source == "tar":
        return TarShards(config.path, names, chosen)
    if config.source == "parquet":
        return ParquetShards(config.path, config.image_key, names, config.split, chosen)
    if config.source == "array_record":
        return ArrayRecordShards(config.path, config.image_key or "image", names)
    if config.source == "tfds":
        return TfdsShards(config.path, config.split, config.data_dir, config.image_key)
    are_classes = bool(config.class_template) or CLASS_FIELD in (config.captions or ())
    return FolderShards(config.path, names, config.split, are_classes)


def make_filters(config: DataConfig, buckets: Sequence[Bucket], with_captions: bool) -> list[Filter]:
    """Returns the filters that a config selects; caption filters only if captions are trained on."""
    chosen: list[Filter] = []
    fields = config.chooser(0.0).used
    if with_captions:
        chosen.append(functools.partial(filters.no_caption, fields=fields))
    if config.min_aesthetic is not None:
        chosen.append(
            functools.partial(filters.aesthetic_score, minimum=config.min_aesthetic, key=config.aesthetic_key)
        )
    if config.min_side:
        chosen.append(functools.partial(filters.smallest_side, minimum=config.min_side))
    if config.drop_aspect_over is not None:
        chosen.append(functools.partial(filters.aspect, maximum=config.drop_aspect_over))
    if not config.allow_enlarging:
        chosen.append(functools.partial(filters.enlarging, buckets=tuple(buckets)))
    if with_captions and config.drop_low_quality_captions:
        for check in (filters.url_caption, filters.file_name_caption, filters.tag_list_caption):
            chosen.append(functools.partial(check, fields=fields))
    return chosen


def _used_source_configs(config: DataConfig, held_out: bool) -> Mapping[str, DataConfig]:
    """Returns the sources to open: all of them, or those with held-out samples."""
    return {
        name: source_config
        for name, source_config in config.source_configs().items()
        if source_config.holds_out or not held_out
    }


@functools.lru_cache(maxsize=8)
def _class_names(file: str) -> tuple[str, ...]:
    try:
        text = read_text(epath.Path(file), f"data.class_names={file!r}", "a list of class names")
        names = tuple(line.strip() for line in split_lines(text))
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise UserError(f"data.class_names={file!r} cannot be read: {error}") from error
    while names and not names[-1]:
        names = names[:-1]
    if not names or not all(names):
        raise UserError(f"data.class_names={file!r}: write one class name per line, in the order of the numbers")
    return names
