"""LI-DiT: several frozen LLMs' features, refined and fused, condition a diffusion transformer.

After Ma, Zong, Song, Li, Liu, "Exploring the Role of Large Language Models in Prompt Encoding for Diffusion Models"
(NeurIPS 2024, arXiv 2406.11831), Figure 5. This file stands alone beside the weights that it was exported with and
needs torch and diffusers.

In shapes, B is the batch, C the model's width, N the picture's tokens; of LLM i, D_i is the width of its features, L_i
the tokens of the prompts and P_i those of the system prompt and the instruction before them.

Matrix products run in the dtype that the model was loaded in, or in autocast's. Norms, modulation, the conditioning
vector and the last layer compute in float32 in either case: they are cheap, and errors in them reach every token.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

FORMAT_VERSION = 2  # of config.json and the names of the weights
FUSIONS = ("collaborative", "concatenate")
POSITIONS = ("conv", "sincos", "rope")
EPSILON = 1e-6  # of all norms
# Base of all positions' frequencies. Prompts and grids of tokens are short beside an LLM's context: with a small base
# neighbours are easy to find, and no two positions look alike.
THETA = 100.0

RotaryTables = tuple[Tensor, Tensor]  # cos and sin, float32 [L, head size]


class TextFeatures(NamedTuple):
    """What one LLM says of a batch of prompts.

    Attributes:
      instruction: [P, D], of what stands before every prompt; [B, P, D] where the prompt changes it, as it does in a
        bidirectional encoder (T5).
      prompt: [B, L, D], padded on the right.
      mask: bool [B, L], True on the prompts' tokens.
    """

    instruction: Tensor
    prompt: Tensor
    mask: Tensor


class LIDiTTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The trained part of LI-DiT: the refiners of the LLMs' features, and the diffusion transformer.

    The defaults are LI-DiT-1B (Table 7) with LLaMA3-8B and Qwen1.5-7B.

    Args:
      depth: blocks of the diffusion transformer.
      hidden_size: C, of the transformer and the refiners.
      num_heads: of every attention.
      patch_size: side of the square of latents that makes a token.
      latent_channels: of the latents.
      mlp_ratio: width of the blocks' FFN over C.
      refiner_blocks: of each linguistic token refiner; 0 leaves it out.
      refiner_gated, refiner_causal: switches of Tables 5 and 3.
      position: how the image's tokens know where they are: "conv", a convolutional ResBlock (the paper's), "sincos",
        "rope", or several joined by "+".
      position_grid: side in tokens of the square grid on which neighbours are 1 apart for "sincos" and "rope".
      refiner_rotary: rotary positions in the refiners, counted from the prompt's first token.
      refiner_qk_norm: RMSNorm of queries and keys in the refiners too.
      refiner_mlp_ratio: width of the refiners' FFN over C.
      fusion: "collaborative", a collaborative refiner and then concatenation, or "concatenate" (Table 6).
      collaborative_blocks: of the collaborative refiner.
      text_widths: D_i of each LLM.
      format_version: of the folder that the model is loaded from.

    Raises:
      ValueError: the sizes do not fit together, a switch is unknown, or the format is newer than this file.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["LIDiTBlock", "LinguisticTokenRefinerBlock", "CollaborativeRefinerBranch"]
    _repeated_blocks = ["LIDiTBlock"]
    # What computes in float32 is not stored in 8 bits. It may be in 16: with `_keep_in_fp32_modules` diffusers would
    # load nothing where accelerate is missing, and these layers compute in float32 without it.
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
        position: str = "conv",  # also of folders of format 1, which do not say it
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
                f"the model has format_version {format_version}, this transformer_lidit.py knows {FORMAT_VERSION}: use "
                "the file that came with the weights"
            )
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size={hidden_size} is not divisible by num_heads={num_heads}")
        if refiner_rotary and hidden_size // num_heads % 2:
            raise ValueError(
                f"hidden_size / num_heads = {hidden_size // num_heads} is odd, which rotary positions can't be"
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
        """Predicts what the noise schedule is about (noise, v or velocity) for noised latents.

        Args:
          hidden_states: latents [B, latent channels, H, W]; the patch size divides H and W.
          timestep: [B] or one for all, in [0, 1000).
          encoder_hidden_states: a list, for each LLM the features of the prompts [B, L_i, D_i], padded on the right.
          encoder_attention_mask: a list of bool [B, L_i], True on the prompts' tokens: at least one in every row, which
            an empty prompt's end token is.
          instruction_hidden_states: a list of the features [P_i, D_i] of what stands before every prompt, or
            [B, P_i, D_i] where it is bidirectionally encoded with it. P_i may be 0.
          return_dict: False returns a tuple.

        Returns:
          `.sample` [B, latent channels, H, W] in the dtype of `hidden_states`.

        Raises:
          ValueError: a shape does not fit the model.
        """
        text = [
            TextFeatures(*features)
            for features in zip(
                *self._of_each_llm(encoder_hidden_states, encoder_attention_mask, instruction_hidden_states),
                strict=True,
            )
        ]
        self._check_shapes(hidden_states, text)
        dtype = self.dit.patch_embedding.bias.dtype  # no quantisation changes it, and `self.dtype` takes a millisecond
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(hidden_states.shape[0])

        time = self.timestep_embedder(timestep)  # [B, C]
        condition, mask, pooled = self.text_condition(text, time, dtype)
        sample = self.dit(hidden_states.to(dtype), condition, mask, time + pooled).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _of_each_llm(
        self, prompts: Sequence[Tensor], masks: Sequence[Tensor], instructions: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
        """-> (instructions, prompts, masks)."""
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
                    f"encoder_hidden_states[{i}] must be [{batch}, length, {features_width}] beside these latents, "
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
        """For training from scratch."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Conv2d):
                deviation = math.sqrt(1 / (9 * module.in_channels)) / 0.87962566  # of a normal cut at two deviations
                nn.init.trunc_normal_(module.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
                nn.init.zeros_(module.bias)
        # Gates that start closed leave the residual stream as it is (adaLN-zero, DiT section 3.2); so do the refiners.
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        # The first prediction is the target's mean, zero.
        nn.init.zeros_(self.dit.output.weight)


# --- the conditioning (Figure 5, left) ------------------------------------------------------------------------------


class TextCondition(nn.Module):
    """Per LLM: project -> linguistic token refiner; then collaborative refiner -> truncate -> concatenate.

    Args:
      collaborative_blocks: 0 concatenates what the token refiners give.
      gated, causal, rotary, qk_norm: of the refiners.
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

        # Only now, after the refiners have used them, the system prompt and the instruction are dropped.
        branches = [x[:, features.instruction.shape[-2] :] for x, features in zip(branches, text, strict=True)]
        mask = torch.cat([features.mask for features in text], dim=1)
        return torch.cat(branches, dim=1), mask, sum(pooled)

    def _rotary_tables(self, features: TextFeatures) -> RotaryTables | None:
        """Positions count from the prompt's first token: the same words of two LLMs are near each other, whatever
        comes before them.
        """
        if not self.rotary:
            return None
        before, length = features.instruction.shape[-2], features.prompt.shape[1]
        return rotary_tables(torch.arange(-before, length, device=features.prompt.device), self.head_dim)


class FeatureProjection(nn.Module):
    """RMS-normalised LLM features at the transformer's width."""

    def __init__(self, text_width: int, hidden_size: int):
        super().__init__()
        self.norm = RMSNorm(text_width)
        self.linear = nn.Linear(text_width, hidden_size)

    def forward(self, features: TextFeatures, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """-> x [B, P + L, C], mask bool [B, P + L] (the instruction is never padding)."""
        batch, length = features.prompt.shape[0], features.instruction.shape[-2]
        # An instruction that all prompts share is projected once.
        instruction = self.linear(self.norm(features.instruction).to(dtype)).expand(batch, -1, -1)
        prompt = self.linear(self.norm(features.prompt).to(dtype))
        mask = torch.cat([features.mask.new_ones(batch, length), features.mask], dim=1)
        return torch.cat([instruction, prompt], dim=1), mask


class PooledText(nn.Module):
    """Masked mean over the tokens, then a two-layer MLP: joins the timestep embedding."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear_in = Float32Linear(hidden_size, hidden_size)
        self.linear_out = Float32Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, C], mask bool [B, L] -> float32 [B, C]."""
        weights = mask[..., None].float()
        mean = (x.float() * weights).sum(1) / weights.sum(1)
        return self.linear_out(F.silu(self.linear_in(mean)))


class LinguisticTokenRefiner(nn.Module):
    """Full self-attention over one LLM's features: early tokens see later ones, which the LLM hid from them."""

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
            x = block(x, mask, conditioning, rotary)
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
        """x [B, L, C], mask as of `Attention`, conditioning (pooled text + timestep) [B, C] -> [B, L, C]."""
        gate_1, gate_2 = (None, None) if self.gates is None else self.gates(conditioning, x.dtype)
        x = x + gated(self.attention(self.attention_norm(x), mask=mask, rotary=rotary), gate_1)
        return x + gated(self.feed_forward(self.feed_forward_norm(x)), gate_2)


class CollaborativeRefiner(nn.Module):
    """Rounds in which every LLM's branch reads all the others at once, as they were before the round.

    Without rounds, or others to read, branches pass through it.
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
                others = torch.cat(_without(i, branches), dim=1)
                others_mask = torch.cat(_without(i, masks), dim=1)[:, None, None]  # [B, 1, 1, M]
                others_rotary = None
                if rotary[i] is not None:
                    cos, sin = zip(*_without(i, rotary), strict=True)
                    others_rotary = torch.cat(cos), torch.cat(sin)
                refined.append(branch(branches[i], others, others_mask, conditionings[i], rotary[i], others_rotary))
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


def _without(i: int, items: Sequence) -> list:
    return [item for j, item in enumerate(items) if j != i]


# --- the diffusion transformer (Figure 5, right) --------------------------------------------------------------------


class DiT(nn.Module):
    """Patchify, positions, `depth` blocks, adaLN output. Any size that the patch divides.

    Args:
      position: some of `POSITIONS`.
      position_grid: as of `LIDiTTransformer2DModel`.
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
        """latents [B, C_latents, H, W], text [B, M, C], text_mask bool [B, M], conditioning [B, C]
        -> float32 [B, C_latents, H, W].
        """
        h, w = (side // self.patch_size for side in latents.shape[-2:])
        text_mask = text_mask[:, None, None]  # [B, 1, 1, M]

        x = self.patch_embedding(patchify(latents, self.patch_size))  # [B, h, w, C]
        rows, columns = grid_coordinates(h, w, self.position_grid, x.device)
        if "sincos" in self.position:
            x = x + sincos_embedding(rows, columns, x.shape[-1]).to(x.dtype)
        x = self.position_embedding(x).flatten(1, 2)  # [B, N, C]
        rotary = rope_tables(rows, columns, self.head_dim) if "rope" in self.position else None
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, text, text_mask, conditioning, rotary)
            else:
                x = block(x, text, text_mask, conditioning, rotary)
        shift, scale = self.final_modulation(conditioning, x.dtype)
        x = self.output(modulate(layer_norm(x), shift, scale))  # [B, N, patch^2 C_latents]
        return unpatchify(x.unflatten(1, (h, w)), self.patch_size)


class ConvPositionEmbedding(nn.Module):
    """A convolutional ResBlock on the grid of tokens (section 3.2).

    Its zero padding tells a token how far the borders are, up to two tokens.
    """

    BOTTLENECK = 4  # C over the inner width

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
        return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels stay last in memory


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, FFN; each between scale+shift and a gate (nine vectors in all)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.self_attention = Attention(hidden_size, num_heads, qk_norm=True)
        self.cross_attention = Attention(hidden_size, num_heads, qk_norm=True)
        self.feed_forward = FeedForward(hidden_size, mlp_ratio)
        self.modulation = Modulation(hidden_size, 9)

    def forward(
        self, x: Tensor, text: Tensor, text_mask: Tensor, conditioning: Tensor, rotary: RotaryTables | None
    ) -> Tensor:
        """x [B, N, C], text [B, M, C], text_mask bool [B, 1, 1, M], conditioning [B, C], tables of N positions or None
        -> [B, N, C].
        """
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


# --- layers of both -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to a context.

    With `qk_norm`, queries and keys are RMS-normalised over the head size before the product (section 3.2): that bounds
    the logits, and so keeps deep models stable in bfloat16.
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
        """x [B, L, C], context [B, M, C] (default: x), mask bool that broadcasts to [B, heads, L, M], True where a key
        may be attended to -> [B, L, C].
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
    """Sinusoids of the timestep (DDPM), cosines first, then a two-layer MLP."""

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
    """SiLU and a linear map, zero at the start, from the conditioning vector to `num_vectors` vectors of width C."""

    def __init__(self, hidden_size: int, num_vectors: int):
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(hidden_size, num_vectors * hidden_size)

    def forward(self, conditioning: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """conditioning float32 [B, C], the product's dtype -> `num_vectors` tensors float32 [B, C]."""
        return self.linear(F.silu(conditioning).to(dtype)).float().chunk(self.num_vectors, dim=-1)


class Float32Linear(nn.Linear):
    """A small linear map that computes in float32 whatever its weights are stored in, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last axis; float32 inside, result in the dtype of x."""

    def __init__(self, features: int):
        super().__init__(features, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without learned scale or shift, float32 inside and out: adaLN's modulation follows it."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=EPSILON)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, L, C] scaled and shifted by one vector a sample, [B, C] -> float32."""
    return x.float() * (1.0 + scale[:, None]) + shift[:, None]


def gated(y: Tensor, gate: Tensor | None) -> Tensor:
    """y [B, L, C] times one vector a sample, [B, C] (None: ones); float32 product, result in the dtype of y."""
    return y if gate is None else (gate[:, None] * y).to(y.dtype)


def rotary_tables(positions: Tensor, head_dim: int) -> RotaryTables:
    """RoFormer's cos and sin of positions int [L], halves repeated: float32 [L, head size]."""
    return tables_of_angles(angles_of(positions.float(), head_dim // 2))


def rope_tables(rows: Tensor, columns: Tensor, head_dim: int) -> RotaryTables:
    """Axial rotary positions (Heo et al. 2024) of a grid of tokens: half of a head's pairs turn with the row, half with
    the column. rows [h], columns [w] -> float32 [h * w, head size] each.
    """
    shape = (len(rows), len(columns), head_dim // 4)
    of_rows = angles_of(rows, head_dim // 4)[:, None].expand(shape)
    of_columns = angles_of(columns, head_dim // 4)[None].expand(shape)
    return tables_of_angles(torch.cat([of_rows, of_columns], dim=-1).flatten(0, 1))


def sincos_embedding(rows: Tensor, columns: Tensor, features: int) -> Tensor:
    """Two-dimensional sine-cosine positions: half of the features encodes the row, half the column, each as sines and
    then cosines; features that four does not divide end in zeros. rows [h], columns [w] -> float32 [h, w, features].
    """
    quarter = features // 4
    shape = (len(rows), len(columns), 2 * quarter)
    of_rows, of_columns = angles_of(rows, quarter), angles_of(columns, quarter)
    of_rows = torch.cat([of_rows.sin(), of_rows.cos()], dim=-1)[:, None].expand(shape)
    of_columns = torch.cat([of_columns.sin(), of_columns.cos()], dim=-1)[None].expand(shape)
    return F.pad(torch.cat([of_rows, of_columns], dim=-1), (0, features - 4 * quarter))


def grid_coordinates(height: int, width: int, reference_side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Coordinates of a grid's rows [height] and columns [width] from the image's centre, float32. An image of any size
    and aspect ratio covers the area reference_side^2, so that a layout is kept at another resolution.
    """
    unit = reference_side / math.sqrt(height * width)
    rows, columns = (
        (torch.arange(side, dtype=torch.float32, device=device) - (side - 1) / 2) * unit for side in (height, width)
    )
    return rows, columns


def angles_of(positions: Tensor, count: int) -> Tensor:
    """positions float32 [L] -> their angles at `count` geometrically spaced frequencies, [L, count]."""
    exponents = torch.arange(count, dtype=torch.float32, device=positions.device) / count
    return positions[:, None] * (1.0 / THETA**exponents)


def tables_of_angles(angles: Tensor) -> RotaryTables:
    """cos and sin of angles [L, head size / 2], halves repeated."""
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotary position embedding of x [B, L, heads, head size]; float32 product, result in the dtype of x."""
    cos, sin = (table[:, None] for table in tables)
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
