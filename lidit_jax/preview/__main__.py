"""Shows training batches.

    python -m lidit_jax.preview --config=configs/emoji.py --config.data.path=FOLDER_OF_TAR_SHARDS --out=sheet.png

Writes a contact sheet of training batches: images after resizing and cropping, the sampled captions, and the bucket
sizes. Logs the fraction of each bucket, the examples left out with the reasons, and the speed of the loader.
"""

from absl import flags
from etils import epath

from lidit_jax import cli

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", None, "PNG file to write")
_NUM_IMAGES = cli.define_num_images(40, "images on the sheet")


def main() -> None:
    from lidit_jax.preview.contact_sheet import draw_contact_sheet

    draw_contact_sheet(cli.read_config(_CONFIG), epath.Path(cli.require(_OUT.name)), _NUM_IMAGES.value)


if __name__ == "__main__":
    cli.run(main)
