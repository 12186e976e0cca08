"""Writes the model card of an exported folder: the README.md that the Hugging Face hub shows."""

from collections.abc import Sequence

from etils import epath

from lidit_jax.experiment import Experiment
from lidit_jax.export.folder import TextEncoderEntry, component_names
from lidit_jax.weights.folders import HUB_NAME

TITLE = "LI-DiT"


def model_card(
    run: Experiment, encoders: Sequence[TextEncoderEntry], step: int, num_parameters: int, dtype: str
) -> str:
    """Returns the model card: Markdown with the hub's YAML front matter.

    Args:
      run: the exported run.
      encoders: prompt encoders, in the order of the folder's components.
      step: training step of the exported weights.
      num_parameters: number of LI-DiT's parameters.
      dtype: dtype of LI-DiT's weights.
    """
    sections = (
        _front_matter(run),
        _title(),
        _usage(run, encoders, dtype),
        _facts(run, encoders, step, num_parameters),
    )
    return "\n\n".join((*sections, _licences(run, encoders))) + "\n"


def _front_matter(run: Experiment) -> str:
    licence = ["license: other", "license_name: of-its-parts", "license_link: README.md"]
    tags = ["tags:", "- text-to-image", "- diffusers", "- lidit", "- lidit-jax"]
    return "\n".join(
        ["---", *licence, "library_name: diffusers", "pipeline_tag: text-to-image", *tags, "inference: false", "---"]
    )


def _title() -> str:
    return (
        f"# {TITLE}\n\nA diffusion transformer whose prompt encoders are decoder-only language models, after "
        "*Exploring the Role of Large Language Models in Prompt Encoding for Diffusion Models* "
        "([arXiv 2406.11831](https://arxiv.org/abs/2406.11831)). Trained with lidit-jax and exported to PyTorch; these "
        "are not the weights of the paper's authors."
    )


def _usage(run: Experiment, encoders: Sequence[TextEncoderEntry], dtype: str) -> str:
    sampling = run.sample
    # Load each network in its training dtype: LLMs in float32 take twice the memory of bfloat16 and gain nothing.
    dtypes = {"default": dtype, "vae": run.vae.dtype}
    dtypes |= {component_names(index)[0]: entry.dtype for index, entry in enumerate(encoders)}
    if len(set(dtypes.values())) == 1:
        given = f"torch.{dtype}"
    else:
        given = "{" + ", ".join(f'"{name}": torch.{kind}' for name, kind in dtypes.items()) + "}"
    return f"""## Usage

    pip install torch diffusers transformers accelerate safetensors

`FOLDER` is this folder, or its name on the hub. It contains code, in `pipeline_lidit.py` and
`transformer/transformer_lidit.py`: read it before you set `trust_remote_code`.

```python
import torch
from diffusers import DiffusionPipeline

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = DiffusionPipeline.from_pretrained("FOLDER", trust_remote_code=True, dtype={given}).to(device)
image = pipe(
    "a red circle left of a blue square",
    num_inference_steps={sampling.steps},
    guidance_scale={sampling.guidance_scale:g},
    generator=torch.Generator().manual_seed(0),
).images[0]
image.save("image.png")
```

To save memory: `pipe.enable_model_cpu_offload()` instead of `.to(device)`, and `pipe.enable_vae_tiling()`."""


def _facts(run: Experiment, encoders: Sequence[TextEncoderEntry], step: int, num_parameters: int) -> str:
    model, train, sampling = run.model.config, run.train, run.sample
    rows = {
        "parameters": f"{num_parameters:,} without the language models and the VAE",
        "depth, width, heads, patch": (f"{model.depth}, {model.hidden_size}, {model.num_heads}, {model.patch_size}"),
        "refiners": (
            f"{model.refiner_blocks} blocks for each language model, fusion {model.fusion} with "
            f"{model.collaborative_blocks}"
        ),
        "language models": ", ".join(_encoder_text(run, entry) for entry in encoders),
        "instruction": f"`{run.text.instruction}`" if run.text.instruction else "none",
        "prompt": f"up to {run.text.max_length - 1} tokens",
        "VAE": _vae_text(run),
        "data": _data_text(run),
        "resolution": f"{run.data.resolution} pixels",
        "training": f"{step:,} steps of {train.batch_size:,} images",
        "started from": f"`{_public(run.config.get('start_from') or '')}`, another LI-DiT, whose terms apply too",
        "objective": _objective_text(run),
        "sampler": f"{sampling.sampler}, {sampling.steps} steps, guidance {sampling.guidance_scale:g}",
    }
    if not run.config.get("start_from"):
        del rows["started from"]
    table = [f"| {name} | {value.replace('|', '&#124;')} |" for name, value in rows.items()]
    return "\n".join(["## Model", "", "| | |", "|---|---|", *table])


def _encoder_text(run: Experiment, entry: TextEncoderEntry) -> str:
    return f"{entry.name} ({_origin(run.encoders[entry.name].weights)})"


def _origin(weights: str) -> str:
    return f"`{_public(weights)}`" if weights else "trained in the same run"


def _public(place: str) -> str:
    """Returns a hub name unchanged, and only the last component of a path: a card must not reveal local paths."""
    if HUB_NAME.fullmatch(place) and not epath.Path(place).exists():
        return place
    return epath.Path(place).name


def _vae_text(run: Experiment) -> str:
    config = run.vae_config
    return f"{_origin(run.vae.weights)}: {config.downsampling_factor}x, {config.latent_channels} channels"


def _data_text(run: Experiment) -> str:
    data = run.data
    if data.mixture:
        return "a mixture of " + ", ".join(data.mixture)
    count = f", {data.num_examples:,} images" if data.source == "shapes" else ""
    return f"{data.source}{f' `{_public(data.path)}`' if data.path else ' (built in)'}{count}"


def _objective_text(run: Experiment) -> str:
    schedule = run.schedule
    if schedule.prediction == "flow":
        return f"rectified flow, shift {schedule.shift:g}"
    snr = ", zero terminal SNR" if schedule.zero_terminal_snr else ""
    return f"DDPM with {schedule.num_timesteps} timesteps, prediction of {schedule.prediction}{snr}"


def _licences(run: Experiment, encoders: Sequence[TextEncoderEntry]) -> str:
    lines = [
        "## Licences",
        "",
        "- Code (`pipeline_lidit.py`, `transformer/transformer_lidit.py`): Apache-2.0.",
        "- LI-DiT's weights (`transformer/`): as whoever trained them decides; terms of the training data may apply.",
    ]
    for index, entry in enumerate(encoders):
        weights = run.encoders[entry.name].weights
        folder = component_names(index)[0]
        if not weights:
            lines.append(f"- `{folder}/` ({entry.name}): trained in the same run, as LI-DiT's weights.")
            continue
        inside = "is not in this folder, loaded from" if entry.source else f"is in `{folder}/`, a copy of"
        lines.append(f"- {entry.name} {inside} `{_public(weights)}`: its own licence applies, to copies as well.")
    if run.vae.weights:
        lines.append(f"- `vae/` is a copy of `{_public(run.vae.weights)}`: its own licence applies.")
    else:
        lines.append("- `vae/`: trained in the same run, as LI-DiT's weights.")
    return "\n".join(lines)
