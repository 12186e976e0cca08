"""Workdirs of untrained runs, in which all networks have random weights, so that every weight affects the images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from conftest import tiny_config
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from lidit_jax.checkpoint import Checkpoints
from lidit_jax.config import claim_workdir
from lidit_jax.diffusion.samplers import initial_noise
from lidit_jax.experiment import Experiment
from lidit_jax.models.lidit import TextFeatures
from lidit_jax.models.llm import CausalLM
from lidit_jax.text.load_encoder import open_encoder
from lidit_jax.text.train_tokenizer import train_tokenizer
from lidit_jax.weights.diffusers_vae import save_vae
from lidit_jax.weights.huggingface_llm import save_llm

CAPTIONS = ["a red circle above a blue square", "Describe the objects:", "红色圆形"]
SCALES = ("scale", "weight")  # parameter names of norms
VAE_CONTRAST = 0.3  # standard deviation of the decoded images


def random_config(diffusion: dict | None = None, sampler: str = "euler") -> ConfigDict:
    """Returns the tiny demo's config with patches of two cells, 25 sampling steps and guidance."""
    config = tiny_config()
    config.model.update(patch_size=2)
    config.diffusion = diffusion or {"name": "rectified_flow", "shift": 3.0}
    config.sample.update(sampler=sampler, steps=25, guidance_scale=3.0)
    config.text.max_length = 12
    return config


def make_workdir(folder, config: ConfigDict) -> epath.Path:
    """Creates the workdir of a run with this config; networks without `weights` are random."""
    workdir = epath.Path(folder)
    claim_workdir(workdir, config)
    run = Experiment(config, workdir)
    for seed, (name, encoder) in enumerate(run.encoders.items()):
        if not encoder.weights:
            llm = run.language_model_config(name)
            shapes = jax.eval_shape(CausalLM(llm).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
            tokenizer = train_tokenizer(CAPTIONS, llm.vocab_size)
            save_llm(run.encoder_folder(name), llm, random_like(shapes, seed, 1.0), tokenizer)
    if not run.vae.weights:
        save_vae(run.vae_folder(), run.vae_config(), random_vae(run))
    trees = {"params": random_lidit(run, 1), "ema": random_lidit(run, 2)}
    checkpoints = Checkpoints(run.training_folder("lidit") / "checkpoints", config.to_dict())
    checkpoints.save(7, jax.device_put(trees) | {"step": jnp.int32(7)}, {}, {})
    checkpoints.wait()
    checkpoints.close()
    return workdir


def random_like(shapes, seed: int, gain: float):
    """Returns a tree of normal numbers with the given shapes.

    Kernels scale their input by about `gain`; scales of norms are near one, because exact ones would hide mistakes.
    """
    rng = np.random.default_rng(seed)
    values = {}
    for path, leaf in flatten_dict(nn.meta.unbox(shapes)).items():
        values[path] = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1] == "kernel":
            inputs = leaf.shape[:-1] if leaf.ndim == 4 else leaf.shape[-2:-1]
            values[path] *= gain / np.sqrt(np.prod(inputs))
        else:
            values[path] = 0.1 * values[path] + np.float32(path[-1] in SCALES)
    return unflatten_dict(values)


def random_lidit(run: Experiment, seed: int):
    side, channels = 2 * run.model.config.patch_size, run.model.config.latent_channels
    text = [
        TextFeatures(jnp.zeros((2, width)), jnp.zeros((1, 3, width)), jnp.ones((1, 3), bool)) for width in _widths(run)
    ]
    latents = jnp.zeros((1, side, side, channels))
    shapes = jax.eval_shape(run.model.init, jax.random.key(0), latents, jnp.zeros(1), text)["params"]
    return random_like(shapes, seed, 1.4)


def random_vae(run: Experiment):
    config = run.vae_config()
    model = run.autoencoder(config)
    side = config.downsampling_factor
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, 3)))["params"]
    params = random_like(shapes, 3, 1.4)
    # Rescales the output, so that most decoded pixels are neither black nor white.
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, config.latent_channels))
    decoded = model.apply({"params": params}, latents, method=type(model).decode)
    end = params["decoder"]["conv_out"]
    end["kernel"] = end["kernel"] * VAE_CONTRAST / np.asarray(decoded).std()
    end["bias"] = np.zeros_like(end["bias"])
    return params


def starting_noise(seeds, height: int, width: int, config) -> np.ndarray:
    """Returns the initial noise of `Pipeline` for each seed, in PyTorch's layout [B, C, h, w]."""
    keys = jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
    factor = config.downsampling_factor
    noise = initial_noise(keys, (height // factor, width // factor, config.latent_channels))
    return np.asarray(noise).transpose(0, 3, 1, 2)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the PSNR of two uint8 images in dB; infinite if they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float("inf") if not error else 10 * np.log10(255**2 / error)


def _widths(run: Experiment) -> list[int]:
    encoders = {
        name: open_encoder(run.encoder_folder(name), run.prompt_tokenizer, dtype="float32") for name in run.encoders
    }
    return [encoder.hidden_size for encoder in encoders.values()]
