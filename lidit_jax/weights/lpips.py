"""Loads the weights of the perceptual loss from a safetensors file with the state dict of the `lpips` package."""

from typing import Any

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.models.lpips import VGG16_LAYERS
from lidit_jax.weights.safetensors_file import SafetensorsFile


def load_lpips(file: str | epath.Path) -> dict[str, Any]:
    """Loads a saved `lpips.LPIPS(net="vgg").state_dict()`.

    Args:
      file: safetensors file, on a disk or in a bucket (gs://…).

    Returns:
      The parameters for `LPIPS().apply({"params": params}, …)`: float32 NumPy arrays.

    Raises:
      UserError: the file is missing or not a safetensors file (pickles are never read), or a tensor is missing, of
        the wrong shape, not floating point or not finite.
    """
    weights = SafetensorsFile(epath.Path(file))
    try:
        params: dict[str, Any] = {}
        channels = 3
        for index, layer in enumerate(VGG16_LAYERS):
            for number, width in layer:
                name = f"net.slice{index + 1}.{number}"
                kernel = _read(weights, f"{name}.weight", (width, channels, 3, 3)).transpose(2, 3, 1, 0)
                bias = _read(weights, f"{name}.bias", (width,))
                params[f"features_{number}"] = {"kernel": np.ascontiguousarray(kernel), "bias": bias}
                channels = width
            # The package has this tensor under two names; a writer that stores shared tensors once keeps either.
            names = (f"lin{index}.model.1.weight", f"lins.{index}.model.1.weight")
            name = next((name for name in names if name in weights.names), names[0])
            params[f"lin{index}"] = _read(weights, name, (1, channels, 1, 1)).reshape(-1)
        return params
    finally:
        weights.close()


def _read(weights: SafetensorsFile, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in weights.names:
        raise UserError(f"{weights.file}: tensor {name} is missing: save the state_dict of lpips.LPIPS(net='vgg')")
    weights.check(name, shape, "the perceptual loss")
    value = weights.read(name).astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{weights.file}: tensor {name} has values that are not finite; copy the file again")
    return value
