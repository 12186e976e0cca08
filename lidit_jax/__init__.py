"""LI-DiT in JAX: decoder-only LLMs as the prompt encoders of a diffusion transformer."""

import itertools
import sys

__version__ = "0.1.0"

# While `python -m` looks for its module, which imports this package, sys.argv[0] is "-m".
if sys.argv[:1] == ["-m"] and any(
    option == "-m" and module.startswith("lidit_jax.") for option, module in itertools.pairwise(sys.orig_argv)
):
    from lidit_jax.parallel.early_signals import end_on_signals

    end_on_signals()
