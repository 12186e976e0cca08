"""Which class of transformers computes a prompt encoder that can be loaded here, for those who have PyTorch alone."""

from collections.abc import Mapping
from typing import Any

from lidit_jax.errors import UserError
from lidit_jax.weights.huggingface_config import LLAVA_TYPES, MULTIMODAL_TYPES

# model_type -> the class without a head; of multi-modal models the one around the language model, whose hidden states
# it gives.
LLM_CLASSES = {
    "llama": "LlamaModel",
    "mistral": "MistralModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "gemma": "GemmaModel",
    "gemma2": "Gemma2Model",
    "gemma3_text": "Gemma3TextModel",
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
    """Args: values: what an encoder's config.json holds, which `open_encoder` has accepted."""
    model_type = transformers_type(values)
    return (LLM_CLASSES | MULTIMODAL_CLASSES | T5_CLASSES)[model_type]


def transformers_type(values: Mapping[str, Any]) -> str:
    """The model_type as transformers has it: it knows nothing of the names that LLaVA's own code gives its LLMs."""
    model_type = values["model_type"]
    if model_type in MULTIMODAL_TYPES and values.get("text_config") is not None:
        return model_type
    return LLAVA_TYPES.get(model_type, model_type)


def transformers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as transformers reads it: that of LLaVA's own code becomes its language model's.

    The tensors beside it need no change: what belongs to pictures is left unread.
    """
    model_type = transformers_type(values)
    if model_type == values["model_type"]:
        return dict(values)
    dropped = ("architectures", "auto_map")
    return {key: value for key, value in values.items() if key not in dropped} | {"model_type": model_type}


def check_reference(values: Mapping[str, Any], where: str) -> None:
    """Raises UserError if transformers cannot load the encoder from where it is, only from a changed copy."""
    if transformers_type(values) != values["model_type"]:
        raise UserError(
            f"{where} has model_type {values['model_type']!r}, which is LLaVA's own and not transformers': it can't be "
            "referred to; use --text_encoders=copy"
        )
