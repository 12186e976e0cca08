"""Runs the stages: trains every network that has no weights yet, LI-DiT last, then evaluates it."""

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.checkpoint import latest_step, require_checkpoint
from lidit_jax.config import CONFIG_FILE, TO_FILL_IN, build, claim_workdir, read_workdir
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data_report import log_data, log_prompts
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SCORES_FILE, SceneEvaluation, check_evaluation, evaluate_scenes
from lidit_jax.experiment import LIDIT, Experiment, check_start, checkpoint_folder
from lidit_jax.export.folder import read_folder
from lidit_jax.export.read import is_exported
from lidit_jax.files import check_writable, is_writable
from lidit_jax.goodput import GOODPUT_FILE, Goodput
from lidit_jax.manifest import MANIFEST_FILE
from lidit_jax.parallel.compilation_cache import COMPILED, cache_compilations
from lidit_jax.parallel.mesh import check_model, make_mesh
from lidit_jax.parallel.preemption import activity
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.parallel.watchdog import watched
from lidit_jax.stages import reconstruction
from lidit_jax.stages.language_model import train_language_model
from lidit_jax.stages.lidit import train_lidit
from lidit_jax.stages.reconstruction import is_evaluated
from lidit_jax.stages.vae import VAEStage
from lidit_jax.train_config import TrainConfig
from lidit_jax.trainer import check_batch_size
from lidit_jax.weights.digest import file_digest, folder_digest
from lidit_jax.workdir_lock import LOCK_FILE, lock

logger = logging.getLogger(__name__)


def run_stages(
    config: ConfigDict, workdir: epath.Path, keep_compiled: bool = False, started: float | None = None
) -> None:
    """Trains every network that has no weights yet, LI-DiT last, and evaluates the result if the config asks for it.

    Everything that can be checked is checked before anything is written or trained.

    Args:
      config: the config of the run.
      workdir: folder of the run.
      keep_compiled: whether to keep compiled programs in the workdir.
      started: `time.monotonic()` at the start of the command, from which its time is counted; None is now.

    Raises:
      UserError: if the config, the data or the weights are invalid or do not fit each other.
      Preempted: if SIGTERM was received; the last step is saved.
    """
    started = time.monotonic() if started is None else started
    if not (workdir / CONFIG_FILE).exists():
        check_writable(workdir, f"--workdir={workdir}")
    with activity("checking the config and the data"):
        experiment = Experiment(config, workdir)
        evaluation = build(SceneEvaluation, config.evaluate, "evaluate") if "evaluate" in config else None
        mesh, rules = make_mesh(config.mesh), ShardingRules()
        dataset = _checked_data(experiment, mesh, rules)
        if evaluation:
            check_evaluation(evaluation, experiment.data)
        vae_stage = VAEStage(experiment, dataset)
        digests = experiment.named_digests(dataset.fingerprint)
        claim = functools.partial(claim_workdir, workdir, config, digests=digests)
        claim(write=False)
    if _is_archived(experiment, vae_stage):
        claim(write=jax.process_index() == 0)
        if jax.process_index() == 0:
            logger.info("%s can't be written, and nothing is left to do\n%s", workdir, _summary(experiment))
        return
    with _lock_workdir(workdir), Goodput(workdir, time.monotonic() - started) as goodput:
        claim(write=jax.process_index() == 0)
        multihost_utils.sync_global_devices("claimed the workdir")
        with activity("sampling the data"):
            captions = log_data(experiment, dataset)
        if keep_compiled:
            cache_compilations(workdir / COMPILED)
        if experiment.has_lidit:
            _train_encoders(experiment, dataset, mesh, rules, goodput)
            with activity("sampling the prompts"):
                log_prompts(experiment, captions, experiment.encoders)
        with activity("training the VAE"):
            vae_stage.run(mesh, rules, goodput)
        del vae_stage  # frees its images and its frozen network
        if experiment.has_lidit:
            _train_lidit(experiment, dataset, mesh, rules, evaluation, goodput)
    if jax.process_index() == 0:
        logger.info("%s\n%s", goodput.summary(), _summary(experiment))


def _is_archived(experiment: Experiment, vae_stage: VAEStage) -> bool:
    """Returns True, on all hosts, if the workdir can't be written and its run is finished."""
    workdir = experiment.workdir
    is_finished = not is_writable(workdir) and vae_stage.is_done
    if experiment.has_lidit:
        taken = latest_step(checkpoint_folder(workdir, LIDIT))
        is_finished = is_finished and taken >= experiment.train.steps
        is_finished = is_finished and ("evaluate" not in experiment.config or (workdir / SCORES_FILE).exists())
    return _on_first_host(is_finished)


def _checked_data(experiment: Experiment, mesh: Mesh, rules: ShardingRules) -> Dataset:
    """Opens the data set, and checks that it, the config and the weights fit each other.

    Raises:
      UserError: if they do not.
    """
    # Before the data is opened, which can take long.
    _check_trainings(experiment, lambda training: check_batch_size(training, mesh, rules))
    if experiment.has_lidit:
        check_model(mesh, experiment.model.config.hidden_size, experiment.model.config.num_heads)
        experiment.check_encoders()
    dataset = open_dataset(experiment.data, experiment.size_multiple(), with_captions=experiment.has_lidit)
    _check_trainings(experiment, lambda training: dataset.check_batch_size(training.batch_size))
    if dataset.holds_latents:
        if not experiment.vae.weights:
            raise UserError("data of latents needs the VAE that encoded them: give --config.vae.weights=FOLDER")
        dataset.check_latents(folder_digest(experiment.vae_folder()))
        if experiment.has_lidit and dataset.stored_prompts():
            dataset.check_features(experiment.encoder_fingerprints())
    _check_start(experiment)
    experiment.check_image_sizes(dataset.smallest_side())
    return dataset


