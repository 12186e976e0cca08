"""JSON files that others read while they are written."""

import json
from typing import Any

from etils import epath


def write_json(file: epath.Path, value: Any, indent: int | None = 2) -> None:
    """Writes `value`, so that nobody ever sees half of it.

    Args: indent: None writes one line.

    Raises:
      OSError: the file cannot be written; one that was there is kept.
    """
    beside = file.parent / f".{file.name}.new"
    beside.write_text(json.dumps(value, indent=indent) + "\n")
    beside.replace(file)
