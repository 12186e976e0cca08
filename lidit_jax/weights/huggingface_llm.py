"""Converts a transformers LLM folder (config.json and safetensors) to and from `LLMConfig` and Flax parameters.

Loads every model that `huggingface_config.py` supports, as a prompt encoder. Saves the small LLMs that the demo trains.
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
from lidit_jax.weights.huggingface_config import fuses_projections, llm_config, norm_offset
from lidit_jax.weights.loading import FusedRows, Placement, abstract_parameters, place_parameters
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, new_folder, read_config

WEIGHTS_STEM = "model"
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

# Our name of a block's submodule -> transformers' name.
BLOCK_MODULES = {
    "input_layernorm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",  # after attention, before the FFN
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
# In models that normalise sublayer outputs too, "post_attention_layernorm" is the attention's output norm.
SANDWICH_MODULES = BLOCK_MODULES | {
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}
# Fused tensors -> our modules whose rows they hold, in this order (Phi-3).
FUSED_MODULES = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}
# Fields of `LLMConfig` that fully describe a LLaMA or Qwen2 model.
SAVED_FIELDS = (
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
# Early LLaMA checkpoints store the rotary frequencies, although the config determines them.
DERIVED_TENSOR = "self_attn.rotary_emb.inv_freq"
# Prefixes of the tensor names of `LlamaModel`. In order: the model alone; with its head, and in LLaVA's own code; and
# the layouts that transformers has used for the language model of a multi-modal model.
PREFIXES = (
    "",
    "model.",
    "language_model.",
    "language_model.model.",
    "model.language_model.",
    "model.language_model.model.",
)
HEADS = ("lm_head.weight", "language_model.lm_head.weight")  # names of the output head


def load_llm_encoder(
    folder: str | Path | epath.Path,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[LLMConfig, dict[str, Any]]:
    """Loads a transformers LLM up to its third-to-last block; the tensors after it are not read.

    Host memory holds one tensor at a time, which is sharded and sent to the devices before the next one is read.

    Args:
      folder: folder with config.json and model.safetensors, or that file's shards and their index, on a disk or in a
        bucket (gs://…). Shards that hold only the last two blocks and the head may be missing.
      dtype: compute dtype of the encoder. Matrices and biases are stored in it, because each use would cast them to it
        anyway: bfloat16 halves the memory and changes no result. Norm scales are stored in float32.
      attention: attention implementation (`models/attention.py`).
      mesh: device mesh; default: all parameters go to the first device.
      rules: sharding rules for the mesh; default: `ShardingRules()`.

    Returns:
      The config of the full model, and the parameters for `LLM(config.as_encoder()).apply({"params": params}, …)`: a
      nested dict of arrays, with the blocks stacked.

    Raises:
      UserError: the model type is not supported; a file or tensor is missing, damaged, of the wrong shape, not floating
        point or not finite; or the folder has its weights only as pickles (.bin, .pt), which are never read.
    """
    config, layout = _read_layout(folder, dtype, attention)
    encoder = config.as_encoder()
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        prefix, boxed = _prefix(weights), _boxed_parameters(encoder)
        names = {path: layout.names(encoder, prefix, path) for path in boxed}
        params = _place(weights, encoder, layout, prefix, boxed, names, Placement(mesh, rules), dtype)
    return config, params


def load_causal_lm(
    folder: str | Path | epath.Path,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[LLMConfig, dict[str, Any]]:
    """Loads all blocks of a transformers LLM, its final norm and its output head, to train it further.

    Args:
      folder: folder as for `load_llm_encoder`.
      dtype: dtype that matrices and biases are stored in, and the config's compute dtype.
      attention: attention implementation.
      mesh: device mesh; default: all parameters go to the first device.
      rules: sharding rules for the mesh; default: `ShardingRules()`.

    Returns:
      The config, and the parameters for `CausalLM(config)`.

    Raises:
      UserError: as `load_llm_encoder` raises, or the folder has no output head.
    """
    config, layout = _read_layout(folder, dtype, attention)
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        prefix = _prefix(weights)
        head = next((name for name in HEADS if name in weights.names), None)
        if head is None and not config.tie_word_embeddings:
            raise UserError(
                f"{folder} has no output head (lm_head.weight): use the folder of a causal language model, not of an "
                "encoder"
            )
        boxed = causal_lm_parameters(config)
        names = {path: layout.causal_lm_names(config, prefix, head or "", path) for path in boxed}
        params = _place(weights, config, layout, prefix, boxed, names, Placement(mesh, rules), dtype)
    return config, params


def _read_layout(folder: str | Path | epath.Path, dtype: str, attention: str) -> "tuple[LLMConfig, StoredLayout]":
    """Returns the config of a folder's LLM, and how its tensors are stored."""
    values, file = read_config(folder), epath.Path(folder) / CONFIG_FILE
    config = llm_config(values, file, dtype=dtype, attention=attention)
    return config, StoredLayout.of(config, values, file)


def _place(
    weights: SafetensorsFolder,
    config: LLMConfig,
    layout: "StoredLayout",
    prefix: str,
    boxed: Mapping[tuple[str, ...], nn.LogicallyPartitioned],
    names: Mapping[tuple[str, ...], list[str]],
    placement: Placement,
    dtype: str,
) -> dict[str, Any]:
    return place_parameters(
        weights,
        boxed,
        names,
        placement,
        dtype=dtype,
        belonging=tuple(f"{prefix}layers.{block}." for block in range(config.num_hidden_layers)),
        derived=DERIVED_TENSOR,
        norm_offset=layout.norm_offset,
        fused=layout.fused_rows(boxed),
    )


@dataclasses.dataclass(frozen=True)
class StoredLayout:
    """How a family's tensors in a transformers folder correspond to the parameters of `LLM` and `CausalLM`.

    Attributes:
      modules: our name of a block's submodule -> transformers' name; fused modules share theirs.
      norm_offset: our norm scale minus the stored one.
    """

    modules: Mapping[str, str]
    norm_offset: float

    @classmethod
    def of(cls, config: LLMConfig, values: Mapping[str, Any], file: Any) -> "StoredLayout":
        """Returns the layout of a folder, given its LLM and the contents and path of its config.json."""
        return cls(_stored_modules(config, fuses_projections(values, file)), norm_offset(values, file))

    def names(self, config: LLMConfig, prefix: str, path: tuple[str, ...]) -> list[str]:
        """Returns the names of the tensors of a parameter of `LLM`: one per block, or one outside the blocks."""
        return _stored_names(config, self.modules, prefix, path)

    def causal_lm_names(self, config: LLMConfig, prefix: str, head: str, path: tuple[str, ...]) -> list[str]:
        """Returns the names of the tensors of a parameter of `CausalLM`, whose output head is called `head`."""
        if path[0] == "lm_head":
            return [head]
        return [f"{prefix}norm.weight"] if path[0] == "norm" else self.names(config, prefix, path[1:])

    def fused_rows(self, boxed: Mapping[tuple[str, ...], nn.LogicallyPartitioned]) -> dict[tuple[str, ...], FusedRows]:
        """Returns {path: its rows} of the parameters whose tensors are fused: their widths, one after the other."""
        found = {}
        for path in boxed:
            if "layers" not in path:
                continue
            *parents, module, leaf = path
            together = FUSED_MODULES.get(self.modules[module], ())
            if not together:
                continue
            widths = [boxed[*parents, other, leaf].value.shape[-1] for other in together]
            end = sum(widths[: together.index(module) + 1])
            found[path] = FusedRows(range(end - boxed[path].value.shape[-1], end), sum(widths))
        return found


def save_llm(
    folder: str | Path,
    config: LLMConfig,
    params: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Writes a folder that `transformers.AutoModelForCausalLM.from_pretrained` and `load_llm_encoder` read, in float32.

    The write is atomic: files go to a scratch folder, which is renamed when it is complete.

    Args:
      folder: folder to write; must not exist or be empty.
      config: config of the LLM: a Qwen2 model if it has `attention_bias`, else a LLaMA model.
      params: parameter tree of `CausalLM(config)`, with or without Flax's boxes of logical axis names.
      tokenizer: tokenizer to save with the weights; config.json then names its special tokens.

    Raises:
      UserError: the folder is not empty or cannot be written, the parameters do not fit the config, or the model is
        neither a LLaMA nor a Qwen2.
    """
    tensors = _to_torch(config, flax.traverse_util.flatten_dict(nn.meta.unbox(params)))
    with new_folder(folder) as scratch:
        values = json.dumps(config_to_dict(config, tokenizer), indent=2)
        (scratch / CONFIG_FILE).write_text(values + "\n", encoding="utf-8")
        save_file(tensors, scratch / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
        if tokenizer is not None:
            tokenizer.save_pretrained(str(scratch))


def config_to_dict(config: LLMConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
    """Returns the contents of config.json for a LLaMA or Qwen2 model.

    Args:
      config: config of the LLM.
      tokenizer: tokenizer whose special token ids are written; None writes null.

    Raises:
      UserError: the config describes neither a LLaMA nor a Qwen2.
    """
    model_type = "qwen2" if config.attention_bias else "llama"
    plain = LLMConfig(**{name: getattr(config, name) for name in SAVED_FIELDS})
    if config != dataclasses.replace(plain, attention=config.attention, dtype=config.dtype, remat=config.remat):
        raise UserError("only LLaMA and Qwen2 models can be saved")
    return {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        **{name: getattr(config, name) for name in SAVED_FIELDS},
        "hidden_act": "silu",
        "attention_bias": False,  # a key of LLaMA alone; Qwen2 always has biases
        "torch_dtype": "float32",
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),  # an absent key would default to LLaMA's 1 and 2
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
        "pad_token_id": getattr(tokenizer, "pad_token_id", None),
    }


def torch_name(modules: Mapping[str, str], path: tuple[str, ...], block: int | None) -> str:
    """Returns the name that a parameter of `LLM` has in transformers' `LlamaModel`.

    `("layers", "q_proj", "kernel")` in block 3 -> `"layers.3.self_attn.q_proj.weight"`.

    Args:
      modules: our name of a block's submodule -> transformers' name.
      path: path of the parameter in Flax's tree.
      block: index of the block; None for a parameter outside the blocks.
    """
    if block is None:
        return f"{path[0]}.weight"
    _, module, leaf = path
    return f"layers.{block}.{modules[module]}.{'bias' if leaf == 'bias' else 'weight'}"


@functools.cache
def abstract_encoder(config: LLMConfig, *, dtype: str, mesh: Mesh, rules: ShardingRules) -> dict[str, Any]:
    """Returns the parameters of `load_llm_encoder` as `jax.ShapeDtypeStruct`s with shardings, without reading files."""
    return abstract_parameters(_boxed_parameters(config.as_encoder()), Placement(mesh, rules), dtype=dtype)


def abstract_causal_lm(config: LLMConfig, *, dtype: str, mesh: Mesh, rules: ShardingRules) -> dict[str, Any]:
    """Returns the parameters of `load_causal_lm` as `jax.ShapeDtypeStruct`s with shardings, without reading files."""
    return abstract_parameters(causal_lm_parameters(config), Placement(mesh, rules), dtype=dtype)


def causal_lm_parameters(config: LLMConfig) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    """Returns {path: box with shape and logical axes} of every parameter of `CausalLM(config)`."""
    return _abstract(CausalLM(config))


def _boxed_parameters(config: LLMConfig) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    """Returns {path: box with shape and logical axes} of every parameter of `LLM(config)`, allocating nothing."""
    return _abstract(LLM(config))


def _abstract(model: nn.Module) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return flax.traverse_util.flatten_dict(jax.eval_shape(model.init, jax.random.key(0), tokens)["params"])


def _stored_modules(config: LLMConfig, is_fused: bool = False) -> Mapping[str, str]:
    """Returns {our name of a block's submodule: transformers' name}; fused modules share theirs."""
    modules = SANDWICH_MODULES if config.sandwich_norm else BLOCK_MODULES
    if not is_fused:
        return modules
    return modules | {module: tensor for tensor, fused in FUSED_MODULES.items() for module in fused}


def _stored_names(config: LLMConfig, modules: Mapping[str, str], prefix: str, path: tuple[str, ...]) -> list[str]:
    """Returns transformers' names of a parameter's tensors: one per block, or a single one outside the blocks."""
    blocks = range(config.num_hidden_layers) if path[0] == "layers" else (None,)
    return [prefix + torch_name(modules, path, block) for block in blocks]


def _prefix(weights: SafetensorsFolder) -> str:
    """Returns the prefix of the language model's tensor names.

    Raises:
      UserError: the folder has no language model.
    """
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in weights.names:
            return prefix
    raise UserError(
        f"{weights.folder}: tensor embed_tokens.weight is missing, under every prefix that transformers uses"
    )


def _to_torch(config: LLMConfig, params: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    boxed = causal_lm_parameters(config)
    if missing := boxed.keys() - params.keys():
        raise UserError(f"the LLM's parameters lack {'/'.join(min(missing))}, which its config requires")
    if unexpected := params.keys() - boxed.keys():
        raise UserError(f"the LLM's parameters have {'/'.join(min(unexpected))}, which its config does not have")
    for path, leaf in boxed.items():
        shape = leaf.value.shape
        if params[path].shape != shape:
            raise UserError(f"the LLM's {'/'.join(path)} has shape {params[path].shape}, its config requires {shape}")
    return dict(_torch_tensors(config, {path: np.asarray(value, np.float32) for path, value in params.items()}))


def _torch_tensors(config: LLMConfig, arrays: Mapping[tuple[str, ...], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    modules = _stored_modules(config)
    for (root, *path), value in arrays.items():
        if root == "norm":
            yield "model.norm.weight", value
        elif root == "lm_head":
            yield "lm_head.weight", _transposed(value)
        elif path[0] == "layers":
            for block, name in enumerate(_stored_names(config, modules, "model.", tuple(path))):
                yield name, _transposed(value[block]) if path[-1] == "kernel" else value[block]
        else:
            yield _stored_names(config, modules, "model.", tuple(path))[0], value


def _transposed(kernel: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(kernel.T)  # save_file ignores the strides of a view
