"""Finds generated images and their prompts in folders of `lidit_jax.evaluate`, `lidit_jax.sample` and other programs.

geneval, t2i_compbench    prompts are stored in the folder itself, whichever program generated the images
dpg_bench, prompts        output of `lidit_jax.evaluate`; prompts come from the prompts file
sample                    00000.png, …; prompts come from its images.json or, if given, from the prompts file
anything else             PNG, JPEG or WebP files at any depth, without prompts
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath

from lidit_jax.data.formats.files import is_remote
from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import PROVENANCE_FILE, cut, open_benchmark
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.files import is_hidden, read_json, walk
from lidit_jax.sample.image_list import IMAGE_NAME, LIST_FILE, read_list
from lidit_jax.weights.folders import is_there

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """File of one generated image, or of a 2x2 grid of four.

    Attributes:
      file: the file.
      prompt: the prompt; None if unknown.
      num_images: number of images in the file, 1 or 4.
    """

    file: epath.Path
    prompt: str | None = None
    num_images: int = 1

    def read(self) -> Iterator[np.ndarray]:
        """Yields the images of the file, uint8 [H, W, 3] each.

        Raises:
          UserError: the file is damaged, or cannot be split into four images.
        """
        yield from cut(read_image(self.file), self.num_images, self.file)


def image_files(folder: epath.Path, flag: str) -> list[epath.Path]:
    """Lists all image files in a folder, at any depth, in the order of their names.

    Args:
      folder: the folder.
      flag: name of the flag that gave the folder, for error messages.

    Raises:
      UserError: the folder does not exist or contains no image.
    """
    if not is_there(folder) or not folder.is_dir():
        raise UserError(f"--{flag}={folder}: no such folder; name a folder of images")
    paths = [parent_folder / name for parent_folder, _, names in _walk(folder) for name in names]
    files = [file for file in paths if file.suffix.lower() in SUFFIXES]
    if not files:
        raise UserError(f"--{flag}={folder} has no image in it ({', '.join(SUFFIXES)}): name a folder of images")
    return sorted(files, key=str)


def _walk(folder: epath.Path) -> Iterator[tuple[epath.Path, list[str], list[str]]]:
    """Walks through a folder on a disk or in a bucket, without hidden entries; see `files.walk`."""
    if not is_remote(os.fspath(folder)):
        yield from ((epath.Path(parent), folders, names) for parent, folders, names in walk(os.fspath(folder)))
        return
    for parent, folders, names in folder.walk():
        if not any(map(is_hidden, parent.relative_to(folder).parts)):
            yield parent, folders, [name for name in names if not is_hidden(name)]


def find_images_and_prompts(folder: epath.Path, prompts_file: epath.Path | None) -> list[ImageFile]:
    """Lists the generated images of a folder with their prompts.

    Args:
      folder: the folder.
      prompts_file: file of the prompts, for folders that do not store them.

    Raises:
      UserError: the folder has no image, images of some prompts are missing, the number of images is not a multiple of
        the number of prompts, or a metadata file is damaged.
    """
    files = image_files(folder, "images")
    benchmark, num_images = _read_provenance(folder)
    if benchmark in ("geneval", "positional_bias", "t2i_compbench"):
        files = [file for file in files if file.parent.name == "samples"]
        if not files:
            raise UserError(
                f"--images={folder} has no image in a folder `samples`, where {benchmark} expects them: name the "
                "output folder of python -m lidit_jax.evaluate"
            )
        prompt_of = _prompt_from_name if benchmark == "t2i_compbench" else _prompt_from_metadata
        return [ImageFile(file, prompt_of(file)) for file in files]
    if benchmark == "dpg_bench" and prompts_file is None:
        return [ImageFile(file, num_images=num_images) for file in files]
    if benchmark == "dpg_bench":
        dpg_bench = open_benchmark(benchmark, prompts_file, num_images)
        names = [(dpg_bench.last_file(i), prompt) for i, prompt in enumerate(dpg_bench.prompts)]
        return [ImageFile(file, prompt, num_images) for file, prompt in _require_files(folder, names)]
    if benchmark == "prompts" and prompts_file is not None:
        prompts = open_benchmark(benchmark, prompts_file, num_images).prompts
        names = [(f"{i:05}_{j}.png", prompt) for i, prompt in enumerate(prompts) for j in range(num_images)]
        return [ImageFile(file, prompt) for file, prompt in _require_files(folder, names)]
    sampled = [file for file in files if IMAGE_NAME.fullmatch(file.name)]  # excludes `sample`'s grid.png
    if sampled and prompts_file is not None:
        return _assign_prompts(folder, sampled, prompts_file)
    if (listed := read_list(folder)) is not None:
        return _listed_images(folder, sampled, listed)
    return [ImageFile(file) for file in sampled or files]


def _listed_images(folder: epath.Path, sampled: list[epath.Path], listed: Mapping[str, str]) -> list[ImageFile]:
    """Returns the images of `sample`'s list with their prompts.

    Raises:
      UserError: an image is missing, or is not in the list.
    """
    files = _require_files(folder, list(listed.items()), "name the folder that `sample` wrote, or sample again")
    if unlisted := {str(file.relative_to(folder)) for file in sampled} - listed.keys():
        raise UserError(
            f"--images={folder}: {len(unlisted)} images are not listed in {LIST_FILE}, such as {min(unlisted)}: remove "
            f"them, or remove {LIST_FILE}"
        )
    return [ImageFile(file, prompt) for file, prompt in files]


def _read_provenance(folder: epath.Path) -> tuple[str, int]:
    """Returns (benchmark, images per prompt) as `lidit_jax.evaluate` or the folder's layout says, else ("", 1)."""
    file = folder / PROVENANCE_FILE
    if not file.exists():
        if any(folder.glob("*/metadata.jsonl")):
            return "geneval", 1
        return ("t2i_compbench", 1) if any(folder.glob(f"samples/*_{'[0-9]' * 6}.png")) else ("", 1)
    try:
        provenance = read_json(file)
        return str(provenance["benchmark"]), int(provenance["num_images"])
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{file} is damaged: generate the benchmark again") from None


