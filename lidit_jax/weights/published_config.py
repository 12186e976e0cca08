"""Parses published config.json files with transformers' own classes, and validates the values that are used."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers.utils import logging as transformers_logging

from lidit_jax.errors import UserError

if TYPE_CHECKING:  # imports torch where it is installed, which takes seconds
    from transformers import PreTrainedConfig

MAX_BLOCKS = 1000  # transformers builds a list of block types: a damaged number must not exhaust memory


def parse(
    model_type: str, values: Mapping[str, Any], file: Any, *, blocks: str, sizes: tuple[str, ...] = ()
) -> "PreTrainedConfig":
    """Returns the config as transformers parses it: absent keys have its defaults, old keys keep their meaning.

    Args:
      model_type: transformers' name of the model type.
      values: contents of config.json.
      file: path of config.json, for error messages.
      blocks: key of the number of blocks.
      sizes: required keys, for which transformers would default to the sizes of one particular model.

    Raises:
      UserError: a size is missing, the number of blocks is out of range, the weights are quantised, or transformers
        rejects the config.
    """
    for key in sizes:
        if values.get(key) is None:
            raise UserError(f"{file}: {key} is missing")
    refuse_quantised(values, file)
    for key in (blocks, "num_hidden_layers"):  # transformers accepts num_hidden_layers as another name of `blocks`
        count = values.get(key, 1)
        if type(count) is not int or not 1 <= count <= MAX_BLOCKS:
            raise UserError(f"{file}: {key}={count!r:.80} is not an integer from 1 to {MAX_BLOCKS}")
    # Drop the keys of classifiers: transformers would build a name for each of `num_labels` labels.
    values = {key: value for key, value in values.items() if key not in ("num_labels", "id2label", "label2id")}
    from transformers import CONFIG_MAPPING  # imports torch where it is installed, which takes seconds

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)  # it prints all of a config that it rejects
    try:
        return CONFIG_MAPPING[model_type].from_dict({**values, "model_type": model_type})
    except Exception as error:  # each config class raises its own types
        raise UserError(f"{file}: transformers rejects it ({' '.join(str(error).split())[:300]})") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def refuse_quantised(values: Mapping[str, Any], file: Any) -> None:
    """Checks that a config does not describe quantised weights.

    Args:
      values: contents of config.json.
      file: path of config.json, for error messages.

    Raises:
      UserError: it has a quantization_config.
    """
    if values.get("quantization_config") is not None:
        raise UserError(f"{file}: quantization_config: quantised weights are not supported; use the original ones")


def check_format_version(version: Any, newest: int, where: str) -> None:
    """Checks that a format version is one that this code reads.

    Args:
      version: version as found in the file.
      newest: newest version that can be read.
      where: file and key of the version, for error messages.

    Raises:
      UserError: the version is not an integer from 1 to `newest`.
    """
    if type(version) is not int or version < 1:
        raise UserError(f"{where}={version!r:.80} is not an integer of at least 1")
    if version > newest:
        raise UserError(
            f"{where}={version!r:.80} is newer than {newest}, the newest supported: install a newer lidit-jax"
        )


def positive_integer(
    values: "PreTrainedConfig | Mapping[str, Any]", key: str, file: Any, default: int | None = None
) -> int:
    """Returns the value of a key.

    Args:
      values: config object or dict.
      key: name of the value.
      file: path of the file, for error messages.
      default: result if the value is absent or null.

    Raises:
      UserError: the value is not an integer from 1 to 2^31 - 1.
    """
    value = _value(values, key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{file}: {key}={value!r:.80} is not a positive integer below 2^31")
    return value


def positive_number(values: "PreTrainedConfig | Mapping[str, Any]", key: str, file: Any) -> float:
    """Returns the value of a key as a float.

    Raises:
      UserError: the value is not a number above 0 that float32 can represent.
    """
    value = _value(values, key)
    if type(value) not in (int, float) or not 0 < value <= float(np.finfo(np.float32).max):
        raise UserError(f"{file}: {key}={value!r:.80} is not a positive number")
    return float(value)


def boolean(values: "PreTrainedConfig | Mapping[str, Any]", key: str, file: Any) -> bool:
    """Returns the value of a key, or False if it is absent.

    Raises:
      UserError: the value is not true or false.
    """
    value = _value(values, key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UserError(f"{file}: {key}={value!r:.80} is not true or false")
    return value


def _value(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else getattr(values, key, None)
