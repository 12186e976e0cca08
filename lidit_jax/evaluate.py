"""Draws a benchmark: `python -m lidit_jax.evaluate --workdir=DIR --benchmark=geneval --file=FILE --out=DIR`.

FILE is the benchmark's own (GenEval's evaluation_metadata.jsonl, one of T2I-CompBench's lists, DPG-Bench's prompts, or
any list of prompts); OUT becomes the folder that its official scorer reads. Run the same command again and it goes on
where it stopped. All devices draw; on a pod, run it with --distributed on every host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.evaluation.benchmarks import BENCHMARKS
from lidit_jax.evaluation.drawing import Request, draw_benchmark
from lidit_jax.parallel.hosts import join_hosts

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of a training run")
_DISTRIBUTED = cli.define_distributed()
_BENCHMARK = flags.DEFINE_string("benchmark", None, ", ".join(BENCHMARKS))
_FILE = flags.DEFINE_string("file", None, "the benchmark's prompts")
_OUT = flags.DEFINE_string("out", None, "folder for the pictures")
_NUM_IMAGES = flags.DEFINE_integer("num_images", 4, "pictures a prompt")
_DRAWING = cli.define_drawing()


def main() -> None:
    join_hosts(_DISTRIBUTED.value)
    draw_benchmark(
        Request(
            workdir=epath.Path(cli.require(_WORKDIR.name)),
            benchmark=cli.require(_BENCHMARK.name),
            file=epath.Path(cli.require(_FILE.name)),
            out=epath.Path(cli.require(_OUT.name)),
            num_images=_NUM_IMAGES.value,
            **_DRAWING(),
        )
    )


if __name__ == "__main__":
    cli.run(main)