def _train_encoders(
    experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules, goodput: Goodput
) -> None:
    for name, encoder in experiment.encoders.items():
        if not encoder.weights:
            with activity(f"training the encoder {name}"):
                train_language_model(experiment, name, dataset, mesh, rules, goodput)


def _train_lidit(
    experiment: Experiment,
    dataset: Dataset,
    mesh: Mesh,
    rules: ShardingRules,
    evaluation: SceneEvaluation | None,
    goodput: Goodput,
) -> None:
    """Trains LI-DiT, and evaluates it if the config asks for it."""
    with activity("preparing to train LI-DiT"):
        pipeline, state = train_lidit(experiment, dataset, mesh, rules, goodput)
    if evaluation is None:
        return
    provenance = {"evaluated": _evaluated(experiment, evaluation)}
    if _on_first_host(is_evaluated(experiment.workdir / SCORES_FILE, provenance)):
        if jax.process_index() == 0:
            logger.info("%s has the scores of this checkpoint", experiment.workdir / SCORES_FILE)
        return
    with (
        activity("evaluating"),
        goodput.timed("evaluating"),
        watched(experiment.train.stalled_after, "evaluate") as watchdog,
    ):
        evaluate_scenes(
            *(pipeline, state.averaged, experiment.sample, evaluation, dataset, experiment.workdir),
            watchdog.beat,
            provenance,
        )


def _evaluated(experiment: Experiment, evaluation: SceneEvaluation) -> dict[str, Any]:
    """Returns what the scores depend on: the newest checkpoint, the prompts, and how images are sampled."""
    checkpoints = checkpoint_folder(experiment.workdir, LIDIT)
    step = latest_step(checkpoints)
    manifest = checkpoints / str(step) / MANIFEST_FILE
    sampling = dataclasses.asdict(experiment.sample)
    del sampling["batch_size"]  # images don't depend on it
    return {
        "step": step,
        "checkpoint": file_digest(manifest) if manifest.exists() else None,
        "evaluate": dataclasses.asdict(evaluation),
        "sample": sampling,
    }


def _on_first_host(value: bool) -> bool:
    """Returns the value of the first host on all hosts."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def _summary(experiment: Experiment) -> str:
    """Returns text on what a finished run left in its workdir, and on the commands that use it."""
    workdir = experiment.workdir
    checkpoints = checkpoint_folder(workdir, LIDIT)
    outputs = {
        str(checkpoints.relative_to(workdir)): (
            f"LI-DiT up to step {latest_step(checkpoints)}, to sample, resume and fine-tune from"
        ),
        "encoders": "the LLMs, in Hugging Face's format",
        "vae": "the VAE, in diffusers' format",
        "training": "logs, TensorBoard events and samples of each network",
        SCORES_FILE: "scores on unseen prompts",
        "grid.png": "images of unseen prompts",
        GOODPUT_FILE: "where the time went",
        reconstruction.SCORES_FILE: "scores of the VAE's reconstructions",
        reconstruction.SHEET_FILE: "the VAE's reconstructions",
    }
    found = [f"{name}: {what}" for name, what in outputs.items() if (workdir / name).exists()]
    lines = [f"finished: {workdir}", *(f"  {entry}" for entry in found)]
    if experiment.has_lidit:
        # Names in the working directory where the workdir, or the folder that it is in, can't be written.
        images = workdir / "images" if is_writable(workdir) else "images"
        exported = f"{workdir if is_writable(workdir.parent) else workdir.name}-torch"
        replace = " --overwrite" if os.path.exists(exported) else ""
        run, images, exported = (shlex.quote(str(path)) for path in (workdir, images, exported))
        lines += [
            f'sample: python -m lidit_jax.sample --workdir={run} --out={images} --prompt="…"',
            f"export to PyTorch: python -m lidit_jax.export --workdir={run} --out={exported}{replace}",
        ]
    elif not experiment.vae.weights:
        lines.append(f"train LI-DiT with this VAE: give --config.vae.weights={experiment.vae_folder()}")
    return "\n".join(lines)


@contextlib.contextmanager
def _lock_workdir(workdir: epath.Path) -> Iterator[None]:
    """Locks the workdir on the first host, for all of them."""
    if jax.process_index():
        yield
        return
    with lock(workdir / LOCK_FILE, str(workdir)):
        yield


def _check_start(experiment: Experiment) -> None:
    """Raises UserError if a new run starts from weights that do not exist, or that belong to a different model."""
    if experiment.config.get("start_from") == TO_FILL_IN:
        raise UserError(
            "this config fine-tunes, and start_from is to be filled in: give --config.start_from=DIR, a workdir or an "
            "exported folder; --config.start_from= trains from random weights"
        )
    source = epath.Path(experiment.config.get("start_from") or "")
    has_begun = experiment.has_lidit and latest_step(checkpoint_folder(experiment.workdir, LIDIT))
    if not experiment.config.get("start_from") or has_begun:
        return
    if is_exported(source):
        check_start(experiment.config, read_folder(source), source)
        return
    require_checkpoint(checkpoint_folder(source, LIDIT))
    check_start(experiment.config, read_workdir(source), source)


def _check_trainings(experiment: Experiment, check: Callable[[TrainConfig], None]) -> None:
    """Checks the training config of each network; prefixes user errors with the path of the config section."""
    for where, training in experiment.trainings().items():
        try:
            check(training)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
