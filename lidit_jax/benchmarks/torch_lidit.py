"""LI-DiT in PyTorch, to compare with: the layers of `models/`, under the same names, with the same numbers.

It computes as the Flax model does: float32 parameters, matrix products in the config's dtype, norms, modulation and
timestep embedding in float32. It does so with what PyTorch has for it: `scaled_dot_product_attention` and the fused
norms, `torch.utils.checkpoint` for `remat`, fused AdamW, `_foreach` operations for the average and for clipping.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lidit_jax.diffusion.samplers import StepTable
from lidit_jax.diffusion.schedules import noise_from_output, x0_from_output
from lidit_jax.errors import UserError
from lidit_jax.models.layers import ROTARY_THETA
from lidit_jax.models.lidit import LIDiTConfig
from lidit_jax.train import TrainConfig

# What a rematerialised block keeps; "offload" has no counterpart.
REMAT_CONTEXTS = {
    "none": None,
    "full": None,
    "dots": functools.partial(
        create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    ),
}

RotaryTables = tuple[Tensor, Tensor]

BLOCKS = "dit.blocks."


class TextFeatures(NamedTuple):
    """As `models.lidit.TextFeatures`: prefix [P, D] or [B, P, D], prompt [B, L, D], mask bool [B, L]."""

    prefix: Tensor
    prompt: Tensor
    mask: Tensor


class Draw(NamedTuple):
    """What a train step draws: latents with noise [B, H, W, C], timesteps [B], what is to be predicted [B, H, W, C]."""

    noised: Tensor
    timesteps: Tensor
    target: Tensor


# --- the model ---------------------------------------------------------------------------------------------------


class Dense(nn.Linear):
    """Affine map whose product runs in `compute_dtype`; the parameters stay float32."""

    def __init__(self, features_in: int, features_out: int, compute_dtype: torch.dtype = torch.float32):
        super().__init__(features_in, features_out)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype))


class Conv3x3(nn.Conv2d):
    """Convolution over [B, h, w, C] that keeps the size."""

    def __init__(self, features_in: int, features_out: int, compute_dtype: torch.dtype):
        super().__init__(features_in, features_out, 3, padding=1)
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        x = x.to(dtype).permute(0, 3, 1, 2)  # channels stay last in memory
        return F.conv2d(x, self.weight.to(dtype), self.bias.to(dtype), padding=1).permute(0, 2, 3, 1)


class RMSNorm(nn.Module):
    """Statistics in float32, result in the dtype of x."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, 1e-6).to(x.dtype)


def layer_norm(x: Tensor) -> Tensor:
    """LayerNorm without learned scale or shift, float32 inside and out."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, C], shift and scale [B, C]."""
    return x * (1.0 + scale[:, None]) + shift[:, None]


def gated(gate: Tensor, y: Tensor) -> Tensor:
    """gate [B, C] over y [B, L, C]: float32 product, result in the dtype of y."""
    return (gate[:, None] * y).to(y.dtype)


class Modulation(nn.Module):
    """SiLU and a linear map from the conditioning vector to `num_vectors` vectors, float32."""

    def __init__(self, num_vectors: int, features: int, dtype: torch.dtype):
        super().__init__()
        self.num_vectors = num_vectors
        self.Dense_0 = Dense(features, num_vectors * features, dtype)  # the name that Flax gives a nameless layer

    def forward(self, conditioning: Tensor) -> Sequence[Tensor]:
        return self.Dense_0(F.silu(conditioning)).float().chunk(self.num_vectors, dim=-1)


class TwoLayers(nn.ModuleDict):
    """Dense, activation, dense. A dictionary, because `in` can be no attribute's name."""

    def __init__(self, sizes: tuple[int, int, int], activation: Callable, dtype: torch.dtype = torch.float32):
        super().__init__({"in": Dense(sizes[0], sizes[1], dtype), "out": Dense(sizes[1], sizes[2], dtype)})
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self["out"](self.activation(self["in"](x)))


