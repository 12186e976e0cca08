"""Locates folders of weights: on a disk, in a bucket, or on the Hugging Face hub."""

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
# Download the safetensors weights, the configs and the tokenizer. Skip pickles, and the second copies of the weights
# that some repositories hold.
DOWNLOADED = ("*.json", "*.safetensors", "*.jinja")
SKIPPED = ("consolidated*", "*/*")
# Files that a tokenizer is loaded from. They are copied from a bucket, since tokenizers open local files only.
TOKENIZER_FILES = re.compile(r"(tokenizer.*|special_tokens_map|added_tokens|config)\.json|chat_template\.(json|jinja)")
MAX_TOKENIZER_FILE = 256 << 20  # bytes


def find_folder(name: str) -> epath.Path:
    """Returns the folder for a path or a Hugging Face hub name, downloading the latter once per process.

    Args:
      name: path on a disk or in a bucket (gs://…), or the name of a hub repository that no local folder has:
        `meta-llama/Llama-3.1-8B-Instruct` for its current revision, `NAME@REVISION` for a given one.

    Returns:
      The folder. A name that is neither an existing path nor a valid hub name is returned as it is.

    Raises:
      UserError: the bucket cannot be reached; or there is no such folder, and the hub does not have the repository or
        cannot be reached.
    """
    folder = epath.Path(name)
    if is_there(folder) or not HUB_NAME.fullmatch(name):
        return folder
    return _download(name)


def is_there(path: epath.Path) -> bool:
    """Returns True if the path exists.

    Raises:
      UserError: its bucket cannot be reached.
    """
    try:
        return path.exists()
    except Exception as error:  # network and bucket clients raise many types
        raise UserError(f"{path} cannot be reached ({_reason(error)})") from error


@functools.cache  # all components of a run get the same revision
def _download(name: str) -> epath.Path:
    try:
        repository, _, revision = name.partition("@")
        return epath.Path(
            snapshot_download(repository, revision=revision or None, allow_patterns=DOWNLOADED, ignore_patterns=SKIPPED)
        )
    except Exception as error:  # the network, the hub client and the disk raise many types
        raise UserError(
            f"{name}: no such folder, and it cannot be downloaded from the Hugging Face hub ({_reason(error)})"
        ) from error


@contextmanager
def local_tokenizer_files(folder: epath.Path) -> Iterator[Path]:
    """Yields the folder itself if it is local, else a temporary local copy of its tokenizer files.

    Raises:
      UserError: a file is too large to belong to a tokenizer.
    """
    if "://" not in str(folder):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in folder.iterdir():
            if not TOKENIZER_FILES.fullmatch(file.name):
                continue
            size = file.stat().length
            if size > MAX_TOKENIZER_FILE:
                raise UserError(
                    f"{file} has {size >> 20} MiB, too large for a tokenizer: at most {MAX_TOKENIZER_FILE >> 20}"
                )
            with file.open("rb") as source, (Path(copy) / file.name).open("wb") as target:
                shutil.copyfileobj(source, target)
        yield Path(copy)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
