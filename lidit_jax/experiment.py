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
from collections.abc import Callable, Mapping, Sequence
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
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.dataset import DataConfig, Dataset
from lidit_jax.diffusion.samplers import step_table
from lidit_jax.diffusion.schedules import Schedule, make_schedule
from lidit_jax.errors import UserError
from lidit_jax.evaluation import reconstruction
from lidit_jax.evaluation.reconstruction import Autoencoding, ReconstructionEvaluation, evaluate_reconstruction
from lidit_jax.evaluation.scenes import SceneEvaluation, evaluate_scenes
from lidit_jax.metrics import Metrics
from lidit_jax.models.discriminator import PatchDiscriminator, smallest_side
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.lidit import LIDiT, LIDiTConfig, num_parameters
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.lpips import SMALLEST_SIDE
from lidit_jax.models.vae import AutoencoderKL, VAEConfig
from lidit_jax.models.vae_loss import RECONSTRUCTION_LOSSES
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
        for name, least in (("weight", 0), ("start", 0), ("width", 1), ("layers", 1)):
            if getattr(self, name) < least:
                raise UserError(f"vae.adversarial.{name}={getattr(self, name)} must be at least {least}")


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
        self.perceptual_config(), self.adversarial_config(), self.evaluation()  # raise for what is wrong in them

    def perceptual_config(self) -> PerceptualConfig:
        return build(PerceptualConfig, self.perceptual or {}, "vae.perceptual")

    def adversarial_config(self) -> AdversarialConfig:
        return build(AdversarialConfig, self.adversarial or {}, "vae.adversarial")

    def evaluation(self) -> ReconstructionEvaluation | None:
        if self.evaluate is None:
            return None
        return build(ReconstructionEvaluation, self.evaluate, "vae.evaluate")


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
            self.vae_config()
            self.vae_training()

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
        """Of a VAE that the run trains itself."""
        return build(VAEConfig, self.vae.model, "vae.model")

    def vae_training(self) -> TrainConfig:
        """Of a VAE that the run trains itself."""
        return build(TrainConfig, self.vae.train, "vae.train")

    def cell(self) -> int:
        """Pixels that both sides of a picture must be multiples of: a latent cell times a patch."""
        vae = VAEConfig.from_dict(read_config(self.vae_folder())) if self.vae.weights else self.vae_config()
        return vae.downsampling_factor * (self.model.config.patch_size if self.has_lidit else 1)

    def check_picture_sizes(self, buckets: Sequence[Bucket]) -> None:
        """Raises UserError if pictures are too small for a term of the VAE's loss."""
        if self.vae.weights:
            return
        side = min(min(bucket) for bucket in buckets)
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
        if vae_config.latent_channels != self.model.config.latent_channels:
            raise UserError(
                f"the VAE has {vae_config.latent_channels} latent channels, "
                f"model.latent_channels={self.model.config.latent_channels}: make them equal"
            )
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
    experiment.check_picture_sizes(dataset.buckets)
    held_out = _held_out_pictures(experiment, dataset)
    lpips = _load_lpips(experiment)
    claim_workdir(workdir, config)
    logger.info("%s", dataset.summary())

    for name, encoder in experiment.encoders.items() if experiment.has_lidit else ():
        if not encoder.weights:
            _train_language_model(experiment, name, dataset, mesh, rules)
    if not experiment.vae.weights:
        _train_vae(experiment, dataset, held_out, lpips, mesh, rules)
    if held_out:
        _evaluate_vae(experiment, held_out, mesh, rules)
    if not experiment.has_lidit:
        return
    pipeline, state = _train_lidit(experiment, dataset, mesh, rules)
    if "evaluate" in config:
        evaluation = build(SceneEvaluation, config.evaluate, "evaluate")
        params = state.params if state.ema is None else state.ema
        evaluate_scenes(pipeline, params, experiment.sample, evaluation, dataset, workdir)


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
    logger.info("%s: %.2fM parameters", task.name, num_parameters(trainer.abstract_state().params) / 1e6)
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


