"""Computes the latents of a data set once, so that training neither decodes images nor runs the VAE encoder."""

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.data.broken_count import BrokenCount
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.caption_lengths import CaptionLengths
from lidit_jax.data.formats.array_record import array_record_module
from lidit_jax.data.formats.record_shards import RecordReaders
from lidit_jax.data.indexed.dataset import IndexedDataset
from lidit_jax.data.open_dataset import open_indexed_dataset
from lidit_jax.data.precomputed import LENGTHS, MANIFEST, PLAN, Manifest, features_digest, to_record, tokens_of
from lidit_jax.data.sources import BrokenExample
from lidit_jax.data.stored_features import FEATURES, EncoderFingerprint
from lidit_jax.errors import UserError, cannot_write
from lidit_jax.experiment import Experiment
from lidit_jax.files import check_writable, created_folder, is_unused, new_file, write_json
from lidit_jax.images import to_float
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, replicated
from lidit_jax.precompute.captions import CaptionEncoder
from lidit_jax.weights.diffusers_vae import load_vae
from lidit_jax.weights.digest import folder_digest

logger = logging.getLogger(__name__)

EXAMPLES_A_FILE = 1024


def precompute(config: ConfigDict, out: epath.Path, batch_size: int, dtype: str, with_features: bool = False) -> None:
    """Writes a folder of precomputed latents, or resumes an unfinished one; see `data/precomputed.py` for its format.

    Each process of a pod writes its own files, using its own devices.

    Args:
      config: config of the training run.
      out: folder to write.
      batch_size: images per batch of a process.
      dtype: dtype of the moments, "float16" or "float32".
      with_features: whether to store the features of every caption by every encoder, in the encoder's dtype.

    Raises:
      UserError: the config has no VAE weights, is a mixture, lacks an encoder that `with_features` needs, or has data
        that cannot be used; or `out` belongs to other data or another model.
    """
    experiment = Experiment(config, out)
    if not experiment.vae.weights:
        raise UserError("latents need a trained VAE: give --config.vae.weights=FOLDER")
    if experiment.data.mixture or experiment.data.source == "precomputed":
        raise UserError(
            "latents are computed from one source of images: precompute each source of a mixture by itself, then mix "
            "the folders (data.source='precomputed')"
        )
    if experiment.data.sequential:
        raise UserError("latents need random access to the data: give --config.data.sequential=False")
    if "://" in os.fspath(out):
        raise UserError(
            f"--out={out}: ArrayRecord files can only be written to a local disk; name a local folder and copy it"
        )
    check_writable(out, f"--out={out}")
    vae_config, params = load_vae(experiment.vae_folder())
    dataset = open_indexed_dataset(experiment.data, experiment.size_multiple(), with_captions=experiment.has_lidit)
    logger.info("%s", dataset.summary())
    if with_features and not experiment.has_lidit:
        raise UserError("--features: the config trains a VAE alone and has no text encoders; leave --features out")
    encoders = experiment.encoder_fingerprints() if with_features else {}
    plan = Manifest(
        data=dataset.fingerprint,
        vae=folder_digest(experiment.vae_folder()),
        dtype=dtype,
        cell=vae_config.downsampling_factor,
        channels=vae_config.latent_channels,
        buckets=dataset.buckets,
        encoders=encoders,
    )
    outputs = _claim(out, plan, dataset)
    if outputs is None:
        logger.info("%s: already complete", out)
        return
    mesh = make_mesh({"fsdp": -1}, jax.local_devices())
    encode = _Encoder(experiment.autoencoder(vae_config), params, mesh, batch_size, dtype)
    encode_captions = None
    if encoders:
        encode_captions = CaptionEncoder(*experiment.load_encoders(mesh, ShardingRules()), encoders, mesh, batch_size)
    if encode_captions and jax.process_index() == 0:
        encode_captions.constant().write(out / FEATURES)
    own_outputs = outputs[jax.process_index() :: jax.process_count()]
    broken = BrokenCount(experiment.data.max_broken, "left out")
    with tqdm.tqdm(total=sum(len(output.indices) for output in own_outputs), unit="image", desc="latents") as bar:
        for output in own_outputs:
            if not (out / output.name).exists():
                _write_output(out / output.name, output, dataset, encode, encode_captions, encoders, broken, bar)
            else:
                bar.update(len(output.indices))
    multihost_utils.sync_global_devices("wrote latents")
    if jax.process_index() == 0:
        _finish(out, plan, outputs)
        logger.info("train on it with --config.data.source=precomputed --config.data.path=%s", out)


