"""Aesthetic scores of images: linear layers on the normalised image features of CLIP, as LAION's predictors are.

LAION's aesthetic predictor (https://github.com/LAION-AI/aesthetic-predictor) is one linear layer on OpenAI's CLIP
ViT-L/14. The improved predictor (https://github.com/christophschuhmann/improved-aesthetic-predictor), that of
LAION-Aesthetics V2 and presumably of the paper's threshold of 4.7, is five linear layers without activation functions.
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.recaption.model_errors import model_errors
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
        self._processor = load_processor("AutoImageProcessor", CLIP_FLAG, clip, backend="pil")
        self._network = load_model("CLIPVisionModelWithProjection", CLIP_FLAG, clip, dtype="float32")
        self._named, named = f"--{CLIP_FLAG}={clip}", f"--{HEAD_FLAG}={head}"
        self._weight, self._bias = compose_layers(_read_head(epath.Path(head), named), named)
        width = self._network.visual_projection.out_features
        if len(self._weight) != width:
            raise UserError(
                f"{named} takes {len(self._weight)} features, --{CLIP_FLAG}={clip} gives {width}: use the CLIP model "
                "that the head was trained on"
            )

    def __call__(self, images: Sequence[np.ndarray]) -> list[float]:
        """Returns the score of each image, uint8 [H, W, 3].

        Raises:
          UserError: the model fails on them.
          OutOfMemory: the batch is too large.
        """
        import torch

        with model_errors(self._named, len(images)), torch.inference_mode():
            pixels = self._processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")
            output = self._network(pixel_values=pixels["pixel_values"].to(device()))
        features = output.image_embeds.double().cpu().numpy()
        scores = features / np.linalg.norm(features, axis=1, keepdims=True) @ self._weight + self._bias
        if not np.isfinite(scores).all():
            raise UserError(f"{self._named} gives features that are not finite: use a CLIP model as published")
        return [float(score) for score in scores]


def compose_layers(tensors: Mapping[str, np.ndarray], named: str) -> tuple[np.ndarray, float]:
    """Composes linear layers, stored as PyTorch does, into one.

    Args:
      tensors: "weight" [1, C] and "bias" [1] of one layer, or those of layers with numbers in their names
        ("layers.0.weight", "layers.2.weight", …), which follow one another in the order of the numbers. A layer need
        not have a bias.
      named: flag and name of the file, for error messages.

    Returns:
      weight [C] and bias, float64: a score is features @ weight + bias.

    Raises:
      UserError: the layers do not follow one another, or the last does not give one number.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        layer_name, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias") or tensor.ndim != (2 if kind == "weight" else 1):
            raise UserError(
                f"{named} has a tensor {name!r:.80} of shape {list(tensor.shape)}: only linear layers are supported"
            )
        if not np.isfinite(tensor).all():
            raise UserError(f"{named}: tensor {name!r:.80} has values that are not finite: convert the head again")
        layers.setdefault(layer_name, {})[kind] = tensor.astype(np.float64)
    numbers = {name: tuple(int(number) for number in re.findall(r"[0-9]{1,9}", name)) for name in layers}
    if len(set(numbers.values())) < len(layers):
        raise UserError(f"{named} has layers {', '.join(sorted(layers))[:200]}: their numbers must tell their order")
    weight = bias = None
    for number in sorted(layers, key=numbers.__getitem__):
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
    try:
        weights = SafetensorsFile(file)
    except UserError as error:
        raise UserError(f"--{HEAD_FLAG}: {error}") from error
    try:
        for name in weights.names:
            weights.check(name, weights.shape(name), named)  # its type
            if weights.num_bytes(name) > MAX_LAYER_BYTES:
                raise UserError(f"{named}: tensor {name:.80} has over {MAX_LAYER_BYTES >> 20} MiB: a head is smaller")
        return {name: weights.read(name) for name in weights.names}
    finally:
        weights.close()
