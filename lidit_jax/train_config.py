"""The numbers of one network's training, under `train` in a config."""

import dataclasses

from lidit_jax.errors import UserError
from lidit_jax.models.products import GRADIENT_DTYPES

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Numbers of one part's training, under `train` in the config.

    Attributes:
      schedule: learning rate after warm-up: "constant", or "cosine" down to a hundredth at the last step. Skipped steps
        do not advance it.
      accumulate: micro-batches a step; the mean of their gradients, weighted as their losses are, equals the whole
        batch's, but for losses that look at a batch as a whole (a discriminator's batch normalisation and adaptive
        weight).
      gradient_reduction: dtype that the gradients of bfloat16 layers are reduced over the devices in, "float32" or, for
        half the bytes, "bfloat16". Gradients of float32 layers, biases and norms are reduced in float32 in any case.
      ema_decay: 0 keeps no average. The decay is ramped up over the first updates: min(decay, (1 + t) / (10 + t)) after
        t updates.
      max_skipped_in_row: non-finite steps in a row after which the run stops.
      stalled_after: seconds without a step after which a run on several hosts ends, as one of them must be waiting for
        ever; 0: it waits. Compiling, judging and saving must each be done within.
      compile_ahead: compile the step for every bucket of the data, and every phase, before the first step; False: each
        when it first comes, so that the first steps come sooner and later ones have to wait.
      log_every, checkpoint_every, sample_every, keep: steps, and checkpoints kept; sample_every=0: none.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    schedule: str = "constant"
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    accumulate: int = 1
    gradient_reduction: str = "float32"
    ema_decay: float = 0.0
    max_skipped_in_row: int = 20
    stalled_after: float = 1800.0
    compile_ahead: bool = True
    log_every: int = 100
    checkpoint_every: int = 1000
    sample_every: int = 0
    keep: int = 2

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise UserError(f"train.schedule={self.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
        if self.gradient_reduction not in GRADIENT_DTYPES:
            known = ", ".join(GRADIENT_DTYPES)
            raise UserError(f"train.gradient_reduction={self.gradient_reduction!r:.80} is unknown: use one of {known}")
        for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} is not divisible by train.accumulate={self.accumulate}"
            )
