"""Copies the files of published weights unchanged and in chunks, from a disk or a bucket."""

from collections.abc import Callable, Iterable
from pathlib import Path

from etils import epath

from lidit_jax.weights.folders import TOKENIZER_FILES
from lidit_jax.weights.safetensors_folder import CONFIG_FILE, weights_files

CHUNK = 16 << 20  # bytes
# Optional files to copy besides config.json and the weights. transformers warns if a generative model has no
# generation_config.json.
EXTRA_FILES = ("generation_config.json",)


def model_files(folder: epath.Path, stem: str) -> list[epath.Path]:
    """Returns the weights files of a model and its optional files, without config.json.

    Args:
      folder: folder of the model.
      stem: name of the weights file without its ending (see `SafetensorsFolder`).

    Raises:
      UserError: a weights file is missing or damaged.
    """
    extra = [folder / name for name in EXTRA_FILES if (folder / name).exists()]
    return [*weights_files(folder, stem), *extra]


def tokenizer_files(folder: epath.Path) -> list[epath.Path]:
    return sorted(
        (file for file in folder.iterdir() if TOKENIZER_FILES.fullmatch(file.name) and file.name != CONFIG_FILE),
        key=str,
    )


def num_bytes(files: Iterable[epath.Path]) -> int:
    return sum(file.stat().length for file in files)


def copy_files(files: Iterable[epath.Path], folder: Path, copied: Callable[[int], None]) -> None:
    """Copies files into a folder, which is created if needed.

    Args:
      files: files to copy.
      folder: local destination.
      copied: called with the number of bytes after each chunk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        with file.open("rb") as source, (folder / file.name).open("wb") as target:
            while chunk := source.read(CHUNK):
                target.write(chunk)
                copied(len(chunk))
