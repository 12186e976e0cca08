"""What the scorers of drawn benchmarks share: what is asked, pictures, models of transformers, and results so far.

PyTorch is imported where it is first needed: the rest of this package does without it.
"""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from lidit_jax.data.formats.decoding import BrokenPicture, decode
from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import FACTS_FILE
from lidit_jax.evaluate.claimed_folder import check_claim, read_claim
from lidit_jax.files import write_json
from lidit_jax.weights.digest import folder_digest
from lidit_jax.weights.folders import find_folder, is_there

RESULTS_FILE = "results.json"
MAX_PIXELS = 1 << 28  # of a picture: a grid of four at 8192 x 8192
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


# --- results ----------------------------------------------------------------------------------------------------


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


# --- pictures ---------------------------------------------------------------------------------------------------


def require_pictures_folder(request: ScoreRequest) -> epath.Path:
    """The folder of pictures. Raises UserError if there is none."""
    if not is_there(request.pictures):
        raise UserError(f"--pictures={request.pictures}: no such folder; draw one with python -m lidit_jax.evaluate")
    if not request.pictures.is_dir():
        raise UserError(f"--pictures={request.pictures} is a file: name the folder that was drawn")
    return request.pictures


def read_picture(file: epath.Path) -> np.ndarray:
    """uint8 [H, W, 3].

    Raises:
      UserError: the file is missing, damaged, or no picture.
    """
    try:
        return decode(file.read_bytes(), MAX_PIXELS)
    except BrokenPicture as error:
        raise UserError(f"{file} is damaged ({error}): replace it") from error
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror or error}): replace it") from error


# --- models -----------------------------------------------------------------------------------------------------


@functools.cache
def device() -> Any:
    """The torch.device on which models run: a GPU where there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def model_folder(flag: str, name: str) -> epath.Path:
    """The folder on this machine that `--FLAG=NAME` names.

    Raises:
      UserError: there is none, or no model in it.
    """
    folder = find_folder(name)
    if "://" in str(folder):
        raise UserError(f"--{flag}={name} is in a bucket: copy it to this machine first")
    if not is_there(folder):
        raise UserError(f"--{flag}={name}: no such folder, and no name of the Hugging Face hub (OWNER/NAME)")
    if not (folder / "config.json").exists():
        raise UserError(f"--{flag}={name}: no config.json in it; name a model's folder as transformers saves it")
    return folder


def load_model(class_name: str, flag: str, name: str, **options: Any) -> Any:
    """A PyTorch model of transformers, ready to be asked.

    Args:
      class_name: of transformers, as "CLIPModel" or "AutoModelForObjectDetection".
      flag: which named it.
      name: a folder, or a name of the hub.
      options: of transformers, as dtype="float32"; without, the weights stay as they were saved.

    Raises:
      UserError: there is no such folder, or a model of another kind in it.
    """
    import transformers

    folder = model_folder(flag, name)
    transformers.utils.logging.disable_progress_bar()  # of loading: the one of the pictures is enough
    try:
        model, found = getattr(transformers, class_name).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # of many types: of the config, of the weights, of the class
        raise UserError(f"--{flag}={name} can't be loaded as {class_name} ({_reason(error)})") from error
    # transformers fills what a folder does not have with random numbers, and only warns.
    missing = sorted(found["missing_keys"]) + sorted(str(key) for key in found.get("mismatched_keys", ()))
    if missing:
        raise UserError(f"--{flag}={name} is no {class_name}: {len(missing)} of its weights, as {missing[0]}, lack")
    return model.to(device()).eval()


def load_processor(class_name: str, flag: str, name: str, **options: Any) -> Any:
    """What prepares a model's pictures or texts, as "AutoImageProcessor" or "AutoTokenizer".

    Raises:
      UserError: the folder has none.
    """
    import transformers

    folder = model_folder(flag, name)
    try:
        return getattr(transformers, class_name).from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # of many types, as above
        raise UserError(f"--{flag}={name}: its {class_name} can't be loaded ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
