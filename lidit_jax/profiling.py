"""Traces of training steps for XProf and TensorBoard."""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from lidit_jax.errors import UserError
from lidit_jax.files import write_bytes

logger = logging.getLogger(__name__)


def parse_steps(text: str) -> range:
    """Parses the steps to trace: "100:105" are the steps 100 to 104, counted from 0; "" are none.

    Raises:
      UserError: if the text is neither.
    """
    if not text:
        return range(0)
    match = re.fullmatch(r"([0-9]{1,15}):([0-9]{1,15})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"train.profile={text!r:.80}: give START:STOP, such as 100:105 for the steps 100 to 104")
    return range(int(match[1]), int(match[2]))


class StepProfiler:
    """Traces some of a network's steps, and writes the trace where TensorBoard looks for it.

    While no step is traced it costs nothing but two comparisons per step.
    """

    def __init__(self, steps: range, folder: epath.Path, all_hosts: bool = False):
        """Prepares the trace.

        Args:
          steps: steps to trace, counted from 0; none if it is empty.
          folder: folder of the network's TensorBoard events.
          all_hosts: True traces every host, each into a file of its own; False traces the first.
        """
        self._steps, self._folder = steps, folder
        self._is_traced = all_hosts or jax.process_index() == 0
        self._temporary: tempfile.TemporaryDirectory | None = None

    def before(self, step: int, arrays: Any) -> None:
        """Starts the trace if `step` is one to trace.

        Args:
          step: the step that comes next, counted from 0.
          arrays: results of the step before; the trace starts when they are ready.
        """
        if step in self._steps and self._is_traced and self._temporary is None:
            jax.block_until_ready(arrays)
            temporary = tempfile.TemporaryDirectory()
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # the loop's Python calls would outnumber everything else
            jax.profiler.start_trace(temporary.name, profiler_options=options)
            self._temporary = temporary  # only now is there a trace to end

    def ends_after(self, step: int) -> bool:
        """Returns True if the trace must be closed once the results of `step`, counted from 0, are ready."""
        return self._temporary is not None and step + 1 >= self._steps.stop

    def close(self) -> None:
        """Ends a trace that has begun, and writes it."""
        if self._temporary is None:
            return
        temporary, self._temporary = self._temporary, None
        with temporary as folder:
            jax.profiler.stop_trace()
            target = self._folder / "plugins" / "profile" / f"steps_{self._steps.start}_{self._steps.stop}"
            target.mkdir(parents=True, exist_ok=True)
            # Copied, because JAX writes to local disks only, and because the hosts' files belong into one folder.
            for file in sorted(Path(folder).rglob("*.xplane.pb")):
                name = f"host_{jax.process_index():05}.xplane.pb"
                write_bytes(target / name, file.read_bytes())
                logger.info("trace of steps %d to %d: %s", self._steps.start, self._steps.stop - 1, target / name)
