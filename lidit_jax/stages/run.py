"""The stages of a run: what has no weights yet is trained, LI-DiT last; then it is judged."""

import contextlib
import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.checkpoint import Checkpoints, load_weights, require_checkpoint, steps_taken
from lidit_jax.config import build, claim_workdir, read_workdir
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError
from lidit_jax.evaluate.scenes import SceneEvaluation, check_evaluation, evaluate_scenes
from lidit_jax.experiment import LIDIT, Experiment, check_start
from lidit_jax.export.folder import read_folder
from lidit_jax.export.read import is_exported, load_params
from lidit_jax.metrics import Metrics
from lidit_jax.models.discriminator import PatchDiscriminator
from lidit_jax.models.lidit import num_parameters
from lidit_jax.parallel.mesh import check_model, make_mesh
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.parallel.watchdog import watched
from lidit_jax.pictures import grid
from lidit_jax.pipeline import Pipeline
from lidit_jax.stages import reconstruction
from lidit_jax.stages import vae as tasks
from lidit_jax.stages.reconstruction import Autoencoding, evaluate_reconstruction, is_judged
from lidit_jax.text.encoders import StoredEncoding, tokenize
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.train import Task, TrainConfig, Trainer, TrainState, check_batch_size, train
from lidit_jax.weights.diffusers_vae import load_vae, save_vae
from lidit_jax.weights.digest import file_digest, folder_digest
from lidit_jax.weights.huggingface_llm import save_llm
from lidit_jax.weights.lpips import load_lpips

logger = logging.getLogger(__name__)

TOKENIZER_CAPTIONS = 20_000  # captions a tokenizer is trained on
STATISTICS_BATCHES = 16  # batches that the latents' mean and deviation are measured on


