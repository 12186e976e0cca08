"""What reading any published config.json takes: transformers' own classes parse it, and no value is believed."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import CONFIG_MAPPING, PreTrainedConfig

from lidit_jax.errors import UserError

MAX_BLOCKS = 1000  # transformers lists the type of every block: a damaged number must not fill the memory


def parse(
    model_type: str, values: Mapping[str, Any], file: Any, *, blocks: str, sizes: tuple[str, ...] = ()
) -> PreTrainedConfig:
    """The values as transformers' class for the model type: absent keys have its defaults, old keys their meaning.

    Args:
        values: what config.json holds.
        file: where they come from, for messages.
        blocks: the key of the number of blocks.
        sizes: keys that must be there; transformers would fill in those of one particular model.

    Raises:
        UserError: a size is missing, there are too many blocks, the weights are quantised, or transformers refuses it.
    """
    for key in sizes:
        if values.get(key) is None:
            raise UserError(f"{file}: {key} is missing")
    refuse_quantised(values, file)
    for key in (blocks, "num_hidden_layers"):  # which transformers takes for the first one, whatever that is called
        count = values.get(key, 1)
        if type(count) is not int or not 1 <= count <= MAX_BLOCKS:
            raise UserError(f"{file}: {key}={count!r:.80} is not a whole number from 1 to {MAX_BLOCKS}")
    # Of classifiers; transformers would write out a name for each label.
    values = {key: value for key, value in values.items() if key not in ("num_labels", "id2label", "label2id")}
    try:
        return CONFIG_MAPPING[model_type].from_dict({**values, "model_type": model_type})
    except Exception as error:  # of many types: the config classes check each key in their own way
        raise UserError(f"{file}: transformers refuses it ({' '.join(str(error).split())[:300]})") from error


def refuse_quantised(values: Mapping[str, Any], file: Any) -> None:
    """Raises UserError if the config says that the weights beside it are quantised."""
    if values.get("quantization_config") is not None:
        raise UserError(f"{file}: quantization_config: quantised weights are not supported; use the original ones")


def check_format_version(version: Any, newest: int, where: str) -> None:
    """Raises UserError unless the version, found at `where`, is one from 1 to `newest`."""
    if type(version) is not int or version < 1:
        raise UserError(f"{where}={version!r:.80} is not a whole number from 1 on")
    if version > newest:
        raise UserError(
            f"{where}={version!r:.80} is newer than {newest}, which this program reads: install a newer lidit-jax"
        )


def positive_integer(
    values: PreTrainedConfig | Mapping[str, Any], key: str, file: Any, default: int | None = None
) -> int:
    """Raises UserError unless the value is a whole number from 1 to 2^31 - 1."""
    value = _value(values, key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value < 2**31:
        raise UserError(f"{file}: {key}={value!r:.80} is not a positive whole number below 2^31")
    return value


def positive_number(values: PreTrainedConfig | Mapping[str, Any], key: str, file: Any) -> float:
    """Raises UserError unless the value is a number above 0 that float32 can hold."""
    value = _value(values, key)
    if type(value) not in (int, float) or not 0 < value <= float(np.finfo(np.float32).max):
        raise UserError(f"{file}: {key}={value!r:.80} is not a positive number")
    return float(value)


def boolean(values: PreTrainedConfig | Mapping[str, Any], key: str, file: Any) -> bool:
    """False if it is absent. Raises UserError unless the value is true or false."""
    value = _value(values, key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise UserError(f"{file}: {key}={value!r:.80} is not true or false")
    return value


def _value(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else getattr(values, key, None)
