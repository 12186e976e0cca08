"""One row of the paper's Tables 2 to 6, or one of ours: `--config=configs/ablation.py:ROW`.

    python -m lidit_jax.main --config=configs/ablation.py:table2_token_refiner --workdir=gs://BUCKET/ablation/ROW \
        --config.data.path="gs://BUCKET/imagenet_and_cc12m/*.tar" --config.data.class_names=FILE \
        --config.encoders.llama3_base.weights=FOLDER --config.vae.weights=FOLDER

All rows train LI-DiT-1B at 256 px with batches of 256 for 300k steps at a learning rate of 1e-4 (paper, 5.1 and 5.3).
`llama3` and `qwen` are the LLMs after multi-modal instruction tuning, `llama3_base` and `qwen_base` those before it;
`lidit_jax/ablate/rows.py` explains which row uses which, and what of that is inferred.

The data is ImageNet, captioned "a photo of {class}", and 1.3M image-text pairs of CC12M; original captions are mixed
with synthetic ones by CogVLM (5.1, which we read as covering both sets; the shares are ours). A sample of either set
has one original caption, `txt` or `class`, and may have a `synthetic` one: then each is used half of the time, and
otherwise the original always. Without any synthetic captions, give --config.data.captions.synthetic=0.
"""

from ml_collections import ConfigDict

from lidit_jax.ablate.rows import BASE_LLMS, ROWS
from lidit_jax.errors import UserError
from lidit_jax.text.prompts import INSTRUCTION


def get_config(row: str = "") -> ConfigDict:
    if row not in ROWS:
        raise UserError(f"configs/ablation.py:{row}: name a row after the colon, one of {', '.join(ROWS)}")
    with_instruction = ROWS[row].instruction
    is_tuned = not set(ROWS[row].encoders) & set(BASE_LLMS)

    config = ConfigDict()
    config.seed = 0
    config.mesh = {"fsdp": -1}  # ours
    config.data = {
        "source": "tar",
        "path": "",  # to fill in; paper: ImageNet and 1.3M pairs of CC12M
        "resolution": 256,  # paper
        "max_aspect": 2.0,  # ours
        "bucket_multiple": 64,  # ours: 3 buckets; 0 means 16 px (latent cell times patch) and gives 9
        # ours: equal shares; the paper mixes original (CC12M's, ImageNet's class) and synthetic captions
        "captions": {"txt": 0.5, "class": 0.5, "synthetic": 0.5},
        "class_template": "a photo of {}",  # paper
        "num_workers": 16,  # ours
    }
    config.text = {
        "max_length": 128,  # ours
        "system_prompt": "You are a helpful assistant." if with_instruction else "",  # ours
        "instruction": INSTRUCTION if with_instruction else "",
        # Ours: a template is an instruction of its own, and a base LLM was not trained on one.
        "chat_template": with_instruction and is_tuned,
    }
    config.encoders = {name: {"weights": ""} for name in ROWS[row].encoders}
    config.vae = {"weights": ""}  # to fill in; the paper: 8x, 16 channels
    config.model = {
        "depth": 28,  # paper: LI-DiT-1B unless said otherwise (5.1), as the rest of Table 7
        "hidden_size": 1152,  # paper
        "num_heads": 16,  # paper
        "patch_size": 2,  # paper
        "position": "conv+sincos+rope",  # ours; the paper: "conv"
        "latent_channels": 16,  # paper
        "refiner_qk_norm": True,  # ours: attention logits are unbounded without it in bfloat16
        "collaborative_blocks": 1,  # paper
        "dtype": "bfloat16",  # paper
        **ROWS[row].model(),  # what the row changes
    }
    config.diffusion = {"name": "ddpm", "prediction": "epsilon"}
    config.train = {
        "steps": 300_000,  # paper
        "batch_size": 256,  # paper
        "learning_rate": 1e-4,  # paper
        "warmup_steps": 1000,  # ours, as all below
        "b2": 0.95,
        "weight_decay": 0.01,
        "ema_decay": 0.9999,
        "checkpoint_every": 5000,
        "sample_every": 10_000,
    }
    config.sample = {  # ours
        "sampler": "dpmpp_2m",
        "guidance_scale": 6.0,
    }
    return config
