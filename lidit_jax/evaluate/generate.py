"""Generates the images of a benchmark in the folder layout of its scorer, and resumes interrupted runs."""

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

from lidit_jax import __version__, trained_model
from lidit_jax.config import read_workdir
from lidit_jax.config_fields import with_defaults
from lidit_jax.errors import UserError, cannot_write
from lidit_jax.evaluate.benchmarks import PROVENANCE_FILE, Benchmark, open_benchmark
from lidit_jax.evaluate.output_folder import check_claim, read_claim
from lidit_jax.evaluate.scene_benchmark import ShapesBenchmark
from lidit_jax.experiment import Experiment
from lidit_jax.files import created_folder, write_json
from lidit_jax.sample.generate import SamplingOptions, warn_of_truncated
from lidit_jax.sample.image_list import png_text
from lidit_jax.trained_model import TrainedModel

logger = logging.getLogger(__name__)

SHAPES = "shapes"
SAMPLING = ("sampler", "steps", "guidance_scale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request(SamplingOptions):
    """Benchmark to generate images for, and the run to sample from.

    Attributes:
      workdir: workdir of a training run.
      benchmark: one of `BENCHMARKS` in `evaluate/benchmarks.py`, or "shapes" for the built-in scenes.
      file: file of the benchmark; None for "shapes".
      out: folder for the images.
      num_images: images per prompt.
      num_scenes: prompts of each kind; "shapes" only.
      mixed_pairs: see `open_benchmark`; "positional_bias" only.
    """

    workdir: epath.Path
    benchmark: str
    file: epath.Path | None
    out: epath.Path
    num_images: int = 4
    num_scenes: int = 256
    mixed_pairs: bool = False

    def open(self) -> Benchmark:
        """Reads the benchmark's prompts.

        Raises:
          UserError: see `open_benchmark`; or an option does not go with the benchmark.
        """
        if self.benchmark != SHAPES:
            if self.file is None:
                raise UserError(f"--file is required for --benchmark={self.benchmark}: name the benchmark's own file")
            return open_benchmark(self.benchmark, self.file, self.num_images, self.mixed_pairs)
        if self.mixed_pairs:
            raise UserError(f"--mixed_pairs goes with --benchmark=positional_bias, not {SHAPES}: leave it out")
        if self.file is not None:
            raise UserError(f"--file={self.file}: --benchmark={SHAPES} is built in; leave --file out")
        data = Experiment(read_workdir(self.workdir), self.workdir, only_shapes=True).data
        height, width = self.height or data.resolution, self.width or data.resolution
        return ShapesBenchmark(self.num_scenes, self.num_images, data.scene_layout, height, width)


def generate_benchmark(request: Request) -> None:
    """Generates the missing images of a benchmark, and scores the built-in scenes.

    All devices of all hosts sample; the first host writes files and scores. The seed of an image is derived from its
    prompt and its number, so every run generates the same image, up to rounding on another number of devices.

    Args:
      request: benchmark, run and sampling options.

    Raises:
      UserError: the request is invalid, which is found before sampling; or the folder has images of another model.
    """
    if request.num_images < 1:
        raise UserError(f"--num_images={request.num_images} must be at least 1")
    read_claim(request.out, PROVENANCE_FILE)  # raises if the folder can't be used, before the model is loaded
    benchmark = request.open()
    experiment = trained_model.open_run(request.workdir, request.encoders, request.vae)
    sampling, height, width = request.resolve_options(experiment)
    model = trained_model.load(request.workdir, request.weights, encoders=request.encoders, vae=request.vae)
    provenance = _provenance(request, benchmark, model) | {"height": height, "width": width}
    provenance |= {name: getattr(sampling, name) for name in SAMPLING}
    _claim(request.out, provenance)
    settings = {"model": str(request.workdir), "version": __version__}
    settings |= {name: provenance[name] for name in ("height", "width", *SAMPLING, "weights", "step")}
    pending = _pending_prompts(request.out, benchmark)
    warn_of_truncated(model, benchmark.prompts)
    logger.info(
        "%s: %d prompts, %d to generate; %d images of %dx%d per prompt, from step %d",
        *(request.benchmark, len(benchmark.prompts), len(pending), request.num_images, width, height, model.step),
    )
    num_images = request.num_images
    rows = model.pipeline.rows(sampling)
    prompts_per_batch = max(1, rows // num_images)
    # A constant batch shape, so that a smaller last batch causes no second compilation.
    sampling = dataclasses.replace(sampling, batch_size=min(rows, prompts_per_batch * num_images))
    with tqdm.tqdm(total=len(pending) * num_images, unit="image", desc="sampling", mininterval=1) as bar:
        for indices in _batches(pending, prompts_per_batch):
            prompts = [benchmark.prompts[index] for index in indices]
            seeds = [seed_of(prompt, i) for prompt in prompts for i in range(num_images)]
            images = model.pipeline(model.params, prompts, seeds, height, width, sampling, num_images)
            if jax.process_index() == 0:
                for row, index in enumerate(indices):
                    own = slice(row * num_images, (row + 1) * num_images)
                    texts = [png_text(prompts[row], seed, settings) for seed in seeds[own]]
                    benchmark.write(request.out, index, images[own], texts)
            bar.update(len(seeds))
    multihost_utils.sync_global_devices("generated the benchmark")
    if isinstance(benchmark, ShapesBenchmark) and jax.process_index() == 0:
        benchmark.judge(request.out)
    logger.info("images: %s", request.out)


def seed_of(prompt: str, index: int) -> int:
    """Returns the seed, 0 to 2^32 - 1, of image number `index` of a prompt."""
    return int.from_bytes(hashlib.sha256(f"{index} {prompt}".encode("utf-8", "surrogatepass")).digest()[:4], "big")


def _provenance(request: Request, benchmark: Benchmark, model: TrainedModel) -> dict[str, Any]:
    """Returns the provenance of the images of a request: benchmark, prompts, model and step."""
    config = json.dumps(with_defaults(read_workdir(request.workdir)), sort_keys=True, default=str)
    prompts = json.dumps(benchmark.prompts)
    return {
        "benchmark": request.benchmark,
        "prompts": _digest(prompts),
        "num_images": request.num_images,
        "config": _digest(config),
        "frozen": model.experiment.frozen_digests(),
        "weights": request.weights,
        "step": model.step,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _claim(out: epath.Path, provenance: dict[str, Any]) -> None:
    """Writes the provenance into the output folder.

    Raises:
      UserError: the folder belongs to another request, or cannot be written. Nothing is overwritten.
    """
    found = read_claim(out, PROVENANCE_FILE)
    if found is not None:
        check_claim(out, "images", found, provenance, provenance)
    multihost_utils.sync_global_devices("checked the folder")
    if jax.process_index() == 0 and found is None:
        try:
            with created_folder(out):
                write_json(out / PROVENANCE_FILE, provenance)
        except OSError as error:
            raise cannot_write(f"--out={out}", error) from error


def _pending_prompts(out: epath.Path, benchmark: Benchmark) -> list[int]:
    """Returns the indices of incomplete prompts.

    The first host decides for all, because all hosts must sample the same batches.
    """
    is_pending = [not (out / benchmark.last_file(index)).exists() for index in range(len(benchmark.prompts))]
    is_pending = multihost_utils.broadcast_one_to_all(np.asarray(is_pending))
    return np.flatnonzero(np.asarray(is_pending)).tolist()


def _batches(indices: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), size):
        yield indices[start : start + size]
