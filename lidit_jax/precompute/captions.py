"""Captions to features, host to host: for features that are kept."""

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
    """Of one caption by one encoder: [lead + n, D], and whether the caption was cut to `max_length`."""

    features: np.ndarray
    truncated: bool


class CaptionEncoder:
    """All encoders on a mesh, for batches of any number of captions."""

    def __init__(
        self,
        encoders: Mapping[str, PromptEncoder],
        frozen: Mapping,
        facts: Mapping[str, EncoderFingerprint],
        mesh: Mesh,
        batch_size: int,
    ):
        """Args:
        frozen: of each encoder, what its `freeze` gave.
        facts: what is said of the features that are kept.
        batch_size: captions encoded at once; rounded up to a multiple of the devices.
        """
        self._encoders, self._frozen, self._facts, self._mesh = encoders, frozen, facts, mesh
        devices = mesh.devices.size
        self._rows = -(-batch_size // devices) * devices
        self._sharding = batch_sharding(mesh, ShardingRules())
        self._encode = {
            name: jax.jit(encoder.encode_prompts, out_shardings=self._sharding) for name, encoder in encoders.items()
        }

    def __call__(self, captions: Sequence[str]) -> list[dict[str, CaptionFeatures]]:
        """Of each caption, by encoder."""
        found: list[dict[str, CaptionFeatures]] = []
        for start in range(0, len(captions), self._rows):
            found += self._batch(captions[start : start + self._rows])
        return found

    def constant(self) -> ConstantFeatures:
        [empty] = self._batch([""])
        prefix = {}
        for name, encoder in self._encoders.items():
            of, shared = self._facts[name], encoder.shared_prefix(self._frozen[name])
            prefix[name] = np.zeros((0, of.hidden_size)) if shared is None else np.asarray(shared)
            prefix[name] = prefix[name].astype(of.numpy_dtype)
        return ConstantFeatures(prefix, {name: one.features for name, one in empty.items()})

    def _batch(self, captions: Sequence[str]) -> list[dict[str, CaptionFeatures]]:
        padded = [*captions, *[""] * (self._rows - len(captions))]
        batch = tokenize(self._encoders, padded)
        found: list[dict[str, CaptionFeatures]] = [{} for _ in captions]
        for name in self._encoders:
            tokens, mask = (jax.device_put(batch[f"{name}/{key}"], self._sharding) for key in ("tokens", "mask"))
            with jax.set_mesh(self._mesh):
                encoded = np.asarray(self._encode[name](self._frozen[name], tokens, mask))
            of = self._facts[name]
            for row, features in enumerate(found):
                length = of.lead + int(batch[f"{name}/mask"][row].sum())
                kept = encoded[row, :length].astype(of.numpy_dtype)
                if not np.isfinite(kept).all():
                    raise UserError(f"encoders.{name} gives features that are not finite: use another dtype")
                features[name] = CaptionFeatures(kept, bool(batch[f"{name}/truncated"][row]))
        return found
