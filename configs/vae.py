"""Trains an autoencoder alone, for a LI-DiT to use afterwards (`--config.vae.weights=WORKDIR/vae`).

    python -m lidit_jax.main --config=configs/vae.py --workdir=runs/vae
    python -m lidit_jax.main --config=configs/vae.py:FOLDER_OF_TAR_SHARDS --workdir=runs/vae

Without an argument it trains on the emoji shards beside this checkout or, if there are none, on the built-in scenes.
The last shard is held out from training, and the finished autoencoder is evaluated on it. The paper's VAE is 8x with 16
channels, and nothing else is stated; the widths here train in minutes on a CPU, and comments give those of a full one.
"""

from pathlib import Path

from ml_collections import ConfigDict

EMOJI = Path(__file__).resolve().parents[2] / "shared" / "data" / "fxemoji"


def get_config(path: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}

    path = path or (str(EMOJI) if EMOJI.is_dir() else "")
    config.data = {
        "source": "tar" if path else "shapes",
        "path": path,
        "held_out_shards": 1 if path else 0,
        "index_dir": "",  # "": indexes are written beside the shards
        "sequential": False,  # True reads shards from end to end, without indexes
        "streams": 0,  # of sequential reading; 0: the most that divide the batch, up to 256
        "shuffle_buffer": 0,  # of sequential reading; 0: four batches of every bucket
        "resolution": 64,  # ours; 256 is usual
        "max_aspect": 1.0,
        "bucket_multiple": 0,  # 0 means the latent cell, 8 px
        "min_side": 0,
        "num_threads": 2,
        "num_workers": 0,
    }

    config.vae = {
        # A folder in diffusers' format: its VAE is evaluated as it is, not trained.
        "weights": "",
        "dtype": "float32",
        "model": {
            "block_out_channels": (16, 32, 64, 64),  # 8x: paper; widths ours, (128, 256, 512, 512) is usual
            "layers_per_block": 1,  # ours; 2 is usual
            "latent_channels": 16,  # paper
            "norm_num_groups": 8,  # ours; 32 is usual
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "mid_block_add_attention": False,  # ours; True is usual
            "sample_size": 64,
        },
        "train": {
            "steps": 3000,
            "batch_size": 8,
            "learning_rate": 2e-3,
            "warmup_steps": 100,
            "schedule": "cosine",
            "b1": 0.9,
            "b2": 0.99,
            "clip_norm": 1.0,
            "ema_decay": 0.99,
            "compile_ahead": True,  # compile the step of every bucket before the first step
            "log_every": 100,
            "checkpoint_every": 1000,
            "sample_every": 1000,
        },
        "reconstruction": "l2",
        "kl_weight": 1e-4,
        # safetensors file with LPIPS on VGG16, see docs/vae.md; without it, the perceptual loss is off.
        "perceptual": {"weights": "", "weight": 1.0},
        # Latent diffusion has weight 0.5 and starts at step 50,001; a few thousand steps are too short for it.
        "adversarial": {"weight": 0.0, "start": 0, "width": 64, "layers": 3},
        "evaluate": {"num_images": 512, "batch_size": 32, "sheet": 16},
    }
    return config
