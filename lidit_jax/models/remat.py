"""Rematerialisation policies: what a block saves for its backward pass."""

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
