"""A folder in Hugging Face's format -> a prompt encoder, whatever kind of model is in it."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lidit_jax.errors import UserError
from lidit_jax.models.layers import check_dtype
from lidit_jax.models.llm import LLMConfig
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.text.encoders import LLMTextEncoder, PromptEncoder, T5TextEncoder
from lidit_jax.text.prompts import PromptTokenizer
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights import huggingface_t5
from lidit_jax.weights.folders import find_folder, local_tokenizer_files
from lidit_jax.weights.huggingface_config import SUPPORTED, llm_config
from lidit_jax.weights.huggingface_llm import load_llm_encoder
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, read_config, read_json_object

# Decoder-only LLMs that a run can train, by the names that transformers gives them.
LLM_FAMILIES = {"llama": {"attention_bias": False}, "qwen2": {"attention_bias": True}}
MODEL_TYPES = (*SUPPORTED, *huggingface_t5.MODEL_TYPES)
TOKENIZER_FILE = "tokenizer.json"
DIFFUSERS_ENCODER = re.compile(r"text_encoder(_\d+)?")
PROBES = ["", " a b", "红色", "😀", "\x00", "\u0f00 xyz"]


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """One entry under `encoders`: one from a folder (`weights`), or an LLM to train here (`family`, `model`, `train`).

    Attributes:
      weights: folder in Hugging Face's format (local, or in a bucket) or its name on the hub; "" trains an LLM on the
        run's captions.
      dtype: of its computation.
      family: "llama" or "qwen2".
      model: sizes of an LLM to train; a folder has its own.
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

    @property
    def language_model(self) -> LLMConfig:
        """The LLM to train: `model` with the biases of its family, in `dtype`."""
        return dataclasses.replace(self.model, **LLM_FAMILIES[self.family], dtype=self.dtype)


def open_encoder(
    name: str | epath.Path, make_prompts: Callable[[PreTrainedTokenizerBase], PromptTokenizer], *, dtype: str
) -> PromptEncoder:
    """The encoder without its weights: what can be known to be wrong before they are read is found here.

    Args:
      name: a folder (local, or in a bucket), or a name on the Hugging Face hub.
      make_prompts: from its tokenizer, the tokeniser of prompts.
      dtype: what it computes in.

    Raises:
      UserError: for anything in config.json or the tokenizer that is missing, damaged or not supported.
    """
    folder = find_folder(str(name))
    values, file = read_config(folder), folder / CONFIG_FILE
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type {model_type!r:.80} is not supported; use one of {', '.join(MODEL_TYPES)}")
    if model_type in huggingface_t5.MODEL_TYPES:
        kind, config = T5TextEncoder, huggingface_t5.t5_config(values, file, dtype=dtype)
    else:
        kind, config = LLMTextEncoder, llm_config(values, file, dtype=dtype)
    tokenizer = load_tokenizer(tokenizer_folder(folder))
    try:
        return kind(config, make_prompts(tokenizer))
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
    """The encoder and its frozen arrays, already in their places on the mesh.

    Args:
      name, make_prompts, dtype: see `open_encoder`.
      mesh, rules: where the parameters go; default: all on the first device.

    Raises:
      UserError: as `open_encoder`, and for weights that are missing, damaged or do not belong to the config.
    """
    encoder = open_encoder(name, make_prompts, dtype=dtype)
    load = huggingface_t5.load_t5_encoder if isinstance(encoder, T5TextEncoder) else load_llm_encoder
    _, params = load(find_folder(str(name)), dtype=dtype, mesh=mesh, rules=rules)
    return encoder, encoder.freeze(params)


def tokenizer_folder(folder: epath.Path) -> epath.Path:
    """Where the tokenizer of an encoder's folder is: in it or, as diffusers lays pipelines out, beside `text_encoder_2`
    in `tokenizer_2`.
    """
    if not DIFFUSERS_ENCODER.fullmatch(folder.name) or (folder / TOKENIZER_FILE).exists():
        return folder
    beside = folder.parent / folder.name.replace("text_encoder", "tokenizer")
    return beside if (beside / TOKENIZER_FILE).exists() else folder


def load_tokenizer(folder: Any) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder in Hugging Face's format (tokenizer.json).

    Raises:
      UserError: if the folder holds no readable tokenizer.json.
    """
    with local_tokenizer_files(folder) as files:
        file = files / TOKENIZER_FILE
        if not file.is_file():
            raise UserError(f"{folder}: no {TOKENIZER_FILE} in it; name a folder that save_pretrained wrote")
        template = _processors_template(epath.Path(files))
        # The tokenizers library raises bare Exceptions for a broken file, and panics, which are not even Exceptions.
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(files))
            tokenizer(PROBES, split_special_tokens=True, verbose=False)  # much damage shows only in use
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{folder}/{TOKENIZER_FILE}: not a tokenizer ({reason})") from error
    if template and not tokenizer.chat_template:
        tokenizer.chat_template = template
    return tokenizer


def _processors_template(folder: epath.Path) -> str:
    """The chat template that older multi-modal models keep in a file of their own, or ""."""
    file = folder / "chat_template.json"
    template = read_json_object(file).get("chat_template") if file.exists() else None
    return template if isinstance(template, str) else ""
