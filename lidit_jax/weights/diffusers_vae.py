"""Converts a diffusers `vae/` folder (config.json and safetensors) to and from `VAEConfig` and Flax parameters."""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from lidit_jax.errors import UserError
from lidit_jax.models.vae import AutoencoderKL
from lidit_jax.models.vae_config import DOWN_BLOCK_TYPE, UP_BLOCK_TYPE, VAEConfig
from lidit_jax.weights.loading import torch_axes
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, new_folder, read_config

WEIGHTS_STEM = "diffusion_pytorch_model"
# Version written to config.json: the oldest diffusers that knows each of its keys (use_quant_conv).
DIFFUSERS_VERSION = "0.30.0"

OWN_TENSORS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Attention projections had other names in diffusers before 0.17; such files (SD 1.x) are still in use.
OLD_ATTENTION_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def load_vae(folder: str | Path) -> tuple[VAEConfig, dict[str, Any]]:
    """Loads a diffusers autoencoder.

    Args:
      folder: folder with config.json and diffusion_pytorch_model.safetensors, or that file's shards and their index.

    Returns:
      The config, and the parameters for `AutoencoderKL(config).apply({"params": params}, …)`: a nested dict of
      float32 NumPy arrays in host memory, which the caller puts on devices.

    Raises:
      UserError: a file or tensor is missing, damaged, of the wrong shape, not floating point or not finite; or the
        folder has its weights only as a pickle (.bin), which is never read.
    """
    config = VAEConfig.from_dict(read_config(folder))
    flat = {}
    with SafetensorsFolder(folder, WEIGHTS_STEM) as weights:
        names = {path: _stored_name(torch_name(path), weights.names) for path in parameter_shapes(config)}
        weights.check_no_unused(names.values(), OWN_TENSORS)
        for path, shape in parameter_shapes(config).items():
            axes = torch_axes(len(shape))
            with np.errstate(over="ignore"):  # float64 beyond the range of float32: rejected below
                value = weights.read(names[path], tuple(shape[axis] for axis in axes)).astype(np.float32)
            if not np.isfinite(value).all():
                raise UserError(
                    f"{weights.folder}: tensor {names[path]} has values that are not finite; copy the file again"
                )
            flat[path] = np.ascontiguousarray(value.transpose(np.argsort(axes)))
    return config, flax.traverse_util.unflatten_dict(flat)


def save_vae(folder: str | Path, config: VAEConfig, params: Mapping[str, Any]) -> None:
    """Writes a folder that `diffusers.AutoencoderKL.from_pretrained` and `load_vae` read, in float32.

    The write is atomic: files go to a scratch folder, which is renamed when it is complete.

    Args:
      folder: folder to write; must not exist or be empty.
      config: config of the autoencoder.
      params: its parameter tree, with or without Flax's boxes of logical axis names.

    Raises:
      UserError: the folder is not empty or cannot be written, or the parameters do not fit the config.
    """
    tensors = _to_torch(config, flax.traverse_util.flatten_dict(nn.meta.unbox(params)))
    with new_folder(folder) as scratch:
        (scratch / CONFIG_FILE).write_text(json.dumps(_config_dict(config), indent=2) + "\n", encoding="utf-8")
        # from_pretrained rejects a file whose metadata does not name its format.
        save_file(tensors, scratch / f"{WEIGHTS_STEM}.safetensors", metadata={"format": "pt"})


@functools.cache
def parameter_shapes(config: VAEConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns {path: shape} of every parameter of `AutoencoderKL(config)`, without allocating arrays."""
    side = config.downsampling_factor
    images = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    variables = jax.eval_shape(AutoencoderKL(config).init, jax.random.key(0), images)
    flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables["params"]))
    return {path: leaf.shape for path, leaf in flat.items()}


def torch_name(path: tuple[str, ...]) -> str:
    """Returns diffusers' name of a parameter.

    `("encoder", "mid_block", "resnets_0", "conv1", "kernel")` -> `"encoder.mid_block.resnets.0.conv1.weight"`.
    """
    *modules, leaf = path
    modules = [re.sub(r"_(\d+)$", r".\1", module) for module in modules]
    return ".".join([*modules, {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]])


def _to_torch(config: VAEConfig, params: Mapping[tuple[str, ...], Any]) -> dict[str, np.ndarray]:
    shapes = parameter_shapes(config)
    if missing := shapes.keys() - params.keys():
        raise UserError(f"the VAE's parameters lack {'/'.join(min(missing))}, which its config requires")
    if unexpected := params.keys() - shapes.keys():
        raise UserError(f"the VAE's parameters have {'/'.join(min(unexpected))}, which its config does not have")
    tensors = {}
    for path, shape in shapes.items():
        if params[path].shape != shape:
            raise UserError(f"the VAE's {'/'.join(path)} has shape {params[path].shape}, its config requires {shape}")
        value = np.asarray(params[path], np.float32).transpose(torch_axes(len(shape)))
        tensors[torch_name(path)] = np.ascontiguousarray(value)  # save_file ignores the strides of a view
    return tensors


def _stored_name(name: str, stored: set[str]) -> str:
    """Returns the name of a tensor in the folder: the old name if the folder has only that, else the current one."""
    for new, old in OLD_ATTENTION_NAMES.items():
        old_name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        if name not in stored and old_name in stored:
            return old_name
    return name


def _config_dict(config: VAEConfig) -> dict[str, Any]:
    num_blocks = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "down_block_types": [DOWN_BLOCK_TYPE] * num_blocks,
        "up_block_types": [UP_BLOCK_TYPE] * num_blocks,
        **dataclasses.asdict(config),
    }
