"""Loads a CLIP or SigLIP image encoder from a transformers folder (config.json and safetensors)."""

import functools
from collections.abc import Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from lidit_jax.errors import UserError
from lidit_jax.models.vision import VisionConfig, VisionTower
from lidit_jax.parallel.rules import ShardingRules
from lidit_jax.weights.loading import Placement, abstract_parameters, place_parameters
from lidit_jax.weights.published_config import parse, positive_integer, positive_number
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, read_config

WEIGHTS_STEM = "model"
# model_type of config.json -> model_type of its image encoder's part. CLIP's and SigLIP's folders hold two encoders.
MODEL_TYPES = {
    "clip_vision_model": "clip_vision_model",
    "clip": "clip_vision_model",
    "siglip_vision_model": "siglip_vision_model",
    "siglip": "siglip_vision_model",
}
SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("image_size", "patch_size"),
)
# Prefixes of the tensor names: of the encoder alone and beside a text encoder, as versions of transformers write them.
PREFIXES = ("", "vision_model.")
# Our name of a block's submodule -> transformers' name.
BLOCK_MODULES = {
    "layer_norm1": "layer_norm1",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "out_proj": "self_attn.out_proj",
    "layer_norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
# Our path of a parameter outside the blocks -> transformers' name of its tensor.
OUTSIDE_BLOCKS = {
    ("class_embedding",): "embeddings.class_embedding",
    ("patch_embedding", "kernel"): "embeddings.patch_embedding.weight",
    ("patch_embedding", "bias"): "embeddings.patch_embedding.bias",
    ("position_embedding",): "embeddings.position_embedding.weight",
    ("pre_layernorm", "weight"): "pre_layrnorm.weight",  # misspelt in CLIP
    ("pre_layernorm", "bias"): "pre_layrnorm.bias",
}
DERIVED_TENSOR = "position_ids"  # a buffer of earlier versions


def read_vision_config(folder: str | epath.Path, *, dtype: str, attention: str = "auto") -> VisionConfig:
    """Returns the config of a folder's image encoder.

    Args:
      folder: folder with config.json.
      dtype: `VisionConfig.dtype`, which config.json does not determine.
      attention: `VisionConfig.attention`, which config.json does not determine.

    Raises:
      UserError: config.json is missing or damaged, or `VisionTower` does not implement the model.
    """
    file = epath.Path(folder) / CONFIG_FILE
    return vision_config(read_config(folder), file, dtype=dtype, attention=attention)


def vision_config(values: Mapping[str, Any], file: Any, *, dtype: str, attention: str = "auto") -> VisionConfig:
    """Returns the config of an image encoder, given the contents of config.json; see `read_vision_config`."""
    model_type, values = vision_part(values, file)
    config = parse(model_type, values, file, blocks="num_hidden_layers", sizes=SIZES)
    if config.num_channels != 3:
        raise UserError(f"{file}: num_channels={config.num_channels!r:.80}: images have 3 channels")
    try:
        return VisionConfig(
            **{key: positive_integer(config, key, file) for key in SIZES},
            layer_norm_eps=positive_number(config, "layer_norm_eps", file),
            hidden_act=str(config.hidden_act),
            is_clip=model_type == "clip_vision_model",
            attention=attention,
            dtype=dtype,
        )
    except UserError as error:
        raise UserError(f"{file}: {str(error).removeprefix(f'{file}: ')}") from error


def load_vision_tower(
    folder: str | epath.Path,
    *,
    layer: int = -1,
    dtype: str = "float32",
    attention: str = "auto",
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[VisionConfig, dict[str, Any]]:
    """Loads an image encoder up to a hidden state; the tensors after it are not read.

    Args:
      folder: folder with config.json and model.safetensors, or that file's shards and their index.
      layer: the hidden state, as `VisionConfig.up_to` takes it.
      dtype: compute dtype; matrices, biases and embeddings are stored in it.
      attention: attention implementation.
      mesh: device mesh; None puts all parameters on the first device.
      rules: sharding rules for the mesh; None: `ShardingRules()`.

    Returns:
      The config of the full tower, and the parameters for `VisionTower(config.up_to(layer))`.

    Raises:
      UserError: the model type is not supported, there is no such hidden state, or a file or tensor is missing,
        damaged, of the wrong shape or not finite.
    """
    config = read_vision_config(folder, dtype=dtype, attention=attention)
    tower = config.up_to(layer)
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        prefix = tower_prefix(weights)
        boxed = boxed_parameters(tower)
        names = {path: stored_names(tower, prefix, path) for path in boxed}
        blocks = tuple(f"{prefix}encoder.layers.{block}." for block in range(tower.num_hidden_layers))
        params = place_parameters(
            weights,
            boxed,
            names,
            Placement(mesh, rules),
            dtype=dtype,
            belonging=(*blocks, f"{prefix}embeddings."),
            derived=DERIVED_TENSOR,
        )
    return config, params


def abstract_vision_tower(config: VisionConfig, *, dtype: str, mesh: Mesh, rules: ShardingRules) -> dict[str, Any]:
    """Returns the parameters of `VisionTower(config)` as shapes with shardings, without reading files."""
    return abstract_parameters(boxed_parameters(config), Placement(mesh, rules), dtype=dtype)


@functools.cache
def boxed_parameters(config: VisionConfig) -> dict[tuple[str, ...], nn.LogicallyPartitioned]:
    """Returns {path: box with shape and logical axes} of every parameter, without allocating arrays."""
    images = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(VisionTower(config).init, jax.random.key(0), images)
    return flax.traverse_util.flatten_dict(shapes["params"])


def stored_names(config: VisionConfig, prefix: str, path: tuple[str, ...]) -> list[str]:
    """Returns transformers' names of a parameter's tensors: one per block, or a single one outside the blocks."""
    if path[0] != "layers":
        return [prefix + OUTSIDE_BLOCKS[path]]
    leaf = "bias" if path[2] == "bias" else "weight"
    return [
        f"{prefix}encoder.layers.{block}.{BLOCK_MODULES[path[1]]}.{leaf}" for block in range(config.num_hidden_layers)
    ]


def vision_part(values: Mapping[str, Any], file: Any) -> tuple[str, dict[str, Any]]:
    """Returns the type of an image encoder and its part of the config.

    Raises:
      UserError: the config describes no supported image encoder.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"{file}: model_type {model_type!r:.80} is not a supported vision tower; use {', '.join(MODEL_TYPES)}"
        )
    if model_type == MODEL_TYPES[model_type]:
        return model_type, dict(values)
    inner = values.get("vision_config")
    if not isinstance(inner, dict):
        raise UserError(f"{file}: vision_config is missing or not an object; copy the file again")
    # Files leave out values that equal transformers' defaults.
    return MODEL_TYPES[model_type], _default_sizes(MODEL_TYPES[model_type]) | inner


def _default_sizes(model_type: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING  # imports torch where it is installed, which takes seconds

    config = CONFIG_MAPPING[model_type]()
    return {key: getattr(config, key) for key in SIZES}


def tower_prefix(weights: SafetensorsFolder) -> str:
    """Returns the prefix of the image encoder's tensor names.

    Raises:
      UserError: the folder has no image encoder.
    """
    for prefix in PREFIXES:
        if f"{prefix}embeddings.patch_embedding.weight" in weights.names:
            return prefix
    raise UserError(f"{weights.folder}: tensor embeddings.patch_embedding.weight is missing: use a vision tower")
