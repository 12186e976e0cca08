"""Object detectors of transformers: a picture -> the objects in it, with or without their masks.

Mask2Former's raw outputs become instances as mmdetection makes them, which GenEval's official scorer runs, and not as
transformers' own post-processing does, which works at 384 x 384 whatever the picture.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from lidit_jax.errors import UserError
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder

# Mask2Former is tested on COCO, by its authors and by mmdetection, with the short side of a picture at 800 pixels, but
# the long one at 1333 at most; what size a folder's preprocessor_config.json says is not looked at.
SHORT_SIDE, LONG_SIDE = 800, 1333
SIZE_DIVISOR = 32
MAX_INSTANCES = 100
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Some models have PASCAL VOC's names for what COCO has under others.
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
    """An object in a picture.

    Attributes:
      label: its class, by COCO's name.
      score: from 0 to 1.
      box: (left, top, right, bottom) in pixels; right and bottom are the first column and row outside.
      mask: bool [H, W], of the picture's size; None from a detector that gives boxes alone.
    """

    label: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class Detector(Protocol):
    """Attributes: classes: names of all that it can find, COCO's where it is in COCO."""

    classes: frozenset[str]

    def __call__(self, picture: np.ndarray, min_score: float = 0.0) -> list[Detection]:
        """The objects with a score over `min_score`, the surest first.

        Args: picture: uint8 [H, W, 3].
        """


def load_detector(name: str, flag: str = "detector") -> Detector:
    """A Mask2Former, which gives masks, or any model of AutoModelForObjectDetection.

    Args:
      name: a folder, or a name of the hub.
      flag: which named it.

    Raises:
      UserError: there is no such folder, or no detector in it.
    """
    import transformers

    folder = model_folder(flag, name)
    try:
        config, _ = transformers.PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag}={name}: its config.json is damaged") from error
    kind = Mask2Former if config.get("model_type") == "mask2former" else BoxDetector
    return kind(name, flag)


class Mask2Former:
    """Instances with masks; their boxes are the masks' bounds."""

    def __init__(self, name: str, flag: str = "detector"):
        self._model = load_model("Mask2FormerForUniversalSegmentation", flag, name, dtype="float32")
        processor = load_processor("AutoImageProcessor", flag, name, backend="pil")
        self._mean = np.float32(processor.image_mean or IMAGENET_MEAN)
        self._std = np.float32(processor.image_std or IMAGENET_STD)
        self._labels = _labels(self._model.config.id2label)
        self.classes = frozenset(self._labels.values())

    def __call__(self, picture: np.ndarray, min_score: float = 0.0) -> list[Detection]:
        import torch

        with torch.inference_mode():
            pixels, resized = self._prepare(picture)
            outputs = self._model(pixel_values=pixels)
            found = instances(
                outputs.class_queries_logits[0],
                outputs.masks_queries_logits[0],
                tuple(pixels.shape[2:]),
                resized,
                picture.shape[:2],
                min_score,
            )
        return [
            Detection(self._labels[label], score, mask_bounds(mask), mask)
            for label, score, mask in found
            if label in self._labels
        ]

    def _prepare(self, picture: np.ndarray) -> tuple[Any, tuple[int, int]]:
        """(pixels [1, 3, H', W'], padded; the size before the padding)."""
        import torch
        import torch.nn.functional as F

        size = detector_size(*picture.shape[:2])
        pixels = torch.from_numpy(np.ascontiguousarray(picture)).to(device()).permute(2, 0, 1)[None].float()
        # As OpenCV interpolates, without a blur before it, and to whole numbers.
        pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round()
        mean, std = (torch.from_numpy(value).to(device())[:, None, None] for value in (self._mean, self._std))
        pixels = (pixels / 255 - mean) / std
        bottom, right = (-side % SIZE_DIVISOR for side in size)
        return F.pad(pixels, (0, right, 0, bottom)), size


class BoxDetector:
    """A detector that gives boxes alone, as DETR."""

    def __init__(self, name: str, flag: str = "detector"):
        self._model = load_model("AutoModelForObjectDetection", flag, name, dtype="float32")
        self._processor = load_processor("AutoImageProcessor", flag, name, backend="pil")
        if not hasattr(self._processor, "post_process_object_detection"):
            raise UserError(f"--{flag}={name}: transformers makes no boxes of what this model gives")
        self._labels = _labels(self._model.config.id2label)
        self.classes = frozenset(self._labels.values())

    def __call__(self, picture: np.ndarray, min_score: float = 0.0) -> list[Detection]:
        import torch

        with torch.inference_mode():
            inputs = self._processor(images=Image.fromarray(picture), return_tensors="pt").to(device())
            outputs = self._model(**inputs)
            [found] = self._processor.post_process_object_detection(
                outputs, threshold=min_score, target_sizes=[picture.shape[:2]]
            )
        detections = [
            Detection(self._labels[label], score, tuple(box))
            for label, score, box in zip(*(found[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
            if label in self._labels
        ]
        return sorted(detections, key=lambda detection: -detection.score)


def detector_size(height: int, width: int) -> tuple[int, int]:
    """Height and width that a picture is resized to, its proportions kept."""
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
    """Mask2Former's queries as instances: (class, score, mask bool [H, W]), the surest first, none with an empty mask.

    Of all pairs of a query and a class the 100 with the highest probabilities are instances: a query may be several.
    A score is that probability times the mean of the mask's own, over the pixels where it is above a half.

    Args:
      class_logits: tensor [queries, classes + 1], the last for no object.
      mask_logits: tensor [queries, h, w], at a quarter of the model's input.
      padded, resized, original: height and width of the model's input, of the part of it that is the picture, and of
        the picture itself.
      min_score: only those over it are given.
    """
    import torch.nn.functional as F

    probabilities = class_logits.softmax(-1)[:, :-1]
    num_classes = probabilities.shape[1]
    top, pairs = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    found = []
    for probability, pair in zip(top.tolist(), pairs.tolist(), strict=True):
        if probability <= min_score:  # and so is its score: a mask's mean is 1 at most
            break
        mask = mask_logits[None, None, pair // num_classes].float()
        mask = F.interpolate(mask, padded, mode="bilinear", align_corners=False)[..., : resized[0], : resized[1]]
        mask = F.interpolate(mask, original, mode="bilinear", align_corners=False)[0, 0]
        inside = mask > 0
        pixels = int(inside.sum())
        score = probability * float(mask[inside].sigmoid().sum()) / (pixels + 1e-6)
        if pixels and score > min_score:
            found.append((pair % num_classes, score, inside.cpu().numpy()))
    return sorted(found, key=lambda one: -one[1])


def mask_bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of a mask, bool [H, W], that is not empty."""
    (columns,), (rows,) = np.nonzero(mask.any(axis=0)), np.nonzero(mask.any(axis=1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def check_classes(detector: Detector, wanted: Sequence[str], name: str) -> None:
    """Raises UserError if the detector, of this name, can't find all classes that are wanted."""
    lacking = sorted(set(wanted) - detector.classes)
    if lacking:
        raise UserError(
            f"--detector={name} has no class {lacking[0]!r} ({len(lacking)} of those in the prompts lack): name a "
            "detector for COCO"
        )


def _labels(id2label: dict[int, str]) -> dict[int, str]:
    """Class -> its name, without those that COCO's numbering leaves out."""
    return {int(index): COCO_NAMES.get(name, name) for index, name in id2label.items() if name != "N/A"}
