"""A config and a workdir: which parts a run has, what is wrong with them, and where they lie.

A workdir describes itself:

    config.json            the config of the run
    encoders/NAME/         an LLM trained by the run, in Hugging Face's format (else: where its `weights` point)
    vae/                   a VAE trained by the run, in diffusers' format (likewise)
    training/PART/         checkpoints, metrics.jsonl, TensorBoard events, samples/ of each part that was trained
    grid.png, scores.json  what the run drew for held-out prompts at its end, where its data can be checked
    reconstruction.png, reconstruction.json   how well the VAE gives pictures back, where the config asks for it

A config without the sections that belong to LI-DiT is of a VAE alone.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.checkpoint import load_weights, require_checkpoint
from lidit_jax.config import build, read_workdir
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.stored_features import EncoderFingerprint
from lidit_jax.diffusion.samplers import step_table
from lidit_jax.diffusion.schedules import Schedule, make_schedule
from lidit_jax.errors import UserError
from lidit_jax.models.discriminator import smallest_side
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.lpips import SMALLEST_SIDE
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_tiling import smallest_tile
from lidit_jax.models.vae_training import VAEPartConfig
from lidit_jax.parallel.mesh import make_mesh
from lidit_jax.parallel.rules import ShardingRules, place, stored_shardings
from lidit_jax.pipeline import Pipeline, SampleConfig
from lidit_jax.text.encoders import PromptEncoder
from lidit_jax.text.load_encoder import EncoderConfig, load_encoder, open_encoder, tokenizer_folder
from lidit_jax.text.prompts import PromptTokenizer, TextConfig
from lidit_jax.train import TrainConfig
from lidit_jax.weights.diffusers_vae import load_vae
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import find_folder
from lidit_jax.weights.safetensors_folder import read_config

LIDIT = "lidit"
SECTIONS = ("seed", "mesh", "data", "vae")  # of every config
LIDIT_SECTIONS = ("text", "encoders", "model", "diffusion", "train", "sample")  # all of them or, for a VAE alone, none
OPTIONAL_SECTIONS = ("start_from", "evaluate")
# Fields of the model's config that change how it is computed and not what.
FREE_FIELDS = ("remat", "scan_unroll", "attention", "dtype")
# The kinds of decoder-only LLMs that a run can train for itself, by what transformers calls them.
LLM_FAMILIES = {"llama": {"attention_bias": False}, "qwen2": {"attention_bias": True}}


class Experiment:
    """The parts of one config in one workdir."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, only_shapes: bool = False):
        """Args: only_shapes: nothing will be loaded or trained: of parts without weights, their sizes are enough."""
        self._only_shapes = only_shapes
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
        if "position" not in config.model:
            # Weights fit several positions, so a workdir must say which it was trained with, whatever the default.
            raise UserError(f"config key model.position is missing: {LIDiTConfig.position!r} is recommended")
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
            if not self._only_shapes:
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

    def _require_recipe(self, where: str, part: EncoderConfig | VAEPartConfig) -> None:
        if part.model is None or part.train is None and not self._only_shapes:
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

    def trainings(self) -> dict[str, TrainConfig]:
        """Of every part that the run trains itself, by where they are in the config."""
        found = {} if self.vae.weights else {"vae.train": self.vae_training()}
        if self.has_lidit:
            for name in self.encoders:
                if not self.encoders[name].weights:
                    found[f"encoders.{name}.train"] = self.language_model_training(name)
            found["train"] = self.train
        return found

    def language_model_training(self, name: str) -> TrainConfig:
        """Of an LLM that the run trains itself."""
        return build(TrainConfig, self.encoders[name].train, f"encoders.{name}.train")

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

    def stored_encoders(self) -> dict[str, EncoderFingerprint]:
        """What is said of each encoder where its features are kept.

        Raises:
          UserError: one has no weights yet.
        """
        found = {}
        for name, config in self.encoders.items():
            if not config.weights:
                raise UserError(f"features need LLMs that are finished: give --config.encoders.{name}.weights=FOLDER")
            encoder = open_encoder(config.weights, self.prompt_tokenizer, dtype=config.dtype)
            found[name] = EncoderFingerprint(
                digest=self._encoder_digest(name),
                text=encoder.tokenizer.digest,
                dtype=config.dtype,
                hidden_size=encoder.hidden_size,
                max_length=encoder.tokenizer.max_length,
                lead=encoder.lead,
            )
        return found

    def load_encoders(
        self, mesh: Mesh | None = None, rules: ShardingRules | None = None
    ) -> tuple[dict[str, PromptEncoder], dict[str, Any]]:
        """All prompt encoders from their folders, and their frozen arrays, cut over the mesh if there is one."""
        encoders, frozen = {}, {}
        for name, encoder in self.encoders.items():
            folder = self.encoder_folder(name)
            encoders[name], frozen[name] = load_encoder(
                folder, self.prompt_tokenizer, dtype=encoder.dtype, mesh=mesh, rules=rules
            )
        return encoders, frozen

    def pipeline(
        self, mesh: Mesh | None = None, rules: ShardingRules | None = None, with_encoders: bool = True
    ) -> Pipeline:
        """The frozen parts from their folders, with the model around them.

        Without encoders it draws nothing. With a mesh all is cut over it by the rules; without one, all is on the first
        device.
        """
        encoders, frozen = self.load_encoders(mesh, rules) if with_encoders else ({}, {})
        vae_config, vae_params = load_vae(self.vae_folder())
        vae = self.autoencoder(vae_config)
        vae_params = (
            place(vae_params, stored_shardings(vae_params, mesh, rules)) if mesh else jax.device_put(vae_params)
        )
        frozen = {"vae": vae_params, "encoders": frozen}
        return Pipeline(self.model, self.schedule, encoders, vae, frozen, mesh, rules)

    def drawing_mesh(self, devices: Sequence[jax.Device]) -> tuple[Mesh, ShardingRules] | tuple[None, None]:
        """For `pipeline`: weights cut over as many devices as divide the model, pictures spread over all."""
        if len(devices) < 2:
            return None, None
        fsdp = math.gcd(self.model.config.hidden_size, len(devices))
        return make_mesh({"data": -1, "fsdp": fsdp}, devices), ShardingRules()

    def _encoder_digest(self, name: str) -> str:
        """The same wherever the tokenizer is: an exported folder has it beside the LLM."""
        folder = self.encoder_folder(name)
        return folder_digest(*dict.fromkeys((folder, tokenizer_folder(folder))))

    def frozen_digests(self) -> dict[str, str]:
        """What the checkpoint says of the weights that are not in it."""
        digests = {f"encoders.{name}": self._encoder_digest(name) for name in self.encoders}
        return digests | {"vae": folder_digest(self.vae_folder())}


