"""Benchmarks a training step against PyTorch: `python -m lidit_jax.benchmarks.train_step [--config=configs/1b.py …]`.

The step of `lidit_jax.trainer` (refiners, DiT, loss, gradient, clipping, AdamW and EMA, as the config has them) on
precomputed latents and encoder features. The frozen LLMs and the VAE are left out on both sides.

    lidit_jax         on all devices, over the config's mesh
    PyTorch           the exported model (`pytorch_baseline.py`) on one device, under autocast
    PyTorch compiled  its loss and gradient under `torch.compile`

All start from the same weights and use the same timesteps and noise, so that losses and gradient norms can be compared:
ours samples them within its step, PyTorch reads saved copies. `train.accumulate` is 1: a step is one micro-batch. FLOPs
are counted analytically (`models/flops.py`), without those that rematerialisation repeats; MFU is FLOP/s over the
chips' peak. Contestants run in turn, but all are loaded at once and share the accelerator's memory.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

from lidit_jax import cli
from lidit_jax.benchmarks import shared_flags, workload_flags
from lidit_jax.benchmarks.contest import Result, largest_difference, write_figures

if TYPE_CHECKING:
    import jax

    from lidit_jax.benchmarks.workload import Work, Workload
    from lidit_jax.train_config import TrainConfig
    from lidit_jax.trainer import Batch, Trainer

flags.adopt_module_key_flags(workload_flags)  # shows them in --help
_TRACE = flags.DEFINE_string(
    "trace", None, "folder for a trace of one round of ours, which is not timed, for XProf or TensorBoard"
)
_STEPS = shared_flags.define_repeats("steps_a_round", 4, "steps per round")

INPUTS_FILE = "inputs.npz"


def main() -> None:
    import jax

    from lidit_jax.benchmarks.workload import format_table, from_flags, measurements, run_contest
    from lidit_jax.models.flops import FORWARD_AND_BACKWARD

    workload, experiment = from_flags()
    steps = _STEPS.value
    arguments, mesh = (workload, experiment.train, steps), dict(experiment.config.mesh)
    prepare = functools.partial(ours, *arguments, mesh=mesh, trace=_TRACE.value)
    results = run_contest(prepare, functools.partial(pytorch, *arguments))
    flops = steps * FORWARD_AND_BACKWARD * workload.forward_flops(workload.batch)
    print(workload)
    samples, devices = steps * workload.batch, jax.device_count()
    rows = measurements(results, steps=steps, samples=samples, flops=flops, devices=devices)
    print(format_table(rows, steps, "samples"))
    differences = {}
    for result in results[1:]:
        losses, norms = (largest_difference([_select_row(results[0], i), _select_row(result, i)]) for i in range(2))
        print(f"{result.name}: losses differ by {losses:.1e} of the largest, gradient norms by {norms:.1e}")
        differences[result.name] = {"losses": losses, "gradient_norms": norms}
    write_figures(
        workload_flags.JSON.value,
        f"training step, {workload}",
        workload_flags.ROUNDS.value,
        rows,
        differences=differences,
    )


def _select_row(result: Result, index: int) -> Result:
    """Returns a result with row `index` of its output: 0 for losses, 1 for gradient norms."""
    return dataclasses.replace(result, output=result.output[index])


# --- contestants -------------------------------------------------------------------------------------------------


def ours(
    workload: "Workload",
    config: "TrainConfig",
    steps: int,
    *,
    mesh: Mapping[str, int],
    folder: Path | None,
    trace: str | None = None,
) -> "Work":
    """Prepares our training step; a round returns the losses and gradient norms of its steps, float32 [2, S].

    Args:
      workload: what to train.
      config: of the training.
      steps: per round.
      mesh: sizes of the device mesh's axes.
      folder: where the weights and the random inputs of the first two rounds (warm-up, and the one whose outputs are
        compared) are saved for `pytorch`; None if it does not run.
      trace: folder for a trace of the second round; None traces nothing.
    """
    import jax
    from etils import epath

    from lidit_jax.benchmarks.workload import save_weights
    from lidit_jax.profiling import StepProfiler

    trainer, batch = make_trainer(workload, config, mesh)
    state, key = trainer.init(0), jax.random.key(1)
    if folder:
        save_weights(folder, state.params)
        inputs = [random_inputs(workload, batch["moments"], key, number) for number in range(2 * steps)]
        arrays = {name: np.stack([of_step[name] for of_step in inputs]) for name in inputs[0]}
        np.savez(folder / INPUTS_FILE, **arrays, learning_rate=[trainer.learning_rate(i) for i in range(2 * steps)])
    numbers = itertools.count()
    profiler = StepProfiler(range(steps, 2 * steps) if trace else range(0), epath.Path(trace or "."))

    def work() -> np.ndarray:
        nonlocal state
        metrics = []
        with jax.set_mesh(trainer.mesh):
            for number in itertools.islice(numbers, steps):
                profiler.before(number, state.step)
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, step_metrics = trainer.step(state, trainer.task.frozen, batch, key, number)
                metrics.append((step_metrics["loss"].mean, step_metrics["grad_norm"]))
                if profiler.ends_after(number):
                    jax.block_until_ready(state.step)
                    profiler.close()
        return np.array(jax.device_get(metrics), np.float32).T

    return work


def make_trainer(workload: "Workload", config: "TrainConfig", mesh_sizes: Mapping[str, int]) -> "tuple[Trainer, Batch]":
    """Returns a trainer on precomputed latents and features, and one batch on the device."""
    import jax
    import jax.numpy as jnp

    from lidit_jax.benchmarks.workload import noisy_init
    from lidit_jax.models.lidit import LIDiT
    from lidit_jax.models.vae import AutoencoderKL
    from lidit_jax.parallel.mesh import check_model, make_mesh
    from lidit_jax.parallel.rules import ShardingRules, replicated
    from lidit_jax.stages.lidit import lidit_task
    from lidit_jax.text.encoders import PrecomputedEncoder
    from lidit_jax.trainer import Trainer

    mesh = make_mesh(mesh_sizes)
    check_model(mesh, workload.model.hidden_size, workload.model.num_heads)
    mean = workload.noise()
    batch = {"moments": np.concatenate([mean, np.full_like(mean, -4.0)], axis=-1)}  # means, then log-variances
    encoders, prefixes = {}, {}
    for (name, lengths), features in zip(workload.text.items(), workload.features(), strict=True):
        shared = lengths.shares_prefix
        encoders[name] = PrecomputedEncoder(lengths.width, 0 if shared else lengths.prefix)
        sequences = [features.prompt] if shared else [features.prefix, features.prompt]
        prefixes[name] = jax.device_put(features.prefix if shared else jnp.zeros(()), replicated(mesh))
        batch[f"{name}/encoded"] = np.concatenate(sequences, axis=1)
        batch[f"{name}/mask"] = features.mask
        batch[f"{name}/truncated"] = np.zeros(workload.batch, bool)
    model, vae, frozen = LIDiT(workload.model), AutoencoderKL(workload.vae), {"vae": {}, "encoders": prefixes}
    task = lidit_task(model, workload.schedule, encoders, vae, frozen)
    trainer = Trainer(dataclasses.replace(task, init=noisy_init(task.init)), config, mesh, ShardingRules())
    return trainer, trainer.put(batch)


def random_inputs(workload: "Workload", moments: "jax.Array", key: "jax.Array", number: int) -> dict[str, np.ndarray]:
    """Returns the task's random inputs in step `number`, under the field names of `pytorch_baseline.StepInputs`."""
    import jax

    from lidit_jax.models.vae import DiagonalGaussian, to_model_latents

    schedule = workload.schedule
    posterior_key, diffusion_key = jax.random.split(jax.random.fold_in(key, number))
    times_key, noise_key = jax.random.split(diffusion_key)
    latents = to_model_latents(DiagonalGaussian.from_moments(moments).sample(posterior_key), workload.vae)
    times = schedule.sample_times(times_key, workload.batch)
    noise = jax.random.normal(noise_key, latents.shape)
    inputs = {
        "noised": schedule.add_noise(latents, noise, times),
        "timesteps": schedule.model_timesteps(times),
        "target": schedule.target(latents, noise, times),
    }
    return jax.device_get(inputs)


def pytorch(
    workload: "Workload", config: "TrainConfig", steps: int, *, folder: Path, device: str, compiled: bool
) -> "Work":
    """Prepares PyTorch's training step with the weights and random inputs that `ours` saved, which it cycles through.

    Arguments and the result of a round are as in `ours`.
    """
    import torch

    from lidit_jax.benchmarks import pytorch_baseline
    from lidit_jax.benchmarks.workload import load_torch_model, torch_features

    dtype = getattr(torch, workload.model.dtype)
    trainer = pytorch_baseline.Trainer(
        load_torch_model(workload, folder, device), config, dtype=dtype, compiled=compiled
    )
    text = torch_features(workload, device)
    with np.load(folder / INPUTS_FILE) as file:
        learning_rates = file["learning_rate"].tolist()
        inputs = pytorch_baseline.split_steps(file, device)
    schedule = itertools.cycle(zip(inputs, learning_rates, strict=True))

    def work() -> np.ndarray:
        metrics = [trainer.step(step_inputs, text, rate) for step_inputs, rate in itertools.islice(schedule, steps)]
        return torch.stack([torch.stack(values) for values in zip(*metrics, strict=True)]).cpu().numpy()

    return work


if __name__ == "__main__":
    cli.run(main)
