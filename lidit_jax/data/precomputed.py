"""Latents computed ahead of training: a folder of ArrayRecord files with the moments of the VAE's posterior.

    manifest.json               how they were computed, the buckets, the files in order; written last
    plan.json                   the same facts while the folder is incomplete
    features.safetensors        only if prompts' features are stored too: the features that all prompts share
    BUCKET-NUMBER.array_record  records of one bucket, in the order of the data set
    BUCKET-NUMBER.array_record.lengths   only with features: the token counts of its captions (`caption_lengths.py`)

A record is a safetensors file: "moments" [h, w, 2C] (mean and log-variance); "features/ENCODER/FIELD" of every caption,
if features are stored (see `stored_features.py`); and "text", JSON in UTF-8 with the key of the example, its captions,
and the captions that an encoder truncated.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import tqdm
from etils import epath

from lidit_jax.data.buckets import Bucket
from lidit_jax.data.caption_lengths import CaptionLengths, TokenCounter
from lidit_jax.data.captions import CaptionChooser
from lidit_jax.data.filters import Candidate, Filter, first_reason
from lidit_jax.data.formats.record_shards import RecordReaders
from lidit_jax.data.formats.shards import Unusable, parse_json, stripped
from lidit_jax.data.sources import BrokenExample, Example, Source
from lidit_jax.data.stored_features import FEATURES, ConstantFeatures, EncoderFingerprint, load_tensors
from lidit_jax.errors import UserError
from lidit_jax.files import read_json

LENGTHS = ".lengths"  # suffix of the file with a file's token counts
FORMAT = 3  # format 1 has no features; formats 1 and 2 hold all texts of a sample, also those that are no captions
MANIFEST, PLAN = "manifest.json", "plan.json"
DTYPES = ("float16", "float32")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Describes a folder of latents.

    Attributes:
      data: fingerprint of the data set that the latents were computed from.
      vae: digest of the VAE's folder.
      dtype: dtype of the moments.
      cell: side of a latent cell in pixels (the VAE's down-sampling).
      channels: number of latent channels, C.
      buckets: the buckets' sizes in pixels.
      encoders: encoders whose features are stored, by name.
      files: (file name, index of its bucket, number of records) of each file; empty in a plan.
      left_out: number of examples left out because their image was broken.
      format: `FORMAT` of the version that wrote the folder.
    """

    data: str
    vae: str
    dtype: str
    cell: int
    channels: int
    buckets: tuple[Bucket, ...]
    encoders: Mapping[str, EncoderFingerprint] = dataclasses.field(default_factory=dict)
    files: tuple[tuple[str, int, int], ...] = ()
    left_out: int = 0
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Returns the manifest as JSON values, as `read` expects them in the file."""
        return dataclasses.asdict(self)

    @classmethod
    def read(cls, file: epath.Path) -> "Manifest":
        """Reads a manifest.

        Raises:
          UserError: the file does not exist, is not a valid manifest, or has an unknown format.
        """
        try:
            values = read_json(file)
            version = values["format"] = int(values["format"])
            if version not in range(1, FORMAT + 1):
                raise UserError(
                    f"{file}: format {version} is unknown, this version reads 1 to {FORMAT}: use the one that wrote it"
                )
            values["buckets"] = tuple(Bucket(*map(int, size)) for size in values["buckets"])
            values["files"] = tuple((str(name), int(bucket), int(count)) for name, bucket, count in values["files"])
            encoders = values.pop("encoders", {})
            values["encoders"] = {str(name): EncoderFingerprint(**facts) for name, facts in encoders.items()}
            manifest = cls(**values)
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"{file}: does not exist: create it with `python -m lidit_jax.precompute`") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise UserError(f"{file}: not what `python -m lidit_jax.precompute` writes ({error!r:.200})") from error
        valid = manifest.dtype in DTYPES
        valid &= all(type(size) is int and size >= 1 for size in (manifest.cell, manifest.channels))
        valid &= bool(manifest.buckets) and all(min(bucket) >= 1 for bucket in manifest.buckets)
        valid &= all(0 <= bucket < len(manifest.buckets) and count >= 0 for _, bucket, count in manifest.files)
        if not valid or any("/" in name or name.startswith(".") for name, _, _ in manifest.files):
            raise UserError(f"{file}: has invalid values: create it again with `python -m lidit_jax.precompute`")
        return manifest


class PrecomputedSource(Source):
    """Examples of a folder of latents, with "moments", float [h, w, 2C], instead of "image"."""

    content = "moments"

    def __init__(
        self, folder: str, buckets: Sequence[Bucket], filters: Sequence[Filter] = (), with_features: bool = True
    ):
        """Opens a folder of latents.

        Args:
          folder: path of the folder.
          buckets: buckets of the run; they must equal those that the latents were computed for.
          filters: examples that they drop count as broken.
          with_features: also return "features", {(encoder, field): [lead + n, D]}, if the folder has them.

        Raises:
          UserError: the folder is missing, incomplete or empty, a file is missing or has lost records, or the buckets
            differ.
        """
        path, self._folder = epath.Path(folder), folder
        if not (path / MANIFEST).exists() and (path / PLAN).exists():
            raise UserError(f"{folder}: incomplete: run `python -m lidit_jax.precompute` again to resume it")
        self.manifest = Manifest.read(path / MANIFEST)
        if tuple(buckets) != self.manifest.buckets:
            raise UserError(
                f"{folder}: computed for {_summary(self.manifest.buckets)}, the run has {_summary(buckets)}: use the "
                "same data.resolution, data.max_aspect and data.bucket_multiple, or compute the latents again"
            )
        self._filters = tuple(filters)
        self.encoders = self.manifest.encoders if with_features else {}
        self.constant = ConstantFeatures.read(path / FEATURES, self.encoders) if self.encoders else None
        self._readers = RecordReaders([str(path / name) for name, _, _ in self.manifest.files])
        counts = [count for _, _, count in self.manifest.files]
        for shard, count in enumerate(counts):
            found = self._readers.count(shard)
            if found != count:
                raise UserError(f"{self._readers.paths[shard]}: {found} records instead of {count}: compute them again")
        if not sum(counts):
            raise UserError(f"{folder}: holds no latents: compute them with `python -m lidit_jax.precompute`")
        self._starts = np.cumsum([0, *counts])
        bucket_of_example = np.repeat([bucket for _, bucket, _ in self.manifest.files], counts)
        self._sizes = np.array(self.manifest.buckets, np.int32)[bucket_of_example]
        self.fingerprint = f"latents of {self.manifest.data} by {self.manifest.vae} in {self.manifest.dtype}"

    def check_captions(self) -> None:
        """Raises UserError if the folder's format does not tell captions from other texts."""
        if self.manifest.format < 3:
            raise UserError(
                f"{self._folder}: of format {self.manifest.format}, which holds texts that are no captions, too: name "
                "those that are with --config.data.captions.NAME=1, or compute the latents again"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sizes(self) -> np.ndarray:
        return self._sizes

    def load(self, indices: Sequence[int], bucket: Bucket | None = None) -> list[Example | BrokenExample]:
        return [self._read(index) for index in indices]

    def describe(self, indices: Sequence[int]) -> list[Example | BrokenExample]:
        return self.load(indices)

    def caption_lengths(self, chooser: CaptionChooser, count_tokens: TokenCounter) -> CaptionLengths:
        """Returns the token counts of the stored features, or, without them, counts as `Source` does."""
        if not self.encoders:
            return super().caption_lengths(chooser, count_tokens)
        digest, counts = features_digest(self.encoders), [count for _, _, count in self.manifest.files]
        parts = []
        for shard in tqdm.tqdm(range(len(counts)), desc="counting prompt tokens", unit="file", disable=None):
            path, first = f"{self._readers.paths[shard]}{LENGTHS}", int(self._starts[shard])
            lengths = CaptionLengths.read(path, digest, counts[shard])
            if lengths is None:  # written by a version that did not store them
                examples = (self._read(index) for index in range(first, first + counts[shard]))
                features = ({} if isinstance(found, BrokenExample) else found["features"] for found in examples)
                lengths = CaptionLengths.of(tokens_of(found, self.encoders) for found in features)
                lengths.write(path, digest)
            parts.append(lengths)
        return CaptionLengths.concatenate(parts, counts)

    def _read(self, index: int) -> Example | BrokenExample:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        number = index - int(self._starts[shard])
        try:
            return self._parse(self._readers.read(shard, number), self._sizes[index])
        except (Unusable, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
            reason = str(error) if isinstance(error, Unusable) else "damaged record"
            return BrokenExample(f"{self._readers.paths[shard]}#{number}", reason)

    def _parse(self, record: bytes, size: np.ndarray) -> Example:
        tensors = load_tensors(record)
        text = parse_json(tensors["text"].tobytes())
        moments = tensors["moments"]
        shape = (*(size // self.manifest.cell).tolist(), 2 * self.manifest.channels)
        if moments.shape != shape or moments.dtype != self.manifest.dtype or not np.isfinite(moments).all():
            raise ValueError(f"moments {moments.dtype} {moments.shape}")
        if not isinstance(text["captions"], dict):
            raise ValueError("no captions")
        captions = stripped(text["captions"])
        if reason := first_reason(Candidate(captions, {}, *size.tolist()), self._filters):
            raise Unusable(reason)
        example = {"key": str(text["key"]), "captions": captions, "metadata": {}, "moments": moments}
        if not self.encoders:
            return example
        kept = [(name, field) for name in self.encoders for field in captions]
        features = {(n, field): self.encoders[n].check(tensors[f"features/{n}/{field}"]) for n, field in kept}
        return example | {"features": features, "truncated": {(name, field) for name, field in text["truncated"]}}


def _summary(buckets: Sequence[Bucket]) -> str:
    multiple = math.gcd(*(side for bucket in buckets for side in bucket))
    count = f"{len(buckets)} bucket{'s' * (len(buckets) > 1)}"
    return f"{count} from {buckets[0]} to {buckets[-1]}, multiples of {multiple} px"


def features_digest(encoders: Mapping[str, EncoderFingerprint]) -> str:
    """Returns a digest of the encoders that features were computed by, under which their token counts are stored."""
    facts = {name: dataclasses.asdict(encoder) for name, encoder in encoders.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def tokens_of(
    features: Mapping[tuple[str, str], np.ndarray], encoders: Mapping[str, EncoderFingerprint]
) -> dict[str, int]:
    """Returns the prompt tokens of each caption of an example, the largest number over all encoders.

    Args:
      features: {(encoder, caption field): [lead + n, D]}.
      encoders: the encoders.
    """
    tokens: dict[str, int] = {}
    for (name, field), array in features.items():
        tokens[field] = max(tokens.get(field, 0), len(array) - encoders[name].lead)
    return tokens


def to_record(
    key: str,
    captions: Mapping[str, str],
    moments: np.ndarray,
    features: Mapping[tuple[str, str], np.ndarray],
    truncated: Sequence[tuple[str, str]],
) -> bytes:
    """Encodes a record.

    Args:
      key: key of the example.
      captions: {field: text}.
      moments: [h, w, 2C], in the dtype of the folder.
      features: {(encoder, caption field): [lead + n, D]}.
      truncated: (encoder, caption field) of each caption that the encoder truncated.
    """
    text = json.dumps({"key": key, "captions": captions, "truncated": truncated}).encode()
    tensors = {"moments": moments, "text": np.frombuffer(text, np.uint8)}
    tensors |= {f"features/{name}/{field}": array for (name, field), array in features.items()}
    return safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