class FeedForward(TwoLayers):
    """Dense, tanh-GELU, dense."""

    def __init__(self, features: int, mlp_ratio: float, dtype: torch.dtype):
        sizes = (features, int(features * mlp_ratio), features)
        super().__init__(sizes, functools.partial(F.gelu, approximate="tanh"), dtype)


class TimestepEmbedder(TwoLayers):
    """Sinusoids, cosines first, then a two-layer MLP: [B] -> [B, C], float32."""

    FREQUENCY_FEATURES = 256

    def __init__(self, features: int):
        super().__init__((self.FREQUENCY_FEATURES, features, features), F.silu)

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.FREQUENCY_FEATURES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10_000.0) * exponents)
        return super().forward(torch.cat([angles.cos(), angles.sin()], dim=-1))


class PooledText(TwoLayers):
    """Masked mean over the tokens, then a two-layer MLP: x [B, L, C], mask bool [B, L] -> float32 [B, C]."""

    def __init__(self, features: int):
        super().__init__((features, features, features), F.silu)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        weights = mask.float()[..., None]
        return super().forward((x.float() * weights).sum(1) / weights.sum(1))


class Attention(nn.Module):
    """Multi-head attention of x to itself, or to a context."""

    def __init__(self, features: int, num_heads: int, dtype: torch.dtype, qk_norm: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (Dense(features, features, dtype) for _ in range(4))
        self.query_norm = RMSNorm(features // num_heads) if qk_norm else nn.Identity()
        self.key_norm = RMSNorm(features // num_heads) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        rotary: RotaryTables | None = None,
        context_rotary: RotaryTables | None = None,
    ) -> Tensor:
        """x [B, L, C], context [B, M, C] (default: x), mask bool that broadcasts to [B, H, L, M] -> [B, L, C]."""
        context = x if context is None else context
        query = self.query_norm(self._heads(self.query(x)))  # [B, L, H, D]
        key = self.key_norm(self._heads(self.key(context)))
        value = self._heads(self.value(context))
        if rotary is not None:
            query = rotate(query, *rotary)
            key = rotate(key, *(rotary if context_rotary is None else context_rotary))
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))  # [B, H, L, D]
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


def rotary_tables(positions: Tensor, head_dim: int) -> RotaryTables:
    """positions [L] -> cos and sin, float32 [L, D]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    angles = positions.float()[:, None] / ROTARY_THETA**exponents
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D]; float32 product."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x * cos[:, None] + rotated * sin[:, None]).to(x.dtype)


class FeatureProjection(nn.Module):
    """RMS-normalised LLM features at the DiT's width: x [B, P + L, C], mask bool [B, P + L]."""

    def __init__(self, text_width: int, features: int, dtype: torch.dtype):
        super().__init__()
        self.norm = RMSNorm(text_width)
        self.dense = Dense(text_width, features, dtype)

    def forward(self, text: TextFeatures) -> tuple[Tensor, Tensor]:
        batch, length = text.prompt.shape[0], text.prefix.shape[-2]
        prefix = self.dense(self.norm(text.prefix)).expand(batch, -1, -1)
        prompt = self.dense(self.norm(text.prompt))
        mask = torch.cat([text.mask.new_ones(batch, length), text.mask], dim=1)
        return torch.cat([prefix, prompt], dim=1), mask


