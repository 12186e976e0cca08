"""The request to a scorer, and its results file, which is saved while it grows so that a rerun can resume."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm
from etils import epath

from lidit_jax.errors import UserError, cannot_write
from lidit_jax.evaluate.benchmarks import PROVENANCE_FILE
from lidit_jax.evaluate.output_folder import check_claim, read_claim
from lidit_jax.files import created_folder, write_json
from lidit_jax.score.load_model import model_folder
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import is_there

RESULTS_FILE = "results.json"
SAVE_EVERY = 10.0  # seconds; a killed process loses at most the work of this time


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """Images to score, and the models to score them with.

    Attributes:
      benchmark: geneval, t2i_compbench, dpg_bench or positional_bias.
      images: folder of images in the layout of the official scorer, as `lidit_jax.evaluate` writes it.
      out: folder for results and report.
      detector, clip, vqa: folders of models as transformers saves them, or their names on the hub.
      file: the benchmark's prompts, to check that all have images; its name can tell T2I-CompBench's category.
      questions: DPG-Bench's dpg_bench.csv.
    """

    benchmark: str
    images: epath.Path
    out: epath.Path
    detector: str | None = None
    clip: str | None = None
    vqa: str | None = None
    file: epath.Path | None = None
    questions: epath.Path | None = None

    def require(self, name: str) -> Any:
        """Returns the value of the flag `name`.

        Raises:
          UserError: it was not given.
        """
        value = getattr(self, name)
        if not value:
            raise UserError(f"--{name} is required for --benchmark={self.benchmark}")
        return value


class ResultsFile:
    """OUT/results.json, the result of each image, saved while it grows so that a rerun can resume.

    Use it as a context manager: on exit, also by an exception or Ctrl-C, it saves the results so far.
    """

    def __init__(self, out: epath.Path, provenance: Mapping[str, Any]):
        """Opens or creates the file; never overwrites results of another provenance.

        Args:
          out: folder of the file.
          provenance: what the results depend on, JSON-serialisable.

        Raises:
          UserError: the folder is not empty and has no results of this provenance, or it cannot be written.
        """
        self._file, self._provenance = out / RESULTS_FILE, dict(provenance)
        self._results = _read_results(self._file, self._provenance)
        self._save()

    def complete(self, names: Sequence[str], score: Callable[[str], Any], unit: str = "image") -> dict[str, Any]:
        """Computes the missing results, with a progress bar, and returns those of all `names`, in this order.

        Args:
          names: keys of the results, such as file names of images.
          score: name -> result, JSON-serialisable; called only for names without a result.
          unit: what a name stands for, shown by the bar.
        """
        left = [name for name in names if name not in self._results]
        # `initial` shows results of an earlier run as done, but leaves them out of the estimated time.
        with tqdm.tqdm(
            total=len(names), initial=len(names) - len(left), unit=unit, desc="scoring", mininterval=1
        ) as bar:
            for name in left:
                self._results[name] = score(name)
                if time.monotonic() - self._saved > SAVE_EVERY:
                    self._save()
                bar.update()
        self._save()
        return {name: self._results[name] for name in names}

    def __enter__(self) -> "ResultsFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self._save()

    def _save(self) -> None:
        try:
            with created_folder(self._file.parent):
                write_json(self._file, {"facts": self._provenance, "results": self._results}, indent=None)
        except OSError as error:
            raise cannot_write(f"--out={self._file.parent}", error) from error
        self._saved = time.monotonic()


def open_results(
    request: ScoreRequest, images: Sequence[epath.Path], models: Sequence[str], **more: Any
) -> ResultsFile:
    """Opens the results in `request.out` of these images by these models.

    Args:
      request: names the folders and the models.
      images: files in `request.images`; results depend on their names and sizes, and on the provenance that
        `lidit_jax.evaluate` recorded beside them.
      models: those of "detector", "clip" and "vqa" that the scorer uses; results depend on their weights.
      **more: what else the results depend on, JSON-serialisable.

    Raises:
      UserError: see `ResultsFile`; or a model was not named or does not exist.
    """
    provenance = {"benchmark": request.benchmark, "images": _images_digest(request.images, images)}
    provenance |= {name: folder_digest(model_folder(name, request.require(name))) for name in models}
    return ResultsFile(request.out, json.loads(json.dumps(provenance | more)))


def _read_results(file: epath.Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the results in a file; empty if there is none.

    Raises:
      UserError: they have another provenance, or the file is damaged.
    """
    found = read_claim(file.parent, file.name)
    if found is None:
        return {}
    recorded, results = found.get("facts"), found.get("results")
    if not isinstance(recorded, dict) or not isinstance(results, dict):
        raise UserError(f"{file} is damaged: name another --out")
    if results:  # a file without results may be reused
        check_claim(file.parent, "results", recorded, provenance, sorted({*recorded, *provenance}))
    return results


def _images_digest(folder: epath.Path, images: Sequence[epath.Path]) -> str:
    sha = hashlib.sha256()
    provenance = folder / PROVENANCE_FILE
    if provenance.exists():
        sha.update(provenance.read_bytes())
    for image in images:
        # Sizes, not contents, which would be read twice: images of two models never all have the same sizes in bytes.
        sha.update(f"{image.relative_to(folder)} {image.stat().length}\n".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()[:16]


def require_images_folder(request: ScoreRequest) -> epath.Path:
    """Returns the folder of images.

    Raises:
      UserError: there is none.
    """
    if not is_there(request.images):
        raise UserError(f"--images={request.images}: no such folder: generate images with python -m lidit_jax.evaluate")
    if not request.images.is_dir():
        raise UserError(f"--images={request.images} is a file: name the folder of the images")
    return request.images
