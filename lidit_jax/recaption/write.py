"""Writes a data set anew as tar shards, with the captions and scores of models beside the texts of each sample."""

import collections
import dataclasses
import io
import json
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
import tqdm
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from lidit_jax.config import build
from lidit_jax.data.broken_count import BrokenCount
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.image_headers import read_header
from lidit_jax.data.formats.shards import Sample
from lidit_jax.data.indexed.index import MAX_PIXELS
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.data.open_dataset import open_source
from lidit_jax.data.sources import BrokenExample
from lidit_jax.errors import UserError
from lidit_jax.files import check_writable, finite, new_file, write_json
from lidit_jax.images import grid, save_png
from lidit_jax.recaption.aesthetic import AestheticScorer
from lidit_jax.recaption.captioner import Captioner
from lidit_jax.recaption.plan import WRITTEN, OutputShard, check_plan, claim, make_plan, output_shards, report
from lidit_jax.recaption.request import RecaptionRequest
from lidit_jax.score.eval_extra import require_extra

logger = logging.getLogger(__name__)

SHEET = "recaption.png"
SOURCES = ("tar", "parquet", "array_record", "tfds", "folder")
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
# Sides of the images that models see, in pixels: a JPEG is decoded at a reduced size, but no side below the first; any
# image is shrunk to the second. Models resize images to less.
ENOUGH_SIDE, LARGEST_SIDE = 1024, 2048
_SHOWN, _COLUMNS, _THUMBNAIL = 12, 4, 256  # images of the contact sheet, and their sides in pixels


def recaption(config: ConfigDict, request: RecaptionRequest, out: epath.Path, part: tuple[int, int]) -> None:
    """Writes tar shards of a config's data with captions and scores, or resumes an unfinished folder.

    Shard NNNNNN.tar has `SAMPLES_A_SHARD` samples or fewer, in the order of the data. A sample has its image as it was
    stored, its text "txt", and a json with its other texts and its metadata, the caption under `request.field` and the
    score under `data.aesthetic_key`. NNNNNN_stats.json counts what became of the samples, and recaption.png
    shows the first.

    Args:
      config: config of a training run, of which only the section `data` is used.
      request: the models.
      out: folder to write.
      part: number of this process and number of processes, each of which writes its own shards.

    Raises:
      UserError: a model or the data cannot be used, a sample has a text of the name `request.field`, or `out` belongs
        to other data or another request.
    """
    require_extra("recaption", "torch")
    if "://" in str(out):
        raise UserError(f"--out={out}: tar shards are written to a local disk; name a local folder and copy it")
    check_writable(out, f"--out={out}")
    data = _data_config(config)
    # New scores replace the filter by those that are there.
    filtered = dataclasses.replace(data, min_aesthetic=None) if request.clip else data
    source = open_source(filtered, (), held_out=False, with_captions=False)
    assert isinstance(source, IndexedSource)  # of the kinds in SOURCES
    left_out = ", ".join(f"{reason}: {count}" for reason, count in (source.broken + source.dropped).most_common())
    logger.info("%d of %d samples are read%s", len(source), source.num_samples, f" ({left_out})" if left_out else "")
    plan = make_plan(source, data, request)
    check_plan(out, plan)
    shards = output_shards(len(source))
    own = [shard for shard in shards[part[0] :: part[1]] if not (out / shard.name).exists()]
    if own:
        writer = _ShardWriter(source, request, data)
        writer.try_first(own[0])  # what is wrong with the models shows before the folder is claimed
        claim(out, plan)
        with tqdm.tqdm(total=sum(len(shard.indices) for shard in own), unit="image", desc="recaption") as bar:
            for shard in own:
                writer.write(out, shard, bar)
    report(out, shards, request, data)


def _data_config(config: ConfigDict) -> DataConfig:
    """Returns the `data` section, without what matters in training alone: held-out shards, buckets, chosen captions."""
    if "data" not in config:
        raise UserError("config key data is missing: it names the samples")
    data = build(DataConfig, config.data, "data")
    if data.mixture:
        raise UserError("data.mixture has several sources: write each by itself, and mix the new folders")
    if data.source not in SOURCES:
        raise UserError(f"data.source={data.source!r} has no stored images: use one of {', '.join(SOURCES)}")
    return dataclasses.replace(data, sequential=False, held_out_shards=0, allow_enlarging=True, captions=None)


class _Image(NamedTuple):
    """A sample, its encoded image, and the image as models see it, uint8 [H, W, 3]."""

    sample: Sample
    encoded: bytes
    pixels: np.ndarray


