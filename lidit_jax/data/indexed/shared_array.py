"""Arrays of a whole data set, which worker processes map into their memory instead of each getting a copy."""

import os
import tempfile
import weakref

import numpy as np

_SMALL = 1 << 20  # bytes; less is cheaper to copy


class SharedArray:
    """A read-only array. Pickling a large one writes it to a temporary file, once, and gives the file's name.

    The file goes when the array that wrote it does, in whose process the workers' pickles must be made.
    """

    def __init__(self, array: np.ndarray):
        self.array = array
        self._file: str | None = None

    def __reduce__(self):
        if self.array.nbytes < _SMALL:
            return SharedArray, (self.array,)
        if self._file is None:
            descriptor, self._file = tempfile.mkstemp(prefix="lidit-", suffix=".npy")
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, self.array)
            weakref.finalize(self, _remove, self._file, os.getpid())
        return _mapped, (self._file,)


def _mapped(file: str) -> SharedArray:
    return SharedArray(np.load(file, mmap_mode="r", allow_pickle=False))


def _remove(file: str, process: int) -> None:
    if os.getpid() == process and os.path.exists(file):  # a forked child has this finaliser too
        os.unlink(file)
