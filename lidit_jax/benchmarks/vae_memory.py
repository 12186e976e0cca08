"""Prints the memory to decode a large image, with and without tiling: `python -m lidit_jax.benchmarks.vae_memory`.

Numbers are the temporaries that XLA reports for a compiled program of an `AutoencoderKL` with the widths of Stable
Diffusion 3's. Nothing is run, so an image may be larger than this host could decode.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import flags

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags
from lidit_jax.benchmarks.contest import describe_host
from lidit_jax.benchmarks.sd3_vae import CONFIG
from lidit_jax.benchmarks.shared_flags import MAX_SIDE
from lidit_jax.errors import UserError

if TYPE_CHECKING:
    import jax

_SIZES = flags.DEFINE_list("sizes", ["1024", "2048"], "sides of the images, in pixels")
_TILES = flags.DEFINE_list("tiles", ["256", "512"], "sides of the tiles, in pixels")
_DTYPE = shared_flags.define_dtype("float32")


def main() -> None:
    import jax.numpy as jnp

    from lidit_jax.models.vae import AutoencoderKL
    from lidit_jax.models.vae_tiling import decode_in_tiles

    sizes, tiles = _numbers("sizes", _SIZES.value), _numbers("tiles", _TILES.value)
    model = AutoencoderKL(CONFIG, jnp.dtype(_DTYPE.value))
    decoders = {"at once": lambda p, z: model.apply({"params": p}, z, method=AutoencoderKL.decode)}
    for tile in tiles:
        decoders[f"tiles of {tile}"] = lambda p, z, tile=tile: decode_in_tiles(model, p, z, tile)
    print(f"{describe_host()}; temporary memory in MiB, {_DTYPE.value}")
    print(f"{'':20}" + "".join(f"{f'{size} px':>10}" for size in sizes))
    for name, decode in decoders.items():
        print(f"{name:20}" + "".join(f"{temporary_bytes(decode, size) / 2**20:10.0f}" for size in sizes), flush=True)


def temporary_bytes(decode: "Callable[[dict, jax.Array], jax.Array]", size: int) -> int:
    """Returns the bytes of XLA temporaries for decoding one image of `size` x `size` pixels."""
    import flax
    import jax
    import jax.numpy as jnp

    from lidit_jax.weights.diffusers_vae import parameter_shapes

    shapes = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in parameter_shapes(CONFIG).items()}
    params = flax.traverse_util.unflatten_dict(shapes)
    cells = size // CONFIG.downsampling_factor
    latents = jax.ShapeDtypeStruct((1, cells, cells, CONFIG.latent_channels), jnp.float32)
    return jax.jit(decode).lower(params, latents).compile().memory_analysis().temp_size_in_bytes


def _numbers(name: str, values: list[str]) -> list[int]:
    """Parses the values of the flag `name`.

    Raises:
      UserError: one is not a multiple of the down-sampling factor from 1 to `MAX_SIDE`.
    """
    for value in values:
        is_side = re.fullmatch("[0-9]{1,9}", value) and 0 < int(value) <= MAX_SIDE
        if not is_side or int(value) % CONFIG.downsampling_factor:
            raise UserError(
                f"--{name}={','.join(values):.80}: {value[:20]!r} is not a multiple of {CONFIG.downsampling_factor} "
                f"from {CONFIG.downsampling_factor} to {MAX_SIDE}: give sides in pixels, separated by commas"
            )
    return [int(value) for value in values]


if __name__ == "__main__":
    cli.run(main)
