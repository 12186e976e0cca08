"""Prompts of public benchmarks, and the folder layouts in which their official scorers expect the images.

    geneval          evaluation_metadata.jsonl; 00000/metadata.jsonl, 00000/samples/0000.png   (Ghosh et al. 2023)
    t2i_compbench    file of prompts, one per line; samples/PROMPT_000000.png                   (Huang et al. 2023)
    dpg_bench        folder of ID.txt, or JSONL of id and prompt; ID.png, a grid of four        (Hu et al. 2024)
    positional_bias  folder of T2I-CompBench's lists, or file of prompts of adjective-noun pairs, one per line; output
                     as for geneval, see `positional_bias.py`                                   (Ma et al. 2024)
    prompts          file of prompts, one per line; 00000_0.png

The files of a prompt are written in a fixed order, so its last file marks the prompt as complete.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.evaluate.attributes import KINDS
from lidit_jax.evaluate.positional_bias import PositionalBias, parse_prompt
from lidit_jax.files import is_hidden, read_text, split_lines, write_json
from lidit_jax.images import save_png

MAX_NAME = 255  # longest file name in bytes
PROVENANCE_FILE = "drawn_with.json"  # beside the images: the model and settings that generated them

Texts = Sequence[Mapping[str, str]]  # of the PNG files of a prompt, see `png_text`


class Benchmark(Protocol):
    """Prompts of a benchmark and the layout of its output folder.

    Attributes:
      prompts: prompts in the benchmark's order.
    """

    prompts: Sequence[str]

    def last_file(self, index: int) -> str:
        """Returns the file written last for prompt `index`, relative to the folder; it marks the prompt as complete."""

    def write(self, out: epath.Path, index: int, images: Sequence[np.ndarray], texts: Texts) -> None:
        """Writes all images of a prompt.

        Args:
          out: output folder.
          index: index of the prompt.
          images: uint8 [H, W, 3] each.
          texts: texts of each PNG file by keyword, see `png_text`.
        """


class GenEval:
    """GenEval: a folder per prompt with its metadata and its images."""

    def __init__(self, file: epath.Path, num_images: int):
        del num_images
        self._metadata = [_geneval_entry(file, number, line) for number, line in _lines(file)]
        self.prompts = [entry["prompt"] for entry in self._metadata]

    def last_file(self, index: int) -> str:
        return f"{index:05}/metadata.jsonl"

    def write(self, out: epath.Path, index: int, images: Sequence[np.ndarray], texts: Texts) -> None:
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            save_png(image, out / f"{index:05}" / "samples" / f"{i:04}.png", text)
        write_json(out / self.last_file(index), self._metadata[index], indent=None)


class T2ICompBench:
    """T2I-CompBench: one folder of images, named after their prompt and a number that counts all images."""

    def __init__(self, file: epath.Path, num_images: int):
        self._num_images = num_images
        # Some of the benchmark's files have further columns after the prompt.
        self.prompts = [line.split("\t")[0].strip() for _, line in _lines(file)]
        for prompt in self.prompts:
            # The official scorer reads the text before the first underscore of a file name as the prompt.
            if re.search(r"[/\\_\x00]", prompt) or len(self._name(prompt, 0).encode()) > MAX_NAME:
                raise UserError(
                    f"{file}: prompt {prompt!r:.80} cannot be part of a file name, as T2I-CompBench requires: remove "
                    f"/, \\ and _, and keep the name under {MAX_NAME} bytes"
                )

    def last_file(self, index: int) -> str:
        return self._name(self.prompts[index], self._num_images * (index + 1) - 1)

    def write(self, out: epath.Path, index: int, images: Sequence[np.ndarray], texts: Texts) -> None:
        for i, (image, text) in enumerate(zip(images, texts, strict=True)):
            save_png(image, out / self._name(self.prompts[index], self._num_images * index + i), text)

    @staticmethod
    def _name(prompt: str, number: int) -> str:
        return f"samples/{prompt}_{number:06}.png"


class DPGBench:
    """DPG-Bench: per prompt, a 2x2 grid of four images without gaps, or a single image."""

    def __init__(self, file: epath.Path, num_images: int):
        if num_images not in (1, 4):
            raise UserError(f"--num_images={num_images}: dpg_bench writes grids of 4 images, or 1 image; use 4 or 1")
        entries = (
            _read_prompt_folder(file)
            if file.is_dir()
            else [_dpg_entry(file, number, line) for number, line in _lines(file)]
        )
        self._ids, self.prompts = [name for name, _ in entries], [prompt for _, prompt in entries]
        if len(set(self._ids)) < len(self._ids):
            raise UserError(f"{file}: two prompts have the same id; use the benchmark's own file")

    def last_file(self, index: int) -> str:
        return f"{self._ids[index]}.png"

    def write(self, out: epath.Path, index: int, images: Sequence[np.ndarray], texts: Texts) -> None:
        sheet = images[0]
        if len(images) == 4:
            sheet = np.concatenate([np.concatenate(images[i : i + 2], axis=1) for i in (0, 2)], axis=0)
        seeds = " ".join(text["seed"] for text in texts)
        save_png(sheet, out / self.last_file(index), texts[0] | {"seed": seeds})


def cut(sheet: np.ndarray, num_images: int, file: epath.Path) -> list[np.ndarray]:
    """Splits a 2x2 grid into its four images, row by row; returns a single image unchanged.

    Args:
      sheet: uint8 [2 H, 2 W, 3] if `num_images` is 4, else [H, W, 3].
      num_images: number of images, 1 or 4.
      file: file of the grid, named in the error message.

    Returns:
      uint8 [H, W, 3] each.

    Raises:
      UserError: a side of the grid has an odd length.
    """
    if num_images == 1:
        return [sheet]
    height, width = sheet.shape[:2]
    if height % 2 or width % 2:
        raise UserError(
            f"{file} is {width}x{height} px, which does not split into a 2x2 grid of equal images: name the output "
            "folder of DPG-Bench"
        )
    return [half for row in np.split(sheet, 2, axis=0) for half in np.split(row, 2, axis=1)]


class PlainPrompts:
    """List of prompts; images are named by the number of their prompt and their number within it."""

    def __init__(self, prompts: Sequence[str], num_images: int):
        self.prompts, self._num_images = prompts, num_images

    def files(self, index: int) -> list[str]:
        """Returns the names of a prompt's images."""
        return [f"{index:05}_{i}.png" for i in range(self._num_images)]

    def last_file(self, index: int) -> str:
        return self.files(index)[-1]

    def write(self, out: epath.Path, index: int, images: Sequence[np.ndarray], texts: Texts) -> None:
        for name, image, text in zip(self.files(index), images, texts, strict=True):
            save_png(image, out / name, text)


