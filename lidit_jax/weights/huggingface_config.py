"""Converts a published config.json to `LLMConfig`: LLaMA, Mistral, Qwen, Gemma, Phi-3, or a LLaVA's language model."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lidit_jax.errors import UserError
from lidit_jax.models.llm import LLMConfig
from lidit_jax.models.rotary import RopeScaling
from lidit_jax.weights.published_config import boolean, parse, positive_integer, positive_number, refuse_quantised

if TYPE_CHECKING:  # imports torch where it is installed, which takes seconds
    from transformers import PreTrainedConfig

# transformers' model types of the decoder-only models that `LLM` implements.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3")
# Multi-modal model type -> type of its language model, if its `text_config` does not name one.
MULTIMODAL_TYPES = {
    "llava": "llama",
    "llava_next": "llama",
    "llava_next_video": "llama",
    "llava_onevision": "qwen2",
    "vipllava": "llama",
    "video_llava": "llama",
    "mistral3": "mistral",
    "gemma3": "gemma3_text",
}
# Model types of LLaVA's own code, which writes the language model's keys at the top level of config.json.
LLAVA_TYPES = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
}
SUPPORTED = tuple(dict.fromkeys((*MODEL_TYPES, *MULTIMODAL_TYPES, *LLAVA_TYPES)))

# Required keys: transformers would default to the sizes of one particular model. Only a `text_config` may leave them
# out, because there the defaults are intended.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def llm_config(values: Mapping[str, Any], file: Any, *, dtype: str, attention: str = "auto") -> LLMConfig:
    """Returns the config of a published language model, or of the language model inside a multi-modal model.

    Args:
      values: contents of its config.json. transformers parses them: absent keys have its defaults, and keys of its
        older versions keep their meaning.
      file: path of config.json, for error messages.
      dtype: `LLMConfig.dtype`, which config.json does not determine.
      attention: `LLMConfig.attention`, which config.json does not determine.

    Raises:
      UserError: a key is missing or has an invalid value, or `LLM` does not implement the model.
    """
    model_type, values = language_model_part(values, file)
    config = _parse(model_type, values, file)
    hidden_size = positive_integer(config, "hidden_size", file)
    num_heads = positive_integer(config, "num_attention_heads", file)
    if getattr(config, "head_dim", None) is None and hidden_size % num_heads:
        raise UserError(f"{file}: hidden_size={hidden_size} is not divisible by num_attention_heads={num_heads}")
    head_dim = positive_integer(config, "head_dim", file, default=hidden_size // num_heads)
    sizes = {
        "vocab_size": positive_integer(config, "vocab_size", file),
        "hidden_size": hidden_size,
        "intermediate_size": positive_integer(config, "intermediate_size", file),
        "num_hidden_layers": positive_integer(config, "num_hidden_layers", file),
        "num_attention_heads": num_heads,
        "num_key_value_heads": positive_integer(config, "num_key_value_heads", file, default=num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": positive_integer(config, "max_position_embeddings", file),
        "rms_norm_eps": positive_number(config, "rms_norm_eps", file),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
    }
    try:
        return LLMConfig(
            **sizes,
            **_rotary(config, file),
            **_windows(model_type, config, file),
            **_switches(model_type, config, file),
            attention=attention,
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error


def norm_offset(values: Mapping[str, Any], file: Any) -> float:
    """Returns what to add to stored norm weights to get the scale: 1 for Gemma, which scales by 1 + weight, else 0."""
    return 1.0 if language_model_part(values, file)[0].startswith("gemma") else 0.0


def fuses_projections(values: Mapping[str, Any], file: Any) -> bool:
    """Returns True if the weights have query, key and value as one tensor, and the FFN's gate and up as one (Phi-3)."""
    return language_model_part(values, file)[0] == "phi3"


def language_model_part(values: Mapping[str, Any], file: Any) -> tuple[str, dict[str, Any]]:
    """Returns the type of the language model, one of `MODEL_TYPES`, and its part of the config.

    Raises:
      UserError: the config describes no supported language model.
    """
    model_type = values.get("model_type")
    inner = values.get("text_config")
    if isinstance(model_type, str) and model_type in MULTIMODAL_TYPES and inner is not None:
        if not isinstance(inner, dict):
            raise UserError(f"{file}: text_config is not an object; copy the file again")
        inner_type = inner.get("model_type", MULTIMODAL_TYPES[model_type])
        if not isinstance(inner_type, str) or inner_type not in MODEL_TYPES:
            raise UserError(
                f"{file}: text_config.model_type {inner_type!r:.80} is not supported; use one of {', '.join(SUPPORTED)}"
            )
        refuse_quantised(values, file)
        return inner_type, dict(inner)
    if isinstance(model_type, str):
        model_type = LLAVA_TYPES.get(model_type, model_type)
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type {model_type!r:.80} is not supported; use one of {', '.join(SUPPORTED)}")
    for key in SIZES:
        if values.get(key) is None:
            raise UserError(f"{file}: {key} is missing")
    return model_type, dict(values)