@dataclasses.dataclass(frozen=True)
class _OutputFile:
    """One output file.

    Attributes:
      name: name of the file.
      bucket: index of the aspect-ratio bucket of its examples.
      indices: indices of its examples in the data set.
    """

    name: str
    bucket: int
    indices: np.ndarray


def _plan_outputs(dataset: IndexedDataset) -> list[_OutputFile]:
    """Splits a data set into output files of one bucket and up to `EXAMPLES_A_FILE` examples each."""
    outputs = []
    for bucket in range(len(dataset.buckets)):
        indices = np.flatnonzero(dataset.bucket_of_example == bucket)
        for first in range(0, len(indices), EXAMPLES_A_FILE):
            name = f"{bucket:03}-{first // EXAMPLES_A_FILE:06}.array_record"
            outputs.append(_OutputFile(name, bucket, indices[first : first + EXAMPLES_A_FILE]))
    return outputs


def _difference(field: str, before: Any, now: Any) -> str:
    """Returns text on the field of a manifest in which an existing folder differs from what is to be written."""
    if field != "encoders":
        return f"latents with {field}={before}, now {now}"
    for name in sorted({*before, *now}):
        if name not in before:
            return f"latents without the features of {name}, which --features now adds"
        if name not in now:
            return f"latents with the features of {name}, which are no longer asked for"
    changes = (
        f"features of {name} with {fact.name}={old}, now {new}"
        for name in sorted(now)
        for fact in dataclasses.fields(EncoderFingerprint)
        if (old := getattr(before[name], fact.name)) != (new := getattr(now[name], fact.name))
    )
    return next(changes)


def _claim(out: epath.Path, plan: Manifest, dataset: IndexedDataset) -> list[_OutputFile] | None:
    """Creates the output folder with its plan, or checks that an existing folder has the same plan.

    Returns:
      The files to write; None if the folder is finished.

    Raises:
      UserError: the folder has other content, which is left unchanged, or cannot be written.
    """
    for name in (MANIFEST, PLAN):
        if (out / name).exists():
            found = dataclasses.replace(Manifest.read(out / name), files=(), left_out=0)
            for field in dataclasses.fields(Manifest):
                before, now = getattr(found, field.name), getattr(plan, field.name)
                if before != now:
                    raise UserError(f"{out} holds {_difference(field.name, before, now)}: use another --out")
            if name == MANIFEST:
                return None
            return _plan_outputs(dataset)
    if not is_unused(out):
        raise UserError(f"{out} is not empty and holds no latents: use another --out")
    multihost_utils.sync_global_devices("checked the folder")
    if jax.process_index() == 0:
        try:
            with created_folder(out):
                write_json(out / PLAN, plan.to_json())
        except OSError as error:
            raise cannot_write(f"--out={out}", error) from error
    multihost_utils.sync_global_devices("claimed the folder")
    return _plan_outputs(dataset)


