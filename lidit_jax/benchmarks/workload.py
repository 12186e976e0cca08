"""Workload of `train_step` and `sample`: a config's model, with random encoder features and latents.

LLMs and the VAE are left out for all contestants: `encode` and `vae` measure those. Only their sizes are needed, which
the config has.
"""

import dataclasses
import functools
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lidit_jax import cli
from lidit_jax.benchmarks import workload_flags
from lidit_jax.benchmarks.contest import Contestant, Result, contest, describe_host, disable_tf32
from lidit_jax.benchmarks.contest import measurements as contest_measurements
from lidit_jax.diffusion.schedules import Schedule
from lidit_jax.errors import UserError
from lidit_jax.experiment import NO_LIDIT, Experiment, abstract_experiment
from lidit_jax.models.flops import TextLengths, lidit_forward
from lidit_jax.models.lidit import TextFeatures
from lidit_jax.models.lidit_config import LIDiTConfig
from lidit_jax.models.vae_config import VAEConfig
from lidit_jax.parallel.chips import chip_of
from lidit_jax.text.load_encoder import open_encoder

if TYPE_CHECKING:
    from lidit_jax.benchmarks import pytorch_baseline
    from lidit_jax.pytorch import transformer_lidit

WEIGHTS = "weights.safetensors"

