"""Evaluates an autoencoder: reconstruction quality, statistics of its latents, and a sheet of reconstructions."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from lidit_jax.errors import UserError
from lidit_jax.files import finite, read_json, write_json
from lidit_jax.images import grid, save_png, to_float, to_uint8
from lidit_jax.models.image_similarity import psnr, ssim
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_section import ReconstructionEvaluation
from lidit_jax.parallel.rules import ShardingRules, batch_sharding, num_batch_shards, replicated

logger = logging.getLogger(__name__)

SCORES_FILE, SHEET_FILE = "reconstruction.json", "reconstruction.png"


@flax.struct.dataclass
class LatentMoments:
    """Moments of each image's latents, as sampled from the posterior for training.

    Attributes:
      mean: float32 [B, C], mean over the image's latent positions.
      second: float32 [B, C], mean of the squares, including the posterior's variance.
      positions: float32 [B], number of latent positions.
    """

    mean: Any
    second: Any
    positions: Any


@dataclasses.dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel over many images.

    Attributes:
      mean: float64 [C].
      deviation: float64 [C].
    """

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, sums: Sequence[LatentMoments]) -> "LatentStatistics":
        """Combines the moments of several batches.

        Args:
          sums: moments of each batch, with leaves [B, …].
        """
        weights = np.concatenate([s.positions for s in sums]).astype(np.float64)  # [N]
        weights /= weights.sum()
        mean = weights @ np.concatenate([s.mean for s in sums]).astype(np.float64)
        second = weights @ np.concatenate([s.second for s in sums]).astype(np.float64)
        return cls(mean, np.sqrt(np.maximum(second - mean**2, 0.0)))

    @property
    def shift_factor(self) -> float:
        """Mean over all channels: subtracting it centres the latents."""
        return float(self.mean.mean())

    @property
    def scaling_factor(self) -> float:
        """Factor that scales the standard deviation over all channels to 1.

        Raises:
          UserError: if the latents are constant or not finite.
        """
        variance = float(np.mean(self.deviation**2 + self.mean**2) - self.mean.mean() ** 2)
        if not 0 < variance < np.inf:
            raise UserError(f"the VAE's latents have variance {variance}: it learned nothing; lower vae.kl_weight")
        return variance**-0.5


