"""Detects objects in images with transformers' models, as boxes with or without masks.

Mask2Former's outputs are turned into instances as mmdetection does, which GenEval's official scorer runs. The
post-processing of transformers differs: it works at 384 x 384 whatever the size of the image.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder

# Test-time size of Mask2Former on COCO, for its authors and for mmdetection: the short side has 800 pixels, the long
# one at most 1333. The size in a folder's preprocessor_config.json is ignored.
SHORT_SIDE, LONG_SIDE = 800, 1333
SIZE_DIVISOR = 32
MAX_INSTANCES = 100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# PASCAL VOC's name of a class, which some models use, -> COCO's.
COCO_NAMES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


@dataclasses.dataclass(frozen=True)
class Detection:
    """An object detected in an image.

    Attributes:
      label: COCO's name of its class.
      score: confidence, from 0 to 1.
      box: (left, top, right, bottom) in pixels; right and bottom are exclusive.
      mask: bool [H, W], of the image's size; None from a detector without masks.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Detects objects in an image.

    Attributes:
      classes: names of the classes that it knows; COCO's names for COCO's classes.
    """

    classes: frozenset[str]

    def __call__(self, image: np.ndarray, min_score: float = 0.0) -> list[Detection]:
        """Returns the objects with a score above `min_score`, by descending score.

        Args:
          image: uint8 [H, W, 3].
          min_score: from 0 to 1.
        """


def load_detector(name: str, flag: str = "detector") -> Detector:
    """Loads a Mask2Former, which predicts masks, or any model of AutoModelForObjectDetection, which predicts boxes.

    Args:
      name: a folder, or a model's name on the hub.
      flag: name of the flag that gave it, for error messages.

    Raises:
      UserError: there is no such folder, or no detector in it.
    """
    import transformers

    folder = model_folder(flag, name)
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag}={name}: its config.json is damaged: copy or download the model again") from error
    detector_class = Mask2Former if config.get("model_type") == "mask2former" else BoxDetector
    return detector_class(name, flag)


class Mask2Former:
    """Detects instances with masks; an instance's box is its mask's bounding box."""

    def __init__(self, name: str, flag: str = "detector"):
        self._model = load_model("Mask2FormerForUniversalSegmentation", flag, name, dtype="float32")
        processor = load_processor("AutoImageProcessor", flag, name, backend="pil")
        self._mean = np.float32(processor.image_mean or IMAGENET_MEAN)
        self._std = np.float32(processor.image_std or IMAGENET_STD)
        self._labels = _labels(self._model.config.id2label)
        self.classes = frozenset(self._labels.values())

    def __call__(self, image: np.ndarray, min_score: float = 0.0) -> list[Detection]:
        import torch

        with torch.inference_mode():
            pixels, resized = self._prepare(image)
            outputs = self._model(pixel_values=pixels)
            found = instances(
                outputs.class_queries_logits[0],
                outputs.masks_queries_logits[0],
                tuple(pixels.shape[2:]),
                resized,
                image.shape[:2],
                min_score,
            )
        return [
            Detection(self._labels[label], score, mask_bounds(mask), mask)
            for label, score, mask in found
            if label in self._labels
        ]

    def _prepare(self, image: np.ndarray) -> tuple[Any, tuple[int, int]]:
        """Resizes, normalises and pads an image.

        Returns:
          Pixels, float32 [1, 3, H', W'], and their height and width before padding.
        """
        import torch
        import torch.nn.functional as F

        size = detector_size(*image.shape[:2])
        pixels = torch.from_numpy(np.ascontiguousarray(image)).to(device()).permute(2, 0, 1)[None].float()
        # OpenCV's bilinear resizing, as in mmdetection: no antialiasing, and the result is rounded to integers.
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
        mean, std = (torch.from_numpy(value).to(device())[:, None, None] for value in (self._mean, self._std))
        pixels = (pixels / 255 - mean) / std
        bottom, right = (-side % SIZE_DIVISOR for side in size)
        return F.pad(pixels, (0, right, 0, bottom)), size


class BoxDetector:
    """Detects boxes without masks, for models such as DETR."""

    def __init__(self, name: str, flag: str = "detector"):
        self._model = load_model("AutoModelForObjectDetection", flag, name, dtype="float32")
        self._processor = load_processor("AutoImageProcessor", flag, name, backend="pil")
        if not hasattr(self._processor, "post_process_object_detection"):
            raise UserError(f"--{flag}={name}: its image processor cannot compute boxes: name another detector")
        self._labels = _labels(self._model.config.id2label)
        self.classes = frozenset(self._labels.values())

    def __call__(self, image: np.ndarray, min_score: float = 0.0) -> list[Detection]:
        import torch

        with torch.inference_mode():
            inputs = self._processor(images=Image.fromarray(image), return_tensors="pt").to(device())
            outputs = self._model(**inputs)
            [found] = self._processor.post_process_object_detection(
                outputs, threshold=min_score, target_sizes=[image.shape[:2]]
            )
        detections = [
            Detection(self._labels[label], score, tuple(box))
            for label, score, box in zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
            if label in self._labels
        ]
        return sorted(detections, key=lambda detection: -detection.score)


def detector_size(height: int, width: int) -> tuple[int, int]:
    """Returns the height and width that an image is resized to; the aspect ratio is kept."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def instances(
    class_logits: Any,
    mask_logits: Any,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    min_score: float = 0.0,
) -> list[tuple[int, float, np.ndarray]]:
    """Turns Mask2Former's queries into instances.

    The 100 pairs of a query and a class with the highest class probabilities are the instances, so a query can give
    several. An instance's score is that probability times the mean mask probability over the pixels where the mask
    probability exceeds 0.5.

    Args:
      class_logits: tensor [queries, classes + 1]; the last class is "no object".
      mask_logits: tensor [queries, h, w], at a quarter of the model's input resolution.
      padded: height and width of the model's input.
      resized: height and width of the image within it.
      original: height and width of the original image.
      min_score: instances with a score up to it are dropped.

    Returns:
      (class, score, mask bool [H, W]) of each instance with a non-empty mask, by descending score.
    """
    import torch.nn.functional as F

    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    top, pairs = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    found = []
    for probability, pair in zip(top.tolist(), pairs.tolist(), strict=True):
        if probability <= min_score:  # then its score is too: a mean mask probability is at most 1
            break
        mask = mask_logits[None, None, pair // num_classes].float()
        mask = F.interpolate(mask, padded, mode="bilinear", align_corners=False)[..., : resized[0], : resized[1]]
        mask = F.interpolate(mask, original, mode="bilinear", align_corners=False)[0, 0]
        inside = mask > 0
        pixels = int(inside.sum())
        score = probability * float(mask[inside].sigmoid().sum()) / (pixels + 1e-6)
        if pixels and score > min_score:
            found.append((pair % num_classes, score, inside.cpu().numpy()))
    return sorted(found, key=lambda instance: -instance[1])


def mask_bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Returns the bounding box (left, top, right, bottom) of a non-empty mask, bool [H, W]."""
    (columns,), (rows,) = np.nonzero(mask.any(axis=0)), np.nonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def check_classes(detector: Detector, wanted: Sequence[str], name: str) -> None:
    """Checks that the detector knows all classes in `wanted`.

    Args:
      detector: to check.
      wanted: COCO's names of classes.
      name: the detector's, for the error message.

    Raises:
      UserError: it lacks a class.
    """
    missing = sorted(set(wanted) - detector.classes)
    if missing:
        raise UserError(
            f"--detector={name} has no class {missing[0]!r} (it lacks {len(missing)} of the prompts' classes): name a "
            "detector for COCO"
        )


def _labels(id2label: dict[int, str]) -> dict[int, str]:
    """Returns class index -> COCO's name, without the unused indices ("N/A") of COCO's numbering."""
    return {int(index): COCO_NAMES.get(name, name) for index, name in id2label.items() if name != "N/A"}
