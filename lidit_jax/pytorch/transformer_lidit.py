"""LI-DiT in PyTorch: a diffusion transformer conditioned on the refined and fused features of frozen LLMs.

Implements Figure 5 of Ma, Zong, Song, Li, Liu, "Exploring the Role of Large Language Models in Prompt Encoding for
Diffusion Models" (NeurIPS 2024, arXiv 2406.11831). This file is self-contained. It belongs to the exported weights in
this folder and needs torch and diffusers.

In shapes, B is the batch size, C the model width and N the number of image tokens. For LLM i, D_i is the width of its
features, L_i the number of prompt tokens and P_i the number of tokens of the prefix (system prompt and instruction).

Matmuls run in the dtype that the model was loaded in, or in that of autocast. Norms, modulation, the conditioning
vector and the last layer always compute in float32: they are cheap, and their errors reach every token.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FORMAT_VERSION = 2  # newest version of config.json and the tensor names that this file reads
FUSIONS = ("collaborative", "concatenate")
POSITIONS = ("conv", "sincos", "rope")
EPSILON = 1e-6  # epsilon of all norms
# Base of the frequencies of all position embeddings. Prompts and token grids are short compared with an LLM's context:
# a small base separates neighbours well, and still keeps all positions distinct.
THETA = 100.0

RotaryTables = tuple[Tensor, Tensor]  # cos and sin, float32 [L, head size]


class TextFeatures(NamedTuple):
    """Features of a batch of prompts from one LLM.

    Attributes:
      instruction: features of the prefix: [P, D] if all prompts share them (causal encoder), [B, P, D] if they depend
        on the prompt (bidirectional encoder, T5).
      prompt: features of the prompts [B, L, D], padded on the right.
      mask: bool [B, L], True on the prompts' tokens.
    """

    instruction: Tensor
    prompt: Tensor
    mask: Tensor


class LIDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The trained network of LI-DiT: the refiners of the LLM features, and the diffusion transformer.

    The defaults are LI-DiT-1B (Table 7) with LLaMA3-8B and Qwen1.5-7B.

    Args:
      depth: number of blocks of the diffusion transformer.
      hidden_size: width C of the transformer and the refiners.
      num_heads: attention heads, in the transformer and the refiners.
      patch_size: side of the square of latents that forms a token.
      latent_channels: channels of the latents.
      mlp_ratio: width of the transformer's FFN divided by C.
      position: position embedding of the image tokens: "conv", a convolutional ResBlock (the paper's), "sincos",
        "rope", or several joined by "+".
      position_grid: side in tokens of the square grid on which neighbours have distance 1, for "sincos" and "rope".
      refiner_blocks: blocks of each linguistic token refiner; 0 leaves it out.
      refiner_gated: gates in the linguistic token refiners (ablated in Table 5).
      refiner_causal: causal attention in the linguistic token refiners (ablated in Table 3).
      refiner_rotary: rotary positions in the refiners, counted from the prompt's first token.
      refiner_qk_norm: RMSNorm on queries and keys of the refiners too.
      refiner_mlp_ratio: width of the refiners' FFN divided by C.
      fusion: "collaborative", a collaborative refiner and then concatenation, or "concatenate" (Table 6).
      collaborative_blocks: blocks of the collaborative refiner.
      text_widths: feature width D_i of each LLM.
      format_version: version of the folder that the model is loaded from.

    Raises:
      ValueError: the sizes do not fit together, a value is unknown, or the format is newer than this file.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LIDiTBlock", "LinguisticTokenRefinerBlock", "CollaborativeRefinerBranch"]
    _repeated_blocks = ["LIDiTBlock"]
    # Never store layers that compute in float32 in 8 bits. 16 bits are fine: they cast their weights. diffusers'
    # `_keep_in_fp32_modules` is not needed for that, and would make loading fail without accelerate.
    _skip_layerwise_casting_patterns = ["timestep_embedder", "pooled_texts", "norm", "patch_embedding", "output"]

    @register_to_config
    def __init__(
        self,
        depth: int = 28,
        hidden_size: int = 1152,
        num_heads: int = 16,
        patch_size: int = 2,
        latent_channels: int = 16,
        mlp_ratio: float = 4.0,
        position: str = "conv",  # also that of format 1, which lacks the key
        position_grid: int = 16,
        refiner_blocks: int = 2,
        refiner_gated: bool = True,
        refiner_causal: bool = False,
        refiner_rotary: bool = True,
        refiner_qk_norm: bool = False,
        refiner_mlp_ratio: float = 4.0,
        fusion: str = "collaborative",
        collaborative_blocks: int = 1,
        text_widths: Sequence[int] = (4096, 4096),
        format_version: int = FORMAT_VERSION,
    ):
        super().__init__()
        if format_version > FORMAT_VERSION:
            raise ValueError(
                f"the model has format_version {format_version}, but this transformer_lidit.py reads up to "
                f"{FORMAT_VERSION}: use the file that came with the weights"
            )
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}")
        if refiner_rotary and hidden_size // num_heads % 2:
            raise ValueError(
                f"hidden_size / num_heads = {hidden_size // num_heads} is odd, but rotary positions need an even size"
            )
        if fusion not in FUSIONS:
            raise ValueError(f"fusion={fusion!r} is unknown: use one of {', '.join(FUSIONS)}")
        if not set(position.split("+")) <= set(POSITIONS):
            raise ValueError(f"position={position!r} is unknown: join {', '.join(POSITIONS)} by '+'")
        if "rope" in position and hidden_size // num_heads % 4:
            raise ValueError(f"hidden_size / num_heads = {hidden_size // num_heads} is not divisible by 4, for 'rope'")

        self.timestep_embedder = TimestepEmbedder(hidden_size)
        self.text_condition = TextCondition(
            text_widths,
            hidden_size,
            num_heads,
            refiner_mlp_ratio,
            refiner_blocks,
            collaborative_blocks if fusion == "collaborative" and len(text_widths) > 1 else 0,
            gated=refiner_gated,
            causal=refiner_causal,
            rotary=refiner_rotary,
            qk_norm=refiner_qk_norm,
        )
        sizes = (depth, hidden_size, num_heads, patch_size, latent_channels, mlp_ratio)
        self.dit = DiT(*sizes, position=position.split("+"), position_grid=position_grid)
        self._initialise_weights()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Sequence[Tensor],
        encoder_attention_mask: Sequence[Tensor],
        instruction_hidden_states: Sequence[Tensor],
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predicts the target of the noise schedule (noise, v or velocity) for noisy latents.

        Args:
          hidden_states: latents [B, latent channels, H, W]; H and W are multiples of the patch size.
          timestep: [B], or a scalar for the batch, in [0, 1000).
          encoder_hidden_states: for each LLM the features [B, L_i, D_i] of the prompts, padded on the right.
          encoder_attention_mask: for each LLM a bool mask [B, L_i], True on the prompts' tokens. Each row has at least
            one: even an empty prompt has an end token.
          instruction_hidden_states: for each LLM the features of the prefix: [P_i, D_i] if all prompts share them, or
            [B, P_i, D_i] from a bidirectional encoder. P_i may be 0.
          return_dict: False returns a tuple.

        Returns:
          An output with `.sample` [B, latent channels, H, W] in the dtype of `hidden_states`.

        Raises:
          ValueError: a shape does not fit the model.
        """
        text = [
            TextFeatures(*features)
            for features in zip(
                *self._checked_lists(encoder_hidden_states, encoder_attention_mask, instruction_hidden_states),
                strict=True,
            )
        ]
        self._check_shapes(hidden_states, text)
        dtype = self.dit.patch_embedding.bias.dtype  # never quantised; `self.dtype` would take a millisecond
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(hidden_states.shape[0])

        time = self.timestep_embedder(timestep)  # [B, C]
        condition, mask, pooled = self.text_condition(text, time, dtype)
        sample = self.dit(hidden_states.to(dtype), condition, mask, time + pooled).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _checked_lists(
        self, prompts: Sequence[Tensor], masks: Sequence[Tensor], instructions: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """Checks that each list has one entry per LLM, and returns (instructions, prompts, bool masks)."""
        expected = len(self.config.text_widths)
        named = {
            "instruction_hidden_states": instructions,
            "encoder_hidden_states": prompts,
            "encoder_attention_mask": masks,
        }
        for name, values in named.items():
            if isinstance(values, Tensor) or len(values) != expected:
                found = "a tensor" if isinstance(values, Tensor) else f"{len(values)}"
                raise ValueError(f"{name} must be a list of {expected}, one for each LLM, but is {found}")
        return instructions, prompts, [mask.bool() for mask in masks]

    def _check_shapes(self, latents: Tensor, text: Sequence[TextFeatures]) -> None:
        channels, patch = self.config.latent_channels, self.config.patch_size
        if latents.ndim != 4 or latents.shape[1] != channels:
            raise ValueError(f"hidden_states must be [batch, {channels}, height, width], not {list(latents.shape)}")
        batch, _, height, width = latents.shape
        if height % patch or width % patch:
            raise ValueError(f"latents of {height} x {width} are not divisible by patch_size={patch}")
        for i, (features, features_width) in enumerate(zip(text, self.config.text_widths, strict=True)):
            shape = list(features.prompt.shape)
            if len(shape) != 3 or shape[0] != batch or shape[2] != features_width:
                raise ValueError(
                    f"encoder_hidden_states[{i}] must be [{batch}, length, {features_width}] for these latents, "
                    f"not {shape}"
                )
            if list(features.mask.shape) != shape[:2]:
                raise ValueError(f"encoder_attention_mask[{i}] must be {shape[:2]}, not {list(features.mask.shape)}")
            found = list(features.instruction.shape)
            if found[-1:] != [features_width] or len(found) not in (2, 3) or found[:-2] not in ([], [batch]):
                raise ValueError(
                    f"instruction_hidden_states[{i}] must be [length, {features_width}] or [{batch}, length, "
                    f"{features_width}], not {found}"
                )

    def _initialise_weights(self) -> None:
        """Initialises the weights for training from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                deviation = math.sqrt(1 / (9 * module.in_channels)) / 0.87962566  # std of a normal truncated at two std
                nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
                nn.init.zeros_(module.bias)
        # Zero gates make each block the identity at the start (adaLN-Zero, DiT section 3.2), also in the refiners.
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        # The initial prediction is zero, the mean of the target.
        nn.init.zeros_(self.dit.output.weight)


# --- the conditioning (Figure 5, left) ------------------------------------------------------------------------------


class TextCondition(nn.Module):
    """Per LLM: project -> linguistic token refiner; then collaborative refiner -> truncate -> concatenate.

    Args:
      text_widths: feature width D_i of each LLM.
      hidden_size: width C.
      num_heads: attention heads of the refiners.
      mlp_ratio: width of the refiners' FFN divided by C.
      token_refiner_blocks: blocks of each linguistic token refiner.
      collaborative_blocks: blocks of the collaborative refiner; 0 concatenates the outputs of the token refiners.
      gated: gates in the token refiners.
      causal: causal attention in the token refiners.
      rotary: rotary positions in both refiners.
      qk_norm: RMSNorm on queries and keys of both refiners.
    """

    def __init__(
        self,
        text_widths: Sequence[int],
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        token_refiner_blocks: int,
        collaborative_blocks: int,
        *,
        gated: bool,
        causal: bool,
        rotary: bool,
        qk_norm: bool,
    ):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.rotary = rotary
        sizes = (hidden_size, num_heads, mlp_ratio)
        self.projections = nn.ModuleList(FeatureProjection(width, hidden_size) for width in text_widths)
        self.pooled_texts = nn.ModuleList(PooledText(hidden_size) for _ in text_widths)
        self.token_refiners = nn.ModuleList(
            LinguisticTokenRefiner(token_refiner_blocks, *sizes, gated=gated, causal=causal, qk_norm=qk_norm)
            for _ in text_widths
        )
        self.collaborative_refiner = CollaborativeRefiner(
            collaborative_blocks, len(text_widths), *sizes, qk_norm=qk_norm
        )

    def forward(self, text: Sequence[TextFeatures], time: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """text of n LLMs, time [B, C] -> condition [B, sum L_i, C], mask bool [B, sum L_i], pooled text [B, C]."""
        branches, masks, pooled = [], [], []
        rotary = [self._rotary_tables(features) for features in text]
        modules = zip(self.projections, self.pooled_texts, self.token_refiners, strict=True)
        for features, tables, (projection, pool, refiner) in zip(text, rotary, modules, strict=True):
            x, mask = projection(features, dtype)  # [B, P + L, C]
            pooled.append(pool(x, mask))  # [B, C]
            branches.append(refiner(x, mask, time + pooled[-1], tables))
            masks.append(mask)
        branches = self.collaborative_refiner(branches, masks, [time + p for p in pooled], rotary)

        # Drop the tokens of system prompt and instruction only here, after the refiners have attended to them.
        branches = [x[:, features.instruction.shape[-2] :] for x, features in zip(branches, text, strict=True)]
        mask = torch.cat([features.mask for features in text], dim=1)
        return torch.cat(branches, dim=1), mask, sum(pooled)

    def _rotary_tables(self, features: TextFeatures) -> RotaryTables | None:
        """Returns rotary tables [P + L, head size] whose position 0 is the prompt's first token.

        This keeps the same words of two LLMs close to each other, whatever the lengths of their prefixes.
        """
        if not self.rotary:
            return None
        before, length = features.instruction.shape[-2], features.prompt.shape[1]
        return rotary_tables(torch.arange(-before, length, device=features.prompt.device), self.head_dim)


class FeatureProjection(nn.Module):
    """RMS-normalises LLM features and projects them to the width of the transformer."""

    def __init__(self, text_width: int, hidden_size: int):
        super().__init__()
        self.norm = RMSNorm(text_width)
        self.linear = nn.Linear(text_width, hidden_size)

    def forward(self, features: TextFeatures, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """features of one LLM -> x [B, P + L, C], mask bool [B, P + L] (True on the whole prefix)."""
        batch, length = features.prompt.shape[0], features.instruction.shape[-2]
        # A prefix that all prompts share is projected once.
        instruction = self.linear(self.norm(features.instruction).to(dtype)).expand(batch, -1, -1)
        prompt = self.linear(self.norm(features.prompt).to(dtype))
        mask = torch.cat([features.mask.new_ones(batch, length), features.mask], dim=1)
        return torch.cat([instruction, prompt], dim=1), mask


class PooledText(nn.Module):
    """Masked mean over the tokens, then a two-layer MLP; the result is added to the timestep embedding."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_in = Float32Linear(hidden_size, hidden_size)
        self.linear_out = Float32Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, C], mask bool [B, L] -> float32 [B, C]."""
        weights = mask[..., None].float()
        mean = (x.float() * weights).sum(1) / weights.sum(1)
        return self.linear_out(F.silu(self.linear_in(mean)))


def run_block(parent: nn.Module, block: nn.Module, *inputs: Any) -> Tensor:
    """Calls a block; rematerialises it in the backward pass if gradient checkpointing is enabled for its parent."""
    if parent.gradient_checkpointing and torch.is_grad_enabled():
        return parent._gradient_checkpointing_func(block, *inputs)
    return block(*inputs)


class LinguisticTokenRefiner(nn.Module):
    """Refines one LLM's features with full self-attention, so that early tokens attend to later ones too."""

    def __init__(
        self,
        num_blocks: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        gated: bool,
        causal: bool,
        qk_norm: bool,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        self.causal = causal
        sizes = (hidden_size, num_heads, mlp_ratio)
        self.blocks = nn.ModuleList(
            LinguisticTokenRefinerBlock(*sizes, gated=gated, qk_norm=qk_norm) for _ in range(num_blocks)
        )

    def forward(self, x: Tensor, mask: Tensor, conditioning: Tensor, rotary: RotaryTables | None) -> Tensor:
        """x [B, L, C], mask bool [B, L], conditioning [B, C] -> [B, L, C]."""
        mask = mask[:, None, None]  # [B, 1, 1, L]
        if self.causal:
            mask = mask & mask.new_ones(x.shape[1], x.shape[1]).tril()
        for block in self.blocks:
            x = run_block(self, block, x, mask, conditioning, rotary)
        return x


class LinguisticTokenRefinerBlock(nn.Module):
    """Self-attention -> gate -> FFN -> gate, each with a residual. Gates only: no shift or scale before a sublayer."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, gated: bool, qk_norm: bool):
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size)
        self.attention = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.feed_forward_norm = RMSNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size, mlp_ratio)
        self.gates = Modulation(hidden_size, 2) if gated else None

    def forward(self, x: Tensor, mask: Tensor, conditioning: Tensor, rotary: RotaryTables | None) -> Tensor:
        """x [B, L, C], mask as in `Attention`, conditioning (pooled text + timestep) [B, C] -> [B, L, C]."""
        gate_1, gate_2 = (None, None) if self.gates is None else self.gates(conditioning, x.dtype)
        x = x + gated(self.attention(self.attention_norm(x), mask=mask, rotary=rotary), gate_1)
        return x + gated(self.feed_forward(self.feed_forward_norm(x)), gate_2)


class CollaborativeRefiner(nn.Module):
    """Blocks in which the branch of each LLM cross-attends to all other branches, as they were before the block.

    With 0 blocks, the branches pass unchanged.
    """

    def __init__(
        self,
        num_blocks: int,
        num_branches: int,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        *,
        qk_norm: bool,
    ):
        super().__init__()
        self.gradient_checkpointing = False
        sizes = (hidden_size, num_heads, mlp_ratio)
        self.blocks = nn.ModuleList(
            nn.ModuleList(CollaborativeRefinerBranch(*sizes, qk_norm=qk_norm) for _ in range(num_branches))
            for _ in range(num_blocks)
        )

    def forward(
        self,
        branches: Sequence[Tensor],
        masks: Sequence[Tensor],
        conditionings: Sequence[Tensor],
        rotary: Sequence[RotaryTables | None],
    ) -> Sequence[Tensor]:
        """Per LLM: features [B, L_i, C], mask bool [B, L_i], conditioning [B, C], tables -> features [B, L_i, C]."""
        for block in self.blocks:
            refined = []
            for i, branch in enumerate(block):
                others = torch.cat(_all_but(i, branches), dim=1)
                others_mask = torch.cat(_all_but(i, masks), dim=1)[:, None, None]  # [B, 1, 1, M]
                others_rotary = None
                if rotary[i] is not None:
                    cos, sin = zip(*_all_but(i, rotary), strict=True)
                    others_rotary = torch.cat(cos), torch.cat(sin)
                inputs = (branches[i], others, others_mask, conditionings[i], rotary[i], others_rotary)
                refined.append(run_block(self, branch, *inputs))
            branches = refined
        return branches


class CollaborativeRefinerBranch(nn.Module):
    """One LLM's branch: cross-attention to the other branches, then FFN; scale and shift before, gate after each."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, *, qk_norm: bool):
        super().__init__()
        self.attention_norm = RMSNorm(hidden_size)
        self.context_norm = RMSNorm(hidden_size)
        self.cross_attention = Attention(hidden_size, num_heads, qk_norm=qk_norm)
        self.feed_forward_norm = RMSNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size, mlp_ratio)
        self.modulation = Modulation(hidden_size, 6)

    def forward(
        self,
        x: Tensor,
        others: Tensor,
        others_mask: Tensor,
        conditioning: Tensor,
        rotary: RotaryTables | None,
        others_rotary: RotaryTables | None,
    ) -> Tensor:
        """x [B, L, C], others [B, M, C], others_mask bool [B, 1, 1, M], conditioning [B, C] -> [B, L, C]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(conditioning, x.dtype)
        h = modulate(self.attention_norm(x), shift_1, scale_1).to(x.dtype)
        y = self.cross_attention(h, self.context_norm(others), others_mask, rotary, others_rotary)
        x = x + gated(y, gate_1)
        h = modulate(self.feed_forward_norm(x), shift_2, scale_2).to(x.dtype)
        return x + gated(self.feed_forward(h), gate_2)


def _all_but(i: int, items: Sequence) -> list:
    return [item for j, item in enumerate(items) if j != i]


# --- the diffusion transformer (Figure 5, right) --------------------------------------------------------------------


class DiT(nn.Module):
    """Patchify, position embedding, `depth` blocks, adaLN output; for latents of any size that the patch divides.

    Args:
      depth: number of blocks.
      hidden_size: width C.
      num_heads: attention heads.
      patch_size: side of the square of latents that forms a token.
      latent_channels: channels of the latents.
      mlp_ratio: width of the FFN divided by C.
      position: position embeddings to use, from `POSITIONS`.
      position_grid: see `LIDiTTransformer2DModel`.
    """

    def __init__(
        self,
        depth: int,
        hidden_size: int,
        num_heads: int,
        patch_size: int,
        latent_channels: int,
        mlp_ratio: float,
        *,
        position: Sequence[str],
        position_grid: int,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.head_dim = hidden_size // num_heads
        self.position, self.position_grid = tuple(position), position_grid
        self.gradient_checkpointing = False
        features = patch_size**2 * latent_channels
        self.patch_embedding = nn.Linear(features, hidden_size)
        self.position_embedding = ConvPositionEmbedding(hidden_size) if "conv" in position else nn.Identity()
        self.blocks = nn.ModuleList(LIDiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_modulation = Modulation(hidden_size, 2)
        self.output = Float32Linear(hidden_size, features)

    def forward(self, latents: Tensor, text: Tensor, text_mask: Tensor, conditioning: Tensor) -> Tensor:
        """latents [B, c, H, W], text [B, M, C], text_mask bool [B, M], conditioning [B, C] -> float32 [B, c, H, W]."""
        h, w = (side // self.patch_size for side in latents.shape[-2:])
        text_mask = text_mask[:, None, None]  # [B, 1, 1, M]

        x = self.patch_embedding(patchify(latents, self.patch_size))  # [B, h, w, C]
        rows, columns = grid_coordinates(h, w, self.position_grid, x.device)
        if "sincos" in self.position:
            x = x + sincos_embedding(rows, columns, x.shape[-1]).to(x.dtype)
        x = self.position_embedding(x).flatten(1, 2)  # [B, N, C]
        rotary = rope_tables(rows, columns, self.head_dim) if "rope" in self.position else None
        for block in self.blocks:
            x = run_block(self, block, x, text, text_mask, conditioning, rotary)
        shift, scale = self.final_modulation(conditioning, x.dtype)
        x = self.output(modulate(layer_norm(x), shift, scale))  # [B, N, patch^2 C_latents]
        return unpatchify(x.unflatten(1, (h, w)), self.patch_size)


class ConvPositionEmbedding(nn.Module):
    """Convolutional ResBlock on the grid of tokens (section 3.2).

    Its zero padding encodes a token's distance to the borders, up to two tokens.
    """

    BOTTLENECK = 4  # C divided by the inner width

    def __init__(self, hidden_size: int):
        super().__init__()
        inner = hidden_size // self.BOTTLENECK
        self.conv_in = nn.Conv2d(hidden_size, inner, 3, padding=1)
        self.conv_out = nn.Conv2d(inner, hidden_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, h, w, C] -> [B, h, w, C]."""
        h = self._convolve(self.conv_in, F.silu(layer_norm(x)).to(x.dtype))
        return x + self._convolve(self.conv_out, F.silu(layer_norm(h)).to(x.dtype))

    @staticmethod
    def _convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels-last memory layout


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text and FFN, each with shift and scale before and a gate after it."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.self_attention = Attention(hidden_size, num_heads, qk_norm=True)
        self.cross_attention = Attention(hidden_size, num_heads, qk_norm=True)
        self.feed_forward = FeedForward(hidden_size, mlp_ratio)
        self.modulation = Modulation(hidden_size, 9)

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor, conditioning: Tensor, rotary: RotaryTables | None
    ) -> Tensor:
        """x [B, N, C], text [B, M, C], text_mask bool [B, 1, 1, M], conditioning [B, C] -> [B, N, C]."""
        vectors = self.modulation(conditioning, x.dtype)
        x = self._sublayer(x, lambda h: self.self_attention(h, rotary=rotary), *vectors[0:3])
        x = self._sublayer(x, lambda h: self.cross_attention(h, text, text_mask), *vectors[3:6])
        return self._sublayer(x, self.feed_forward, *vectors[6:9])

    @staticmethod
    def _sublayer(x: Tensor, layer: Callable[[Tensor], Tensor], shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gated(layer(modulate(layer_norm(x), shift, scale).to(x.dtype)), gate)


def patchify(x: Tensor, patch: int) -> Tensor:
    """[B, C, h*p, w*p] -> [B, h, w, p*p*C]."""
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B, C, h, p, w, p]
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    """[B, h, w, p*p*C] -> [B, C, h*p, w*p]; the inverse of `patchify`."""
    x = x.unflatten(3, (patch, patch, -1))  # [B, h, w, p, p, C]
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


