"""Output folders that a command fills over several runs; a file of their provenance protects them from other runs."""

from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import check_writable, is_unused, read_json


def read_claim(out: epath.Path, name: str) -> dict[str, Any] | None:
    """Reads the provenance of an output folder.

    Args:
      out: the folder.
      name: name of the JSON file that holds it.

    Returns:
      The provenance; None if the folder is missing or empty.

    Raises:
      UserError: `out` is a file or a folder with other content, or the file of its provenance is damaged.
    """
    check_writable(out, f"--out={out}")
    file = out / name
    if not file.exists():
        if not is_unused(out):
            raise UserError(f"--out={out} is not empty and has no {name}: choose another folder")
        return None
    try:
        found = read_json(file)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: name another --out")
    return found


def check_claim(
    out: epath.Path, content: str, found: Mapping[str, Any], provenance: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Checks that an output folder belongs to the current run.

    Args:
      out: the folder.
      content: name of its content in error messages, such as "images" or "results".
      found: provenance in the folder.
      provenance: provenance of the current run.
      keys: keys whose values must be equal.

    Raises:
      UserError: a value differs.
    """
    for key in keys:
        if found.get(key) != provenance.get(key):
            raise UserError(
                f"--out={out} has {content} of another {key} ({found.get(key)!r:.80}, now "
                f"{provenance.get(key)!r:.80}): choose another folder"
            )
