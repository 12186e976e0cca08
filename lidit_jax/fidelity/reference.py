"""The pictures that FID compares with: a folder's, or those of a config's data set as the model sees them."""

import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from lidit_jax.data.dataset import spread
from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.errors import UserError
from lidit_jax.evaluate.read_picture import read_picture
from lidit_jax.experiment import Experiment
from lidit_jax.fidelity.drawn_folder import picture_files
from lidit_jax.fidelity.scores import Reference

BATCH = 32  # pictures that the loader makes at once


def folder_reference(folder: epath.Path, count: int | None) -> Reference:
    """Up to `count` pictures, evenly spread over the names; None: all.

    Raises:
      UserError: there is none.
    """
    files = picture_files(folder, "reference")
    if count is not None:
        files = [files[i] for i in spread(len(files), count)]
    return Reference(str(folder), len(files), map(read_picture, files))


def config_reference(config: ConfigDict, name: str, count: int) -> Reference:
    """The first `count` pictures that a training on these data gets: cropped and resized, shuffled by its seed.

    Of a smaller data set some come again, each equally often but for one time.

    Args: name: of the config, for the report.

    Raises:
      UserError: for a config or data that can't be used.
    """
    experiment = Experiment(config, epath.Path("unused"), only_shapes=True)
    dataset = open_dataset(experiment.data, experiment.cell(), with_captions=experiment.has_lidit)
    if dataset.holds_latents:
        raise UserError(
            "data.source='precomputed' holds latents, no pictures to compare with: name the pictures' source"
        )

    def pictures() -> Iterator[np.ndarray]:
        batches = dataset.batches(BATCH, config.seed, tokenize=None, with_captions=experiment.has_lidit)
        try:
            yield from itertools.islice((picture for batch in batches for picture in batch["image"]), count)
        finally:
            batches.close()

    return Reference(f"{name} {dataset.fingerprint}", count, pictures())
