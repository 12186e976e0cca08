"""Contact sheet of training batches, as the model receives them."""

import itertools
import logging
import time

from etils import epath
from ml_collections import ConfigDict

from lidit_jax.data.open_dataset import open_dataset
from lidit_jax.data_report import log_data, log_prompts
from lidit_jax.errors import UserError, cannot_write
from lidit_jax.experiment import Experiment
from lidit_jax.files import check_writable
from lidit_jax.images import grid, save_png
from lidit_jax.weights.folders import is_there

logger = logging.getLogger(__name__)

TIMED_BATCHES = 8
PER_BATCH = 8  # images shown per batch: several batches show several buckets


def draw_contact_sheet(config: ConfigDict, out: epath.Path, num_images: int) -> None:
    """Writes a contact sheet and logs buckets, filters, captions, prompts and loader speed.

    Args:
      config: config of a training run.
      out: PNG file to write.
      num_images: number of images on the sheet.

    Raises:
      UserError: the config or its data cannot be used, `num_images` is less than 1, or `out` does not end in .png or
        cannot be written.
    """
    if out.suffix != ".png":
        raise UserError(f"--out={out} does not end in .png: name a .png file")
    if num_images < 1:
        raise UserError(f"--num_images={num_images} must be at least 1")
    check_writable(out.parent, f"--out={out}")
    experiment = Experiment(config, out.parent)
    dataset = open_dataset(experiment.data, experiment.size_multiple(), with_captions=experiment.has_lidit)
    if dataset.holds_latents:
        raise UserError("data.source='precomputed' holds latents, no images to show: name the source of the images")
    batch_size = experiment.batch_size() or PER_BATCH
    batches = dataset.batches(
        batch_size,
        config.seed,
        tokenize=None,
        caption_dropout=experiment.data.caption_dropout,
        with_captions=experiment.has_lidit,
    )
    images, labels = [], []
    per_batch = min(PER_BATCH, batch_size)
    for batch in itertools.islice(batches, -(-num_images // per_batch)):
        height, width = batch["image"].shape[1:3]
        captions = [caption or "(dropped)" for caption in batch.get("caption", [" "] * batch_size)]
        images += list(batch["image"][:per_batch])
        labels += [f"[{width}x{height}] {caption}" for caption in captions[:per_batch]]
    captions = log_data(experiment, dataset)
    if experiment.has_lidit:
        log_prompts(experiment, captions, _encoders_at_hand(experiment))
    try:
        save_png(grid(images[:num_images], labels[:num_images], columns=PER_BATCH), out)
    except OSError as error:
        raise cannot_write(f"--out={out}", error) from error

    started = time.monotonic()
    count = sum(len(batch["image"]) for batch in itertools.islice(batches, TIMED_BATCHES))
    logger.info("loader: %.0f samples/s", count / (time.monotonic() - started))
    for kind, reasons in (("broken", batches.broken), ("left out by filters", batches.dropped)):
        if reasons:
            logger.info("while reading: %s %s", kind, ", ".join(f"{r}: {n}" for r, n in sorted(reasons.items())))
    batches.close()
    logger.info("contact sheet: %s", out)


def _encoders_at_hand(experiment: Experiment) -> list[str]:
    """Returns the encoders whose folder exists: others are trained by the run, or would have to be downloaded."""
    return [
        name
        for name, encoder in experiment.encoders.items()
        if encoder.weights and is_there(epath.Path(encoder.weights))
    ]