class LinguisticTokenRefinerBlock(nn.Module):
    def __init__(self, config: LIDiTConfig, dtype: torch.dtype):
        super().__init__()
        features = config.hidden_size
        self.attention = Attention(features, config.num_heads, dtype)
        self.feed_forward = FeedForward(features, config.refiner_mlp_ratio, dtype)
        self.gates = Modulation(2, features, dtype) if config.refiner_gated else None
        self.attention_norm, self.feed_forward_norm = RMSNorm(features), RMSNorm(features)

    def forward(self, x: Tensor, mask: Tensor, conditioning: Tensor, rotary: RotaryTables | None) -> Tensor:
        """x [B, L, C], mask as of `Attention`, conditioning [B, C] -> [B, L, C]."""
        gates = x.new_ones(2, 1, 1) if self.gates is None else self.gates(conditioning)
        x = x + gated(gates[0], self.attention(self.attention_norm(x), mask=mask, rotary=rotary))
        return x + gated(gates[1], self.feed_forward(self.feed_forward_norm(x)))


class LinguisticTokenRefiner(nn.Module):
    def __init__(self, config: LIDiTConfig, dtype: torch.dtype):
        super().__init__()
        self.is_causal = config.refiner_causal
        for i in range(config.refiner_blocks):
            self.add_module(f"block_{i}", LinguisticTokenRefinerBlock(config, dtype))

    def forward(self, x: Tensor, mask: Tensor, conditioning: Tensor, rotary: RotaryTables | None) -> Tensor:
        """x [B, L, C], mask bool [B, L], conditioning [B, C] -> [B, L, C]."""
        mask = mask[:, None, None]  # [B, 1, 1, L]
        if self.is_causal:
            mask = mask & mask.new_ones(x.shape[1], x.shape[1]).tril()
        for block in self.children():
            x = block(x, mask, conditioning, rotary)
        return x


