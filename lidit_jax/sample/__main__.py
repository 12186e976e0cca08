"""Samples images from prompts.

    python -m lidit_jax.sample --workdir=runs/shapes --prompt="a red circle left of a blue square" --out=out

Writes a PNG per image, which carries its prompt, seed and settings, images.json with the same, and `grid.png`; replaces
the images of an earlier command. Needs only the workdir of a training run. All devices are used; on a pod, run the
command with --distributed on every host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli

_WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a training run")
_FROM_TORCH = flags.DEFINE_string("from_torch", None, "folder that `export` wrote, in place of --workdir")
_DISTRIBUTED = cli.define_distributed()
_PROMPT = flags.DEFINE_string("prompt", None, "prompt to generate images for")
_NEGATIVE_PROMPT = flags.DEFINE_string("negative_prompt", "", "what guidance steers away from")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "UTF-8 text file, one prompt per line, in place of --prompt")
_OUT = flags.DEFINE_string("out", None, "output folder for the images")
_NUM_IMAGES = cli.define_num_images(1, "images per prompt")
_SEED = flags.DEFINE_integer("seed", 0, "seed of the first image; further images use consecutive seeds", lower_bound=0)
_MOVED = cli.define_moved_weights()
_SAMPLING = cli.define_sampling()


def main() -> None:
    from lidit_jax.parallel.hosts import join_hosts
    from lidit_jax.sample.generate import Request, sample_to_folder

    join_hosts(_DISTRIBUTED.value)
    sample_to_folder(
        Request(
            workdir=_WORKDIR.value and epath.Path(_WORKDIR.value),
            from_torch=_FROM_TORCH.value and epath.Path(_FROM_TORCH.value),
            out=epath.Path(cli.require(_OUT.name)),
            prompt=_PROMPT.value,
            negative_prompt=_NEGATIVE_PROMPT.value,
            prompts_file=_PROMPTS_FILE.value,
            num_images=_NUM_IMAGES.value,
            seed=_SEED.value,
            **_MOVED(),
            **_SAMPLING(),
        )
    )


if __name__ == "__main__":
    cli.run(main)
