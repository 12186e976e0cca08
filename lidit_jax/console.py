"""The `lidit` command: `lidit sample …` is `python -m lidit_jax.sample …`, and `lidit train …` is `lidit_jax.main`."""

import runpy
import sys

from lidit_jax.parallel.early_signals import end_on_signals

# Command -> module, and what it does.
COMMANDS = {
    "train": ("lidit_jax.main", "train the networks of a config"),
    "sample": ("lidit_jax.sample", "generate images from prompts"),
    "evaluate": ("lidit_jax.evaluate", "generate the images of a benchmark"),
    "score": ("lidit_jax.score", "score generated images as the benchmarks do"),
    "fidelity": ("lidit_jax.fidelity", "compute FID and CLIP score"),
    "preview": ("lidit_jax.preview", "show training batches"),
    "recaption": ("lidit_jax.recaption", "write shards with captions and aesthetic scores by models"),
    "precompute": ("lidit_jax.precompute", "compute latents and features ahead of training"),
    "describe": ("lidit_jax.describe", "show what language models generate for a prompt"),
    "export": ("lidit_jax.export", "export a run to PyTorch"),
    "check": ("lidit_jax.check", "verify the checkpoints of a workdir"),
    "compile": ("lidit_jax.compile", "compile a train step for a TPU slice without having one"),
    "ablate": ("lidit_jax.ablate", "run the paper's ablations in miniature"),
}


def main() -> None:
    """Runs the command that the first argument names, with the other arguments."""
    end_on_signals()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print("usage: lidit COMMAND [--flag=value …]\n")
        print("\n".join(f"  {command:12}{description}" for command, (_, description) in COMMANDS.items()))
        print("\nlidit COMMAND --help describes a command and its flags. For example:\n")
        print("  lidit train --config=shapes --workdir=runs/shapes")
        return
    if name == "--version":
        from lidit_jax import __version__

        print(f"lidit {__version__}")
        return
    if name not in COMMANDS:
        from lidit_jax.config import nearest

        print(f"error: lidit {name}: no such command{nearest(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv[1:] = arguments
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