class CollaborativeRefinerBranch(nn.Module):
    def __init__(self, config: LIDiTConfig, dtype: torch.dtype):
        super().__init__()
        features, self.dtype = config.hidden_size, dtype
        self.cross_attention = Attention(features, config.num_heads, dtype)
        self.feed_forward = FeedForward(features, config.refiner_mlp_ratio, dtype)
        self.modulation = Modulation(6, features, dtype)
        self.attention_norm, self.context_norm = RMSNorm(features), RMSNorm(features)
        self.feed_forward_norm = RMSNorm(features)

    def forward(
        self,
        x: Tensor,
        others: Tensor,
        others_mask: Tensor,
        conditioning: Tensor,
        rotary: RotaryTables | None,
        others_rotary: RotaryTables | None,
    ) -> Tensor:
        """x [B, L, C], others [B, M, C], others_mask bool [B, M], conditioning [B, C] -> [B, L, C]."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(conditioning)
        h = modulate(self.attention_norm(x).float(), shift_1, scale_1).to(self.dtype)
        y = self.cross_attention(h, self.context_norm(others), others_mask[:, None, None], rotary, others_rotary)
        x = x + gated(gate_1, y)
        h = modulate(self.feed_forward_norm(x).float(), shift_2, scale_2).to(self.dtype)
        return x + gated(gate_2, self.feed_forward(h))


class CollaborativeRefiner(nn.Module):
    def __init__(self, config: LIDiTConfig, num_branches: int, dtype: torch.dtype):
        super().__init__()
        self.num_blocks = config.collaborative_blocks
        for block in range(self.num_blocks):
            for i in range(num_branches):
                self.add_module(f"block_{block}_branch_{i}", CollaborativeRefinerBranch(config, dtype))

    def forward(
        self,
        branches: list[Tensor],
        masks: list[Tensor],
        conditionings: list[Tensor],
        rotary: list[RotaryTables | None],
    ) -> list[Tensor]:
        """Per LLM: features [B, L_i, C], mask bool [B, L_i], conditioning [B, C] -> features [B, L_i, C]."""
        for block in range(self.num_blocks):
            refined = []
            for i, x in enumerate(branches):
                others = [j for j in range(len(branches)) if j != i]
                of_others = (
                    torch.cat([branches[j] for j in others], dim=1),
                    torch.cat([masks[j] for j in others], dim=1),
                )
                others_rotary = None
                if rotary[i] is not None:
                    others_rotary = tuple(
                        torch.cat(tables) for tables in zip(*(rotary[j] for j in others), strict=True)
                    )
                branch = getattr(self, f"block_{block}_branch_{i}")
                refined.append(branch(x, *of_others, conditionings[i], rotary[i], others_rotary))
            branches = refined
        return branches


class TextCondition(nn.Module):
    """Per LLM: project -> linguistic token refiner; then collaborative refiner -> truncate -> concatenate."""

    def __init__(self, config: LIDiTConfig, text_widths: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.config, self.head_dim = config, config.hidden_size // config.num_heads
        for i, width in enumerate(text_widths):
            self.add_module(f"project_{i}", FeatureProjection(width, config.hidden_size, dtype))
            self.add_module(f"pool_{i}", PooledText(config.hidden_size))
            self.add_module(f"token_refiner_{i}", LinguisticTokenRefiner(config, dtype))
        if config.fusion == "collaborative" and len(text_widths) > 1:
            self.collaborative_refiner = CollaborativeRefiner(config, len(text_widths), dtype)

    def forward(self, text: Sequence[TextFeatures], time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """text of n LLMs, time [B, C] -> condition [B, sum L_i, C], mask bool [B, sum L_i], pooled text [B, C]."""
        branches, masks, pooled = [], [], []
        rotary = [self._rotary(features) for features in text]
        for i, features in enumerate(text):
            x, mask = getattr(self, f"project_{i}")(features)
            pooled.append(getattr(self, f"pool_{i}")(x, mask))
            branches.append(getattr(self, f"token_refiner_{i}")(x, mask, time + pooled[i], rotary[i]))
            masks.append(mask)
        if hasattr(self, "collaborative_refiner"):
            branches = self.collaborative_refiner(branches, masks, [time + p for p in pooled], rotary)
        branches = [x[:, features.prefix.shape[-2] :] for x, features in zip(branches, text, strict=True)]
        return torch.cat(branches, dim=1), torch.cat([features.mask for features in text], dim=1), sum(pooled)

    def _rotary(self, features: TextFeatures) -> RotaryTables | None:
        if not self.config.refiner_rotary:
            return None
        prefix, length = features.prefix.shape[-2], features.prompt.shape[1]
        return rotary_tables(torch.arange(-prefix, length, device=features.prompt.device), self.head_dim)


class ConvPositionEmbedding(nn.Module):
    """A convolutional ResBlock on the grid of tokens: [B, h, w, C] -> [B, h, w, C]."""

    BOTTLENECK = 4

    def __init__(self, features: int, dtype: torch.dtype):
        super().__init__()
        inner = features // self.BOTTLENECK
        self.conv_in, self.conv_out = Conv3x3(features, inner, dtype), Conv3x3(inner, features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.silu(layer_norm(x)))
        return x + self.conv_out(F.silu(layer_norm(h)))


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, FFN; each between scale+shift and a gate."""

    def __init__(self, config: LIDiTConfig, dtype: torch.dtype):
        super().__init__()
        features, self.dtype = config.hidden_size, dtype
        self.self_attention = Attention(features, config.num_heads, dtype, qk_norm=True)
        self.cross_attention = Attention(features, config.num_heads, dtype, qk_norm=True)
        self.feed_forward = FeedForward(features, config.mlp_ratio, dtype)
        self.modulation = Modulation(9, features, dtype)

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor, conditioning: Tensor) -> Tensor:
        """x [B, N, C], text [B, M, C], text_mask bool [B, 1, 1, M], conditioning [B, C] -> [B, N, C]."""
        vectors = self.modulation(conditioning)
        x = self._sublayer(x, self.self_attention, *vectors[0:3])
        x = self._sublayer(x, lambda h: self.cross_attention(h, text, text_mask), *vectors[3:6])
        return self._sublayer(x, self.feed_forward, *vectors[6:9])

    def _sublayer(self, x: Tensor, layer: Callable, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        return x + gated(gate, layer(modulate(layer_norm(x), shift, scale).to(self.dtype)))


class DiT(nn.Module):
    """Patchify, position ResBlock, `depth` blocks, adaLN output."""

    def __init__(self, config: LIDiTConfig, dtype: torch.dtype):
        super().__init__()
        features, self.patch, self.remat = config.hidden_size, config.patch_size, config.remat
        inputs = self.patch**2 * config.latent_channels
        self.patch_embedding = Dense(inputs, features, dtype)
        self.position_embedding = ConvPositionEmbedding(features, dtype)
        self.blocks = nn.ModuleList(LIDiTBlock(config, dtype) for _ in range(config.depth))
        self.final_modulation = Modulation(2, features, dtype)
        self.output = Dense(features, inputs)

    def forward(self, latents: Tensor, text: Tensor, text_mask: Tensor, conditioning: Tensor) -> Tensor:
        """latents [B, H, W, C], text [B, M, C], text_mask bool [B, M], conditioning [B, C] -> float32 [B, H, W, C]."""
        batch, height, width, channels = latents.shape
        p, h, w = self.patch, height // self.patch, width // self.patch
        x = latents.reshape(batch, h, p, w, p, channels).transpose(2, 3).reshape(batch, h, w, -1)  # patchify
        x = self.position_embedding(self.patch_embedding(x)).flatten(1, 2)  # [B, N, C]
        for block in self.blocks:
            x = self._run(block, x, text, text_mask[:, None, None], conditioning)
        shift, scale = self.final_modulation(conditioning)
        x = self.output(modulate(layer_norm(x), shift, scale))
        return x.reshape(batch, h, w, p, p, channels).transpose(2, 3).reshape(latents.shape)  # unpatchify

    def _run(self, block: LIDiTBlock, *arguments: Tensor) -> Tensor:
        if self.remat == "none" or not torch.is_grad_enabled():
            return block(*arguments)
        contexts = REMAT_CONTEXTS[self.remat]
        options = {"context_fn": contexts} if contexts else {}
        return checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False, **options)


