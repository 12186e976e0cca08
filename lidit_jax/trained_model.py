"""Loads a trained run, and generates images with it."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.checkpoint import read_provenance, require_checkpoint
from lidit_jax.checkpoint_weights import load_weights
from lidit_jax.config import read_workdir
from lidit_jax.errors import UserError
from lidit_jax.experiment import LIDIT, Experiment, checkpoint_folder
from lidit_jax.pipeline import Pipeline

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A trained LI-DiT: generates images when called.

    Attributes:
      experiment: its config, whose `data.resolution` and `sample` are the defaults.
      pipeline: the model with its frozen encoders and VAE.
      params: LI-DiT's parameters.
      step: their training step; None for an exported folder, which doesn't state it.
    """

    experiment: Experiment
    pipeline: Pipeline
    params: Any
    step: int | None = None

    def __call__(
        self,
        prompts: str | Sequence[str],
        seeds: Sequence[int] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        images_per_prompt: int = 1,
        negative_prompt: str = "",
        **sampling: Any,
    ) -> np.ndarray:
        """Generates images.

        Args:
          prompts: a prompt, or several.
          seeds: [N], one for each image; N is the number of prompts times `images_per_prompt`. None is 0, 1, ….
          height: in pixels; None is the training resolution.
          width: in pixels; None is the training resolution.
          images_per_prompt: images for each prompt.
          negative_prompt: what guidance steers away from.
          **sampling: fields of `SampleConfig` in place of the config's, such as `steps` or `guidance_scale`.

        Returns:
          uint8 [N, height, width, 3]; the images of one prompt are adjacent.

        Raises:
          UserError: if a size or sampling option does not fit the model.
          ValueError: if there is no prompt, or the number of seeds is not N.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if not prompts:
            raise ValueError("prompts is empty: give at least one")
        seeds = range(len(prompts) * images_per_prompt) if seeds is None else seeds
        options = dataclasses.replace(self.experiment.sample, **sampling)
        options = dataclasses.replace(options, batch_size=min(options.batch_size, len(seeds)))
        side = self.experiment.data.resolution
        size = height or side, width or side
        return self.pipeline(
            self.params, prompts, seeds, *size, options, images_per_prompt, negative_prompt=negative_prompt
        )


def move_weights(config: ConfigDict, encoders: Mapping[str, str], vae: str | None) -> ConfigDict:
    """Returns a run's config in which encoders and VAE have other folders.

    Args:
      config: config of the run; changed in place.
      encoders: folders of encoders by name.
      vae: folder of the VAE; None leaves it.

    Raises:
      UserError: the run has no such encoder.
    """
    if vae:
        config.vae.weights = vae
    for name, folder in encoders.items():
        if name not in config.get("encoders", {}):
            known = ", ".join(config.get("encoders", {})) or "none"
            raise UserError(f"--encoder={name}={folder}: the run has no encoder {name!r}; it has {known}")
        config.encoders[name].weights = folder
    return config


def open_run(workdir: epath.Path, encoders: Mapping[str, str] | None = None, vae: str | None = None) -> Experiment:
    """Returns the experiment of a trained run, without loading its networks; see `load` for arguments and errors."""
    experiment = Experiment(move_weights(read_workdir(workdir), encoders or {}, vae), workdir)
    if not experiment.has_lidit:
        raise UserError(
            f"{workdir} is the run of a VAE alone, without a LI-DiT to sample from: name the workdir of one that has"
        )
    require_checkpoint(checkpoint_folder(workdir, LIDIT))
    experiment.check_folders()
    return experiment


def load(
    workdir: str | epath.Path,
    weights: str = "ema",
    devices: Sequence[jax.Device] | None = None,
    encoders: Mapping[str, str] | None = None,
    vae: str | None = None,
) -> TrainedModel:
    """Loads a trained run from its workdir.

    Args:
      workdir: folder of the run.
      weights: "ema", or "params" for the weights without averaging.
      devices: devices to shard weights and images over; None uses all.
      encoders: folders of encoders, by name, that are no longer where the config says.
      vae: folder of the VAE, if it is no longer where the config says.

    Raises:
      UserError: if the workdir has no config or no checkpoint of LI-DiT, or the checkpoint has no such weights; or the
        folder of an encoder or of the VAE is missing, or has other weights than the run was trained with.
    """
    workdir = epath.Path(workdir)
    experiment = open_run(workdir, encoders, vae)
    checkpoints = checkpoint_folder(workdir, LIDIT)
    pipeline = experiment.pipeline(*experiment.sampling_mesh(devices))
    params, step = load_weights(checkpoints, weights, pipeline.abstract_params(), experiment.train.strict_restore)
    compare_frozen(experiment, checkpoints / str(step), encoders, vae)
    return TrainedModel(experiment, pipeline, params, step)


def compare_frozen(
    experiment: Experiment, checkpoint: epath.Path, encoders: Mapping[str, str] | None = None, vae: str | None = None
) -> None:
    """Compares the frozen networks with those that LI-DiT was trained with; logs a line for each one that has changed.

    Args:
      experiment: the experiment.
      checkpoint: folder of one of LI-DiT's checkpoints, which records the digests.
      encoders: folders of encoders, by name, that are no longer those of the run.
      vae: folder of the VAE, if it is no longer that of the run.

    Raises:
      UserError: if moved weights are not those that LI-DiT was trained with.
    """
    moved = {f"encoders.{name}": f"--encoder={name}={folder}" for name, folder in (encoders or {}).items()}
    if vae:
        moved["vae"] = f"--vae={vae}"
    recorded = read_provenance(checkpoint).get("frozen")
    if not isinstance(recorded, dict):  # of an early version
        return
    for key, digest in experiment.frozen_digests().items():
        if recorded.get(key, digest) == digest:
            continue
        if key in moved:
            raise UserError(
                f"{moved[key]}: the run was trained with other weights or another tokenizer; name the folder that has "
                "those"
            )
        logger.warning("%s has changed since LI-DiT was trained with it: images differ from those of the run", key)
