"""A transformers LLM folder (config.json + safetensors) <-> `LLMConfig` and a Flax parameter tree.

Read: LLaMA and Qwen1.5/Qwen2 checkpoints, as prompt encoders. Written: the small LLMs that the demo trains.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError
from lidit_jax.models.llm import LLMConfig
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, new_folder, read_config

WEIGHTS_STEM = "model"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Our name of a block's submodule -> transformers'.
BLOCK_MODULES = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "post_attention_layernorm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# Early LLaMA checkpoints store the rotary frequencies, which follow from the config.
DERIVED_TENSOR = "self_attn.rotary_emb.inv_freq"
# RoPE knows no maximum: this only tells transformers' users what to expect of a model trained on captions.
MAX_POSITION_EMBEDDINGS = 4096

# The values that a key must have, if it is there, for the model to be one that `LLM` computes.
ONLY_SUPPORTED = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
}


def load_llm_encoder(
    folder: str | Path, *, dtype: str = "float32", attention: str = "auto"
) -> tuple[LLMConfig, dict[str, Any]]:
    """Reads a transformers LLM up to its third-to-last block; what comes after it stays on the disk.

    Args:
        folder: with config.json and model.safetensors, or that file's shards and their index; shards that hold only
            the last two blocks and the head may be missing.
        dtype: what the encoder computes in. Its matrices and biases come in this type, because each use would cast
            them to it anyway: bfloat16 halves the memory and changes no result. Norm scales come in float32.
        attention: the implementation (`models/attention.py`).

    Returns:
        The whole model's config, and the parameters for `LLM(config.as_encoder()).apply({"params": params}, …)`: a
        nested dict of NumPy arrays in host memory, blocks stacked, for the caller to place on devices.

    Raises:
        UserError: the model is not of a supported type; a file or tensor is missing, damaged, of the wrong shape or
            not floating point; weights are only there as pickles (.bin, .pt), which are never read.
    """
    folder = Path(folder)
    config = config_from_dict(read_config(folder), folder / CONFIG_FILE, dtype=dtype, attention=attention)
    encoder = config.as_encoder()
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        prefix = _prefix(weights)
        for path, block, shape in _parameters(encoder):  # before memory of that size is asked for
            weights.check(prefix + torch_name(path, block), _torch_shape(path, shape))
        _refuse_unexpected(weights, encoder, prefix)
        flat = {}
        for path, block, shape in _parameters(encoder):
            value = weights.read(prefix + torch_name(path, block), _torch_shape(path, shape))
            value = value.T if _is_transposed(path) else value
            if block is None:
                flat[path] = value.astype(_stored_type(path, dtype))
            else:
                stack = (encoder.num_hidden_layers, *shape)
                flat.setdefault(path, np.empty(stack, _stored_type(path, dtype)))[block] = value
    return config, flax.traverse_util.unflatten_dict(flat)


def save_llm(
    folder: str | Path,
    config: LLMConfig,
    params: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` and `load_llm_encoder` read, in float32.

    The folder appears whole or not at all: it is written beside its place, then renamed.

    Args:
        folder: does not exist, or is empty.
        config: the LLM's. With `attention_bias` it is written as a Qwen2 model, without as a LLaMA model.
        params: the parameter tree of `CausalLM(config)`, with or without the boxes of logical axis names.
        tokenizer: written beside the weights, its end and begin tokens named in config.json.

    Raises:
        UserError: the folder is not empty or cannot be written, or the parameters are not those of the config.
    """
    tensors = _to_torch(config, flax.traverse_util.flatten_dict(nn.meta.unbox(params)))
    with new_folder(folder) as scratch:
        values = json.dumps(config_to_dict(config, tokenizer), indent=2)
        (scratch / CONFIG_FILE).write_text(values + "\n", encoding="utf-8")
        save_file(tensors, scratch / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))


