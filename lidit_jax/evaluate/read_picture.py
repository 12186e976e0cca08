"""Generated images as they are read to be scored."""

import numpy as np
from etils import epath

from lidit_jax.data.formats.decoding import BrokenPicture, decode
from lidit_jax.errors import UserError

MAX_PIXELS = 1 << 28  # of a picture: a grid of four at 8192 x 8192


def read_picture(file: epath.Path) -> np.ndarray:
    """uint8 [H, W, 3].

    Raises:
      UserError: the file is missing, damaged, or no picture.
    """
    try:
        return decode(file.read_bytes(), MAX_PIXELS)
    except BrokenPicture as error:
        raise UserError(f"{file} is damaged ({error}): replace it") from error
    except OSError as error:
        raise UserError(f"{file} can't be read ({error.strerror or error}): replace it") from error
