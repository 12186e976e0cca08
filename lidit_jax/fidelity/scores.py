"""FID of generated images against reference images, and the CLIP score of images and their prompts.

The statistics of FID (Heusel et al. 2017) come from `torchmetrics`, CLIP from `transformers`. Both need PyTorch, which
is imported only when a score is computed.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from lidit_jax.errors import UserError, cannot_write
from lidit_jax.evaluate.output_folder import check_claim, read_claim
from lidit_jax.fidelity.image_folder import ImageFile, find_images_and_prompts
from lidit_jax.files import created_folder, finite, write_json
from lidit_jax.score.eval_extra import require_extra
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder
from lidit_jax.weights.digest import file_digest, folder_digest

logger = logging.getLogger(__name__)

SCORES_FILE = "fidelity.json"
BATCH = 32  # images per batch
FACTS = ("images", "reference", "num_reference", "inception", "clip", "prompts_file")


@dataclasses.dataclass(frozen=True)
class Reference:
    """Reference images of FID.

    Attributes:
      name: name of the folder or data set, for the report.
      count: number of images.
      images: uint8 [H, W, 3] each.
    """

    name: str
    count: int
    images: Iterable[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityRequest:
    """Images to score, and the models to score them with.

    Attributes:
      images: folder of images; see `image_folder.py`.
      out: folder for fidelity.json.
      reference: reference images of FID; None skips FID.
      inception: safetensors file of FID's network; required with `reference`.
      clip: folder of a CLIP model in the format of transformers, or its name on the hub; None for no CLIP score.
      prompts_file: file of the prompts, if the folder of images does not store them.
    """

    images: epath.Path
    out: epath.Path
    reference: Reference | None = None
    inception: epath.Path | None = None
    clip: str | None = None
    prompts_file: epath.Path | None = None


def score_fidelity(request: FidelityRequest) -> dict[str, Any]:
    """Computes the scores, logs them and writes them to fidelity.json in the output folder.

    Only scores of the same images by the same models are overwritten.

    Returns:
      The content of fidelity.json: the scores, and the images and models that they belong to.

    Raises:
      UserError: the request is invalid, which is found before any image is scored; or an image is damaged.
    """
    require_extra("fidelity", "torch", "torchmetrics", "transformers")
    if request.inception is None and request.clip is None:
        raise UserError("nothing to score: give --inception=FILE for FID, --clip=FOLDER for the CLIP score, or both")
    if (request.inception is None) != (request.reference is None):
        raise UserError("FID needs --inception=FILE and either --reference=DIR or --config=FILE")
    drawn = find_images_and_prompts(request.images, request.prompts_file)
    count = sum(file.num_images for file in drawn)
    if request.clip is not None and any(file.prompt is None for file in drawn):
        raise UserError(
            f"--images={request.images} does not store the prompts, which --clip needs: give --prompts_file=FILE"
        )
    if request.reference is not None and min(count, request.reference.count) < 2:
        raise UserError(
            f"FID needs at least 2 images and 2 reference images: there are {count} and {request.reference.count}"
        )
    scores = _provenance(request) | {"num_images": count}
    if (found := read_claim(request.out, SCORES_FILE)) is not None:
        check_claim(request.out, "scores", found, scores, FACTS)
    fid = None if request.inception is None else FrechetDistance(load_network(request.inception))
    clip = None if request.clip is None else ClipScore(request.clip)

    _add_images(drawn, count, fid, clip)
    if fid is not None:
        fid.add(_bar(request.reference.images, request.reference.count, "reading the reference"), real=True)
        _warn_if_few(min(count, request.reference.count), fid.num_features)
        scores["fid"] = fid.compute()
    if clip is not None:
        scores |= {"clip_score": clip.compute(), "truncated_prompts": clip.num_truncated}
        if clip.num_truncated:
            logger.warning(
                "%d of %d prompts exceed CLIP's maximum length: their ends are truncated", clip.num_truncated, count
            )
    _write(request.out, scores)
    summary = {"FID": scores.get("fid"), "CLIP score": scores.get("clip_score")}
    summary = ", ".join(f"{name} {score:.3f}" for name, score in summary.items() if score is not None)
    logger.info("%s of %d images; %s", summary, count, request.out / SCORES_FILE)
    return scores


def load_network(file: epath.Path) -> Any:
    """Loads FID's Inception; see `inception.py`, which imports PyTorch."""
    from lidit_jax.fidelity.inception import load_inception

    return load_inception(file)


