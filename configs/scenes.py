"""The second demo: scenes of up to six objects on a larger canvas, where positions, sizes and overlaps count.

    python -m lidit_jax.main --config=configs/scenes.py --workdir=runs/scenes           # 64 px, 8x8 tokens
    python -m lidit_jax.main --config=configs/scenes.py:128 --workdir=runs/scenes_128   # 128 px, 16x16 tokens

It is the demo of configs/shapes.py with another layout of the scenes and a deeper LI-DiT, for experiments that need a
larger grid of tokens. All numbers are ours.
"""

from ml_collections import ConfigDict

from lidit_jax.config import sibling_config
from lidit_jax.errors import UserError

# Side in pixels -> factor on the objects' sizes: larger images have smaller objects, with more room between them.
OBJECT_SCALES = {64: 1.0, 128: 0.7}


def get_config(resolution: str = "64") -> ConfigDict:
    if resolution not in map(str, OBJECT_SCALES):
        raise UserError(f"configs/scenes.py:{resolution}: name a side in pixels after the colon, 64 or 128")
    side = int(resolution)

    config = sibling_config(__file__, "shapes")
    config.data.update(
        resolution=side,
        layout="free",
        object_shares=(1.0, 2.0, 2.0, 2.0, 1.5, 1.5),  # single objects are learned early, six have the longest captions
        object_scale=OBJECT_SCALES[side],
        overlaps=0.25,
    )
    # Captions of six objects with sizes and positions have 59 tokens, and the end token.
    config.text.max_length = 60
    for encoder in config.encoders.values():
        encoder.train.steps = 400  # captions are longer than the demo's, and say more
    config.vae.model.sample_size = side
    config.vae.train.steps = 2000
    config.model.update(
        depth=6,
        position_grid=side // 8,  # 64 or 256 tokens
    )
    config.train.update(
        steps=12_000,  # after 3,600, positions and colours are learned, shapes are not
        warmup_steps=100,
        ema_decay=0.998,
        log_every=50,
        checkpoint_every=1000,
        sample_every=4000,
    )
    config.evaluate = {
        "one_object": 64,
        "two_objects": 64,
        "three_objects": 64,
        "four_objects": 64,
        "six_objects": 64,
        "overlapping_objects": 64,
        "held_out_pairs": 64,
    }
    return config
