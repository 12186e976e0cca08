"""Implementation of the `sample` command: generates a folder of images from prompts and a workdir."""

import contextlib
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from lidit_jax import __version__, trained_model
from lidit_jax.diffusion.samplers import step_table
from lidit_jax.errors import UserError
from lidit_jax.experiment import Experiment
from lidit_jax.export.read import load_exported, open_exported
from lidit_jax.files import check_writable, write_json
from lidit_jax.images import grid, save_png
from lidit_jax.pipeline import MAX_GUIDANCE, MAX_SEED, SampleConfig, check_size
from lidit_jax.sample.image_list import IMAGE_NAME, LIST_FILE, png_text, read_list
from lidit_jax.text.encoders import truncated_prompts
from lidit_jax.text.prompts_file import read_prompts
from lidit_jax.trained_model import TrainedModel

logger = logging.getLogger(__name__)

GRID_FILE = "grid.png"


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
      vae: folder of the VAE, if it is no longer where the run's config says.
    """

    height: int | None = None
    width: int | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    sampler: str | None = None
    decode_pixels: int | None = None
    weights: str = "ema"
    encoders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    vae: str | None = None

    def __post_init__(self):
        if self.weights not in ("ema", "params"):
            raise UserError(f"--weights={self.weights}: use ema or params")
        for name in ("height", "width", "steps", "decode_pixels"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)} must be at least 1")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= MAX_GUIDANCE:
            raise UserError(f"--guidance={self.guidance_scale:g} must be from 0 to {MAX_GUIDANCE:g}")

    def resolve_options(self, experiment: Experiment) -> tuple[SampleConfig, int, int]:
        """Resolves the options with the config of the model, which need not be loaded.

        Args:
          experiment: the experiment of the model to sample from.

        Returns:
          The sampling options, and height and width of the images in pixels.

        Raises:
          UserError: the sampler, the number of steps or the size does not go with the model.
        """
        overrides = {name: getattr(self, name) for name in ("sampler", "steps", "guidance_scale", "decode_pixels")}
        sampling = dataclasses.replace(
            experiment.sample, **{name: value for name, value in overrides.items() if value is not None}
        )
        # Raises if the sampler and the schedule do not go together.
        step_table(sampling.sampler, experiment.schedule, sampling.steps)
        resolution = experiment.data.resolution
        height, width = self.height or resolution, self.width or resolution
        check_size(height, width, experiment.size_multiple())
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
      negative_prompt: see `Pipeline`.
      num_images: images per prompt.
      seed: seed of the first image; further images use consecutive seeds.
    """

    workdir: epath.Path | None
    out: epath.Path
    from_torch: epath.Path | None = None
    prompt: str | None = None
    prompts_file: str | None = None
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0


