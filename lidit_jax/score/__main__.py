"""Scores generated images.

    python -m lidit_jax.score --benchmark=t2i_compbench --images=DIR --out=OUT --vqa=Salesforce/blip-vqa-base

DIR holds the images that `python -m lidit_jax.evaluate`, or any other generator, wrote in the layout of the official
scorer. The scoring models are transformers', in PyTorch. Writes to OUT results.json, with one result per image, and
report.json, report.md and report.png, which compare the scores with the paper's Table 1. The same command resumes an
interrupted run.

    geneval          --detector=facebook/mask2former-swin-small-coco-instance --clip=openai/clip-vit-large-patch14
    t2i_compbench    --vqa=Salesforce/blip-vqa-base, or --detector=… for its spatial part
    dpg_bench        --vqa=… --questions=FILE
    positional_bias  --vqa=Salesforce/blip-vqa-base
"""

import importlib
import logging

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.errors import UserError
from lidit_jax.parallel.preemption import activity

logger = logging.getLogger("lidit_jax.score")  # not __name__, "__main__" here: only the package's logs are shown

# Modules of `lidit_jax.score` whose `score` scores a benchmark.
SCORERS = {"geneval": "geneval", "t2i_compbench": "compbench", "dpg_bench": "dpg", "positional_bias": "positional_bias"}

_BENCHMARK = flags.DEFINE_string("benchmark", None, ", ".join(SCORERS))
_IMAGES = flags.DEFINE_string("images", None, "folder of the generated images")
_OUT = flags.DEFINE_string("out", None, "folder for the results and the report")
_DETECTOR = flags.DEFINE_string("detector", None, "object detector: a model's folder, or its name on the hub")
_CLIP = flags.DEFINE_string("clip", None, "CLIP model that classifies colours: a folder, or a name on the hub")
_VQA = flags.DEFINE_string("vqa", None, "model that answers questions about images: a folder, or a name on the hub")
_FILE = flags.DEFINE_string("file", None, "the benchmark's prompts; if given, all of them must have images")
_QUESTIONS = flags.DEFINE_string("questions", None, "DPG-Bench's dpg_bench.csv")
_MODEL_NAME = flags.DEFINE_string("model_name", "ours", "name of the model that generated the images, in the report")


def main() -> None:
    from lidit_jax.files import check_writable
    from lidit_jax.score.eval_extra import require_extra
    from lidit_jax.score.report import write_report
    from lidit_jax.score.results import ScoreRequest

    if cli.require(_BENCHMARK.name) not in SCORERS:
        raise UserError(f"--benchmark={_BENCHMARK.value}: use one of {', '.join(SCORERS)}")
    require_extra("scoring", "matplotlib", "torch", "transformers")
    request = ScoreRequest(
        benchmark=_BENCHMARK.value,
        images=epath.Path(cli.require(_IMAGES.name)),
        out=epath.Path(cli.require(_OUT.name)),
        detector=_DETECTOR.value,
        clip=_CLIP.value,
        vqa=_VQA.value,
        file=epath.Path(_FILE.value) if _FILE.value else None,
        questions=epath.Path(_QUESTIONS.value) if _QUESTIONS.value else None,
    )
    check_writable(request.out, f"--out={request.out}")
    with activity("scoring"):
        report = importlib.import_module(f"lidit_jax.score.{SCORERS[request.benchmark]}").score(request)
    logger.info("\n%s\n%s", write_report(report, request.out, _MODEL_NAME.value), request.out)


if __name__ == "__main__":
    cli.run(main)
