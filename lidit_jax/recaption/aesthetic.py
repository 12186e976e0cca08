"""Aesthetic scores of images: linear layers on the normalised image features of CLIP, as LAION's predictors are.

LAION's aesthetic predictor (https://github.com/LAION-AI/aesthetic-predictor) is one linear layer on OpenAI's CLIP
ViT-L/14. The improved predictor (https://github.com/christophschuhmann/improved-aesthetic-predictor), whose scores
LAION-Aesthetics and the paper's threshold of 4.7 mean, is a chain of five without activation functions.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.score.load_model import device, load_model, load_processor
from lidit_jax.weights.safetensors_file import SafetensorsFile

CLIP_FLAG, HEAD_FLAG = "clip", "aesthetic_head"
MAX_LAYER_BYTES = 1 << 28


class AestheticScorer:
    """Scores batches of images; on a GPU if PyTorch has one."""

    def __init__(self, clip: str, head: str):
        """Loads the models.

        Args:
          clip: CLIP model of transformers: a folder, or its name on the hub.
          head: safetensors file with the linear layers, as `compose_layers` reads them.

        Raises:
          UserError: one of them cannot be read, or the head does not fit the model's image features.
        """
        self._processor = load_processor("CLIPImageProcessor", CLIP_FLAG, clip)
        self._network = load_model("CLIPVisionModelWithProjection", CLIP_FLAG, clip, dtype="float32")
        named = f"--{HEAD_FLAG}={head}"
        self._weight, self._bias = compose_layers(_read_head(epath.Path(head), named), named)
        width = self._network.config.projection_dim
        if len(self._weight) != width:
            raise UserError(
                f"{named} takes {len(self._weight)} features, --{CLIP_FLAG}={clip} gives {width}: use the CLIP model "
                "that the head was trained on"
            )

    def __call__(self, images: Sequence[np.ndarray]) -> list[float]:
        """Returns the score of each image, uint8 [H, W, 3]."""
        import torch

        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"].to(device())
        with torch.inference_mode():
            features = self._network(pixel_values=pixels).image_embeds.double().cpu().numpy()
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        return [float(score) for score in features @ self._weight + self._bias]


def compose_layers(tensors: Mapping[str, np.ndarray], named: str) -> tuple[np.ndarray, float]:
    """Composes linear layers, stored as PyTorch does, into one.

    Args:
      tensors: "weight" [1, C] and "bias" [1] of one layer, or those of layers with numbers in their names
        ("layers.0.weight", "layers.2.weight", …), which follow one another in the order of the numbers.
      named: flag and name of the file, for error messages.

    Returns:
      weight [C] and bias, float64: a score is features @ weight + bias.

    Raises:
      UserError: the layers do not follow one another, or the last does not give one number.
    """
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(?:.*?([0-9]{1,9})\.|.*\.)?(weight|bias)", name)
        if not found or tensor.ndim != (2 if found[2] == "weight" else 1):
            raise UserError(
                f"{named} has a tensor {name!r:.80} of shape {list(tensor.shape)}: only linear layers are supported"
            )
        layers.setdefault(int(found[1] or 0), {})[found[2]] = tensor.astype(np.float64)
    weight = bias = None
    for number in sorted(layers):
        layer = layers[number]
        if "weight" not in layer:
            raise UserError(f"{named}: layer {number} has no weight: only linear layers are supported")
        own_weight, own_bias = layer["weight"], layer.get("bias", np.zeros(len(layer["weight"])))
        if len(own_bias) != len(own_weight):
            raise UserError(f"{named}: layer {number} has {len(own_weight)} rows and a bias of {len(own_bias)} numbers")
        if weight is None or bias is None:
            weight, bias = own_weight, own_bias
            continue
        if own_weight.shape[1] != len(weight):
            raise UserError(
                f"{named}: layer {number} takes {own_weight.shape[1]} features, the one before gives {len(weight)}"
            )
        weight, bias = own_weight @ weight, own_weight @ bias + own_bias
    if weight is None or bias is None or len(weight) != 1:
        count = 0 if weight is None else len(weight)
        raise UserError(f"{named} gives {count} numbers, a score is one: name the head of an aesthetic predictor")
    return weight[0], float(bias[0])


def _read_head(file: epath.Path, named: str) -> dict[str, np.ndarray]:
    weights = SafetensorsFile(file)
    try:
        for name in weights.names:
            weights.check(name, weights.shape(name), named)  # its type
            if weights.num_bytes(name) > MAX_LAYER_BYTES:
                raise UserError(f"{named}: tensor {name:.80} has over {MAX_LAYER_BYTES >> 20} MiB: a head is smaller")
        return {name: weights.read(name) for name in weights.names}
    finally:
        weights.close()
