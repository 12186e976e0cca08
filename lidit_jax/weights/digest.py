"""Short digests of weights, which a checkpoint records to identify the frozen networks it was trained with."""

import hashlib

from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.weights.folders import TOKENIZER_FILES

CHUNK = 1 << 20  # bytes
MAX_FULL_READ = 1 << 28  # bytes; larger files are sampled in chunks, so that 16 GB do not delay every start by minutes
SAMPLED_CHUNKS = 64


def folder_digest(*folders: str | epath.Path) -> str:
    """Returns a digest of the names, sizes and contents of config.json, *.safetensors and the tokenizer's files.

    Of a file above 256 MiB, only 64 evenly spaced MiB are read, the first and the last among them.

    Args:
      *folders: one folder or several; several give the digest of one folder with the files of all.

    Returns:
      Sixteen hexadecimal digits.

    Raises:
      UserError: the folders have none of these files, or one cannot be read.
    """
    entries = [file for folder in folders for file in epath.Path(folder).glob("*")]
    files = [f for f in entries if TOKENIZER_FILES.fullmatch(f.name) or f.suffix == ".safetensors"]
    if not files:
        raise UserError(f"{folders[0]}: the folder has neither config.json nor a .safetensors file")
    return _digest(sorted(files, key=lambda file: file.name))


def file_digest(*files: str | epath.Path) -> str:
    """Returns the digest of files in their order: sixteen hexadecimal digits over names, sizes and contents.

    Raises:
      UserError: a file cannot be read.
    """
    return _digest([epath.Path(file) for file in files])


def _digest(files: list[epath.Path]) -> str:
    sha = hashlib.sha256()
    for file in files:
        try:
            size = file.stat().length
            sha.update(f"{file.name} {size} ".encode())
            with file.open("rb") as stream:
                for offset in _offsets(size):
                    stream.seek(offset)
                    sha.update(stream.read(CHUNK))
        except OSError as error:  # a folder of this name, or a link to nothing
            raise UserError(f"{file} can't be read ({error.strerror or error}): copy it again, or remove it") from error
    return sha.hexdigest()[:16]


def _offsets(size: int) -> list[int]:
    if size <= MAX_FULL_READ:
        return list(range(0, size, CHUNK))
    last = size - CHUNK
    return [last * i // (SAMPLED_CHUNKS - 1) for i in range(SAMPLED_CHUNKS)]
