"""Draws: `python -m lidit_jax.sample --workdir=DIR --prompt="a red circle left of a blue square" --out=DIR`.

Writes one PNG an image and `grid.png`. The workdir of a training run is all it needs. All devices draw; on a pod, run
it with --distributed on every host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.parallel.hosts import join_hosts
from lidit_jax.sampling import Request, draw_to_folder

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_FROM_TORCH = flags.DEFINE_string("from_torch", None, "or: a folder that `export` wrote")
_DISTRIBUTED = flags.DEFINE_bool("distributed", None, "drawn by several hosts; unset: where the environment names some")
_PROMPT = flags.DEFINE_string("prompt", None, "what to draw")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "or: a UTF-8 text file, one prompt a line")
_OUT = flags.DEFINE_string("out", None, "folder for the pictures")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 1, "pictures a prompt")
_HEIGHT = flags.DEFINE_integer("height", None, "pixels (default: the training resolution)")
_WIDTH = flags.DEFINE_integer("width", None, "pixels (default: the training resolution)")
_STEPS = flags.DEFINE_integer("steps", None, "sampling steps (default: the config's)")
_GUIDANCE = flags.DEFINE_float("guidance", None, "classifier-free guidance scale; 1 is none (default: the config's)")
_SAMPLER = flags.DEFINE_string("sampler", None, "ddpm, ddim, dpmpp_2m; euler, heun (default: the config's)")
_DECODE_PIXELS = flags.DEFINE_integer(
    "decode_pixels", None, "decode larger pictures in tiles, for less memory (default: the config's)"
)
_SEED = flags.DEFINE_integer("seed", 0, "of the first picture; the next ones count up")
_WEIGHTS = flags.DEFINE_string("weights", "ema", "ema, or params for the raw ones")


def main() -> None:
    join_hosts(_DISTRIBUTED.value)
    draw_to_folder(
        Request(
            workdir=_WORKDIR.value and epath.Path(_WORKDIR.value),
            from_torch=_FROM_TORCH.value and epath.Path(_FROM_TORCH.value),
            out=epath.Path(cli.require(_OUT.name)),
            prompt=_PROMPT.value,
            prompts_file=_PROMPTS_FILE.value,
            num_images=_NUM_IMAGES.value,
            height=_HEIGHT.value,
            width=_WIDTH.value,
            steps=_STEPS.value,
            guidance_scale=_GUIDANCE.value,
            sampler=_SAMPLER.value,
            decode_pixels=_DECODE_PIXELS.value,
            seed=_SEED.value,
            weights=_WEIGHTS.value,
        )
    )


if __name__ == "__main__":
    cli.run(main)
