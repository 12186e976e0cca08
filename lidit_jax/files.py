"""Files that are read or written as a whole: JSON that others may read meanwhile, and text that users name."""

import json
import math
from typing import Any

from etils import epath

from lidit_jax.errors import UserError

MAX_BYTES = 64 << 20


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


def read_text(file: epath.Path, named: str, what: str) -> str:
    """The whole of it, without a byte-order mark.

    Args:
      named: how the user named it, as "--file=x.txt".
      what: what it should be, as "a list of prompts".

    Raises:
      UserError: it is larger than `MAX_BYTES`, or not UTF-8.
    """
    if file.stat().length > MAX_BYTES:
        raise UserError(f"{named}: larger than {MAX_BYTES >> 20} MiB; is it {what}?")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: not UTF-8 (byte {error.start}); if it is {what}, save it as UTF-8") from None
