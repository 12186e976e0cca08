"""Metadata of generated images: the texts in their PNG files, and the list that `sample` writes beside them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import read_json

LIST_FILE = "images.json"
IMAGE_NAME = re.compile(r"\d{5,}\.png")


def png_text(prompt: str, seed: int | str, settings: Mapping[str, Any]) -> dict[str, str]:
    """Returns the texts of a PNG file, by keyword: the prompt, the seed, and the settings as JSON."""
    return {"prompt": prompt, "seed": str(seed), "settings": json.dumps(settings, ensure_ascii=False)}


def read_list(folder: epath.Path) -> dict[str, str] | None:
    """Returns the prompt of each listed image by its file name, in the order of the list; None if there is no list.

    Raises:
      UserError: the list is damaged.
    """
    file = folder / LIST_FILE
    if not file.exists():
        return None
    try:
        prompts = {entry["file"]: entry["prompt"] for entry in read_json(file)["images"]}
        if not all(IMAGE_NAME.fullmatch(name) and isinstance(prompt, str) for name, prompt in prompts.items()):
            raise ValueError("other files than those of `sample`")
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged: remove it, or name another folder") from None
    return prompts
