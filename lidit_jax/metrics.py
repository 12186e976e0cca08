"""Training logs: a progress line, TensorBoard scalars and images (clu), and one JSON line for each logged step."""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO

import jax
import numpy as np
from etils import epath

from lidit_jax.files import finite, name_file
from lidit_jax.images import save_png

logger = logging.getLogger(__name__)


class Metrics:
    """Writes scalars and images of one trained component into its folder; only the first process writes.

    `metrics.jsonl` has one object for each logged step. When a run resumes, steps that are taken again have a second
    line. Values that are not finite are null. Names without a measurement are left out: the loss if every step of the
    interval was skipped, the loss of a quarter of the noise schedule that no sample fell into.

    Attributes:
      folder: the component's folder.
    """

    def __init__(self, folder: str | epath.Path, tensorboard: bool = True):
        """Opens the files.

        Args:
          folder: the component's folder; created if necessary.
          tensorboard: whether to write for TensorBoard too, which takes TensorFlow.
        """
        self.folder = epath.Path(folder)
        self._lines: IO[str] | None = None
        self._tensorboard = None
        if jax.process_index():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if tensorboard:
            os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
            os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # silences a message about rounding at every start
            # Imports TensorFlow, which takes seconds: only the process that writes should pay for it.
            from clu import metric_writers

            self._tensorboard = metric_writers.AsyncWriter(metric_writers.SummaryWriter(str(self.folder)))
        self._lines = (self.folder / "metrics.jsonl").open("a")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes named scalars to `metrics.jsonl` and to TensorBoard."""
        if self._tensorboard:
            self._tensorboard.write_scalars(step, dict(values))
        if self._lines:
            try:
                self._lines.write(json.dumps(finite({"step": step, **values}), allow_nan=False) + "\n")
                self._lines.flush()
            except OSError as error:
                name_file(error, self._lines.name)
                raise

    def images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes named images, uint8 [H, W, 3], to samples/NAME_STEP.png and to TensorBoard."""
        if self._tensorboard:
            self._tensorboard.write_images(step, {name: image[None] for name, image in images.items()})
        if self._lines:
            for name, image in images.items():
                file = self.folder / "samples" / f"{name}_{step:07d}.png"
                save_png(image, file)
                logger.info("step %d: %s", step, file)

    def close(self) -> None:
        if self._tensorboard:
            self._tensorboard.close()
        if self._lines:
            self._lines.close()
        self._tensorboard = self._lines = None


class Progress:
    """Prints the progress line: loss, speed, MFU, memory, share of time spent waiting for data, time left."""

    def __init__(
        self,
        name: str,
        step: int,
        steps: int,
        batch_size: int,
        peak: float | None = None,
        later_steps: float = 0.0,
    ):
        """Starts the first interval.

        Args:
          name: name of the trained component.
          step: steps taken so far.
          steps: steps in total.
          batch_size: samples in a step, over all devices.
          peak: peak FLOP/s of all devices together; None if unknown.
          later_steps: rough work of the run after this component, in steps of this one.
        """
        self._later_steps = later_steps
        self._peak, self._flops = peak, 0.0
        self.name, self.steps, self.batch_size = name, steps, batch_size
        self._step, self._started = step, time.monotonic()
        self._waiting = self._paused = 0.0
        self._speed: dict[str, float] = {}

    def waited(self, seconds: float) -> None:
        """Adds the time that the last step spent waiting for its batch."""
        self._waiting += seconds

    def worked(self, flops: float) -> None:
        """Adds the model FLOPs of the last step."""
        self._flops += flops

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the context, for samples and checkpoints, from the speed."""
        started = time.monotonic()
        yield
        self._paused += time.monotonic() - started

    def speed(self, step: int) -> dict[str, float]:
        """Returns the speed since the last call, and starts a new interval.

        Returns:
          "samples_per_second", "data_wait" (share of the time) and, if FLOPs are counted, "tflops_per_second" (all
          devices together) and, if the peak is known, "mfu" (share of the peak).
        """
        now = time.monotonic()
        elapsed = max(1e-9, now - self._started - self._paused)
        steps = step - self._step
        self._speed = {
            "samples_per_second": steps * self.batch_size / elapsed,
            "data_wait": min(1.0, self._waiting / elapsed),
        }
        if self._flops:
            self._speed["tflops_per_second"] = self._flops / elapsed / 1e12
            if self._peak:
                self._speed["mfu"] = self._flops / elapsed / self._peak
        self._step, self._started, self._waiting, self._paused, self._flops = step, now, 0.0, 0.0, 0.0
        return self._speed

    def print(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the progress line, with a dash for values that no step of the interval measured."""
        if jax.process_index():
            return
        speed = self._speed["samples_per_second"]
        seconds_per_step = self.batch_size / max(speed, 1e-9)
        eta = duration((self.steps - step) * seconds_per_step)
        if self._later_steps:
            eta += f", all stages about {duration((self.steps - step + self._later_steps) * seconds_per_step)}"
        flops = f"  {self._speed['tflops_per_second']:.3g} TFLOP/s" if "tflops_per_second" in self._speed else ""
        flops += f" (MFU {100 * self._speed['mfu']:.0f}%)" if "mfu" in self._speed else ""
        memory = f"  memory {values['memory_gb']:.1f} GB" if "memory_gb" in values else ""
        memory += f" (peak {values['peak_memory_gb']:.1f})" if "peak_memory_gb" in values else ""
        skipped = f"  skipped {values['skipped_in_interval']} ({values['skipped']} in all)" if values["skipped"] else ""

        def show(name: str, form: str) -> str:
            return format(values[name], form) if name in values else "-"

        print(
            f"{self.name} {step}/{self.steps} ({100 * step // self.steps}%)  loss {show('loss', '.4f')}  "
            f"grad {show('grad_norm', '.3f')}  lr {show('learning_rate', '.2e')}  {speed:.1f} samples/s{flops}  "
            f"data wait {100 * self._speed['data_wait']:.0f}%{memory}{skipped}  eta {eta}",
            file=sys.stderr,
            flush=True,
        )


def device_memory() -> dict[str, float]:
    """Returns the memory of this process's devices, in GB; what JAX does not know of a device is left out.

    Returns:
      "memory_gb" (in use) and "peak_memory_gb" (so far) of the device that has the most, and with several devices
      "memory_gb/device_N" and "peak_memory_gb/device_N" of each, by its id.
    """
    stats_of = {device.id: device.memory_stats() or {} for device in jax.local_devices()}
    memory: dict[str, float] = {}
    for name, statistic in (("memory_gb", "bytes_in_use"), ("peak_memory_gb", "peak_bytes_in_use")):
        sizes = {number: stats[statistic] / 1e9 for number, stats in stats_of.items() if statistic in stats}
        if sizes:
            memory[name] = max(sizes.values())
        if len(stats_of) > 1:
            memory |= {f"{name}/device_{number}": size for number, size in sizes.items()}
    return memory


def duration(seconds: float) -> str:
    """Formats seconds: 3725 as "1h02m", 65 as "1m05s"."""
    seconds = int(seconds)
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s"
