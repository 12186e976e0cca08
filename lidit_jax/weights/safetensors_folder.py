"""Reads folders of weights in Hugging Face's layout without trusting their contents, and writes folders atomically.

The layout: config.json, and <stem>.safetensors or its shards with <stem>.safetensors.index.json.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from safetensors import SafetensorError

from lidit_jax.errors import UserError, cannot_write
from lidit_jax.files import read_json
from lidit_jax.weights.safetensors_file import SafetensorsFile

CONFIG_FILE = "config.json"


class SafetensorsFolder:
    """A folder of safetensors files, whose tensors are read by name, each only on request.

    A context manager: files stay open until it exits. A shard from which no tensor is requested may be missing.
    """

    def __init__(self, folder: str | epath.Path, stem: str):
        """Reads the index of the shards, or the header of a single file.

        Args:
          folder: folder on a disk or in a bucket (gs://…).
          stem: name of the weights file without its ending: "model" (transformers) or "diffusion_pytorch_model".

        Raises:
          UserError: there are no safetensors files, or their header or index cannot be read.
        """
        self.folder = epath.Path(folder)
        self._files: dict[epath.Path, SafetensorsFile] = {}
        self._file_of_tensor = self._find_tensors(stem)

    def __enter__(self) -> "SafetensorsFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    @property
    def names(self) -> set[str]:
        return set(self._file_of_tensor)

    @property
    def files(self) -> list[epath.Path]:
        """Files that hold the tensors, sorted by name."""
        return sorted(set(self._file_of_tensor.values()), key=str)

    def open_all(self) -> None:
        """Opens all shards, also those from which no tensor is requested.

        Raises:
          UserError: a shard is missing or damaged.
        """
        for file in self.files:
            self._open(file)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Checks a tensor against the header of its file, without reading it.

        Args:
          name: name of the tensor.
          shape: shape that config.json implies.

        Raises:
          UserError: the tensor or its file is missing, the file is damaged, or the tensor has another shape or is not
            floating point.
        """
        self._file_of(name).check(name, shape, CONFIG_FILE)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor.

        Raises:
          UserError: the tensor or its file is missing, or the file is damaged.
        """
        return self._file_of(name).shape(name)

    def num_bytes(self, name: str) -> int:
        """Returns the stored size of a tensor in bytes.

        Raises:
          UserError: the tensor or its file is missing, or the file is damaged.
        """
        return self._file_of(name).num_bytes(name)

    def read(self, name: str, shape: tuple[int, ...], rows: range | None = None) -> np.ndarray:
        """Returns a tensor, or consecutive rows of it, in its stored dtype.

        Args:
          name: name of the tensor.
          shape: shape of the whole tensor.
          rows: indices of the rows that are read, along the first axis; None reads all.

        Raises:
          UserError: for the reasons of `check`, or the tensor cannot be read.
        """
        self.check(name, shape)
        return self._file_of(name).read(name, rows)

    def check_no_unused(self, asked_for: Iterable[str], belonging: tuple[str, ...], derived: str = "") -> None:
        """Checks that the folder has no unused tensor of the model.

        A tensor of the model that config.json does not account for means that the two do not belong together, and that
        the model would silently compute something else.

        Args:
          asked_for: names of the tensors that are used.
          belonging: prefixes of the names of the model's own tensors; others are ignored.
          derived: suffix of tensors that may be present because the config determines them; "" allows none.

        Raises:
          UserError: the folder has an unused tensor of the model.
        """
        for name in sorted(self.names - set(asked_for)):
            if name.startswith(belonging) and not (derived and name.endswith(derived)):
                raise UserError(
                    f"{self.folder}: tensor {name!r} is not part of the model that {CONFIG_FILE} describes: use "
                    "the weights that belong to it"
                )

    def _file_of(self, name: str) -> SafetensorsFile:
        if name not in self._file_of_tensor:
            raise UserError(
                f"{self.folder}: tensor {name} is missing: use the weights that belong to this {CONFIG_FILE}"
            )
        file = self._open(self._file_of_tensor[name])
        if name not in file.names:
            raise UserError(f"{file.file}: tensor {name} is missing, although the index lists it; copy both again")
        return file

    def _find_tensors(self, stem: str) -> dict[str, epath.Path]:
        weights, index = self.folder / f"{stem}.safetensors", self.folder / f"{stem}.safetensors.index.json"
        if weights.exists():
            return dict.fromkeys(self._open(weights).names, weights)
        if index.exists():
            return _shards(index)
        if pickles := sorted(path.name for ending in ("bin", "pt", "pth") for path in self.folder.glob(f"*.{ending}")):
            raise UserError(
                f"{self.folder}: {pickles[0]} is a pickle, which can run code when read; convert it to safetensors "
                "(save_pretrained of the library that it came from writes these)"
            )
        raise UserError(f"{self.folder}: the folder has neither {weights.name} nor {index.name}")

    def _open(self, file: epath.Path) -> SafetensorsFile:
        if file not in self._files:
            self._files[file] = SafetensorsFile(file)
        return self._files[file]


def weights_files(folder: str | epath.Path, stem: str) -> list[epath.Path]:
    """Returns the files of a folder's weights, after checking their headers: one, or an index and its shards.

    Args:
      folder: folder on a disk or in a bucket (gs://…).
      stem: name of the weights file without its ending (see `SafetensorsFolder`).

    Raises:
      UserError: a file is missing or damaged, or there are no weights.
    """
    with SafetensorsFolder(folder, stem) as weights:
        weights.open_all()
        one, index = (weights.folder / f"{stem}.safetensors{ending}" for ending in ("", ".index.json"))
        return [one] if one.exists() else [index, *weights.files]


def read_config(folder: str | epath.Path) -> dict[str, Any]:
    """Returns the contents of the folder's config.json.

    Raises:
      UserError: it is missing, unreadable, or not a JSON object.
    """
    return read_json_object(epath.Path(folder) / CONFIG_FILE)


def read_json_object(file: epath.Path) -> dict[str, Any]:
    """Returns the contents of a JSON file whose outermost value is an object.

    Raises:
      UserError: the file is missing, unreadable, too large, or not a JSON object.
    """
    try:
        values = read_json(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing; use a folder in Hugging Face's layout") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable JSON file ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} is not a JSON object; copy the file again")
    return values


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a scratch folder, which is renamed to `folder` if the block ends without an error and removed otherwise.

    Args:
      folder: local folder to write; must not exist or be empty.

    Raises:
      UserError: `folder` exists and is not an empty folder, or cannot be written.
    """
    folder = local_folder(folder).absolute()
    scratch = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already exists and is not an empty folder: choose another one to write to")
        scratch.mkdir(parents=True)
        yield scratch
        os.replace(scratch, folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as SafetensorError
        raise cannot_write(str(folder), error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def local_folder(folder: str | Path) -> Path:
    """Returns the folder as a local path, for writing.

    Raises:
      UserError: the folder is in a bucket (gs://…), where folders cannot be renamed atomically.
    """
    if "://" in str(folder):
        raise UserError(f"{folder}: weights are written to local folders only; write there and copy them")
    return Path(folder)


def _shards(index: epath.Path) -> dict[str, epath.Path]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index}: no weight_map; copy the file again")
    for shard in weight_map.values():
        # Reject paths, which could lead out of the folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", shard):
            raise UserError(f"{index}: shard {shard!r:.80} is not the name of a safetensors file")
    return {name: index.parent / shard for name, shard in weight_map.items()}
