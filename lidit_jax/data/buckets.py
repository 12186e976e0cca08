"""Aspect-ratio bucketing (paper, 5.1: images grouped by aspect ratio), and resizing of images to their bucket."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from lidit_jax.errors import UserError

_MAX_AREA_AVERAGING_SCALE = 2 / 3  # largest scale at which images are resized by area averaging


class Bucket(NamedTuple):
    """Image size in pixels, shared by all images of a batch."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}"


def make_buckets(resolution: int, multiple: int, max_aspect: float = 1.0) -> tuple[Bucket, ...]:
    """Returns image sizes of nearly equal area, and so of nearly equal cost.

    For each length of the shorter side, the other side is the longest that keeps the area within `resolution` squared.
    For each bucket as many programs are compiled as there are prompt lengths. `multiple` determines the number of
    buckets: at max_aspect 2, resolutions of 256, 512 and 1024 px have 9, 19 and 37 with a multiple of 16, and 3, 5 and
    9 with a multiple of 64.

    Args:
      resolution: side of the square bucket in pixels; no bucket has a larger area.
      multiple: number of pixels that divides every side (VAE down-sampling times patch size, or a multiple of that).
      max_aspect: largest ratio of the longer to the shorter side; 1 gives the square bucket alone.

    Returns:
      Buckets by ascending aspect ratio (width / height).

    Raises:
      UserError: `resolution` is not a multiple of `multiple`, or `max_aspect` is below 1 or needs a side shorter than
        `multiple`.
    """
    if multiple < 1 or resolution < 1 or resolution % multiple:
        raise UserError(_not_a_multiple(resolution, multiple))
    if not max_aspect >= 1:
        raise UserError(f"max_aspect={max_aspect} is below 1: give the ratio of the longer to the shorter side")
    max_area = (resolution // multiple) ** 2  # area, in units of multiple²
    if max_aspect > max_area:
        raise UserError(
            f"max_aspect={max_aspect:g} at resolution={resolution} needs a side under {multiple}: "
            f"use max_aspect={max_area} or less, or a higher resolution"
        )
    sides = ((shorter, max_area // shorter) for shorter in range(1, resolution // multiple + 1))
    landscape = [(multiple * shorter, multiple * longer) for shorter, longer in sides if longer <= max_aspect * shorter]
    sizes = {Bucket(*size) for size in landscape} | {Bucket(*reversed(size)) for size in landscape}
    return tuple(sorted(sizes, key=lambda bucket: bucket.width / bucket.height))


def _not_a_multiple(resolution: int, multiple: int) -> str:
    if multiple < 1 or resolution < 1:
        return f"resolution={resolution} and multiple={multiple}: both must be at least 1"
    lower = resolution // multiple * multiple
    choice = f"{lower} or {lower + multiple}" if lower else str(multiple)
    return f"resolution={resolution} is not a multiple of {multiple}: use {choice}"


def assign(sizes: np.ndarray, buckets: Sequence[Bucket]) -> np.ndarray:
    """Returns the bucket of each image: the nearest one in log aspect ratio, which crops least.

    Args:
      sizes: int [N, 2], height and width in pixels, all positive.
      buckets: the buckets to choose from, in any order.

    Returns:
      int32 [N], indices into `buckets`.
    """
    aspects = np.log([bucket.width / bucket.height for bucket in buckets])
    order = np.argsort(aspects, kind="stable")
    borders = (aspects[order][1:] + aspects[order][:-1]) / 2
    wanted = np.log(sizes[:, 1] / sizes[:, 0])  # [N]
    return order[np.searchsorted(borders, wanted)].astype(np.int32)


def resize_to_cover_and_crop(image: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Resizes an image until it just covers the bucket, then crops the centre (paper, 5.1: no augmentation).

    Images are shrunk by area averaging, as img2dataset does. Shrinking by less than a third, where averaging one pixel
    here and two there would be visible, and enlarging use a bicubic filter, as ADM and DiT do.

    Args:
      image: uint8 [H, W, 3].
      bucket: size of the result.

    Returns:
      uint8 [bucket.height, bucket.width, 3]; `image` itself if it already has that size.
    """
    height, width, _ = image.shape
    if (height, width) == tuple(bucket):
        return image
    scale = max(bucket.height / height, bucket.width / width)
    if scale == 1:
        top, left = (height - bucket.height) // 2, (width - bucket.width) // 2
        return image[top : top + bucket.height, left : left + bucket.width]
    # Crop in source coordinates, which may be fractional: rounding the scaled size would distort the image.
    crop_height, crop_width = min(bucket.height / scale, height), min(bucket.width / scale, width)
    top, left = (height - crop_height) / 2, (width - crop_width) / 2
    box = (left, top, min(left + crop_width, width), min(top + crop_height, height))
    resample = Image.Resampling.BOX if scale <= _MAX_AREA_AVERAGING_SCALE else Image.Resampling.BICUBIC
    resized = Image.fromarray(image).resize((bucket.width, bucket.height), resample, box)
    return np.asarray(resized)