def _plain_prompts(file: epath.Path, num_images: int) -> PlainPrompts:
    return PlainPrompts([line.strip() for _, line in _lines(file)], num_images)


def _positional_bias(path: epath.Path, num_images: int, mixed_pairs: bool = False) -> PositionalBias:
    del num_images
    if not path.is_dir():
        if mixed_pairs:
            raise UserError(f"--file={path} is a file: --mixed_pairs needs the folder of T2I-CompBench's lists")
        prompts, pairs = [], []
        for number, line in _lines(path):
            try:
                pairs.append(parse_prompt(line))
            except ValueError as error:
                raise UserError(
                    f"{path}, line {number}: {error}; write prompts as 'A green bench and a red car.', or name the "
                    "folder of T2I-CompBench's lists, examples/dataset"
                ) from None
            prompts.append(line.strip())
        return PositionalBias(prompts, pairs)
    files = {kind: path / f"{kind}_val.txt" for kind in KINDS}
    for file in files.values():
        if not file.is_file():
            raise UserError(f"--file={path} has no {file.name}: name the folder of T2I-CompBench's lists")
    lists = {kind: [line for _, line in _lines(file)] for kind, file in files.items()}
    return PositionalBias.from_lists(lists, mixed_pairs)


BENCHMARKS: Mapping[str, Callable[..., Benchmark]] = {
    "geneval": GenEval,
    "t2i_compbench": T2ICompBench,
    "dpg_bench": DPGBench,
    "positional_bias": _positional_bias,
    "prompts": _plain_prompts,
}


def open_benchmark(name: str, file: epath.Path, num_images: int, mixed_pairs: bool = False) -> Benchmark:
    """Reads a benchmark's prompts.

    Args:
      name: one of `BENCHMARKS`.
      file: the benchmark's file or folder of prompts.
      num_images: images per prompt.
      mixed_pairs: whether prompts have one to eight pairs of mixed kinds instead of four of one kind;
        "positional_bias" only.

    Raises:
      UserError: the benchmark is unknown, or the file is missing or not of this benchmark's format.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark={name}: use one of {', '.join(BENCHMARKS)} or shapes")
    if not file.exists():
        raise UserError(f"--file={file}: no such file; name the benchmark's own file")
    if file.is_dir() and name not in ("dpg_bench", "positional_bias"):
        raise UserError(f"--file={file} is a folder: name a file")
    if mixed_pairs and name != "positional_bias":
        raise UserError(f"--mixed_pairs goes with --benchmark=positional_bias, not {name}: leave it out")
    benchmark = BENCHMARKS[name](file, num_images, **({"mixed_pairs": True} if mixed_pairs else {}))
    if not benchmark.prompts:
        raise UserError(f"--file={file} has no prompt in it: name the benchmark's own file")
    return benchmark


def _lines(file: epath.Path) -> list[tuple[int, str]]:
    """Returns (line number from 1, line) for all lines that are not blank."""
    return [(number, line) for number, line in enumerate(split_lines(_read(file)), 1) if line.strip()]


def _read(file: epath.Path) -> str:
    return read_text(file, str(file), "a benchmark's")


def _parse_json_line(file: epath.Path, number: int, line: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """Parses a line of JSON and checks its keys.

    Args:
      file: file of the line, for error messages.
      number: line number, for error messages.
      line: the text.
      keys: required keys and the types of their values.

    Raises:
      UserError: the line is not JSON, or a key is missing or has a value of another type.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{file}, line {number}: not JSON; use the benchmark's own file") from None
    for key, kind in keys.items():
        if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
            raise UserError(f"{file}, line {number}: no {key!r} of type {kind.__name__}; use the benchmark's own file")
    return entry


def _geneval_entry(file: epath.Path, number: int, line: str) -> dict[str, Any]:
    return _parse_json_line(file, number, line, {"prompt": str, "tag": str, "include": list})


def _dpg_entry(file: epath.Path, number: int, line: str) -> tuple[str, str]:
    entry = _parse_json_line(file, number, line, {"id": str, "prompt": str})
    if not re.fullmatch(r"[\w-]{1,200}", entry["id"]):
        raise UserError(
            f"{file}, line {number}: id {entry['id']!r:.80} cannot be the name of an image: use up to 200 letters, "
            "digits, _ and -"
        )
    return entry["id"], entry["prompt"]


def _read_prompt_folder(folder: epath.Path) -> list[tuple[str, str]]:
    """Returns (id, prompt) for each file ID.txt of a folder."""
    files = sorted((file for file in folder.glob("*.txt") if not is_hidden(file.name)), key=str)
    return [(file.stem, _read(file).strip()) for file in files]