def _parse(model_type: str, values: dict[str, Any], file: Any) -> "PreTrainedConfig":
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key) is not None and not isinstance(values[key], dict):
            raise UserError(f"{file}: {key} is not an object; copy the file again")
    return parse(model_type, values, file, blocks="num_hidden_layers")


def _switches(model_type: str, config: "PreTrainedConfig", file: Any) -> dict[str, Any]:
    """Returns the fields of `LLMConfig` that tell the families apart: biases, norms, activation, scales."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UserError(f"{file}: use_bidirectional_attention is not supported: the prompt encoders here are causal")
    bias = model_type == "qwen2" or boolean(config, "attention_bias", file)
    switches = {
        "attention_bias": bias,
        "attention_output_bias": bias and model_type != "qwen2",
        "mlp_bias": boolean(config, "mlp_bias", file),
        "qk_norm": model_type in ("qwen3", "gemma3_text"),
        "hidden_act": str(getattr(config, "hidden_activation", None) or config.hidden_act),
    }
    if model_type.startswith("gemma"):
        switches["embedding_scale"] = float(config.hidden_size) ** 0.5
    if model_type in ("gemma2", "gemma3_text"):
        switches["sandwich_norm"] = True
        switches["attention_scale"] = positive_number(config, "query_pre_attn_scalar", file) ** -0.5
        if config.attn_logit_softcapping is not None:
            switches["attention_softcap"] = positive_number(config, "attn_logit_softcapping", file)
    return switches


def _windows(model_type: str, config: "PreTrainedConfig", file: Any) -> dict[str, Any]:
    if model_type in ("llama", "gemma"):  # these models ignore sliding-window keys
        return {}
    if model_type in ("mistral", "phi3"):  # all blocks have a sliding window, or none has
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        layer_types = [kind] * config.num_hidden_layers
    else:
        layer_types = config.layer_types
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{file}: layer_types: {min(unknown)!r:.80} is not supported")
    slides = tuple(kind == "sliding_attention" for kind in layer_types)
    if not any(slides):
        return {}
    return {"sliding_window": positive_integer(config, "sliding_window", file), "sliding_layers": slides}


def _rotary(config: "PreTrainedConfig", file: Any) -> dict[str, Any]:
    """Returns the rotary fields of `LLMConfig`.

    transformers gathers rope_theta, rope_scaling and rope_parameters of all its versions in `rope_parameters`.
    """
    rope = config.rope_parameters
    rotary = {}
    if "full_attention" in rope:  # Gemma 3: one entry for each kind of block
        local, rope = rope.get("sliding_attention"), rope["full_attention"]
        if not isinstance(local, dict) or not isinstance(rope, dict):
            raise UserError(f"{file}: rope_parameters: full_attention and sliding_attention must both be objects")
        if _rope_type(local) != "default":
            raise UserError(f"{file}: rope_parameters: sliding_attention must have rope_type 'default'")
        rotary["local_rope_theta"] = positive_number(local, "rope_theta", file)
    if (rope.get("partial_rotary_factor") or 1.0) != 1.0:
        raise UserError(
            f"{file}: partial_rotary_factor={rope['partial_rotary_factor']!r:.80} is not supported: use a model that "
            "rotates whole heads"
        )
    rotary["rope_theta"] = positive_number(rope, "rope_theta", file)
    if _rope_type(rope) != "default":
        rotary["rope_scaling"] = _rope_scaling(rope, file)
    return rotary


def _rope_type(rope: Mapping[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _rope_scaling(rope: Mapping[str, Any], file: Any) -> RopeScaling:
    values = {}
    for field in dataclasses.fields(RopeScaling):
        if rope.get(field.name) is None:
            continue
        if field.name == "rope_type":
            values["rope_type"] = rope["rope_type"]
        elif field.name == "truncate":
            values["truncate"] = boolean(rope, "truncate", file)
        elif field.name == "original_max_position_embeddings":
            values[field.name] = positive_integer(rope, field.name, file)
        else:
            values[field.name] = positive_number(rope, field.name, file)
    return RopeScaling(**values)
