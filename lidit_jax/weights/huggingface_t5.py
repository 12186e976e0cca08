"""Converts a transformers T5 or mT5 folder (config.json and safetensors) to and from `T5Config` and Flax parameters."""

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from lidit_jax.models.t5 import T5Config, T5Encoder
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.loading import Placement, place_parameters
from lidit_jax.weights.published_config import parse, positive_integer, positive_number
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, new_folder, read_config

if TYPE_CHECKING:  # imports torch where it is installed, which takes seconds
    from transformers import PreTrainedConfig

WEIGHTS_STEM = "model"
MODEL_TYPES = ("t5", "mt5")
# Required keys: transformers would default to the sizes of T5-small.
SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
DISTANCES = ("relative_attention_num_buckets", "relative_attention_max_distance")
# feed_forward_proj -> (activation, gated). In T5, "gated-gelu" means the tanh approximation of GELU.
FEED_FORWARDS = {
    "relu": ("relu", False),
    "gelu": ("gelu", False),
    "gated-gelu": ("gelu_new", True),
    "gated-silu": ("silu", True),
}

# Our name of a block's submodule -> transformers' name.
BLOCK_MODULES = {
    "attention_norm": "layer.0.layer_norm",
    "q": "layer.0.SelfAttention.q",
    "k": "layer.0.SelfAttention.k",
    "v": "layer.0.SelfAttention.v",
    "o": "layer.0.SelfAttention.o",
    "feed_forward_norm": "layer.1.layer_norm",
    "wi": "layer.1.DenseReluDense.wi",
    "wi_0": "layer.1.DenseReluDense.wi_0",
    "wi_1": "layer.1.DenseReluDense.wi_1",
    "wo": "layer.1.DenseReluDense.wo",
}
BLOCKS = "encoder.block."
OUTSIDE_BLOCKS = {
    "relative_attention_bias": f"{BLOCKS}0.layer.0.SelfAttention.relative_attention_bias.weight",
    "final_layer_norm": "encoder.final_layer_norm.weight",
}
# Names of the token embeddings; a file has one of them or both, for the same array.
EMBEDDINGS = ("encoder.embed_tokens.weight", "shared.weight")


