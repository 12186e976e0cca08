"""A config and a workdir -> the whole run: what has no weights yet is trained first, then LI-DiT, then it is judged.

A workdir describes itself:

    config.json            the config of the run
    encoders/NAME/         an LLM trained by the run, in Hugging Face's format (else: where its `weights` point)
    vae/                   a VAE trained by the run, in diffusers' format (likewise)
    training/PART/         checkpoints, metrics.jsonl, TensorBoard events, samples/ of each part that was trained
    grid.png, scores.json  what the run drew for held-out prompts at its end, where its data can be checked
"""

import dataclasses
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
from lidit_jax.evaluation.scenes import SceneEvaluation, evaluate_scenes
from lidit_jax.metrics import Metrics
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.lidit import LIDiT, LIDiTConfig, num_parameters
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.vae import AutoencoderKL, VAEConfig
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
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import find_folder
from lidit_jax.weights.huggingface_llm import save_llm
from lidit_jax.weights.safetensors_folder import read_config

logger = logging.getLogger(__name__)

LIDIT = "lidit"
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
class VAEPartConfig:
    """Under `vae`: a VAE from a folder in diffusers' format (`weights`), or one to train here.

    Attributes:
      model: fields of `VAEConfig`.
      train: fields of `TrainConfig`.
      kl_weight, reconstruction: of the loss, see `vae_loss`.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    model: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None
    kl_weight: float = 1e-6
    reconstruction: str = "l1"


class Experiment:
    """The parts of one config in one workdir."""

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        known = ("seed", "start_from", "mesh", "data", "text", "encoders", "vae", "model", "diffusion", "train")
        for key in config:
            if key not in (*known, "sample", "evaluate"):
                raise UserError(f"config key {key} is unknown; known are {', '.join(known)}, sample, evaluate")
        self.config, self.workdir = config, workdir
        self.data = build(DataConfig, config.data, "data")
        self.text = build(TextConfig, config.text, "text")
        self.encoders = {
            name: build(EncoderConfig, config.encoders[name], f"encoders.{name}") for name in config.encoders
        }
        self.vae = build(VAEPartConfig, config.vae, "vae")
        self.model = LIDiT(build(LIDiTConfig, config.model, "model"))
        self.schedule: Schedule = make_schedule(**config.diffusion)
        self.train = build(TrainConfig, config.train, "train")
        self.sample = build(SampleConfig, config.sample, "sample")
        self._check()

    def _check(self) -> None:
        """What can be known to be wrong before anything is compiled or written."""
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
        check_dtype("vae.dtype", self.vae.dtype)
        if not self.vae.weights:
            self._require_recipe("vae", self.vae)
            self.vae_config()

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

    def cell(self) -> int:
        """Pixels that both sides of a picture must be multiples of: a latent cell times a patch."""
        vae = VAEConfig.from_dict(read_config(self.vae_folder())) if self.vae.weights else self.vae_config()
        return vae.downsampling_factor * self.model.config.patch_size

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
        vae = AutoencoderKL(vae_config, jnp.dtype(self.vae.dtype))
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
    params, step = load_weights(experiment.training_folder(LIDIT) / "checkpoints", weights)
    return experiment, experiment.pipeline(), params, step


def run(config: ConfigDict, workdir: epath.Path) -> None:
    """Trains every part that has no weights yet, LI-DiT last; then evaluates, where the data can be checked."""
    experiment = Experiment(config, workdir)
    mesh, rules = make_mesh(config.mesh), ShardingRules()
    experiment.check_encoders()
    dataset = Dataset(experiment.data, experiment.cell())
    claim_workdir(workdir, config)
    logger.info("%s", dataset.summary())

    for name, encoder in experiment.encoders.items():
        if not encoder.weights:
            _train_language_model(experiment, name, dataset, mesh, rules)
    if not experiment.vae.weights:
        _train_vae(experiment, dataset, mesh, rules)
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
    if jax.process_index() == 0:
        save_llm(folder, config, jax.device_get(state.params), tokenizer)
    multihost_utils.sync_global_devices(f"saved {name}")


def _train_vae(experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules) -> None:
    folder = experiment.vae_folder()
    if folder.exists():
        return
    training = build(TrainConfig, experiment.vae.train, "vae.train")
    model = AutoencoderKL(experiment.vae_config(), jnp.dtype(experiment.vae.dtype))
    task = tasks.vae_task(model, kl_weight=experiment.vae.kl_weight, reconstruction=experiment.vae.reconstruction)

    def batches(first: int):
        return dataset.batches(training.batch_size, experiment.config.seed, tokenize=None, first=first)

    state = _run_part(experiment, task, training, batches, mesh, rules, {"data": dataset.fingerprint})
    params = state.params if state.ema is None else state.ema
    shift, scale = _latent_statistics(model, params, batches(training.steps))
    config = dataclasses.replace(model.config, shift_factor=shift, scaling_factor=scale)
    logger.info("vae: latents have mean %.3f and standard deviation %.3f", shift, 1 / scale)
    if jax.process_index() == 0:
        save_vae(folder, config, jax.device_get(params))
    multihost_utils.sync_global_devices("saved vae")


def _latent_statistics(model: AutoencoderKL, params: Any, batches: Any) -> tuple[float, float]:
    """shift_factor and scaling_factor that give the latents of the data mean 0 and standard deviation 1."""

    @jax.jit
    def moments(params, images):
        posterior = model.apply({"params": params}, tasks.to_pixels(images), method=AutoencoderKL.encode)
        second = jnp.square(posterior.mode()) + jnp.exp(posterior.logvar)  # of a sample, which training draws
        return jnp.mean(posterior.mode()), jnp.mean(second)

    sums = np.zeros(2)
    for _, batch in zip(range(STATISTICS_BATCHES), batches, strict=False):
        sums += np.asarray(jax.device_get(moments(params, batch["image"])), np.float64)
    mean, second = multihost_utils.process_allgather(sums).reshape(-1, 2).mean(0) / STATISTICS_BATCHES
    return float(mean), float(1.0 / np.sqrt(second - mean**2))


def _train_lidit(
    experiment: Experiment, dataset: Dataset, mesh: Mesh, rules: ShardingRules
) -> tuple[Pipeline, TrainState]:
    pipeline = experiment.pipeline(mesh, rules)
    config, how = experiment.train, experiment.sample
    prompts = dataset.captions(how.batch_size, experiment.config.seed)
    bucket = dataset.largest_bucket()

    def preview(state: TrainState, step: int) -> dict[str, np.ndarray]:
        params = state.params if state.ema is None else state.ema
        pictures = pipeline(params, prompts, range(len(prompts)), bucket.height, bucket.width, how)
        return {"sample": np.asarray(grid(list(pictures), prompts))}

    task = tasks.lidit_task(
        pipeline.model,
        pipeline.schedule,
        pipeline.encoders,
        pipeline.vae,
        pipeline.frozen,
        preview,
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
