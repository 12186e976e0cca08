"""Generates the images of a benchmark.

    python -m lidit_jax.evaluate --workdir=runs/shapes --benchmark=shapes --num_images=1 --out=DIR

--file is the benchmark's own file: GenEval's evaluation_metadata.jsonl, one of T2I-CompBench's lists, DPG-Bench's
prompts, the folder of T2I-CompBench's lists for positional_bias, or any list of prompts. positional_bias makes prompts
of four adjective-noun pairs of one kind, like the samples in the paper, or with --mixed_pairs (ours) of one to eight
pairs. --out gets the layout that the official scorer and `python -m lidit_jax.score` read. --benchmark=shapes, the
built-in scenes, needs no file and is scored at once (scores.json, grid.png). The same command resumes an interrupted
run. All devices are used; on a pod, run the command with --distributed on every host.
"""

from absl import flags
from etils import epath

from lidit_jax import cli
from lidit_jax.parallel.preemption import activity

_BENCHMARKS = ("geneval", "t2i_compbench", "dpg_bench", "positional_bias", "prompts", "shapes")
_WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a training run")
_DISTRIBUTED = cli.define_distributed()
_BENCHMARK = flags.DEFINE_string("benchmark", None, f"benchmark: {', '.join(_BENCHMARKS)}")
_FILE = flags.DEFINE_string("file", None, "file or folder with the benchmark's prompts; none for shapes")
_OUT = flags.DEFINE_string("out", None, "output folder for the images")
_NUM_IMAGES = cli.define_num_images(4, "images per prompt")
_NUM_SCENES = flags.DEFINE_integer(
    "num_scenes", 256, "prompts of each kind (shapes only)", lower_bound=1, upper_bound=1_000_000
)
_MIXED_PAIRS = flags.DEFINE_bool(
    "mixed_pairs",
    False,
    "one to eight pairs of mixed kinds per prompt, not the paper's four of one kind (positional_bias only, ours)",
)
_MOVED = cli.define_moved_weights()
_SAMPLING = cli.define_sampling()


def main() -> None:
    from lidit_jax.evaluate.generate import Request, generate_benchmark
    from lidit_jax.parallel.hosts import join_hosts

    join_hosts(_DISTRIBUTED.value)
    request = Request(
        workdir=epath.Path(cli.require(_WORKDIR.name)),
        benchmark=cli.require(_BENCHMARK.name),
        file=epath.Path(_FILE.value) if _FILE.value else None,
        out=epath.Path(cli.require(_OUT.name)),
        num_images=_NUM_IMAGES.value,
        num_scenes=_NUM_SCENES.value,
        mixed_pairs=_MIXED_PAIRS.value,
        **_MOVED(),
        **_SAMPLING(),
    )
    with activity("generating images"):
        generate_benchmark(request)


if __name__ == "__main__":
    cli.run(main)
