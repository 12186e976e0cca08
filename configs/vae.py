"""Trains an autoencoder alone, for a LI-DiT to use afterwards (`--config.vae.weights=WORKDIR/vae`).

    python -m lidit_jax.main --config=configs/vae.py --workdir=runs/vae
    python -m lidit_jax.main --config=configs/vae.py:FOLDER_OF_TAR_SHARDS --workdir=runs/vae

Without an argument it trains on the built-in scenes. The last of your shards is held out from training, and the
finished autoencoder is evaluated on it. The paper's VAE is 8x with 16 channels, and nothing else is stated; the widths
here train in minutes on a CPU, and comments give those of a full one.
"""

from ml_collections import ConfigDict


def get_config(path: str = "") -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.mesh = {"fsdp": -1}

    config.data = {
        "source": "tar" if path else "shapes",
        "path": path,
        "resolution": 64,  # ours; 256 is usual
    }
    if path:
        config.data.held_out_shards = 1

    config.vae = {
        "dtype": "float32",
        "model": {
            "block_out_channels": (16, 32, 64, 64),  # 8x: paper; widths ours, (128, 256, 512, 512) is usual
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
            "ema_decay": 0.99,
            "sample_every": 1000,
        },
        "reconstruction": "l2",
        "kl_weight": 1e-4,
        # The perceptual loss is off without --config.vae.perceptual.weights=FILE, see docs/vae.md.
        # The adversarial loss is off. Latent diffusion gives it weight 0.5 and starts it at step 50,001; a few thousand
        # steps are too short for it.
        "evaluate": {"num_images": 512},
    }
    return config
