"""Reference images of FID: those of a folder, or the training images of a config."""

import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.data.dataset import spread
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError
from lidit_jax.evaluate.read_image import read_image
from lidit_jax.experiment import Experiment
from lidit_jax.fidelity.image_folder import image_files
from lidit_jax.fidelity.scores import Reference

BATCH = 32  # batch size of the loader


def folder_reference(folder: epath.Path, count: int | None) -> Reference:
    """Returns the images of a folder as reference.

    Args:
      folder: the folder.
      count: largest number of images, chosen at even intervals from the sorted names; None uses all.

    Raises:
      UserError: the folder does not exist or contains no image.
    """
    files = image_files(folder, "reference")
    if count is not None:
        files = [files[i] for i in spread(len(files), count)]
    return Reference(str(folder), len(files), map(read_image, files))


def config_reference(config: ConfigDict, name: str, count: int) -> Reference:
    """Returns the first `count` images of a training run with this config: resized, cropped and shuffled by its seed.

    Images of a smaller data set repeat; the numbers of repetitions differ by at most one.

    Args:
      config: config of the training run.
      name: name of the config, for the report.
      count: number of images.

    Raises:
      UserError: the config or its data cannot be used.
    """
    experiment = Experiment(config, epath.Path("unused"), only_shapes=True)
    dataset = open_dataset(experiment.data, experiment.size_multiple(), with_captions=experiment.has_lidit)
    if dataset.holds_latents:
        raise UserError(
            "data.source='precomputed' holds latents, no images to compare with: name the source of the images"
        )

    def images() -> Iterator[np.ndarray]:
        batches = dataset.batches(BATCH, config.seed, tokenize=None, with_captions=experiment.has_lidit)
        try:
            yield from itertools.islice((image for batch in batches for image in batch["image"]), count)
        finally:
            batches.close()

    return Reference(f"{name} {dataset.fingerprint}", count, images())
