"""The way back from a folder for diffusers: to draw with it, or to train on from it."""

import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.checkpoint import check_same_model
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment, check_start
from lidit_jax.export.folder import INDEX_FILE, read_folder
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.pipeline import Pipeline
from lidit_jax.weights.folders import is_there
from lidit_jax.weights.torch_lidit import load_lidit

logger = logging.getLogger(__name__)


def is_exported(folder: epath.Path) -> bool:
    """Whether `start_from` names such a folder, not a workdir."""
    return is_there(folder / INDEX_FILE)


def load_exported(folder: epath.Path, devices: Sequence[jax.Device] = ()) -> tuple[Experiment, Pipeline, Any]:
    """(experiment, pipeline, LI-DiT's parameters) of the folder alone; arguments as of `experiment.load`.

    Raises:
      UserError: a part is missing, damaged, or of a newer format.
    """
    experiment = Experiment(read_folder(folder), folder)
    mesh, rules = experiment.drawing_mesh(devices)
    pipeline = experiment.pipeline(mesh, rules)
    return experiment, pipeline, load_params(folder, pipeline.abstract_params(), mesh, rules)


def load_params(folder: epath.Path, into: Any, mesh: jax.sharding.Mesh | None, rules: ShardingRules | None) -> Any:
    """LI-DiT's parameters, placed over the mesh by the rules.

    Raises:
      UserError: they are not those of the model that is wanted, `into`.
    """
    _, _, params = load_lidit(folder / "transformer", mesh=mesh, rules=rules)
    check_same_model(params, into)
    return params


def start_from_exported(config: ConfigDict, folder: epath.Path) -> ConfigDict:
    """The config, told to begin with the folder's LI-DiT, between the folder's encoders and VAE unless it names others.

    Raises:
      UserError: its model or its encoders are not the folder's.
    """
    if "://" not in str(folder):
        folder = folder.resolve()  # the workdir's config must mean the same from anywhere
    theirs = read_folder(folder)
    config = config.copy_and_resolve_references()
    for section in ("model", "encoders", "text", "diffusion"):
        if section not in config:
            raise UserError(f"--from_torch: the config has no {section}: name one that trains LI-DiT")
    if sorted(config.encoders) != sorted(theirs.encoders):
        raise UserError(
            f"the config's encoders are {', '.join(config.encoders)}, those of {folder} are "
            f"{', '.join(theirs.encoders)}: use the same names"
        )
    check_start(config, theirs, folder)
    for section in ("text", "diffusion"):
        for key, value in theirs[section].items():
            if config[section].get(key, value) != value:
                logger.warning(
                    "%s was trained with %s.%s=%r, goes on with %r", folder, section, key, value, config[section][key]
                )
    config.start_from = str(folder)
    with config.unlocked():  # `weights` may be left out of a config
        config.vae.weights = config.vae.get("weights") or theirs.vae.weights
        for name, encoder in config.encoders.items():
            encoder.weights = encoder.get("weights") or theirs.encoders[name].weights
    return config
