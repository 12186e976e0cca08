"""Compares the images of an export with those of its run.

    python -m lidit_jax.benchmarks.export_parity --workdir=RUN --folder=DIR --out=sheet.png

JAX (from the workdir) and PyTorch (from the folder that `python -m lidit_jax.export` wrote) generate images for the
same prompts from the same noise. Prints the difference between the images, and the time of each after compilation.
The sheet shows PyTorch's images above JAX's.
"""

import time

import numpy as np
from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.benchmarks.contest import describe_host
from lidit_jax.errors import UserError

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_FOLDER = flags.DEFINE_string("folder", None, "folder of its export, in float32")
_OUT = flags.DEFINE_string("out", None, "file for the sheet, a .png")
_PROMPTS = flags.DEFINE_multi_string(
    "prompt", ["a red circle above a blue star", "绿三角在黄方块左边"], "a prompt; can be repeated"
)
_NUM_IMAGES = cli.define_num_images(4, "images per prompt")


def main() -> None:
    import jax

    from lidit_jax import trained_model
    from lidit_jax.diffusion.samplers import initial_noise
    from lidit_jax.export.read import is_exported
    from lidit_jax.files import check_writable
    from lidit_jax.images import grid, save_png

    workdir, folder, out = (cli.require(flag.name) for flag in (_WORKDIR, _FOLDER, _OUT))
    if not out.endswith(".png"):
        raise UserError(f"--out={out} does not end in .png: name a .png file")
    check_writable(epath.Path(out).parent, f"--out={out}")
    if not is_exported(epath.Path(folder)):
        raise UserError(f"--folder={folder} is not an export: name what python -m lidit_jax.export wrote")
    print(describe_host("torch", "diffusers"))
    model = trained_model.load(workdir, devices=jax.devices()[:1])
    run, pipeline = model.experiment, model.pipeline
    prompts = [prompt for prompt in _PROMPTS.value for _ in range(_NUM_IMAGES.value)]
    seeds, side = np.arange(len(prompts), dtype=np.uint32), run.data.resolution

    def generate_in_jax() -> np.ndarray:
        return pipeline(model.params, prompts, seeds, side, side, run.sample)

    cells = side // pipeline.vae.config.downsampling_factor
    noise = initial_noise(jax.vmap(jax.random.key)(seeds), (cells, cells, pipeline.vae.config.latent_channels))
    torch_pipeline = _load_torch_pipeline(folder)

    def generate_in_pytorch() -> np.ndarray:
        import torch

        latents = torch.from_numpy(np.asarray(noise).transpose(0, 3, 1, 2).copy())
        pixels = torch_pipeline(prompts, latents=latents, output_type="np").images
        return np.round(pixels * 255).astype(np.uint8)

    images, seconds = {}, {}
    for name, generate in (("PyTorch", generate_in_pytorch), ("JAX", generate_in_jax)):
        generate()  # compiles
        started = time.monotonic()
        images[name] = generate()
        seconds[name] = time.monotonic() - started
    difference = np.abs(images["JAX"].astype(np.int32) - images["PyTorch"])
    error = np.mean(np.square(difference / 255.0), axis=(1, 2, 3))
    psnr = -10 * np.log10(np.maximum(error, 1e-12))
    print(f"{len(prompts)} images of {side} px, {run.sample.sampler}, {run.sample.steps} steps")
    print(", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()))
    print(f"lowest PSNR {psnr.min():.1f} dB, largest difference {difference.max()} of 255")
    sheet = grid([*images["PyTorch"], *images["JAX"]], [*prompts, *prompts], columns=len(prompts))
    save_png(sheet, epath.Path(out))


def _load_torch_pipeline(folder: str):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    cli.run(main)