def _held_out_pictures(experiment: Experiment, dataset: Dataset) -> list[np.ndarray]:
    """What the VAE is judged on; none where the config does not ask for it."""
    evaluation = experiment.vae.evaluation()
    if evaluation is None:
        return []
    if experiment.data.holds_out:
        dataset = Dataset(experiment.data, experiment.cell(), held_out=True)
    else:
        logger.info("vae: judged on pictures of its training: none are held out (data.held_out_shards=0)")
    return dataset.pictures(evaluation.num_images)


def _load_lpips(experiment: Experiment) -> Any:
    """The perceptual loss's parameters; None where it is off, which the log says."""
    file = experiment.vae.perceptual_config().weights
    if experiment.vae.weights or not file:
        if not experiment.vae.weights:
            logger.info("vae: trained without the perceptual loss (vae.perceptual.weights names no file)")
        return None
    return load_lpips(file)


def _train_vae(
    experiment: Experiment,
    dataset: Dataset,
    held_out: Sequence[np.ndarray],
    lpips: Any,
    mesh: Mesh,
    rules: ShardingRules,
) -> None:
    folder = experiment.vae_folder()
    if folder.exists():
        return
    part, training = experiment.vae, experiment.vae_training()
    perceptual, adversarial, evaluation = part.perceptual_config(), part.adversarial_config(), part.evaluation()
    model = experiment.autoencoder(experiment.vae_config())
    autoencoding = Autoencoding(model, mesh, rules)

    def weights(state: TrainState) -> Any:
        return (state.params if state.ema is None else state.ema)["vae"]

    def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        scores, sheet = evaluate_reconstruction(autoencoding, weights(state), held_out, evaluation)
        return reconstruction.scalars(scores), {"reconstruction": sheet}

    task = tasks.vae_task(
        model,
        tasks.VAEObjective(
            part.reconstruction, part.kl_weight, perceptual.weight, adversarial.weight, adversarial.start
        ),
        lpips=None if lpips is None else jax.device_put(lpips, replicated(mesh)),
        discriminator=PatchDiscriminator(adversarial.width, adversarial.layers, model.dtype)
        if adversarial.weight
        else None,
        evaluate=evaluate if held_out else None,
    )

    def batches(first: int):
        return dataset.batches(training.batch_size, experiment.config.seed, tokenize=None, first=first)

    facts = {"data": dataset.fingerprint}
    if lpips is not None:
        facts["perceptual"] = file_digest(perceptual.weights)
    state = _run_part(experiment, task, training, batches, mesh, rules, facts)
    latents = autoencoding.latent_statistics(
        weights(state), itertools.islice(batches(training.steps), STATISTICS_BATCHES)
    )
    factors = {"shift_factor": latents.shift_factor, "scaling_factor": latents.scaling_factor}
    logger.info("vae: latents have %s", ", ".join(f"{name} {value:.4f}" for name, value in factors.items()))
    params = _on_host(weights(state), mesh)
    if jax.process_index() == 0:
        save_vae(folder, dataclasses.replace(model.config, **factors), params)
    multihost_utils.sync_global_devices("saved vae")


def _evaluate_vae(experiment: Experiment, held_out: Sequence[np.ndarray], mesh: Mesh, rules: ShardingRules) -> None:
    """Writes how well the finished VAE, trained here or elsewhere, gives the held-out pictures back."""
    if (experiment.workdir / reconstruction.SCORES_FILE).exists():
        return
    config, params = load_vae(experiment.vae_folder())
    autoencoding = Autoencoding(experiment.autoencoder(config), mesh, rules)
    params = jax.device_put(params, replicated(mesh))
    scores, sheet = evaluate_reconstruction(autoencoding, params, held_out, experiment.vae.evaluation())
    reconstruction.report(scores, sheet, config, experiment.workdir)


def _train_lidit(
    experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules
) -> tuple[Pipeline, TrainState]:
    pipeline = experiment.pipeline(mesh, rules)
    config, how = experiment.train, experiment.sample
    prompts = dataset.captions(how.batch_size, experiment.config.seed)
    bucket = dataset.largest_bucket()

    def evaluate(state: TrainState, step: int) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        params = state.params if state.ema is None else state.ema
        pictures = pipeline(params, prompts, range(len(prompts)), bucket.height, bucket.width, how)
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
