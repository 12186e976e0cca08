"""Computes FID and CLIP score.

    python -m lidit_jax.fidelity --images=DIR --reference=DIR --inception=FILE.safetensors --clip=DIR --out=OUT

--images is the output folder of `evaluate` or `sample`, or any folder of images. FID compares its images with those
of --reference=DIR or, given --config=configs/X.py, with the training images of that config. --inception is a
safetensors file with the weights of FID's Inception network. The CLIP score needs the prompts: from the folder itself,
which has those of `sample`, or from --prompts_file=FILE. Each score can be computed alone. The scores are written to
fidelity.json in --out.
"""

from typing import TYPE_CHECKING

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.errors import UserError

if TYPE_CHECKING:
    from lidit_jax.fidelity.scores import Reference

CONFIG_REFERENCE = 10_000  # default number of reference images of a config, whose data may be endless

_CONFIG = cli.define_config()
_IMAGES = flags.DEFINE_string("images", None, "folder of the images to score")
_REFERENCE = flags.DEFINE_string("reference", None, "folder of the reference images of FID")
_NUM_REFERENCE = flags.DEFINE_integer(
    "num_reference",
    None,
    f"largest number of reference images (default: all of a folder, {CONFIG_REFERENCE:,} of a config's data)",
    lower_bound=2,
)
_INCEPTION = flags.DEFINE_string("inception", None, "FID's Inception weights, a .safetensors file")
_CLIP = flags.DEFINE_string("clip", None, "a CLIP model's folder, or its name on the hub")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "prompts of the images: --file of evaluate or --prompts_file of sample"
)
_OUT = flags.DEFINE_string("out", None, "output folder for the scores")


def main() -> None:
    from lidit_jax.fidelity.scores import FidelityRequest, score_fidelity
    from lidit_jax.files import check_writable

    images, out = (epath.Path(cli.require(flag.name)) for flag in (_IMAGES, _OUT))
    check_writable(out, f"--out={out}")  # before the data of --config is opened
    score_fidelity(
        FidelityRequest(
            images=images,
            out=out,
            reference=_reference(),
            inception=_path(_INCEPTION),
            clip=_CLIP.value,
            prompts_file=_path(_PROMPTS_FILE),
        )
    )


def _reference() -> "Reference | None":
    from lidit_jax.fidelity.reference import config_reference, folder_reference

    if _REFERENCE.value and _CONFIG.value is not None:
        raise UserError("--reference and --config are both given: FID needs only one of them")
    if _REFERENCE.value:
        return folder_reference(epath.Path(_REFERENCE.value), _NUM_REFERENCE.value)
    if _CONFIG.value is not None:
        return config_reference(cli.read_config(_CONFIG), _CONFIG.value, _NUM_REFERENCE.value or CONFIG_REFERENCE)
    return None


def _path(flag: flags.FlagHolder) -> epath.Path | None:
    return epath.Path(flag.value) if flag.value else None


if __name__ == "__main__":
    cli.run(main)
