"""Writes a multi-modal LLM as transformers' `LlavaForConditionalGeneration` and `AutoProcessor` read it.

The LLM and the projector come from a training; the vision tower, which is not trained, and all configs come from the
folders that it started from.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from transformers import PreTrainedTokenizerBase

from lidit_jax.errors import UserError
from lidit_jax.files import read_json, write_json
from lidit_jax.models.initialize import is_stacked
from lidit_jax.models.llava import IMAGE_TEXT, Llava, LlavaConfig
from lidit_jax.models.llm import LLMConfig
from lidit_jax.weights.huggingface_config import language_model_part
from lidit_jax.weights.huggingface_llm import WEIGHTS_STEM, StoredLayout
from lidit_jax.weights.huggingface_vision import tower_prefix, vision_part
from lidit_jax.weights.loading import is_transposed, shape_in_file, torch_axes
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, SafetensorsFolder, read_config
from lidit_jax.weights.safetensors_shards import DTYPES, MAX_SHARD_BYTES, write_shards

LLM_PREFIX = "language_model.model."
HEAD = "language_model.lm_head.weight"
TOWER_PREFIX = "vision_tower.vision_model."
PROJECTOR_PREFIX = "multi_modal_projector."
TOWER_TENSORS = re.compile(r"(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.(?!position_ids)")

ParameterPath = tuple[str, ...]
# (path of a parameter, index of a block or None) -> its values on the host.
ReadParameter = Callable[[ParameterPath, int | None], np.ndarray]


class LlavaFiles:
    """Everything but the trained parameters that a folder of a multi-modal LLM is made of.

    Attributes:
      config: the networks.
    """

    def __init__(
        self,
        config: LlavaConfig,
        llm: epath.Path,
        vision: epath.Path,
        tokenizer: PreTrainedTokenizerBase,
        pixel_mean: tuple[float, ...],
        pixel_deviation: tuple[float, ...],
    ):
        """Reads the configs of the folders that the training starts from.

        Args:
          config: the networks.
          llm: folder of the LLM.
          vision: folder of the vision tower.
          tokenizer: tokenizer with the image token.
          pixel_mean: mean of red, green and blue, in [0, 1], that images are normalised with.
          pixel_deviation: standard deviation of the same.

        Raises:
          UserError: a config is missing or damaged.
        """
        self.config, self._tokenizer, self._vision = config, tokenizer, vision
        self._normalisation = pixel_mean, pixel_deviation
        values, file = read_config(llm), llm / CONFIG_FILE
        self._layout = StoredLayout.of(config.llm, values, file)
        model_type, self._text = language_model_part(values, file)
        self._text |= {"model_type": model_type, "vocab_size": config.llm.vocab_size}
        generation = llm / "generation_config.json"
        self._generation = generation.read_bytes() if generation.exists() else None
        vision_type, self._vision_values = vision_part(read_config(vision), vision / CONFIG_FILE)
        self._vision_values |= {"model_type": vision_type}

    def save(
        self, folder: epath.Path, read: ReadParameter, *, dtype: str, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        """Writes the folder; memory holds one tensor.

        Args:
          folder: existing empty folder. After an error it is incomplete, and the caller must remove it.
          read: returns the parameters of `Llava(config)`, in the order in which it is asked for them.
          dtype: "float32" or "bfloat16", of all tensors.
          max_shard_bytes: largest size of a file of weights.

        Raises:
          UserError: a tensor of the tower's folder is missing or damaged.
          OSError: the disk is full or not writable.
        """
        self._write_configs(folder, dtype)
        with SafetensorsFolder(self._vision, WEIGHTS_STEM) as tower:
            prefix = tower_prefix(tower)
            names = [name for name in sorted(tower.names) if TOWER_TENSORS.match(name.removeprefix(prefix))]
            renamed = {f"{TOWER_PREFIX}{name.removeprefix(prefix)}": name for name in names if name.startswith(prefix)}
            shapes = {new: tower.shape(name) for new, name in renamed.items()} | dict(self._trained_shapes())
            with write_shards(folder, WEIGHTS_STEM, shapes, DTYPES[dtype], max_shard_bytes) as write:
                for new, name in renamed.items():
                    write(new, tower.read(name, shapes[new]))
                for name, values in self.trained_tensors(read):
                    write(name, values)

    def trained_tensors(self, read: ReadParameter) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the name and values of each trained tensor, in PyTorch's axes; asks `read` in a fixed order."""
        for name, parts in self._parts().items():
            values = []
            for path, block in parts:
                value = np.asarray(read(path, block))
                if path[-1] == "weight":  # norm scales
                    value = value - np.float32(self._layout.norm_offset)
                values.append(value.transpose(torch_axes(value.ndim)) if is_transposed(path) else value)
            yield name, values[0] if len(values) == 1 else np.concatenate(values)

    def _parts(self) -> dict[str, list[tuple[ParameterPath, int | None]]]:
        """Returns, for each tensor, the parameters (and blocks of them) that it holds, one after the other."""
        parts: dict[str, list[tuple[ParameterPath, int | None]]] = {}
        for path, leaf in self._boxed().items():
            for block, name in enumerate(self._names(path)):
                parts.setdefault(name, []).append((path, block if is_stacked(leaf) else None))
        modules = list(self._layout.modules)  # fused tensors hold the modules in this order
        return {name: sorted(held, key=lambda part: _module_order(part[0], modules)) for name, held in parts.items()}

    def _names(self, path: ParameterPath) -> list[str]:
        if path[0] != "language_model":
            return [f"{PROJECTOR_PREFIX}{path[0]}.{'weight' if path[1] == 'kernel' else path[1]}"]
        return self._layout.causal_lm_names(self.config.llm, LLM_PREFIX, HEAD, path[1:])

    def _trained_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        boxed = self._boxed()
        for name, parts in self._parts().items():
            shapes = [shape_in_file(path, boxed[path]) for path, _ in parts]
            yield name, (sum(shape[0] for shape in shapes), *shapes[0][1:])

    def _boxed(self) -> dict[ParameterPath, nn.LogicallyPartitioned]:
        return llava_parameters(self.config)

    def _write_configs(self, folder: epath.Path, dtype: str) -> None:
        config = self.config
        tokens = {key: getattr(self._tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": config.image_token,
            "image_seq_length": config.tokens_per_image,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": config.feature_layer,
            "vision_feature_select_strategy": config.select,
            "tie_word_embeddings": config.llm.tie_word_embeddings,
            "torch_dtype": dtype,
            "text_config": self._text | {key: value for key, value in tokens.items() if value is not None},
            "vision_config": self._vision_values,
        }
        write_json(folder / CONFIG_FILE, values)
        if self._generation is not None:
            (folder / "generation_config.json").write_bytes(self._generation)
        side, (mean, deviation) = config.vision.image_size, self._normalisation
        images = {
            "image_processor_type": "LlavaImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_pad": True,  # to a square, as in training
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": 3,  # bicubic
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(mean),
            "image_std": list(deviation),
        }
        write_json(folder / "preprocessor_config.json", images)
        processor = {
            "processor_class": "LlavaProcessor",
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": config.select,
            "num_additional_image_tokens": int(config.vision.is_clip),  # the class token
            "image_token": IMAGE_TEXT,
        }
        write_json(folder / "processor_config.json", processor)
        self._tokenizer.save_pretrained(str(folder))


def llava_parameters(config: LlavaConfig) -> dict[ParameterPath, nn.LogicallyPartitioned]:
    """Returns {path: box with shape and logical axes} of every parameter of `Llava(config)`, allocating nothing."""
    tokens = jax.ShapeDtypeStruct((1, config.tokens_per_image), jnp.int32)
    features = jax.ShapeDtypeStruct((1, config.tokens_per_image, config.vision.hidden_size), jnp.float32)
    shapes = jax.eval_shape(Llava(config).init, jax.random.key(0), tokens, features)
    return flax.traverse_util.flatten_dict(shapes["params"])


def add_image_token(tokenizer: PreTrainedTokenizerBase, config: LLMConfig) -> tuple[int, int]:
    """Adds the image token to a tokenizer that lacks it.

    Args:
      tokenizer: tokenizer of the LLM, which is changed.
      config: config of the LLM.

    Returns:
      The image token's id, and the vocabulary size that the LLM needs: its own if that has room for the token, else the
      next multiple of 64, which the output head can be sharded by.
    """
    if IMAGE_TEXT not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TEXT]}, replace_extra_special_tokens=False)
    token = tokenizer.convert_tokens_to_ids(IMAGE_TEXT)
    if not isinstance(token, int) or token < 0:
        raise UserError(f"the tokenizer takes no token {IMAGE_TEXT}: use another LLM")
    return token, config.vocab_size if token < config.vocab_size else -(-(token + 1) // 64) * 64


def extend_vocabulary(params: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns the parameters of a `CausalLM` with a larger vocabulary, whose new rows are the mean of the others.

    Args:
      params: parameter tree.
      size: the vocabulary size, at least that of the parameters.
    """
    model = dict(params["model"])
    model["embed_tokens"] = _append_mean(model["embed_tokens"], size, 0)
    extended = {**params, "model": model}
    if "lm_head" in params:
        extended["lm_head"] = {"kernel": _append_mean(params["lm_head"]["kernel"], size, 1)}
    return extended


def _append_mean(x: jax.Array, size: int, axis: int) -> jax.Array:
    mean = jnp.mean(x, axis=axis, keepdims=True, dtype=jnp.float32).astype(x.dtype)
    return jnp.concatenate([x, jnp.repeat(mean, size - x.shape[axis], axis=axis)], axis=axis)


def _module_order(path: ParameterPath, modules: list[str]) -> int:
    return modules.index(path[-2]) if len(path) > 1 and path[-2] in modules else 0


def read_normalisation(vision: epath.Path, is_clip: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and standard deviation of red, green and blue that a vision tower was trained with.

    Args:
      vision: folder of the tower, whose preprocessor_config.json states them; CLIP's or SigLIP's without that file.
      is_clip: whether the tower is CLIP's.

    Raises:
      UserError: the file is damaged.
    """
    file = vision / "preprocessor_config.json"
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    mean, deviation = clip if is_clip else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    if not file.exists():
        return mean, deviation
    try:
        values = read_json(file)
        given = values.get("image_mean", mean), values.get("image_std", deviation)
        found = tuple(map(float, given[0])), tuple(map(float, given[1]))
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): copy the file again") from error
    if any(len(numbers) != 3 or not np.isfinite(numbers).all() for numbers in found) or min(found[1]) <= 0:
        raise UserError(f"{file}: image_mean and image_std must each be three numbers, those of image_std above 0")
    return found[0], found[1]
