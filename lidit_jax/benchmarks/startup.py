"""Times what a run compiles before its first step of LI-DiT: `python -m lidit_jax.benchmarks.startup`.

The programs are the initialisation, beside Flax's own with its operations for every parameter, and the training step
for the first bucket. Each is compiled cold, and again from JAX's compilation cache, as a resumed run does. Nothing is
loaded or run: `--config=configs/1b.py` works without its LLMs and data.
"""

import dataclasses
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags
from lidit_jax.benchmarks.contest import describe_host

if TYPE_CHECKING:
    import jax
    from ml_collections import ConfigDict

_CONFIG = cli.define_config("shapes")
_PREFIX = shared_flags.define_tokens("prefix_tokens", 64, "tokens of system prompt and instruction", lowest=0)


def main() -> None:
    config, prefix = cli.read_config(_CONFIG), _PREFIX.value
    print(f"{describe_host()}; seconds")
    print(f"{'':32}{'tracing':>10}{'compiling':>12}{'from cache':>12}")
    for name, lower in programs(config, prefix):
        seconds = time_program(lower)
        print(f"{name:32}{seconds.tracing:10.2f}{seconds.compiling:12.2f}{seconds.from_cache:12.2f}", flush=True)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of a program in seconds.

    Attributes:
      tracing: tracing and lowering, which no cache saves.
      compiling: compiling it for the first time.
      from_cache: loading it from the compilation cache.
    """

    tracing: float
    compiling: float
    from_cache: float


def programs(config: "ConfigDict", prefix_tokens: int) -> "Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]":
    """Yields the programs by name, each as a function that lowers it.

    Args:
      config: config of a run.
      prefix_tokens: tokens of system prompt and instruction.

    Raises:
      UserError: the config trains no LI-DiT, or does not fit this host's devices.
    """
    import jax

    from lidit_jax.compile.compile_step import abstract_batch, abstract_frozen
    from lidit_jax.data.assembler import BatchShape
    from lidit_jax.experiment import abstract_experiment
    from lidit_jax.parallel.mesh import make_mesh
    from lidit_jax.parallel.rules import ShardingRules
    from lidit_jax.stages.lidit import lidit_task
    from lidit_jax.trainer import Trainer

    experiment = abstract_experiment(config)
    mesh, rules = make_mesh(experiment.config.mesh, jax.devices()), ShardingRules()
    encoders, frozen = abstract_frozen(experiment, mesh, rules, prefix_tokens)
    vae = experiment.autoencoder(experiment.vae_config)
    task = lidit_task(experiment.model, experiment.schedule, encoders, vae, frozen)
    widths = [encoder.hidden_size for encoder in encoders.values()]
    alone = dataclasses.replace(task, init=functools.partial(experiment.model.init_params, widths))
    trainer = Trainer(task, experiment.train, mesh, rules)
    shape = BatchShape(experiment.data.buckets(experiment.size_multiple())[0], experiment.text.max_length)
    batch = abstract_batch(experiment, encoders, mesh, rules, shape)
    yield "initialisation", trainer.lower_init
    yield "initialisation by Flax", Trainer(alone, experiment.train, mesh, rules).lower_init
    yield "training step", functools.partial(trainer.lower, trainer.abstract_state(), frozen, batch)


def time_program(lower: "Callable[[], jax.stages.Lowered]") -> Seconds:
    """Times a program, cold and from a compilation cache of its own."""
    import jax
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        reset_cache()  # opens the folder
        times = []
        for _ in range(2):
            jax.clear_caches()
            begun = time.monotonic()
            lowered = lower()
            traced = time.monotonic()
            lowered.compile()
            times.append((traced - begun, time.monotonic() - traced))
    return Seconds(times[0][0], times[0][1], times[1][1])


if __name__ == "__main__":
    cli.run(main)
