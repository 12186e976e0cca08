"""Benchmarks sampling against PyTorch: `python -m lidit_jax.benchmarks.sample [--config=configs/1b.py …]`.

From noise and encoder features to latents by the config's sampler, with its classifier-free guidance: prompts and empty
prompts in one batch. The frozen LLMs and the VAE's decoder are left out on both sides.

    lidit_jax         as in `lidit_jax.pipeline`: all steps in one program, on one device
    PyTorch           the exported model (`pytorch_baseline.py`), loaded in the compute dtype
    PyTorch compiled  the guided prediction under `torch.compile`

All have the same weights and start from the same noise, so that their latents can be compared. A step is one evaluation
of the model. FLOPs are counted analytically (`models/flops.py`); MFU is FLOP/s over the chip's peak. Contestants run in
turn, but all are loaded at once and share the accelerator's memory.
"""

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from lidit_jax import cli
from lidit_jax.benchmarks import workload_flags
from lidit_jax.benchmarks.contest import largest_difference, write_figures
from lidit_jax.errors import UserError

if TYPE_CHECKING:
    from lidit_jax.benchmarks.workload import Work, Workload

flags.adopt_module_key_flags(workload_flags)  # shows them in --help
_SAMPLER = flags.DEFINE_string(
    "sampler", None, "ddim or dpmpp_2m for DDPM, euler or heun for rectified flow (default: the config's)"
)
_STEPS = flags.DEFINE_integer("steps", None, "steps of the sampler (default: the config's)")
_GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance scale; 1 disables it (default: the config's)"
)


def main() -> None:
    from lidit_jax.benchmarks.workload import format_table, from_flags, measurements, run_contest
    from lidit_jax.diffusion.samplers import step_table

    workload, experiment = from_flags()
    given = {"sampler": _SAMPLER.value, "steps": _STEPS.value, "guidance_scale": _GUIDANCE.value}
    sampling = dataclasses.replace(
        experiment.sample, **{name: value for name, value in given.items() if value is not None}
    )
    sampler, steps, guidance_scale = sampling.sampler, sampling.steps, sampling.guidance_scale
    rows = step_table(sampler, workload.schedule, steps)
    if np.any(rows.noise_scale):
        raise UserError(f"--sampler={sampler} adds random noise, so latents cannot be compared: use ddim or dpmpp_2m")
    arguments = workload, sampler, steps, guidance_scale
    results = run_contest(functools.partial(ours, *arguments), functools.partial(pytorch, *arguments))
    evaluations, batch = len(rows.timesteps), workload.batch
    flops = evaluations * workload.forward_flops(batch if guidance_scale == 1.0 else 2 * batch)
    print(f"{workload}; {sampler}, guidance {guidance_scale:g}")
    figures = measurements(results, steps=evaluations, samples=batch, flops=flops)
    print(format_table(figures, evaluations, "images"))
    differences = {result.name: largest_difference([results[0], result]) for result in results[1:]}
    for name, difference in differences.items():
        print(f"{name}: latents differ by {difference:.1e} of the largest")
    what = f"sampling, {workload}; {sampler}, {evaluations} evaluations, guidance {guidance_scale:g}"
    write_figures(workload_flags.JSON.value, what, workload_flags.ROUNDS.value, figures, differences=differences)


# --- contestants -------------------------------------------------------------------------------------------------


def ours(workload: "Workload", sampler: str, steps: int, guidance_scale: float, *, folder: Path | None) -> "Work":
    """Prepares our sampler, which returns latents, float32 [B, H, W, C].

    Args:
      workload: what to sample.
      sampler: as in the config's `sample` section.
      steps: sampling steps.
      guidance_scale: as in the config's `sample` section.
      folder: where the weights are saved for `pytorch`; None if it does not run.
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from lidit_jax.benchmarks.workload import noisy_init, save_weights
    from lidit_jax.diffusion.samplers import guided, sample
    from lidit_jax.models.initialize import draw_together
    from lidit_jax.models.lidit import LIDiT

    model, is_guided = LIDiT(workload.model), guidance_scale != 1.0
    text = jax.device_put(workload.features(with_empty=is_guided))
    noise = jnp.asarray(workload.noise())

    def init(key):
        rows = len(text[0].mask)
        return model.init(key, jnp.zeros((rows, *noise.shape[1:])), jnp.zeros(rows), text)["params"]

    params = nn.unbox(jax.jit(noisy_init(draw_together(init)))(jax.random.key(0)))
    if folder:
        save_weights(folder, params)

    @jax.jit
    def sample_latents(params, text, noise, guidance_scale):
        def predict(x, timesteps):
            return model.apply({"params": params}, x, timesteps, text)

        predict = guided(predict, guidance_scale) if is_guided else predict
        return sample(sampler, workload.schedule, predict, noise, steps)

    return lambda: np.asarray(sample_latents(params, text, noise, jnp.float32(guidance_scale)))


def pytorch(
    workload: "Workload", sampler: str, steps: int, guidance_scale: float, *, folder: Path, device: str, compiled: bool
) -> "Work":
    """Prepares PyTorch's sampler with the weights that `ours` saved; arguments as there."""
    from lidit_jax.benchmarks import pytorch_baseline
    from lidit_jax.benchmarks.workload import load_torch_model, torch_features
    from lidit_jax.diffusion.samplers import step_table

    model = load_torch_model(workload, folder, device, workload.model.dtype)
    rows = step_table(sampler, workload.schedule, steps)
    sample_latents = pytorch_baseline.Sampler(
        model, rows, workload.schedule.prediction, guidance_scale, compiled=compiled
    )
    text = torch_features(workload, device, with_empty=guidance_scale != 1.0)
    noise = pytorch_baseline.channels_first(workload.noise(), device)
    return lambda: sample_latents(noise, text).movedim(1, -1).cpu().numpy()


if __name__ == "__main__":
    cli.run(main)