class LIDiT(nn.Module):
    """The trainable model: refiners and DiT.

    Args:
      text_widths: of the features of each LLM.

    Raises:
      UserError: for a rematerialisation that PyTorch does not have.
    """

    def __init__(self, config: LIDiTConfig, text_widths: Sequence[int]):
        super().__init__()
        if config.remat not in REMAT_CONTEXTS:
            raise UserError(f"PyTorch has no model.remat={config.remat!r}: use one of {', '.join(REMAT_CONTEXTS)}")
        dtype = getattr(torch, config.dtype)
        self.timestep_embedder = TimestepEmbedder(config.hidden_size)
        self.text_condition = TextCondition(config, text_widths, dtype)
        self.dit = DiT(config, dtype)

    def forward(self, latents: Tensor, timesteps: Tensor, text: Sequence[TextFeatures]) -> Tensor:
        """latents [B, H, W, C], timesteps [B] in [0, 1000), text of n LLMs -> float32 [B, H, W, C]."""
        time = self.timestep_embedder(timesteps)
        condition, mask, pooled = self.text_condition(text, time)
        return self.dit(latents, condition, mask, time + pooled)


# --- weights -----------------------------------------------------------------------------------------------------


def state_dict_of_flax(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flax's tree, nested or its paths joined with dots, as the state of `LIDiT`: views of the same arrays."""
    state = {}
    for path, array in flax.traverse_util.flatten_dict(params, sep=".").items():
        path, array = path.replace(".kernel", ".weight"), np.asarray(array)
        if path.startswith(BLOCKS):  # a scan has those of all blocks in one array
            state |= {f"{BLOCKS}{i}.{path.removeprefix(BLOCKS)}": _turned(layer) for i, layer in enumerate(array)}
        else:
            state[path] = _turned(array)
    return state


def _turned(array: np.ndarray) -> np.ndarray:
    """A kernel [in, out] or [h, w, in, out] -> [out, in] or [out, in, h, w]; vectors as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_flax(config: LIDiTConfig, text_widths: Sequence[int], params: Mapping[str, Any], device: str = "cpu") -> LIDiT:
    """The model with the parameters of a Flax tree (as `state_dict_of_flax` takes it), on a device; nothing is shared.

    Raises:
      RuntimeError: for names or shapes that are not the model's.
    """
    with torch.device("meta"):  # no memory for weights that are replaced
        model = LIDiT(config, text_widths)
    state = {
        name: torch.tensor(np.ascontiguousarray(array), device=device)
        for name, array in state_dict_of_flax(params).items()
    }
    model.load_state_dict(state, assign=True)
    return model


# --- training and sampling ---------------------------------------------------------------------------------------


class Trainer:
    """AdamW, clipping and averaging as `lidit_jax.train.Trainer` has them, on one device.

    Losses are not looked at, so that no step waits for the host: a step that is not finite is not left out.
    """

    def __init__(self, model: LIDiT, config: TrainConfig, *, compiled: bool = False):
        self.model, self.config, self.step_number = model, config, 0
        self.params = list(model.parameters())
        groups = [  # weights decay, biases and norms do not
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=1e-8, fused=True)
        self.ema = [p.detach().clone() for p in self.params] if config.ema_decay else None
        self._loss = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of

    def step(self, draw: Draw, text: Sequence[TextFeatures], learning_rate: float) -> tuple[Tensor, Tensor]:
        """-> loss and norm of the gradient, scalars that stay on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._loss(*draw, text)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.params], foreach=True)
        if self.config.clip_norm:
            nn.utils.clip_grads_with_norm_(self.params, self.config.clip_norm, norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            decay = min(self.config.ema_decay, (1.0 + self.step_number) / (10.0 + self.step_number))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1.0 - decay)
        self.step_number += 1
        return loss.detach(), norm

    def _loss_of(self, noised: Tensor, timesteps: Tensor, target: Tensor, text: Sequence[TextFeatures]) -> Tensor:
        return F.mse_loss(self.model(noised, timesteps, text), target)