def check_start(config: ConfigDict, theirs: ConfigDict, source: epath.Path) -> None:
    """Raises UserError unless the model of a run computes the same as the one whose weights it starts from.

    Shapes do not tell: weights of one model.position, say, fit others too.
    """
    for field in dataclasses.fields(LIDiTConfig):
        if field.name in FREE_FIELDS:
            continue
        ours, other = (model.get(field.name, field.default) for model in (config.model, theirs.model))
        if ours != other:
            raise UserError(
                f"config key model.{field.name} is {ours!r}, in {source} it is {other!r}: give "
                f"--config.model.{field.name}={other}"
            )


def load(
    workdir: epath.Path, weights: str = "ema", devices: Sequence[jax.Device] = ()
) -> tuple[Experiment, Pipeline, Any, int]:
    """From a workdir alone: (experiment, pipeline, LI-DiT's parameters, their step).

    Args: devices: over which everything is cut, and pictures are spread; () is the first alone.

    Raises:
      UserError: if the workdir has no config or no checkpoint, or the checkpoint no such weights.
    """
    experiment = Experiment(read_workdir(workdir), workdir)
    if not experiment.has_lidit:
        raise UserError(f"{workdir} is the run of a VAE alone: there is no model in it that draws")
    checkpoints = experiment.training_folder(LIDIT) / "checkpoints"
    require_checkpoint(checkpoints)
    pipeline = experiment.pipeline(*experiment.drawing_mesh(devices))
    params, step = load_weights(checkpoints, weights, pipeline.abstract_params())
    return experiment, pipeline, params, step