def sample_to_folder(request: Request) -> None:
    """Writes out/00000.png, … and out/grid.png, in the order of the prompts, with all images of a prompt together.

    Each PNG carries its prompt, seed and settings, and out/images.json has those of all. Images of an earlier call in
    the same folder are replaced.

    Raises:
      UserError: the request is invalid; raised before any image is sampled or written.
      OSError: the images can't be written; those of this call are removed.
    """
    prompts = read_prompts(request.prompt, request.prompts_file)
    if request.num_images < 1:
        raise UserError(f"--num_images={request.num_images} must be at least 1")
    count = len(prompts) * request.num_images
    if not 0 <= request.seed <= MAX_SEED - count + 1:
        images = "1 image" if count == 1 else f"{count} images"
        raise UserError(f"--seed={request.seed} must be from 0 to {MAX_SEED - count + 1}, for {images}")
    check_writable(request.out, f"--out={request.out}")
    earlier = earlier_images(request.out)

    if (request.workdir is None) == (request.from_torch is None):
        raise UserError("give either --workdir=DIR of a training run or --from_torch=DIR of an export")
    if request.from_torch is not None:
        if request.weights != "ema" or request.encoders or request.vae:
            raise UserError("--weights, --encoder and --vae go with --workdir: an export has its own weights")
        experiment = open_exported(request.from_torch)
    else:
        experiment = trained_model.open_run(request.workdir, request.encoders, request.vae)
    sampling, height, width = request.resolve_options(experiment)
    if request.negative_prompt and not sampling.is_guided:
        raise UserError("--negative_prompt has no effect without guidance: give --guidance above 1, or leave it out")
    if request.from_torch is not None:
        model, origin = load_exported(request.from_torch), str(request.from_torch)
    else:
        model = trained_model.load(request.workdir, request.weights, encoders=request.encoders, vae=request.vae)
        origin = f"step {model.step}"
    warn_of_truncated(model, [*prompts, *filter(None, [request.negative_prompt])])

    seeds = [request.seed + i for i in range(count)]
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
        negative_prompt=request.negative_prompt,
        **dataclasses.asdict(sampling),
    )
    if jax.process_index():  # all hosts sample, only the first one writes
        return
    settings = {
        "negative_prompt": request.negative_prompt,
        "height": height,
        "width": width,
        "sampler": sampling.sampler,
        "steps": sampling.steps,
        "guidance": sampling.guidance_scale,
        "model": str(request.workdir or request.from_torch),
        "weights": request.weights,
        "origin": origin,
        "version": __version__,
    }
    captions = [prompt for prompt in prompts for _ in range(request.num_images)]
    _write_images(request.out, images, captions, seeds, settings, earlier)
    logger.info("%s", request.out / GRID_FILE)


def earlier_images(out: epath.Path) -> list[str]:
    """Returns the names of the files that an earlier `sample` has written into a folder.

    Raises:
      UserError: the folder has files of these names that no `sample` has listed, or its list is damaged.
    """
    if not out.exists():
        return []
    present = {entry.name for entry in out.iterdir()}
    prompts = read_list(out)
    listed = set() if prompts is None else {*prompts, LIST_FILE, GRID_FILE}
    ours = {name for name in present if IMAGE_NAME.fullmatch(name) or name in (GRID_FILE, LIST_FILE)}
    if ours - listed:
        raise UserError(
            f"--out={out} has images that are not listed in {LIST_FILE}, such as {min(ours - listed)}: name another "
            "folder"
        )
    return sorted(ours)


def _write_images(
    out: epath.Path,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    earlier: Sequence[str],
) -> None:
    """Replaces the files of an earlier call by images, contact sheet and list; leaves none of them if that fails."""
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    if earlier:
        logger.info("replacing the %d files of an earlier sample in %s", len(earlier), out)
    for name in earlier:
        (out / name).unlink(missing_ok=True)
    names = [f"{i:05d}.png" for i in range(len(images))]
    listed = [
        {"file": name, "prompt": caption, "seed": seed}
        for name, caption, seed in zip(names, captions, seeds, strict=True)
    ]
    try:
        for image, entry in zip(images, listed, strict=True):
            save_png(image, out / entry["file"], png_text(entry["prompt"], entry["seed"], settings))
        save_png(grid(list(images), captions), out / GRID_FILE)
        write_json(out / LIST_FILE, {"settings": settings, "images": listed})
    except OSError:
        with contextlib.suppress(OSError):  # the first error is the one to report
            for name in (*names, GRID_FILE):
                (out / name).unlink(missing_ok=True)
            if is_new:
                out.rmdir()
        raise


def warn_of_truncated(model: TrainedModel, prompts: Sequence[str]) -> None:
    """Logs a warning with the number of truncated prompts for each encoder that has any."""
    for name, count in truncated_prompts(model.pipeline.encoders, prompts).items():
        if count:
            logger.warning(
                "%d of %d prompts are longer than text.max_length=%d tokens for %s: their ends are truncated",
                *(count, len(prompts), model.experiment.text.max_length, name),
            )