Work = Callable[[], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Configs and sizes, from which every process generates the same random arrays.

    Attributes:
      model, schedule, vae: of the config.
      text: LLM's name -> token counts and width of its features.
      text_dtypes: LLM's name -> dtype of its features.
      batch: number of samples.
      height, width: of the latents, in latent pixels.
    """

    model: LIDiTConfig
    schedule: Schedule
    vae: VAEConfig
    text: Mapping[str, TextLengths]
    text_dtypes: Mapping[str, str]
    batch: int
    height: int
    width: int

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.height, self.width, self.model.latent_channels

    @property
    def text_widths(self) -> list[int]:
        return [lengths.width for lengths in self.text.values()]

    def noise(self) -> np.ndarray:
        """Returns standard normal latents, float32 [B, H, W, C]."""
        return np.random.default_rng(0).standard_normal(self.latents_shape, np.float32)

    def features(self, *, with_empty: bool = False) -> list[TextFeatures]:
        """Returns random features per LLM, NumPy arrays in its dtype, for B prompts of 1 to max_length tokens.

        Args:
          with_empty: appends B rows of empty prompts, which have the end token alone.
        """
        random = np.random.default_rng(1)
        rows = 2 * self.batch if with_empty else self.batch
        features = []
        for name, sizes in self.text.items():
            dtype = jnp.dtype(self.text_dtypes[name])
            lengths = random.integers(1, sizes.prompt + 1, rows)
            lengths[self.batch :] = 1
            prefix_shape = (sizes.prefix, sizes.width) if sizes.shares_prefix else (rows, sizes.prefix, sizes.width)
            prefix = random.standard_normal(prefix_shape, np.float32).astype(dtype)
            prompt = random.standard_normal((rows, sizes.prompt, sizes.width), np.float32).astype(dtype)
            features.append(TextFeatures(prefix, prompt, np.arange(sizes.prompt) < lengths[:, None]))
        return features

    def forward_flops(self, rows: int) -> int:
        """Returns the FLOPs of the model's forward pass over a batch of `rows` rows."""
        return lidit_forward(self.model, rows, self.height, self.width, list(self.text.values()))

    def __str__(self) -> str:
        model, factor = self.model, self.vae.downsampling_factor
        text = ", ".join(f"{name} {sizes.prefix} + {sizes.prompt} tokens" for name, sizes in self.text.items())
        return (
            f"depth {model.depth}, width {model.hidden_size}, {model.dtype}, remat {model.remat}; batch {self.batch}, "
            f"{self.height * factor} x {self.width * factor} px, {text}"
        )


def from_flags() -> tuple[Workload, Experiment]:
    """Calls `from_config` with the command line's values; the config defaults to the demo's, configs/shapes.py."""
    return from_config(
        cli.read_config(workload_flags.CONFIG),
        batch=workload_flags.BATCH.value,
        resolution=workload_flags.RESOLUTION.value,
        dtype=workload_flags.DTYPE.value,
        prefix_tokens=workload_flags.PREFIX_TOKENS.value,
    )


def from_config(
    config: ConfigDict,
    *,
    batch: int | None = None,
    resolution: int | None = None,
    dtype: str | None = None,
    prefix_tokens: int = 64,
) -> tuple[Workload, Experiment]:
    """Returns the workload of a config, and its experiment with the overrides applied.

    Loads nothing but tokenizers, of encoders that name a folder of weights.

    Args:
      config: an experiment's.
      batch: batch size; None takes the config's.
      resolution: side of the images in pixels; None takes the config's.
      dtype: compute dtype of the model; None takes the config's.
      prefix_tokens: tokens of system prompt and instruction, for LLMs whose tokenizers are not available.

    Raises:
      UserError: the config has no model, is invalid, or the resolution is not a multiple of the patch size in pixels.
    """
    config = config.copy_and_resolve_references()
    if "model" not in config:
        raise UserError(NO_LIDIT)
    with config.unlocked():
        config.data.resolution = resolution or config.data.resolution
        config.train.accumulate = 1
        if dtype:
            config.model.dtype = dtype
        if batch:
            config.train.batch_size = config.sample.batch_size = batch
    experiment = abstract_experiment(config)
    side, multiple, vae = experiment.data.resolution, experiment.size_multiple(), experiment.vae_config
    if side % multiple:
        raise UserError(
            f"--resolution={side} is not a multiple of {multiple}: use {max(multiple, side // multiple * multiple)}"
        )
    workload = Workload(
        model=experiment.model.config,
        schedule=experiment.schedule,
        vae=vae,
        text={name: _text_lengths(experiment, name, prefix_tokens) for name in experiment.encoders},
        text_dtypes={name: encoder.dtype for name, encoder in experiment.encoders.items()},
        batch=experiment.train.batch_size,
        height=side // vae.downsampling_factor,
        width=side // vae.downsampling_factor,
    )
    return workload, experiment


def _text_lengths(experiment: Experiment, name: str, prefix_tokens: int) -> TextLengths:
    """Returns the token counts and the width of encoder `name`."""
    config, text = experiment.encoders[name], experiment.text
    if config.weights:
        encoder = open_encoder(config.weights, experiment.prompt_tokenizer, dtype=config.dtype)
        return TextLengths(len(encoder.tokenizer.prefix()), text.max_length, encoder.hidden_size, not encoder.lead)
    if config.train:  # a tokenizer trained by the run has one token for each word of its instruction
        prefix_tokens = len(re.findall(r"\w+|[^\w\s]", f"{text.system_prompt} {text.instruction}"))
    return TextLengths(prefix_tokens, text.max_length, experiment.encoders[name].language_model.hidden_size)


# --- weights -----------------------------------------------------------------------------------------------------


def noisy_init(init: Callable[[jax.Array], Any], scale: float = 0.02) -> Callable[[jax.Array], Any]:
    """Wraps `init` to add noise to every parameter: zero-initialised gates would hide errors in what they gate."""

    def noisy(key: jax.Array) -> Any:
        params = init(key)
        # All arrays take the head of one noise vector: one random call per array would compile four times as long.
        size = max(x.size for x in jax.tree.leaves(params))
        noise = scale * jax.random.normal(jax.random.fold_in(key, 1), (size,))
        return jax.tree.map(lambda x: x + noise[: x.size].reshape(x.shape), params)

    return noisy


def save_weights(folder: Path, params: Any) -> None:
    """Saves a Flax tree with dotted paths as safetensors, for the contestants that are prepared later."""
    from safetensors.numpy import save_file

    flat = flax.traverse_util.flatten_dict(params, sep=".")
    save_file({name: np.ascontiguousarray(jax.device_get(array)) for name, array in flat.items()}, folder / WEIGHTS)


def load_torch_model(
    workload: Workload, folder: Path, device: str, dtype: str = "float32"
) -> "transformer_lidit.LIDiTTransformer2DModel":
    """Loads the PyTorch model with the weights of `save_weights`, in this dtype."""
    import torch
    from safetensors.numpy import load_file

    from lidit_jax.benchmarks import pytorch_baseline

    disable_tf32()
    params = load_file(folder / WEIGHTS)
    return pytorch_baseline.from_flax(workload.model, workload.text_widths, params, device, getattr(torch, dtype))


def torch_features(workload: Workload, device: str, *, with_empty: bool = False) -> "pytorch_baseline.Text":
    """Returns `Workload.features` as arguments of the PyTorch model."""
    import torch

    def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float32)).to(device, getattr(torch, dtype))  # it takes no bfloat16

    features, dtypes = workload.features(with_empty=with_empty), workload.text_dtypes.values()
    return {
        "encoder_hidden_states": [tensor(text.prompt, dtype) for text, dtype in zip(features, dtypes, strict=True)],
        "encoder_attention_mask": [torch.from_numpy(text.mask).to(device) for text in features],
        "instruction_hidden_states": [tensor(text.prefix, dtype) for text, dtype in zip(features, dtypes, strict=True)],
    }