class FrechetDistance:
    """FID between two sets of images, with the features of any network.

    Attributes:
      num_features: F, the size of the features. The covariance of F or fewer images is singular.
    """

    def __init__(self, network: Any):
        """Creates empty statistics.

        Args:
          network: torch.nn.Module, [B, …] -> [B, F]. `network.prepare` converts an image, uint8 [H, W, 3], to an input,
            and `network.num_features` is F.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._prepare, self.num_features = network.prepare, network.num_features
        self._metric = FrechetInceptionDistance(network).to(device())

    def add(self, images: Iterable[np.ndarray], *, real: bool) -> None:
        """Adds images to the statistics.

        Args:
          images: uint8 [H, W, 3] each.
          real: whether they belong to the reference.
        """
        import torch

        for batch in _batches(images):
            with torch.inference_mode():
                self._metric.update(torch.stack([self._prepare(image) for image in batch]).to(device()), real=real)

    def compute(self) -> float:
        """Returns the FID of all images added so far, at least two of each set."""
        return float(self._metric.compute())


class ClipScore:
    """Mean of max(100 cos(image, prompt), 0) of CLIP's embeddings (Hessel et al. 2021, with 100 in place of 2.5).

    Attributes:
      num_truncated: number of prompts so far that exceed the maximum length of the text encoder and were truncated.
    """

    def __init__(self, name: str):
        """Loads the model.

        Args:
          name: folder of a CLIP model in the format of transformers, or its name on the hub.

        Raises:
          UserError: the model does not exist or is not a CLIP model.
        """
        self._model = load_model("CLIPModel", "clip", name)
        self._processor = load_processor("AutoImageProcessor", "clip", name, backend="pil")
        self._tokenizer = load_processor("AutoTokenizer", "clip", name)
        self._max_length = self._model.config.text_config.max_position_embeddings
        self._scores: list[float] = []
        self.num_truncated = 0

    def add(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
        """Scores a batch of images.

        Args:
          images: uint8 [H, W, 3] each.
          prompts: the prompt of each image.
        """
        import torch

        pixels = self._processor(images=list(images), return_tensors="pt")["pixel_values"]
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        untruncated = self._tokenizer(list(prompts), verbose=False)["input_ids"]
        self.num_truncated += sum(len(ids) > self._max_length for ids in untruncated)
        with torch.inference_mode():
            found = self._model(pixel_values=pixels.to(device()), **tokens.to(device()))
            cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        self._scores += (100 * cosine).clamp(min=0).tolist()

    def compute(self) -> float:
        """Returns the mean score of all images so far."""
        return float(np.mean(self._scores))


def _add_images(drawn: Sequence[ImageFile], count: int, fid: FrechetDistance | None, clip: ClipScore | None) -> None:
    """Reads each image once and adds it to the scores that are computed."""
    found = ((image, file.prompt) for file in drawn for image in file.read())
    for batch in _batches(_bar(found, count, "scoring")):
        images, prompts = zip(*batch, strict=True)
        if fid is not None:
            fid.add(images, real=False)
        if clip is not None:
            clip.add(images, prompts)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _bar(items: Iterable[Any], total: int, description: str) -> Iterable[Any]:
    return tqdm.tqdm(items, total=total, unit="image", desc=description, mininterval=1)


def _warn_if_few(count: int, num_features: int) -> None:
    if count <= num_features:
        logger.warning(
            "FID of %d images is biased upwards, and its covariance is singular with %d features or fewer images: "
            "compare it only with FIDs of equally many images; papers use 10,000 or more",
            *(count, num_features),
        )


# --- the report -------------------------------------------------------------------------------------------------


def _provenance(request: FidelityRequest) -> dict[str, Any]:
    """Returns the images and models of the scores as JSON values."""
    return {
        "images": str(request.images),
        "reference": request.reference and request.reference.name,
        "num_reference": request.reference and request.reference.count,
        "inception": request.inception and _digest(request.inception),
        "clip": request.clip and folder_digest(model_folder("clip", request.clip)),
        "prompts_file": request.prompts_file and str(request.prompts_file),
    }


def _digest(file: epath.Path) -> str:
    if not file.exists() or file.is_dir():
        raise UserError(f"--inception={file}: no such file; name a .safetensors file of FID's Inception weights")
    return file_digest(file)


def _write(out: epath.Path, scores: Mapping[str, Any]) -> None:
    try:
        with created_folder(out):
            write_json(out / SCORES_FILE, finite(scores))
    except OSError as error:
        raise cannot_write(f"--out={out}", error) from error
