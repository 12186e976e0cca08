"""LI-DiT in PyTorch, to compare with: the model that is exported (`lidit_jax/pytorch`), trained and sampled.

It is used as a PyTorch user would use it for speed: trained with float32 weights under autocast, with gradient
checkpointing for `remat`, fused AdamW, `_foreach` operations for the average and for clipping; sampled with weights in
the dtype of their products.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lidit_jax.diffusion.samplers import StepTable
from lidit_jax.diffusion.schedules import noise_from_output, x0_from_output
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.pytorch.transformer_lidit import LIDiTTransformer2DModel
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights.torch_lidit import FIELDS, torch_tensors

_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_keep_products = functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
)
# What a rematerialised block keeps, as `models/remat.py`.
REMAT = {"none": None, "full": _checkpoint, "dots": functools.partial(_checkpoint, context_fn=_keep_products)}

# The arguments of the model that say what the LLMs said, by name; each a list with an entry for each LLM.
Text = Mapping[str, Sequence[Tensor]]


class Draw(NamedTuple):
    """What a train step draws: latents with noise [B, C, H, W], timesteps [B], what is to be predicted [B, C, H, W]."""

    noised: Tensor
    timesteps: Tensor
    target: Tensor


# --- weights -----------------------------------------------------------------------------------------------------


def state_dict_of_flax(config: LIDiTConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Flax's tree, nested or its paths joined with dots, as the state of PyTorch's model: views of the same arrays."""
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    return dict(torch_tensors(config, {tuple(path.split(".")): np.asarray(array) for path, array in flat.items()}))


def from_flax(
    config: LIDiTConfig,
    text_widths: Sequence[int],
    params: Mapping[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LIDiTTransformer2DModel:
    """The model with the parameters of a Flax tree (as `state_dict_of_flax` takes it), on a device; nothing is shared.

    Raises:
      UserError: the parameters are not the config's.
    """
    with torch.device("meta"):  # no memory for weights that are replaced
        model = LIDiTTransformer2DModel(**{name: getattr(config, name) for name in FIELDS}, text_widths=text_widths)
    state = {
        name: torch.tensor(np.ascontiguousarray(array), device=device, dtype=dtype)
        for name, array in state_dict_of_flax(config, params).items()
    }
    model.load_state_dict(state, assign=True)
    if remat := REMAT[config.remat]:
        model.enable_gradient_checkpointing(remat)
    return model


def draws(arrays: Mapping[str, np.ndarray], device: str = "cpu") -> list[Draw]:
    """Of as many steps as the arrays' first axis has entries, from what `train_step.draw` gives of each, stacked."""
    timesteps = torch.tensor(arrays["timesteps"], device=device)
    latents = [channels_first(arrays[name], device) for name in ("noised", "target")]
    return [
        Draw(noised, of_step, target) for noised, of_step, target in zip(latents[0], timesteps, latents[1], strict=True)
    ]


def channels_first(latents: np.ndarray, device: str = "cpu") -> Tensor:
    """[..., H, W, C] -> [..., C, H, W], which stays as it is in memory."""
    return torch.tensor(latents, device=device).movedim(-1, -3)


# --- training and sampling ---------------------------------------------------------------------------------------


class Trainer:
    """AdamW, clipping and averaging as `lidit_jax.train.Trainer` has them, on one device.

    Losses are not looked at, so that no step waits for the host: a step that is not finite is not left out.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, *, dtype: torch.dtype = torch.float32, compiled: bool = False
    ):
        """Args: dtype: of the products."""
        self.model, self.config, self.dtype, self.step_number = model, config, dtype, 0
        self.params = list(model.parameters())
        groups = [  # weights decay, biases and norms do not
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=1e-8, fused=True)
        self.ema = [p.detach().clone() for p in self.params] if config.ema_decay else None
        self._loss = torch.compile(self._loss_of, dynamic=False) if compiled else self._loss_of

    def step(self, draw: Draw, text: Text, learning_rate: float) -> tuple[Tensor, Tensor]:
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

    def _loss_of(self, noised: Tensor, timesteps: Tensor, target: Tensor, text: Text) -> Tensor:
        with torch.autocast(noised.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(noised, timesteps, **text, return_dict=False)[0]
        return F.mse_loss(output, target)


class Sampler:
    """A deterministic sampler's table run with classifier-free guidance, in one batched call a step."""

    def __init__(
        self, model: nn.Module, table: StepTable, prediction: str, guidance_scale: float, *, compiled: bool = False
    ):
        self.model, self.table, self.prediction, self.guidance_scale = model, table, prediction, guidance_scale
        self._predict = torch.compile(self._guided, dynamic=False) if compiled else self._guided

    @torch.no_grad()
    def __call__(self, noise: Tensor, text: Text) -> Tensor:
        """noise [B, C, H, W], text of 2B rows, or of B with a guidance scale of 1 -> latents [B, C, H, W]."""
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

    def _guided(self, x: Tensor, timesteps: Tensor, text: Text) -> Tensor:
        if self.guidance_scale == 1.0:
            return self.model(x, timesteps, **text, return_dict=False)[0]
        both = self.model(torch.cat([x, x]), torch.cat([timesteps, timesteps]), **text, return_dict=False)[0]
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance_scale * (conditional - unconditional)
