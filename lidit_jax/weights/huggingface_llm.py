"""A transformers LLM folder (config.json + safetensors) <-> `LLMConfig` and a Flax parameter tree.

Read: every model that `huggingface_config.py` knows, as a prompt encoder. Written: the small LLMs that the demo trains.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from safetensors.numpy import save_file
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError
from lidit_jax.models.llm import LLM, CausalLM, LLMConfig
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.huggingface_config import llm_config, norm_offset
from lidit_jax.weights.placing import Placement, abstract_parameters, place_parameters
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
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",  # it stands after the attention, before the FFN
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# With norms after the sublayers too, "post_attention_layernorm" is the attention's own.
SANDWICH_MODULES = BLOCK_MODULES | {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}
# The keys of config.json that say all of a LLaMA or Qwen2.
WRITTEN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rope_theta",
    "rms_norm_eps",
    "attention_bias",
    "tie_word_embeddings",
)
# Early LLaMA checkpoints store the rotary frequencies, which follow from the config.
DERIVED_TENSOR = "self_attn.rotary_emb.inv_freq"
# What stands before the names of `LlamaModel` in files of: that model itself, with its head (and in LLaVA's own code),
# and the layouts that transformers has used for a language model inside a multi-modal one.
PREFIXES = (
    "",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "model.language_model.model.",
)


def load_llm_encoder(
    folder: str | Path | epath.Path,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[LLMConfig, dict[str, Any]]:
    """Reads a transformers LLM up to its third-to-last block; what comes after it stays on the disk.

    One tensor at a time is in host memory on its way to its place on the devices.

    Args:
        folder: with config.json and model.safetensors, or that file's shards and their index; shards that hold only
            the last two blocks and the head may be missing. On a disk or in a bucket (gs://…).
        dtype: what the encoder computes in. Its matrices and biases come in this type, because each use would cast
            them to it anyway: bfloat16 halves the memory and changes no result. Norm scales come in float32.
        attention: the implementation (`models/attention.py`).
        mesh, rules: where the parameters go; default: all on the first device.

    Returns:
        The whole model's config, and the parameters for `LLM(config.as_encoder()).apply({"params": params}, …)`: a
        nested dict of arrays, blocks stacked.

    Raises:
        UserError: the model is not of a supported type; a file or tensor is missing, damaged, of the wrong shape, not
            floating point or not finite; weights are only there as pickles (.bin, .pt), which are never read.
    """
    folder = epath.Path(folder)
    values = read_config(folder)
    config = llm_config(values, folder / CONFIG_FILE, dtype=dtype, attention=attention)
    encoder, offset = config.as_encoder(), norm_offset(values, folder / CONFIG_FILE)
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        prefix = _prefix(weights)
        boxed = _boxed_parameters(encoder)
        names = {path: _stored_names(encoder, prefix, path) for path in boxed}
        blocks = tuple(f"{prefix}layers.{block}." for block in range(encoder.num_hidden_layers))
        params = place_parameters(
            weights,
            boxed,
            names,
            Placement(mesh, rules),
            dtype=dtype,
            belonging=blocks,
            derived=DERIVED_TENSOR,
            norm_offset=offset,
        )
    return config, params


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


def config_to_dict(config: LLMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """What config.json holds for a model with this config, of the LLaMA or Qwen2 type.

    Raises:
        UserError: the model is of neither type.
    """
    model_type = "qwen2" if config.attention_bias else "llama"
    plain = LLMConfig(**{name: getattr(config, name) for name in WRITTEN})
    if config != dataclasses.replace(plain, attention=config.attention, dtype=config.dtype, remat=config.remat):
        raise UserError("only models of the LLaMA and the Qwen2 type can be written")
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in WRITTEN},
        "hidden_act": "silu",
        "attention_bias": False,  # LLaMA's key; Qwen2's biases need none
        "torch_dtype": "float32",
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),  # transformers' default is LLaMA's, 1 and 2
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }


def torch_name(config: LLMConfig, path: tuple[str, ...], block: int | None) -> str:
    """transformers' name inside `LlamaModel` of a parameter of `LLM`: `("layers", "q_proj", "kernel")` of block 3 ->
    `"layers.3.self_attn.q_proj.weight"`.
    """
    if block is None:
        return f"{path[0]}.weight"
    _, module, leaf = path
    modules = SANDWICH_MODULES if config.sandwich_norm else BLOCK_MODULES
    return f"layers.{block}.{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"


@functools.cache
def abstract_encoder(config: LLMConfig, *, dtype: str, mesh: Mesh, rules: ShardingRules) -> dict[str, Any]:
    """Shapes, dtypes and places of what `load_llm_encoder` would load, in the same tree of `jax.ShapeDtypeStruct`."""
    return abstract_parameters(_boxed_parameters(config.as_encoder()), Placement(mesh, rules), dtype=dtype)


def _boxed_parameters(config: LLMConfig) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    """Shape and logical axes of every parameter of `LLM(config)` by its path; computes and allocates nothing."""
    return _abstract(LLM(config))


def _abstract(model: nn.Module) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def _stored_names(config: LLMConfig, prefix: str, path: tuple[str, ...]) -> list[str]:
    """One name a block, or one in all."""
    blocks = range(config.num_hidden_layers) if path[0] == "layers" else (None,)
    return [prefix + torch_name(config, path, block) for block in blocks]


def _prefix(weights: SafetensorsFolder) -> str:
    """What stands before the language model's names. Raises UserError if there is no language model."""
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in weights.names:
            return prefix
    raise UserError(
        f"{weights.folder}: tensor embed_tokens.weight is missing, under any of the prefixes that transformers uses"
    )


def _to_torch(config: LLMConfig, params: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    boxed = _abstract(CausalLM(config))
    if missing := boxed.keys() - params.keys():
        raise UserError(f"the LLM's parameters lack {'/'.join(min(missing))}, which its config asks for")
    if unexpected := params.keys() - boxed.keys():
        raise UserError(f"the LLM's parameters have {'/'.join(min(unexpected))}, which its config does not know")
    for path, leaf in boxed.items():
        shape = leaf.value.shape
        if params[path].shape != shape:
            raise UserError(f"the LLM's {'/'.join(path)} has shape {params[path].shape}, its config asks for {shape}")
    return dict(_torch_tensors(config, {path: np.asarray(value, np.float32) for path, value in params.items()}))


def _torch_tensors(config: LLMConfig, arrays: Mapping[tuple[str, ...], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for (root, *path), value in arrays.items():
        if root == "norm":
            yield "model.norm.weight", value
        elif root == "lm_head":
            yield "lm_head.weight", _transposed(value)
        elif path[0] == "layers":
            for block, name in enumerate(_stored_names(config, "model.", tuple(path))):
                yield name, _transposed(value[block]) if path[-1] == "kernel" else value[block]
        else:
            yield _stored_names(config, "model.", tuple(path))[0], value


def _transposed(kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel.T)  # save_file writes a transposed view's bytes unordered
