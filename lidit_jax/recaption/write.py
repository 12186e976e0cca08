"""Writes a data set anew as tar shards, with the captions and scores of models beside the texts of each sample."""

import collections
import dataclasses
import io
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
import tqdm
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from lidit_jax.config import build
from lidit_jax.data.broken_count import BrokenCount
from lidit_jax.data.captions import is_used
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.formats import decoding
from lidit_jax.data.formats.shards import Sample, Unusable
from lidit_jax.data.indexed.index import MAX_PIXELS, IndexOptions
from lidit_jax.data.indexed.source import IndexedSource
from lidit_jax.data.open_dataset import make_filters, open_shards
from lidit_jax.data.sources import BrokenExample
from lidit_jax.errors import UserError
from lidit_jax.files import check_writable, new_file, write_json
from lidit_jax.images import grid, save_png
from lidit_jax.recaption.aesthetic import AestheticScorer
from lidit_jax.recaption.captioner import Captioner, GeneratedCaption
from lidit_jax.recaption.model_errors import OutOfMemory
from lidit_jax.recaption.plan import WRITTEN, OutputShard, check_plan, claim, make_plan, output_shards, report
from lidit_jax.recaption.request import RecaptionRequest
from lidit_jax.recaption.sample_files import sample_files
from lidit_jax.score.eval_extra import require_extra
from lidit_jax.workdir_lock import lock

logger = logging.getLogger(__name__)

