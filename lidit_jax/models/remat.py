"""Rematerialisation policies: what a block saves for its backward pass.

In units of one activation of the block, [B, L, C] in its compute dtype, a DiT block saves its input and, by policy:

    policy         saves besides                                            units   FLOPs repeated
    full           nothing                                                      0   100 % of the forward pass
    ffn            the FFN's output                                             1   75 %
    outputs        and the outputs of both attentions                           3   63 %
    attention      and the results of the attention kernel (TPU)                5   56 %
    projections    and queries, keys and values                                10   25 %
    dots           and the FFN's hidden activations: every matrix product      14   0 %
    none           and every other result of the block, such as those of norms and activation functions

Units and FLOPs are those of the 10B model's blocks at 512 px with prompts of 256 tokens.

The order is that of the repeated FLOPs that a unit of memory spares: the FFN's output spares the most, because it is
four times as expensive as an equally large projection.
"""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from lidit_jax.models import splash_attention

FFN_OUTPUT, ATTENTION_OUTPUT, PROJECTION = "ffn_output", "attention_output", "projection"  # names of saved results


def _save(*names: str):
    return jax.checkpoint_policies.save_only_these_names(*names)


_OUTPUTS = (FFN_OUTPUT, ATTENTION_OUTPUT)
_KERNEL = splash_attention.CHECKPOINT_NAME

# From the least memory to the fewest repeated FLOPs.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "ffn": _save(FFN_OUTPUT),
    "outputs": _save(*_OUTPUTS),
    "attention": _save(*_OUTPUTS, _KERNEL),
    "projections": _save(*_OUTPUTS, _KERNEL, PROJECTION),
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _save(_KERNEL)
    ),
    "none": None,
}


def saved_as(name: str, x: jax.Array) -> jax.Array:
    """Names a result that policies may save."""
    return checkpoint_name(x, name)


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
