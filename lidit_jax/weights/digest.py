"""A short digest of weights, a folder of them or a file, so that a checkpoint can name what it was trained beside."""

import hashlib

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.weights.folders import TOKENIZER_FILES

CHUNK = 1 << 20
WHOLE_BELOW = 1 << 28  # bytes; of larger files evenly spaced chunks are read: 16 GB should not cost minutes a start
SAMPLED_CHUNKS = 64


def folder_digest(*folders: str | epath.Path) -> str:
    """Sixteen hexadecimal digits over names, sizes and contents of config.json, *.safetensors and a tokenizer's files.

    Of several folders it is that of one with the files of all of them.

    Of a file over 256 MiB, its first and last MiB and 62 between them stand for the whole.

    Raises:
      UserError: if the folder has no such file.
    """
    entries = [file for folder in folders for file in epath.Path(folder).glob("*")]
    files = [f for f in entries if TOKENIZER_FILES.fullmatch(f.name) or f.suffix == ".safetensors"]
    if not files:
        raise UserError(f"{folders[0]}: no config.json and no .safetensors file there")
    return _digest(sorted(files, key=lambda file: file.name))


def file_digest(file: str | epath.Path) -> str:
    """The same of one file."""
    return _digest([epath.Path(file)])


def _digest(files: list[epath.Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        size = file.stat().length
        sha.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            for offset in _offsets(size):
                stream.seek(offset)
                sha.update(stream.read(CHUNK))
    return sha.hexdigest()[:16]


def _offsets(size: int) -> list[int]:
    if size <= WHOLE_BELOW:
        return list(range(0, size, CHUNK))
    last = size - CHUNK
    return [last * i // (SAMPLED_CHUNKS - 1) for i in range(SAMPLED_CHUNKS)]
