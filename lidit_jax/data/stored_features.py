"""Features of prompts computed ahead of training, in place of tokens.

Of every caption that can be drawn, each encoder's features are kept without padding: [lead + n, D], where n counts the
prompt's tokens, its end token included, and `lead` rows before them are the instruction's where an encoder gives every
prompt its own (T5). An LLM's instruction is the same for all: it is kept once, with the features of the empty prompt.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from lidit_jax.data.sources import Example
from lidit_jax.errors import UserError

FEATURES = "features.safetensors"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_MAX_SIZE = 1 << 20
_STORED = {"U8": np.uint8, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


@dataclasses.dataclass(frozen=True)
class StoredEncoder:
    """Whose features they are.

    Attributes:
      digest: of the encoder's folder.
      text: of what stands before a prompt and how long one may be; `PromptTokenizer.digest`.
      dtype: of the features.
      hidden_size: D.
      max_length: L, tokens that a prompt may have.
      lead: rows before the prompt's.
    """

    digest: str
    text: str
    dtype: str
    hidden_size: int
    max_length: int
    lead: int

    def __post_init__(self):
        """Raises ValueError for facts that no file that is read may have."""
        sizes = ((self.hidden_size, 1), (self.max_length, 1), (self.lead, 0))
        if not all(type(size) is int and least <= size <= _MAX_SIZE for size, least in sizes) or (
            self.dtype not in DTYPES
        ):
            raise ValueError(f"impossible features: {self}")

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(DTYPES[self.dtype])

    def check(self, features: np.ndarray) -> np.ndarray:
        """Raises ValueError for what cannot be a prompt's features."""
        length = len(features) - self.lead if features.ndim == 2 else 0
        if not 1 <= length <= self.max_length or features.shape[1] != self.hidden_size:
            raise ValueError(f"features of shape {features.shape}")
        if features.dtype != self.numpy_dtype:
            raise ValueError(f"features of type {features.dtype}")
        return features


@dataclasses.dataclass(frozen=True)
class ConstantFeatures:
    """What all prompts share.

    Attributes:
      prefix: encoder -> [P, D], the instruction's; of encoders with a `lead`, [0, D].
      empty: encoder -> [lead + 1, D], the empty prompt's.
    """

    prefix: Mapping[str, np.ndarray]
    empty: Mapping[str, np.ndarray]

    def write(self, file: epath.Path) -> None:
        tensors = {f"{name}/prefix": array for name, array in self.prefix.items()}
        tensors |= {f"{name}/empty": array for name, array in self.empty.items()}
        beside = file.parent / f".{file.name}.new"
        beside.write_bytes(safetensors.numpy.save({n: np.ascontiguousarray(a) for n, a in tensors.items()}))
        beside.replace(file)

    @classmethod
    def read(cls, file: epath.Path, encoders: Mapping[str, StoredEncoder]) -> "ConstantFeatures":
        """Raises UserError where the file is missing, or not of these encoders."""
        try:
            tensors = tensors_of(file.read_bytes())
            prefix = {name: tensors[f"{name}/prefix"] for name in encoders}
            empty = {name: of.check(tensors[f"{name}/empty"]) for name, of in encoders.items()}
            for name, of in encoders.items():
                if prefix[name].shape[1:] != (of.hidden_size,) or prefix[name].dtype != of.numpy_dtype:
                    raise ValueError(f"prefix {prefix[name].dtype} {prefix[name].shape}")
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: missing or damaged ({error!r:.100}); compute the features anew") from error
        return cls(prefix, empty)


@dataclasses.dataclass(frozen=True)
class StoredPrompts:
    """Examples with "features" -> what the encoders would have made of their captions, padded to one length. Picklable.

    It gives {"NAME/encoded": [B, lead + L, D], "NAME/mask": bool [B, L], "NAME/truncated": bool [B]}.
    """

    encoders: Mapping[str, StoredEncoder]
    constant: ConstantFeatures

    @property
    def prefix(self) -> Mapping[str, np.ndarray]:
        return self.constant.prefix

    def __call__(self, examples: Sequence[Example], fields: Sequence[str | None]) -> dict[str, np.ndarray]:
        """Args: fields: each example's caption; None: the empty prompt."""
        batch: dict[str, Any] = {}
        for name, encoder in self.encoders.items():
            shape = (len(examples), encoder.lead + encoder.max_length, encoder.hidden_size)
            encoded = np.zeros(shape, encoder.numpy_dtype)
            mask = np.zeros((len(examples), encoder.max_length), bool)
            truncated = np.zeros(len(examples), bool)
            for row, (example, field) in enumerate(zip(examples, fields, strict=True)):
                features = self.constant.empty[name] if field is None else example["features"][name, field]
                encoded[row, : len(features)] = features
                mask[row, : len(features) - encoder.lead] = True
                truncated[row] = field is not None and (name, field) in example["truncated"]
            batch |= {f"{name}/encoded": encoded, f"{name}/mask": mask, f"{name}/truncated": truncated}
        return batch


def tensors_of(data: bytes) -> dict[str, np.ndarray]:
    """Of a safetensors file in memory; like `safetensors.numpy.load`, which does not know bfloat16.

    Raises:
      SafetensorError, KeyError: it is none, or holds other types.
    """
    return {
        name: np.frombuffer(tensor["data"], _STORED[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(data)
    }
