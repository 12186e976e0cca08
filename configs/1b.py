"""LI-DiT-1B at 256 px (paper, Table 7), with LLaMA3-8B and Qwen1.5-7B as prompt encoders.

    python -m lidit_jax.main --config=configs/1b.py --workdir=gs://BUCKET/1b \
        --config.data.path="gs://BUCKET/shards/{00000..02999}.tar" \
        --config.encoders.llama3.weights=FOLDER --config.encoders.qwen.weights=FOLDER --config.vae.weights=FOLDER

The paper's LLMs are multi-modal fine-tunes, and its VAE was trained by its authors; give the folders of your own.
"""

from ml_collections import ConfigDict

# Sizes of the paper's LLMs, for `lidit_jax.compile` without weights; encoders with weights take theirs from the folder.
LLAMA3_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
}
QWEN1_5_7B = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # ours
    config.mesh = {"fsdp": -1}  # ours: weights sharded over all devices

    config.data = {
        "source": "tar",
        "path": "",  # to fill in; the paper: 30M pairs
        "resolution": 256,  # paper
        "max_aspect": 2.0,  # ours; the paper buckets by aspect ratio and states no limit
        "bucket_multiple": 64,  # ours: 3 buckets; 0 means 16 px (latent cell times patch) and gives 9
        "captions": {"txt": 0.5, "synthetic": 0.5},  # ours: equal shares; the paper mixes original and synthetic
        "min_aesthetic": 4.7,  # paper
        "min_side": 256,  # ours; the paper drops low resolutions and states no limit
        "drop_low_quality_captions": True,  # paper: URLs and tags
        "num_workers": 16,  # ours
    }

    config.text = {
        "max_length": 256,  # ours
        "num_lengths": 4,  # ours: lengths that prompts are padded to, chosen from the data; 12 programs with 3 buckets
        "system_prompt": "You are a helpful assistant.",  # ours; the paper has one and does not state it
        # paper, section 3.1
        "instruction": (
            "Describe the image by detailing the color, shape, size, texture, quantity, text, and spatial "
            "relationships of the objects:"
        ),
    }
    config.encoders = {
        "llama3": {  # paper: LLaMA3-8B, multi-modally tuned
            "weights": "",
            "model": LLAMA3_8B,  # paper: by the name
        },
        "qwen": {  # paper: Qwen1.5-7B, multi-modally tuned
            "weights": "",
            "family": "qwen2",
            "model": QWEN1_5_7B,  # paper: by the name
        },
    }
    config.vae = {
        "weights": "",  # to fill in; the paper: 8x, 16 channels, the authors' own
        "model": {  # for `compile`, as the sizes of the LLMs; ours: the widths of SD 3's VAE
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 16,  # paper
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
    }

    # The default mlp_ratio of 4 gives blocks of 0.93B parameters, the 1B of the name.
    config.model = {
        "depth": 28,  # paper
        "hidden_size": 1152,  # paper
        "num_heads": 16,  # paper
        "patch_size": 2,  # paper
        "position": "conv+sincos+rope",  # ours; the paper: "conv"
        "latent_channels": 16,  # paper
        "refiner_blocks": 2,  # paper
        "refiner_gated": True,  # paper
        "refiner_causal": False,  # paper
        "refiner_qk_norm": True,  # ours: attention logits are unbounded without it in bfloat16
        "fusion": "collaborative",  # paper
        "collaborative_blocks": 1,  # paper
        "dtype": "bfloat16",  # paper: mixed precision
    }
    # The paper states no betas: the defaults are those of Stable Diffusion.
    config.diffusion = {
        "name": "ddpm",  # paper
        "prediction": "epsilon",  # paper
    }
    config.train = {
        "steps": 500_000,  # paper
        "batch_size": 2048,  # paper
        "learning_rate": 1e-4,  # ours: that of the paper's ablations, as none is stated for the 1B
        "warmup_steps": 1000,  # ours, as all below
        "b2": 0.95,
        "weight_decay": 0.01,
        "ema_decay": 0.9999,
        "checkpoint_every": 2500,
        "sample_every": 5000,
        "keep": 3,
    }
    config.sample = {  # ours
        "sampler": "dpmpp_2m",
        "guidance_scale": 6.0,
    }
    return config
