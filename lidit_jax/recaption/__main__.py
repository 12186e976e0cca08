"""Writes a data set anew, with captions by a vision-language model and aesthetic scores beside the texts it has.

    python -m lidit_jax.recaption --config=configs/emoji.py --config.data.path=SHARDS --weights=MODEL --out=NEW_SHARDS

MODEL is an image-text-to-text model of transformers: a folder, or a name on the hub. Training on NEW_SHARDS samples one
of both captions: --config.data.source=tar --config.data.captions.txt=1 --config.data.captions.synthetic=1.

With --clip=CLIP_MODEL --aesthetic_head=FILE.safetensors each image gets an aesthetic score, and those with less than
data.min_aesthetic are left out before they are captioned; without --weights there are scores alone.

The same command resumes an interrupted run. Several processes share the work with --part=0/8 … --part=7/8: one for each
GPU of each host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.parallel.preemption import activity

_CONFIG = cli.define_config()
_OUT = flags.DEFINE_string("out", None, "output folder of tar shards")
_WEIGHTS = flags.DEFINE_string("weights", None, "vision-language model: a folder, or its name on the hub")
_QUESTION = flags.DEFINE_string("question", "Describe this image in detail.", "what the model is asked of each image")
_FIELD = flags.DEFINE_string("field", "synthetic", "caption field of the answers, for data.captions")
_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 256, "longest caption in tokens", lower_bound=1, upper_bound=8192)
_BATCH = flags.DEFINE_integer("batch", 8, "images per batch", lower_bound=1)
_CLIP = flags.DEFINE_string("clip", None, "CLIP model of the aesthetic scores: a folder, or its name on the hub")
_HEAD = flags.DEFINE_string("aesthetic_head", None, "safetensors file with the linear layers of the aesthetic scores")
_PART = flags.DEFINE_string("part", "0/1", "this process's part of the work, as NUMBER/COUNT from 0/COUNT on")


def main() -> None:
    import jax

    from lidit_jax.recaption.request import RecaptionRequest, parse_part
    from lidit_jax.recaption.write import recaption

    out = epath.Path(cli.require(_OUT.name))
    request = RecaptionRequest(
        weights=_WEIGHTS.value,
        question=_QUESTION.value,
        field=_FIELD.value,
        max_tokens=_MAX_TOKENS.value,
        batch_size=_BATCH.value,
        clip=_CLIP.value,
        aesthetic_head=_HEAD.value,
    )
    part = parse_part(_PART.value)
    jax.config.update("jax_platforms", "cpu")  # it only reads the data; PyTorch computes
    with activity("captioning"):
        recaption(cli.read_config(_CONFIG), request, out, part)


if __name__ == "__main__":
    cli.run(main)