def run_stages(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains every part that has no weights yet, LI-DiT last; then evaluates, where the data can be checked."""
    experiment = Experiment(config, workdir)
    evaluation = build(SceneEvaluation, config.evaluate, "evaluate") if "evaluate" in config else None
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    for where, training in experiment.trainings().items():
        with _said_of(where):
            check_batch_size(training, mesh)
    if experiment.has_lidit:
        check_model(mesh, experiment.model.config.hidden_size, experiment.model.config.num_heads)
        experiment.check_encoders()
    dataset = open_dataset(experiment.data, experiment.cell(), with_captions=experiment.has_lidit)
    if evaluation:
        check_evaluation(evaluation, experiment.data)
    for where, training in experiment.trainings().items():
        with _said_of(where):
            dataset.check_batch_size(training.batch_size)
    if dataset.holds_latents:
        if not experiment.vae.weights:
            raise UserError("latents go with the VAE that made them: give --config.vae.weights=FOLDER")
        dataset.check_latents(folder_digest(experiment.vae_folder()))
        if experiment.has_lidit and dataset.stored_prompts():
            dataset.check_features(experiment.stored_encoders())
    _check_start(experiment)
    experiment.check_picture_sizes(dataset.smallest_side())
    vae_stage = _VAEStage(experiment, dataset)
    claim_workdir(workdir, config, write=jax.process_index() == 0)
    multihost_utils.sync_global_devices("claimed the workdir")
    logger.info("%s", dataset.summary())

    for name, encoder in experiment.encoders.items() if experiment.has_lidit else ():
        if not encoder.weights:
            _train_language_model(experiment, name, dataset, mesh, rules)
    vae_stage.run(mesh, rules)
    del vae_stage  # its pictures and its frozen network have done their work
    if not experiment.has_lidit:
        return
    pipeline, state = _train_lidit(experiment, dataset, mesh, rules)
    if evaluation:
        with watched(experiment.train.stalled_after, "evaluate") as watchdog:
            evaluate_scenes(pipeline, state.averaged, experiment.sample, evaluation, dataset, workdir, watchdog.beat)


def _check_start(experiment: Experiment) -> None:
    """Raises UserError if a new run is to start from weights that are not there, or are of a model that differs."""
    other = epath.Path(experiment.config.get("start_from") or "")
    begun = experiment.has_lidit and steps_taken(experiment.training_folder(LIDIT) / "checkpoints")
    if not experiment.config.get("start_from") or begun:
        return
    if is_exported(other):
        check_start(experiment.config, read_folder(other), other)
        return
    require_checkpoint(other / "training" / LIDIT / "checkpoints")
    check_start(experiment.config, read_workdir(other), other)


@contextlib.contextmanager
def _said_of(where: str) -> Iterator[None]:
    """Errors say which part of the config they are about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def run_part(
    experiment: Experiment,
    task: Task,
    config: TrainConfig,
    batches: Callable,
    mesh: Mesh,
    rules: ShardingRules,
    facts: Mapping[str, Any],
    initial_params: Callable[[Any], Any] | None = None,
) -> TrainState:
    """One part through the one loop, in its folder of the workdir."""
    folder = experiment.training_folder(task.name)
    trainer = Trainer(task, config, mesh, rules)
    params = trainer.abstract_state().params
    for name in task.networks or (task.name,):
        count = num_parameters(params[name] if task.networks else params)
        logger.info("%s: %.2fM parameters", name, count / 1e6)
    checkpoints = Checkpoints(folder / "checkpoints", experiment.config.to_dict(), config.keep)
    metrics = Metrics(folder)
    try:
        return train(
            trainer,
            batches,
            checkpoints,
            metrics,
            seed=experiment.config.seed,
            facts=facts,
            initial_params=initial_params,
        )
    finally:
        with watched(config.stalled_after, task.name):
            checkpoints.close()
            metrics.close()


def on_host(params: Any, mesh: Mesh, stalled_after: float) -> Any:
    """The whole of a tree that is cut over the mesh, on every host."""
    # One program: leaf by leaf, hosts may gather in different orders, and wait for each other for ever.
    gather = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
    with watched(stalled_after, "gathering what was trained"):
        return jax.device_get(gather(params))


def _train_language_model(
    experiment: Experiment, name: str, dataset: Dataset, mesh: Mesh, rules: ShardingRules
) -> None:
    folder = experiment.encoder_folder(name)
    if folder.exists():
        return
    config = experiment.language_model_config(name)
    texts = [experiment.text.instruction, *dataset.captions(TOKENIZER_CAPTIONS, experiment.config.seed)]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    # Vocabularies of small data sets run out of merges; the model keeps the size that its config states.
    prompts = experiment.prompt_tokenizer(tokenizer)
    training = experiment.language_model_training(name)
    task = tasks.language_model_task(name, config, prompts)

    def batches(first: int):
        return dataset.batches(
            training.batch_size,
            experiment.config.seed,
            tokenize=lambda captions: {f"{name}/{key}": value for key, value in prompts(captions).items()},
            first=first,
            join_captions=True,
            with_images=False,
        )

    state = run_part(experiment, task, training, batches, mesh, rules, {"data": dataset.fingerprint})
    params = on_host(state.params, mesh, training.stalled_after)
    if jax.process_index() == 0:
        save_llm(folder, config, params, tokenizer)
    multihost_utils.sync_global_devices(f"saved {name}")


class _VAEStage:
    """The VAE's part of a run: trained unless it is there, judged where the config asks for it."""

    def __init__(self, experiment: Experiment, dataset: Dataset):
        """Reads what the stage needs, before anything is written.

        Raises:
          UserError: held-out pictures, or the perceptual loss's weights, cannot be used.
        """
        self.experiment, self.dataset, self.part = experiment, dataset, experiment.vae
        self.model = experiment.autoencoder(experiment.vae_config())
        self.evaluation = self.part.evaluation()
        self.to_train = not self.part.weights and not self._is_finished()
        self.lpips = self._lpips() if self.to_train else None
        self.pictures: list[np.ndarray] = []
        if self.evaluation is None:
            return
        if experiment.data.holds_out:
            self.judged_on = open_dataset(
                experiment.data, experiment.cell(), held_out=True, with_captions=experiment.has_lidit
            )
        else:
            self.judged_on = dataset
        if self.to_train or not is_judged(experiment.workdir, self._facts()):
            if not experiment.data.holds_out:
                logger.info("vae: judged on pictures of the training: none are held out (data.held_out_shards=0)")
            self.pictures = self.judged_on.pictures(self.evaluation.num_images)

    def run(self, mesh: Mesh, rules: ShardingRules) -> None:
        autoencoding = Autoencoding(self.model, mesh, rules)
        if self.to_train:
            self._train(autoencoding, mesh, rules)
        if self.pictures:
            self._judge(autoencoding, mesh)

    def _is_finished(self) -> bool:
        """Whether the VAE is there, and of as many steps as the config now asks for."""
        if not self.experiment.vae_folder().exists():
            return False
        taken = steps_taken(self.experiment.training_folder("vae") / "checkpoints")
        return self.experiment.has_lidit or taken >= self.experiment.vae_training().steps

    def _facts(self) -> dict[str, Any]:
        """What a judgement is of."""
        return {
            "vae": folder_digest(self.experiment.vae_folder()),
            "data": self.judged_on.fingerprint,
            "held_out": self.experiment.data.holds_out,
            "evaluation": dataclasses.asdict(self.evaluation),
        }

    def _lpips(self) -> Any:
        """The perceptual loss's parameters; None where it is off, which the log says."""
        file = self.part.perceptual_config().weights
        if not file:
            logger.info("vae: trained without the perceptual loss (vae.perceptual.weights names no file)")
            return None
        return load_lpips(file)

    def _train(self, autoencoding: Autoencoding, mesh: Mesh, rules: ShardingRules) -> None:
        experiment, training = self.experiment, self.experiment.vae_training()
        perceptual, adversarial = self.part.perceptual_config(), self.part.adversarial_config()

        def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            scores, sheet = evaluate_reconstruction(autoencoding, state.averaged["vae"], self.pictures, self.evaluation)
            return reconstruction.scalars(scores), {"reconstruction": sheet}

        critic = PatchDiscriminator(adversarial.width, adversarial.layers, self.model.dtype)
        task = tasks.vae_task(
            self.model,
            tasks.VAEObjective(
                self.part.reconstruction,
                self.part.kl_weight,
                perceptual.weight,
                adversarial.weight,
                adversarial.start,
            ),
            lpips=None if self.lpips is None else jax.device_put(self.lpips, replicated(mesh)),
            discriminator=critic if adversarial.weight else None,
            evaluate=evaluate if self.pictures else None,
        )

        def batches(first: int):
            return self.dataset.batches(training.batch_size, experiment.config.seed, tokenize=None, first=first)

        facts = {"data": self.dataset.fingerprint}
        if self.lpips is not None:
            facts["perceptual"] = file_digest(perceptual.weights)
        state = run_part(experiment, task, training, batches, mesh, rules, facts)
        measured = itertools.islice(batches(training.steps), STATISTICS_BATCHES)
        latents = autoencoding.latent_statistics(state.averaged["vae"], measured)
        factors = {"shift_factor": latents.shift_factor, "scaling_factor": latents.scaling_factor}
        logger.info("vae: latents have %s", ", ".join(f"{name} {value:.4f}" for name, value in factors.items()))
        params = on_host(state.averaged["vae"], mesh, training.stalled_after)
        if jax.process_index() == 0:
            folder = experiment.vae_folder()
            if folder.exists():  # of fewer steps; should this be cut short here, the checkpoint has the new one
                folder.rmtree()
            save_vae(folder, dataclasses.replace(self.model.config, **factors), params)
        multihost_utils.sync_global_devices("saved vae")

    def _judge(self, autoencoding: Autoencoding, mesh: Mesh) -> None:
        """Writes how well the finished VAE, trained here or elsewhere, gives pictures back."""
        config, params = load_vae(self.experiment.vae_folder())
        params = jax.device_put(params, replicated(mesh))
        scores, sheet = evaluate_reconstruction(autoencoding, params, self.pictures, self.evaluation)
        reconstruction.report(scores, sheet, config, self._facts(), self.experiment.workdir)


def _train_lidit(
    experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules
) -> tuple[Pipeline, TrainState]:
    config, how = experiment.train, experiment.sample
    stored = dataset.stored_prompts()
    draws = config.sample_every > 0 or "evaluate" in experiment.config
    # With stored features the encoders are there to draw alone.
    with watched(config.stalled_after, "loading the encoders"):
        pipeline = experiment.pipeline(mesh, rules, with_encoders=draws or not stored)
    prompts = dataset.captions(how.batch_size, experiment.config.seed)
    bucket = dataset.largest_bucket()

    def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        pictures = pipeline(state.averaged, prompts, range(len(prompts)), bucket.height, bucket.width, how)
        return {}, {"sample": np.asarray(grid(list(pictures), prompts))}

    encoders, frozen = pipeline.encoders, pipeline.frozen
    if stored:
        encoders = {name: StoredEncoding(of.hidden_size, of.lead) for name, of in stored.encoders.items()}
        prefixes = {name: jax.device_put(stored.prefix[name], replicated(mesh)) for name in encoders}
        frozen = {**frozen, "encoders": prefixes}
    task = tasks.lidit_task(
        pipeline.model,
        pipeline.schedule,
        encoders,
        pipeline.vae,
        frozen,
        evaluate,
        encode_in_step=bool(stored) or experiment.text.encode == "in_step",
    )

    def batches(first: int):
        return dataset.batches(
            config.batch_size,
            experiment.config.seed,
            tokenize=lambda captions: tokenize(pipeline.encoders, captions),
            first=first,
            caption_dropout=experiment.data.caption_dropout,
            with_features=stored is not None,
        )

    facts = {"data": dataset.fingerprint, "frozen": experiment.frozen_digests()}
    initial_params = _initial_params(experiment, mesh, rules)
    state = run_part(experiment, task, config, batches, mesh, rules, facts, initial_params)
    return pipeline, state


def _initial_params(experiment: Experiment, mesh: Mesh, rules: ShardingRules) -> Callable[[Any], Any] | None:
    """For fine-tuning: LI-DiT's averaged weights from the workdir, or exported folder, that `start_from` names."""
    if not experiment.config.get("start_from"):
        return None
    other = epath.Path(experiment.config.start_from)

    def load(into: Any) -> Any:
        if is_exported(other):
            logger.info("starting from %s", other)
            return load_params(other, into, mesh, rules)
        params, step = load_weights(other / "training" / LIDIT / "checkpoints", "ema", into)
        logger.info("starting from %s, step %d", other, step)
        return params

    return load
