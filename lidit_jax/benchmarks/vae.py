"""Benchmarks the autoencoder against diffusers: `python -m lidit_jax.benchmarks.vae`.

Both libraries load the same folder in diffusers' format: `--weights`, or a random `AutoencoderKL` with the widths of
Stable Diffusion 3's. They encode the same images to the means of their latents and decode the same latents; with
`--tile=256` they decode only, once without tiling and once in tiles of 256 px.
"""

import functools
import tempfile
from collections.abc import Callable

import numpy as np

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags
from lidit_jax.benchmarks.contest import (
    Contestant,
    contest,
    describe_host,
    disable_tf32,
    format_table,
    largest_difference,
)
from lidit_jax.benchmarks.sd3_vae import CONFIG
from lidit_jax.errors import UserError
from lidit_jax.models.vae_config import VAEConfig

_BATCH = shared_flags.define_batch(1, "images per batch")
_SIZE = shared_flags.define_side("size", 256, "side of the images in pixels, a multiple of 8")
_ROUNDS = shared_flags.define_rounds(5)
_DTYPE = shared_flags.define_dtype("float32")
_WEIGHTS = shared_flags.define_weights("folder of an AutoencoderKL; by default random, with the widths of SD 3's")
_TILE = shared_flags.define_side(
    "tile", 0, "compare decoding at once with tiles of so many pixels; 0 compares encoding and decoding", lowest=0
)


def main() -> None:
    from lidit_jax.weights.safetensors_folder import read_config

    print(describe_host("torch", "diffusers"))
    config = VAEConfig.from_dict(read_config(_WEIGHTS.value)) if _WEIGHTS.value else CONFIG
    factor = config.downsampling_factor
    if _SIZE.value % factor:
        larger = -(-_SIZE.value // factor) * factor
        raise UserError(f"--size={_SIZE.value} is not a multiple of {factor}: use {larger}")
    random = np.random.default_rng(0)
    cells = _SIZE.value // factor
    inputs = {
        "encode": random.uniform(-1, 1, (_BATCH.value, _SIZE.value, _SIZE.value, 3)).astype(np.float32),
        "decode": random.normal(size=(_BATCH.value, cells, cells, config.latent_channels)).astype(np.float32),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = _WEIGHTS.value or temporary
        if not _WEIGHTS.value:
            save_model(folder, config)
        for task, prepare_functions in (TILED_CONTESTANTS if _TILE.value else CONTESTANTS).items():
            arguments = folder, task, inputs[task], _DTYPE.value
            contestants = [
                Contestant(name, functools.partial(prepare, *arguments, tile=_TILE.value * in_tiles))
                for name, (prepare, in_tiles) in prepare_functions.items()
            ]
            results = contest(contestants, _ROUNDS.value)
            print(f"{task}, {_BATCH.value} x {_SIZE.value} px, {_DTYPE.value}, median of {_ROUNDS.value} rounds")
            print(format_table(results, _BATCH.value, "images"))
            for result in results[1:]:
                difference = largest_difference([results[0], result])
                print(f"{result.name}: largest difference {difference:.1e} of the largest value")


def save_model(folder: str, config: VAEConfig) -> None:
    """Saves a random VAE in diffusers' format."""
    import diffusers
    import torch

    torch.manual_seed(0)
    blocks = len(config.block_out_channels)
    diffusers.AutoencoderKL(
        block_out_channels=config.block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        use_quant_conv=config.use_quant_conv,
        use_post_quant_conv=config.use_post_quant_conv,
    ).save_pretrained(folder)


def ours(folder: str, task: str, arrays: np.ndarray, dtype: str, tile: int) -> Callable[[], np.ndarray]:
    """Prepares our autoencoder.

    Args:
      folder: of the saved model.
      task: "encode" or "decode".
      arrays: images in [-1, 1] or latents, float32 [B, H, W, C].
      dtype: to compute in.
      tile: side of the tiles in pixels; 0 decodes without tiling.

    Returns:
      Function that returns latents or images, [B, H, W, C].
    """
    import jax
    import jax.numpy as jnp

    from lidit_jax.models.vae import AutoencoderKL
    from lidit_jax.models.vae_tiling import decode_in_tiles
    from lidit_jax.weights.diffusers_vae import load_vae

    config, params = load_vae(folder)
    model = AutoencoderKL(config, jnp.dtype(dtype))
    params = jax.device_put(params)
    tasks = {
        "encode": lambda p, x: model.apply({"params": p}, x, method=AutoencoderKL.encode).mode(),
        "decode": lambda p, z: (
            decode_in_tiles(model, p, z, tile) if tile else model.apply({"params": p}, z, method=AutoencoderKL.decode)
        ),
    }
    apply = jax.jit(tasks[task])
    return lambda: np.asarray(apply(params, arrays))


def diffusers_model(
    folder: str, task: str, arrays: np.ndarray, dtype: str, tile: int, *, compiled: bool = False
) -> Callable[[], np.ndarray]:
    """Prepares diffusers' autoencoder; arguments and result as in `ours`."""
    import diffusers
    import torch

    disable_tf32()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_dtype = getattr(torch, dtype)
    model = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch_dtype, low_cpu_mem_usage=False)
    model = model.to(device).eval()
    if tile:
        model.enable_tiling()
        model.tile_sample_min_size = tile
        model.tile_latent_min_size = tile // 2 ** (len(model.config.block_out_channels) - 1)
    inputs = torch.from_numpy(arrays).permute(0, 3, 1, 2).to(device, torch_dtype)
    tasks = {"encode": lambda x: model.encode(x).latent_dist.mean, "decode": lambda z: model.decode(z).sample}
    apply = torch.compile(tasks[task]) if compiled else tasks[task]

    @torch.inference_mode()
    def work():
        return apply(inputs).permute(0, 2, 3, 1).float().cpu().numpy()

    return work


# Task -> {contestant's name: (function that prepares it, True if it decodes in tiles)}.
CONTESTANTS = dict.fromkeys(
    ("encode", "decode"),
    {
        "lidit_jax": (ours, False),
        "diffusers": (diffusers_model, False),
        "diffusers compiled": (functools.partial(diffusers_model, compiled=True), False),
    },
)
TILED_CONTESTANTS = {
    "decode": {
        "lidit_jax": (ours, False),
        "lidit_jax in tiles": (ours, True),
        "diffusers": (diffusers_model, False),
        "diffusers in tiles": (diffusers_model, True),
    }
}


if __name__ == "__main__":
    cli.run(main)
