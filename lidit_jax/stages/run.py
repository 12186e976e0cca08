"""Runs the stages: trains every network that has no weights yet, LI-DiT last, then evaluates it."""

import contextlib
from collections.abc import Iterator

import jax
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from lidit_jax.checkpoint import latest_step, require_checkpoint
from lidit_jax.config import build, claim_workdir, read_workdir
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data_report import log_data, log_prompts
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SceneEvaluation, check_evaluation, evaluate_scenes
from lidit_jax.experiment import LIDIT, Experiment, check_start
from lidit_jax.export.folder import read_folder
from lidit_jax.export.read import is_exported
from lidit_jax.parallel.mesh import check_model, make_mesh
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.parallel.watchdog import watched
from lidit_jax.stages.language_model import train_language_model
from lidit_jax.stages.lidit import train_lidit
from lidit_jax.stages.vae import VAEStage
from lidit_jax.train import check_batch_size
from lidit_jax.weights.digest import folder_digest


def run_stages(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains every network that has no weights yet, LI-DiT last, and evaluates the result if the config asks for it.

    Everything that can be checked is checked before anything is written or trained.

    Args:
      config: the config of the run.
      workdir: folder of the run.

    Raises:
      UserError: if the config, the data or the weights are invalid or do not fit each other.
      Preempted: if SIGTERM was received; the last step is saved.
    """
    experiment = Experiment(config, workdir)
    evaluation = build(SceneEvaluation, config.evaluate, "evaluate") if "evaluate" in config else None
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    for where, training in experiment.trainings().items():
        with _prefix_errors(where):
            check_batch_size(training, mesh, rules)
    if experiment.has_lidit:
        check_model(mesh, experiment.model.config.hidden_size, experiment.model.config.num_heads)
        experiment.check_encoders()
    dataset = open_dataset(experiment.data, experiment.size_multiple(), with_captions=experiment.has_lidit)
    if evaluation:
        check_evaluation(evaluation, experiment.data)
    for where, training in experiment.trainings().items():
        with _prefix_errors(where):
            dataset.check_batch_size(training.batch_size)
    if dataset.holds_latents:
        if not experiment.vae.weights:
            raise UserError("data of latents needs the VAE that encoded them: give --config.vae.weights=FOLDER")
        dataset.check_latents(folder_digest(experiment.vae_folder()))
        if experiment.has_lidit and dataset.stored_prompts():
            dataset.check_features(experiment.encoder_fingerprints())
    _check_start(experiment)
    experiment.check_image_sizes(dataset.smallest_side())
    vae_stage = VAEStage(experiment, dataset)
    claim_workdir(workdir, config, write=jax.process_index() == 0)
    multihost_utils.sync_global_devices("claimed the workdir")
    captions = log_data(experiment, dataset)

    for name, encoder in experiment.encoders.items() if experiment.has_lidit else ():
        if not encoder.weights:
            train_language_model(experiment, name, dataset, mesh, rules)
    if experiment.has_lidit:
        log_prompts(experiment, captions, experiment.encoders)
    vae_stage.run(mesh, rules)
    del vae_stage  # frees its images and its frozen network
    if not experiment.has_lidit:
        return
    pipeline, state = train_lidit(experiment, dataset, mesh, rules)
    if evaluation:
        with watched(experiment.train.stalled_after, "evaluate") as watchdog:
            evaluate_scenes(pipeline, state.averaged, experiment.sample, evaluation, dataset, workdir, watchdog.beat)


def _check_start(experiment: Experiment) -> None:
    """Raises UserError if a new run starts from weights that do not exist, or that belong to a different model."""
    source = epath.Path(experiment.config.get("start_from") or "")
    has_begun = experiment.has_lidit and latest_step(experiment.training_folder(LIDIT) / "checkpoints")
    if not experiment.config.get("start_from") or has_begun:
        return
    if is_exported(source):
        check_start(experiment.config, read_folder(source), source)
        return
    require_checkpoint(source / "training" / LIDIT / "checkpoints")
    check_start(experiment.config, read_workdir(source), source)


@contextlib.contextmanager
def _prefix_errors(where: str) -> Iterator[None]:
    """Prefixes user errors with the path of the config section that they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
