"""Flags of `train_step` and `sample`: the config, what replaces its sizes, and the contestants.

A module of their own, because `workload.py` imports JAX.
"""

from absl import flags

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags

CONFIG = cli.define_config("shapes")
BATCH = shared_flags.define_batch(None, "samples per batch (default: the config's)")
RESOLUTION = shared_flags.define_side("resolution", None, "side of the images in pixels (default: the config's)")
DTYPE = shared_flags.define_dtype(None, "compute dtype (default: the config's)")
ROUNDS = shared_flags.define_rounds(5)
JSON = shared_flags.define_json()
PREFIX_TOKENS = shared_flags.define_tokens(
    "prefix_tokens", 64, "tokens of system prompt and instruction, for LLMs without a local tokenizer", lowest=0
)
TORCH = flags.DEFINE_bool("torch", True, "compare with PyTorch")
COMPILED = flags.DEFINE_bool("compiled", True, "compare with PyTorch under torch.compile, too")
