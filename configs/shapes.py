"""The demo: built-in scenes, two small LLMs, a small VAE and LI-DiT, all trained here, in minutes on a CPU.

    python -m lidit_jax.main --config=configs/shapes.py --workdir=runs/shapes

It has every component of the paper at toy size; all numbers are ours. The instruction is shorter than the paper's,
because on a CPU the text path takes most of the time.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"fsdp": -1}

    config.data = {
        "source": "shapes",
        "resolution": 32,
        "captions": {"en": 0.6, "zh": 0.4},
    }

    config.text = {
        "max_length": 28,
        "instruction": "Describe the objects:",
    }
    # The names sort into the order of the model's branches, since a ConfigDict sorts its keys.
    config.encoders = {"llama": _language_model("llama"), "qwen": _language_model("qwen2")}

    config.vae = {
        "dtype": "float32",
        "model": {
            "block_out_channels": (16, 16, 32, 64),
            "latent_channels": 16,  # paper
            "norm_num_groups": 8,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        },
        "train": {
            "steps": 1600,
            "batch_size": 8,
            "learning_rate": 4e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "ema_decay": 0.99,
            "log_every": 300,
        },
        "kl_weight": 1e-3,
        "reconstruction": "l2",
    }

    config.model = {
        "depth": 4,
        "hidden_size": 128,
        "num_heads": 2,
        "patch_size": 1,
        "position": "conv+sincos+rope",  # "conv" is the paper's
        "position_grid": 4,  # tokens along a side
        "refiner_blocks": 2,  # paper
        "refiner_mlp_ratio": 1.0,
        "collaborative_blocks": 1,  # paper
        "remat": "none",
        "scan_unroll": 4,
        "dtype": "float32",
    }
    # Most training samples are nearly pure noise, where the prompt decides the layout: this takes longest to learn.
    config.diffusion = {"name": "rectified_flow", "shift": 10.0}
    config.train = {
        "steps": 1350,
        "batch_size": 32,
        "learning_rate": 2e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "ema_decay": 0.995,
        "log_every": 50,
        "checkpoint_every": 400,
        "sample_every": 675,
    }
    config.sample = {
        "sampler": "euler",
        "steps": 20,
        "guidance_scale": 1.5,
        "batch_size": 64,
    }
    config.evaluate = {"two_objects": 256, "held_out_pairs": 128, "three_objects": 128, "four_objects": 128}
    return config


def _language_model(family: str) -> dict[str, Any]:
    """Returns the `encoders` entry of an LLM of this family, with its training."""
    return {
        "dtype": "float32",
        "family": family,
        "model": {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            # Features come from the first block: trained on few captions, it encodes best which word is where.
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "train": {
            "steps": 250,
            "batch_size": 64,
            "learning_rate": 3e-3,
            "warmup_steps": 30,
            "schedule": "cosine",
            "weight_decay": 0.01,
        },
    }
