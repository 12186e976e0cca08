"""Hyper-parameters of LI-DiT: the `model` section of a config."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from lidit_jax.errors import UserError
from lidit_jax.models.attention import check_implementation
from lidit_jax.models.layers import LayerConfig, check_dtype
from lidit_jax.models.positions import ROPE, parse_position
from lidit_jax.models.remat import REMAT_POLICIES
from lidit_jax.ranges import Blocks, BlocksOrZero, Count, Size, above, at_most, between, check_ranges

FUSIONS = ("collaborative", "concatenate")
# Fields that change how, not what, the model computes.
COMPUTE_FIELDS = ("dtype", "attention", "remat", "scan_unroll")


_Ratio = Annotated[float, above(0), at_most(1000)]


@dataclasses.dataclass(frozen=True)
class LIDiTConfig:
    """Sizes of LI-DiT (paper Table 7) and the options that its ablations vary (Tables 2, 3, 5 and 6).

    Attributes:
      depth: number of DiT blocks.
      hidden_size: width of the DiT and of both refiners; num_heads divides it.
      num_heads: attention heads of the DiT and of both refiners.
      patch_size: side of a patch in latent positions (paper: 2).
      latent_channels: channels of the latents (paper: 16).
      mlp_ratio: inner width of the DiT's FFN as a multiple of hidden_size.
      position: position embedding of the image tokens: "conv" (paper), "sincos", "rope" (ours), or several joined by
        "+"; see `models/positions.py`.
      position_grid: side, in tokens, of the square grid on which neighbouring tokens are 1 apart for "sincos" and
        "rope": the grid of the first training resolution. Fine-tuning at another resolution keeps it, so that a learned
        layout carries over.
      refiner_blocks: blocks of each linguistic token refiner (paper: 2); 0 removes the refiner.
      refiner_gated: gates in the linguistic token refiner (False: Table 5, without the gate).
      refiner_causal: causal attention in the linguistic token refiner (True: Table 3, with a causal mask).
      refiner_rotary: rotary positions in the attention of both refiners (ours), counted from the prompt's first token,
        so that the same words have nearly the same positions for two LLMs whatever the length of their prefixes.
      refiner_qk_norm: RMSNorm of queries and keys in the refiners too (ours: the paper states it only for the layers
        of the DiT, section 3.2); it bounds their logits in bfloat16.
      refiner_mlp_ratio: inner width of the refiners' FFN as a multiple of hidden_size (ours: 4, as in the DiT).
      fusion: "collaborative" (collaborative refiner, then concatenation) or "concatenate" (Table 6).
      collaborative_blocks: blocks of the collaborative refiner (paper: 1).
      remat: rematerialisation policy of the blocks of the refiners and of the DiT, one of `REMAT_POLICIES`.
      scan_unroll: DiT blocks per iteration of the scan; more compile longer and, on a CPU, run slightly faster.
      attention: attention implementation, see `dot_product_attention`.
      dtype: compute dtype, "float32" or "bfloat16" (paper section 3.2: bfloat16 mixed precision).

    Raises:
      UserError: if a value is not supported or two do not fit together.
    """

    depth: Blocks
    hidden_size: Annotated[int, between(4, 2**20)]
    num_heads: Size
    patch_size: Annotated[int, between(1, 1024)] = 2
    latent_channels: Size = 16
    mlp_ratio: _Ratio = 4.0
    position: str = "conv+sincos+rope"
    position_grid: Count = 16
    refiner_blocks: BlocksOrZero = 2
    refiner_gated: bool = True
    refiner_causal: bool = False
    refiner_rotary: bool = True
    refiner_qk_norm: bool = False
    refiner_mlp_ratio: _Ratio = 4.0
    fusion: str = "collaborative"
    collaborative_blocks: BlocksOrZero = 1
    remat: str = "full"
    scan_unroll: Count = 1
    attention: str = "auto"
    dtype: str = "bfloat16"

    def __post_init__(self):
        check_ranges(self, "model.")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"model.hidden_size={self.hidden_size} is not divisible by model.num_heads={self.num_heads}"
            )
        for name in ("mlp_ratio", "refiner_mlp_ratio"):
            if int(self.hidden_size * getattr(self, name)) < 1:
                raise UserError(
                    f"model.{name}={getattr(self, name)} gives a feed-forward width of 0: use a larger value"
                )
        if self.refiner_rotary and self.head_dim % 2:
            raise UserError(
                f"model.hidden_size / model.num_heads = {self.head_dim} is odd, but rotary positions need an even head "
                "size: change one of them, or set model.refiner_rotary=False"
            )
        if ROPE in parse_position(self.position) and self.head_dim % 4:
            raise UserError(
                f"model.hidden_size / model.num_heads = {self.head_dim} is not divisible by 4, as 'rope' in "
                "model.position requires: change one of them, or model.position"
            )
        check_dtype("model.dtype", self.dtype)
        check_implementation(self.attention)
        if self.fusion not in FUSIONS:
            raise UserError(f"model.fusion={self.fusion!r} is unknown: use one of {', '.join(FUSIONS)}")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"model.remat={self.remat!r} is unknown: use one of {', '.join(REMAT_POLICIES)}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def dit_layers(self) -> LayerConfig:
        """Layer hyper-parameters of the DiT, with QK-norm (paper section 3.2)."""
        return LayerConfig(self.num_heads, self.mlp_ratio, True, self.attention, jnp.dtype(self.dtype), self.remat)

    @property
    def refiner_layers(self) -> LayerConfig:
        """Layer hyper-parameters of both refiners."""
        return LayerConfig(
            self.num_heads,
            self.refiner_mlp_ratio,
            self.refiner_qk_norm,
            self.attention,
            jnp.dtype(self.dtype),
            self.remat,
        )