class _ShardWriter:
    """Loads the models and writes shards with them."""

    def __init__(self, source: IndexedSource, request: RecaptionRequest, data: DataConfig):
        self._source, self._request, self._data = source, request, data
        self._broken = BrokenCount(data.max_broken, "left out")
        self._caption = self._score = None
        if request.clip and request.aesthetic_head:
            self._score = AestheticScorer(request.clip, request.aesthetic_head)
        if request.weights:
            self._caption = Captioner(request.weights, request.question, request.max_tokens)

    def try_first(self, shard: OutputShard) -> None:
        """Runs the models on the first image of a shard.

        Raises:
          UserError: they do not fit each other, the question or the samples.
        """
        for start in shard.indices:
            [found] = _load(self._source, [start])
            if isinstance(found, _Image):
                self._new_values([found], collections.Counter())
                return

    def write(self, out: epath.Path, shard: OutputShard, bar: tqdm.tqdm) -> None:
        """Writes a shard, which gets its name once it is complete, after its statistics."""
        counts: collections.Counter[str] = collections.Counter()
        shown: list[tuple[np.ndarray, str]] = []
        with new_file(out / shard.name) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                for indices, examples in self._batches(shard):
                    bad = [(found.key, found.reason) for found in examples if isinstance(found, BrokenExample)]
                    self._broken.add(len(examples), bad)
                    counts.update(reason for _, reason in bad)
                    numbered = [
                        (i, found) for i, found in zip(indices, examples, strict=True) if isinstance(found, _Image)
                    ]
                    values = self._new_values([image for _, image in numbered], counts)
                    for (index, image), new in zip(numbered, values, strict=True):
                        if new is not None:
                            _add_sample(tar, f"{index:09}", image, new)
                            counts[WRITTEN] += 1
                            if len(shown) < _SHOWN:
                                shown.append((_thumbnail(image.pixels), self._label(image.sample, new)))
                    bar.update(len(examples))
            write_json(out / shard.statistics, dict(counts))
        if not shard.indices.start and shown:
            images, labels = zip(*shown, strict=True)
            save_png(grid(images, labels, columns=_COLUMNS, max_lines=12), out / SHEET)

    def _batches(self, shard: OutputShard) -> Iterator[tuple[range, list[_Image | BrokenExample]]]:
        """Yields the samples of a shard in batches, read and decoded ahead by threads."""
        size = self._request.batch_size
        batches = [shard.indices[start : start + size] for start in range(0, len(shard.indices), size)]
        options = grain.ReadOptions(min(self._data.num_threads, self._data.prefetch), self._data.prefetch)
        loaded = grain.MapDataset.range(len(batches)).map(lambda i: _load(self._source, batches[i]))
        return zip(batches, loaded.to_iter_dataset(options), strict=True)

    def _new_values(self, images: Sequence[_Image], counts: collections.Counter[str]) -> list[dict[str, Any] | None]:
        """Returns the score and the caption of each image by their keys; None for one whose score is too low.

        Raises:
          UserError: a sample has a text of the caption's name.
        """
        if not images:
            return []
        key, minimum, field = self._data.aesthetic_key, self._data.min_aesthetic, self._request.field
        values: list[dict[str, Any] | None] = [{} for _ in images]
        if self._score:
            for i, score in enumerate(self._score([image.pixels for image in images])):
                values[i] = {key: round(score, 4)}
                if minimum is not None and score < minimum:
                    values[i] = None
                    counts[f"{key} under {minimum:g}"] += 1
        kept = [(image, new) for image, new in zip(images, values, strict=True) if new is not None]
        if not self._caption or not kept:
            return values
        for image, _ in kept:
            if field in image.sample.captions or field in image.sample.metadata:
                raise UserError(f"sample {image.sample.key!r:.80} has a text {field!r} already: give another --field")
        for (_, new), caption in zip(kept, self._caption([image.pixels for image, _ in kept]), strict=True):
            if caption.text:
                new[field] = caption.text
            else:
                counts["empty caption"] += 1
            if not caption.complete:
                counts["caption cut off"] += 1
        return values

    def _label(self, sample: Sample, new: Mapping[str, Any]) -> str:
        score = new.get(self._data.aesthetic_key) if self._score else None
        texts = [*list(sample.captions.values())[:1], new.get(self._request.field), score and f"({score:.2f})"]
        return " → ".join(str(text) for text in texts if text)


def _load(source: IndexedSource, indices: Sequence[int]) -> list[_Image | BrokenExample]:
    found: list[_Image | BrokenExample] = []
    for sample in source.read_samples(indices):
        if isinstance(sample, BrokenExample):
            found.append(sample)
            continue
        encoded = sample.image.read()
        try:
            pixels = decoding.decode(encoded, MAX_PIXELS, (ENOUGH_SIDE, ENOUGH_SIDE))
            found.append(_Image(sample, encoded, _shrink(pixels, LARGEST_SIDE)))
        except decoding.BrokenImage as error:
            found.append(BrokenExample(sample.key, str(error)))
    return found


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Returns an image with no side above `side` pixels, uint8 [H, W, 3]."""
    if max(pixels.shape) <= side:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    return _shrink(pixels, _THUMBNAIL)


def _add_sample(tar: tarfile.TarFile, key: str, image: _Image, new: Mapping[str, Any]) -> None:
    """Adds the files of a sample to a tar: its image as it was stored, its texts, its metadata and the new values."""
    sample = image.sample
    texts = dict(sample.captions)
    txt = texts.pop("txt", None)
    metadata = {name: value for name, value in sample.metadata.items() if _is_json(value)}
    extension = EXTENSIONS[read_header(io.BytesIO(image.encoded)).format]
    files = {extension: image.encoded}
    if txt is not None:
        metadata.pop("txt", None)
        files["txt"] = txt.encode()
    values = finite({"key": sample.key} | metadata | texts | dict(new))
    files["json"] = json.dumps(values, ensure_ascii=False).encode("utf-8", "replace")
    for suffix, content in files.items():
        member = tarfile.TarInfo(f"{key}.{suffix}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int | float)
