"""Maps a prompt encoder's config.json to the transformers class that computes the same features in PyTorch."""

from collections.abc import Mapping
from typing import Any

from lidit_jax.errors import UserError
from lidit_jax.weights.huggingface_config import LLAVA_TYPES, MULTIMODAL_TYPES

# model_type -> class without a head. For multi-modal models, the class around the language model, which returns its
# hidden states.
LLM_CLASSES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3TextModel",
    "phi3": "Phi3Model",
}
MULTIMODAL_CLASSES = {
    "llava": "LlavaModel",
    "llava_next": "LlavaNextModel",
    "llava_next_video": "LlavaNextVideoModel",
    "llava_onevision": "LlavaOnevisionModel",
    "vipllava": "VipLlavaModel",
    "video_llava": "VideoLlavaModel",
    "mistral3": "Mistral3Model",
    "gemma3": "Gemma3Model",
}
T5_CLASSES = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}


def transformers_class(values: Mapping[str, Any]) -> str:
    """Returns the name of the transformers class of an encoder.

    Args:
      values: contents of the encoder's config.json, which `open_encoder` has accepted.
    """
    model_type = transformers_type(values)
    return (LLM_CLASSES | MULTIMODAL_CLASSES | T5_CLASSES)[model_type]


def transformers_type(values: Mapping[str, Any]) -> str:
    """Returns transformers' model_type of an encoder; for the types of LLaVA's own code, that of their LLM."""
    model_type = values["model_type"]
    if model_type in MULTIMODAL_TYPES and values.get("text_config") is not None:
        return model_type
    return LLAVA_TYPES.get(model_type, model_type)


def transformers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the contents of a config.json that transformers can read.

    The config of LLaVA's own code becomes that of its language model. The weights need no change: transformers ignores
    those of the vision model.
    """
    model_type = transformers_type(values)
    if model_type == values["model_type"]:
        return dict(values)
    dropped = ("architectures", "auto_map")
    return {key: value for key, value in values.items() if key not in dropped} | {"model_type": model_type}


def check_reference(values: Mapping[str, Any], where: str) -> None:
    """Checks that transformers can load an encoder from its original location, without a changed config.json.

    Args:
      values: contents of the encoder's config.json.
      where: name of the encoder, for error messages.

    Raises:
      UserError: config.json is that of LLaVA's own code.
    """
    if transformers_type(values) != values["model_type"]:
        raise UserError(
            f"{where} has model_type {values['model_type']!r}, which transformers cannot load: use --text_encoders=copy"
        )
