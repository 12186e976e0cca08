"""Trains and samples the exported PyTorch model (`lidit_jax/pytorch`), the baseline of the step benchmarks.

It is used as a PyTorch user would use it for speed: trained with float32 weights under autocast, with gradient
checkpointing for `remat`, fused AdamW, and `_foreach` functions for the EMA and for clipping; sampled with weights in
the compute dtype.
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
from lidit_jax.errors import UserError
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.pytorch.transformer_lidit import LIDiTTransformer2DModel
from lidit_jax.train_config import TrainConfig
from lidit_jax.weights.diffusers_lidit import FIELDS, torch_tensors

_checkpoint = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_keep_matmuls = functools.partial(
    create_selective_checkpoint_contexts, [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
)
# Checkpointing function per value of `remat`; they keep the same activations as `models/remat.py`.
# Policies that PyTorch has, too.
REMAT = {"none": None, "full": _checkpoint, "dots": functools.partial(_checkpoint, context_fn=_keep_matmuls)}

# The model's text arguments by name; each is a list with one entry per LLM.
Text = Mapping[str, Sequence[Tensor]]


class StepInputs(NamedTuple):
    """Random inputs of a training step: noised latents [B, C, H, W], timesteps [B], the model's target [B, C, H, W]."""

    noised: Tensor
    timesteps: Tensor
    target: Tensor


# --- weights -----------------------------------------------------------------------------------------------------


def state_dict_from_flax(config: LIDiTConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts a Flax parameter tree, nested or flat with dotted paths, to PyTorch's state dict; arrays are views."""
    flat = flax.traverse_util.flatten_dict(params, sep=".")
    return dict(torch_tensors(config, {tuple(path.split(".")): np.asarray(array) for path, array in flat.items()}))


def from_flax(
    config: LIDiTConfig,
    text_widths: Sequence[int],
    params: Mapping[str, Any],
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LIDiTTransformer2DModel:
    """Builds the PyTorch model with copies of Flax parameters.

    Args:
      config: of the model.
      text_widths: hidden size of each LLM.
      params: as in `state_dict_from_flax`.
      device: of the weights.
      dtype: of the weights.

    Raises:
      UserError: the parameters do not match the config, or PyTorch lacks its rematerialisation policy.
    """
    with torch.device("meta"):  # allocates no memory for the initial weights, which are replaced
        model = LIDiTTransformer2DModel(**{name: getattr(config, name) for name in FIELDS}, text_widths=text_widths)
    state = {
        name: torch.tensor(np.ascontiguousarray(array), device=device, dtype=dtype)
        for name, array in state_dict_from_flax(config, params).items()
    }
    model.load_state_dict(state, assign=True)
    if config.remat not in REMAT:
        raise UserError(f"model.remat={config.remat!r} has no counterpart in PyTorch: use one of {', '.join(REMAT)}")
    if remat := REMAT[config.remat]:
        model.enable_gradient_checkpointing(remat)
    return model


def split_steps(arrays: Mapping[str, np.ndarray], device: str = "cpu") -> list[StepInputs]:
    """Splits the random inputs of several steps into one `StepInputs` per step.

    Args:
      arrays: results of `train_step.random_inputs`, stacked along a leading axis of steps.
      device: of the tensors.
    """
    timesteps = torch.tensor(arrays["timesteps"], device=device)
    noised, target = (channels_first(arrays[name], device) for name in ("noised", "target"))
    return [StepInputs(*fields) for fields in zip(noised, timesteps, target, strict=True)]


def channels_first(latents: np.ndarray, device: str = "cpu") -> Tensor:
    """Copies latents to the device: [..., H, W, C] -> [..., C, H, W], channels last in memory."""
    return torch.tensor(latents, device=device).movedim(-1, -3)


# --- training and sampling ---------------------------------------------------------------------------------------


class Trainer:
    """Trains with AdamW, clipping and EMA as `lidit_jax.trainer.Trainer` does, on one device.

    Unlike there, steps with a non-finite loss are not skipped: checking would make every step wait for the host.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, *, dtype: torch.dtype = torch.float32, compiled: bool = False
    ):
        """Sets up the optimizer and the EMA.

        Args:
          model: float32 weights.
          config: the run's.
          dtype: of the matmuls, by autocast.
          compiled: compiles the loss.
        """
        self.model, self.config, self.dtype, self.step_number = model, config, dtype, 0
        self.params = list(model.parameters())
        groups = [  # weight decay applies to matrices and kernels, not to biases and norms
            {"params": [p for p in self.params if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.b1, config.b2), eps=1e-8, fused=True)
        self.ema = [p.detach().clone() for p in self.params] if config.ema_decay else None
        self._loss = torch.compile(self._compute_loss, dynamic=False) if compiled else self._compute_loss

    def step(self, inputs: StepInputs, text: Text, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Takes one step; returns the loss and the gradient's norm before clipping, scalars on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self._loss(*inputs, text)
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

    def _compute_loss(self, noised: Tensor, timesteps: Tensor, target: Tensor, text: Text) -> Tensor:
        with torch.autocast(noised.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(noised, timesteps, **text, return_dict=False)[0]
        return F.mse_loss(output, target)


class Sampler:
    """Runs a deterministic sampler's table with classifier-free guidance, in one batched call per step."""

    def __init__(
        self, model: nn.Module, table: StepTable, prediction: str, guidance_scale: float, *, compiled: bool = False
    ):
        self.model, self.table, self.prediction, self.guidance_scale = model, table, prediction, guidance_scale
        self._predict = torch.compile(self._guided, dynamic=False) if compiled else self._guided

    @torch.no_grad()
    def __call__(self, noise: Tensor, text: Text) -> Tensor:
        """Samples: noise [B, C, H, W] -> latents [B, C, H, W].

        Args:
          noise: standard normal.
          text: 2B rows, conditional ones first; B rows if the guidance scale is 1.
        """
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