SHEET = "recaption.png"
SOURCES = ("tar", "parquet", "array_record", "tfds", "folder")
# Sides of the images that models see, in pixels: a JPEG is decoded at a reduced size, but no side below the first; any
# image is shrunk to the second. Models resize images to less.
ENOUGH_SIDE, LARGEST_SIDE = 1024, 2048
# Longer strips are left out: models enlarge their short side, which can take gigabytes, or reject them.
MAX_ASPECT = 32
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
      UserError: a model or the data cannot be used, the first sample has a text of the name `request.field` (later
        ones keep theirs), or `out` belongs to other data or another request.
    """
    require_extra("recaption", "torch")
    if "://" in str(out):
        raise UserError(f"--out={out}: tar shards are written to a local disk; name a local folder and copy it")
    check_writable(out, f"--out={out}")
    data = _data_config(config)
    if request.clip and request.field == data.aesthetic_key:
        raise UserError(f"--field={request.field} is data.aesthetic_key, the name of the scores: use another name")
    if data.source == "folder" and Path(data.path).resolve() in Path(out).resolve().parents:
        raise UserError(f"--out={out} is inside data.path={data.path}, whose images are the data: use another --out")
    # New scores replace the filter by those that are there.
    filtered = dataclasses.replace(data, min_aesthetic=None) if request.clip else data
    shards = open_shards(filtered)
    first = len(shards.paths) * part[0] // part[1]  # parts that start at once begin to index at another shard
    filters = make_filters(filtered, (), with_captions=False)
    source = IndexedSource(shards, filters, IndexOptions(data.index_dir), first)
    left_out = ", ".join(f"{reason}: {count}" for reason, count in (source.broken + source.dropped).most_common())
    logger.info("%d of %d samples are read%s", len(source), source.num_samples, f" ({left_out})" if left_out else "")
    plan = make_plan(source, data, request)
    check_plan(out, plan)
    outputs = output_shards(len(source))
    own = [shard for shard in outputs[part[0] :: part[1]] if not (out / shard.name).exists()]
    if own:
        writer = _ShardWriter(source, request, data)
        writer.try_first(own[0])  # most of what can be wrong with the models shows before the folder is claimed
        claim(out, plan)
        with tqdm.tqdm(total=sum(len(shard.indices) for shard in own), unit="image", desc="recaption") as bar:
            for shard in own:
                check_plan(out, plan)  # another process may have claimed the folder at the same moment
                with lock(out / f".{shard.name}.lock", str(out / shard.name)):
                    if not (out / shard.name).exists():
                        writer.write(out, shard, bar)
    report(out, outputs, request, data)


def _data_config(config: ConfigDict) -> DataConfig:
    """Returns the `data` section without what matters in training alone: held-out shards and buckets."""
    if "data" not in config:
        raise UserError("config key data is missing: it names the samples")
    data = build(DataConfig, config.data, "data")
    if data.mixture:
        raise UserError("data.mixture has several sources: write each by itself, and mix the new folders")
    if data.source not in SOURCES:
        raise UserError(f"data.source={data.source!r} has no stored images: use one of {', '.join(SOURCES)}")
    return dataclasses.replace(data, sequential=False, held_out_shards=0, allow_enlarging=True)


class _Image(NamedTuple):
    """A sample, its encoded image, and the image as models see it, uint8 [H, W, 3]."""

    sample: Sample
    encoded: bytes
    pixels: np.ndarray


class _NewSample(NamedTuple):
    """The files of a new sample by extension, its image as models see it, and its label on the contact sheet."""

    files: dict[str, bytes]
    pixels: np.ndarray
    label: str


class _ShardWriter:
    """Loads the models and writes shards with them."""

    def __init__(self, source: IndexedSource, request: RecaptionRequest, data: DataConfig):
        import transformers

        transformers.utils.logging.set_verbosity_error()  # it would print tables of weights, and warn of unused options
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
        images = (_load(self._source, [index])[0] for index in shard.indices)
        first = next((image for image in images if isinstance(image, _Image)), None)
        if first is None:
            return
        if self._has_field(first.sample):
            field = self._request.field
            raise UserError(f"sample {first.sample.key!r:.80} has a text {field!r} already: give another --field")
        if self._score:
            self._score([first.pixels])
        if self._caption:
            self._caption([first.pixels])

    def write(self, out: epath.Path, shard: OutputShard, bar: tqdm.tqdm) -> None:
        """Writes a shard, which gets its name once it is complete, after its statistics."""
        counts: collections.Counter[str] = collections.Counter()
        shown: list[tuple[np.ndarray, str]] = []
        with new_file(out / shard.name) as temporary:
            with tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
                for indices, examples in self._batches(shard):
                    for index, new in zip(indices, self._process(examples, counts), strict=True):
                        if new is None:
                            continue
                        _add_files(tar, f"{index:09}", new.files)
                        counts[WRITTEN] += 1
                        if len(shown) < _SHOWN:
                            shown.append((_shrink(new.pixels, _THUMBNAIL), new.label))
                    bar.update(len(examples))
            if not shard.indices.start and shown:
                images, labels = zip(*shown, strict=True)
                save_png(grid(images, labels, columns=_COLUMNS, max_lines=12), out / SHEET)
            write_json(out / shard.statistics, dict(counts))

    def _batches(self, shard: OutputShard) -> Iterator[tuple[range, list[_Image | BrokenExample]]]:
        """Yields the samples of a shard in batches, read and decoded ahead by threads."""
        size = self._request.batch_size
        batches = [shard.indices[start : start + size] for start in range(0, len(shard.indices), size)]
        options = grain.ReadOptions(min(self._data.num_threads, self._data.prefetch), self._data.prefetch)
        loaded = grain.MapDataset.range(len(batches)).map(lambda i: _load(self._source, batches[i]))
        return zip(batches, loaded.to_iter_dataset(options), strict=True)

    def _process(
        self, examples: Sequence[_Image | BrokenExample], counts: collections.Counter[str]
    ) -> list[_NewSample | None]:
        """Runs the models on a batch.

        Args:
          examples: the samples.
          counts: gets the reason of each sample that is left out, and what happened to captions.

        Returns:
          The new samples; None for one that is left out.
        """
        broken = {i: example for i, example in enumerate(examples) if isinstance(example, BrokenExample)}
        images = {i: example for i, example in enumerate(examples) if isinstance(example, _Image)}
        new: dict[int, dict[str, Any]] = {i: {} for i in images}
        if self._score and images:
            self._add_scores(images, new, counts)
        if self._caption:
            self._add_captions(images, new, broken, counts)
        results: list[_NewSample | None] = [None] * len(examples)
        for i, values in new.items():
            try:
                files = sample_files(images[i].sample, images[i].encoded, values)
                results[i] = _NewSample(files, images[i].pixels, self._label(images[i].sample, values))
            except Unusable as reason:
                broken[i] = BrokenExample(images[i].sample.key, str(reason))
        self._broken.add(len(examples), [(example.key, example.reason) for example in broken.values()])
        counts.update(example.reason for example in broken.values())
        return results

    def _add_scores(
        self, images: Mapping[int, _Image], new: dict[int, dict[str, Any]], counts: collections.Counter[str]
    ) -> None:
        """Adds the scores to the new values, and removes those of images that score too low."""
        assert self._score
        key, minimum = self._data.aesthetic_key, self._data.min_aesthetic
        for i, score in zip(images, self._score([image.pixels for image in images.values()]), strict=True):
            new[i][key] = round(score, 4)
            if minimum is not None and score < minimum:
                del new[i]
                counts[f"{key} under {minimum:g}"] += 1

    def _add_captions(
        self,
        images: Mapping[int, _Image],
        new: dict[int, dict[str, Any]],
        broken: dict[int, BrokenExample],
        counts: collections.Counter[str],
    ) -> None:
        """Adds the captions to the new values, and moves images that the model fails on to the broken ones."""
        field = self._request.field
        asked = [i for i in new if not self._has_field(images[i].sample)]
        if len(asked) < len(new):
            counts[f"{field} was there already"] += len(new) - len(asked)
        for i, caption in zip(asked, self._captions([images[i].pixels for i in asked]), strict=True):
            if caption is None:
                del new[i]
                broken[i] = BrokenExample(images[i].sample.key, "the model fails on the image")
                continue
            if caption.text:
                new[i][field] = caption.text
            else:
                counts["empty caption"] += 1
            if not caption.complete:
                counts["caption cut off"] += 1

    def _captions(self, images: Sequence[np.ndarray]) -> list[GeneratedCaption | None]:
        """Returns the caption of each image; None for one on which the model fails.

        If it fails on a batch, its images are tried one by one.
        """
        assert self._caption
        if not images:
            return []
        try:
            return list(self._caption(images))
        except OutOfMemory:
            raise
        except UserError as error:
            if len(images) > 1:
                return [caption for image in images for caption in self._captions([image])]
            logger.warning("%s", error)
            return [None]

    def _has_field(self, sample: Sample) -> bool:
        return any(is_used(name, (self._request.field,)) for name in (*sample.captions, *sample.metadata))

    def _label(self, sample: Sample, new: Mapping[str, Any]) -> str:
        score = new.get(self._data.aesthetic_key) if self._score else None
        texts = [*list(sample.captions.values())[:1], new.get(self._request.field), score and f"({score:.2f})"]
        return " → ".join(text for text in texts if text)


def _load(source: IndexedSource, indices: Sequence[int]) -> list[_Image | BrokenExample]:
    found: list[_Image | BrokenExample] = []
    for sample in source.read_samples(indices):
        if isinstance(sample, BrokenExample):
            found.append(sample)
            continue
        encoded = sample.image.read()
        try:
            pixels = decoding.decode(encoded, MAX_PIXELS, (ENOUGH_SIDE, ENOUGH_SIDE))
        except decoding.BrokenImage as error:
            found.append(BrokenExample(sample.key, str(error)))
            continue
        height, width, _ = pixels.shape
        if max(height, width) > MAX_ASPECT * min(height, width):
            found.append(BrokenExample(sample.key, f"aspect over {MAX_ASPECT}"))
        else:
            found.append(_Image(sample, encoded, _shrink(pixels, LARGEST_SIDE)))
    return found


def _shrink(pixels: np.ndarray, side: int) -> np.ndarray:
    """Returns an image with no side above `side` pixels, uint8 [H, W, 3]."""
    if max(pixels.shape) <= side:
        return pixels
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _add_files(tar: tarfile.TarFile, key: str, files: Mapping[str, bytes]) -> None:
    for extension, content in files.items():
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