class Sampler:
    """A deterministic sampler's table run with classifier-free guidance, in one batched call a step.

    Matrices are cast to the dtype of their products once, as one does where nothing is trained.
    """

    def __init__(
        self, model: LIDiT, table: StepTable, prediction: str, guidance_scale: float, *, compiled: bool = False
    ):
        for module in model.modules():
            if isinstance(module, Dense | Conv3x3):
                module.to(module.compute_dtype)
        self.model, self.table, self.prediction, self.guidance_scale = model, table, prediction, guidance_scale
        self._predict = torch.compile(self._guided, dynamic=False) if compiled else self._guided

    @torch.no_grad()
    def __call__(self, noise: Tensor, text: Sequence[TextFeatures]) -> Tensor:
        """noise [B, H, W, C], text of 2B rows, or of B with a guidance scale of 1 -> latents [B, H, W, C]."""
        x, memory = noise, torch.zeros_like(noise)
        rows = zip(*(column.tolist() for column in self.table), strict=True)
        for timestep, alpha, sigma, next_weights, memory_weights, _ in rows:
            output = self._predict(x, x.new_full((len(x),), timestep), text)
            x0 = x0_from_output(self.prediction, output, x, alpha, sigma)
            eps = noise_from_output(self.prediction, output, x, alpha, sigma)
            terms = x, x0, eps, memory
            x = sum(weight * term for weight, term in zip(next_weights, terms, strict=True))
            memory = sum(weight * term for weight, term in zip(memory_weights, terms[:3], strict=True))
        return x

    def _guided(self, x: Tensor, timesteps: Tensor, text: Sequence[TextFeatures]) -> Tensor:
        if self.guidance_scale == 1.0:
            return self.model(x, timesteps, text)
        both = self.model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), text)
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
