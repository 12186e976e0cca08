"""The data set that a config names, of whichever kind."""

from lidit_jax.data.data_config import DataConfig
from lidit_jax.data.dataset import Dataset
from lidit_jax.data.indexed.dataset import IndexedDataset
from lidit_jax.data.streamed.dataset import StreamedDataset


def open_dataset(config: DataConfig, cell: int, held_out: bool = False, with_captions: bool = True) -> Dataset:
    """Finds the data and looks at them, as far as can be done before training.

    Args:
      cell: pixels that both sides of every picture must be multiples of (latent cell times patch).
      held_out: the pictures kept from training, in place of those for it.
      with_captions: whether captions are trained on; an autoencoder has no use for them.

    Raises:
      UserError: if there is no data, the filters leave nothing, too much is broken, no sample has a caption field
        that the config names, or there are no buckets of the resolution (`DataConfig.buckets`).
    """
    kind = StreamedDataset if config.sequential else IndexedDataset
    return kind(config, cell, held_out, with_captions)
