"""The list of the images that `sample` has written into a folder."""

import re

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import read_json

LIST_FILE = "images.json"
IMAGE_NAME = re.compile(r"\d{5,}\.png")


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
