"""FID of pictures against others, and the CLIP score of pictures and their prompts.

The statistics of FID (Heusel et al. 2017) are `torchmetrics`', CLIP is transformers'; both are PyTorch's, which is
imported when a score is asked for.
"""

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.claimed_folder import check_claim, read_claim
from lidit_jax.fidelity.drawn_folder import DrawnFile, drawn_files
from lidit_jax.files import finite, write_json
from lidit_jax.score.eval_extra import require_extra
from lidit_jax.score.load_model import device, load_model, load_processor, model_folder
from lidit_jax.weights.digest import file_digest, folder_digest

logger = logging.getLogger(__name__)

SCORES_FILE = "fidelity.json"
BATCH = 32  # pictures at once
FACTS = ("pictures", "reference", "num_reference", "inception", "clip", "prompts_file")


@dataclasses.dataclass(frozen=True)
class Reference:
    """What FID compares with.

    Attributes:
      name: of the folder or data set, for the report.
      count: how many pictures there are.
      pictures: uint8 [H, W, 3] each.
    """

    name: str
    count: int
    pictures: Iterable[np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidelityRequest:
    """What to score, and by what.

    Attributes:
      pictures: folder; see `drawn_folder.py`.
      out: folder for fidelity.json.
      reference: for FID; None: no FID.
      inception: safetensors file of FID's network; goes with `reference`.
      clip: a CLIP model's folder, as transformers saves it, or its name on the hub; None: no CLIP score.
      prompts_file: of the pictures, where their folder does not say the prompts.
    """

    pictures: epath.Path
    out: epath.Path
    reference: Reference | None = None
    inception: epath.Path | None = None
    clip: str | None = None
    prompts_file: epath.Path | None = None


def score_fidelity(request: FidelityRequest) -> dict[str, Any]:
    """Writes the scores to OUT/fidelity.json and says them; returns them, with what they are of.

    Raises:
      UserError: for what does not fit, before any picture is scored; or for a damaged picture. Nothing is overwritten
        but scores of the same pictures by the same models.
    """
    require_extra("fidelity", "torch", "torchmetrics", "transformers")
    if request.inception is None and request.clip is None:
        raise UserError("nothing to score: give --inception=FILE for FID, --clip=FOLDER for the CLIP score, or both")
    if (request.inception is None) != (request.reference is None):
        raise UserError("FID needs --inception=FILE and either --reference=DIR or --config=FILE")
    drawn = drawn_files(request.pictures, request.prompts_file)
    count = sum(file.pictures for file in drawn)
    if request.clip is not None and any(file.prompt is None for file in drawn):
        raise UserError(
            f"--pictures={request.pictures} does not say the prompts, which --clip needs: give --prompts_file=FILE"
        )
    if request.reference is not None and min(count, request.reference.count) < 2:
        raise UserError(f"FID needs 2 pictures at least: there are {count}, and {request.reference.count} to compare")
    scores = _facts(request) | {"num_pictures": count}
    if (found := read_claim(request.out, SCORES_FILE)) is not None:
        check_claim(request.out, "scores", found, scores, FACTS)
    fid = None if request.inception is None else FrechetDistance(load_network(request.inception))
    clip = None if request.clip is None else ClipScore(request.clip)

    _add_drawn(drawn, count, fid, clip)
    if fid is not None:
        fid.add(_bar(request.reference.pictures, request.reference.count, "reading the reference"), real=True)
        _warn_of_few(min(count, request.reference.count), fid.num_features)
        scores["fid"] = fid.compute()
    if clip is not None:
        scores |= {"clip_score": clip.compute(), "cut_prompts": clip.cut}
        if clip.cut:
            logger.warning("%d of %d prompts are longer than CLIP reads: it saw their beginnings", clip.cut, count)
    _write(request.out, scores)
    said = {"FID": scores.get("fid"), "CLIP score": scores.get("clip_score")}
    said = ", ".join(f"{name} {score:.3f}" for name, score in said.items() if score is not None)
    logger.info("%s of %d pictures; %s", said, count, request.out / SCORES_FILE)
    return scores


def load_network(file: epath.Path) -> Any:
    """FID's Inception; see `inception.py`, which imports PyTorch."""
    from lidit_jax.fidelity.inception import load_inception

    return load_inception(file)


class FrechetDistance:
    """FID of two sets of pictures by any network.

    Attributes:
      num_features: F, of the network; fewer pictures leave their covariance singular.
    """

    def __init__(self, network: Any):
        """Args: network: a torch.nn.Module, [B, …] -> [B, F]; `network.prepare` makes a picture, uint8 [H, W, 3], ready
        for a batch, and `network.num_features` is F.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        self._prepare, self.num_features = network.prepare, network.num_features
        self._metric = FrechetInceptionDistance(network).to(device())

    def add(self, pictures: Iterable[np.ndarray], *, real: bool) -> None:
        """Args: real: whether they are of the reference."""
        import torch

        for batch in _batches(pictures):
            with torch.inference_mode():
                self._metric.update(torch.stack([self._prepare(picture) for picture in batch]).to(device()), real=real)

    def compute(self) -> float:
        """Of all pictures so far; at least two of each kind."""
        return float(self._metric.compute())


class ClipScore:
    """The mean of max(100 cos(picture, prompt), 0) by CLIP's embeddings (Hessel et al. 2021, with 100 for their 2.5).

    Attributes:
      cut: prompts so far that are longer than the model's text encoder reads.
    """

    def __init__(self, name: str):
        """Args: name: a folder as transformers saves it, or a name of the hub.

        Raises:
          UserError: there is no such model, or it is no CLIP.
        """
        self._model = load_model("CLIPModel", "clip", name)
        self._processor = load_processor("AutoImageProcessor", "clip", name, backend="pil")
        self._tokenizer = load_processor("AutoTokenizer", "clip", name)
        self._max_length = self._model.config.text_config.max_position_embeddings
        self._scores: list[float] = []
        self.cut = 0

    def add(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> None:
        """Args: pictures: uint8 [H, W, 3] each."""
        import torch

        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=self._max_length, return_tensors="pt"
        )
        whole = self._tokenizer(list(prompts), verbose=False)["input_ids"]
        self.cut += sum(len(ids) > self._max_length for ids in whole)
        with torch.inference_mode():
            found = self._model(pixel_values=pixels.to(device()), **tokens.to(device()))
            cosine = torch.nn.functional.cosine_similarity(found.image_embeds, found.text_embeds)
        self._scores += (100 * cosine).clamp(min=0).tolist()

    def compute(self) -> float:
        """Over all pictures so far."""
        return float(np.mean(self._scores))


def _add_drawn(drawn: Sequence[DrawnFile], count: int, fid: FrechetDistance | None, clip: ClipScore | None) -> None:
    """Each picture is read once, for both scores."""
    found = ((picture, file.prompt) for file in drawn for picture in file.read())
    for batch in _batches(_bar(found, count, "scoring")):
        pictures, prompts = zip(*batch, strict=True)
        if fid is not None:
            fid.add(pictures, real=False)
        if clip is not None:
            clip.add(pictures, prompts)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _bar(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    return tqdm.tqdm(items, total=total, unit="picture", desc=what, mininterval=1)


def _warn_of_few(count: int, num_features: int) -> None:
    if count <= num_features:
        logger.warning(
            "FID of %d pictures is biased upwards, and with no more than the %d features of a picture their covariance "
            "is singular: compare it with FIDs of as many pictures alone; papers take 10,000 or more",
            *(count, num_features),
        )


# --- the report -------------------------------------------------------------------------------------------------


def _facts(request: FidelityRequest) -> dict[str, Any]:
    """What the scores are of, JSON-able."""
    return {
        "pictures": str(request.pictures),
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
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SCORES_FILE, finite(scores))
    except OSError as error:
        raise UserError(f"--out={out} can't be written ({error.strerror or error}); name another") from error
