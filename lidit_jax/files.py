"""JSON files that others read while they are written, and values that JSON can hold."""

import json
import math
from typing import Any

from etils import epath


def finite(value: Any) -> Any:
    """Replaces NaN and infinities, which JSON does not have, with None; in a copy.

    Args:
      value: of dictionaries, lists, tuples, strings, numbers, booleans and None.
    """
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: epath.Path, value: Any, indent: int | None = 2) -> None:
    """Writes `value`, so that nobody ever sees half of it.

    Args: indent: None writes one line.

    Raises:
      OSError: the file cannot be written; one that was there is kept.
    """
    beside = file.parent / f".{file.name}.new"
    beside.write_text(json.dumps(value, indent=indent) + "\n")
    beside.replace(file)