def load_t5_encoder(
    folder: str | Path | epath.Path,
    *,
    dtype: str = "float32",
    attention: str = "auto",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[T5Config, dict[str, Any]]:
    """Loads the encoder of a transformers T5, from a folder of the full model or of the encoder alone.

    Host memory holds one tensor at a time, which is sharded and sent to the devices before the next one is read.

    Args:
      folder: folder with config.json and model.safetensors, or that file's shards and their index, on a disk or in a
        bucket (gs://…). Shards that hold only the decoder and the head may be missing.
      dtype: compute dtype of the encoder. Matrices are stored in it, because each use would cast them to it anyway.
        Norm scales are stored in float32.
      attention: attention implementation (`models/attention.py`).
      mesh: device mesh; default: all parameters go to the first device.
      rules: sharding rules for the mesh; default: `ShardingRules()`.

    Returns:
      The config, and the parameters for `T5Encoder(config).apply({"params": params}, tokens, mask)`: a nested dict of
      arrays, with the blocks stacked.

    Raises:
      UserError: the model type is not supported; a file or tensor is missing, damaged, of the wrong shape, not floating
        point or not finite; or the folder has its weights only as pickles (.bin, .pt), which are never read.
    """
    folder = epath.Path(folder)
    config = t5_config(read_config(folder), folder / CONFIG_FILE, dtype=dtype, attention=attention)
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        boxed = _boxed_parameters(config)
        names = {path: _stored_names(config, path, weights.names) for path in boxed}
        params = place_parameters(weights, boxed, names, Placement(mesh, rules), dtype=dtype, belonging=(BLOCKS,))
    return config, params


def save_t5_encoder(
    folder: str | Path | epath.Path, config: T5Config, params: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Writes an encoder and its tokenizer as transformers' `T5EncoderModel.from_pretrained` reads them, in float32.

    Args:
      folder: folder to write; must not exist or be empty.
      config: config of the encoder.
      params: parameter tree of `T5Encoder(config)`, fully addressable from this host.
      tokenizer: tokenizer to save with the weights; config.json names its special tokens.

    Raises:
      UserError: the folder is not empty or cannot be written, or transformers has no name for the activation.
    """
    kinds = {meant: kind for kind, meant in FEED_FORWARDS.items()}
    if (config.activation, config.gated) not in kinds:
        raise UserError(
            f"T5 with activation={config.activation!r}, gated={config.gated} does not exist in transformers"
        )
    values = {key: getattr(config, key) for key in (*SIZES, *DISTANCES, "layer_norm_epsilon")}
    values |= {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": kinds[config.activation, config.gated],
        "torch_dtype": "float32",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    tensors = {}
    for path, array in flax.traverse_util.flatten_dict(nn.meta.unbox(params)).items():
        array = np.asarray(array, np.float32)
        for name, value in zip(_stored_names(config, path), array if path[0] == "layers" else [array], strict=True):
            tensors[name] = np.ascontiguousarray(value.T) if path[-1] == "kernel" else value
    with new_folder(folder) as scratch:
        (scratch / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, scratch / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(str(scratch))


def t5_config(values: Mapping[str, Any], file: Any, *, dtype: str, attention: str = "auto") -> T5Config:
    """Returns the config of a published T5 or mT5.

    Args:
      values: contents of its config.json. transformers parses them: absent keys other than sizes have its defaults.
      file: path of config.json, for error messages.
      dtype: `T5Config.dtype`, which config.json does not determine.
      attention: `T5Config.attention`, which config.json does not determine.

    Raises:
      UserError: a key is missing or has an invalid value, or `T5Encoder` does not implement the model.
    """
    config = _parse(values, file)
    integers = {key: positive_integer(config, key, file) for key in (*SIZES, *DISTANCES)}
    activation, gated = _feed_forward(config, file)
    try:
        return T5Config(
            **integers,
            layer_norm_epsilon=positive_number(config, "layer_norm_epsilon", file),
            activation=activation,
            gated=gated,
            attention=attention,
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _parse(values: Mapping[str, Any], file: Any) -> "PreTrainedConfig":
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{file}: model_type {model_type!r:.80} is not supported; use one of {', '.join(MODEL_TYPES)}")
    return parse(model_type, values, file, sizes=SIZES, blocks="num_layers")


def _feed_forward(config: "PreTrainedConfig", file: Any) -> tuple[str, bool]:
    """Returns (activation, gated) of feed_forward_proj.

    Files may repeat these two in keys of their own, which transformers would use instead.

    Raises:
      UserError: the value is not supported, or the repeated keys contradict it.
    """
    kind = config.feed_forward_proj
    if kind not in FEED_FORWARDS:
        raise UserError(
            f"{file}: feed_forward_proj={kind!r:.80} is not supported; use one of {', '.join(FEED_FORWARDS)}"
        )
    for key, meant in zip(("dense_act_fn", "is_gated_act"), FEED_FORWARDS[kind], strict=True):
        if getattr(config, key) != meant:
            raise UserError(f"{file}: {key}={getattr(config, key)!r:.80} contradicts feed_forward_proj={kind!r}")
    return FEED_FORWARDS[kind]


@functools.cache
def _boxed_parameters(config: T5Config) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    """Returns {path: box with shape and logical axes} of every parameter, without allocating arrays."""
    tokens, mask = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1, 2), jnp.bool_)
    shapes = jax.eval_shape(T5Encoder(config).init, jax.random.key(0), tokens, mask)
    return flax.traverse_util.flatten_dict(shapes["params"])


def _stored_names(config: T5Config, path: tuple[str, ...], stored: Collection[str] = ()) -> list[str]:
    """Returns transformers' names of a parameter's tensors: one per block, or a single one outside the blocks.

    Args:
      config: config of the encoder.
      path: path of the parameter in Flax's tree.
      stored: names of the tensors in the folder, which decide between the names of the embeddings.
    """
    if path[0] == "layers":
        return [f"{BLOCKS}{block}.{BLOCK_MODULES[path[1]]}.weight" for block in range(config.num_layers)]
    if path[0] == "embed_tokens":
        return [next((name for name in EMBEDDINGS if name in stored), EMBEDDINGS[-1])]
    return [OUTSIDE_BLOCKS[path[0]]]
