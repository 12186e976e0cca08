"""A run that tunes an LLM on conversations about images: its config, networks, tokenizer and data, before training."""

import dataclasses
import functools
from typing import Any

import jax
import tqdm
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from lidit_jax.config import build
from lidit_jax.config_fields import LLAVA_SECTIONS
from lidit_jax.data.buckets import Bucket
from lidit_jax.data.conversation_source import ConversationSource
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.indexed.dataset import IndexedDataset
from lidit_jax.data.open_dataset import make_filters, open_dataset
from lidit_jax.errors import UserError
from lidit_jax.experiment import Seed
from lidit_jax.models.llava import LlavaConfig
from lidit_jax.models.llava_section import LlavaSectionConfig, LlavaStageConfig
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.vision import VisionConfig
from lidit_jax.parallel.mesh import MeshConfig
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.ranges import check_value
from lidit_jax.text.conversations import CHAT_TEMPLATE, FLATTEN, ConversationTokenizer
from lidit_jax.text.load_encoder import load_tokenizer
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import find_folder
from lidit_jax.weights.huggingface_config import llm_config
from lidit_jax.weights.huggingface_llava import LlavaFiles, add_image_token, extend_vocabulary, read_normalisation
from lidit_jax.weights.huggingface_llm import load_causal_lm
from lidit_jax.weights.huggingface_vision import load_vision_tower, read_vision_config
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, read_config

OUTPUT = "llava"  # folder of the result in the workdir


class LlavaRun:
    """A run of the config section `llava`: the networks, opened but not loaded.

    Attributes:
      config: the config of the run.
      workdir: folder of the run.
      section: the `llava` section.
      llava: the networks.
      tokenizer: tokenizer with the image token and a chat template.
      normalisation: mean and standard deviation of red, green and blue.
    """

    def __init__(self, config: ConfigDict, workdir: epath.Path):
        """Validates the config, and opens the folders of the LLM and the vision tower.

        Raises:
          UserError: the config is invalid, or a folder is missing, damaged or does not fit.
        """
        self.config, self.workdir = config, workdir
        self.section = llava_section(config)
        for name, part in (("llm", self.section.llm), ("vision", self.section.vision)):
            if not part.weights:
                raise UserError(f"llava.{name}.weights is empty: give --config.llava.{name}.weights=FOLDER")
        self._llm, self._vision = find_folder(self.section.llm.weights), find_folder(self.section.vision.weights)
        self.tokenizer = _open_tokenizer(self._llm)
        llm = llm_config(read_config(self._llm), self._llm / CONFIG_FILE, dtype=self.section.dtype)
        token, vocabulary = add_image_token(self.tokenizer, llm)
        vision = read_vision_config(self._vision, dtype=self.section.dtype)
        self.llava = connect(self.section, llm, vision, token, vocabulary)
        self.normalisation = read_normalisation(self._vision, vision.is_clip)
        for name, stage in self.section.stages().items():
            if stage.data.resolution != vision.image_size:
                raise UserError(
                    f"llava.{name}.data.resolution={stage.data.resolution}, but the vision tower takes images of "
                    f"{vision.image_size} px: give --config.llava.{name}.data.resolution={vision.image_size}"
                )

    def training_folder(self, name: str) -> epath.Path:
        return self.workdir / "training" / name

    @property
    def output(self) -> epath.Path:
        return self.workdir / OUTPUT

    @property
    def is_finished(self) -> bool:
        """True if the result is written.

        Raises:
          UserError: its place is taken by something else.
        """
        if (self.workdir / CONFIG_FILE).exists() and (self.output / CONFIG_FILE).exists():
            return True
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UserError(f"{self.output} exists and is not a result of this run: move it, or use another --workdir")
        return False

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the folders that the training starts from, by config key."""
        folders = {"llava.llm.weights": self._llm, "llava.vision.weights": self._vision}
        return {key: folder_digest(folder) for key, folder in folders.items()}

    def conversations(self, stage: LlavaStageConfig) -> ConversationTokenizer:
        """Returns the tokenizer of a stage's conversations."""
        return ConversationTokenizer(
            *(self.tokenizer, self.llava.image_token, self.llava.tokens_per_image, stage.max_length),
            self.section.question,
        )

    def open_data(self, name: str, stage: LlavaStageConfig) -> Dataset:
        """Opens a stage's data.

        Raises:
          UserError: they cannot be read, or a conversation is longer than the stage's rows.
        """
        if stage.data.source != "llava":
            try:
                return open_dataset(stage.data, stage.data.resolution)
            except UserError as error:
                flag = f"--config.llava.{name}.data."
                raise UserError(f"llava.{name}: {str(error).replace('--config.data.', flag)}") from error
        bucket, data = Bucket(stage.data.resolution, stage.data.resolution), stage.data
        if make_filters(data, [bucket], with_captions=False) or data.mixture:
            raise UserError(f"llava.{name}.data: conversations are neither filtered nor mixed: leave out these fields")
        color = tuple(int(255 * value) for value in self.normalisation[0])
        source = ConversationSource(data.path, data.data_dir, data.resolution, color)
        _check_lengths(name, source, self.conversations(stage))
        return IndexedDataset(data, (bucket,), {"data": data}, [source], held_out=False, with_captions=True)

    def load_llm(self, dtype: str, mesh: Mesh, rules: ShardingRules, placed_as: Any = None) -> Any:
        """Loads the LLM with the vocabulary that the image token needs, sharded over the mesh.

        Args:
          dtype: dtype of matrices and biases.
          mesh: device mesh.
          rules: sharding rules.
          placed_as: arrays or shapes whose shardings the result has; None: those of the rules.
        """
        config, params = load_causal_lm(self._llm, dtype=dtype, mesh=mesh, rules=rules)
        size = self.llava.llm.vocab_size
        if size == config.vocab_size:
            return params
        where = jax.tree.map(lambda x: x.sharding, params if placed_as is None else placed_as)
        extend = jax.jit(functools.partial(extend_vocabulary, size=size), out_shardings=where, donate_argnums=0)
        return extend(params)

    def load_tower(self, mesh: Mesh, rules: ShardingRules) -> Any:
        """Loads the vision tower up to the hidden state that is read, sharded over the mesh."""
        section = self.section
        options = {"layer": section.feature_layer, "dtype": section.dtype}
        return load_vision_tower(self._vision, mesh=mesh, rules=rules, **options)[1]

    def files(self) -> LlavaFiles:
        """Returns what the result is made of beside the trained parameters."""
        return LlavaFiles(self.llava, self._llm, self._vision, self.tokenizer, *self.normalisation)


