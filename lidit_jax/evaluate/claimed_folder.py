"""Folders that a command fills over several runs, and what they are of: nothing else's is ever overwritten."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from lidit_jax.errors import UserError


def read_claim(out: epath.Path, name: str) -> dict[str, Any] | None:
    """What `name` in the folder says of it; None where the folder is new or empty.

    Raises:
      UserError: it is a file, a folder with something else in it, or the claim is damaged.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file: name a folder")
    file = out / name
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"--out={out} is not empty and has no {name}: name another folder")
        return None
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: name another --out")
    return found


def check_claim(
    out: epath.Path, what: str, found: Mapping[str, Any], facts: Mapping[str, Any], keys: Iterable[str]
) -> None:
    """Raises UserError if the folder's `what` ("pictures", "results") are of something else by one of the keys."""
    for key in keys:
        if found.get(key) != facts.get(key):
            raise UserError(
                f"--out={out} has {what} of another {key} ({found.get(key)!r:.80}, now {facts.get(key)!r:.80}): name "
                "another folder"
            )
