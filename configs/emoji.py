"""A small model of your own image-text pairs, with networks small enough for a CPU or Colab.

    python -m lidit_jax.main --config=configs/emoji.py --workdir=runs/emoji --config.data.path=FOLDER_OF_TAR_SHARDS

The data may come from any source in docs/data.md. The sizes are for a thousand captioned emoji of about 190 px, on
which the LLMs and the VAE are trained too. All numbers are ours.
"""

from typing import Any

from ml_collections import ConfigDict

from lidit_jax.text.prompts import INSTRUCTION


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"fsdp": -1}

    config.data = {
        "source": "tar",  # or parquet, folder, array_record, tfds
        "path": "",  # to fill in
        "resolution": 64,
        "max_aspect": 2.0,
    }

    config.text = {
        "max_length": 16,
        "instruction": INSTRUCTION,
    }
    config.encoders = {"llama": _language_model("llama"), "qwen": _language_model("qwen2")}

    config.vae = {
        "dtype": "float32",
        "model": {
            "block_out_channels": (16, 32, 64, 64),
            "latent_channels": 16,
            "norm_num_groups": 8,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,
            "sample_size": 64,
        },
        "train": {
            "steps": 1500,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "ema_decay": 0.99,
        },
        "kl_weight": 1e-4,
        "reconstruction": "l2",
    }

    config.model = {
        "depth": 6,
        "hidden_size": 192,
        "num_heads": 6,
        "patch_size": 1,
        "position": "conv+sincos+rope",  # "conv" is the paper's
        "position_grid": 8,  # tokens along a side
        "refiner_blocks": 2,  # paper
        "refiner_mlp_ratio": 2.0,
        "collaborative_blocks": 1,  # paper
        "remat": "none",
        "dtype": "float32",
    }
    config.diffusion = {"name": "rectified_flow", "shift": 4.0}
    config.train = {
        "steps": 1500,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "ema_decay": 0.995,
        "log_every": 50,
        "checkpoint_every": 500,
        "sample_every": 500,
    }
    config.sample = {
        "sampler": "euler",
        "guidance_scale": 3.0,
    }
    return config


def _language_model(family: str) -> dict[str, Any]:
    """Returns the `encoders` entry of an LLM of this family, with its training."""
    return {
        "dtype": "float32",
        "family": family,
        "model": {
            "vocab_size": 1024,
            "hidden_size": 128,
            "intermediate_size": 256,
            # Features come from the first block: trained on few captions, it encodes best which word is where.
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "train": {
            "steps": 300,
            "batch_size": 64,
            "learning_rate": 1e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "weight_decay": 0.1,
        },
    }
