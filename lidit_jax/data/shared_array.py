"""Arrays as long as a data set, which worker processes memory-map instead of each receiving a copy."""

import os
import tempfile
import weakref

import numpy as np

from lidit_jax.errors import UserError

_SMALL = 1 << 20  # bytes; smaller arrays are cheaper to copy


class SharedArray:
    """A read-only array. Pickling a large one writes it to a temporary file, once, and pickles only the file name.

    The file is removed when the array that wrote it is deleted. Pickles for workers must be made in that process.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        self._file: str | None = None

    def __reduce__(self):
        if self.array.nbytes < _SMALL:
            return SharedArray, (self.array,)
        if self._file is None:
            descriptor, self._file = tempfile.mkstemp(prefix="lidit-", suffix=".npy")
            try:
                with os.fdopen(descriptor, "wb") as file:
                    np.save(file, self.array)
            except OSError as error:
                _remove(self._file, os.getpid())
                folder, self._file = os.path.dirname(self._file), None
                raise UserError(
                    f"{folder}, for temporary files, can't be written ({error}): free disk space, or set TMPDIR to "
                    "another folder"
                ) from error
            weakref.finalize(self, _remove, self._file, os.getpid())
        return _mapped, (self._file,)


def _mapped(file: str) -> SharedArray:
    return SharedArray(np.load(file, mmap_mode="r", allow_pickle=False))


def _remove(file: str, process: int) -> None:
    if os.getpid() == process and os.path.exists(file):  # a forked child inherits this finalizer
        os.unlink(file)
