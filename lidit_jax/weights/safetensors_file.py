"""Reads and writes one safetensors file tensor by tensor, after validating its header.

The safetensors library maps local files into memory, and needs all tensors at once to write a file. Here each tensor is
read only on request, from a disk or a bucket, into memory that only the caller holds; and tensors are written one after
the other, in any order.
"""

import collections
import json
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from lidit_jax.errors import UserError

# Type names of the format. The others are not floating point, or not written by transformers and diffusers.
FLOAT_TYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
MAX_AXES = 8
MAX_HEADER = 100_000_000  # bytes: the limit of the safetensors library


class SafetensorsFile:
    """An open safetensors file, whose tensors are read by name."""

    def __init__(self, file: epath.Path):
        """Opens the file and reads its header.

        Args:
          file: on a disk or in a bucket.

        Raises:
          UserError: the file is missing, is not a safetensors file, or has another size than its header says.
        """
        self.file = file
        try:
            size = file.stat().length
            self._stream = file.open("rb")
        except FileNotFoundError as error:
            raise UserError(f"{file} is missing; copy it into the folder") from error
        except OSError as error:
            raise UserError(f"{file} cannot be opened ({error.strerror or error})") from error
        try:
            self._start, self._entries = self._read_header(size)
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            self.close()
            raise UserError(f"{file} is not a readable safetensors file ({error}); copy it again") from error

    def close(self) -> None:
        self._stream.close()

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def check(self, name: str, shape: tuple[int, ...], required_by: str) -> None:
        """Checks a tensor's shape and type without reading it.

        Args:
          name: name of the tensor, which the file must have.
          shape: expected shape.
          required_by: where the expected shape comes from, for error messages.

        Raises:
          UserError: the tensor has another shape, or is not floating point.
        """
        dtype, found, _ = self._entries[name]
        if found != shape:
            raise UserError(f"{self.file}: tensor {name} has shape {found}, {required_by} requires {shape}")
        if dtype not in FLOAT_TYPES:
            raise UserError(f"{self.file}: tensor {name} has type {dtype}; only {', '.join(FLOAT_TYPES)} are supported")

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def num_bytes(self, name: str) -> int:
        begin, end = self._entries[name][2]
        return end - begin

    def read(self, name: str, rows: range | None = None) -> np.ndarray:
        """Returns the tensor, or consecutive rows of it, in its stored dtype, as a read-only array.

        Args:
          name: name of the tensor, which the file must have.
          rows: indices of the rows that are read, along the first axis; None reads all.

        Raises:
          UserError: the tensor cannot be read, or the file ends within it.
        """
        dtype, shape, (begin, end) = self._entries[name]
        if rows is not None:
            row_bytes = (end - begin) // shape[0]
            begin, end = begin + rows.start * row_bytes, begin + rows.stop * row_bytes
            shape = (len(rows), *shape[1:])
        try:
            self._stream.seek(self._start + begin)
            data = self._stream.read(end - begin)
        except OSError as error:
            raise UserError(f"{self.file}: tensor {name} cannot be read ({error.strerror or error})") from error
        if len(data) != end - begin:
            raise UserError(f"{self.file}: the file ends within tensor {name}; copy it again")
        return np.frombuffer(data, FLOAT_TYPES[dtype]).reshape(shape)

    def _read_header(self, size: int) -> tuple[int, dict[str, tuple[str, tuple[int, ...], tuple[int, int]]]]:
        """Returns the offset of the data in the file, and {name: (type, shape, (begin, end))} relative to it.

        Raises:
          ValueError: the file does not begin with a valid header.
          SafetensorError: the safetensors library rejects it.
        """
        prefix = self._stream.read(8)
        length = int.from_bytes(prefix, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError("it has no header, or one that is longer than the file")
        encoded = self._stream.read(length)
        self._check_with_library(prefix + encoded, size)
        header = json.loads(encoded.decode("utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        data_size = size - 8 - length
        entries = {name: _entry(name, value, data_size) for name, value in header.items()}
        return 8 + length, entries

    def _check_with_library(self, header: bytes, size: int) -> None:
        """Has the safetensors library check the header; it also finds tensors that overlap and bytes of no tensor.

        Raises:
          SafetensorError: the library rejects it.
        """
        if "://" not in str(self.file):
            with safe_open(self.file, "np"):
                return
        # The library opens local files only: give it the header before as many zeros as there are data.
        with tempfile.NamedTemporaryFile() as sparse:
            sparse.write(header)
            sparse.truncate(size)
            with safe_open(sparse.name, "np"):
                return


class SafetensorsWriter:
    """Writes one safetensors file of a single dtype: the header first, then each tensor at its offset.

    Use it as a context manager. Leaving it without an error raises ValueError if a tensor was not written; errors of
    the disk are raised as OSError.
    """

    def __init__(self, file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        """Creates the file and writes its header.

        Args:
          file: file to create or overwrite.
          shapes: tensor name -> shape, in the order of the file.
          dtype: dtype of all tensors, one of `FLOAT_TYPES`.
        """
        self._dtype, self._shapes, self._offsets = np.dtype(dtype), dict(shapes), {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # diffusers rejects a file without it
        end = 0
        for name, shape in shapes.items():
            begin, end = end, end + math.prod(shape) * self._dtype.itemsize
            self._offsets[name] = begin
            header[name] = {"dtype": TYPE_NAMES[self._dtype], "shape": list(shape), "data_offsets": [begin, end]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # aligns the data, as the library does
        self._start, self._missing = 8 + len(encoded), set(shapes)
        self._stream = file.open("wb")
        try:
            self._stream.write(len(encoded).to_bytes(8, "little") + encoded)
            self._stream.truncate(self._start + end)
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> "SafetensorsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._stream.close()
        if kind is None and self._missing:
            raise ValueError(f"tensor {min(self._missing)} was not written")

    def write(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor.

        Raises:
          ValueError: the values have another shape or dtype than the header.
        """
        if values.shape != self._shapes[name] or values.dtype != self._dtype:
            raise ValueError(f"tensor {name} is {values.dtype} {values.shape}, not {self._dtype} {self._shapes[name]}")
        self._stream.seek(self._start + self._offsets[name])
        self._stream.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8))  # bfloat16 has no buffer protocol
        self._missing.discard(name)


def _entry(name: str, value: Any, data_size: int) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    if not isinstance(value, dict):
        raise ValueError(f"the entry of tensor {name:.80} is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"the entry of tensor {name:.80} is damaged")
    begin, end = offsets
    if not begin <= end <= data_size:
        raise ValueError(f"the data of tensor {name:.80} is outside the file")
    if dtype in FLOAT_TYPES and math.prod(shape) * FLOAT_TYPES[dtype].itemsize != end - begin:
        raise ValueError(f"tensor {name:.80} has {end - begin} bytes, which does not fit its shape")
    return dtype, tuple(shape), (begin, end)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        raise ValueError(f"its header has {counts.most_common(1)[0][0]!r:.80} twice")
    return values


def _are_sizes(values: Any) -> bool:
    # Bound the sizes before multiplying them: the product of a thousand large integers would take a day.
    return (
        isinstance(values, list)
        and len(values) <= MAX_AXES
        and all(type(value) is int and 0 <= value < 2**63 for value in values)
    )