# --- shared layers --------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention, or cross-attention to a context.

    With `qk_norm`, queries and keys are RMS-normalised over the head size (section 3.2). This bounds the logits and
    keeps deep models stable in bfloat16.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(hidden_size, hidden_size)
        self.to_k = nn.Linear(hidden_size, hidden_size)
        self.to_v = nn.Linear(hidden_size, hidden_size)
        self.norm_q = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.norm_k = RMSNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: RotaryTables | None = None,
        context_rotary: RotaryTables | None = None,
    ) -> Tensor:
        """x [B, L, C], context [B, M, C] (default: x) -> [B, L, C].

        Args:
          x: input of the queries.
          context: input of keys and values.
          mask: bool, broadcastable to [B, heads, L, M], True where a key may be attended to.
          rotary: rotary tables of the queries, and of the keys without `context_rotary`; None rotates neither.
          context_rotary: rotary tables of the keys.
        """
        context = x if context is None else context
        query = self.norm_q(self._heads(self.to_q(x)))  # [B, L, heads, head size]
        key = self.norm_k(self._heads(self.to_k(context)))
        value = self._heads(self.to_v(context))
        if rotary is not None:
            query = rotate(query, rotary)
            key = rotate(key, rotary if context_rotary is None else context_rotary)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))  # [B, heads, L, head size]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class FeedForward(nn.Module):
    """Linear, tanh-GELU, linear: [B, L, C] -> [B, L, C]."""

    def __init__(self, hidden_size: int, mlp_ratio: float):
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.linear_in = nn.Linear(hidden_size, inner)
        self.linear_out = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_out(F.gelu(self.linear_in(x), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Sinusoidal timestep embedding (DDPM), cosines before sines, then a two-layer MLP."""

    FREQUENCY_FEATURES = 256
    MAX_PERIOD = 10_000.0

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_in = Float32Linear(self.FREQUENCY_FEATURES, hidden_size)
        self.linear_out = Float32Linear(hidden_size, hidden_size)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> float32 [B, C]."""
        half = self.FREQUENCY_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timestep.device) / half
        angles = timestep.float()[:, None] * torch.exp(-math.log(self.MAX_PERIOD) * exponents)  # [B, 128]
        x = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.linear_out(F.silu(self.linear_in(x)))


class Modulation(nn.Module):
    """Maps the conditioning vector to `num_vectors` vectors of width C: SiLU, then a zero-initialised linear layer."""

    def __init__(self, hidden_size: int, num_vectors: int):
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(hidden_size, num_vectors * hidden_size)

    def forward(self, conditioning: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """conditioning float32 [B, C], dtype of the matmul -> `num_vectors` tensors, float32 [B, C]."""
        return self.linear(F.silu(conditioning).to(dtype)).float().chunk(self.num_vectors, dim=-1)


class Float32Linear(nn.Linear):
    """Linear layer that computes in float32 whatever the dtype of its weights, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis; computes in float32, returns the dtype of x."""

    def __init__(self, features: int):
        super().__init__(features, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """Returns LayerNorm(x) in float32, without learned scale and shift, which adaLN's modulation replaces."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Applies adaLN's modulation: x [B, L, C], shift and scale [B, C] -> float32 [B, L, C]."""
    return x.float() * (1.0 + scale[:, None]) + shift[:, None]


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """Multiplies y [B, L, C] by a gate [B, C] in float32 and returns the dtype of y; a gate of None returns y."""
    return y if gate is None else (gate[:, None] * y).to(y.dtype)


def rotary_tables(positions: Tensor, head_dim: int) -> RotaryTables:
    """Returns the rotary tables (RoFormer) of positions int [L]: cos and sin, float32 [L, head size] each."""
    return tables_of_angles(angles_of(positions.float(), head_dim // 2))


def rope_tables(rows: Tensor, columns: Tensor, head_dim: int) -> RotaryTables:
    """Returns axial rotary tables (Heo et al. 2024) of a grid of tokens: rows [h], columns [w] -> [h * w, head size].

    Half of a head's pairs rotate with the row, half with the column.
    """
    shape = (len(rows), len(columns), head_dim // 4)
    row_angles = angles_of(rows, head_dim // 4)[:, None].expand(shape)
    column_angles = angles_of(columns, head_dim // 4)[None].expand(shape)
    return tables_of_angles(torch.cat([row_angles, column_angles], dim=-1).flatten(0, 1))


def sincos_embedding(rows: Tensor, columns: Tensor, features: int) -> Tensor:
    """Returns the 2-D sine-cosine position embedding of a grid: rows [h], columns [w] -> float32 [h, w, features].

    The first half of the features encodes the row, the second the column, each as sines before cosines. If 4 does not
    divide the number of features, the remainder is zero.
    """
    quarter = features // 4
    shape = (len(rows), len(columns), 2 * quarter)
    row_angles, column_angles = angles_of(rows, quarter), angles_of(columns, quarter)
    row_angles = torch.cat([row_angles.sin(), row_angles.cos()], dim=-1)[:, None].expand(shape)
    column_angles = torch.cat([column_angles.sin(), column_angles.cos()], dim=-1)[None].expand(shape)
    return F.pad(torch.cat([row_angles, column_angles], dim=-1), (0, features - 4 * quarter))


def grid_coordinates(height: int, width: int, reference_side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the coordinates of a grid's rows [height] and columns [width], float32, relative to its centre.

    They are scaled so that a grid of any size and aspect ratio covers the area reference_side^2: a layout then keeps
    its coordinates at another resolution.
    """
    unit = reference_side / math.sqrt(height * width)
    rows, columns = (
        (torch.arange(side, dtype=torch.float32, device=device) - (side - 1) / 2) * unit for side in (height, width)
    )
    return rows, columns


def angles_of(positions: Tensor, count: int) -> Tensor:
    """Returns the angles [L, count] of positions float32 [L] at `count` geometrically spaced frequencies."""
    exponents = torch.arange(count, dtype=torch.float32, device=positions.device) / count
    return positions[:, None] * (1.0 / THETA**exponents)


def tables_of_angles(angles: Tensor) -> RotaryTables:
    """Returns cos and sin [L, head size] of angles [L, head size / 2], repeated for both halves of a head."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Applies rotary tables to x [B, L, heads, head size] in float32 and returns the dtype of x."""
    cos, sin = (table[:, None] for table in tables)
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
