"""Encoding of captions to features on the host, for features that are stored."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lidit_jax.data.stored_features import ConstantFeatures, EncoderFingerprint
from lidit_jax.errors import UserError
from lidit_jax.parallel.rules import ShardingRules, batch_sharding
from lidit_jax.text.encoders import PromptEncoder, tokenize


class CaptionFeatures(NamedTuple):
    """Features of one caption by one encoder.

    Attributes:
      features: [lead + n, D], the `lead` prefix rows (see `EncoderFingerprint`) and the caption's n tokens, unpadded.
      truncated: whether the caption was truncated to `max_length`.
    """

    features: np.ndarray
    truncated: bool


class CaptionEncoder:
    """Runs all encoders on a mesh for any number of captions."""

    def __init__(
        self,
        encoders: Mapping[str, PromptEncoder],
        frozen: Mapping,
        fingerprints: Mapping[str, EncoderFingerprint],
        mesh: Mesh,
        batch_size: int,
    ):
        """Creates a jitted encode function for each encoder.

        Args:
          encoders: encoders by name.
          frozen: frozen weights of each encoder, from its `freeze`.
          fingerprints: fingerprint of each encoder, with the dtype, the width and the prefix rows of its features.
          mesh: devices to run on.
          batch_size: captions per batch, rounded up to a multiple of the number of devices.
        """
        self._encoders, self._frozen, self._fingerprints, self._mesh = encoders, frozen, fingerprints, mesh
        devices = mesh.devices.size
        self._rows = -(-batch_size // devices) * devices
        self._sharding = batch_sharding(mesh, ShardingRules())
        self._encode = {
            name: jax.jit(encoder.encode_prompts, out_shardings=self._sharding) for name, encoder in encoders.items()
        }

    def __call__(self, captions: Sequence[str]) -> list[dict[str, CaptionFeatures]]:
        """Returns the features of each caption by encoder name."""
        results: list[dict[str, CaptionFeatures]] = []
        for start in range(0, len(captions), self._rows):
            results += self._batch(captions[start : start + self._rows])
        return results

    def constant(self) -> ConstantFeatures:
        """Returns the features that do not depend on a caption: those of the shared prefix and of the empty prompt."""
        [empty] = self._batch([""])
        prefix = {}
        for name, encoder in self._encoders.items():
            fingerprint, shared = self._fingerprints[name], encoder.shared_prefix(self._frozen[name])
            prefix[name] = np.zeros((0, fingerprint.hidden_size)) if shared is None else np.asarray(shared)
            prefix[name] = prefix[name].astype(fingerprint.numpy_dtype)
        return ConstantFeatures(prefix, {name: one.features for name, one in empty.items()})

    def _batch(self, captions: Sequence[str]) -> list[dict[str, CaptionFeatures]]:
        padded = [*captions, *[""] * (self._rows - len(captions))]
        batch = tokenize(self._encoders, padded)
        results: list[dict[str, CaptionFeatures]] = [{} for _ in captions]
        for name in self._encoders:
            tokens, mask = (jax.device_put(batch[f"{name}/{key}"], self._sharding) for key in ("tokens", "mask"))
            with jax.set_mesh(self._mesh):
                encoded = np.asarray(self._encode[name](self._frozen[name], tokens, mask))
            fingerprint = self._fingerprints[name]
            for row, features in enumerate(results):
                length = fingerprint.lead + int(batch[f"{name}/mask"][row].sum())
                kept = encoded[row, :length].astype(fingerprint.numpy_dtype)
                if not np.isfinite(kept).all():
                    raise UserError(
                        f"encoders.{name} gives features that are not finite in {fingerprint.dtype}: use another "
                        f"encoders.{name}.dtype"
                    )
                features[name] = CaptionFeatures(kept, bool(batch[f"{name}/truncated"][row]))
        return results