def _assign_prompts(folder: epath.Path, files: list[epath.Path], prompts_file: epath.Path) -> list[ImageFile]:
    """Assigns prompts to the images of `sample`, which has equally many consecutive images per prompt."""
    prompts = open_benchmark("prompts", prompts_file, 1).prompts
    if len(files) % len(prompts):
        raise UserError(
            f"--images={folder} has {len(files)} images, which is not a multiple of the {len(prompts)} prompts in "
            f"{prompts_file}: name the file that they were generated from"
        )
    per_prompt = len(files) // len(prompts)
    return [ImageFile(file, prompts[i // per_prompt]) for i, file in enumerate(files)]


def _prompt_from_name(file: epath.Path) -> str:
    """Returns the prompt in the name of a T2I-CompBench image, PROMPT_000000.png."""
    return file.stem.rpartition("_")[0]


def _prompt_from_metadata(file: epath.Path) -> str:
    """Returns the prompt from metadata.jsonl, which lies beside the folder `samples` with the prompt's images."""
    metadata = file.parent.parent / "metadata.jsonl"
    try:
        return str(read_json(metadata)["prompt"])
    except FileNotFoundError:
        raise UserError(f"{metadata} is missing: generate the rest with python -m lidit_jax.evaluate") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{metadata} is damaged: generate the images of the prompt again") from None


def _require_files(
    folder: epath.Path,
    names: list[tuple[str, str]],
    advice: str = "name the prompts file that was used, or generate the rest with python -m lidit_jax.evaluate",
) -> list[tuple[epath.Path, str]]:
    """Returns the files of (name, prompt) pairs.

    Raises:
      UserError: a file is missing; the score of a subset of the prompts would not be comparable.
    """
    missing = [name for name, _ in names if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"--images={folder}: {len(missing)} of {len(names)} files are missing, such as {missing[0]}: {advice}"
        )
    return [(folder / name, prompt) for name, prompt in names]
