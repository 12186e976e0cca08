"""A config and a workdir -> the whole run: what has no weights yet is trained first, then LI-DiT, then it is judged.

A workdir describes itself:

    config.json            the config of the run
    encoders/NAME/         an LLM trained by the run, in Hugging Face's format (else: where its `weights` point)
    vae/                   a VAE trained by the run, in diffusers' format (likewise)
    training/PART/         checkpoints, metrics.jsonl, TensorBoard events, samples/ of each part that was trained
    grid.png, scores.json  what the run drew for held-out prompts at its end, where its data can be checked
    reconstruction.png, reconstruction.json   how well the VAE gives pictures back, where the config asks for it

A config without the sections that belong to LI-DiT trains (or judges) a VAE alone.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax import tasks
from lidit_jax.checkpoint import Checkpoints, load_weights
from lidit_jax.config import build, claim_workdir, read_workdir
from lidit_jax.data.dataset import DataConfig, Dataset
from lidit_jax.diffusion.samplers import step_table
from lidit_jax.diffusion.schedules import Schedule, make_schedule
from lidit_jax.errors import UserError
from lidit_jax.evaluation import reconstruction
from lidit_jax.evaluation.reconstruction import (
    Autoencoding,
    ReconstructionEvaluation,
    evaluate_reconstruction,
    is_judged,
)
from lidit_jax.evaluation.scenes import SceneEvaluation, evaluate_scenes
from lidit_jax.metrics import Metrics
from lidit_jax.models.discriminator import PatchDiscriminator, smallest_side
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.lidit import LIDiT, LIDiTConfig, num_parameters
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.lpips import SMALLEST_SIDE
from lidit_jax.models.vae import AutoencoderKL, VAEConfig
from lidit_jax.models.vae_loss import RECONSTRUCTION_LOSSES
from lidit_jax.models.vae_tiling import smallest_tile
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, replicated
from lidit_jax.pictures import grid
from lidit_jax.pipeline import Pipeline, SampleConfig
from lidit_jax.text.encoders import tokenize
from lidit_jax.text.load_encoder import load_encoder, open_encoder
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.train import Task, TrainConfig, Trainer, TrainState, train
from lidit_jax.weights.diffusers_vae import load_vae, save_vae
from lidit_jax.weights.digest import file_digest, folder_digest
from lidit_jax.weights.folders import find_folder
from lidit_jax.weights.huggingface_llm import save_llm
from lidit_jax.weights.lpips import load_lpips
from lidit_jax.weights.safetensors_folder import read_config

logger = logging.getLogger(__name__)

LIDIT = "lidit"
SECTIONS = ("seed", "mesh", "data", "vae")  # of every config
LIDIT_SECTIONS = ("text", "encoders", "model", "diffusion", "train", "sample")  # all of them or, for a VAE alone, none
OPTIONAL_SECTIONS = ("start_from", "evaluate")
TOKENIZER_CAPTIONS = 20_000  # captions a tokenizer is trained on
STATISTICS_BATCHES = 16  # batches that the latents' mean and deviation are measured on
ENCODE = ("in_step", "ahead")
# The kinds of decoder-only LLMs that a run can train for itself, by what transformers calls them.
LLM_FAMILIES = {"llama": {"attention_bias": False}, "qwen2": {"attention_bias": True}}


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """Under `text` in the config; see `PromptTokenizer`.

    Attributes:
      encode: where the encoders run in training: "in_step", inside the train step, or "ahead", as a program of their
        own before it. The features are the same.
    """

    max_length: int
    instruction: str
    system_prompt: str = ""
    chat_template: bool = True
    encode: str = "in_step"

    def __post_init__(self):
        if self.encode not in ENCODE:
            raise UserError(f"text.encode={self.encode!r} is unknown: use one of {', '.join(ENCODE)}")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One entry under `encoders`: one from a folder (`weights`), or an LLM to train here (`family`, `model`, `train`).

    Attributes:
      weights: folder in Hugging Face's format (local, or in a bucket) or its name on the hub; "" trains an LLM on the
        run's captions.
      dtype: of its computation.
      family: "llama" or "qwen2".
      model: fields of `LLMConfig`.
      train: fields of `TrainConfig`.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    family: str = "llama"
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class PerceptualConfig:
    """Under `vae.perceptual`: the similarity of how pictures look, a term of the loss.

    Attributes:
      weights: safetensors file with the state of the lpips package's LPIPS(net="vgg"); "" leaves the term out.
      weight: of the term.
    """

    weights: str = ""
    weight: float = 1.0

    def __post_init__(self):
        _check_weight("vae.perceptual.weight", self.weight)


@dataclasses.dataclass(frozen=True)
class AdversarialConfig:
    """Under `vae.adversarial`: a discriminator's opinion, a term of the loss.

    Attributes:
      weight: of the term, times the adaptive weight; 0 leaves it out.
      start: step at which the discriminator begins to learn and to be heard.
      width, layers: see `PatchDiscriminator`.
    """

    weight: float = 0.0
    start: int = 0
    width: int = 64
    layers: int = 3

    def __post_init__(self):
        _check_weight("vae.adversarial.weight", self.weight)
        for name, least, most in (("start", 0, 2**31 - 1), ("width", 1, 1024), ("layers", 1, 8)):
            if not least <= getattr(self, name) <= most:
                raise UserError(f"vae.adversarial.{name}={getattr(self, name)} must be from {least} to {most}")


@dataclasses.dataclass(frozen=True)
class VAEPartConfig:
    """Under `vae`: a VAE from a folder in diffusers' format (`weights`), or one to train here.

    Attributes:
      model: fields of `VAEConfig`.
      train: fields of `TrainConfig`.
      reconstruction, kl_weight: of the loss, see `VAEObjective`.
      perceptual: fields of `PerceptualConfig`.
      adversarial: fields of `AdversarialConfig`.
      evaluate: fields of `ReconstructionEvaluation`; None leaves the evaluation out.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None
    reconstruction: str = "l1"
    kl_weight: float = 1e-6
    perceptual: Mapping[str, Any] | None = None
    adversarial: Mapping[str, Any] | None = None
    evaluate: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.reconstruction not in RECONSTRUCTION_LOSSES:
            raise UserError(
                f"vae.reconstruction={self.reconstruction!r}: use one of {', '.join(RECONSTRUCTION_LOSSES)}"
            )
        _check_weight("vae.kl_weight", self.kl_weight)
        self.perceptual_config(), self.adversarial_config(), self.evaluation()  # raise for what is wrong in them

    def perceptual_config(self) -> PerceptualConfig:
        return build(PerceptualConfig, self.perceptual or {}, "vae.perceptual")

    def adversarial_config(self) -> AdversarialConfig:
        return build(AdversarialConfig, self.adversarial or {}, "vae.adversarial")

    def evaluation(self) -> ReconstructionEvaluation | None:
        if self.evaluate is None:
            return None
        return build(ReconstructionEvaluation, self.evaluate, "vae.evaluate")


