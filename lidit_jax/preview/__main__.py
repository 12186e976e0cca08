"""What the model will see: `python -m lidit_jax.preview --config=configs/emoji.py --out=sheet.png`.

A contact sheet of training batches (pictures after resize and crop, captions as drawn, group sizes), and on the log
each group's share, what was left out and why, and the loader's speed.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.preview.contact_sheet import draw_contact_sheet

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", None, "PNG to write")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 40, "pictures on the sheet")


def main() -> None:
    draw_contact_sheet(cli.read_config(_CONFIG), epath.Path(cli.require(_OUT.name)), _NUM_IMAGES.value)


if __name__ == "__main__":
    cli.run(main)
