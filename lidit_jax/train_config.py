"""The numbers of one network's training, under `train` in a config."""

import dataclasses
from typing import Annotated

from lidit_jax.errors import UserError
from lidit_jax.models.sharded_matmul import GRADIENT_DTYPES
from lidit_jax.profiling import parse_steps
from lidit_jax.ranges import (
    Count,
    CountOrZero,
    NonNegative,
    Share,
    Size,
    at_least,
    below,
    between,
    check_ranges,
)

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a component is trained: section `train` of the config, and of each encoder and VAE trained by the run.

    Attributes:
      steps: steps in total.
      batch_size: samples in a step, over all devices and micro-batches.
      learning_rate: peak learning rate.
      warmup_steps: steps of linear warm-up.
      schedule: learning rate after the warm-up: "constant", or "cosine" down to a hundredth at the last step. Skipped
        steps do not advance it.
      b1: AdamW's decay of the first moment.
      b2: AdamW's decay of the second moment.
      weight_decay: decoupled weight decay, of matrices only.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      accumulate: micro-batches in a step. The mean of their gradients, weighted like their losses, equals the gradient
        of the full batch, except for losses that depend on batch statistics (a discriminator's batch normalisation and
        adaptive weight).
      gradient_reduction: dtype in which the gradients of bfloat16 layers are reduced over the devices: "float32" or,
        for half the bytes, "bfloat16". Gradients of float32 layers, biases and norms are always reduced in float32.
      ema_decay: decay of the parameters' moving average; 0 keeps none. It is ramped up over the first updates:
        min(decay, (1 + t) / (10 + t)) after t updates.
      max_skipped_in_row: number of consecutive non-finite steps after which the run stops; checked every `log_every`
        steps.
      stalled_after: seconds without a step after which a run on several hosts exits, because one of them is
        presumably hung; 0 never exits. Compiling a program, evaluating and saving must each take less.
      compile_ahead: True compiles the step for every bucket of the data and every phase before the first step; False
        compiles each on first use, so that the first step comes sooner and later ones have to wait.
      log_every: steps between log lines.
      checkpoint_every: steps between checkpoints.
      sample_every: steps between evaluations by `Task.evaluate`; 0 for none.
      keep: number of checkpoints kept.
      strict_restore: what a damaged newest checkpoint leads to: True stops, False uses the newest intact one.
      tensorboard: whether scalars and images are also written for TensorBoard; False spares the import of TensorFlow,
        which takes several seconds of a start.
      profile: steps to trace for XProf, START:STOP counted from 0 ("100:105" are 100 to 104); "" traces none.
      profile_all_hosts: True traces these steps on every host, False on the first.
    """

    steps: Count
    batch_size: Size
    learning_rate: Annotated[float, between(0, 10)]
    warmup_steps: CountOrZero = 0
    schedule: str = "constant"
    b1: Annotated[float, at_least(0), below(1)] = 0.9
    b2: Annotated[float, at_least(0), below(1)] = 0.99
    weight_decay: Annotated[float, between(0, 1000)] = 0.0
    clip_norm: NonNegative = 1.0
    accumulate: Count = 1
    gradient_reduction: str = "float32"
    ema_decay: Share = 0.0
    max_skipped_in_row: Count = 20
    stalled_after: Annotated[float, between(0, 1e9)] = 1800.0
    compile_ahead: bool = True
    log_every: Count = 100
    checkpoint_every: Count = 1000
    sample_every: CountOrZero = 0
    keep: Count = 2
    strict_restore: bool = False
    tensorboard: bool = True
    profile: str = ""
    profile_all_hosts: bool = False

    def __post_init__(self):
        check_ranges(self, "train.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"train.schedule={self.schedule!r} is unknown: use one of {', '.join(SCHEDULES)}")
        if self.gradient_reduction not in GRADIENT_DTYPES:
            known = ", ".join(GRADIENT_DTYPES)
            raise UserError(f"train.gradient_reduction={self.gradient_reduction!r:.80} is unknown: use one of {known}")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.batch_size={self.batch_size} is not divisible by train.accumulate={self.accumulate}: "
                "make it a multiple"
            )
        if self.profiled_steps and self.profiled_steps.start >= self.steps:
            raise UserError(f"train.profile={self.profile} begins after the last of train.steps={self.steps}: lower it")

    @property
    def profiled_steps(self) -> range:
        """The steps to trace."""
        return parse_steps(self.profile)
