"""Rematerialisation policies: what a block saves for its backward pass."""

import flax.linen as nn
import jax

from lidit_jax.models import splash_attention

_save_kernels = jax.checkpoint_policies.save_only_these_names(splash_attention.CHECKPOINT_NAME)

REMAT_POLICIES = {
    # Saves only the block's input: the least memory, at the cost of a second forward pass.
    "full": jax.checkpoint_policies.nothing_saveable,
    # Saves the results of the matrix products and of the attention kernel.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _save_kernels
    ),
    # No rematerialisation.
    "none": None,
}


def rematerialised(block: type[nn.Module], policy: str, *, in_scan: bool = False) -> type[nn.Module]:
    """Returns a block's module type that saves for the backward pass what a policy says, and computes the rest again.

    Args:
      block: module type of the block.
      policy: one of `REMAT_POLICIES`.
      in_scan: whether the block is the body of a scan. Elsewhere XLA must be kept from merging the second forward pass
        with the first one.
    """
    found = REMAT_POLICIES[policy]
    return block if found is None else nn.remat(block, policy=found, prevent_cse=not in_scan)
