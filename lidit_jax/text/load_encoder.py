"""Loads a prompt encoder, LLM or T5, from a folder in Hugging Face's format."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.llm import LLMConfig
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.text.encoders import LLMTextEncoder, PromptEncoder, T5TextEncoder
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.text.tokenizer_trial import read_tokenizer, try_tokenizer
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights import huggingface_t5
from lidit_jax.weights.folders import TOKENIZER_FILES, find_folder, local_tokenizer_files
from lidit_jax.weights.huggingface_config import SUPPORTED, llm_config
from lidit_jax.weights.huggingface_llm import load_llm_encoder
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, read_config

# Decoder-only LLMs that a run can train, by the names that transformers gives them.
LLM_FAMILIES: dict[str, dict[str, Any]] = {"llama": {"attention_bias": False}, "qwen2": {"attention_bias": True}}
MODEL_TYPES = (*SUPPORTED, *huggingface_t5.MODEL_TYPES)
TOKENIZER_FILE = "tokenizer.json"
DIFFUSERS_ENCODER = re.compile(r"text_encoder(_\d+)?")


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One entry of the `encoders` section: a model to load (`weights`), or an LLM to train in this run.

    Attributes:
      weights: folder in Hugging Face's format (local or in a bucket), or a model's name on the Hugging Face hub; ""
        trains an LLM on the run's captions.
      dtype: compute dtype.
      family: family of the LLM to train, "llama" or "qwen2".
      model: sizes of the LLM to train; a folder has its own.
      train: its training.
    """

    weights: str = ""
    dtype: str = "bfloat16"
    family: str = "llama"
    model: LLMConfig | None = None
    train: TrainConfig | None = None

    def __post_init__(self):
        if self.family not in LLM_FAMILIES:
            raise UserError(f"encoder.family={self.family!r}: use one of {', '.join(LLM_FAMILIES)}")
        check_dtype("encoder.dtype", self.dtype)
        if self.model is not None and self.model.dtype not in (LLMConfig.dtype, self.dtype):
            raise UserError(
                f"encoder.model: leave out dtype={self.model.dtype!r:.80}; that of the encoder, {self.dtype!r}, is used"
            )

    @property
    def language_model(self) -> LLMConfig:
        """The LLM to train: `model` with the biases of its family, in `dtype`."""
        assert self.model is not None  # `Experiment` rejects entries with neither weights nor a model
        return dataclasses.replace(self.model, **LLM_FAMILIES[self.family], dtype=self.dtype)


def open_encoder(
    name: str | epath.Path, make_prompts: Callable[[PreTrainedTokenizerBase], PromptTokenizer], *, dtype: str
) -> PromptEncoder:
    """Opens an encoder without loading its weights, so that errors in its config or tokenizer are reported early.

    Args:
      name: a folder (local or in a bucket), or a model's name on the Hugging Face hub.
      make_prompts: transformers tokenizer -> `PromptTokenizer`.
      dtype: compute dtype.

    Returns:
      The encoder, whose `freeze` takes the parameters.

    Raises:
      UserError: if config.json or the tokenizer is missing, damaged or not supported.
    """
    folder = find_folder(str(name))
    values, file = read_config(folder), folder / CONFIG_FILE
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type {model_type!r:.80} is not supported; use one of {', '.join(MODEL_TYPES)}")
    make_encoder: Callable[[PromptTokenizer], PromptEncoder]
    if model_type in huggingface_t5.MODEL_TYPES:
        make_encoder = functools.partial(T5TextEncoder, huggingface_t5.t5_config(values, file, dtype=dtype))
    else:
        make_encoder = functools.partial(LLMTextEncoder, llm_config(values, file, dtype=dtype))
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    try:
        return make_encoder(make_prompts(tokenizer))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error


def load_encoder(
    name: str | epath.Path,
    make_prompts: Callable[[PreTrainedTokenizerBase], PromptTokenizer],
    *,
    dtype: str,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[PromptEncoder, Any]:
    """Loads an encoder and its frozen arrays, sharded over the mesh.

    Args:
      name: see `open_encoder`.
      make_prompts: see `open_encoder`.
      dtype: see `open_encoder`.
      mesh: mesh for the parameters; None loads them on the first device.
      rules: sharding rules for the parameters; None is the default rules.

    Returns:
      The encoder, and the result of its `freeze`.

    Raises:
      UserError: see `open_encoder`; also if the weights are missing, damaged or do not fit the config.
    """
    encoder = open_encoder(name, make_prompts, dtype=dtype)
    load = huggingface_t5.load_t5_encoder if isinstance(encoder, T5TextEncoder) else load_llm_encoder
    _, params = load(find_folder(str(name)), dtype=dtype, mesh=mesh, rules=rules)
    return encoder, encoder.freeze(params)


def tokenizer_folder(folder: epath.Path) -> epath.Path:
    """Returns the folder of an encoder's tokenizer.

    It is the encoder's folder or, in diffusers pipelines, the folder `tokenizer_2` next to `text_encoder_2`.
    """
    if not DIFFUSERS_ENCODER.fullmatch(folder.name) or (folder / TOKENIZER_FILE).exists():
        return folder
    sibling = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return sibling if (sibling / TOKENIZER_FILE).exists() else folder


def load_tokenizer(folder: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder in Hugging Face's format (tokenizer.json).

    Raises:
      UserError: if the folder has no readable tokenizer.json.
    """
    with local_tokenizer_files(folder) as files:
        file = files / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(f"{folder}: no {TOKENIZER_FILE} in this folder; use one that save_pretrained wrote")
        try_tokenizer(files, TOKENIZER_FILES)
        # For a damaged file the tokenizers library raises a bare Exception, or panics with a BaseException.
        try:
            return read_tokenizer(files)
        except UserError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}/{TOKENIZER_FILE}: not a valid tokenizer ({reason})") from error
