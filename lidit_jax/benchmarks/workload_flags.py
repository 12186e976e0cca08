"""Flags of `train_step` and `sample`: the config, what replaces its sizes, and the contestants.

A module of their own, because `workload.py` imports JAX.
"""

from absl import flags

from lidit_jax import cli

CONFIG = cli.define_config("shapes")
BATCH = flags.DEFINE_integer(
    "batch", None, "samples per batch (default: the config's)", lower_bound=1, upper_bound=65_536
)
RESOLUTION = flags.DEFINE_integer(
    "resolution", None, "side of the images in pixels (default: the config's)", lower_bound=1, upper_bound=65_536
)
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "compute dtype (default: the config's)")
ROUNDS = flags.DEFINE_integer("rounds", 5, "how often each contestant is timed", lower_bound=1, upper_bound=1_000_000)
PREFIX_TOKENS = flags.DEFINE_integer(
    "prefix_tokens",
    64,
    "tokens of system prompt and instruction, for LLMs without a local tokenizer",
    lower_bound=0,
    upper_bound=65_536,
)
TORCH = flags.DEFINE_bool("torch", True, "compare with PyTorch")
COMPILED = flags.DEFINE_bool("compiled", True, "compare with PyTorch under torch.compile, too")
