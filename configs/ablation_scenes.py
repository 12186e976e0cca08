"""The paper's ablations in miniature: `python -m lidit_jax.ablate --table=2 --out=DIR`.

Built-in scenes of two, three and four objects in equal shares, because adjectives and nouns can be mixed up only where
there are several; captions, image size, VAE and DiT are the demo's. All numbers are ours.
"""

from ml_collections import ConfigDict

from lidit_jax.config import sibling_config
from lidit_jax.text.prompts import INSTRUCTION


def get_config() -> ConfigDict:
    config = sibling_config(__file__, "shapes")
    config.data.object_shares = (0.0, 1.0, 1.0, 1.0)
    config.text = {
        "max_length": 28,
        "instruction": "",  # each row sets its own
        "chat_template": False,
    }
    del config.encoders  # each row sets its own
    config.language_models = {
        "instruction": INSTRUCTION,  # paper
        "instructed_share": 0.5,  # share of a tuned model's documents; a base model's have no instruction
        "length": 88,  # tokens of instruction, caption and answer
        "model": {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 5,  # features come from the third block: as many blocks as T5's encoder has
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "t5": {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "dtype": "float32"},
        "train": {
            "steps": 1000,
            "batch_size": 32,
            "learning_rate": 3e-3,
            "warmup_steps": 50,
            "schedule": "cosine",
            "weight_decay": 0.01,
            "log_every": 100,
        },
    }
    config.train.update(steps=1500, log_every=100, checkpoint_every=500, sample_every=0)
    config.sample.batch_size = 128
    config.evaluate = {"two_objects": 256, "three_objects": 256, "four_objects": 512, "held_out_pairs": 128}
    return config
