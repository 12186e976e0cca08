"""Reading of generated images for scoring."""

import numpy as np
from etils import epath

from lidit_jax.data.formats.decoding import BrokenImage, decode
from lidit_jax.errors import UserError

MAX_PIXELS = 1 << 28  # largest accepted image: a 2x2 grid of 8192 x 8192 pixels each


def read_image(file: epath.Path) -> np.ndarray:
    """Reads an image file.

    Returns:
      uint8 [H, W, 3].

    Raises:
      UserError: the file is missing, damaged or not an image.
    """
    try:
        return decode(file.read_bytes(), MAX_PIXELS)
    except BrokenImage as error:
        raise UserError(f"{file} is damaged ({error}): replace it") from error
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror or error}): replace it") from error
