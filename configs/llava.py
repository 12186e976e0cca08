"""Multi-modal instruction tuning of an 8B LLM, which makes it a better prompt encoder (paper, section 3.1 and Table 4).

    python -m lidit_jax.main --config=configs/llava.py --workdir=gs://BUCKET/llava \
        --config.llava.llm.weights=FOLDER --config.llava.vision.weights=FOLDER \
        --config.llava.align.data.path=blip_laion_cc_sbu_558k.json --config.llava.align.data.data_dir=IMAGES \
        --config.llava.tune.data.path=llava_v1_5_mix665k.json --config.llava.tune.data.data_dir=IMAGES

The result, WORKDIR/llava, is what `--config.encoders.llama3.weights` takes. The paper tunes after LLaVA-1.5 and states
no numbers: "LLaVA" marks those of Liu et al. 2023, with a vision tower of CLIP ViT-L/14 at 336 px.
"""

from ml_collections import ConfigDict

from lidit_jax.config import sibling_config


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # ours
    config.mesh = {"fsdp": -1}  # ours: weights sharded over all devices
    config.llava = {
        "llm": {
            "weights": "",  # to fill in; the paper: LLaMA3-8B and Qwen1.5-7B
            "model": sibling_config(__file__, "1b").encoders.llama3.model,  # for `compile`
        },
        "vision": {
            "weights": "",  # to fill in
            "model": {  # for `compile`: CLIP ViT-L/14 at 336 px
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "image_size": 336,
                "patch_size": 14,
            },
        },
        "align": {
            "data": {
                "source": "llava",
                "path": "",  # to fill in; LLaVA: 558k captions
                "resolution": 336,  # LLaVA
                "num_workers": 16,  # ours
            },
            "max_length": 1024,  # ours: captions are short
            "train": {
                "steps": 2180,  # LLaVA: one epoch
                "batch_size": 256,  # LLaVA
                "learning_rate": 1e-3,  # LLaVA
                "warmup_steps": 65,  # LLaVA: 3 %
                "checkpoint_every": 500,  # ours
                "b2": 0.999,  # LLaVA
                "schedule": "cosine",  # LLaVA
            },
        },
        "tune": {
            "data": {
                "source": "llava",
                "path": "",  # to fill in; LLaVA: 665k conversations, of which those with an image are used here
                "resolution": 336,  # LLaVA
                "num_workers": 16,  # ours
            },
            "max_length": 2048,  # LLaVA
            "train": {
                "steps": 5200,  # LLaVA: one epoch
                "batch_size": 128,  # LLaVA
                "learning_rate": 2e-5,  # LLaVA
                "warmup_steps": 156,  # LLaVA: 3 %
                "checkpoint_every": 500,  # ours
                "b2": 0.999,  # LLaVA
                "schedule": "cosine",  # LLaVA
            },
        },
    }
    return config
