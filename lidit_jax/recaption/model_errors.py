"""Errors of PyTorch models in one line."""

import contextlib
from collections.abc import Iterator

from lidit_jax.errors import UserError


class OutOfMemory(UserError):
    """A batch that does not fit into the device's memory."""


@contextlib.contextmanager
def model_errors(named: str, num_images: int) -> Iterator[None]:
    """Raises what a model's forward pass raises as errors that name the model.

    Args:
      named: flag and name of the model.
      num_images: images of the batch.

    Raises:
      OutOfMemory: the batch is too large.
      UserError: the model fails, as it does if its processor gives it images of another size.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"{named} runs out of memory on {num_images} images: give a smaller --batch") from error
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{named} fails on an image ({reason}): use the model and its processor as published"
        ) from error