def config_from_dict(values: Mapping[str, Any], file: Path, *, dtype: str, attention: str = "auto") -> LLMConfig:
    """The config of a transformers LLM.

    Args:
        values: what its config.json holds; as in transformers, absent optional keys have that library's defaults.
        file: where they come from, for messages.
        dtype, attention: `LLMConfig`'s, which config.json does not decide.

    Raises:
        UserError: a key is missing or has an impossible value, or the model is one that `LLM` does not compute.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise UserError(
            f"{file}: model_type {model_type!r:.80} is not supported; use one of {', '.join(ARCHITECTURES)}"
        )
    _refuse_unsupported(values, model_type, file)
    hidden_size = _positive_integer(values, "hidden_size", file)
    num_heads = _positive_integer(values, "num_attention_heads", file)
    if values.get("head_dim") is None and hidden_size % num_heads:
        raise UserError(f"{file}: hidden_size={hidden_size} is not divisible by num_attention_heads={num_heads}")
    head_dim = _positive_integer(values, "head_dim", file, default=hidden_size // num_heads)
    if head_dim % 2:
        raise UserError(f"{file}: head_dim={head_dim} is odd, which rotary positions cannot be")
    return LLMConfig(
        vocab_size=_positive_integer(values, "vocab_size", file),
        hidden_size=hidden_size,
        intermediate_size=_positive_integer(values, "intermediate_size", file),
        num_hidden_layers=_positive_integer(values, "num_hidden_layers", file),
        num_attention_heads=num_heads,
        num_key_value_heads=_positive_integer(values, "num_key_value_heads", file, default=num_heads),
        head_dim=head_dim,
        rope_theta=_positive_number(_rope_parameters(values, file), "rope_theta", file, default=10_000.0),
        rms_norm_eps=_positive_number(values, "rms_norm_eps", file, default=1e-6),
        attention_bias=model_type == "qwen2",
        tie_word_embeddings=_boolean(values, "tie_word_embeddings", file),
        attention=attention,
        dtype=dtype,
    )


def config_to_dict(config: LLMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """What config.json holds for a model with this config."""
    model_type = "qwen2" if config.attention_bias else "llama"
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": MAX_POSITION_EMBEDDINGS,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),  # transformers' default is LLaMA's, 1 and 2
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
        **ONLY_SUPPORTED[model_type],
    }


def torch_name(path: tuple[str, ...], block: int | None) -> str:
    """transformers' name inside `LlamaModel` of a parameter of `LLM`: `("layers", "q_proj", "kernel")` of block 3 ->
    `"layers.3.self_attn.q_proj.weight"`.
    """
    if block is None:
        return f"{path[0]}.weight"
    _, module, leaf = path
    return f"layers.{block}.{BLOCK_MODULES[module]}.{'bias' if leaf == 'bias' else 'weight'}"


def _parameters(config: LLMConfig) -> Iterator[tuple[tuple[str, ...], int | None, tuple[int, ...]]]:
    """The parameters of `LLM(config)`: (path in our tree, block or None, shape of our array in that block)."""
    yield ("embed_tokens",), None, (config.vocab_size, config.hidden_size)
    for block in range(config.num_hidden_layers):
        for path, shape in _block_shapes(config).items():
            yield ("layers", *path), block, shape


def _block_shapes(config: LLMConfig) -> dict[tuple[str, str], tuple[int, ...]]:
    embed, mlp = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    key_value_heads = config.num_key_value_heads * config.head_dim
    shapes = {
        ("input_layernorm", "weight"): (embed,),
        ("q_proj", "kernel"): (embed, heads),
        ("k_proj", "kernel"): (embed, key_value_heads),
        ("v_proj", "kernel"): (embed, key_value_heads),
        ("o_proj", "kernel"): (heads, embed),
        ("post_attention_layernorm", "weight"): (embed,),
        ("gate_proj", "kernel"): (embed, mlp),
        ("up_proj", "kernel"): (embed, mlp),
        ("down_proj", "kernel"): (mlp, embed),
    }
    if config.attention_bias:
        shapes |= {
            ("q_proj", "bias"): (heads,),
            ("k_proj", "bias"): (key_value_heads,),
            ("v_proj", "bias"): (key_value_heads,),
        }
    return shapes


def _is_transposed(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel"


def _torch_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if _is_transposed(path) else shape


def _stored_type(path: tuple[str, ...], dtype: str) -> np.dtype:
    return np.dtype(np.float32) if path[-1] == "weight" else jnp.dtype(dtype)


def _prefix(weights: SafetensorsFolder) -> str:
    """What stands before the names of `LlamaModel` and `Qwen2Model`: nothing if the folder holds one without a head."""
    return "" if "embed_tokens.weight" in weights.names else "model."


def _refuse_unexpected(weights: SafetensorsFolder, encoder: LLMConfig, prefix: str) -> None:
    """A tensor of the blocks that run which the config has no place for would change the features in silence."""
    expected = {prefix + torch_name(path, block) for path, block, _ in _parameters(encoder)}
    blocks = tuple(f"{prefix}layers.{block}." for block in range(encoder.num_hidden_layers))
    for name in sorted(weights.names - expected):
        if name.startswith(blocks) and not name.endswith(DERIVED_TENSOR):
            raise UserError(
                f"{weights.folder}: tensor {name!r} has no place in the model that {CONFIG_FILE} describes; the "
                "weights do not belong to it"
            )


def _to_torch(config: LLMConfig, params: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    shapes = _causal_lm_shapes(config)
    if missing := shapes.keys() - params.keys():
        raise UserError(f"the LLM's parameters lack {'/'.join(min(missing))}, which its config asks for")
    if unexpected := params.keys() - shapes.keys():
        raise UserError(f"the LLM's parameters have {'/'.join(min(unexpected))}, which its config does not know")
    for path, shape in shapes.items():
        if params[path].shape != shape:
            raise UserError(f"the LLM's {'/'.join(path)} has shape {params[path].shape}, its config asks for {shape}")
    arrays = {path: np.asarray(value, np.float32) for path, value in params.items()}
    tensors = {"model.norm.weight": arrays["norm", "weight"]}
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = _transposed(arrays["lm_head", "kernel"])
    for path, block, _ in _parameters(config):
        value = arrays["model", *path] if block is None else arrays["model", *path][block]
        tensors[f"model.{torch_name(path, block)}"] = _transposed(value) if _is_transposed(path) else value
    return tensors


def _transposed(kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel.T)  # save_file writes a transposed view's bytes unordered


def _causal_lm_shapes(config: LLMConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shapes of our stacked arrays, by their paths in the parameters of `CausalLM(config)`."""
    blocks = {
        ("model", "layers", *path): (config.num_hidden_layers, *shape) for path, shape in _block_shapes(config).items()
    }
    shapes = {
        ("model", "embed_tokens"): (config.vocab_size, config.hidden_size),
        **blocks,
        ("norm", "weight"): (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head", "kernel"] = (config.hidden_size, config.vocab_size)
    return shapes


def _refuse_unsupported(values: Mapping[str, Any], model_type: str, file: Path) -> None:
    for key, supported in ONLY_SUPPORTED[model_type].items():
        if values.get(key, supported) != supported:
            raise UserError(
                f"{file}: {key}={values[key]!r:.80} is not supported for {model_type}, only {supported!r} is"
            )
    layer_types = values.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or layer_types.count("full_attention") < len(layer_types)
    ):
        raise UserError(f"{file}: layer_types other than full_attention (a sliding window) are not supported")
    if values.get("quantization_config") is not None:
        raise UserError(f"{file}: quantization_config: quantised weights are not supported; use the original ones")


def _rope_parameters(values: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling beside it."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{file}: {key} is not an object; copy the file again")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"{file}: {key} of type {kind!r:.80} is not supported, only plain rotary positions are")
    rope = values.get("rope_parameters") or {}
    return rope if rope.get("rope_theta") is not None else values


def _positive_integer(values: Mapping[str, Any], key: str, file: Path, default: int | None = None) -> int:
    value = values.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{file}: {key} is missing")
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{file}: {key}={value!r:.80} is not a positive whole number below 2^31")
    return value


def _positive_number(values: Mapping[str, Any], key: str, file: Path, default: float) -> float:
    value = values.get(key)
    value = default if value is None else value
    if type(value) not in (int, float) or not 0 < value <= float(np.finfo(np.float32).max):
        raise UserError(f"{file}: {key}={value!r:.80} is not a positive number")
    return float(value)


def _boolean(values: Mapping[str, Any], key: str, file: Path) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{file}: {key}={value!r:.80} is not true or false")
    return value