# --- the contest -------------------------------------------------------------------------------------------------


def run_contest(ours: Callable[..., Work], pytorch: Callable[..., Work]) -> list[Result]:
    """Runs the contest between ours and, unless the flags leave it out, PyTorch.

    Args:
      ours: prepares ours: (folder) -> work. Saves what `pytorch` needs in the folder, None without PyTorch.
      pytorch: prepares PyTorch: (folder, device, compiled) -> work. Called after `ours`.
    """
    if not workload_flags.TORCH.value:
        print(describe_host(), flush=True)
        return contest([Contestant("lidit_jax", functools.partial(ours, folder=None))], workload_flags.ROUNDS.value)
    print(describe_host("torch"), flush=True)
    device = _torch_device()
    with tempfile.TemporaryDirectory() as name:
        contestants = [Contestant("lidit_jax", functools.partial(ours, folder=Path(name)))]
        for compiled in (False, True) if workload_flags.COMPILED.value else (False,):
            prepare = functools.partial(pytorch, folder=Path(name), device=device, compiled=compiled)
            contestants.append(Contestant("PyTorch compiled" if compiled else "PyTorch", prepare))
        return contest(contestants, workload_flags.ROUNDS.value)


def _torch_device() -> str:
    """Returns PyTorch's name for the device that JAX uses.

    Raises:
      UserError: JAX uses several devices, or one that PyTorch cannot use.
    """
    import torch

    platform = jax.default_backend()
    if jax.device_count() > 1:
        raise UserError(
            f"JAX uses {jax.device_count()} devices, but PyTorch uses one: make one device visible, or give --notorch"
        )
    if platform == "cpu":
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"JAX runs on a {platform}, which PyTorch cannot use: install PyTorch's build for it, or give --notorch"
        )
    return "cuda"


def measurements(
    results: Sequence[Result], *, steps: int, samples: int, flops: float, devices: int = 1
) -> list[dict[str, Any]]:
    """Returns the figures of each contestant, those of `contest.measurements` and its MFU.

    Args:
      results: measurements, ours first.
      steps: steps per round.
      samples: samples per round.
      flops: FLOPs per round.
      devices: number of devices that ours uses.

    Returns:
      Per contestant, also "mfu": None where the peak of the chip is unknown.
    """
    chip = chip_of(jax.devices()[0])
    rows = contest_measurements(results, steps=steps, samples=samples, tflops=flops / 1e12)
    return [
        row | {"mfu": flops / result.median / (chip.flops * devices) if chip else None}
        for row, result in zip(rows, results, strict=True)
    ]


def format_table(rows: Sequence[Mapping[str, Any]], steps: int, unit: str) -> str:
    """Formats one line per contestant, with how many times as fast as it ours is.

    Args:
      rows: the return value of `measurements`.
      steps: steps per round.
      unit: plural name of a sample.
    """
    has_peak = rows[0]["mfu"] is not None
    heads = ["ms per step", f"{unit}/s", "TFLOP/s", *(["MFU"] if has_peak else []), f"{rows[0]['name']} is", "peak MiB"]
    lines = [f"{'':18}" + "".join(f"{head:>13}" for head in heads)]
    for row in rows:
        cells = [f"{row['ms_per_step']:.1f}", f"{row['samples_per_second']:.4g}", f"{row['tflops_per_second']:.3g}"]
        cells += [f"{row['mfu']:.1%}"] if has_peak else []
        cells += [f"{row['times_as_slow']:.2f} x", f"{row['peak_mib']:.0f}"]
        lines.append(f"{row['name']:18}" + "".join(f"{cell:>13}" for cell in cells))
    return f"median of {workload_flags.ROUNDS.value} rounds of {steps} steps\n" + "\n".join(lines)