class Autoencoding:
    """Jitted functions of an autoencoder on a mesh."""

    def __init__(self, model: AutoencoderKL, mesh: Mesh, rules: ShardingRules):
        self._model, self._mesh = model, mesh
        self._batch_sharding = batch_sharding(mesh, rules)
        self._shards = num_batch_shards(mesh, rules)
        self._latent_moments = jax.jit(self._measure, out_shardings=replicated(mesh))
        self._reconstruct = jax.jit(self._measure_and_reconstruct, out_shardings=replicated(mesh))

    def latent_statistics(self, params: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> LatentStatistics:
        """Returns the statistics of the latents of training batches, of which each process has its own rows."""
        sums = []
        with jax.set_mesh(self._mesh):
            for batch in batches:
                images = jax.make_array_from_process_local_data(self._batch_sharding, batch["image"])
                sums.append(jax.device_get(self._latent_moments(params, images)))
        return LatentStatistics.of(sums)

    def reconstruct(
        self, params: Any, images: Sequence[np.ndarray], batch_size: int
    ) -> tuple[dict[str, np.ndarray], list[np.ndarray], LatentStatistics]:
        """Encodes images to the mode of the posterior and decodes it.

        Args:
          params: parameters of the autoencoder.
          images: N images, uint8 [H, W, 3] each, the same on every process. Batches have images of one size.
          batch_size: images in a batch; rounded up to a multiple of the batch shards.

        Returns:
          {"psnr": [N], "ssim": [N]}, the N reconstructions (uint8), and the statistics of the latents.
        """
        rows = -(-batch_size // self._shards) * self._shards  # the same number on every device
        indices_by_size = collections.defaultdict(list)
        for index, image in enumerate(images):
            indices_by_size[image.shape].append(index)
        scores = {name: np.zeros(len(images)) for name in ("psnr", "ssim")}
        reconstructions: list[Any] = [None] * len(images)
        sums = []
        with jax.set_mesh(self._mesh):
            for indices in indices_by_size.values():
                for start in range(0, len(indices), rows):
                    batch = indices[start : start + rows]
                    padded = np.stack([images[i] for i in batch + batch[:1] * (rows - len(batch))])
                    sharded = jax.make_array_from_callback(padded.shape, self._batch_sharding, padded.__getitem__)
                    result = jax.device_get(self._reconstruct(params, sharded))
                    result = _first_rows(result, len(batch))
                    for name, values in scores.items():
                        values[batch] = result[name]
                    for index, image in zip(batch, result["image"], strict=True):
                        reconstructions[index] = image
                    sums.append(result["latents"])
        return scores, reconstructions, LatentStatistics.of(sums)

    def _encode(self, params, images):
        return self._model.apply({"params": params}, images, method=AutoencoderKL.encode)

    def _measure(self, params, images) -> LatentMoments:
        return _latent_moments(self._encode(params, to_float(images)))

    def _measure_and_reconstruct(self, params, images):
        images = to_float(images)
        posterior = self._encode(params, images)
        decoded = self._model.apply({"params": params}, posterior.mode(), method=AutoencoderKL.decode)
        return {
            "psnr": psnr(decoded, images),
            "ssim": ssim(decoded, images),
            "image": to_uint8(decoded),
            "latents": _latent_moments(posterior),
        }


def _first_rows(tree: Any, count: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[:count], tree)


def _latent_moments(posterior) -> LatentMoments:
    mean = functools.partial(jnp.mean, axis=(1, 2))
    batch, height, width, _ = posterior.mean.shape
    second = posterior.mean**2 + jnp.exp(posterior.logvar)
    return LatentMoments(mean(posterior.mean), mean(second), jnp.full((batch,), height * width, jnp.float32))


def evaluate_reconstruction(
    autoencoding: Autoencoding, params: Any, images: Sequence[np.ndarray], evaluation: ReconstructionEvaluation
) -> tuple[dict[str, Any], np.ndarray]:
    """Scores the reconstructions of an autoencoder.

    Args:
      autoencoding: jitted functions of the autoencoder.
      params: its parameters.
      images: uint8 [H, W, 3] each, the same on every process.
      evaluation: batch size and size of the sheet.

    Returns:
      The JSON-serialisable scores, and a sheet of originals above their reconstructions, uint8 [H, W, 3]. Scores are
      "images" (their number), the means of "psnr" (decibels) and "ssim" over them, and "latent_mean" and
      "latent_deviation", lists with one number for each channel.
    """
    scores, reconstructions, latents = autoencoding.reconstruct(params, images, evaluation.batch_size)
    chosen = np.linspace(0, len(images) - 1, min(evaluation.sheet, len(images))).astype(int)
    pairs = [_stack_vertically(images[i], reconstructions[i]) for i in chosen]
    sheet = grid(pairs, [f"{scores['psnr'][i]:.1f} dB" for i in chosen], columns=8)
    return {
        "images": len(images),
        **{name: float(values.mean()) for name, values in scores.items()},
        "latent_mean": latents.mean.tolist(),
        "latent_deviation": latents.deviation.tolist(),
    }, np.asarray(sheet)


def scalars(scores: Mapping[str, Any]) -> dict[str, float]:
    """Flattens the scores to named numbers, for the log."""
    flat = {}
    for name, value in scores.items():
        if isinstance(value, list):
            flat |= {f"reconstruction/{name}_{channel:02d}": number for channel, number in enumerate(value)}
        else:
            flat[f"reconstruction/{name}"] = float(value)
    return flat


def is_evaluated(file: epath.Path, provenance: Mapping[str, Any]) -> bool:
    """Returns True if a file of scores states this provenance."""
    if not file.exists():
        return False
    try:
        scores = read_json(file)
    except ValueError:
        return False
    return isinstance(scores, dict) and all(scores.get(name) == value for name, value in provenance.items())


def report(
    scores: Mapping[str, Any], sheet: np.ndarray, config: VAEConfig, provenance: Mapping[str, Any], workdir: epath.Path
) -> None:
    """Logs the scores, and writes `reconstruction.json` and `reconstruction.png` into the workdir.

    Args:
      scores: scores of `evaluate_reconstruction`.
      sheet: its sheet, uint8 [H, W, 3].
      config: the VAE's config, whose scaling and shift are written too.
      provenance: what was evaluated, and how, JSON-serialisable.
      workdir: folder of the run.
    """
    if jax.process_index():
        return
    rows = [f"{'latent channel':>14}{'mean':>10}{'deviation':>11}"]
    for channel, (mean, deviation) in enumerate(zip(scores["latent_mean"], scores["latent_deviation"], strict=True)):
        rows.append(f"{channel:14d}{mean:10.3f}{deviation:11.3f}")
    logger.info("\n%s", "\n".join(rows))
    logger.info("vae: %d images reconstructed with %.2f dB PSNR, %.4f SSIM; %s",
                scores["images"], scores["psnr"], scores["ssim"], workdir / SHEET_FILE)  # fmt: skip
    save_png(sheet, workdir / SHEET_FILE)
    factors = {"shift_factor": config.shift_factor, "scaling_factor": config.scaling_factor}
    write_json(workdir / SCORES_FILE, finite({**scores, **factors}) | provenance)


def _stack_vertically(original: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    gap = np.full((1, original.shape[1], 3), 255, np.uint8)
    return np.concatenate([original, gap, reconstruction])
