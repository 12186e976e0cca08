"""Loads an exported folder back into JAX, for sampling or as the start of a training run."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.checkpoint_weights import check_same_model
from lidit_jax.config_fields import with_defaults
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment, check_start
from lidit_jax.export.folder import INDEX_FILE, read_folder
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.trained_model import TrainedModel
from lidit_jax.weights.diffusers_lidit import load_lidit
from lidit_jax.weights.folders import is_there

logger = logging.getLogger(__name__)


def is_exported(folder: epath.Path) -> bool:
    """Returns True if the folder is an export, and False for a workdir: `start_from` may name either."""
    return is_there(folder / INDEX_FILE)


def open_exported(folder: epath.Path) -> Experiment:
    """Returns the experiment that an exported folder describes, without loading its networks.

    Raises:
      UserError: the folder's index is missing, damaged, or of a newer format.
    """
    return Experiment(read_folder(folder), folder)


def load_exported(folder: str | epath.Path, devices: Sequence[jax.Device] | None = None) -> TrainedModel:
    """Loads an exported folder for sampling.

    Args:
      folder: exported folder, on a disk or in a bucket.
      devices: devices to sample on (see `trained_model.load`).

    Raises:
      UserError: a component is missing, damaged, or of a newer format.
    """
    folder = epath.Path(folder)
    experiment = open_exported(folder)
    mesh, rules = experiment.sampling_mesh(devices)
    pipeline = experiment.pipeline(mesh, rules)
    return TrainedModel(experiment, pipeline, load_params(folder, pipeline.abstract_params(), mesh, rules))


def load_params(folder: epath.Path, into: Any, mesh: jax.sharding.Mesh | None, rules: ShardingRules | None) -> Any:
    """Loads LI-DiT's parameters from an exported folder.

    Args:
      folder: exported folder.
      into: tree of shapes that the parameters must have.
      mesh: device mesh; None: all parameters go to the first device.
      rules: sharding rules for the mesh.

    Raises:
      UserError: the parameters do not have the shapes of `into`, or cannot be read.
    """
    _, _, params = load_lidit(folder / "transformer", mesh=mesh, rules=rules)
    check_same_model(params, into)
    return params


def start_from_exported(config: ConfigDict, folder: epath.Path) -> ConfigDict:
    """Returns a copy of a training config that starts from an exported folder.

    LI-DiT's initial weights come from the folder, and so do the encoders and the VAE unless the config names others.

    Args:
      config: training config; not modified.
      folder: exported folder.

    Raises:
      UserError: the config's model or its encoders are not those of the folder.
    """
    if "://" not in str(folder):
        folder = folder.resolve()  # the config must stay valid in another working directory
    exported = read_folder(folder)
    config = config.copy_and_resolve_references()
    for section in ("model", "encoders", "text", "diffusion"):
        if section not in config:
            raise UserError(f"--from_torch: the config has no {section}: use one that trains LI-DiT")
    if sorted(config.encoders) != sorted(exported.encoders):
        raise UserError(
            f"the config's encoders are {', '.join(config.encoders)}, those of {folder} are "
            f"{', '.join(exported.encoders)}: use the same names"
        )
    check_start(config, exported, folder)
    stated, theirs = with_defaults(config), with_defaults(exported)
    for section in ("text", "diffusion"):
        for key, value in theirs[section].items():
            if stated[section].get(key, value) != value:
                logger.warning(
                    "%s was trained with %s.%s=%r, training continues with %r",
                    folder,
                    section,
                    key,
                    value,
                    stated[section][key],
                )
    with config.unlocked():  # the config may lack these fields
        config.start_from = str(folder)
        config.vae.weights = config.vae.get("weights") or exported.vae.weights
        for name, encoder in config.encoders.items():
            encoder.weights = encoder.get("weights") or exported.encoders[name].weights
    return config