def _check_weight(key: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise UserError(f"{key}={value} must be a finite number of at least 0")


class Experiment:
    """The parts of one config in one workdir."""

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        known = (*SECTIONS, *LIDIT_SECTIONS, *OPTIONAL_SECTIONS)
        for key in config:
            if key not in known:
                raise UserError(f"config key {key} is unknown; known are {', '.join(known)}")
        self.has_lidit = any(section in config for section in LIDIT_SECTIONS)
        for section in (*SECTIONS, *(LIDIT_SECTIONS if self.has_lidit else ())):
            if section not in config:
                raise UserError(f"config key {section} is missing")
        self.config, self.workdir = config, workdir
        self.data = build(DataConfig, config.data, "data")
        self.vae = build(VAEPartConfig, config.vae, "vae")
        self._check_vae()
        if not self.has_lidit:
            return
        self.text = build(TextConfig, config.text, "text")
        self.encoders = {
            name: build(EncoderConfig, config.encoders[name], f"encoders.{name}") for name in config.encoders
        }
        self.model = LIDiT(build(LIDiTConfig, config.model, "model"))
        self.schedule: Schedule = make_schedule(**config.diffusion)
        self.train = build(TrainConfig, config.train, "train")
        self.sample = build(SampleConfig, config.sample, "sample")
        self._check_lidit()

    def _check_vae(self) -> None:
        """What can be known to be wrong before anything is compiled or written."""
        check_dtype("vae.dtype", self.vae.dtype)
        if not self.vae.weights:
            self._require_recipe("vae", self.vae)
            self.vae_training()
        elif not self.has_lidit and self.vae.evaluate is None:
            raise UserError("vae.weights names a VAE and vae.evaluate is missing: there is nothing to do")

    def _check_lidit(self) -> None:
        """The same of the rest."""
        if not self.encoders:
            raise UserError("encoders is empty: LI-DiT needs at least one LLM")
        step_table(self.sample.sampler, self.schedule, self.sample.steps)  # raises for a sampler that does not fit
        for name, encoder in self.encoders.items():
            check_dtype(f"encoders.{name}.dtype", encoder.dtype)
            if encoder.family not in LLM_FAMILIES:
                raise UserError(f"encoders.{name}.family={encoder.family!r}: use one of {', '.join(LLM_FAMILIES)}")
            if not encoder.weights:
                self._require_recipe(f"encoders.{name}", encoder)
                self.language_model_config(name)

    @staticmethod
    def _require_recipe(where: str, part: EncoderConfig | VAEPartConfig) -> None:
        if part.model is None or part.train is None:
            raise UserError(f"{where}.weights is empty: give --config.{where}.weights=FOLDER")

    def language_model_config(self, name: str) -> LLMConfig:
        """Of an LLM that the run trains itself."""
        encoder = self.encoders[name]
        return build(
            LLMConfig, encoder.model, f"encoders.{name}.model", **LLM_FAMILIES[encoder.family], dtype=encoder.dtype
        )

    def vae_config(self) -> VAEConfig:
        """Of a VAE that the run trains itself, or of the one that it is given.

        Raises:
          UserError: it does not take pictures of three channels, or does not go with the rest of the config.
        """
        if self.vae.weights:
            config = VAEConfig.from_dict(read_config(self.vae_folder()))
        else:
            config = build(VAEConfig, self.vae.model, "vae.model")
            if config.latents_mean or config.latents_std:
                raise UserError("vae.model: leave out latents_mean and latents_std; scaling and shift are measured")
        if (config.in_channels, config.out_channels) != (3, 3):
            raise UserError(
                f"the VAE takes {config.in_channels} and gives {config.out_channels} channels: pictures have 3, so "
                "both in_channels and out_channels must be 3"
            )
        if self.has_lidit:
            if config.latent_channels != self.model.config.latent_channels:
                raise UserError(
                    f"the VAE has {config.latent_channels} latent channels, "
                    f"model.latent_channels={self.model.config.latent_channels}: make them equal"
                )
            if self.sample.decode_tile < smallest_tile(config):
                raise UserError(
                    f"sample.decode_tile={self.sample.decode_tile} is too small for the VAE: "
                    f"use {smallest_tile(config)} or more"
                )
        return config

    def batch_size(self) -> int | None:
        """Of the training of the last part; None where a VAE is only judged."""
        if self.has_lidit:
            return self.train.batch_size
        return None if self.vae.weights else self.vae_training().batch_size

    def vae_training(self) -> TrainConfig:
        """Of a VAE that the run trains itself."""
        return build(TrainConfig, self.vae.train, "vae.train")

    def cell(self) -> int:
        """Pixels that both sides of a picture must be multiples of: a latent cell times a patch."""
        return self.vae_config().downsampling_factor * (self.model.config.patch_size if self.has_lidit else 1)

    def check_picture_sizes(self, side: int) -> None:
        """Raises UserError if the smallest side of a picture is too small for a term of the VAE's loss."""
        if self.vae.weights:
            return
        adversarial = self.vae.adversarial_config()
        needs = {}
        if self.vae.perceptual_config().weights:
            needs["vae.perceptual"] = SMALLEST_SIDE
        if adversarial.weight:
            needs["vae.adversarial"] = smallest_side(adversarial.layers)
        for name, needed in needs.items():
            if side < needed:
                raise UserError(
                    f"{name} needs pictures with sides of {needed} pixels, some have {side}: raise data.resolution"
                )

    def autoencoder(self, config: VAEConfig) -> AutoencoderKL:
        return AutoencoderKL(config, jnp.dtype(self.vae.dtype))

    def encoder_folder(self, name: str) -> epath.Path:
        weights = self.encoders[name].weights
        return find_folder(weights) if weights else self.workdir / "encoders" / name

    def vae_folder(self) -> epath.Path:
        return epath.Path(self.vae.weights or self.workdir / "vae")

    def training_folder(self, part: str) -> epath.Path:
        return self.workdir / "training" / part

    def prompt_tokenizer(self, tokenizer: Any) -> PromptTokenizer:
        text = self.text
        return PromptTokenizer(
            tokenizer, text.max_length, text.instruction, text.system_prompt, chat_template=text.chat_template
        )

    def check_encoders(self) -> None:
        """Raises UserError for what is wrong with the encoders that come from folders, short of their weights."""
        for encoder in self.encoders.values():
            if encoder.weights:
                open_encoder(encoder.weights, self.prompt_tokenizer, dtype=encoder.dtype)

    def pipeline(self, mesh: Mesh | None = None, rules: ShardingRules | None = None) -> Pipeline:
        """The frozen parts from their folders, with the model around them.

        With a mesh the encoders are cut over it by the rules, and the VAE is whole on every device; without one, all is
        on the first device.
        """
        encoders, frozen = {}, {}
        for name, encoder in self.encoders.items():
            folder = self.encoder_folder(name)
            encoders[name], frozen[name] = load_encoder(
                folder, self.prompt_tokenizer, dtype=encoder.dtype, mesh=mesh, rules=rules
            )
        vae_config, vae_params = load_vae(self.vae_folder())
        vae = self.autoencoder(vae_config)
        vae_params = jax.device_put(vae_params, replicated(mesh) if mesh else None)
        frozen = {"vae": vae_params, "encoders": frozen}
        return Pipeline(self.model, self.schedule, encoders, vae, frozen)

    def frozen_digests(self) -> dict[str, str]:
        """What the checkpoint says of the weights that are not in it."""
        digests = {f"encoders.{name}": folder_digest(self.encoder_folder(name)) for name in self.encoders}
        return digests | {"vae": folder_digest(self.vae_folder())}


def load(workdir: epath.Path, weights: str = "ema") -> tuple[Experiment, Pipeline, Any, int]:
    """From a workdir alone: (experiment, pipeline, LI-DiT's parameters, their step).

    Raises:
      UserError: if the workdir has no config or no checkpoint, or the checkpoint no such weights.
    """
    experiment = Experiment(read_workdir(workdir), workdir)
    if not experiment.has_lidit:
        raise UserError(f"{workdir} is the run of a VAE alone: there is no model in it that draws")
    params, step = load_weights(experiment.training_folder(LIDIT) / "checkpoints", weights)
    return experiment, experiment.pipeline(), params, step


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains every part that has no weights yet, LI-DiT last; then evaluates, where the data can be checked."""
    experiment = Experiment(config, workdir)
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    if experiment.has_lidit:
        experiment.check_encoders()
    dataset = Dataset(experiment.data, experiment.cell())
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
    if "evaluate" in config:
        evaluation = build(SceneEvaluation, config.evaluate, "evaluate")
        evaluate_scenes(pipeline, state.averaged, experiment.sample, evaluation, dataset, workdir)


def _run_part(
    experiment: Experiment,
    task: Task,
    config: TrainConfig,
    batches: Callable,
    mesh: Mesh,
    rules: ShardingRules,
    facts: Mapping[str, Any],
    initial_params: Any = None,
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
        checkpoints.close()
        metrics.close()


def _on_host(params: Any, mesh: Mesh) -> Any:
    """The whole of a tree that is cut over the mesh, on every host."""
    return jax.device_get(jax.device_put(params, replicated(mesh)))


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
    training = build(TrainConfig, experiment.encoders[name].train, f"encoders.{name}.train")
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

    state = _run_part(experiment, task, training, batches, mesh, rules, {"data": dataset.fingerprint})
    params = _on_host(state.params, mesh)
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
        self.evaluation = self.part.evaluation()
        self.to_train = not self.part.weights and not self._is_finished()
        to_judge = self.evaluation is not None and (self.to_train or not is_judged(experiment.workdir, self._facts()))
        self.pictures = self._pictures() if to_judge else []
        self.lpips = self._lpips() if self.to_train else None

    def run(self, mesh: Mesh, rules: ShardingRules) -> None:
        if self.to_train:
            self._train(mesh, rules)
        if self.pictures:
            self._judge(mesh, rules)

    def _is_finished(self) -> bool:
        """Whether the VAE is there, and of as many steps as the config now asks for."""
        if not self.experiment.vae_folder().exists():
            return False
        return self.experiment.has_lidit or self._steps_taken() >= self.experiment.vae_training().steps

    def _steps_taken(self) -> int:
        folder = self.experiment.training_folder("vae") / "checkpoints"
        return max((int(step.name) for step in folder.glob("*") if step.name.isdecimal()), default=0)

    def _facts(self) -> dict[str, Any]:
        """What a judgement is of."""
        return {
            "vae": folder_digest(self.experiment.vae_folder()),
            "data": self.dataset.fingerprint,
            "held_out": self.experiment.data.holds_out,
            "evaluation": dataclasses.asdict(self.evaluation),
        }

    def _pictures(self) -> list[np.ndarray]:
        dataset = self.dataset
        if self.experiment.data.holds_out:
            dataset = Dataset(self.experiment.data, self.experiment.cell(), held_out=True)
        else:
            logger.info("vae: judged on pictures of the training: none are held out (data.held_out_shards=0)")
        return dataset.pictures(self.evaluation.num_images)

    def _lpips(self) -> Any:
        """The perceptual loss's parameters; None where it is off, which the log says."""
        file = self.part.perceptual_config().weights
        if not file:
            logger.info("vae: trained without the perceptual loss (vae.perceptual.weights names no file)")
            return None
        return load_lpips(file)

    def _train(self, mesh: Mesh, rules: ShardingRules) -> None:
        experiment, training = self.experiment, self.experiment.vae_training()
        perceptual, adversarial = self.part.perceptual_config(), self.part.adversarial_config()
        model = experiment.autoencoder(experiment.vae_config())
        autoencoding = Autoencoding(model, mesh, rules)

        def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
            scores, sheet = evaluate_reconstruction(autoencoding, state.averaged["vae"], self.pictures, self.evaluation)
            return reconstruction.scalars(scores), {"reconstruction": sheet}

        critic = PatchDiscriminator(adversarial.width, adversarial.layers, model.dtype)
        task = tasks.vae_task(
            model,
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
        state = _run_part(experiment, task, training, batches, mesh, rules, facts)
        measured = itertools.islice(batches(training.steps), STATISTICS_BATCHES)
        latents = autoencoding.latent_statistics(state.averaged["vae"], measured)
        factors = {"shift_factor": latents.shift_factor, "scaling_factor": latents.scaling_factor}
        logger.info("vae: latents have %s", ", ".join(f"{name} {value:.4f}" for name, value in factors.items()))
        params = _on_host(state.averaged["vae"], mesh)
        if jax.process_index() == 0:
            folder = experiment.vae_folder()
            if folder.exists():  # of fewer steps; should this be cut short here, the checkpoint has the new one
                folder.rmtree()
            save_vae(folder, dataclasses.replace(model.config, **factors), params)
        multihost_utils.sync_global_devices("saved vae")

    def _judge(self, mesh: Mesh, rules: ShardingRules) -> None:
        """Writes how well the finished VAE, trained here or elsewhere, gives pictures back."""
        config, params = load_vae(self.experiment.vae_folder())
        autoencoding = Autoencoding(self.experiment.autoencoder(config), mesh, rules)
        params = jax.device_put(params, replicated(mesh))
        scores, sheet = evaluate_reconstruction(autoencoding, params, self.pictures, self.evaluation)
        reconstruction.report(scores, sheet, config, self._facts(), self.experiment.workdir)


def _train_lidit(
    experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules
) -> tuple[Pipeline, TrainState]:
    pipeline = experiment.pipeline(mesh, rules)
    config, how = experiment.train, experiment.sample
    prompts = dataset.captions(how.batch_size, experiment.config.seed)
    bucket = dataset.largest_bucket()

    def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        pictures = pipeline(state.averaged, prompts, range(len(prompts)), bucket.height, bucket.width, how)
        return {}, {"sample": np.asarray(grid(list(pictures), prompts))}

    task = tasks.lidit_task(
        pipeline.model,
        pipeline.schedule,
        pipeline.encoders,
        pipeline.vae,
        pipeline.frozen,
        evaluate,
        encode_in_step=experiment.text.encode == "in_step",
    )

    def batches(first: int):
        return dataset.batches(
            config.batch_size,
            experiment.config.seed,
            tokenize=lambda captions: tokenize(pipeline.encoders, captions),
            first=first,
            caption_dropout=experiment.data.caption_dropout,
        )

    facts = {"data": dataset.fingerprint, "frozen": experiment.frozen_digests()}
    state = _run_part(experiment, task, config, batches, mesh, rules, facts, initial_params=_initial_params(experiment))
    return pipeline, state


def _initial_params(experiment: Experiment) -> Any:
    """For fine-tuning: LI-DiT's averaged weights from the workdir that `start_from` names."""
    if not experiment.config.get("start_from"):
        return None
    other = epath.Path(experiment.config.start_from)
    read_workdir(other)  # says so if it is none
    params, step = load_weights(other / "training" / LIDIT / "checkpoints", "ema")
    logger.info("starting from %s, step %d", other, step)
    return params
