"""Reads the prompts that a command line gives."""

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import read_text, split_lines


def read_prompts(prompt: str | None, prompts_file: str | None) -> list[str]:
    """Returns the prompts of --prompt or --prompts_file: the prompt, or the lines of the file that are not blank.

    Args:
      prompt: a prompt; or give `prompts_file`.
      prompts_file: UTF-8 text file with one prompt per line.

    Raises:
      UserError: neither or both are given, or the file is missing, too large, empty or not UTF-8.
    """
    if (prompt is None) == (prompts_file is None):
        raise UserError('give either --prompt="…" or --prompts_file=FILE')
    if prompt is not None:
        return [prompt]
    file = epath.Path(str(prompts_file))
    if not file.exists() or file.is_dir():
        raise UserError(f"--prompts_file={file}: no such file; name a text file of prompts")
    text = read_text(file, f"--prompts_file={file}", "a list of prompts")
    prompts = [line.strip() for line in split_lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file={file} has no prompt in it: write one per line")
    return prompts
