"""Image-text pairs from any folder of tar shards, with networks small enough for a CPU or Colab.

    python -m lidit_jax.main --config=configs/emoji.py --workdir=runs/emoji --config.data.path=FOLDER_OF_TAR_SHARDS

Written for a thousand captioned emoji of about 190 px; LLMs and VAE are trained on them too. All numbers are ours.
"""

from ml_collections import ConfigDict

from lidit_jax.text.prompts import INSTRUCTION


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.start_from = ""
    config.mesh = {"data": 1, "fsdp": -1, "tensor": 1}

    config.data = {
        "source": "tar",  # or array_record, tfds, folder
        "path": "",  # to fill in
        "split": "train",  # of tfds
        "data_dir": "",  # of tfds: folder of the prepared data sets
        "image_key": "",  # of tfds and array_record: the image feature, if there are several
        "class_names": "",  # file with one class name per line, if classes are numbers
        "index_dir": "",  # "": indexes are written beside the data
        "sequential": False,  # of tar: True reads shards from end to end, without indexes
        "streams": 0,  # of sequential reading; 0: the most that divide the batch, up to 256
        "shuffle_buffer": 0,  # of sequential reading; 0: four batches of every bucket
        "features": True,  # of precomputed: use stored encoder features, if there are any
        "resolution": 64,
        "max_aspect": 2.0,
        "bucket_multiple": 0,  # 0 means the latent cell, 8 px, and gives 5 buckets; 16 gives 3
        "captions": None,  # None: the usual caption fields
        "class_template": "",
        "caption_dropout": 0.1,
        "min_aesthetic": None,
        "aesthetic_key": "aesthetic",
        "min_side": 0,
        "drop_aspect_over": None,
        "allow_enlarging": True,
        "max_broken": 0.2,  # share of a thousand samples
        "drop_low_quality_captions": False,
        "num_threads": 2,
        "num_workers": 0,
    }

    config.text = {
        "max_length": 16,
        "system_prompt": "",
        "instruction": INSTRUCTION,
        "chat_template": True,
    }
    language_model = {
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 256,
        # Features come from the first block: trained on few captions, it encodes best which word is where.
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    language_model_train = {
        "steps": 300,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "warmup_steps": 50,
        "schedule": "cosine",
        "weight_decay": 0.1,
    }
    config.encoders = {
        name: {
            "weights": "",
            "dtype": "float32",
            "family": family,
            "model": dict(language_model),  # copied, so that overriding one does not change the other
            "train": dict(language_model_train),
        }
        for name, family in (("llama", "llama"), ("qwen", "qwen2"))
    }

    config.vae = {
        "weights": "",
        "dtype": "float32",
        "model": {
            "block_out_channels": (16, 32, 64, 64),
            "layers_per_block": 1,
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
            "compile_ahead": True,
            "log_every": 100,
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
        "latent_channels": 16,
        "mlp_ratio": 4.0,
        "refiner_blocks": 2,  # paper
        "refiner_gated": True,
        "refiner_causal": False,
        "refiner_rotary": True,
        "refiner_qk_norm": False,
        "refiner_mlp_ratio": 2.0,
        "fusion": "collaborative",
        "collaborative_blocks": 1,  # paper
        "remat": "none",
        "attention": "auto",
        "dtype": "float32",
    }
    config.diffusion = {"name": "rectified_flow", "shift": 4.0}
    config.train = {
        "steps": 1500,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "warmup_steps": 100,
        "schedule": "cosine",
        "weight_decay": 0.0,
        "clip_norm": 1.0,
        "ema_decay": 0.995,
        "compile_ahead": True,  # compile the step of every bucket before the first step
        "log_every": 50,
        "checkpoint_every": 500,
        "sample_every": 500,
    }
    config.sample = {
        "sampler": "euler",
        "steps": 25,
        "guidance_scale": 3.0,
        "batch_size": 16,
        # Batches with more pixels are decoded in slices, larger images in tiles with sides of `decode_tile` pixels.
        "decode_pixels": 1024 * 1024,
        "decode_tile": 256,
    }
    return config
