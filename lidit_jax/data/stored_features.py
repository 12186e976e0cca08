"""Prompt features computed ahead of training, which replace tokens.

Each encoder's features of every caption that can be sampled are stored without padding: [lead + n, D], where n counts
the tokens of the prompt including its end token. `lead` rows of instruction features come first if the encoder computes
them per prompt (T5). The instruction features of an LLM are the same for all prompts: they are stored once, with the
features of the empty prompt.
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
from lidit_jax.files import write_bytes

FEATURES = "features.safetensors"
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
_MAX_SIZE = 1 << 20
_SAFETENSORS_DTYPES = {"U8": np.uint8, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32}


@dataclasses.dataclass(frozen=True)
class EncoderFingerprint:
    """Identifies the encoder and the text settings that produced stored features.

    Attributes:
      digest: digest of the encoder's folder.
      text: digest of the text before a prompt and of the maximum length; `PromptTokenizer.digest`.
      dtype: dtype of the features.
      hidden_size: width of the features, D.
      max_length: maximum number of tokens of a prompt, L.
      lead: number of instruction rows before those of the prompt (T5); 0 if all prompts share them.
    """

    digest: str
    text: str
    dtype: str
    hidden_size: int
    max_length: int
    lead: int

    def __post_init__(self):
        """Raises ValueError if a value is out of bounds, as in a damaged or forged file."""
        sizes = ((self.hidden_size, 1), (self.max_length, 1), (self.lead, 0))
        if not all(type(size) is int and least <= size <= _MAX_SIZE for size, least in sizes) or (
            self.dtype not in DTYPES
        ):
            raise ValueError(f"invalid encoder fingerprint: {self}")

    @property
    def numpy_dtype(self) -> np.dtype:
        """NumPy dtype of the features, including bfloat16."""
        return np.dtype(DTYPES[self.dtype])

    def check(self, features: np.ndarray) -> np.ndarray:
        """Returns `features` unchanged; raises ValueError if their shape or dtype cannot be that of a prompt."""
        length = len(features) - self.lead if features.ndim == 2 else 0
        if not 1 <= length <= self.max_length or features.shape[1] != self.hidden_size:
            raise ValueError(f"features of shape {features.shape}")
        if features.dtype != self.numpy_dtype:
            raise ValueError(f"features of type {features.dtype}")
        return features


@dataclasses.dataclass(frozen=True)
class ConstantFeatures:
    """Features that all prompts share.

    Attributes:
      prefix: instruction features of each encoder, [P, D]; [0, D] for encoders with a `lead`.
      empty: features of the empty prompt of each encoder, [lead + 1, D].
    """

    prefix: Mapping[str, np.ndarray]
    empty: Mapping[str, np.ndarray]

    def write(self, file: epath.Path) -> None:
        """Writes the features to a safetensors file, atomically."""
        tensors = {f"{name}/prefix": array for name, array in self.prefix.items()}
        tensors |= {f"{name}/empty": array for name, array in self.empty.items()}
        write_bytes(file, safetensors.numpy.save({n: np.ascontiguousarray(a) for n, a in tensors.items()}))

    @classmethod
    def read(cls, file: epath.Path, encoders: Mapping[str, EncoderFingerprint]) -> "ConstantFeatures":
        """Reads the features of these encoders.

        Raises:
          UserError: the file is missing or damaged, or does not fit the encoders.
        """
        try:
            tensors = load_tensors(file.read_bytes())
            prefix = {name: tensors[f"{name}/prefix"] for name in encoders}
            empty = {name: encoder.check(tensors[f"{name}/empty"]) for name, encoder in encoders.items()}
            for name, encoder in encoders.items():
                if prefix[name].shape[1:] != (encoder.hidden_size,) or prefix[name].dtype != encoder.numpy_dtype:
                    raise ValueError(f"prefix {prefix[name].dtype} {prefix[name].shape}")
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: missing or damaged ({error!r:.100}): compute the features again") from error
        return cls(prefix, empty)


@dataclasses.dataclass(frozen=True)
class StoredPrompts:
    """Looks up the stored features of captions and pads them to the length that the encoders return. Picklable.

    Attributes:
      encoders: the encoders, by name.
      constant: features that all prompts share.
    """

    encoders: Mapping[str, EncoderFingerprint]
    constant: ConstantFeatures

    @property
    def prefix(self) -> Mapping[str, np.ndarray]:
        """Instruction features of each encoder; see `ConstantFeatures`."""
        return self.constant.prefix

    def __call__(
        self, examples: Sequence[Example], fields: Sequence[str | None], length: int | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the encoded prompts of a batch.

        Args:
          examples: B examples with "features" and "truncated".
          fields: caption field of each example; None: the empty prompt.
          length: L, tokens to pad the prompts to; None: each encoder's `max_length`.

        Returns:
          For each encoder, {"NAME/encoded": [B, lead + L, D], "NAME/mask": bool [B, L], "NAME/truncated": bool [B]}.

        Raises:
          UserError: a prompt is longer than `length`.
        """
        batch: dict[str, Any] = {}
        for name, encoder in self.encoders.items():
            tokens = min(length or encoder.max_length, encoder.max_length)
            encoded = np.zeros((len(examples), encoder.lead + tokens, encoder.hidden_size), encoder.numpy_dtype)
            mask = np.zeros((len(examples), tokens), bool)
            truncated = np.zeros(len(examples), bool)
            for row, (example, field) in enumerate(zip(examples, fields, strict=True)):
                features = self.constant.empty[name] if field is None else example["features"][name, field]
                if len(features) > encoded.shape[1]:
                    raise UserError(
                        f"features of {len(features) - encoder.lead} tokens, {tokens} were counted: the folder of "
                        "latents changed; start again"
                    )
                encoded[row, : len(features)] = features
                mask[row, : len(features) - encoder.lead] = True
                truncated[row] = field is not None and (name, field) in example["truncated"]
            batch |= {f"{name}/encoded": encoded, f"{name}/mask": mask, f"{name}/truncated": truncated}
        return batch


def load_tensors(data: bytes) -> dict[str, np.ndarray]:
    """Decodes a safetensors file, as `safetensors.numpy.load` does, which does not support bfloat16.

    Raises:
      SafetensorError: the data are not a safetensors file.
      KeyError: a tensor has an unsupported dtype.
    """
    return {
        name: np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
        for name, tensor in safetensors.deserialize(data)
    }
