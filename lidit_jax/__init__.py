"""LI-DiT in JAX: decoder-only LLMs as the prompt encoders of a diffusion transformer."""

import sys

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # `python -m` is about to import a command
    from lidit_jax.parallel.early_signals import end_on_signals

    end_on_signals()
