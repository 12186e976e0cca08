"""Trains the networks of a config.

    python -m lidit_jax.main --config=configs/shapes.py --workdir=runs/shapes --config.train.batch_size=64

Run the same command again to resume from the last checkpoint, also after SIGTERM, on which training saves and exits. On
a pod, run it on every host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.parallel.preemption import activity

_CONFIG = cli.define_config()
_DISTRIBUTED = cli.define_distributed()
_FROM_TORCH = flags.DEFINE_string(
    "from_torch", None, "folder written by `export`: start from its LI-DiT, with its encoders and VAE"
)
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config",
    False,
    "print every field of the config with its source (paper, ours, default, command line, …); exit",
)
_COMPILATION_CACHE = flags.DEFINE_bool(
    "compilation_cache", True, "keep compiled programs in WORKDIR/compiled, or where JAX_COMPILATION_CACHE_DIR says"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run: checkpoints, logs, samples (local or gs://)")


def main() -> None:
    if _PRINT_CONFIG.value:
        from lidit_jax.print_config import format_config

        cli.write_text(format_config(cli.read_config(_CONFIG), cli.config_file(), cli.config_overrides()))
        return
    with activity("starting"):
        from lidit_jax.export.read import start_from_exported
        from lidit_jax.parallel.hosts import join_hosts

        config = cli.read_config(_CONFIG)
        workdir = epath.Path(cli.require(_WORKDIR.name))
        join_hosts(_DISTRIBUTED.value, workdir)
        if _FROM_TORCH.value:
            config = start_from_exported(config, epath.Path(_FROM_TORCH.value))
        if "llava" in config:
            from lidit_jax.stages.llava import run_llava as run
        else:
            from lidit_jax.stages.run import run_stages as run
        run(config, workdir, _COMPILATION_CACHE.value, cli.STARTED)


if __name__ == "__main__":
    cli.run(main, resumable=True)
