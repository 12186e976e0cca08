"""Draws a benchmark's prompts into the folder that its scorer reads; goes on where it was stopped."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from lidit_jax import experiment
from lidit_jax.config import read_workdir
from lidit_jax.errors import UserError
from lidit_jax.evaluate.benchmarks import FACTS_FILE, Benchmark, open_benchmark
from lidit_jax.evaluate.claimed_folder import check_claim, read_claim
from lidit_jax.evaluate.scene_benchmark import ShapesBenchmark
from lidit_jax.experiment import Experiment
from lidit_jax.files import write_json
from lidit_jax.sample.draw import Drawing, warn_of_truncated

logger = logging.getLogger(__name__)

SHAPES = "shapes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(Drawing):
    """What to draw.

    Attributes:
      workdir: of a run.
      benchmark, file: see `evaluate/benchmarks.py`; "shapes", the built-in scenes, has no file.
      out: folder for the pictures.
      num_images: pictures a prompt.
      num_scenes: of "shapes", prompts of each kind.
      mixed_pairs: of "positional_bias", see `open_benchmark`.
    """

    workdir: epath.Path
    benchmark: str
    file: epath.Path | None
    out: epath.Path
    num_images: int = 4
    num_scenes: int = 256
    mixed_pairs: bool = False

    def open(self) -> Benchmark:
        """Raises UserError, see `open_benchmark`."""
        if self.benchmark != SHAPES:
            if self.file is None:
                raise UserError(f"--file is required for --benchmark={self.benchmark}: name the benchmark's own")
            return open_benchmark(self.benchmark, self.file, self.num_images, self.mixed_pairs)
        if self.mixed_pairs:
            raise UserError(f"--mixed_pairs goes with --benchmark=positional_bias, not {SHAPES}")
        if self.file is not None:
            raise UserError(f"--file={self.file}: --benchmark={SHAPES} is built in; leave --file out")
        data = Experiment(read_workdir(self.workdir), self.workdir, only_shapes=True).data
        height, width = self.height or data.resolution, self.width or data.resolution
        return ShapesBenchmark(self.num_scenes, self.num_images, data.scene_layout, height, width)


def draw_benchmark(request: Request) -> None:
    """Draws what is not there yet. All devices of all hosts draw; the first host writes, and judges built-in scenes.

    A picture's seed is made of its prompt and its number, so that it is the same in every run; on another number of
    devices it may differ by rounding.

    Raises:
      UserError: for what does not fit, before anything is drawn; or the folder has pictures of another model.
    """
    if request.num_images < 1:
        raise UserError(f"--num_images={request.num_images} must be at least 1")
    benchmark = request.open()
    run, pipeline, params, step = experiment.load(request.workdir, request.weights, jax.devices())
    how, height, width = request.settled(run, pipeline)
    facts = _facts(request, benchmark, run, step) | {"height": height, "width": width}
    facts |= {name: getattr(how, name) for name in ("sampler", "steps", "guidance_scale")}
    _claim(request.out, facts)
    left = _left(request.out, benchmark)
    warn_of_truncated(run, pipeline, benchmark.prompts)
    logger.info(
        "%s: %d prompts, %d left; %d pictures of %dx%d each, from step %d",
        *(request.benchmark, len(benchmark.prompts), len(left), request.num_images, width, height, step),
    )
    num_images = request.num_images
    rows = pipeline.rows(how)
    at_once = max(1, rows // num_images)
    # One shape and so one compilation, however many are drawn last.
    how = dataclasses.replace(how, batch_size=min(rows, at_once * num_images))
    with tqdm.tqdm(total=len(left) * num_images, unit="picture", desc="drawing", mininterval=1) as bar:
        for indices in _batches(left, at_once):
            prompts = [benchmark.prompts[index] for index in indices]
            seeds = [seed_of(prompt, i) for prompt in prompts for i in range(num_images)]
            pictures = pipeline(params, prompts, seeds, height, width, how, num_images)
            if jax.process_index() == 0:
                for row, index in enumerate(indices):
                    benchmark.write(request.out, index, pictures[row * num_images : (row + 1) * num_images])
            bar.update(len(seeds))
    multihost_utils.sync_global_devices("drew the benchmark")
    if isinstance(benchmark, ShapesBenchmark) and jax.process_index() == 0:
        benchmark.judge(request.out)
    logger.info("%s", request.out)


def seed_of(prompt: str, index: int) -> int:
    """Of a prompt's picture `index`, from 0 to 2^32 - 1."""
    return int.from_bytes(hashlib.sha256(f"{index} {prompt}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def _facts(request: Request, benchmark: Benchmark, run: Experiment, step: int) -> dict[str, Any]:
    """What the pictures in a folder are of."""
    config = json.dumps(read_workdir(request.workdir).to_dict(), sort_keys=True, default=str)
    prompts = json.dumps(benchmark.prompts)
    return {
        "benchmark": request.benchmark,
        "prompts": _digest(prompts),
        "num_images": request.num_images,
        "config": _digest(config),
        "frozen": run.frozen_digests(),
        "weights": request.weights,
        "step": step,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _claim(out: epath.Path, facts: dict[str, Any]) -> None:
    """Notes in the folder what it holds. Raises UserError if it holds something else; nothing is overwritten."""
    found = read_claim(out, FACTS_FILE)
    if found is not None:
        check_claim(out, "pictures", found, facts, facts)
    multihost_utils.sync_global_devices("looked at the folder")
    if jax.process_index() == 0 and found is None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / FACTS_FILE, facts)
        except OSError as error:
            raise UserError(f"--out={out} can't be written ({error.strerror or error}); name another") from error


def _left(out: epath.Path, benchmark: Benchmark) -> list[int]:
    """Prompts that are not drawn yet, as the first host sees it: all must draw the same."""
    is_left = [not (out / benchmark.last_file(index)).exists() for index in range(len(benchmark.prompts))]
    is_left = multihost_utils.broadcast_one_to_all(np.asarray(is_left))
    return np.flatnonzero(np.asarray(is_left)).tolist()


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
