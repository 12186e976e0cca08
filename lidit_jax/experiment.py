"""A run's config and workdir: which networks it has, whether the config is valid, and where their files are.

A workdir is self-contained:

    config.json            the config of the run
    digests.json           digests of the data and weights that the config names
    run.lock               the process that uses the workdir; removed when it ends
    goodput.json           where the time of the run went, over all starts
    trace_hostN.txt        stack trace of host N, if it left a run on several hosts
    compiled/              compiled programs, which a resumed run reuses
    encoders/NAME/         an LLM trained by the run, in Hugging Face's format (others are in their `weights` folder)
    vae/                   a VAE trained by the run, in diffusers' format (others are in their `weights` folder)
    training/NAME/         checkpoints, metrics.jsonl, TensorBoard events and samples/ of each trained network
    grid.png, scores.json  samples for held-out prompts at the end of the run, and their scores, if scenes are evaluated
    reconstruction.png, reconstruction.json   the VAE's reconstructions and their scores, if the config asks for them

A config without LI-DiT's sections trains or evaluates a VAE alone.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lidit_jax.config import build, flatten, require_section
from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.stored_features import EncoderFingerprint
from lidit_jax.diffusion.samplers import step_table
from lidit_jax.diffusion.schedules import Schedule, make_schedule
from lidit_jax.errors import UserError
from lidit_jax.models.discriminator import smallest_side
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.lidit import LIDiT
from lidit_jax.models.lidit_config import COMPUTE_FIELDS, LIDiTConfig
from lidit_jax.models.lpips import SMALLEST_SIDE
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.models.vae_section import VAESectionConfig
from lidit_jax.models.vae_tiling import smallest_tile
from lidit_jax.parallel.mesh import MeshConfig, make_mesh
from lidit_jax.parallel.rules import ShardingRules, frozen_shardings, put_sharded
from lidit_jax.pipeline import Pipeline, SampleConfig
from lidit_jax.ranges import between, check_value
from lidit_jax.text.encoders import PromptEncoder
from lidit_jax.text.load_encoder import EncoderConfig, load_encoder, open_encoder, tokenizer_folder
from lidit_jax.text.prompts import PromptTokenizer, TextConfig
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights.diffusers_vae import load_vae
from lidit_jax.weights.digest import file_digest, folder_digest
from lidit_jax.weights.folders import HUB_NAME, find_folder, is_there
from lidit_jax.weights.safetensors_folder import read_config

logger = logging.getLogger(__name__)

LIDIT = "lidit"
SECTIONS = ("seed", "mesh", "data", "vae")  # required in every config
LIDIT_SECTIONS = ("text", "encoders", "model", "diffusion", "train", "sample")  # all of them or, for a VAE alone, none
OPTIONAL_SECTIONS = ("start_from", "evaluate")
NO_LIDIT = "the config trains a VAE alone: use one with a model, such as configs/1b.py"
Seed = Annotated[int, between(0, 2**32 - 1)]  # JAX's random keys ignore higher bits


class Experiment:
    """The validated sections of a config, and the networks that they describe, in a workdir."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, only_shapes: bool = False):
        """Validates the config.

        Args:
          config: the config of the run.
          workdir: folder of the run.
          only_shapes: True if nothing will be loaded or trained; networks without weights then need no `train` section.

        Raises:
          UserError: if the config is invalid.
        """
        self._only_shapes = only_shapes
        if "llava" in config:
            raise UserError("the config has a section llava: it tunes an LLM and trains no LI-DiT; use another config")
        known = (*SECTIONS, *LIDIT_SECTIONS, *OPTIONAL_SECTIONS)
        for key in config:
            if key not in known:
                raise UserError(f"config key {key} is unknown; known are {', '.join(known)}")
        self.has_lidit = any(section in config for section in LIDIT_SECTIONS)
        for section in (*SECTIONS, *(LIDIT_SECTIONS if self.has_lidit else ())):
            if section not in config:
                raise UserError(f"config key {section} is missing")
        for key in config:
            if key not in ("seed", "start_from"):
                require_section(key, config[key])
        check_value("seed", config.seed, Seed)
        if not isinstance(config.get("start_from"), str | None):
            raise UserError(f"config key start_from is {config.start_from!r:.80}: it must be of type str or null")
        build(MeshConfig, config.mesh, "mesh")
        self.config, self.workdir = config, workdir
        self.data = build(DataConfig, config.data, "data")
        if any(source.source == "llava" for source in self.data.source_configs().values()):
            raise UserError("data.source='llava' has conversations, not captions: see configs/llava.py for its use")
        self.vae = build(VAESectionConfig, config.vae, "vae")
        self._check_vae()
        if not self.has_lidit:
            return
        self.text = build(TextConfig, config.text, "text")
        self.encoders = {
            name: build(EncoderConfig, config.encoders[name], f"encoders.{name}") for name in config.encoders
        }
        if "position" not in config.model:
            # The same weights fit several positions, so a workdir must state its own, whatever the default.
            raise UserError(f"config key model.position is missing: set it, for example to {LIDiTConfig.position!r}")
        self.model = LIDiT(build(LIDiTConfig, config.model, "model"))
        self.schedule: Schedule = make_schedule(**config.diffusion)
        self.train = build(TrainConfig, config.train, "train")
        self.sample = build(SampleConfig, config.sample, "sample")
        self._check_lidit()

    def _check_vae(self) -> None:
        """Validates the VAE section, before anything is compiled or written."""
        check_dtype("vae.dtype", self.vae.dtype)
        if not self.vae.weights:
            self._require_recipe("vae", self.vae)
        elif not self.has_lidit and self.vae.evaluate is None:
            raise UserError(
                "vae.weights names a VAE and vae.evaluate is missing, so there is nothing to do: add vae.evaluate"
            )

    def _check_lidit(self) -> None:
        """Validates the LI-DiT sections, before anything is compiled or written."""
        if not self.encoders:
            raise UserError("encoders is empty: LI-DiT needs at least one LLM")
        step_table(self.sample.sampler, self.schedule, self.sample.steps)  # raises if the sampler does not fit
        for name, encoder in self.encoders.items():
            if not encoder.weights:
                self._require_recipe(f"encoders.{name}", encoder)

    def _require_recipe(self, where: str, section: EncoderConfig | VAESectionConfig) -> None:
        if section.model is None or section.train is None and not self._only_shapes:
            raise UserError(f"{where}.weights is empty: give --config.{where}.weights=FOLDER")

    @functools.cached_property
    def vae_config(self) -> VAEConfig:
        """Returns the architecture of the VAE, whether the run trains it or loads it.

        Raises:
          UserError: if it does not take images of three channels, or does not fit the rest of the config.
        """
        if self.vae.weights:
            config = VAEConfig.from_dict(read_config(self.vae_folder()))
        else:
            assert self.vae.model is not None  # see `_require_recipe`
            config = self.vae.model
            if config.latents_mean or config.latents_std:
                raise UserError("vae.model: leave out latents_mean and latents_std; scaling and shift are measured")
        if (config.in_channels, config.out_channels) != (3, 3):
            raise UserError(
                f"the VAE takes {config.in_channels} and gives {config.out_channels} channels: images have 3, so set "
                "both in_channels and out_channels to 3"
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
        """Returns the batch size of the last trained network; None if a VAE is only evaluated."""
        trainings = list(self.trainings().values())
        return trainings[-1].batch_size if trainings else None

    def trainings(self) -> dict[str, TrainConfig]:
        """Returns the training configs of all networks that the run trains, by their path in the config."""
        found = {} if self.vae.weights else {"vae.train": self.vae.train}
        if self.has_lidit:
            found |= {f"encoders.{name}.train": e.train for name, e in self.encoders.items() if not e.weights}
            found["train"] = self.train
        return {where: training for where, training in found.items() if training}

    def size_multiple(self) -> int:
        """Returns the pixels that both sides of an image must be multiples of: latent cell times patch size."""
        return self.vae_config.downsampling_factor * (self.model.config.patch_size if self.has_lidit else 1)

    def check_image_sizes(self, side: int) -> None:
        """Raises UserError if an image is too small for a term of the VAE's loss.

        Args:
          side: the smallest side of any image, in pixels.
        """
        if self.vae.weights:
            return
        adversarial = self.vae.adversarial
        needs = {}
        if self.vae.perceptual.weights:
            needs["vae.perceptual"] = SMALLEST_SIDE
        if adversarial.weight:
            needs["vae.adversarial"] = smallest_side(adversarial.layers)
        for name, needed in needs.items():
            if side < needed:
                raise UserError(
                    f"{name} needs images with sides of {needed} pixels, some have {side}: raise data.resolution"
                )

    def autoencoder(self, config: VAEConfig) -> AutoencoderKL:
        return AutoencoderKL(config, jnp.dtype(self.vae.dtype))

    def encoder_folder(self, name: str) -> epath.Path:
        weights = self.encoders[name].weights
        return find_folder(weights) if weights else self.workdir / "encoders" / name

    def vae_folder(self) -> epath.Path:
        return epath.Path(self.vae.weights or self.workdir / "vae")

    def training_folder(self, name: str) -> epath.Path:
        return self.workdir / "training" / name

    def prompt_tokenizer(self, tokenizer: Any) -> PromptTokenizer:
        text = self.text
        return PromptTokenizer(
            tokenizer, text.max_length, text.instruction, text.system_prompt, chat_template=text.chat_template
        )

    def check_encoders(self) -> None:
        """Raises UserError if an encoder's folder can't be used; checks everything but the weights."""
        for encoder in self.encoders.values():
            if encoder.weights:
                open_encoder(encoder.weights, self.prompt_tokenizer, dtype=encoder.dtype)

    def encoder_fingerprints(self) -> dict[str, EncoderFingerprint]:
        """Returns each encoder's fingerprint, which is stored with its precomputed features.

        Raises:
          UserError: if an encoder has no weights yet.
        """
        found = {}
        for name, config in self.encoders.items():
            if not config.weights:
                raise UserError(
                    f"precomputing features requires trained LLMs: give --config.encoders.{name}.weights=FOLDER"
                )
            encoder = open_encoder(config.weights, self.prompt_tokenizer, dtype=config.dtype)
            found[name] = EncoderFingerprint(
                digest=self.encoder_digest(name),
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
        """Loads all prompt encoders from their folders.

        Args:
          mesh: mesh to shard the weights over; None puts them on the first device.
          rules: sharding rules; None is the default rules.

        Returns:
          The encoders by name, and their frozen arrays by name.
        """
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
        """Loads the frozen encoders and VAE from their folders, and returns them with the model.

        Args:
          mesh: mesh to shard the weights over; None puts everything on the first device.
          rules: sharding rules; None is the default rules.
          with_encoders: False leaves out the encoders; the pipeline then can't sample.
        """
        rules = rules or ShardingRules()
        encoders, frozen = self.load_encoders(mesh, rules) if with_encoders else ({}, {})
        vae_config, vae_params = load_vae(self.vae_folder())
        vae = self.autoencoder(vae_config)
        vae_params = (
            put_sharded(vae_params, frozen_shardings(vae_params, mesh, rules)) if mesh else jax.device_put(vae_params)
        )
        frozen = {"vae": vae_params, "encoders": frozen}
        return Pipeline(self.model, self.schedule, encoders, vae, frozen, mesh, rules)

    def sampling_mesh(self, devices: Sequence[jax.Device] | None) -> tuple[Mesh, ShardingRules] | tuple[None, None]:
        """Returns the mesh and rules for sampling with `pipeline`; (None, None) for a single device.

        Weights are sharded over as many devices as divide the model's width, and images over all devices.

        Args:
          devices: the devices; None for all.
        """
        devices = jax.devices() if devices is None else devices
        if len(devices) < 2:
            return None, None
        fsdp = math.gcd(self.model.config.hidden_size, len(devices))
        return make_mesh({"data": -1, "fsdp": fsdp}, devices), ShardingRules()

    def encoder_digest(self, name: str) -> str:
        """Returns the digest of an LLM and its tokenizer, which may be in a folder of its own (exported folders)."""
        folder = self.encoder_folder(name)
        return folder_digest(*dict.fromkeys((folder, tokenizer_folder(folder))))

    def check_folders(self) -> None:
        """Raises UserError if the folder of an encoder or of the VAE is missing."""
        for name, encoder in self.encoders.items():
            weights = encoder.weights
            if weights and not HUB_NAME.fullmatch(weights) and not is_there(epath.Path(weights)):
                raise UserError(
                    f"encoders.{name}.weights={weights}: no such folder; if it was moved, give --encoder={name}=FOLDER"
                )
        if self.vae.weights and not is_there(self.vae_folder()):
            raise UserError(f"vae.weights={self.vae.weights}: no such folder; if it was moved, give --vae=FOLDER")

    def named_digests(self, data: str) -> dict[str, str]:
        """Returns the digests of the files that the config names, by config key, to find them where they moved.

        Args:
          data: fingerprint of the data set, which covers what is in all of its files.
        """
        paths = ("path", "data_dir", "class_names")
        found = {f"data.{key}": data for key in flatten(self.config.data) if key.rpartition(".")[2] in paths}
        for name, encoder in self.encoders.items() if self.has_lidit else ():
            if encoder.weights:
                found[f"encoders.{name}.weights"] = self.encoder_digest(name)
        if self.vae.weights:
            found["vae.weights"] = folder_digest(self.vae_folder())
        perceptual = self.vae.perceptual.weights
        if perceptual and epath.Path(perceptual).exists():  # a finished VAE no longer needs them
            found["vae.perceptual.weights"] = file_digest(perceptual)
        return found

    def frozen_digests(self) -> dict[str, str]:
        """Returns the digests of the frozen weights, which checkpoints record instead of the weights."""
        digests = {f"encoders.{name}": self.encoder_digest(name) for name in self.encoders}
        return digests | {"vae": folder_digest(self.vae_folder())}


def abstract_experiment(config: ConfigDict) -> Experiment:
    """Returns the experiment of a config that is compiled or counted, for which no data and no weights are needed.

    Raises:
      UserError: the config is invalid, or trains a VAE alone.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.path = config.data.get("path") or "unused"
    experiment = Experiment(config, epath.Path("unused"), only_shapes=True)
    if not experiment.has_lidit:
        raise UserError(NO_LIDIT)
    return experiment


def checkpoint_folder(workdir: epath.Path, name: str) -> epath.Path:
    """Returns the folder of a trained network's checkpoints in a workdir."""
    return workdir / "training" / name / "checkpoints"


def check_start(config: ConfigDict, theirs: ConfigDict, source: epath.Path) -> None:
    """Raises UserError unless a run's model computes the same function as the model whose weights it starts from.

    Comparing shapes is not enough: the same weights fit several values of `model.position`, for example.

    Args:
      config: config of the run.
      theirs: config of the run, or exported folder, to start from.
      source: its folder, for error messages.
    """
    for field in dataclasses.fields(LIDiTConfig):
        if field.name in COMPUTE_FIELDS:
            continue
        ours, other = (model.get(field.name, field.default) for model in (config.model, theirs.model))
        if ours != other:
            raise UserError(
                f"config key model.{field.name} is {ours!r}, in {source} it is {other!r}: give "
                f"--config.model.{field.name}={other}"
            )
