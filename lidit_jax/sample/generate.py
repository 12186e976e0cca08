"""Implementation of the `sample` command: generates a folder of images from prompts and a workdir."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

import jax
from etils import epath

from lidit_jax import experiment
from lidit_jax.diffusion.samplers import step_table
from lidit_jax.errors import UserError
from lidit_jax.experiment import TrainedModel
from lidit_jax.export.read import load_exported
from lidit_jax.files import read_text, split_lines
from lidit_jax.images import grid, save_png
from lidit_jax.pipeline import SampleConfig
from lidit_jax.text.encoders import truncated_prompts

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Sampling options from the command line; None uses the value of the run's config.

    Attributes:
      height: height of the images in pixels.
      width: width of the images in pixels.
      steps: number of sampling steps.
      guidance_scale: scale of classifier-free guidance.
      sampler: name of the sampler.
      decode_pixels: see `SampleConfig`.
      weights: "ema" for the averaged weights or "params" for the current ones.
      encoders: folders of encoders, by name, that are no longer where the run's config says.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    decode_pixels: int | None = None
    weights: str = "ema"
    encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.weights not in ("ema", "params"):
            raise UserError(f"--weights={self.weights}: use ema or params")

    def resolve_options(self, model: TrainedModel) -> tuple[SampleConfig, int, int]:
        """Resolves the options with the config of the model.

        Args:
          model: the model to sample from.

        Returns:
          The sampling options, and height and width of the images in pixels.

        Raises:
          UserError: the sampler, the number of steps or the size does not go with the model.
        """
        overrides = {name: getattr(self, name) for name in ("sampler", "steps", "guidance_scale", "decode_pixels")}
        sampling = dataclasses.replace(
            model.experiment.sample, **{name: value for name, value in overrides.items() if value is not None}
        )
        # Raises if the sampler and the schedule do not go together.
        step_table(sampling.sampler, model.pipeline.schedule, sampling.steps)
        resolution = model.experiment.data.resolution
        height, width = self.height or resolution, self.width or resolution
        model.pipeline.check_size(height, width)
        return sampling, height, width


@dataclasses.dataclass(frozen=True)
class Request(SamplingOptions):
    """Prompts to sample images for, and the model to sample from: either `workdir` or `from_torch`.

    Attributes:
      workdir: workdir of a training run.
      out: folder for the images.
      from_torch: folder that `export` wrote.
      prompt: a prompt; or give `prompts_file`.
      prompts_file: UTF-8 text file with one prompt per line.
      num_images: images per prompt.
      seed: seed of the first image; further images use consecutive seeds.
    """

    workdir: epath.Path | None
    out: epath.Path
    from_torch: epath.Path | None = None
    prompt: str | None = None
    prompts_file: str | None = None
    num_images: int = 1
    seed: int = 0


def sample_to_folder(request: Request) -> None:
    """Writes out/00000.png, … and out/grid.png, in the order of the prompts, with all images of a prompt together.

    Raises:
      UserError: the request is invalid; raised before any image is sampled or written.
    """
    prompts = read_prompts(request)
    if request.num_images < 1:
        raise UserError(f"--num_images={request.num_images} must be at least 1")
    if not 0 <= request.seed < 2**32:
        raise UserError(f"--seed={request.seed} must be from 0 to {2**32 - 1}")
    if request.out.exists() and not request.out.is_dir():
        raise UserError(f"--out={request.out} is a file: name a folder")

    if (request.workdir is None) == (request.from_torch is None):
        raise UserError("give either --workdir=DIR of a training run or --from_torch=DIR of an export")
    if request.from_torch is not None:
        model, origin = load_exported(request.from_torch), str(request.from_torch)
    else:
        model = experiment.load(request.workdir, request.weights, encoders=request.encoders)
        origin = f"step {model.step}"
    sampling, height, width = request.resolve_options(model)
    warn_of_truncated(model, prompts)

    seeds = [(request.seed + i) % 2**32 for i in range(len(prompts) * request.num_images)]
    logger.info(
        "sampling %d images of %dx%d with %s, %d steps, guidance %g, from %s",
        *(len(seeds), width, height, sampling.sampler, sampling.steps, sampling.guidance_scale, origin),
    )
    images = model(
        prompts,
        seeds,
        height=height,
        width=width,
        images_per_prompt=request.num_images,
        **dataclasses.asdict(sampling),
    )
    if jax.process_index():  # all hosts sample, only the first one writes
        return
    request.out.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        save_png(image, request.out / f"{i:05d}.png")
    captions = [prompt for prompt in prompts for _ in range(request.num_images)]
    save_png(grid(list(images), captions), request.out / "grid.png")
    logger.info("%s", request.out / "grid.png")


def warn_of_truncated(model: TrainedModel, prompts: Sequence[str]) -> None:
    """Logs a warning with the number of truncated prompts for each encoder that has any."""
    for name, count in truncated_prompts(model.pipeline.encoders, prompts).items():
        if count:
            logger.warning(
                "%d of %d prompts are longer than text.max_length=%d tokens for %s: their ends are truncated",
                *(count, len(prompts), model.experiment.text.max_length, name),
            )


def read_prompts(request: Request) -> list[str]:
    """Returns the prompts of a request: `prompt`, or the lines of `prompts_file` that are not blank.

    Raises:
      UserError: neither or both are given, or the file is missing, too large, empty or not UTF-8.
    """
    if (request.prompt is None) == (request.prompts_file is None):
        raise UserError('give either --prompt="…" or --prompts_file=FILE')
    if request.prompt is not None:
        return [request.prompt]
    file = epath.Path(request.prompts_file)
    if not file.exists() or file.is_dir():
        raise UserError(f"--prompts_file={file}: no such file; name a text file of prompts")
    text = read_text(file, f"--prompts_file={file}", "a list of prompts")
    prompts = [line.strip() for line in split_lines(text) if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file={file} has no prompt in it: write one per line")
    return prompts
