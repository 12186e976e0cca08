"""Where a folder of weights is: on a disk, in a bucket, or on the Hugging Face hub under its name there."""

import functools
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from etils import epath
from huggingface_hub import snapshot_download

from lidit_jax.errors import UserError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w.-]+)?")  # NAME or NAME@REVISION
# Weights as safetensors, what describes them, and the tokenizer. No pickles, and none of the second copies of the
# weights that some repositories keep beside these.
WANTED = ("*.json", "*.safetensors", "*.jinja")
UNWANTED = ("consolidated*", "*/*")
# Of a folder in a bucket, what a tokenizer is read from; tokenizers open local files only.
TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|config)\.json|chat_template\.(json|jinja)")
MAX_TOKENIZER_FILE = 256 << 20  # bytes


def find_folder(name: str) -> epath.Path:
    """The folder that `name` stands for; a name of the hub (`meta-llama/Llama-3.1-8B-Instruct`) is downloaded once, as
    it is there now or, with @REVISION after it, as it was then.

    Raises:
      UserError: the bucket cannot be reached; or there is no such folder, and the hub has nothing of that name or
        cannot be reached.
    """
    folder = epath.Path(name)
    if is_there(folder) or not HUB_NAME.fullmatch(name):
        return folder
    return _download(name)


def is_there(path: epath.Path) -> bool:
    """Whether it exists. Raises UserError if its bucket cannot be reached."""
    try:
        return path.exists()
    except Exception as error:  # of many types: of the network, of the bucket's answers
        raise UserError(f"{path} cannot be reached ({_reason(error)})") from error


@functools.cache  # once a run: all its parts see one revision
def _download(name: str) -> epath.Path:
    try:
        repository, _, revision = name.partition("@")
        return epath.Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=WANTED, ignore_patterns=UNWANTED)
        )
    except Exception as error:  # of many types: of the network, of the hub's answers, of the disk
        raise UserError(
            f"{name}: no such folder here, and the Hugging Face hub does not give it ({_reason(error)})"
        ) from error


@contextmanager
def local_tokenizer_files(folder: epath.Path) -> Iterator[Path]:
    """The folder itself if it is on a disk, else a copy of its tokenizer's files.

    Raises:
      UserError: a file is too large to be one of a tokenizer.
    """
    if "://" not in str(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if not TOKENIZER_FILES.fullmatch(file.name):
                continue
            if file.stat().length > MAX_TOKENIZER_FILE:
                raise UserError(f"{file}: larger than {MAX_TOKENIZER_FILE >> 20} MiB; is it a tokenizer's?")
            with file.open("rb") as source, (Path(copy) / file.name).open("wb") as target:
                shutil.copyfileobj(source, target)
        yield Path(copy)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