def llava_section(config: ConfigDict) -> LlavaSectionConfig:
    """Returns the validated `llava` section of a config.

    Raises:
      UserError: the config is invalid.
    """
    for key in config:
        if key not in LLAVA_SECTIONS:
            raise UserError(f"config key {key} is unknown beside llava; known are {', '.join(LLAVA_SECTIONS)}")
    for key in LLAVA_SECTIONS:
        if key not in config:
            raise UserError(f"config key {key} is missing")
    check_value("seed", config.seed, Seed)
    build(MeshConfig, config.mesh, "mesh")
    return build(LlavaSectionConfig, config.llava, "llava")


def connect(
    section: LlavaSectionConfig, llm: LLMConfig, vision: VisionConfig, image_token: int, vocabulary: int
) -> LlavaConfig:
    """Returns the networks of a section; errors name its fields."""
    llm = dataclasses.replace(llm, vocab_size=vocabulary, remat=section.remat, dtype=section.dtype)
    vision = dataclasses.replace(vision, dtype=section.dtype)
    try:
        return LlavaConfig(llm, vision, image_token, section.feature_layer, section.select)
    except UserError as error:
        raise UserError(f"llava: {error}") from error


def fill_in_paths(config: ConfigDict) -> None:
    """Gives a value to the data paths that a `llava` section leaves to be filled in, for checks that open no data."""
    with config.unlocked():
        for name in ("align", "tune"):
            stage = config.llava.get(name)
            if isinstance(stage, ConfigDict) and isinstance(stage.get("data"), ConfigDict):
                stage.data.path = stage.data.get("path") or "unused"


def _open_tokenizer(folder: epath.Path) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no end token (eos_token): set one in its tokenizer_config.json")
    template = tokenizer.get_chat_template() if tokenizer.chat_template else CHAT_TEMPLATE
    tokenizer.chat_template = template if template.startswith(FLATTEN) else FLATTEN + template
    return tokenizer


def _check_lengths(name: str, source: ConversationSource, conversations: ConversationTokenizer) -> None:
    """Raises UserError if a conversation has more tokens than a row."""
    texts, limit = source.texts(), conversations.max_length
    for number in tqdm.tqdm(range(len(texts)), desc="counting tokens", disable=None, leave=False):
        turns = conversations.turns(texts[number])
        if conversations.surely_fits(turns):
            continue
        length = len(conversations.encode(turns)[0])
        if length > limit:
            raise UserError(
                f"llava.{name}: {source.name(number)} has {length} tokens with its image, more than "
                f"llava.{name}.max_length={limit}: shorten it, leave it out or raise max_length"
            )