class _Encoder:
    """Encodes images of one size to moments of the posterior on the devices of this process."""

    def __init__(self, model: AutoencoderKL, params: Any, mesh: Mesh, batch_size: int, dtype: str):
        devices = mesh.devices.size
        self.rows = -(-batch_size // devices) * devices
        self._sharding, self._dtype = batch_sharding(mesh, ShardingRules()), dtype
        self._params = jax.device_put(params, replicated(mesh))

        def moments(params, images):
            posterior = model.apply({"params": params}, to_float(images), method=AutoencoderKL.encode)
            return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)

        self._moments = jax.jit(moments, out_shardings=self._sharding)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Encodes up to `rows` images: uint8 [N, H, W, 3] -> moments [N, h, w, 2C]."""
        padded = np.concatenate([images, np.repeat(images[:1], self.rows - len(images), axis=0)])
        moments = self._moments(self._params, jax.device_put(padded, self._sharding))
        values = np.asarray(moments)[: len(images)].astype(self._dtype)
        if not np.isfinite(values).all():
            raise UserError(f"the VAE's moments are not finite in {self._dtype}: use --dtype=float32, or another VAE")
        return values


def _write_output(
    file: epath.Path,
    output: _OutputFile,
    dataset: IndexedDataset,
    encode: _Encoder,
    encode_captions: CaptionEncoder | None,
    encoders: Mapping[str, EncoderFingerprint],
    broken: BrokenCount,
    bar: tqdm.tqdm,
) -> None:
    """Encodes the examples of one output file and writes it under its final name once it is complete.

    Args:
      file: path of the output file.
      output: the examples to write.
      dataset: the data set.
      encode: encoder of the images.
      encode_captions: encoder of the captions; None stores no features.
      encoders: fingerprints of the encoders; empty stores no features.
      broken: counter of the examples left out.
      bar: progress bar to advance.

    Raises:
      UserError: too many examples are broken, or moments or features are not finite.
    """
    chooser = dataset.config.chooser(0.0)
    tokens: list[dict[str, int]] = []
    with new_file(file) as temporary:
        writer = array_record_module().ArrayRecordWriter(os.fspath(temporary), "group_size:1")
        for examples in _examples(dataset, output, encode.rows):
            good = [example for example in examples if not isinstance(example, BrokenExample)]
            bad = [(e.key, e.reason) for e in examples if isinstance(e, BrokenExample)]
            broken.add(len(examples), bad)
            if good:
                moments = encode(np.stack([example["image"] for example in good]))
                captions = [chooser.filled(example["captions"]) for example in good]
                features = _caption_features(captions, encode_captions) if encode_captions else [({}, [])] * len(good)
                for example, texts, example_moments, example_features in zip(
                    good, captions, moments, features, strict=True
                ):
                    writer.write(to_record(example["key"], texts, example_moments, *example_features))
                    tokens.append(tokens_of(example_features[0], encoders))
            bar.update(len(examples))
        writer.close()
        if encoders:
            CaptionLengths.of(tokens).write(f"{os.fspath(file)}{LENGTHS}", features_digest(encoders))


def _caption_features(
    captions: Sequence[Mapping[str, str]], encode: CaptionEncoder
) -> list[tuple[dict[tuple[str, str], np.ndarray], list[tuple[str, str]]]]:
    """Encodes the captions of a batch of examples.

    Args:
      captions: {field: caption} of each example.
      encode: the encoders.

    Returns:
      For each example, the features by (encoder, field), and the (encoder, field) of each truncated caption.
    """
    encoded = iter(encode([text for texts in captions for text in texts.values()]))
    examples = []
    for texts in captions:
        features, truncated = {}, []
        for field in texts:
            for name, caption in next(encoded).items():
                features[name, field] = caption.features
                if caption.truncated:
                    truncated.append((name, field))
        examples.append((features, truncated))
    return examples


def _examples(dataset: IndexedDataset, output: _OutputFile, rows: int) -> Iterator[list]:
    """Iterates over batches of the file's examples, prefetched by threads."""
    bucket: Bucket = dataset.buckets[output.bucket]
    count = -(-len(output.indices) // rows)

    def load(i: int) -> list:
        return dataset.source.load(output.indices[i * rows : (i + 1) * rows].tolist(), bucket)

    threads, buffer_size = dataset.config.num_threads, dataset.config.prefetch
    options = grain.ReadOptions(min(threads, buffer_size), buffer_size)
    return iter(grain.MapDataset.range(count).map(load).to_iter_dataset(options))


def _finish(out: epath.Path, plan: Manifest, outputs: list[_OutputFile]) -> None:
    """Replaces the plan by a manifest with the number of records in each file."""
    readers = RecordReaders([os.fspath(out / output.name) for output in outputs])
    files = tuple((output.name, output.bucket, readers.count(i)) for i, output in enumerate(outputs))
    count = sum(count for _, _, count in files)
    left_out = sum(len(output.indices) for output in outputs) - count
    if not count:
        raise UserError(f"{out}: no image of the data set can be decoded; check its files")
    manifest = dataclasses.replace(plan, files=files, left_out=left_out)
    write_json(out / MANIFEST, manifest.to_json())
    (out / PLAN).unlink()
    logger.info("%s: latents of %d images%s", out, count, f", {left_out} broken ones left out" if left_out else "")
