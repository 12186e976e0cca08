"""What is asked of a scorer, and its results so far: kept while they grow, so that a rerun goes on."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import FACTS_FILE
from lidit_jax.evaluate.claimed_folder import check_claim, read_claim
from lidit_jax.files import write_json
from lidit_jax.score.load_model import model_folder
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import is_there

RESULTS_FILE = "results.json"
SAVE_EVERY = 10.0  # seconds: what a kill costs at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """What to score, and by what.

    Attributes:
      benchmark: geneval, t2i_compbench, dpg_bench or positional_bias.
      pictures: folder in the layout of the official scorer, as `lidit_jax.evaluate` draws it.
      out: folder for results and report.
      detector, clip, vqa: folders of models as transformers saves them, or their names on the hub.
      file: the benchmark's prompts, for those that need more than the pictures.
      questions: DPG-Bench's.
    """

    benchmark: str
    pictures: epath.Path
    out: epath.Path
    detector: str | None = None
    clip: str | None = None
    vqa: str | None = None
    file: epath.Path | None = None
    questions: epath.Path | None = None

    def require(self, name: str) -> Any:
        """What the flag of this name says. Raises UserError if it was not given."""
        value = getattr(self, name)
        if not value:
            raise UserError(f"--{name} is required for --benchmark={self.benchmark}")
        return value


class ResultsFile:
    """OUT/results.json: what was found in each picture, kept while it grows, so that a rerun goes on.

    Use it as a context manager: on leaving, also by an error or by Ctrl-C, what is there is written.
    """

    def __init__(self, out: epath.Path, facts: Mapping[str, Any]):
        """Args: facts: JSON-able; what the results are of.

        Raises:
          UserError: the folder has something else than results of these facts, or can't be written. Nothing is
            overwritten.
        """
        self._file, self._facts = out / RESULTS_FILE, dict(facts)
        self._results = _claimed(self._file, self._facts)
        self._save()

    def complete(self, names: Sequence[str], score: Callable[[str], Any], unit: str = "picture") -> dict[str, Any]:
        """The results of all `names`, in their order, under a progress bar.

        Args:
          names: of pictures, or whatever the results are of.
          score: name -> its result, JSON-able; called for those alone that have none yet.
          unit: what a name stands for, for the bar.
        """
        left = [name for name in names if name not in self._results]
        # Those of an earlier run count as done, but not for the time that is left.
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
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"facts": self._facts, "results": self._results}, indent=None)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"--out={self._file.parent} can't be written ({reason}); name another") from error
        self._saved = time.monotonic()


def open_results(
    request: ScoreRequest, pictures: Sequence[epath.Path], models: Sequence[str], **more: Any
) -> ResultsFile:
    """The results in `request.out`, of these pictures by these models.

    Args:
      pictures: files in `request.pictures`. Their names and sizes are noted, and what `lidit_jax.evaluate` noted.
      models: "detector", "clip", "vqa": those whose weights make a difference.
      more: JSON-able facts that make one, too.

    Raises:
      UserError: see `ResultsFile`; or a model was not named or is not there.
    """
    facts = {"benchmark": request.benchmark, "pictures": _pictures_digest(request.pictures, pictures)}
    facts |= {name: folder_digest(model_folder(name, request.require(name))) for name in models}
    return ResultsFile(request.out, json.loads(json.dumps(facts | more)))


def _claimed(file: epath.Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The results that are there. Raises UserError if they are of something else."""
    found = read_claim(file.parent, file.name)
    if found is None:
        return {}
    of, results = found.get("facts"), found.get("results")
    if not isinstance(of, dict) or not isinstance(results, dict):
        raise UserError(f"{file} is damaged: name another --out")
    if results:  # a run that ended before its first picture claims nothing
        check_claim(file.parent, "results", of, facts, sorted({*of, *facts}))
    return results


def _pictures_digest(folder: epath.Path, pictures: Sequence[epath.Path]) -> str:
    sha = hashlib.sha256()
    drawn_with = folder / FACTS_FILE
    if drawn_with.exists():
        sha.update(drawn_with.read_bytes())
    for picture in pictures:
        # Not the contents, which would be read twice: no two models' pictures all have the same sizes in bytes.
        sha.update(f"{picture.relative_to(folder)} {picture.stat().length}\n".encode("utf-8", "surrogateescape"))
    return sha.hexdigest()[:16]


def require_pictures_folder(request: ScoreRequest) -> epath.Path:
    """The folder of pictures. Raises UserError if there is none."""
    if not is_there(request.pictures):
        raise UserError(f"--pictures={request.pictures}: no such folder; draw one with python -m lidit_jax.evaluate")
    if not request.pictures.is_dir():
        raise UserError(f"--pictures={request.pictures} is a file: name the folder that was drawn")
    return request.pictures
